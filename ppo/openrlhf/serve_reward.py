r"""Serve rewards to OpenRLHF over HTTP: reward models of annotate_data, weighted sums of them, or a Python
function.

In:  a YAML or arguments that name the rewards and the policy (for its tokenizer); requests from OpenRLHF's
     sampling processes.
Out: answers at /get_reward, `{"query": [...], "prompts": [...], "labels": [...]}` in, `{"rewards", "scores",
     "extra_logs"}` out.

    python ppo/openrlhf/serve_reward.py --policy RLHFlow/LLaMA3-SFT \
        --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1 --port 5000

ppo/openrlhf/run_openrlhf.py starts one by itself; on another machine start it by hand, with --host, and give
its address as reward_url. The labels must be those of our prompts file. Requests that wait are scored
together. It has no password: keep it in your own network.
"""

import json
import queue
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import UserError, arg, parse, run
from ppo.openrlhf.reward import RewardArguments, Rewards, answer, check

EXPECTED = (
    'expected {"query": [...], "prompts": [...], "labels": [...]} of one length, as OpenRLHF 0.11.2 sends'
)


@dataclass(kw_only=True)
class Arguments(RewardArguments):
    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0 is every one of this machine")
    port: int = arg(5000, "port to listen on")
    batch: int = arg(128, "responses that are scored together at most")


class Batcher:
    """One thread that scores what waits, at most `size` responses at a time, so that requests share forward
    passes.
    """

    def __init__(self, rewards: Rewards, size: int):
        self.rewards, self.size, self.waiting, self.scored = rewards, size, queue.SimpleQueue(), 0
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, queries: list, prompts: list, labels: list) -> list[float]:
        """Rewards of one request, or its error."""
        box = queue.SimpleQueue()
        self.waiting.put(((queries, prompts, labels), box))
        found = box.get()
        if isinstance(found, Exception):
            raise found
        return found

    def _work(self):
        while True:
            jobs = [self.waiting.get()]
            while not self.waiting.empty() and sum(len(given[0]) for given, _ in jobs) < self.size:
                jobs.append(self.waiting.get())
            for (given, box), found in zip(jobs, self._together([given for given, _ in jobs])):
                self.scored += 0 if isinstance(found, Exception) else len(given[0])
                box.put(found)

    def _together(self, given):
        """Rewards or an error of each request; where one is at fault, the others are scored without it."""
        try:
            rewards = iter(self.rewards(*(sum(parts, []) for parts in zip(*given))))
            return [[next(rewards) for _ in queries] for queries, _, _ in given]
        except Exception as error:
            if len(given) == 1:
                return [error]
            return [self._together([one])[0] for one in given]


def handler(batcher: Batcher) -> type:
    """The class that answers requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, value: object):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply(200 if self.path == "/health" else 404, {"scored": batcher.scored})

        def do_POST(self):
            try:
                data = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                given = [data[key] for key in ("query", "prompts", "labels")]
                if not all(isinstance(part, list) and len(part) == len(given[0]) for part in given):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                self.reply(400, {"error": EXPECTED})
                return
            try:
                self.reply(200, answer(batcher(*given)))
            except Exception as error:
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                print(f"reward failed: {text}", flush=True)
                self.reply(500, {"error": text})

        def log_message(self, *args: object):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 4096  # a rollout's responses may end together
    daemon_threads = True


def main():
    args = parse(Arguments, __doc__)
    if not 0 <= args.port < 65536 or args.batch < 1:
        raise UserError(f"--port {args.port} must lie from 0 to 65535 and --batch {args.batch} be at least 1")
    check(args)
    try:
        server = Server((args.host, args.port), BaseHTTPRequestHandler, bind_and_activate=False)
        server.server_bind()
    except OSError as error:
        raise UserError(
            f"cannot listen on {args.host}:{args.port}: {error.strerror}; give another --port"
        ) from None
    started = time.monotonic()
    batcher = Batcher(Rewards(args).load(), args.batch)
    server.RequestHandlerClass = handler(batcher)
    server.server_activate()  # only now: who can connect gets a reward
    names = ", ".join(scorer.name for scorer in batcher.rewards.scorers)
    try:
        print(
            f"serving {names} at http://{args.host}:{server.server_port}/get_reward after "
            f"{time.monotonic() - started:.0f}s",
            flush=True,
        )
        server.serve_forever()
    except KeyboardInterrupt:  # by whom it was started for, or Ctrl-C; there is nothing to continue
        print("the reward server was stopped", flush=True)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
