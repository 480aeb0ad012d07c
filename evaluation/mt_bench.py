r"""MT-Bench's questions as prompts: first turns, and second turns with the first answers in them.

In:  MT-Bench's question.jsonl; for the second turns the answers to the first ones.
Out: `--output_dir` is a prefix: `PREFIXT.jsonl` holds the prompts that are sampled at temperature T. MT-Bench
     samples by category: 0.7 for writing and roleplay, 0.1 for stem and humanities, 0 for the others.

    python evaluation/mt_bench.py --questions mine/question.jsonl --output_dir ./data/first_
    python evaluation/mt_bench.py --questions mine/question.jsonl --output_dir ./data/second_ \
        --answers ./data/answers_0.0.jsonl ./data/answers_0.1.jsonl ./data/answers_0.7.jsonl

Answer each file with generation/get_hf2.py at its temperature. evaluation/evaluate_judged.sh does all of it;
evaluation/export_answers.py writes the answers to the second turns as FastChat reads them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, manifest, records
from common.cli import UserError, arg
from common.jsonl import BadRecord, jsonl_records

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # of other categories 0


@dataclass
class Arguments:
    questions: str = arg(help="MT-Bench's question.jsonl")
    output_dir: str = arg(help="prefix of the files to write")
    answers: list[str] = arg([], help="generated files of the first turns; none: write the first turns")


def read_questions(path: str) -> dict[int | str, dict]:
    """{question_id: question} in the file's order.

    Raises:
        UserError: a line is no question of two turns.
    """
    found = {}
    for number, question in enumerate(jsonl_records(cli.existing_file(path, "questions"), "questions"), 1):
        if isinstance(question, BadRecord):
            raise question
        turns, key = question.get("turns"), question.get("question_id")
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(t, str) for t in turns):
            raise UserError(f"{path} record {number}: `turns` with two texts was expected, as in MT-Bench")
        if not isinstance(key, (int, str)) or key in found:
            raise UserError(f"{path} record {number}: its `question_id` is missing, or stands twice")
        found[key] = question
    return found


def temperature_of(question: dict) -> float:
    return TEMPERATURES.get(str(question.get("category")), 0.0)


def temperatures(path: str) -> list[float]:
    """The temperatures at which the questions of a file are sampled, in order."""
    return sorted({temperature_of(question) for question in read_questions(path).values()})


def first_answers(paths: list[str], questions: dict) -> dict[int | str, str]:
    """{question_id: the first of the answers to its first turn}.

    Raises:
        UserError: a question has no answer.
    """
    answered = (record for path in paths for record in records.read_generated(path))
    found = {record.get("question_id"): record["responses"][0] for record in answered}
    missing = [key for key in questions if key not in found]
    if missing:
        what = f"{len(missing)} questions have no answer to their first turn ({missing[0]!r})"
        raise UserError(f"{what}: see the *.skipped.jsonl beside {paths[0]}, or raise --max_input_length")
    return found


def prompts(questions: dict, answers: dict | None = None) -> dict[float, list[dict]]:
    """{temperature: prompt records}: the first turns, or with `answers` the second ones."""
    found = {}
    for key, question in questions.items():
        turns = [{"role": "user", "content": text} for text in question["turns"]]
        if answers is None:
            turns = turns[:1]
        else:
            turns.insert(1, {"role": "assistant", "content": answers[key]})
        record = {"messages": turns, "question_id": key, "category": question.get("category")}
        found.setdefault(temperature_of(question), []).append(record)
    return found


def main():
    args = cli.parse(Arguments, __doc__)
    questions = read_questions(args.questions)
    answers = first_answers(args.answers, questions) if args.answers else None
    Path(args.output_dir).parent.mkdir(parents=True, exist_ok=True)
    for temperature, found in sorted(prompts(questions, answers).items()):
        path = f"{args.output_dir}{temperature}.jsonl"
        manifest.write_jsonl(path, found)
        print(f"wrote {cli.count(len(found), 'prompt')} to {path}, for temperature {temperature}")


if __name__ == "__main__":
    cli.run(main)
