"""register_server.sh, and its servers with the client against the engine.

It is run with real vLLM once (two servers for all tests that need them), and otherwise with a stand-in for
`python -m vllm…` that takes the same arguments and answers at once.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import micro
import pytest
from engine import arguments, get_hf2_main, policy, records
from faults import free_ports
from mock_server import Mock, listening, wait_for

pytestmark = pytest.mark.env("vllm")

ROOT = Path(__file__).resolve().parents[2]
REGISTER = ROOT / "generation" / "register_server.sh"


# register_server.sh with a stand-in for vLLM

STUB = r"""
import http.server, json, os, subprocess, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2])) if "--enforce-eager" not in sys.argv else {}
port, model = int(sys.argv[sys.argv.index("--port") + 1]), sys.argv[sys.argv.index("--model") + 1]
kept = "CUDA_VISIBLE_DEVICES VLLM_CPU_OMP_THREADS_BIND OMP_NUM_THREADS VLLM_USE_FLASHINFER_SAMPLER "
kept += "VLLM_ENABLE_V1_MULTIPROCESSING"
keep = {k: os.environ.get(k) for k in kept.split()}
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
    own, other = f'exec "{sys.executable}" "{tmp_path}/stub.py" "$@"', f'exec "{sys.executable}" "$@"'
    wrapper.write_text(f'#!/bin/sh\nif [ "$1" = -m ]; then shift 2; {own}; fi\n{other}\n')
    wrapper.chmod(0o755)
    start = Start(tmp_path, python=wrapper, port=free_ports(4), state_dir="state")
    yield start
    start("stop", stop_seconds=1)


