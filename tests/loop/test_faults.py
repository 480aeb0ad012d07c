"""Fault injection: real processes are killed at random moments, disks are full; what is finished afterwards
is as if nothing had been.

A few kills in the ordinary run; under --all 30 of the engine, and 200 of client, annotation and driver at
living servers.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time

import faults
import pytest

pytestmark = pytest.mark.usefixtures("built")

VLLM = faults.vllm_python()
POLICY, REWARD = "tiny/built/policy", "tiny/built/reward_model"
SIZES = "--K 4 --max_input_length 64 --max_new_tokens 32".split()
MANY = {"engine": 30, "client": 115, "annotation": 65, "driver": 20}  # under --all
LONG = pytest.mark.long


# The loop


def start(folder, settings, log):
    return faults.begin(faults.loop_command(folder, *settings), log)


def test_a_loop_killed_at_every_stage_ends_as_an_undisturbed_one(undisturbed, tmp_path):
    """kill -9 of the engine, the annotation and the training under the driver, and of the driver and all it
    started.
    """
    whole, settings = undisturbed
    folder, moments, kills = tmp_path / "run", random.Random(faults.SEED), 0
    # slow enough to be killed at work
    settings = [*settings, "--generation.max_num_seqs", 1, "--stop_stage", "1.3"]
    partial = folder / "iter0/shards/heldout_sampled.generated.of1.0.jsonl.partial"

    def under_the_driver(script, moment, told):
        """Kill a stage; the driver tells which and how it ended."""
        log = tmp_path / f"log{kills}"
        with open(log, "wb") as file:
            driver = start(folder, settings, file)
        faults.wait_for(
            lambda: driver.poll() is not None or (faults.started_by(folder, script) and moment()), pause=0.005
        )
        for pid in faults.started_by(folder, script):
            os.kill(pid, 9)
        assert driver.wait(timeout=120) == 1
        said = log.read_text()
        assert told in said and "to continue: bash run_loop.sh" in said, said
        assert "Traceback" not in said.split("\n---\n")[-1]
        assert not faults.started_by(folder)
        return 1

    def after(seconds):
        seen = []
        return lambda: seen.append(time.monotonic()) or seen[-1] - seen[0] > seconds

    def driver_alone(script, delay, whole):
        """Kill the driver, alone or with its group, while a stage is at work."""
        driver = start(folder, settings, subprocess.DEVNULL)
        faults.wait_for(lambda: faults.started_by(folder, script) or driver.poll() is not None)
        time.sleep(delay)
        return faults.kill(driver, whole)

    kills += under_the_driver(
        "generation/get_hf2.py",
        lambda: partial.exists() and partial.stat().st_size,
        "error: policy 0: sample: ended with status 137",
    )
    with open(partial, "ab") as file:
        file.write(b'{"id": "torn", "respon')  # what a kill in the middle of a write leaves
    kills += driver_alone("generation/get_hf2.py", moments.uniform(0, 12), whole=False)
    kills += driver_alone("annotate_data/get_rewards.py", moments.uniform(0, 2), whole=True)
    kills += under_the_driver(
        "annotate_data/get_rewards.py",
        after(moments.uniform(0, 2)),
        "error: policy 0: annotate: ended with status 137",
    )
    log = folder / "iter1/logs/train.log"
    kills += under_the_driver(
        "dpo_iteration/run_dpo.py",
        lambda: log.exists() and "training on" in log.read_text(),
        "error: policy 0: train policy 1: ended with status",
    )
    end = faults.loop(folder, *settings)
    assert end.returncode == 0, end.stderr
    print(f"{kills} kills")
    assert kills == 5
    faults.same_run(folder, whole)


@LONG
def test_a_driver_killed_at_living_servers(undisturbed, tmp_path):
    """The driver alone, or with its whole group, at any moment of a run with servers."""
    whole, settings = undisturbed
    wanted, moments, kills, lives = faults.share(MANY["driver"]), random.Random(faults.SEED), 0, 0
    while kills < wanted:
        lives += 1
        folder, port, ended = tmp_path / f"run{lives}", faults.free_ports(), False
        more = [*settings, "--generation_backend", "servers", "--server_port", port, "--stop_stage", "1.3"]
        with open(tmp_path / "log", "ab") as log:
            while kills < wanted and not ended:
                driver = start(folder, more, log)
                try:
                    driver.wait(timeout=moments.uniform(1, 60))
                except subprocess.TimeoutExpired:
                    kills += faults.kill(driver, whole=moments.random() < 0.5)
                ended = driver.returncode == 0
                assert driver.returncode in (0, -9), (tmp_path / "log").read_text()[-3000:]
        end = faults.loop(folder, *more)
        assert end.returncode == 0 and not faults.started_by(folder), end.stderr[-3000:]
        assert not list((folder / "servers").glob("*.server"))
        faults.same_run(folder, whole)
    print(f"{kills} kills of the driver, {lives} runs")


# The scripts


def many_prompts(path, count):
    """`count` prompts of the tiny task; the same ones come again, as twins with ids of their own."""
    lines = (faults.ROOT / "tiny/built/prompts/iter1.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    path.write_text("".join(lines[i % len(lines)] + "\n" for i in range(count)), encoding="utf-8")
    return path


def reached(killer, kills, *more):
    """Kill, and count: `kills` met a living process, and of more than a few some fell into each phase."""
    killer.reach(kills, *more)
    assert sum(killer.counts.values()) >= kills and (
        kills < 20 or all(killer.counts[phase] >= 2 for phase in faults.PHASES)
    ), killer


def killer(command, folder, start, step):
    """Of a command, whose undisturbed output is there to compare with."""
    whole = folder / "whole0.jsonl"
    check = lambda output: faults.same_answers(output, whole, 4)  # noqa: E731
    made = faults.Killer(command, folder, start, step, check)
    made.end(whole)
    return made


@LONG
def test_a_killed_engine_loses_and_doubles_nothing(tmp_path):
    prompts = many_prompts(tmp_path / "p.jsonl", 600)

    def command(output):
        prefix = str(output).removesuffix("0.jsonl")
        small = "--dtype float32 --kv_cache_gib 0.25 --max_num_seqs 8".split()
        return [
            VLLM,
            "generation/get_hf2.py",
            "--model_name_or_path",
            POLICY,
            *of(prompts, prefix),
            *SIZES,
            *small,
        ]

    reached(killer(command, tmp_path, start=15, step=12_000), faults.share(MANY["engine"]))


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """The port of a living server of the tiny policy."""
    folder, port = tmp_path_factory.mktemp("server"), faults.free_ports()
    variables = {
        "python": VLLM,
        "port": port,
        "max_model_len": 96,
        "dtype": "float32",
        "kv_cache_gib": 0.25,
        "state_dir": folder,
        "deadline": 400,
    }
    given = [f"{key}={value}" for key, value in variables.items()]
    end = faults.ended(["env", *given, "bash", "generation/register_server.sh", POLICY])
    assert end.returncode == 0, end.stderr
    yield port
    faults.ended(["bash", "generation/register_server.sh", "stop", folder])


def of(source, output):
    """What a script reads and writes."""
    return ["--dataset_name_or_path", source, "--output_dir", output]


def client(port, prompts):
    """A function from an output to the command that asks the server for it."""
    start = [VLLM, "generation/gen_hf.py", "--ports", port, "--tokenizer", POLICY, *SIZES, "--concurrency", 4]
    return lambda output: [*start, *of(prompts, output)]


def annotation(generated):
    """The same of the reward model's scores."""
    start = [VLLM, "annotate_data/get_rewards.py", "--reward_name_or_path", REWARD]
    return lambda output: [*start, *of(generated, output)]


