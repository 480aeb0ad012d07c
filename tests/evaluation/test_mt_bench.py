"""evaluation/mt_bench.py: first and second turns at MT-Bench's temperatures, and FastChat's format of the
answers, read as FastChat's own code reads them (fschat 0.2.36; recreated here, it is not installed).
"""

import json
import sys

import pytest

from common.cli import UserError
from evaluation import export_answers, mt_bench

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["W1", "W2"]},
    {"question_id": 9, "category": "math", "turns": ["M1", "M2"], "reference": ["5", "6"]},
    {"question_id": 100, "category": "humanities", "turns": ["H1", "H2"]},
    {"question_id": 101, "category": "extraction", "turns": ["E1", "E2"]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def start(monkeypatch, capsys):
    def run(module, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        module.main()
        return capsys.readouterr().out

    return run


def answer(prompts):
    """A generated file as get_hf2.py writes it: the prompt is the messages, other fields are carried."""
    rows = []
    for record in read(prompts):
        asked = record.pop("messages")
        rows.append(
            record | {"prompt": asked, "responses": [f"answer {len(asked)} to {asked[-1]['content']}"]}
        )
    return write(prompts.with_suffix(".answers.jsonl"), rows)


def test_two_turns_and_what_fastchat_reads(start, tmp_path):
    questions = write(tmp_path / "question.jsonl", QUESTIONS)
    start(mt_bench, "--questions", questions, "--output_dir", tmp_path / "first_")
    first = {t: read(tmp_path / f"first_{t}.jsonl") for t in ("0.0", "0.1", "0.7")}
    # fastchat.llm_judge.common.temperature_config: writing 0.7, math and extraction 0, humanities 0.1
    asked = {t: [row["messages"] for row in rows] for t, rows in first.items()}
    assert [[m["content"] for m in row] for row in asked["0.0"]] == [["M1"], ["E1"]]
    assert [row[0]["content"] for row in asked["0.1"] + asked["0.7"]] == ["H1", "W1"]
    files = [answer(tmp_path / f"first_{t}.jsonl") for t in first]
    given = ("--questions", questions, "--output_dir", tmp_path / "second_", "--answers")
    start(mt_bench, *given, *files)
    [writing] = read(tmp_path / "second_0.7.jsonl")
    assert [(m["role"], m["content"]) for m in writing["messages"]] == [
        ("user", "W1"),
        ("assistant", "answer 1 to W1"),
        ("user", "W2"),
    ]
    second = [answer(tmp_path / f"second_{t}.jsonl") for t in first]
    target = tmp_path / "mine.jsonl"
    told = start(
        export_answers,
        *("--format", "mt_bench", "--generator", "mine", "--output_dir", target),
        *("--dataset_name_or_path", *second),
    )
    # load_model_answers: {question_id: line}; run_judge_single: choices[0]["turns"][0] and [1] as texts
    lines = read(target)
    answers = {line["question_id"]: line for line in lines}
    assert list(answers) == [9, 81, 100, 101]
    for question in QUESTIONS:
        turns = answers[question["question_id"]]["choices"][0]["turns"]
        one, two = question["turns"]
        assert turns == [f"answer 1 to {one}", f"answer 3 to {two}"]
    assert all(line["model_id"] == "mine" and isinstance(line["tstamp"], float) for line in lines)
    assert "8 calls of the judge" in told and "gen_judgment.py --model-list mine" in told
    with pytest.raises(UserError, match=r"2 questions have no answer to their first turn \(9\)"):
        start(mt_bench, *given, *files[1:])
    with pytest.raises(UserError, match="is no second turn of MT-Bench"):
        start(
            export_answers,
            *("--format", "mt_bench", "--generator", "mine", "--output_dir", tmp_path / "x.jsonl"),
            *("--dataset_name_or_path", files[0]),
        )
    with pytest.raises(UserError, match="hosted judges only"):
        start(
            export_answers,
            *("--format", "mt_bench", "--generator", "mine", "--output_dir", tmp_path / "x.jsonl"),
            *("--dataset_name_or_path", *second, "--local_judge", "m"),
        )


@pytest.mark.parametrize(
    "change, named",
    [
        ({"turns": ["one"]}, "`turns` with two texts was expected"),
        ({"question_id": 9}, "record 1: its `question_id`|stands twice"),
        ({"question_id": None}, "its `question_id` is missing"),
    ],
)
def test_refusals(start, tmp_path, change, named):
    questions = write(tmp_path / "question.jsonl", [QUESTIONS[1], QUESTIONS[0] | change])
    with pytest.raises(UserError, match=named):
        start(mt_bench, "--questions", questions, "--output_dir", tmp_path / "first_")


def test_a_category_of_another_kind_is_sampled_as_the_others():
    assert mt_bench.temperature_of({"category": ["writing"]}) == mt_bench.temperature_of({}) == 0.0