class Start:
    """Runs register_server.sh with variables in front."""

    def __init__(self, folder, **variables):
        self.folder, self.port, self.variables = folder, variables["port"], variables

    def begin(self, *argv, **variables):
        given = {key: str(value) for key, value in (self.variables | variables).items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = ["bash", REGISTER, *argv]
        return subprocess.Popen(command, cwd=self.folder, env=os.environ | given, **pipes)

    def __call__(self, *argv, **variables):
        return finished(self.begin(*argv, **variables))

    def recorded(self):
        """{port: process} of the servers that were started."""
        return {int(f.stem): int(f.read_text().split()[0]) for f in (self.folder / "state").glob("*.server")}

    def made(self, port=None):
        """What the stand-in was given: (its command line, its environment)."""
        made = json.loads((self.folder / f"stub_{port or self.port}.json").read_text())
        return " ".join(made["argv"]), made["env"]


def finished(process):
    out, err = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def refused(end, *words):
    errors = [line for line in end.stderr.splitlines() if line.startswith("error: ")]
    assert end.returncode == 2 and len(errors) == 1, end.stderr
    for word in words:
        assert word in end.stderr, end.stderr


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
    settings = {"max_model_len": 8192, "max_num_seqs": 7, "revision": "v2", "trust_remote_code": "yes"}
    settings["engine_args"] = '{"hf_overrides": {"a b": 1}, "async_scheduling": false}'
    end = stub("o/m", servers=3, **settings)
    assert end.returncode == 0, end.stderr
    processes = stub.recorded()
    assert sorted(processes) == [stub.port, stub.port + 1, stub.port + 2] and all(map(listening, processes))
    assert all(len(group_members(pid)) == 2 for pid in processes.values())
    line, environment = stub.made()
    for part in (
        "--model o/m --served-model-name o/m --host 127.0.0.1",
        "--generation-config vllm",
        "--dtype auto",
        "--enforce-eager --no-enable-chunked-prefill",
        "--max-model-len 8192",
        "--max-num-batched-tokens 8192",
        "--kv-cache-memory-bytes 1073741824",
        "--max-num-seqs 7",
        "--revision v2 --tokenizer-revision v2",
        "--trust-remote-code",
        '--hf-overrides {"a b": 1} --no-async-scheduling',
    ):
        assert part in line
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" and int(environment["OMP_NUM_THREADS"]) >= 1
    refused(stub("o/m"), f"port {stub.port} already serves o/m, started by this script")
    assert all(map(listening, processes))
    begin, end = time.monotonic(), stub("stop")
    assert end.returncode == 0 and "stopped 3 servers" in end.stdout
    assert time.monotonic() - begin < 25  # asked to end, not killed after stop_seconds
    assert not any(map(listening, processes)) and not stub.recorded()
    assert not any(map(group_members, processes.values()))
    assert "stopped 0 servers" in stub("stop").stdout


def test_stop_ends_the_stubborn_and_the_orphaned(stub):
    stub("o/m", servers=2, STUB="stubborn")
    processes = stub.recorded()
    os.kill(processes[stub.port], signal.SIGKILL)  # its child lives on in its group
    wait_for(lambda: len(group_members(processes[stub.port])) == 1)
    assert stub("stop", stop_seconds=1).returncode == 0
    assert not any(map(group_members, processes.values()))


def test_a_process_that_got_the_number_is_not_stopped(stub):
    (stub.folder / "state").mkdir()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as innocent:
        for k, start in enumerate(("1@boot", f"1@{boot}", "")):
            (stub.folder / "state" / f"{9000 + k}.server").write_text(f"{innocent.pid} {start} o/m\n")
        assert "stopped 0 servers" in stub("stop").stdout
        assert innocent.poll() is None and not stub.recorded()
        innocent.kill()


def test_a_server_that_dies_takes_the_start_with_it(stub):
    odd = stub.port + 1 - stub.port % 2
    refused(stub("o/m", servers=2, STUB="dies"), "the stub cannot start", f"server_{odd}.log")
    assert not stub.recorded() and not listening(stub.port) and not listening(stub.port + 1)


def test_a_deadline_and_an_interrupt_stop_what_was_started(stub):
    end = stub("o/m", servers=2, STUB="hangs", deadline=2, stop_seconds=5)
    refused(end, "after 2s", f"server_{stub.port}.log")
    assert not stub.recorded()
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = stub.begin("o/m", servers=2, STUB="hangs")
        wait_for(lambda: len(stub.recorded()) == 2)
        groups = stub.recorded().values()
        process.send_signal(number)
        assert finished(process).returncode == status
        assert not any(map(group_members, groups)) and not stub.recorded()


def test_a_start_keeps_the_servers_of_an_earlier_one(stub):
    """Which stop could not find any more."""
    process = stub.begin("o/m", servers=2, STUB="hangs")
    wait_for(lambda: len(stub.recorded()) == 2)
    before = stub.recorded()
    refused(stub("o/m"), "another start is at work in state", "stop state")
    process.kill()  # as kill -9 does: its servers go on
    process.communicate()
    earlier = f"port {stub.port} has a server of an earlier start"
    refused(stub("o/m", servers=2), earlier, f"process {before[stub.port]}", "stop state")
    assert stub.recorded() == before and all(map(group_members, before.values()))
    assert "stopped 2 servers" in stub("stop").stdout and not any(map(group_members, before.values()))
    assert stub("o/m").returncode == 0


def test_a_number_with_a_zero_in_front_is_no_octal_number(stub):
    numbers = {"servers": "01", "max_model_len": "0512", "deadline": "09", "stop_seconds": "08"}
    end = stub("o/m", port=f"0{stub.port}", **numbers)
    assert end.returncode == 0 and f":{stub.port} serves o/m" in end.stdout and not end.stderr, end.stderr
    assert list(stub.recorded()) == [stub.port] and listening(stub.port)
    assert "--max-model-len 512" in stub.made()[0]


def test_a_port_in_use_is_named_with_its_model(stub):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", stub.port + 1))
        other.listen()
        refused(stub("o/m", servers=2), f"port {stub.port + 1} is in use and was not started")
        assert not stub.recorded() and not listening(stub.port)
    with Mock(model="theirs") as mock:
        refused(stub("o/m", port=mock.port), "it serves theirs")


def test_groups_of_gpus(stub, monkeypatch):
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.delenv(name, raising=False)  # an engine in this process has set it
    tools = stub.folder / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: none (UUID: x)"; done\n')
    (tools / "nvidia-smi").chmod(0o755)
    stub.variables["PATH"] = f"{tools}:{os.environ['PATH']}"
    end = stub("o/m", tensor_parallel_size=2, gpu_memory_utilization=0.5)
    assert end.returncode == 0, end.stderr
    for port, devices in ((stub.port, "0,1"), (stub.port + 1, "2,3")):
        line, environment = stub.made(port)
        assert environment["CUDA_VISIBLE_DEVICES"] == devices
        assert environment["VLLM_CPU_OMP_THREADS_BIND"] is None
        assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"  # or it is compiled at the start, by nvcc
        assert (
            "--tensor-parallel-size 2 --gpu-memory-utilization 0.5" in line and "--enforce-eager" not in line
        )
    stub("stop")
    assert stub("o/m", gpus="3").returncode == 0 and stub.made()[1]["CUDA_VISIBLE_DEVICES"] == "3"
    stub("stop")
    for variables in ({"tensor_parallel_size": 8}, {"servers": 5}):
        refused(stub("o/m", **variables), "4 GPUs")


@pytest.mark.parametrize("argv, variables, words", [
    ([], {}, "no MODEL"),
    (["./nowhere"], {}, "./nowhere"),
    (["o/m"], {"python": "/no/python"}, "/no/python"),
    (["o/m"], {"tensor_parallel_size": "2"}, "needs GPUs"),
    (["o/m"], {"gpus": "0"}, "no GPU"),
    (["o/m"], {"servers": "0"}, "servers=0"),
    (["o/m"], {"engine_args": "{"}, "engine_args: '{' is not a mapping"),
    (["o/m"], {"engine_args": '{"max_model_len": 9}'}, "may not hold max_model_len"),
    (["o/m"], {"tensor_parallel_size": "0"}, "at least 1"),
    (["o/m"], {"port": "-1"}, "port=-1 is not a whole number"),
    (["o/m"], {"port": "65535", "servers": "2"}, "1 to 65535"),
    (["o/m"], {"port": "18446744073709551616"}, "whole number"),
])  # fmt: skip
def test_refusals_before_a_start(stub, argv, variables, words):
    refused(stub(*argv, **{"CUDA_VISIBLE_DEVICES": ""} | variables), words)


# register_server.sh and gen_hf.py with vLLM itself


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two vLLM servers on one machine."""
    settings = {"servers": 2, "max_model_len": 512, "dtype": "float32", "kv_cache_gib": 0.5, "deadline": 400}
    folder, port = tmp_path_factory.mktemp("servers"), free_ports(2)
    start = Start(folder, python=sys.executable, port=port, state_dir="state", **settings)
    end = start(str(policy()))
    assert end.returncode == 0, end.stderr
    yield start
    start("stop")


def client(real, folder, output, *more):
    """gen_hf.py at work in `folder`."""
    command = [sys.executable, ROOT / "generation" / "gen_hf.py", "--ports", real.port, real.port + 1, *more]
    command += ["--tokenizer", policy(), "--dataset_name_or_path", "p.jsonl", "--output_dir", output]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=folder, **pipes)


def test_servers_give_the_engine_s_answers(real, tmp_path, monkeypatch, starts):
    micro.write_prompts(tmp_path / "p.jsonl", 25)
    for name, given in {
        "sampled": "--K 3",
        "greedy": "--K 1 --temperature 0",
        "nucleus": "--K 2 --top_p 0.8",
        "mixture": "--K 4 --temperature 1.0,0.7",
        "passed_on": '--K 2 --sampling_args {"min_p":0.01,"stop":["e","a"]}',
    }.items():
        more = ("--max_new_tokens", "20", *given.split())
        end = finished(client(real, tmp_path, f"{name}.jsonl", *more))
        assert end.returncode == 0 and "is not checked" not in end.stdout, end.stderr
        get_hf2_main(monkeypatch, *arguments(tmp_path / "p.jsonl", tmp_path / name), *more)
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}0.jsonl").read_bytes()


def test_a_killed_server_s_work_is_done_by_the_other(real, tmp_path, monkeypatch, starts):
    micro.write_prompts(tmp_path / "p.jsonl", 40)
    settings = ("--K", "2", "--max_new_tokens", "100")
    process = client(real, tmp_path, "out.jsonl", *settings, "--concurrency", "2")
    partial = tmp_path / "out.jsonl.partial"

    def is_begun():
        return process.poll() is not None or (partial.exists() and partial.read_bytes().count(b"\n") >= 5)

    wait_for(is_begun, 200)
    os.killpg(real.recorded()[real.port + 1], signal.SIGKILL)
    assert len(records(partial)) < 35
    end = finished(process)
    assert end.returncode == 0 and f"lost http://127.0.0.1:{real.port + 1}" in end.stdout, end.stderr
    get_hf2_main(monkeypatch, *arguments(tmp_path / "p.jsonl", tmp_path / "offline"), *settings)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "offline0.jsonl").read_bytes()
    refused(finished(client(real, tmp_path, "other.jsonl", *settings)), f"{real.port + 1} does not answer")


def test_stop_ends_every_process_of_the_servers(real):
    groups = real.recorded().values()
    assert any(len(group_members(group)) > 1 for group in groups)  # the engine is a process of its own
    end = real("stop")
    assert end.returncode == 0 and "stopped 1 servers" in end.stdout  # the other was killed above
    assert not any(map(group_members, groups)) and not listening(real.port) and not listening(real.port + 1)
