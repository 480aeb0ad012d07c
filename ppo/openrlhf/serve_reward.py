r"""Serve rewards to OpenRLHF over HTTP: reward models of annotate_data, a Python function, or weighted sums
of them.

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
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import UserError, arg, parse, run
from ppo.openrlhf.reward import RewardArguments, Rewards, check

FAILED = "reward failed: "  # begins a line of the log


@dataclass(kw_only=True)
class Arguments(RewardArguments):
    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0 is every one of this machine")
    port: int = arg(5000, "port to listen on; 0: one that is free")
    batch: int = arg(128, "responses that are scored together at most")


class Batcher:
    """One thread that scores what waits, at most `size` responses at a time, so that requests share forward
    passes.
    """

    def __init__(self, rewards: Rewards, size: int):
        self.rewards, self.size, self.waiting = rewards, size, queue.SimpleQueue()  # of jobs, see __call__
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(
        self, queries: list, prompts: list, labels: list, gone: Callable[[], bool] = lambda: False
    ) -> list[float]:
        """Rewards of one request, or its error. `gone`: whether nobody waits for them any more."""
        box = queue.SimpleQueue()
        self.waiting.put(((queries, prompts, labels), box, gone))
        found = box.get()
        if isinstance(found, Exception):
            raise found
        return found

    def _work(self):
        while True:
            jobs = [self.waiting.get()]
            while not self.waiting.empty() and sum(len(given[0]) for given, *_ in jobs) < self.size:
                jobs.append(self.waiting.get())
            # OpenRLHF gives up after 180 s and asks again: what nobody waits for would keep all late.
            left = [box for _, box, gone in jobs if gone()]
            for box in left:
                box.put(ConnectionError("who asked has hung up"))
            jobs = [job for job in jobs if job[1] not in left]
            try:
                together = (sum(parts, []) for parts in zip(*(given for given, *_ in jobs)))
                rewards = iter(self.rewards(*together) if jobs else [])
                found = [[next(rewards) for _ in queries] for (queries, *_), *_ in jobs]
            except Exception as error:  # which ends the training, whoever is told
                found = [error] * len(jobs)
            for (_, box, _), answer in zip(jobs, found):
                box.put(answer)


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection; nothing is taken from it."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


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

        def do_POST(self):
            try:
                data = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                given = (data[key] for key in ("query", "prompts", "labels"))
                rewards = batcher(*given, gone=lambda: has_hung_up(self.connection))
            except ConnectionError:
                self.close_connection = True
            except Exception as error:
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                print(f"{FAILED}{text}", flush=True)
                self.reply(500, {"error": text})
            else:  # a number for one response, as OpenRLHF asks, lists for several
                value = rewards[0] if len(rewards) == 1 else rewards
                self.reply(200, {"rewards": value, "scores": value, "extra_logs": {}})

        def log_message(self, *args: object):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 4096  # a rollout's responses may end together
    daemon_threads = True


def main():
    args = parse(Arguments, __doc__)
    check(args)
    try:
        server = Server((args.host, args.port), BaseHTTPRequestHandler, bind_and_activate=False)
        server.server_bind()
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {args.host}:{args.port}: {error}; give another --port") from None
    started = time.monotonic()
    rewards = Rewards(args).load()
    server.RequestHandlerClass = handler(Batcher(rewards, args.batch))
    server.server_activate()  # only now: who can connect gets a reward
    names = ", ".join(scorer.name for scorer in rewards.scorers)
    print(
        f"serving {names} at http://{args.host}:{server.server_port}/get_reward after "
        f"{time.monotonic() - started:.0f}s",
        flush=True,
    )
    server.serve_forever()


if __name__ == "__main__":
    run(main)
