"""API servers and their client: real servers against the engine, stubs for the ways in which servers fail.

`register_server.sh` is run with real vLLM once (two servers for all tests that need them), and otherwise with a stand-in
for `python -m vllm…` that takes the same arguments and answers at once.
"""

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import micro
import pytest
from aiohttp import web
from faults import free_ports
from test_generation import arguments, get_hf2_main, policy, records, starts  # noqa: F401

from common.cli import UserError
from generation import gen_hf

ROOT = Path(__file__).resolve().parents[2]
REGISTER = ROOT / "generation" / "register_server.sh"


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value


class Mock:
    """A server in a thread. `behave(count, body)` names what the count-th completion request meets; None is an answer."""

    def __init__(self, behave=lambda count, body: None, model="mock", length=512, port=0, tokens=None, pause=0.0):
        self.behave, self.model, self.length, self.port, self.tokens, self.pause = (
            behave,
            model,
            length,
            port,
            tokens,
            pause,
        )
        self.bodies, self.in_flight, self.most = [], 0, 0
        self.root = str(policy())  # made now: the first request should not have to wait for it

    def __enter__(self):
        self.loop, self.up = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.up.wait(20)
        return self

    def __exit__(self, *_):
        if self.loop.is_running():
            self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join(20)

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())

    async def _serve(self):
        self.stopped = asyncio.Event()
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/v1/completions", self.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self.up.set()
        await self.stopped.wait()
        await runner.cleanup()

    async def models(self, request):
        return web.json_response({"data": [{"id": self.model, "root": self.root, "max_model_len": self.length}]})

    async def tokenize(self, request):
        if self.tokens is None:
            return web.Response(status=404)
        return web.json_response({"tokens": self.tokens})

    async def complete(self, request):
        body = await request.json()
        probe = body["prompt"] == [0]
        if not probe:
            self.bodies.append(body)
        what = None if probe else self.behave(len(self.bodies), body)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(self.pause)
            if what == "hang":
                await asyncio.sleep(3600)
            if what == "cut":
                request.transport.close()
            if what == "half":
                response = web.StreamResponse(headers={"Content-Length": "1000"})
                await response.prepare(request)
                await response.write(b'{"choices": [')
                request.transport.close()
                return response
            if what == "garbage":
                return web.Response(text="<html>")
            if isinstance(what, int):
                return web.json_response({"error": {"message": f"the server says {what}"}}, status=what)
            count = 1 if probe else body["n"] - (what == "fewer")
            reason = "abort" if what == "abort" else "stop"
            if what == "null":
                return web.json_response(None)
            choices = [
                {"index": i, "text": f"{body.get('seed')}/{i}", "finish_reason": reason, "token_ids": [1, 2]}
                for i in range(count)
            ]
            if isinstance(what, dict):  # the first choice otherwise
                choices[0] |= what
            return web.json_response({"choices": choices[::-1]})
        finally:
            self.in_flight -= 1


def client(monkeypatch, folder, mocks, *more):
    command = [
        "--tokenizer",
        policy(),
        "--dataset_name_or_path",
        folder / "p.jsonl",
        "--output_dir",
        folder / "out.jsonl",
        "--K",
        "3",
    ]
    ports = [m.port if isinstance(m, Mock) else m for m in mocks]
    monkeypatch.setattr(sys, "argv", [str(part) for part in ("gen_hf.py", *command, "--ports", *ports, *more)])
    gc.collect()  # the lock of a run that failed in this process ends with its Output
    gen_hf.main()


def check_whole(folder, count, K=3):
    got = records(folder / "out.jsonl")
    assert [r["number"] for r in got] == list(range(count))
    for record in got:
        seed = record["responses"][0].split("/")[0]
        assert record["responses"] == [f"{seed}/{i}" for i in range(K)] and record["num_tokens"] == [2] * K
    assert len({r["responses"][0] for r in got}) == count


@pytest.fixture
def folder(tmp_path):
    micro.write_prompts(tmp_path / "p.jsonl", 30)
    return tmp_path


