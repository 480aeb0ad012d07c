"""The loop with API servers in place of the engine: the same answers, and no server outlives the step that
needs it.
"""

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import faults
import pytest

from common.cli import UserError
from loop import plan

pytestmark = pytest.mark.usefixtures("built")

REMOTE = "--servers.start", "x", "--servers.stop", "y"
STOPS = "--stop_stage", "1.annotate"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(folder, settings) of a run with servers, which the tests below take further one after the other."""
    folder = tmp_path_factory.mktemp("served")
    servers = ["--generation_backend", "servers", "--server_port", faults.free_ports()]
    return folder / "run", [*faults.small_settings(folder), *servers, "--servers.give_up_after", 5]


def begin(served, log, *more):
    return faults.begin(faults.loop_command(served[0], *served[1], *more), open(log, "ab"))


def servers(folder):
    """Living processes of a run's servers; vLLM's own title hides the command line of some."""
    leaders = {int(path.read_text().split()[0]) for path in (folder / "servers").glob("*.server")}
    found = set(faults.started_by(folder, "api_server")) | set(faults.started_by(folder, "VLLM::"))
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) in leaders:
            found.add(int(path.parent.name))
    return found


def test_no_server_outlives_its_loop(served, tmp_path):
    folder, settings = served
    # kill -9 of the driver while servers start: they live on, and the next start ends them.
    driver = begin(served, tmp_path / "1", *STOPS)
    faults.wait_for(lambda: servers(folder))
    assert faults.kill(driver, whole=False)
    left = servers(folder)
    assert left
    # The next start: its server dies under the client, whose failure is told and ends what is left.
    driver = begin(served, tmp_path / "2", *STOPS)
    [client] = faults.wait_for(lambda: faults.started_by(folder, "generation/gen_hf.py"))
    assert not left & servers(folder) and client
    children = servers(folder)
    assert len(children) >= 2  # server and engine, whose title does not hide the mark that they are found by
    assert children == set(faults.started_by(folder)) - {client}
    [record] = (folder / "servers").glob("*.server")
    os.kill(int(record.read_text().split()[0]), signal.SIGKILL)
    assert driver.wait(timeout=120) == 1
    said = (tmp_path / "2").read_text()
    # "does not answer", or where it died before its first answer "no server has answered"
    for part in ("error: ", "answer", "iter0/logs/client.log", "servers/logs/server_"):
        assert part in said, said
    assert not faults.started_by(folder) and not servers(folder)
    # Ctrl-C while servers start.
    driver = begin(served, tmp_path / "3", *STOPS)
    faults.wait_for(lambda: servers(folder))
    left = servers(folder)
    os.kill(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=60) == 130 and not servers(folder) and not faults.started_by(folder)
    assert not left & set(faults.processes(lambda line, environment: True))


def test_servers_give_what_the_engine_gives(served, undisturbed):
    """Of the start: held-out answers, and the first iteration's responses."""
    folder, settings = served
    end = faults.loop(folder, *settings, *STOPS)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    for name, K in (
        ("iter0/heldout_sampled.rewarded", 4),
        ("iter0/heldout_greedy.rewarded", 1),
        ("iter1/generated", 4),
        ("iter1/rewarded", 4),
    ):
        faults.same_answers(folder / f"{name}.jsonl", undisturbed[0] / f"{name}.jsonl", K)
    assert not servers(folder) and not faults.started_by(folder)
    assert not list((folder / "servers").glob("*.server"))
    assert not (folder / "iter1/shards").exists()


@pytest.mark.long
def test_a_whole_run_with_servers_is_the_engines(served, undisturbed):
    folder, settings = served
    end = faults.loop(folder, *settings)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    faults.same_run(folder, undisturbed[0])
    for kind, K in (("sampled", 4), ("greedy", 1)):
        name = f"iter1/heldout_{kind}.rewarded.jsonl"
        faults.same_answers(folder / name, undisturbed[0] / name, K)


def test_a_finished_run_may_change_its_backend(served, undisturbed):
    for (folder, settings), backend in ((served, "engine"), (undisturbed, "servers")):
        other, upto = ("--generation_backend", backend), STOPS if backend == "engine" else ()
        again = faults.loop(folder, *settings, *other, *upto, "--dry_run")
        assert again.returncode == 0 and again.stdout == "", again.stdout + again.stderr
        changed = faults.loop(folder, *settings, *other, "--generation.dtype", "bfloat16", "--dry_run")
        assert changed.returncode == 2, changed.stderr
        assert "dtype was 'float32' and is now 'bfloat16'" in changed.stderr


def test_a_dry_run_prints_servers_clients_and_the_end(tmp_path):
    more = "--generation_backend servers --generation.max_num_seqs 7 --servers.concurrency 3"
    settings = [*faults.small_settings(tmp_path), *more.split()]
    end = faults.loop(tmp_path / "run", *settings, "--num_shards", 2, "--server_port", 8100, "--dry_run")
    assert end.returncode == 0, end.stderr
    lines = [line for line in end.stdout.splitlines() if "generation/" in line]
    assert [line.split("generation/")[1].split()[0] for line in lines[:5]] == [
        "register_server.sh",
        *["gen_hf.py"] * 3,
        "register_server.sh",
    ]
    wanted = "port=8100 servers=2 max_model_len=96 dtype=float32 kv_cache_gib=0.25 max_num_seqs=7"
    assert {*wanted.split(), "tiny/built/policy"} <= {*lines[0].split()}
    client = shlex.split(lines[1])
    assert f"{tmp_path}/run/loop.yaml:heldout" in client and "--ports 8100 8101 --concurrency 3 " in lines[1]
    assert lines[4].split()[-2:] == ["stop", f"{tmp_path}/run/servers"]
    assert f"register_server.sh {tmp_path}/run/iter1/model" in lines[5] and not (tmp_path / "run").exists()
    assert "--K 1 --temperature 0 --iteration -1" in lines[2]


