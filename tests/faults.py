"""Killing real processes at random moments, and what a run must be like afterwards.

`Killer` starts a command again and again and kills it: while it starts up, in the middle of its work, or
while it puts its output in place. The seed is fixed; FAULT_SEED=… gives other moments, FAULT_SHARE=0.1 a
tenth of the long tests' kills.
"""

import contextlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEED = int(os.environ.get("FAULT_SEED", "0"))
SHARE = float(os.environ.get("FAULT_SHARE", "1"))
CONFIG = "configs/loop_tiny.yaml"
# What a killed start had come to: nothing new, new records, its output all but in place.
PHASES = ("start", "work", "finish")


def share(count):
    """The number of kills that a long test is to reach."""
    return max(3, round(count * SHARE))


def ended(command, timeout=900, environment=None, **options):
    """The process of a command that has run to its end from the project's folder."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )


def vllm_python():
    """The interpreter of environment vllm."""
    found = ended(["bash", "-c", "source ./envs.sh; env_prefix vllm"])
    return f"{found.stdout.strip()}/bin/python"


def records(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def small_settings(folder):
    """Settings of a loop of one iteration on 24 prompts; the data lies in `folder`."""
    prompts, heldout = folder / "prompts.jsonl", folder / "heldout.jsonl"
    for path, source, count in ((prompts, "iter1", 24), (heldout, "heldout", 6)):
        lines = (ROOT / f"tiny/built/prompts/{source}.jsonl").read_text(encoding="utf-8").split("\n")
        path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    small = (
        "--iterations 1 --generation.K 4 --generation.kv_cache_gib 0.25 --training_args.num_train_epochs 1"
    )
    return ["--prompts", prompts, "--heldout_prompts", heldout, *small.split()]


def loop_command(folder, *more):
    return [str(part) for part in ("bash", "run_loop.sh", CONFIG, "--run_dir", folder, *more)]


def loop(folder, *more, timeout=900, **environment):
    """Run the driver to its end; returns the process."""
    return ended(loop_command(folder, *more), timeout, environment)


def begin(command, log=subprocess.DEVNULL, **options):
    """Start a command in a session of its own, so that all of it can be killed at once."""
    return subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True, **options
    )


def kill(process, whole=True):
    """kill -9 a process, with its group or alone; whether it was still at work."""
    try:
        os.killpg(process.pid, signal.SIGKILL) if whole else os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return process.wait() == -signal.SIGKILL


def wait_for(condition, seconds=240, pause=0.02):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(pause)
    return value


def processes(wanted):
    """Ids of the processes for which `wanted(command line, environment)` holds, both as text with spaces."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = (
                (path / name).read_bytes().replace(b"\0", b" ").decode(errors="replace")
                for name in ("cmdline", "environ")
            )
        except OSError:
            continue
        if line and wanted(line, environment):
            found.append(int(path.name))
    return found


def started_by(folder, what=""):
    """Processes that a run of this folder has started, with `what` in their command line."""
    return processes(
        lambda line, environment: f"RLHF_RUN={Path(folder).resolve()} " in environment and what in line
    )