@LONG
def test_a_client_killed_at_a_living_server_loses_and_doubles_nothing(tmp_path, real_server):
    command = client(real_server, many_prompts(tmp_path / "p.jsonl", 600))
    reached(killer(command, tmp_path, start=6, step=1_500), faults.share(MANY["client"]))


def test_a_killed_client_loses_and_doubles_nothing(tmp_path):
    with faults.Stub(pause=0.1) as stub:
        command = client(stub.port, many_prompts(tmp_path / "p.jsonl", 60))
        reached(killer(command, tmp_path, start=4, step=4_000), 3, (1 / 3, 1 / 3))


@pytest.mark.parametrize("kills", [3, pytest.param(faults.share(MANY["annotation"]), marks=LONG)])
def test_a_killed_annotation_loses_and_doubles_nothing(undisturbed, tmp_path, kills):
    generated = tmp_path / "generated.jsonl"
    answers = faults.records(undisturbed[0] / "iter1/generated.jsonl")
    copies = 16 if kills == 3 else 60
    with open(generated, "w", encoding="utf-8") as file:
        for i in range(copies):
            file.writelines(json.dumps(record | {"id": f"{record['id']}-{i}"}) + "\n" for record in answers)
    command = annotation(generated)
    made = killer(lambda output: [*command(output), "--batch_tokens", 256], tmp_path, start=9, step=3_000)
    reached(made, kills, (1 / 3, 1 / 3) if kills == 3 else (0.25, 0.6))