def test_each_model_of_a_mixture_has_servers_of_its_own(tmp_path):
    parts = json.dumps([{"K": 2}, {"K": 2, "model": "previous"}])
    more = ["--generation_backend", "servers", "--iterations", 3, "--generation.mixture", parts]
    settings = [*faults.small_settings(tmp_path), "--heldout_prompts", "null", *more]
    end = faults.loop(tmp_path / "run", *settings, "--stage", "3.1", "--stop_stage", "3.1", "--dry_run")
    assert end.returncode == 0, end.stderr
    lines = [line for line in end.stdout.splitlines() if "generation/" in line]
    names = [line.split("generation/")[1].split()[0] for line in lines]
    assert names == [*["register_server.sh", "gen_hf.py", "register_server.sh"] * 2, "join_parts.py"]
    run = tmp_path / "run"
    for at, name, policy in ((0, "policy", 2), (3, "previous", 1)):
        assert lines[at].endswith(f" {run}/iter{policy}/model") and f"--parts_of {name}" in lines[at + 1]
        assert f"--tokenizer {run}/iter{policy}/model " in lines[at + 1]
        assert f"--output_dir {run}/iter3/generated.{name}.jsonl " in lines[at + 1]


def test_servers_on_other_machines_are_started_and_stopped_by_commands(tmp_path):
    """As the client takes them, by --hosts; the commands of a user's own get the model and say when it is
    served.
    """
    given = {"hosts": ["node1", "node2"], "ports": [8000, 8000]}
    given |= {"start": "ssh node1 serve", "stop": "ssh node1 stop"}
    backend = ["--generation_backend", "servers", "--servers", json.dumps(given)]
    settings = [*faults.small_settings(tmp_path), *backend]
    end = faults.loop(tmp_path / "run", *settings, "--dry_run", "--stop_stage", "0.4")
    lines = [shlex.split(line) for line in end.stdout.split("# policy 0: annotate")[0].splitlines()]
    assert ["bash", "-c", 'ssh node1 serve "$@"', "start", "tiny/built/policy"] in lines, end.stderr
    assert lines[-1] == ["bash", "-c", "ssh node1 stop"]
    [client, *_] = [line for line in lines if "generation/gen_hf.py" in line]
    at = client.index("--ports")
    assert client[at : at + 6] == ["--ports", "8000", "8000", "--hosts", "node1", "node2"]
    del given["start"]
    settings[-1] = json.dumps(given)
    end = faults.loop(tmp_path / "run", *settings, "--check")
    assert end.returncode == 2 and "servers.start must be the command" in end.stderr


def test_servers_on_other_machines_are_stopped_however_the_loop_ends(tmp_path):
    """Those of a driver that was killed by the next start, and its own when the client fails."""
    told = tmp_path / "told"
    given = {
        "hosts": ["127.0.0.1"],
        "ports": [int(faults.free_ports())],
        "start": f"echo start >>{told}; :",
        "stop": f"echo stop >>{told}",
        "give_up_after": 1,
    }
    settings = [
        *faults.small_settings(tmp_path),
        "--generation_backend",
        "servers",
        "--servers",
        json.dumps(given),
    ]
    in_use = tmp_path / "run/servers/in_use"
    in_use.parent.mkdir(parents=True)
    in_use.write_text(f"bash\0-c\0echo killed >>{told}\0")  # by a start with another command
    end = faults.loop(tmp_path / "run", *settings)
    assert end.returncode == 1 and "to continue" in end.stderr, end.stderr
    assert told.read_text().split() == ["killed", "start", "stop"] and not in_use.exists()


@pytest.mark.parametrize("wrong, named", [
    (("--generation_backend", "server"), "'server' is not one of engine, servers"),
    (("--servers.concurency", 3), "did you mean 'concurrency'"),
    (("--servers.give_up_after", 0), "give_up_after must be above 0"),
    (("--servers.hosts", "[a, b]", "--servers.ports", "[80]", *REMOTE), "as many hosts as"),
    (("--servers.ports", "[80]"), "servers.ports are of servers that servers.start starts"),
    (("--servers.start", "x"), "servers.start needs servers.stop"),
    (("--server_port", 65535, "--num_shards", 2, "--generation_backend", "servers"), "server_port 65535"),
])  # fmt: skip
def test_impossible_settings_are_refused(tmp_path, wrong, named, monkeypatch, capsys):
    monkeypatch.chdir(faults.ROOT)
    settings = [faults.CONFIG, "--run_dir", tmp_path / "run", *faults.small_settings(tmp_path), *wrong]
    monkeypatch.setattr(sys, "argv", ["plan.py", "check", *map(str, settings)])
    with pytest.raises(UserError) as refused:
        plan.main()
    assert named in capsys.readouterr().err + str(refused.value)