def free_ports(count=1):
    """The first of `count` free ports in a row."""
    for first in range(20000 + os.getpid() % 1000 * 10, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def same_answers(one, other, K):
    """Ids, order, responses and rewards of two files are the same, and nothing is lost or doubled."""
    one, other = records(one), records(other)
    assert [r["id"] for r in one] == [r["id"] for r in other] and len({r["id"] for r in one}) == len(one)
    for a, b in zip(one, other, strict=True):
        assert a["responses"] == b["responses"] and len(a["responses"]) == K
        assert len(a.get("rewards", a["responses"])) == K and ("rewards" in a) == ("rewards" in b)
        assert all(abs(x - y) < 1e-4 for x, y in zip(a.get("rewards", []), b.get("rewards", []), strict=True))


def same_run(one, other, K=4):
    """What two finished runs of one iteration chose and trained on is the same."""
    for name in ("iter1/generated", "iter1/rewarded", "iter0/heldout_sampled.rewarded"):
        same_answers(one / f"{name}.jsonl", other / f"{name}.jsonl", K)
    same_answers(*(run / "iter0/heldout_greedy.rewarded.jsonl" for run in (one, other)), 1)
    pairs = [records(run / "iter1" / "pairs.jsonl") for run in (one, other)]
    keys = ("id", "prompt", "chosen", "rejected", "chosen_index", "rejected_index")
    chosen, others = ([[pair[key] for key in keys] for pair in run] for run in pairs)
    assert chosen == others
    weights = [(run / "iter1/model/model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]


class Killer:
    """Kills of a command that writes an output and, on the way, OUTPUT.partial.

    Args:
        command: function from an output path to the command that makes it.
        folder: for outputs and logs; a command that has ended is begun anew under another name.
        start: seconds that a start takes, about.
        step: bytes that a start may save at most before it is killed.
        check: called with each finished output.
    """

    def __init__(self, command, folder, start, step, check):
        self.command, self.folder, self.start, self.step, self.check = command, folder, start, step, check
        self.random, self.counts, self.lives, self.starts = random.Random(SEED), Counter(), 0, 0
        self.left_behind = None

    @staticmethod
    def size(output):
        try:
            return os.stat(f"{output}.partial").st_size
        except OSError:
            return 0

    def finishing(self, output):
        """Whether the output is just being put in place: this start has begun to write it under its temporary
        name.
        """
        return self.temporary(output) not in (None, self.left_behind)

    @staticmethod
    def temporary(output):
        """Which file stands under the output's temporary name: a killed start leaves its own there."""
        try:
            found = os.stat(f"{output}.tmp")
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def until(self, process, moment):
        """Wait for the moment, watched closely; False if the process ends before."""
        while process.poll() is None:
            if moment():
                return True
            time.sleep(0.0002)
        return False

    def once(self, output, phase):
        """One start, killed in a phase; True if it came to its end instead."""
        before, began, self.left_behind = self.size(output), time.monotonic(), self.temporary(output)
        with open(self.folder / "log", "ab") as log:
            process = begin(self.command(output), log)
        self.starts += 1
        delay, more = self.random.uniform(0, self.start), self.random.uniform(1, self.step)
        moment = {
            "start": lambda: time.monotonic() - began > delay,
            "work": lambda: self.size(output) > before + more or self.finishing(output),
            "finish": lambda: self.finishing(output),
        }[phase]
        if self.until(process, moment) and phase == "finish":
            time.sleep(self.random.choice((0, 0.0005, 0.002, 0.008)))
        there = self.finishing(output) or output.exists()
        if kill(process):
            self.counts["finish" if there else "work" if self.size(output) > before else "start"] += 1
            return False
        assert process.returncode == 0, (self.folder / "log").read_text()[-3000:]
        return True

    def reach(self, kills, shares=(0.25, 0.6)):
        """Kill until `kills` have met a living process and the work is done; `shares` are those of start-up
        and work.
        """
        quota = {"start": shares[0] * kills, "work": shares[1] * kills}
        while sum(self.counts.values()) < kills:
            self.lives += 1
            output, ended = self.folder / f"output{self.lives}_0.jsonl", False
            while not ended and sum(self.counts.values()) < kills:
                # Once an output is all but finished, every start of it comes there soon: its turn is last.
                left = [phase for phase in quota if self.counts[phase] < quota[phase]]
                phase = min(left, key=lambda phase: self.counts[phase] / quota[phase], default="finish")
                ended = self.once(output, phase)
            if not ended:
                self.end(output)
            self.check(output)
        print(self)
        return self

    def end(self, output):
        """Undisturbed to the end."""
        end = ended(self.command(output), None)
        assert end.returncode == 0, end.stderr[-3000:]

    def __str__(self):
        kinds = ", ".join(f"{self.counts[phase]} in {phase}" for phase in PHASES)
        return f"{sum(self.counts.values())} kills ({kinds}) in {self.starts} starts, {self.lives} outputs"


class Stub:
    """A server that answers as `/v1/completions` does, each seed alike, after `pause` seconds."""

    def __init__(self, pause=0.05):
        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(self, body):
                body = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client was killed
                    self.wfile.write(body)

            def do_GET(self):
                root = str(ROOT / "tiny/built/policy")
                self.reply({"data": [{"id": "stub", "root": root, "max_model_len": 96}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/completions":
                    return self.send_error(404)
                time.sleep(pause)
                answer = {"finish_reason": "stop", "token_ids": [1, 2]}
                texts = [f"{body.get('seed')}/{k}" for k in range(body.get("n", 1))]
                choices = [answer | {"index": k, "text": text} for k, text in enumerate(texts)]
                return self.reply({"choices": choices})

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
