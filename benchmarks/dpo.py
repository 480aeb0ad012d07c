r"""Measure pairs per second and peak memory of DPO training: our trainer against TRL's, on the same pairs and
steps in one run.

In:  nothing: a Llama of 26 million random weights and synthetic pairs are made on the spot. Or a model of
     yours.
Out: a table, and with --output_dir a JSON file of the numbers, the versions and the cores.

    python benchmarks/dpo.py --shape recipe --output_dir runs/dpo.json

ours              packed rows with shared prompts, reference known from disk
trl               TRL 1.16's DPOTrainer with precomputed reference values, at the best of --batch_sizes
trl, reference    the same with its reference model computed at every step, as it does by default

Each is a process of its own, which takes one optimizer step when told to; they take turns step by step, in an
order that rotates, so that all meet the same moments of the machine. A step counts from its first pass to the
beginning of the next, with collation, optimizer and log. The first step is a warm-up. Peak memory is the
process's own (on a GPU, torch's).

The ceiling is that of FLOPs, attention aside: tokens of TRL's padded batches over tokens of our rows, of
which sharing alone is (2P + C + R) / (P + C + R) for a prompt of P and responses of C and R tokens, and the
rest is padding.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.random_models import make_model
from common import models
from common.cli import UserError, arg, parse, run
from common.devices import prepare_threads
from common.manifest import versions, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback
    from trl import DPOConfig, DPOTrainer

# tokens of prompt and response: (mean of the logarithm's median, spread of the logarithm, least, most)
SHAPES = {
    "recipe": ((150, 0.8, 16, 1024), (300, 0.6, 16, 1024)),  # means of about 200 and 350, as in its data
    "long": ((800, 0.3, 300, 1400), (120, 0.5, 16, 500)),
    "short": ((24, 0.4, 8, 80), (300, 0.6, 16, 1024)),
}
WAYS = ("ours", "trl", "trl, reference")
VOCABULARY = 4096


@dataclass
class Arguments:
    shape: str = arg("recipe", "lengths of prompts and responses", tuple(SHAPES))
    steps: int = arg(4, "optimizer steps that are measured")
    pairs: int = arg(8, "pairs of an optimizer step")
    batch_sizes: list[int] = arg(
        [1, 2, 4, 8], "pairs in a pass that TRL's trainer is tried with; the fastest counts"
    )
    row_tokens: int | None = arg(
        None, "tokens of a row of ours; None: what TRL's batch takes at its best size, padded"
    )
    model_name_or_path: str | None = arg(None, "a causal language model; None: 26 million random weights")
    dtype: str = arg(
        "auto", "auto is bfloat16 (autocast) on a GPU, float32 without", ("auto", "float32", "bfloat16")
    )
    gradient_checkpointing: bool = arg(False, "recompute activations")
    ways: list[str] = arg(list(WAYS), "which to measure")
    seed: int = arg(0, "of weights and pairs")
    output_dir: str | None = arg(None, "JSON file to write (a file name)")


def make_rows(shape: str, count: int, vocabulary: int, seed: int) -> list[dict]:
    """Pairs as token ids, drawn evenly; chosen and rejected differ from their first token on or share a
    few.
    """
    rng, (prompt, response) = random.Random(seed), SHAPES[shape]

    def draw(lengths: tuple[float, ...]) -> list[int]:
        median, spread, least, most = lengths
        length = min(most, max(least, round(rng.lognormvariate(0, spread) * median)))
        return [rng.randrange(4, vocabulary) for _ in range(length)]

    return [
        {
            "prompt_ids": [1, *draw(prompt)],
            "chosen_ids": draw(response),
            "rejected_ids": draw(response),
            "margin": 1.0,
        }
        for _ in range(count)
    ]


def padded_tokens(rows: list[dict], order: list[int], at_once: int) -> int:
    """Tokens of TRL's batches of `at_once` pairs, in this order."""
    lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    batches = ([lengths[i] for i in order[k : k + at_once]] for k in range(0, len(order), at_once))
    return sum(2 * len(batch) * max(batch) for batch in batches)


# A process of one way


def settings(args: Arguments, folder: Path, at_once: int, accumulation: int, precompute: bool) -> "DPOConfig":
    import torch
    from trl import DPOConfig

    half = args.dtype == "bfloat16" or (args.dtype == "auto" and torch.cuda.is_available())
    return DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulation,
        max_steps=args.steps + 1,
        precompute_ref_log_probs=precompute,
        precompute_ref_batch_size=at_once,
        bf16=half,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=args.gradient_checkpointing,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        learning_rate=1e-5,
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def turns(tell: Callable) -> "TrainerCallback":
    """A callback that tells the memory and waits for a line before each step and at the end."""
    import torch
    from transformers import TrainerCallback

    def pause():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tell(memory=memory)
        sys.stdin.readline()

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object):
            pause()

        def on_train_end(self, *_: object, **__: object):
            pause()

    return Turns()


