"""Peak memory of what handles records, against their number.

In:  nothing; it makes prompts of about 200 characters, a byte tokenizer, and a mock API server that answers
     at once.
Out: a table of MB and seconds: the reader, the client (against the mock server), the merge, and annotation by
a function.

    python benchmarks/memory.py --counts 10000 100000 1000000 --output_dir memory.json

Environment `vllm`. No model is loaded: what is measured is the scripts' own bookkeeping and the libraries
they import.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.random_models import make_model
from common.cli import UserError, arg, parse, run
from common.manifest import versions, write_json


@dataclass
class Arguments:
    counts: list[int] = arg([10000, 100000], help="numbers of prompts")
    K: int = arg(2, help="responses a prompt")
    port: int = arg(18991, help="of the mock server")
    folder: str | None = arg(
        None, help="where the files go, about 1 GB a million prompts; None: a temporary folder"
    )
    output_dir: str | None = arg(None, help="JSON file with the figures")


MOCK = """
import sys
from aiohttp import web
K, port = int(sys.argv[1]), int(sys.argv[2])
choices = [{"index": k, "text": f"answer {k}, which is about as long as a short sentence is",
            "finish_reason": "stop", "token_ids": [1] * 12} for k in range(K)]
async def models(request):
    return web.json_response({"data": [{"id": "mock", "root": "mock", "max_model_len": 4096}]})
async def answer(request):
    await request.read()
    return web.json_response({"choices": choices})
app = web.Application()
app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", answer)])
web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)
"""
READER = (
    "import sys; from common.records import read_prompts; print(sum(1 for _ in read_prompts(sys.argv[1])))"
)
REWARD = (
    "def length(messages, response):\n    return float(len(response) + len(messages[-1]['content']) % 7)\n"
)


def write_prompts(path: str | Path, count: int):
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            text = f"Question {i}: " + "what would you say of this number, and why? " * 4
            file.write(json.dumps({"prompt": text, "number": i}) + "\n")


def split(path: str | Path, prefix: str | Path):
    """Two shards of a file, without manifests, as another tool would leave them."""
    half = Path(path).stat().st_size // 2
    with (
        open(path, "rb") as source,
        open(f"{prefix}0.jsonl", "wb") as first,
        open(f"{prefix}1.jsonl", "wb") as second,
    ):
        for line in source:
            (first if source.tell() < half else second).write(line)


def measure(command: list) -> tuple[float, float]:
    """(peak MB, seconds) of a command.

    Raises:
        UserError: it failed; with the end of what it wrote.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if status:
            raise UserError(f"{' '.join(map(str, command))[:200]} failed: {log.read().decode()[-500:]}")
    return usage.ru_maxrss / 1024, time.monotonic() - began


def merge_command(shards: Path, output: Path, *more: object) -> list:
    """Merge the two shards whose names begin with `shards`."""
    words = ["--base_path", shards, "--output_dir", output, "--num_datasets", 2]
    return ["generation/merge_data.py", *words, *more]


def steps(folder: Path, count: int, args: Arguments) -> Iterator[tuple[str, list]]:
    """(name, command) of each thing to measure, in the order in which they feed each other."""
    prompts, generated = folder / f"prompts{count}.jsonl", folder / f"generated{count}.jsonl"
    yield "reader", ["-c", READER, prompts]
    options = [
        "--tokenizer",
        folder / "tokenizer",
        "--K",
        args.K,
        "--concurrency",
        64,
        "--max_new_tokens",
        64,
    ]
    files = ["--dataset_name_or_path", prompts, "--output_dir", generated]
    yield "client", ["generation/gen_hf.py", "--ports", args.port, *options, *files]
    shards, merged = folder / f"s{count}.", folder / f"merged{count}.jsonl"
    split(generated, shards)
    yield "merge", merge_command(shards, merged)
    yield "merge, shuffled", merge_command(shards, folder / f"shuffled{count}.jsonl", "--shuffle_seed", 1)
    files = ["--dataset_name_or_path", merged, "--output_dir", folder / f"rewarded{count}.jsonl"]
    reward = ["--reward_function", f"{folder / 'reward.py'}:length"]
    yield "annotation", ["annotate_data/get_rewards.py", *files, *reward]


def wait_for(port: int, server: subprocess.Popen):
    """Return when the mock server listens."""
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            if server.poll() is None:
                return
        if server.poll() is not None:
            raise UserError(f"the mock server ended; is port {port} in use? Give another --port")
        time.sleep(0.1)
    raise UserError("the mock server does not start")


def main():
    args = parse(Arguments, __doc__, yaml_positional=False)
    if not args.counts or min(args.counts) < 100:
        raise UserError("--counts: numbers of 100 or more were expected")
    holder = tempfile.TemporaryDirectory(dir=args.folder)
    folder, rows = Path(holder.name), {}
    # In a process of its own: a child's peak starts at what its parent held when it was forked.
    subprocess.run([sys.executable, __file__, "model", str(folder / "tokenizer")], check=True)
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    server = subprocess.Popen([sys.executable, "-c", MOCK, str(args.K), str(args.port)])
    try:
        wait_for(args.port, server)
        for count in sorted(args.counts):
            write_prompts(folder / f"prompts{count}.jsonl", count)
            for name, command in steps(folder, count, args):
                rows.setdefault(name, {})[count] = measure(command)
                print(
                    f"{name}, {count} records: {rows[name][count][0]:.0f} MB, {rows[name][count][1]:.0f} s",
                    flush=True,
                )
    finally:
        server.kill()
        server.wait()
        holder.cleanup()
    least, most = min(args.counts), max(args.counts)
    print(
        f"\n{'peak MB':<16}"
        + "".join(f"{count:>12}" for count in sorted(args.counts))
        + f"{'bytes a record more':>22}"
    )
    for name, found in rows.items():
        more = (found[most][0] - found[least][0]) * 2**20 / max(1, most - least)
        print(
            f"{name:<16}"
            + "".join(f"{found[count][0]:>12.0f}" for count in sorted(args.counts))
            + f"{more:>22.0f}"
        )
    if args.output_dir:
        figures = {
            name: {str(c): {"mb": round(mb, 1), "seconds": round(s, 1)} for c, (mb, s) in found.items()}
            for name, found in rows.items()
        }
        write_json(args.output_dir, {"K": args.K, "peak": figures, "versions": versions()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["model"]:
        make_model(sys.argv[2], num_hidden_layers=1)
    else:
        run(main)