def test_work_is_shared_bounded_ordered_and_explicit(folder, monkeypatch, capsys):
    with Mock(pause=0.02) as a, Mock(pause=0.05) as b:
        client(monkeypatch, folder, [a, b], "--concurrency", "4", "--max_new_tokens", "500")
        check_whole(folder, 30)
        assert len(a.bodies) + len(b.bodies) == 30 and len(a.bodies) > len(b.bodies) > 3
        assert a.most <= 4 and b.most <= 4
        for body in a.bodies:
            assert all(isinstance(t, int) for t in body["prompt"]) and body["model"] == "mock" and body["n"] == 3
            assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
                    "seed", "stop_token_ids", "skip_special_tokens"} <= set(body)  # fmt: skip
            assert body["max_tokens"] == min(500, 512 - len(body["prompt"]))
    out = capsys.readouterr().out
    assert (
        "read 30 prompts, wrote 30 records" in out
        and "skipped 0" in out
        and "sampled 180 tokens" in out
        and "tokens/s" in out
    )
    client(monkeypatch, folder, [a, b], "--concurrency", "4", "--max_new_tokens", "500")  # needs no servers any more
    assert "complete, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="top_p was 1.0 and is now 0.5"):
        client(monkeypatch, folder, [a, b], "--max_new_tokens", "500", "--top_p", "0.5")


@pytest.mark.parametrize("what", [
    408, 429, 500, 503, "hang", "cut", "half", "garbage", "fewer", "abort", "null", {"text": None}, {"text": "\ud800"}, {"finish_reason": ["stop"]},
    {"index": 1}, {"token_ids": None},
], ids=str)  # fmt: skip
def test_what_fails_is_asked_again(folder, monkeypatch, what):
    with Mock(lambda count, body: what if count in (1, 2, 9) else None) as a, Mock() as b:
        client(monkeypatch, folder, [a, b], "--concurrency", "3", "--timeout", "1")
        check_whole(folder, 30)
        assert len(a.bodies) + len(b.bodies) >= 32


def test_a_busy_server_is_not_held_against_a_prompt(folder, monkeypatch):
    with Mock(lambda count, body: 429 if count < 12 else None) as a:
        client(monkeypatch, folder, [a], "--concurrency", "1", "--retries", "2")
        check_whole(folder, 30)


def test_servers_of_another_length_do_not_go_on_with_half_done_work(folder, monkeypatch):
    with Mock(lambda count, body: 400 if count == 9 else None) as a, pytest.raises(UserError, match="HTTP 400"):
        client(monkeypatch, folder, [a], "--concurrency", "1")
    with Mock(length=400) as b:
        with pytest.raises(UserError, match="max_model_len 512, now it is 400"):
            client(monkeypatch, folder, [b])
    with Mock() as c:
        client(monkeypatch, folder, [c])
        check_whole(folder, 30)
    with Mock(length=400) as b:
        client(monkeypatch, folder, [b])  # finished work asks nothing of servers


def test_another_4xx_is_final_and_quotes_the_server(folder, monkeypatch):
    with Mock(lambda count, body: 400 if count == 5 else None) as a:
        with pytest.raises(UserError, match="HTTP 400.*the server says 400"):
            client(monkeypatch, folder, [a], "--concurrency", "1")
        assert len(a.bodies) == 5
        assert len(records(folder / "out.jsonl.partial")) == 4
        a.behave = lambda count, body: None
        client(monkeypatch, folder, [a], "--concurrency", "1")
        assert len(a.bodies) == 5 + 26  # what was done is not asked again
        check_whole(folder, 30)


@pytest.mark.parametrize(
    "what, words", [("fewer", "2 responses instead of 3"), (500, "HTTP 500"), ("garbage", "not JSON")]
)
def test_what_fails_for_good_ends_the_run(folder, monkeypatch, what, words):
    bad = []

    def behave(count, body):
        bad[:] = bad or [body["seed"]]
        return what if body["seed"] == bad[0] else None

    with Mock(behave) as a:
        with pytest.raises(UserError, match=f"failed 3 times.*{words}.*29 records are kept"):
            client(monkeypatch, folder, [a], "--retries", "2", "--concurrency", "8")
        assert sum(body["seed"] == bad[0] for body in a.bodies) == 3
        assert len(records(folder / "out.jsonl.partial")) == 29


