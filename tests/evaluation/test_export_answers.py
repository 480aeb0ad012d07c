"""evaluation/export_answers.py against what the judges' own readers do with a file.

Their code is not at hand in the tests. What is recreated here, from their sources: AlpacaEval reads a .json
by pandas, takes the name from the one value of `generator` and joins two models' answers by `instruction`;
Arena-Hard reads a line a question into {uid: answer}, gives the judge `messages[-1]["content"]["answer"]`,
and sums each of the `metadata`'s groups for its style control.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "evaluation/export_answers.py"
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


def export(path, output, kind, *more, status=0):
    command = [
        sys.executable,
        SCRIPT,
        "--dataset_name_or_path",
        path,
        "--format",
        kind,
        "--generator",
        "mine",
        "--output_dir",
        output,
        *more,
    ]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == status, process.stdout + process.stderr
    return process


def test_alpaca_eval_reads_it(answered, tmp_path):
    import pandas

    path, rows = answered
    told = export(path, tmp_path / "mine.json", "alpaca_eval")
    export(path, tmp_path / "other.json", "alpaca_eval", "--generator", "other", "--choose", "best")
    mine, other = (pandas.read_json(tmp_path / f"{name}.json") for name in ("mine", "other"))
    assert set(mine.columns) == {
        "dataset",
        "instruction",
        "output",
        "generator",
    } and mine.generator.unique().tolist() == ["mine"]
    assert mine.instruction.tolist() == [
        row["prompt"][0]["content"] for row in rows
    ] and mine.output.tolist() == [row["responses"][0] for row in rows]
    joined = mine.merge(other, on=["instruction"])
    assert len(joined) == 3 and joined.output_y.tolist() == ["best"] * 3
    assert (
        "alpaca_eval --model_outputs" in told.stdout
        and "3 prompts have several answers, the first one was taken" in told.stdout
    )


@pytest.mark.parametrize("kind", ["arena_hard", "arena_hard_fastchat"])
def test_arena_hard_reads_it(answered, tmp_path, kind):
    path, rows = answered
    told = export(path, tmp_path / "mine.jsonl", kind)
    lines = [
        json.loads(line) for line in (tmp_path / "mine.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    key = "uid" if kind == "arena_hard" else "question_id"
    assert [line[key] for line in lines] == ["u0", "u1", "u2"]
    by_key = {line[key]: line for line in lines}
    for row in rows:
        line = by_key[row["uid"]]
        style = line["metadata" if kind == "arena_hard" else "conv_metadata"]
        if kind == "arena_hard":
            assert (
                set(line) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
                and line["model"] == "mine"
            )
            assert line["messages"] == [
                *row["prompt"],
                {"role": "assistant", "content": {"answer": row["responses"][0]}},
            ]
        else:
            assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"}
            assert [turn["content"] for turn in line["choices"][0]["turns"]] == [row["responses"][0]]
        assert list(style) == ["token_len", "header_count", "list_count", "bold_count"] and isinstance(
            style["token_len"], int
        )
        summed = [v if isinstance(v, int) else sum(v.values()) for v in style.values()][1:]
        assert (
            summed == [2, 4, 2]
            and style["header_count"]["h2"] == 1
            and style["list_count"] == {"ordered": 2, "unordered": 2}
        )
    assert (
        f"data/arena-hard-v{'2.0' if kind == 'arena_hard' else '0.1'}/model_answer/mine.jsonl" in told.stdout
    )


def test_turns_that_a_format_cannot_hold_are_refused_or_left_out(answered, tmp_path):
    path, rows = answered
    rows[1]["prompt"] = [{"role": "system", "content": "s"}, *rows[1]["prompt"]]
    write(path, rows)
    refused = export(path, tmp_path / "m.json", "alpaca_eval", status=2)
    assert (
        "record 2 has the turns system, user" in refused.stderr
        and "--skip_multi_turn" in refused.stderr
        and not (tmp_path / "m.json").exists()
    )
    told = export(path, tmp_path / "m.json", "alpaca_eval", "--skip_multi_turn", "true")
    assert (
        len(json.loads((tmp_path / "m.json").read_text())) == 2
        and "1 prompts of several turns left out" in told.stdout
    )


@pytest.mark.parametrize(
    "change, kind, more, named",
    [
        (lambda row: row.pop("uid"), "arena_hard", (), "has no `uid`"),
        (lambda row: row.update(uid="same"), "arena_hard", (), "stand twice"),
        (
            lambda row: row.update(rewards=[None, None]),
            "alpaca_eval",
            ("--choose", "best"),
            "no rewards to choose by",
        ),
        (lambda row: row, "alpaca_eval", ("--output_dir", "x.jsonl"), "ends in .json"),
        (lambda row: row, "alpaca_eval", ("--generator", "a/b"), "without a slash"),
        (lambda row: row, "alpaka_eval", (), "is not one of alpaca_eval"),
    ],
)
def test_refusals(answered, tmp_path, change, kind, more, named):
    path, rows = answered
    for row in rows:
        change(row)
    write(path, rows)
    refused = export(
        path, tmp_path / ("m.jsonl" if kind.startswith("arena") else "m.json"), kind, *more, status=2
    )
    assert named in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
