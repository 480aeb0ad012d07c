r"""Write answers in the formats that AlpacaEval 2, Arena-Hard and MT-Bench judge, and print the commands that
judge them.

In:  generated or rewarded JSON Lines, best of one greedy answer a prompt.
Out: `--format alpaca_eval`         a JSON list of {"dataset", "instruction", "output", "generator"};
     `--format arena_hard`          JSON Lines as today's arena-hard-auto reads them, for its sets v2.0 and
                                    v0.1: `uid`, `ans_id`, `model`, `messages`, `tstamp`, `metadata`;
     `--format arena_hard_fastchat` JSON Lines as arena-hard-auto read them before April 2025: `question_id`,
                                    `answer_id`, `model_id`, `choices`, `tstamp`, `conv_metadata`;
     `--format mt_bench`            JSON Lines as FastChat's judge reads them: `question_id`, `answer_id`,
                                    `model_id`, `choices` with the answers to both turns, `tstamp`.

    python evaluation/export_answers.py --dataset_name_or_path runs/tiny/iter3/heldout_greedy.rewarded.jsonl \
        --format alpaca_eval --generator tiny-iter3 --output_dir runs/tiny/iter3/alpaca_eval.json

The first two compare with the answers of a baseline to their own prompts, so answer these first: AlpacaEval's
with `get_hf2.py --dataset_key instruction`, Arena-Hard's by giving its `question.jsonl` as the prompts,
MT-Bench's by evaluation/mt_bench.py. Their fields (`dataset`, `uid`, …) are carried into the answers and
found here. Against other answers of yours (the starting policy's, say) any prompts do. evaluate_judged.sh
does all of this.
"""

import hashlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, manifest, records
from common.cli import UserError, arg
from evaluation import judging

FORMATS = ("alpaca_eval", "arena_hard", "arena_hard_fastchat", "mt_bench")


@dataclass
class Arguments:
    dataset_name_or_path: list[str] = arg(help="answers: generated or rewarded JSON Lines files")
    output_dir: str = arg(help="file to write; of Arena-Hard its name is the model's name there")
    format: str = arg(help="who judges", choices=FORMATS)
    generator: str = arg(help="the model's name on the leaderboard, for example mine-iter3")
    choose: str = arg(
        "first",
        "which of K answers: the first, or the one with the highest reward (best of K)",
        ("first", "best"),
    )
    skip_multi_turn: bool = arg(
        False,
        help="leave prompts of several turns out, which these formats cannot hold, instead of refusing them",
    )
    overwrite: bool = arg(False, help="replace a file that is there")
    local_judge: str | None = arg(
        None, help="a model that vLLM serves, to judge in place of the hosted one (AlpacaEval, Arena-Hard)"
    )
    judge_url: str = arg("http://127.0.0.1:8000/v1", help="where it is served")
    clone: str | None = arg(
        None, help="folder of arena-hard-auto, or of FastChat's llm_judge: its settings are then written"
    )


def instruction_of(record: dict, where: str) -> str:
    """The prompt as one text.

    Raises:
        UserError: it has several turns, or a system prompt, which the judge would not see.
    """
    roles = [message["role"] for message in record["prompt"]]
    if roles != ["user"] or record.get("tools"):
        turns = f"the turns {', '.join(roles)}{' and tools' if record.get('tools') else ''}"
        raise UserError(
            f"{where} has {turns}, and these formats hold one user turn: leave such prompts out with "
            "--skip_multi_turn true"
        )
    return record["prompt"][0]["content"]


def chosen(record: dict, how: str, where: str) -> int:
    """Index of the answer that is exported."""
    if how == "first":
        return 0
    rewards = record.get("rewards")
    rewards = rewards[: len(record["responses"])] if isinstance(rewards, list) else []
    known = [i for i, reward in enumerate(rewards) if records.finite(reward)]
    if not known:
        raise UserError(
            f"{where} has no rewards to choose by: score it with annotate_data/get_rewards.py, or give "
            "--choose first"
        )
    return max(known, key=lambda i: rewards[i])