def test_all_dead_is_said_in_time_and_continued_later(folder, monkeypatch):
    a = Mock(lambda count, body: a.loop.call_soon(a.stopped.set) and "cut" if count >= 6 else None)
    with a:
        begin = time.monotonic()
        with pytest.raises(UserError, match="no server has answered for 2s.*5 records are kept"):
            client(monkeypatch, folder, [a], "--give_up_after", "2", "--concurrency", "1")
        assert 2 <= time.monotonic() - begin < 25
    with Mock(port=a.port) as b:
        client(monkeypatch, folder, [b], "--concurrency", "1")
        assert len(b.bodies) == 25
        check_whole(folder, 30)


def test_a_server_that_answers_only_errors_is_given_up(folder, monkeypatch):
    with Mock(lambda count, body: 429) as a:
        with pytest.raises(UserError, match="no server has answered for 1s.*HTTP 429"):
            client(monkeypatch, folder, [a], "--give_up_after", "1", "--retries", "1000")
        assert len(a.bodies) < 2000  # with pauses, not in a tight loop


def test_a_dead_server_s_work_goes_on_and_it_is_used_again(folder, monkeypatch, capsys):
    a, b = Mock(pause=0.1), Mock(lambda count, body: b.loop.call_soon(b.stopped.set) and "cut" if count >= 3 else None)
    with a, b:
        again = Mock(port=b.port)

        def revive():
            b.thread.join()
            time.sleep(0.5)
            again.__enter__()

        reviver = threading.Thread(target=revive)
        reviver.start()
        client(monkeypatch, folder, [a, b], "--concurrency", "1")
        reviver.join()
        again.__exit__()
    check_whole(folder, 30)
    out = capsys.readouterr().out
    assert f"lost http://127.0.0.1:{b.port}" in out and "is back" in out and len(again.bodies) > 0


def test_a_server_that_returns_with_another_model_is_not_used(folder, monkeypatch):
    a, b = Mock(pause=0.1), Mock(lambda count, body: b.loop.call_soon(b.stopped.set) and "cut" if count >= 2 else None)
    with a, b:
        other = Mock(port=b.port, model="other")
        threading.Thread(target=lambda: (b.thread.join(), other.__enter__())).start()
        client(monkeypatch, folder, [a, b], "--concurrency", "1")
        other.__exit__()
    check_whole(folder, 30)
    assert other.bodies == []


def test_servers_must_agree_and_answer(folder, monkeypatch):
    with Mock() as a, Mock(model="other") as b, Mock(length=256) as c:
        for mocks, words in (
            ([a, b], "mock.*other"),
            ([a, c], "512.*256"),
            ([a, free_ports(1)], "does not answer"),
            ([a, a], "once"),
        ):
            begin = time.monotonic()
            with pytest.raises(UserError, match=words):
                client(monkeypatch, folder, mocks)
            assert time.monotonic() - begin < 20
        assert a.bodies == [] and not (folder / "out.jsonl").exists()


def test_another_model_s_tokenizer_is_refused(folder, monkeypatch, capsys):
    with Mock(tokens=[1, 2, 3]) as a:
        with pytest.raises(UserError, match="is not that of the served model mock"):
            client(monkeypatch, folder, [a])
        assert a.bodies == []
    with Mock() as a:
        client(monkeypatch, folder, [a])
        assert "is not checked" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_done(folder, monkeypatch):
    with Mock(pause=0.3) as a:
        command = [
            "--tokenizer",
            policy(),
            "--dataset_name_or_path",
            folder / "p.jsonl",
            "--output_dir",
            folder / "out.jsonl",
            "--K",
            "3",
        ]
        command = [
            sys.executable,
            ROOT / "generation" / "gen_hf.py",
            *command,
            "--ports",
            str(a.port),
            "--concurrency",
            "2",
        ]
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: len(a.bodies) > 5)
        process.send_signal(signal.SIGINT)
        assert (
            process.communicate(timeout=30)[1] == "stopped; start the same command again to continue\n"
            and process.returncode == 130
        )
        done = len(records(folder / "out.jsonl.partial"))
        assert done >= 3
        a.pause, asked = 0.0, len(a.bodies)
        client(monkeypatch, folder, [a], "--concurrency", "2")
        assert len(a.bodies) - asked == 30 - done
    check_whole(folder, 30)