def our_trainer(
    args: Arguments,
    folder: Path,
    rows: list[dict],
    at_once: int,
    row_tokens: int,
    load: Callable,
    **common: object,
) -> tuple["DPOTrainer", float]:
    """(our trainer, seconds that the reference took).

    Args:
        load: a function that loads the model.
        common: arguments that TRL's trainer gets too.
    """
    import torch
    from datasets import Dataset

    started = time.monotonic()
    from common.manifest import fingerprint
    from dpo_iteration import reference
    from dpo_iteration.dpo import IterativeDPOTrainer, loss_settings
    from dpo_iteration.packing import Steps, columns_of

    name = str(folder / "model")
    steps = Steps(
        [columns_of(row) for row in rows], args.pairs, row_tokens, at_once, seed=args.seed, epochs=1
    )
    config = settings(args, folder / "ours", at_once, steps.accumulation, True)
    half = torch.bfloat16 if config.bf16 else None
    reference.add_reference(
        rows,
        lambda: reference.ready(load(), config, True),
        name,
        None,
        folder / "cache",
        {"f": fingerprint(name)["size"]},
        reference.Passes(row_tokens, at_once, 3, half),
    )
    seconds = time.monotonic() - started
    trainer = IterativeDPOTrainer(
        model=load(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        rows={"train": rows, "eval": []},
        steps=steps,
        eval_steps=None,
        sharing=True,
        settings=loss_settings(config),
        **common,
    )
    return trainer, seconds


def trl_trainer(
    precompute: bool,
    args: Arguments,
    folder: Path,
    rows: list[dict],
    at_once: int,
    load: Callable,
    **common: object,
) -> tuple["DPOTrainer", float]:
    """(TRL's trainer, seconds until it was made, in which it computes the reference with `precompute`).

    Args:
        load, common: as `our_trainer`.
    """
    from datasets import Dataset
    from trl import DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    started = time.monotonic()
    path = folder / "trl.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Dataset.from_json(str(path), cache_dir=str(folder / f"cache{os.getpid()}"))
    trainer = Tokenised(
        model=load(),
        ref_model=None if precompute else load(),
        args=settings(args, folder / "trl", at_once, args.pairs // at_once, precompute),
        train_dataset=data,
        **common,
    )
    return trainer, time.monotonic() - started


def child(way: str, args: Arguments, folder: Path, at_once: int, row_tokens: int):
    """Train; each step begins when a line comes in, and its end is told by a line."""
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM, PrinterCallback

    name, rows = str(folder / "model"), json.loads((folder / "rows.json").read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = models.load_tokenizer(name)
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere

    def tell(**words: object):
        print(json.dumps(words), file=talk, flush=True)

    def load() -> "PreTrainedModel":
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="sdpa")

    shared = {"load": load, "processing_class": tokenizer, "callbacks": [turns(tell)]}
    if way == "ours":
        trainer, reference_seconds = our_trainer(args, folder, rows, at_once, row_tokens, **shared)
    else:
        trainer, reference_seconds = trl_trainer(way == "trl", args, folder, rows, at_once, **shared)
    trainer.remove_callback(PrinterCallback)
    tell(reference=reference_seconds, tokens=None)
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()


class Way:
    """A child process that takes a step when asked."""

    def __init__(self, way, args, folder, at_once, row_tokens, log):
        words = [way, json.dumps(vars(args)), str(folder), str(at_once), str(row_tokens)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "child", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.seconds, self.memory = [], 0
        self.reference = self.hear()["reference"]
        self.hear()  # the first step is about to begin

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"a trainer ended with status {self.process.wait()}; its last words are above")
        return json.loads(line)

    def step(self, counts: bool = True) -> float:
        began = time.monotonic()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.memory = self.hear()["memory"]
        if counts:
            self.seconds.append(time.monotonic() - began)
        return time.monotonic() - began

    def end(self):
        self.process.kill()
        self.process.wait()


def best_size(args: Arguments, folder: Path, log: TextIO) -> int:
    """The number of pairs in a pass with which TRL takes least time for a step, of those that divide a
    step.
    """
    found = {}
    for at_once in [size for size in args.batch_sizes if args.pairs % size == 0]:
        trial = Way("trl", args, folder, at_once, 0, log)
        trial.step()
        found[at_once] = min(trial.step() for _ in range(min(2, args.steps)))
        trial.end()
        print(f"TRL with {at_once} pairs a pass: {args.pairs / found[at_once]:.2f} pairs/s", flush=True)
    return min(found, key=found.get)


def main():
    args = parse(Arguments, __doc__, yaml_positional=False)
    if unknown := [way for way in args.ways if way not in WAYS]:
        raise UserError(f"--ways {unknown[0]}: there are {', '.join(WAYS)}")
    if args.steps < 2 or args.pairs < 1:
        raise UserError("--steps must be at least 2 and --pairs at least 1")
    prepare_threads()
    from common.shared_prompts import packed_tokens
    from dpo_iteration.packing import Steps, both

    with tempfile.TemporaryDirectory() as holder, open(Path(holder, "log"), "w+") as log:
        folder = Path(holder)
        if args.model_name_or_path:
            (folder / "model").symlink_to(Path(args.model_name_or_path).resolve())
        else:
            make_model(
                folder / "model",
                vocabulary=VOCABULARY,
                seed=args.seed,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
            )
        vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
        rows = make_rows(args.shape, args.pairs * (args.steps + 1), vocabulary, args.seed)
        (folder / "rows.json").write_text(json.dumps(rows))
        ways = []
        try:
            at_once = best_size(args, folder, log)
            order = sum(Steps([0] * len(rows), args.pairs, None, seed=args.seed).steps(0), [])
            padded = padded_tokens(rows, order, at_once)
            longest = max(len(ids) for row in rows for ids in both(row))
            row_tokens = args.row_tokens or 2 * at_once * longest
            ways = [Way(way, args, folder, at_once, row_tokens, log) for way in args.ways]
            for way in ways:
                way.step(counts=False)
            for turn in range(args.steps):
                for k in range(len(ways)):
                    ways[(k + turn) % len(ways)].step()
        except UserError:
            log.seek(0)
            print(log.read()[-2000:], file=sys.stderr)
            raise
        finally:
            for way in ways:
                way.end()
    alone = sum(len(ids) for row in rows for ids in both(row))
    packed = sum(packed_tokens(both(row), labelled=True) for row in rows)
    report(
        args,
        dict(zip(args.ways, ways)),
        at_once,
        row_tokens,
        {"padded": padded, "alone": alone, "packed": packed, "pairs": len(rows)},
    )


def report(args: Arguments, ways: dict[str, Way], at_once: int, row_tokens: int, tokens: dict[str, int]):
    """Print the table and write the file."""
    mean = {name: count / tokens["pairs"] for name, count in tokens.items()}
    ceiling = tokens["padded"] / tokens["packed"]
    print(
        f"\n{args.shape}: tokens a pair {mean['padded']:.0f} padded by TRL, {mean['alone']:.0f} without "
        f"padding, {mean['packed']:.0f} in our rows"
    )
    print(
        f"ceiling {ceiling:.2f} × TRL ({tokens['alone'] / tokens['packed']:.2f} by sharing, "
        f"{tokens['padded'] / tokens['alone']:.2f} by packing); "
        f"TRL's best: {at_once} pairs a pass; rows of {row_tokens} tokens"
    )
    print(
        f"{'':<16}{'pairs/s':>9}{'of trl':>8}{'least':>7}{'most':>7}{'of ceiling':>12}{'GB':>7}"
        f"{'reference s':>13}"
    )
    found, base = {}, ways.get("trl")
    for name, way in ways.items():
        rate = args.pairs / statistics.median(way.seconds)
        steps = zip(way.seconds, base.seconds) if base else ()
        ratios = sorted(theirs / mine for mine, theirs in steps) or [float("nan")]
        ratio = statistics.median(ratios)
        share = f"{ratio / ceiling:.2f}" if name == "ours" else ""
        found[name] = {
            "pairs_per_second": rate,
            "of_trl": ratio,
            "least": ratios[0],
            "most": ratios[-1],
            "bytes": way.memory,
            "reference_seconds": way.reference,
        }
        print(
            f"{name:<16}{rate:>9.2f}{ratio:>8.2f}{ratios[0]:>7.2f}{ratios[-1]:>7.2f}{share:>12}"
            f"{way.memory / 1e9:>7.2f}{way.reference:>13.1f}"
        )
    if args.output_dir:
        figures = {
            "arguments": vars(args),
            "ways": found,
            "tokens": tokens,
            "ceiling": ceiling,
            "trl_pairs_a_pass": at_once,
            "versions": versions(),
        }
        write_json(args.output_dir, figures | {"cores": len(os.sched_getaffinity(0))})


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        way, values, folder, at_once, row_tokens = sys.argv[2:]
        child(way, Arguments(**json.loads(values)), Path(folder), int(at_once), int(row_tokens))
    else:
        run(main)