def markdown_counts(text: str) -> dict[str, dict]:
    """Arena-Hard's style features of an answer, what stands between ``` left out: headers by level, list
    items, bold spans.
    """
    for block in re.findall("```([^`]*)```", text):
        text = text.replace(block, "")
    levels = Counter(map(len, re.findall(r"^(#{1,6})\s", text, re.MULTILINE)))
    items = {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"}
    bold = {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"}
    return {
        "header_count": {f"h{n}": levels[n] for n in range(1, 7)},
        "list_count": {kind: len(re.findall(mark, text, re.MULTILINE)) for kind, mark in items.items()},
        "bold_count": {kind: len(re.findall(mark, text)) for kind, mark in bold.items()},
    }


def token_counter(fastchat: bool) -> Callable[[str], int] | None:
    """Arena-Hard's own count of an answer's tokens where tiktoken and its vocabulary can be had, else
    None.
    """
    try:
        import tiktoken

        encoding = tiktoken.encoding_for_model("gpt-3.5-turbo" if fastchat else "gpt-4o")
        return lambda text: len(encoding.encode(text, disallowed_special=()))
    except Exception:  # not installed, or no network to fetch the vocabulary
        return None


def key_of(record: dict, names: tuple[str, ...], where: str) -> str | int:
    for name in names:
        if isinstance(record.get(name), (str, int)):
            return record[name]
    raise UserError(
        f"{where} has no `{names[0]}`: answer arena-hard-auto's question.jsonl, whose fields are carried "
        "into the answers"
    )


def alpaca_entry(record: dict, instruction: str, answer: str, args: Arguments) -> dict:
    dataset = record.get("dataset")
    return {
        "dataset": dataset if isinstance(dataset, str) else Path(args.dataset_name_or_path[0]).stem,
        "instruction": instruction,
        "output": answer,
        "generator": args.generator,
    }


def arena_entry(
    record: dict, instruction: str, answer: str, args: Arguments, tokens: int, where: str
) -> dict:
    """One line of a model_answer file; `tokens` of the answer for its style control."""
    counts = {"token_len": tokens} | markdown_counts(answer)
    digest = hashlib.sha256(f"{args.generator}\0{instruction}\0{answer}".encode()).hexdigest()[:22]
    if args.format == "arena_hard":
        asked, given = {"role": "user", "content": instruction}, {"answer": answer}
        return {
            "uid": key_of(record, ("uid", "question_id"), where),
            "ans_id": digest,
            "model": args.generator,
            "messages": [asked, {"role": "assistant", "content": given}],
            "tstamp": time.time(),
            "metadata": counts,
        }
    return {
        "question_id": key_of(record, ("question_id", "uid"), where),
        "answer_id": digest,
        "model_id": args.generator,
        "choices": [{"index": 0, "turns": [{"content": answer, "token_len": tokens}]}],
        "tstamp": time.time(),
        "conv_metadata": counts,
    }


def mt_bench_entry(record: dict, answer: str, args: Arguments, where: str) -> dict:
    """One line of FastChat's model_answer file, of the answer to a second turn."""
    asked = [message for message in record["prompt"] if message["role"] != "system"]
    if [message["role"] for message in asked] != ["user", "assistant", "user"]:
        raise UserError(f"{where} is no second turn of MT-Bench: evaluation/mt_bench.py writes these prompts")
    turns = [asked[1]["content"], answer]
    digest = hashlib.sha256("\0".join([args.generator, *turns]).encode()).hexdigest()[:22]
    return {
        "question_id": key_of(record, ("question_id",), where),
        "answer_id": digest,
        "model_id": args.generator,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def read_answers(paths: list[str]) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of each answered prompt."""
    for path in paths:
        for number, record in enumerate(records.read_generated(path), 1):
            yield f"{path} record {number}", record


def tokens_of(record: dict, i: int) -> int | None:
    """Tokens of answer i; None where the record does not say: `num_tokens` may be another tool's number."""
    counts = record.get("num_tokens")
    return counts[i] if isinstance(counts, list) else None


def make_entries(args: Arguments) -> tuple[list[dict], Counter]:
    """(the entries, Counter of notes)."""
    entries, notes, arena = [], Counter(), args.format.startswith("arena_hard")
    count = token_counter(args.format == "arena_hard_fastchat") if arena else None
    for where, record in read_answers(args.dataset_name_or_path):
        try:
            instruction = "" if args.format == "mt_bench" else instruction_of(record, where)
        except UserError:
            if not args.skip_multi_turn:
                raise
            notes["prompts of several turns left out"] += 1
            continue
        i = chosen(record, args.choose, where)
        answer = record["responses"][i]
        if len(record["responses"]) > 1:
            notes[f"prompts have several answers, the {args.choose} one was taken"] += 1
        if args.format == "mt_bench":
            entries.append(mt_bench_entry(record, answer, args, where))
            continue
        if not arena:
            entries.append(alpaca_entry(record, instruction, answer, args))
            continue
        if count is None:
            notes[
                "answers counted in the policy's tokens, as tiktoken is not there: leave out style control"
            ] += 1
        tokens = count(answer) if count else tokens_of(record, i)
        if tokens is None:
            raise UserError(
                f"{where} has no `num_tokens` and tiktoken cannot be had: install it (pip install tiktoken)"
            )
        entries.append(arena_entry(record, instruction, answer, args, tokens, where))
    if not entries:
        raise UserError(f"{', '.join(args.dataset_name_or_path)}: there is no prompt of one user turn")
    key = {"alpaca_eval": "instruction", "arena_hard": "uid"}.get(args.format, "question_id")
    twins = [value for value, n in Counter(entry[key] for entry in entries).items() if n > 1]
    if twins:
        raise UserError(
            f"{len(twins)} prompts stand twice in {', '.join(args.dataset_name_or_path)} "
            f"({str(twins[0])[:60]!r}); the judge takes one answer each"
        )
    if arena:
        entries.sort(key=lambda entry: str(entry[key]))
    elif args.format == "mt_bench":
        entries.sort(key=lambda entry: (str(type(entry[key])), entry[key]))
    return entries, notes


def bench_of(args: Arguments) -> str:
    """Which benchmark the answers are of, as evaluation/judging.py calls it."""
    if args.format != "arena_hard":
        return args.format if args.format in judging.HOSTED else "arena-hard-v0.1"
    _, first = next(read_answers(args.dataset_name_or_path))
    return "arena-hard-v0.1" if first.get("category") == "arena-hard-v0.1" else "arena-hard-v2.0"


def judging_cost(args: Arguments, bench: str) -> str:
    """How often the judge is called, and the least that it reads."""
    questions = own = 0
    for _, record in read_answers(args.dataset_name_or_path):
        questions += 1
        own += len(record.get("prompt_token_ids") or ()) + (tokens_of(record, 0) or 0)
    calls = questions * judging.GAMES[bench]
    tokens = (
        f", which read about {own * judging.GAMES[bench]:,} tokens of prompts and these answers"
        if own
        else ""
    )
    return f"{calls:,} calls of the judge{tokens}; its instructions and the baseline's answers come on top"


def main():
    args = cli.parse(Arguments, __doc__)
    for path in args.dataset_name_or_path:
        cli.existing_file(path, "generated file")
    target = Path(args.output_dir)
    wanted = ".json" if args.format == "alpaca_eval" else ".jsonl"
    if target.is_dir() or target.suffix != wanted:
        raise UserError(f"--output_dir {target}: a file name that ends in {wanted} was expected")
    judging.check_generator(args.generator)
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} is there already; give another --output_dir or --overwrite")
    entries, notes = make_entries(args)
    clone = Path(args.clone).resolve() if args.clone else None
    bench = bench_of(args)
    job = judging.Judging(bench, args.generator, target, args.local_judge, args.judge_url, clone)
    job.before_2025 = args.format == "arena_hard_fastchat"
    to_judge = judging.commands(job)
    target.parent.mkdir(parents=True, exist_ok=True)
    judging.write_settings(job)
    write = manifest.write_json if args.format == "alpaca_eval" else manifest.write_jsonl
    write(target, entries)
    print(f"wrote {len(entries)} answers of {args.generator} to {target}")
    for note, n in notes.items():
        print(f"note: {n} {note}")
    print(f"{judging_cost(args, bench)}. To judge them:", *to_judge, sep="\n  ")


if __name__ == "__main__":
    cli.run(main)