# Disks that are full or read-only, and torn lines


@pytest.fixture
def stages(undisturbed, tmp_path):
    """What each script is started with, writing into `tmp_path/out`; the server is a stand-in."""
    run, _ = undisturbed
    (tmp_path / "out").mkdir()
    shutil.copy(run / "iter1/generated.jsonl", tmp_path / "shard0.jsonl")
    merge = [
        sys.executable,
        "generation/merge_data.py",
        "--base_path",
        tmp_path / "shard",
        "--num_datasets",
        1,
    ]
    training = [
        sys.executable,
        "dpo_iteration/run_dpo.py",
        f"{run}/loop.yaml:training_args",
        "--max_steps",
        1,
    ]
    training += ["--model_name_or_path", POLICY, "--train_dir", run / "iter1/rewarded.jsonl"]
    engine = [VLLM, "generation/get_hf2.py", "--model_name_or_path", POLICY]
    prompts = run.parent / "prompts.jsonl"
    with faults.Stub(pause=0) as stub:
        yield lambda folder: {
            "client": client(stub.port, prompts)(folder / "generated.jsonl"),
            "merge": [*merge, "--output_dir", folder / "m.jsonl"],
            "annotation": annotation(run / "iter1/generated.jsonl")(folder / "rewarded.jsonl"),
            "training": [*training, "--output_dir", folder / "model", "--pairs_path", folder / "pairs.jsonl"],
            "engine": [*engine, *of(prompts, f"{folder}/shard")],
        }


def limited(kib):
    """Options of a process whose files may be so large."""
    size = (kib * 1024, resource.RLIM_INFINITY)
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, size)}


def is_one_line(end):
    """The process ended with one line for a person."""
    errors = [line for line in end.stderr.splitlines() if line.startswith("error: ")]
    return end.returncode == 2 and len(errors) == 1 and "Traceback" not in end.stderr


@pytest.mark.parametrize(
    "stage, output", [("client", "generated.jsonl"), ("merge", "m.jsonl"), ("annotation", "rewarded.jsonl")]
)
def test_a_full_disk_is_one_line_and_the_next_start_goes_on(stages, undisturbed, tmp_path, stage, output):
    command, made = stages(tmp_path / "out")[stage], tmp_path / "out" / output
    end = faults.ended(command, **limited(4))
    assert is_one_line(end) and "too large" in end.stderr.lower() and str(made) in end.stderr, end.stderr
    assert not made.exists()
    end = faults.ended(command)
    assert end.returncode == 0, end.stderr
    assert stage != "client" or "continuing" in end.stdout
    ids = [record["id"] for record in faults.records(undisturbed[0] / "iter1/generated.jsonl")]
    assert [record["id"] for record in faults.records(made)] == ids


def test_training_on_a_full_disk_is_one_line_and_the_next_start_goes_on(stages, tmp_path):
    command, manifest = stages(tmp_path / "out")["training"], tmp_path / "out/model.manifest.json"
    end = faults.ended(command, **limited(1000))
    assert is_one_line(end) and "a size limit is reached" in end.stderr, end.stderr
    assert not json.loads(manifest.read_text())["complete"]
    end = faults.ended(command)
    assert end.returncode == 0 and json.loads(manifest.read_text())["complete"], end.stderr


@pytest.fixture
def closed(tmp_path):
    """A folder that cannot be written, by root neither."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]
    if os.access(folder, os.W_OK) and subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("neither permissions nor mounts can be set here")
    yield folder
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.parametrize("stage", ["engine", "merge", "annotation", "training"])
def test_a_folder_that_cannot_be_written_is_one_line(stages, closed, stage):
    end = faults.ended(stages(closed)[stage])
    assert is_one_line(end) and str(closed) in end.stderr, end.stderr


def test_a_run_that_cannot_be_written_is_one_line(closed):
    end = faults.loop(closed / "run", "--check")
    assert end.returncode == 2 and f"error: cannot write {closed}/run" in end.stderr, end.stderr


def test_a_torn_input_is_named_before_anything_runs(tmp_path):
    """In an input a torn line is an error; in a `.partial` it is cut, see above."""
    settings = faults.small_settings(tmp_path)
    with open(tmp_path / "prompts.jsonl", "ab") as file:
        file.write(b'{"context_messages": [{"role": "us')
    end = faults.loop(tmp_path / "run", *settings, "--check")
    assert end.returncode == 2 and "prompts.jsonl line 25 is torn" in end.stderr, end.stderr
    assert not (tmp_path / "run/loop.yaml").exists()