# register_server.sh with a stand-in for vLLM

STUB = r"""
import http.server, json, os, subprocess, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2])) if "--enforce-eager" not in sys.argv else {}
port, model = int(sys.argv[sys.argv.index("--port") + 1]), sys.argv[sys.argv.index("--model") + 1]
keep = {k: os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")}
open(f"stub_{port}.json", "w").write(json.dumps({"argv": sys.argv[1:], "env": keep}))
child = subprocess.Popen(["sleep", "1000"])  # as the engine is a child of the API server
how = os.environ.get("STUB", "")
if how == "dies" and port % 2: print("first line"); sys.exit("the stub cannot start")
if how == "stubborn": import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)
if how == "hangs": time.sleep(1000)
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self): self.reply({"data": [{"id": model}]})
    def do_POST(self): self.rfile.read(int(self.headers["Content-Length"])); self.reply({"choices": [{}]})
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stub(tmp_path):
    """Runs register_server.sh with the stand-in; ends whatever a failed test leaves."""
    (tmp_path / "stub.py").write_text(STUB)
    wrapper = tmp_path / "python"
    wrapper.write_text(
        f'#!/bin/sh\nif [ "$1" = -m ]; then shift 2; exec "{sys.executable}" "{tmp_path}/stub.py" "$@"; fi\nexec "{sys.executable}" "$@"\n'
    )
    wrapper.chmod(0o755)
    port = free_ports(4)

    def start(*argv, wait=True, **variables):
        environment = (
            os.environ
            | {"python": str(wrapper), "port": str(port), "state_dir": "state"}
            | {k: str(v) for k, v in variables.items()}
        )
        process = subprocess.Popen(
            ["bash", REGISTER, *argv], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return finished(process) if wait else process

    start.port, start.folder = port, tmp_path
    yield start
    start("stop", stop_seconds=1)


def finished(process):
    out, err = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def recorded(folder):
    return {int(f.stem): int(f.read_text().split()[0]) for f in (folder / "state").glob("*.server")}


def group_members(leader):
    """Living processes in the group of `leader`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == leader:
            found.append(int(path.parent.name))
    return found


