"""Tokens per second of `get_hf2.py` against one bare `LLM.generate` of the same engine over the same prompts.

In:  a policy and prompts, or none: then a random Llama with a 32,000-token vocabulary and prompts of 50
     to 200 tokens, whose responses end at random, after a quarter of `--max_new_tokens` in the mean.
Out: a table, and with `--output_dir FILE.json` its figures. Environment `vllm`.

    python benchmarks/generation.py --prompts 128 --repeats 3 --output_dir generation.json

Each way runs in a process of its own, in turns, and is timed from the moment when the engine is ready:

    bare      `LLM(model)` with the engine's defaults, one unseeded `LLM.generate` over all prompts, nothing
              saved
    options   the same with the options that get_hf2.py gives to the engine
    seeds     and with a seed for each prompt
    ours      get_hf2.py: prompts read, tokenised and ordered, every answer saved as it finishes, the file put
              in order

so that ours / bare is the price of everything, options → seeds that of the seeds, seeds → ours that of
reading and saving. The tail is the time at the end with less than half of the slots busy.
"""

import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder, whose generation.py would hide the package

from benchmarks.random_models import make_model
from common import engine, models
from common.chat import ChatTemplate
from common.cli import UserError, arg, parse, run
from common.devices import prepare_threads, visible_gpus
from common.manifest import versions, write_json

if TYPE_CHECKING:
    from vllm import LLM

    from generation import get_hf2

WAYS = ("bare", "options", "seeds", "ours")
VOCABULARY = 32000


@dataclass
class Arguments:
    model_name_or_path: str | None = arg(None, help="policy; None: a random one of --size")
    dataset_name_or_path: str | None = arg(None, help="prompts; None: random ones")
    size: list[int] = arg(
        [512, 6], help="hidden size and layers of the random policy; 512 6 has 31 million parameters"
    )
    prompts: int = arg(128, help="number of random prompts")
    K: int = arg(8, help="responses a prompt")
    max_input_length: int = arg(1024, help="tokens")
    max_new_tokens: int = arg(256, help="tokens")
    max_num_seqs: int | None = arg(None, help="slots of get_hf2.py's engine; None: its own default")
    dtype: str = arg("bfloat16", help="of the weights")
    kv_cache_gib: float = arg(1.0, help="GiB of key-value cache, the same for all; without a GPU only")
    repeats: int = arg(3, help="turns")
    ways: list[str] = arg(list(WAYS), help="which to run")
    output_dir: str | None = arg(None, help="JSON file with the figures")


def make_policy(folder: str | Path, hidden: int, layers: int):
    """A random policy in bfloat16."""
    make_model(
        folder,
        vocabulary=VOCABULARY,
        dtype="bfloat16",
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        tie_word_embeddings=True,
    )


def write_prompts(path: str | Path, count: int):
    dice = random.Random(0)
    words = ["why", "number", "green", "river", "seven", "think", "of", "the", "and", "a"]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            length, text = dice.randrange(40, 190), ""
            while len(text) < length:
                text += f" {dice.choice(words)}"
            file.write(json.dumps({"prompt": text}) + "\n")


class Watch:
    """Slots busy over time, from the engine's own counts; `ready` is the moment when that begins."""

    def __init__(self, llm):
        self.samples, self.slots = [], llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        step = llm.llm_engine.step

        def watched() -> list:
            outputs = step()
            if not self.samples or time.monotonic() - self.samples[-1][0] > 0.05:
                busy = [m.value for m in llm.get_metrics() if m.name == "vllm:num_requests_running"]
                self.samples.append((time.monotonic(), busy[0]))
            return outputs

        llm.llm_engine.step = watched
        self.ready = time.monotonic()

    def tail(self, end: float) -> float:
        """Seconds at the end with less than half of the slots busy, or of the most that ever were."""
        half = min(self.slots, max((busy for _, busy in self.samples), default=0)) / 2
        full = [when for when, busy in self.samples if busy >= half]
        return end - full[-1] if full else 0.0


def options_of(args: Arguments, folder: str, eos: list[int]) -> list[str]:
    """The command line of get_hf2.py for what is measured."""
    keys = ["model_name_or_path", "dataset_name_or_path", "K", "max_input_length", "max_new_tokens", "dtype"]
    keys += [] if visible_gpus() else ["kv_cache_gib"]
    keys += [] if args.max_num_seqs is None else ["max_num_seqs"]
    options = [word for key in keys for word in (f"--{key}", getattr(args, key))]
    return [
        str(word) for word in (*options, "--output_dir", f"{folder}/out", "--eos_ids", *eos, "--overwrite")
    ]


def warm_up(llm: "LLM") -> Watch:
    """Have the engine answer prompts that are not among the timed ones; from then on it is watched."""
    from vllm import SamplingParams

    fields = {"n": 2, "max_tokens": 8, "temperature": 1.0}
    llm.generate(
        [{"prompt_token_ids": [5 + i] * 40} for i in range(8)],
        [SamplingParams(**fields, seed=i) for i in range(8)],
        use_tqdm=False,
    )
    return Watch(llm)


def run_script(options: list[str], output: str) -> tuple[Watch, float, int]:
    """get_hf2.py itself: (its Watch, the moment when it ended, tokens sampled)."""
    from generation import get_hf2

    watches, start = [], get_hf2.start_engine

    def started(*given: object) -> "LLM":
        llm = start(*given)
        watches.append(warm_up(llm))
        return llm

    get_hf2.start_engine = started
    sys.argv = ["get_hf2.py", *options]
    with contextlib.redirect_stdout(io.StringIO()):
        get_hf2.main()
    end = time.monotonic()
    with open(f"{output}0.jsonl", encoding="utf-8") as file:
        return watches[0], end, sum(sum(json.loads(line)["num_tokens"]) for line in file)


