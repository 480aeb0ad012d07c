"""evaluation/export_answers.py against what the judges' own readers do with a file.

Their code is not at hand in the tests. What is recreated here, from their sources: AlpacaEval reads a .json
by pandas, takes the name from the one value of `generator` and joins two models' answers by `instruction`;
Arena-Hard reads a line a question into {uid: answer}, gives the judge `messages[-1]["content"]["answer"]`,
and sums each of the `metadata`'s groups for its style control.
"""

import json
import sys

import pytest

from common.cli import UserError
from evaluation import export_answers

MARKDOWN = (
    "# One\n## Two\n\n1. a\n2. b\n- c\n* **bold** and __too__\n```py\n# not a header\n- no "
    "item\n```\n#no header\n"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def answered(tmp_path):
    """A rewarded file of three prompts, as answers to Arena-Hard's questions look; returns its records."""
    rows = [
        {
            "id": f"p{i}",
            "uid": f"u{2 - i}",
            "prompt": [{"role": "user", "content": f"Question {i} <b>?"}],
            "responses": [f"{MARKDOWN}{i}\u2028", "best"],
            "rewards": [0.0, 1.0],
            "num_tokens": [30 + i, 2],
        }
        for i in range(3)
    ]
    write(tmp_path / "a.jsonl", rows)
    return tmp_path / "a.jsonl", rows


@pytest.fixture
def export(monkeypatch, capsys):
    """Start the script in this process; gives what it says."""

    def start(path, output, kind, *more):
        named = {"dataset_name_or_path": path, "format": kind, "generator": "mine", "output_dir": output}
        given = [word for name, value in named.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["export_answers.py", *given, *more])
        export_answers.main()
        return capsys.readouterr().out

    return start


def test_alpaca_eval_reads_it(answered, export, tmp_path):
    import pandas

    path, rows = answered
    told = export(path, tmp_path / "mine.json", "alpaca_eval")
    export(path, tmp_path / "other.json", "alpaca_eval", "--generator", "other", "--choose", "best")
    mine, other = (pandas.read_json(tmp_path / f"{name}.json") for name in ("mine", "other"))
    assert set(mine.columns) == {"dataset", "instruction", "output", "generator"}
    assert mine.generator.unique().tolist() == ["mine"]
    assert mine.instruction.tolist() == [row["prompt"][0]["content"] for row in rows]
    assert mine.output.tolist() == [row["responses"][0] for row in rows]
    joined = mine.merge(other, on=["instruction"])
    assert len(joined) == 3 and joined.output_y.tolist() == ["best"] * 3
    assert "alpaca_eval --model_outputs" in told
    assert "3 prompts have several answers, the first one was taken" in told


@pytest.mark.parametrize("kind", ["arena_hard", "arena_hard_fastchat"])
def test_arena_hard_reads_it(answered, export, tmp_path, kind):
    path, rows = answered
    told = export(path, tmp_path / "mine.jsonl", kind)
    text = (tmp_path / "mine.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line]
    today = kind == "arena_hard"
    key, style_key = ("uid", "metadata") if today else ("question_id", "conv_metadata")
    assert [line[key] for line in lines] == ["u0", "u1", "u2"]
    for row, line in zip(rows, reversed(lines), strict=True):
        answer = row["responses"][0]
        if today:
            assert set(line) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
            given = {"role": "assistant", "content": {"answer": answer}}
            assert line["model"] == "mine" and line["messages"] == [*row["prompt"], given]
        else:
            assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"}
            assert [turn["content"] for turn in line["choices"][0]["turns"]] == [answer]
        style = line[style_key]
        assert list(style) == ["token_len", "header_count", "list_count", "bold_count"]
        assert isinstance(style.pop("token_len"), int)
        assert [sum(own.values()) for own in style.values()] == [2, 4, 2]
        assert style["header_count"]["h2"] == 1 and style["list_count"] == {"ordered": 2, "unordered": 2}
    assert f"data/arena-hard-v{'2.0' if today else '0.1'}/model_answer/mine.jsonl" in told
    assert "6 calls of the judge" in told


def test_turns_that_a_format_cannot_hold_are_refused_or_left_out(answered, export, tmp_path):
    path, rows = answered
    rows[1]["prompt"] = [{"role": "system", "content": "s"}, *rows[1]["prompt"]]
    write(path, rows)
    with pytest.raises(UserError, match="record 2 has the turns system, user.*--skip_multi_turn"):
        export(path, tmp_path / "m.json", "alpaca_eval")
    assert not (tmp_path / "m.json").exists()
    told = export(path, tmp_path / "m.json", "alpaca_eval", "--skip_multi_turn", "true")
    assert len(json.loads((tmp_path / "m.json").read_text())) == 2
    assert "1 prompts of several turns left out" in told


def test_a_number_of_another_tool_is_no_count_of_tokens(answered, export, tmp_path):
    path, rows = answered
    write(path, [row | {"num_tokens": 7} for row in rows])
    assert "3 calls of the judge;" in export(path, tmp_path / "m.json", "alpaca_eval")


@pytest.mark.parametrize(
    "change, kind, more, named",
    [
        ({"uid": None}, "arena_hard", "", "has no `uid`"),
        ({"uid": "same"}, "arena_hard", "", "stand twice"),
        ({"rewards": [None, None]}, "alpaca_eval", "--choose best", "no rewards to choose by"),
        ({"num_tokens": 7}, "arena_hard", "", "record 1 has no `num_tokens`"),
        ({}, "arena_hard", "--clone /nowhere", "no such settings of arena-hard-auto"),
        ({}, "alpaca_eval", "--output_dir x.jsonl", "ends in .json"),
        ({}, "alpaca_eval", "--generator a/b", "without a slash"),
        ({}, "alpaka_eval", "", "is not one of alpaca_eval"),
    ],
)
def test_refusals(answered, export, tmp_path, change, kind, more, named):
    path, rows = answered
    write(path, [row | change for row in rows])
    target = tmp_path / ("m.jsonl" if kind.startswith("arena") else "m.json")
    with pytest.raises(UserError, match=named) as caught:
        export(path, target, kind, *more.split())
    assert "\n" not in str(caught.value) and not target.exists()