def test_start_answer_stop(stub):
    end = stub("o/m", servers=3, max_model_len=8192, max_num_seqs=7, revision="v2", trust_remote_code="yes")
    assert end.returncode == 0, end.stderr
    processes = recorded(stub.folder)
    assert sorted(processes) == [stub.port, stub.port + 1, stub.port + 2] and all(map(listening, processes))
    assert all(len(group_members(pid)) == 2 for pid in processes.values())
    made = json.loads((stub.folder / f"stub_{stub.port}.json").read_text())
    line = " ".join(made["argv"])
    for part in ("--model o/m", "--served-model-name o/m", "--host 127.0.0.1", "--generation-config vllm", "--dtype auto", "--enforce-eager",
                 "--no-enable-chunked-prefill", "--max-model-len 8192", "--max-num-batched-tokens 8192", "--kv-cache-memory-bytes 1073741824",
                 "--max-num-seqs 7", "--revision v2 --tokenizer-revision v2", "--trust-remote-code"):  # fmt: skip
        assert part in line
    assert made["env"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" and int(made["env"]["OMP_NUM_THREADS"]) >= 1
    again = stub("o/m")
    assert again.returncode == 2 and f"port {stub.port} already serves o/m, started by this script" in again.stderr
    assert all(map(listening, processes))
    begin, end = time.monotonic(), stub("stop")
    assert end.returncode == 0 and "stopped 3 servers" in end.stdout
    assert time.monotonic() - begin < 25  # asked to end, not killed after stop_seconds
    assert (
        not any(map(listening, processes))
        and not any(map(group_members, processes.values()))
        and not recorded(stub.folder)
    )
    assert "stopped 0 servers" in stub("stop").stdout


def test_stop_ends_the_stubborn_and_the_orphaned(stub):
    stub("o/m", servers=2, STUB="stubborn")
    processes = recorded(stub.folder)
    os.kill(processes[stub.port], signal.SIGKILL)  # its child lives on in its group
    wait_for(lambda: len(group_members(processes[stub.port])) == 1)
    assert stub("stop", stop_seconds=1).returncode == 0
    assert not any(map(group_members, processes.values()))


def test_a_process_that_got_the_number_is_not_stopped(stub):
    (stub.folder / "state").mkdir()
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as innocent:
        for k, start in enumerate(("1@boot", f"1@{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}", "")):
            (stub.folder / "state" / f"{9000 + k}.server").write_text(f"{innocent.pid} {start} o/m\n")
        assert "stopped 0 servers" in stub("stop").stdout
        assert innocent.poll() is None and not recorded(stub.folder)
        innocent.kill()


def test_a_server_that_dies_takes_the_start_with_it(stub):
    end = stub("o/m", servers=2, STUB="dies")
    odd = stub.port + 1 - stub.port % 2
    assert end.returncode == 2 and "the stub cannot start" in end.stderr and f"server_{odd}.log" in end.stderr
    assert not recorded(stub.folder) and not listening(stub.port) and not listening(stub.port + 1)


def test_a_deadline_and_an_interrupt_stop_what_was_started(stub):
    end = stub("o/m", servers=2, STUB="hangs", deadline=2, stop_seconds=5)
    assert (
        end.returncode == 2
        and "after 2s" in end.stderr
        and f"server_{stub.port}.log" in end.stderr
        and not recorded(stub.folder)
    )
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = stub("o/m", wait=False, servers=2, STUB="hangs")
        wait_for(lambda: len(recorded(stub.folder)) == 2)
        groups = recorded(stub.folder).values()
        process.send_signal(number)
        assert finished(process).returncode == status
        assert not any(map(group_members, groups)) and not recorded(stub.folder)


def test_a_port_in_use_is_named_with_its_model(stub):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", stub.port + 1))
        other.listen()
        end = stub("o/m", servers=2)
        assert end.returncode == 2 and f"port {stub.port + 1} is in use and was not started" in end.stderr
        assert not recorded(stub.folder) and not listening(stub.port)
    with Mock(model="theirs") as mock:
        assert "it serves theirs" in stub("o/m", port=mock.port).stderr


def test_groups_of_gpus(stub, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)  # an engine in this process has set it
    tools = stub.folder / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: none (UUID: x)"; done\n')
    (tools / "nvidia-smi").chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    end = stub("o/m", tensor_parallel_size=2, gpu_memory_utilization=0.5, **path)
    assert end.returncode == 0, end.stderr
    for port, devices in ((stub.port, "0,1"), (stub.port + 1, "2,3")):
        made = json.loads((stub.folder / f"stub_{port}.json").read_text())
        assert made["env"]["CUDA_VISIBLE_DEVICES"] == devices and made["env"]["VLLM_CPU_OMP_THREADS_BIND"] is None
        assert (
            "--tensor-parallel-size 2 --gpu-memory-utilization 0.5" in " ".join(made["argv"])
            and "--enforce-eager" not in made["argv"]
        )
    stub("stop")
    assert stub("o/m", gpus="3", **path).returncode == 0
    assert json.loads((stub.folder / f"stub_{stub.port}.json").read_text())["env"]["CUDA_VISIBLE_DEVICES"] == "3"
    stub("stop")
    for variables, words in (
        ({"tensor_parallel_size": 8}, "4 GPUs"),
        ({"servers": 5}, "4 GPUs"),
        ({"tensor_parallel_size": "x"}, "whole number"),
    ):
        end = stub("o/m", **path, **variables)
        assert end.returncode == 2 and end.stderr.startswith("error: ") and words in end.stderr


@pytest.mark.parametrize("argv, variables, words", [
    ([], {}, "no MODEL"), (["./nowhere"], {}, "./nowhere"), (["o/m"], {"python": "/no/python"}, "/no/python"),
    (["o/m"], {"tensor_parallel_size": "2"}, "needs GPUs"), (["o/m"], {"gpus": "0"}, "no GPU"), (["o/m"], {"servers": "0"}, "servers=0"),
])  # fmt: skip
def test_refusals_before_a_start(stub, argv, variables, words):
    end = stub(*argv, **{"CUDA_VISIBLE_DEVICES": ""} | variables)
    assert (
        end.returncode == 2
        and words in end.stderr.splitlines()[-1]
        and end.stderr.splitlines()[-1].startswith("error: ")
    )


# register_server.sh and gen_hf.py with vLLM itself


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two vLLM servers on one machine."""
    folder = tmp_path_factory.mktemp("servers")
    port = free_ports(2)
    variables = {"python": sys.executable, "servers": "2", "port": str(port), "max_model_len": "512", "dtype": "float32",
                 "kv_cache_gib": "0.5", "state_dir": str(folder / "state"), "deadline": "400"}  # fmt: skip
    command = ["bash", str(REGISTER)]
    end = subprocess.run([*command, str(policy())], env=os.environ | variables, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    yield (
        folder,
        port,
        lambda *argv: subprocess.run([*command, *argv], env=os.environ | variables, capture_output=True, text=True),
    )
    subprocess.run([*command, "stop"], env=os.environ | variables)


def real_client(folder, port, prompts, output, *more):
    command = [
        sys.executable,
        ROOT / "generation" / "gen_hf.py",
        "--tokenizer",
        policy(),
        "--dataset_name_or_path",
        prompts,
    ]
    command += ["--output_dir", output, "--ports", port, port + 1, *more]
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


def test_servers_give_the_engine_s_answers(real, tmp_path, monkeypatch, starts):  # noqa: F811
    folder, port, _ = real
    micro.write_prompts(tmp_path / "p.jsonl", 25)
    for name, more in (
        ("sampled", ["--K", "3"]),
        ("greedy", ["--K", "1", "--temperature", "0"]),
        ("nucleus", ["--K", "2", "--top_p", "0.8"]),
    ):
        end = finished(
            real_client(tmp_path, port, tmp_path / "p.jsonl", f"{name}.jsonl", "--max_new_tokens", "20", *more)
        )
        assert end.returncode == 0 and "is not checked" not in end.stdout, end.stderr
        get_hf2_main(monkeypatch, *arguments(tmp_path / "p.jsonl", tmp_path / name, max_new_tokens=20), *more)
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}0.jsonl").read_bytes()


def test_a_killed_server_s_work_is_done_by_the_other(real, tmp_path, monkeypatch, starts):  # noqa: F811
    folder, port, _ = real
    micro.write_prompts(tmp_path / "p.jsonl", 40)
    settings = ("--K", "2", "--max_new_tokens", "100")
    process = real_client(tmp_path, port, tmp_path / "p.jsonl", "out.jsonl", *settings, "--concurrency", "2")
    partial = tmp_path / "out.jsonl.partial"
    wait_for(lambda: process.poll() is not None or (partial.exists() and partial.read_bytes().count(b"\n") >= 5), 200)
    os.killpg(recorded(folder)[port + 1], signal.SIGKILL)
    assert len(records(partial)) < 35
    end = finished(process)
    assert end.returncode == 0 and f"lost http://127.0.0.1:{port + 1}" in end.stdout, end.stderr
    get_hf2_main(monkeypatch, *arguments(tmp_path / "p.jsonl", tmp_path / "offline"), *settings)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "offline0.jsonl").read_bytes()
    end = finished(real_client(tmp_path, port, tmp_path / "p.jsonl", "other.jsonl", *settings))
    assert end.returncode == 2 and f"{port + 1} does not answer" in end.stderr


def test_stop_ends_every_process_of_the_servers(real):
    folder, port, register = real
    groups = recorded(folder).values()
    assert any(len(group_members(group)) > 1 for group in groups)  # the engine is a process of its own
    end = register("stop")
    assert end.returncode == 0 and "stopped 1 servers" in end.stdout  # the other was killed above
    assert not any(map(group_members, groups)) and not listening(port) and not listening(port + 1)