def run_engine(way: str, asked: "get_hf2.Arguments") -> tuple[Watch, float, int]:
    """`LLM.generate` of the same prompts, as `run_script`."""
    import vllm

    from generation import get_hf2, sampling

    limit = sampling.context_length(asked.model_name_or_path, asked)
    needed = asked.max_input_length + asked.max_new_tokens
    template = ChatTemplate(models.load_tokenizer(asked.model_name_or_path), asked)
    stops = sampling.stop_ids(asked.model_name_or_path, template, asked)
    items = sampling.Prompts(asked, template, Nowhere(), limit, sampling.load_prompts(asked)).items
    if way == "bare":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ |= engine.variables(bool(visible_gpus()))
        memory = {} if visible_gpus() else {"kv_cache_memory_bytes": int(asked.kv_cache_gib * 2**30)}
        llm = vllm.LLM(
            asked.model_name_or_path,
            dtype=asked.dtype,
            max_model_len=min(needed, limit or needed),
            generation_config="vllm",
            **memory,
        )
        engine.end_at_exit(llm)
    else:
        llm = get_hf2.start_engine(asked, limit, needed)
    watch = warm_up(llm)
    fields = [r.fields for item in items for r in sampling.requests_of(asked, item, stops, limit)]
    if way != "seeds":
        fields = [f | {"seed": None} for f in fields]
    outputs = llm.generate(
        [{"prompt_token_ids": item.token_ids} for item in items],
        [vllm.SamplingParams(**f) for f in fields],
        use_tqdm=False,
    )
    end = time.monotonic()
    return watch, end, sum(len(sample.token_ids) for output in outputs for sample in output.outputs)


def child(way: str, options: list[str]):
    """One way, timed in this process; prints a line of JSON."""
    from generation import get_hf2

    prepare_threads()
    asked = parse(get_hf2.Arguments, "", options)
    began = time.monotonic()
    import vllm

    class Counted(vllm.LLM):
        def __init__(self, *a, **k):
            super().__init__(*a, **k, disable_log_stats=False)

    vllm.LLM = Counted
    ours = way == "ours"
    watch, end, tokens = run_script(options, asked.output_dir) if ours else run_engine(way, asked)
    figures = {"tokens": tokens, "seconds": end - watch.ready, "start": watch.ready - began}
    print("FIGURES " + json.dumps(figures | {"tail": watch.tail(end), "slots": watch.slots}))


class Nowhere:
    """An output that has nothing and keeps nothing."""

    done = ()

    def skip(self, *_: object):
        pass


def measure(way: str, options: list[str]) -> dict:
    """The figures of one way, from a process of its own."""
    command = [sys.executable, __file__, "child", way, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        raise UserError(f"{way} failed: {(done.stderr or done.stdout)[-800:]}")
    return json.loads(lines[-1].removeprefix("FIGURES "))


def main():
    args = parse(Arguments, __doc__, yaml_positional=False)
    for way in args.ways:
        if way not in WAYS:
            raise UserError(f"--ways {way}: there are {', '.join(WAYS)}")
    if args.repeats < 1 or len(args.size) != 2:
        raise UserError("--repeats must be at least 1 and --size two numbers")
    found = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        eos = []
        if args.model_name_or_path is None:
            args.model_name_or_path = f"{folder}/policy"
            # A random policy's tokens are about equally likely: with these as ends a response has
            # max_new_tokens / 4 in the mean.
            eos = random.Random(1).sample(range(300, 31000), VOCABULARY * 4 // args.max_new_tokens)
            make_policy(args.model_name_or_path, *args.size)
        if args.dataset_name_or_path is None:
            args.dataset_name_or_path = f"{folder}/prompts.jsonl"
            write_prompts(args.dataset_name_or_path, args.prompts)
        options = options_of(args, folder, eos)
        for turn in range(args.repeats):
            for way in args.ways[turn % len(args.ways) :] + args.ways[: turn % len(args.ways)]:
                now = measure(way, options)
                found[way].append(now)
                print(
                    f"turn {turn + 1}, {way}: {now['tokens']} tokens in {now['seconds']:.1f} s, "
                    f"{now['tokens'] / now['seconds']:.0f} tokens/s",
                    flush=True,
                )
    tell(args, found)


def tell(args: Arguments, found: dict[str, list[dict]]):
    """The table; a ratio is the median over the turns of the ratios within a turn, since the machine's speed
    may drift.
    """
    rates = {way: [f["tokens"] / f["seconds"] for f in figures] for way, figures in found.items()}
    base = args.ways[0]
    print(
        f"\n{'way':<9}{'tokens/s':>10}{f'of {base}':>10}{'least':>8}{'most':>8}"
        f"{'start s':>9}{'tail s':>8}{'tail':>7}"
    )
    rows = {}
    for way, figures in found.items():
        ratios = [a / b for a, b in zip(rates[way], rates[base], strict=True)]
        row = {
            "tokens_per_second": statistics.median(rates[way]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        row |= {
            key: statistics.median(f[key] for f in figures)
            for key in ("start", "tail", "seconds", "tokens", "slots")
        }
        rows[way] = row
        print(
            f"{way:<9}{row['tokens_per_second']:>10.0f}{row['ratio']:>10.3f}"
            f"{min(ratios):>8.3f}{max(ratios):>8.3f}"
            f"{row['start']:>9.1f}{row['tail']:>8.1f}{row['tail'] / row['seconds']:>7.1%}"
        )
    if args.output_dir:
        machine = {"cores": len(os.sched_getaffinity(0)), "gpus": len(visible_gpus())}
        found = {"figures": rows, "versions": versions(), "settings": vars(args)}
        write_json(args.output_dir, found | machine)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        run(main)
