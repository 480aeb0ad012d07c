"""The real thing: `bash run_online.sh configs/online_tiny.yaml` with real vLLM servers, killed once on its
way, and what the driver refuses.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

import faults
import pytest
from online import rounds_of

from common.cli import UserError
from common.run_folder import KINDS
from loop import online_plan

CONFIG = "configs/online_tiny.yaml"


def command(*arguments, script="run_online.sh", config=CONFIG):
    return [str(part) for part in ("bash", script, config, *arguments)]


def drive(*arguments, **more):
    """Run the driver to its end; returns the process."""
    return faults.ended(command(*arguments, **more), 1500)


@pytest.fixture(scope="module")
def finished(built, tmp_path_factory):
    """(folder of a run of three rounds whose driver was killed in the second, settings, what it printed)."""
    folder = tmp_path_factory.mktemp("online")
    data = faults.small_settings(folder)[:4]  # --prompts and --heldout_prompts
    sizes = "--online.rounds 3 --online.prompts_per_round 8 --online.sync_every 2 --online.save_every 1"
    small = "--evaluate_every 3 --generation.K 4 --generation.kv_cache_gib 0.25"
    settings = [*data, *sizes.split(), *small.split(), "--server_port", faults.free_ports()]
    run = folder / "run"
    driver = faults.begin(command("--run_dir", run, *settings))
    saved = "online/checkpoint-*/trainer_state.json"  # written last, behind the round's line in its log
    faults.wait_for(lambda: list(run.glob(saved)) or driver.poll() is not None, 600)
    assert faults.kill(driver, whole=False)  # trainer and servers go on without it
    assert faults.started_by(run, "run_online.py")
    end = drive("--run_dir", run, *settings)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    return run, settings, end.stdout


def test_a_run_whose_driver_was_killed_ends_with_the_loops_table(finished):
    run, _, output = finished
    head, _, start, end = output[output.index("iterate  ") :].split("\n")[:4]
    columns = "iterate,reward,best of K,greedy reward,gold,greedy gold,length,cut off,KL,seconds"
    assert re.split(r"  +", head) == columns.split(",")
    assert (start.split()[0], end.split()[0]) == ("0", "1") and "(K=4)" in end
    entries = rounds_of(run)
    assert [(entry["round"], entry["version"]) for entry in entries] == [(0, 0), (1, 1), (2, 2)]
    assert "continuing from" in (run / "iter1/logs/train.log").read_text()
    manifest = json.loads((run / "iter1/model.manifest.json").read_text())
    assert manifest["complete"] and manifest["counts"]["rounds"] == 3
    assert (run / "iter1/model/model.safetensors").read_bytes() != Path(
        faults.ROOT, "tiny/built/policy/model.safetensors"
    ).read_bytes()


def test_nothing_is_left_behind(finished):
    """No server, no trainer, no weights in memory, no checkpoint."""
    from dpo_iteration.online_arguments import memory_folder

    run = finished[0]
    assert not faults.started_by(run) and not list((run / "servers").glob("*.server"))
    assert not memory_folder(run / "online").exists() and not list(run.glob("online/checkpoint-*"))


def test_the_page_shows_the_rounds(finished):
    page = (finished[0] / "report/index.html").read_text(encoding="utf-8")
    assert (
        "rounds behind" in page
        and "share of time that waited" in page
        and "rounds of online training" in page
    )


def test_a_second_start_does_nothing_and_changes_are_refused_by_name(finished):
    run, settings, output = finished
    again = drive("--run_dir", run, *settings)
    assert again.returncode == 0 and f"every stage of {run} is done" in again.stderr, again.stderr
    assert output.endswith(again.stdout)
    refused = drive("--run_dir", run, *settings, "--online.staleness", 1)
    assert refused.returncode == 2 and "online.staleness was 0 and is now 1" in refused.stderr, refused.stderr
    other = drive("--run_dir", run, script="run_loop.sh", config=faults.CONFIG)
    assert other.returncode == 2 and "holds a run of online DPO (run_online.sh)" in other.stderr


def test_held_out_answers_of_living_servers_are_the_engines(finished):
    """Where they are gone, the engine gives the same by the policy's folder."""
    run, settings, _ = finished
    kept = {}
    for kind in KINDS:
        path, manifest = (run / f"iter1/heldout_{kind}.generated.{end}" for end in ("jsonl", "manifest.json"))
        made = json.loads(manifest.read_text())
        assert (
            made["script"] == "generation/gen_hf.py"
            and made["inputs"]["model"]["path"] == f"{run}/iter1/model"
        )
        kept[path] = path.read_bytes()
        path.unlink()
    end = drive("--run_dir", run, *settings)
    assert end.returncode == 0 and "policy 1: sample" in end.stdout + end.stderr, end.stderr
    assert {path: path.read_bytes() for path in kept} == kept


def test_the_plan_shares_the_gpus_out(built, tmp_path):
    more = ("--run_dir", tmp_path / "run", "--dry_run", "--num_gpus", 8, "--gpu_memory_gib", 80)
    planned = drive(*more, "--sampling_gpus", 6, "--generation.tensor_parallel_size", 2)
    assert planned.returncode == 0, planned.stderr
    start = re.findall(r"^env .*register_server.sh .*$", planned.stdout, re.MULTILINE)
    assert (
        len(start) == planned.stdout.count("register_server.sh stop ") == 1
        and " servers=3 " in start[0]
        and " gpus=0,1,2,3,4,5 " in start[0]
    )
    assert " VLLM_SERVER_DEV_MODE=1 " in start[0] and "host=" not in start[0]
    train = [line for line in planned.stdout.split("\n") if "dpo_iteration/run_online.py" in line]
    assert [line.split("--until_round ")[1].split()[0] for line in train] == ["9", "18", "27"]
    assert all(line.startswith("env CUDA_VISIBLE_DEVICES=6,7 accelerate launch") for line in train)
    assert all("--num_processes 2 " in line and "--ports 8000 8001 8002 " in line for line in train)
    assert all(f"--heldout {tmp_path}/run/loop.yaml:heldout " in line for line in train)
    assert engines(planned) == 1  # for the start: training leaves all other answers
    assert scoring(planned) == {"env CUDA_VISIBLE_DEVICES=6,7 accelerate"}  # the servers are there meanwhile

    apart = drive(*more, "--heldout.gpu_memory_utilization", 0.5)  # than theirs: an engine answers
    assert (
        len(re.findall(r"register_server.sh stop ", apart.stdout)) == 3 and "--heldout " not in apart.stdout
    )
    assert engines(apart) == 4
    assert scoring(apart) == {"accelerate launch --multi_gpu"}


def engines(planned):
    """How many models an engine is started for."""
    return len(set(re.findall(r"get_hf2.py .*--model_name_or_path (\S+)", planned.stdout)))


def scoring(planned):
    """How the commands begin that score held-out answers and measure their KL."""
    lines = [line for line in planned.stdout.split("\n") if re.search(r"get_rewards.py|divergence.py", line)]
    assert len(lines) == 8  # of four policies
    return {" ".join(line.split()[:3]) for line in lines}


def test_one_gpu_samples_and_trains_in_turns(built, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(faults.ROOT)

    def planned(*given):
        """{list that the driver gets: its words}"""
        words = [CONFIG, "--run_dir", tmp_path / "run", "--gpu_memory_gib", 80, *given]
        monkeypatch.setattr(sys, "argv", ["online_plan.py", "values", *map(str, words)])
        online_plan.main()
        lists = {}
        for line in capsys.readouterr().out.splitlines():
            key, _, value = line.partition("\t")
            lists.setdefault(key, []).append(value)
        return lists

    engine = ("--generation.engine_args", '{"quantization": "fp8"}')
    for given, gpus in (((1,), "0"), ((2, "--share_gpus", "true"), "0,1")):
        told = planned("--num_gpus", *given, *engine)
        start = told["start_servers[]"]
        assert f"gpus={gpus}" in start and f"servers={len(gpus.split(','))}" in start
        assert 'engine_args={"quantization": "fp8", "enable_sleep_mode": true}' in start
        assert "gpu_memory_utilization=0.3" in start and "VLLM_SERVER_DEV_MODE=1" in start
        assert told["trainer_env[]"] == ["env", f"CUDA_VISIBLE_DEVICES={gpus}"]
        assert told["training_processes"] == [str(len(gpus.split(",")))]
        assert " --share_gpus true " in " ".join(told["ask_servers[]"])
    own = planned("--num_gpus", 1, "--generation.gpu_memory_utilization", 0.4)
    assert "gpu_memory_utilization=0.4" in own["start_servers[]"]
    apart = planned("--num_gpus", 2)
    assert "--share_gpus" not in apart["ask_servers[]"] and "gpus=0" in apart["start_servers[]"]
    without = planned("--share_gpus", "true")  # on a CPU a server takes the calls, and refuses the mode
    assert "--share_gpus" in without["ask_servers[]"] and "enable_sleep" not in str(
        without["start_servers[]"]
    )


@pytest.mark.parametrize("staleness", [0, 1])
def test_memory_and_hours_of_8b_are_told(built, tmp_path, staleness, monkeypatch, capsys):
    """Against sums of our own: bytes a parameter under ZeRO-3, and the constants of docs/performance.md."""
    monkeypatch.chdir(faults.ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, more = "configs/online_llama3_8b.yaml", ("--num_gpus", "8", "--gpu_memory_gib", "80")
    given = ["check", config, "--run_dir", str(tmp_path / "run"), *more, "--online.staleness", str(staleness)]
    monkeypatch.setattr(sys, "argv", ["online_plan.py", *given])
    online_plan.main()
    told = capsys.readouterr().err
    gib = re.search(r"zero3 over 4 processes takes about (\d+) GiB a GPU with rows of 4,096 tokens", told)
    alone = re.search(r"the reference has (\d+) of it, 1 reward model (\d+), taken to be", told)
    states, reward = 16 * 8.03e9 / 4 / 2**30, 2 * 8.03e9 / 2**30
    assert float(alone[2]) == pytest.approx(reward, abs=0.6)
    assert float(alone[1]) > 2 * 8.03e9 / 4 / 2**30  # its share, and what is gathered
    assert states + reward + float(alone[1]) < float(gib[1]) < 80
    assert "a GPU has 80, 76 of which may be filled" in told

    tokens, scored = 320 * 8 * 350, 320 * 8 * 550
    sampling, scoring = tokens / 2500 / 4, 2 * 8.03e9 * scored / (312e12 * 0.45) / 4
    training = (8 + 2) * 8.03e9 * 320 * (200 + 2 * 350) / (312e12 * 0.35) / 4
    a_round = max(sampling, scoring + training) if staleness else sampling + scoring + training
    hours, minutes = re.search(r"time: about (\d+)h(\d+)m in all", told).groups()
    assert 60 * int(hours) + int(minutes) == pytest.approx(150 * a_round / 60, rel=0.01)
    assert ("beside it scoring" if staleness else "then scoring") in told


def test_a_shared_gpu_holds_what_the_trainer_keeps_and_an_engine_s_part_of_the_policy(monkeypatch, capsys):
    """16 GB each of policy, reward model, and reference where the loss has one; two GPUs share a server's."""
    monkeypatch.chdir(faults.ROOT)

    def told(*given):
        words = ["--run_dir", "runs/none", "--online.staleness", 0, "--accelerate_config", "configs/ddp.yaml"]
        words += ["--training", "configs/training_lora.yaml", "--gpu_memory_gib", 80, *given]
        words = ["online_plan.py", "check", "configs/online_llama3_8b.yaml", *words]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        with contextlib.suppress(UserError):  # of 80 GiB they may be too much
            online_plan.main()
        said = capsys.readouterr().err
        [found] = re.findall(r"about ([\d.]+) GiB of its GPU .* may take (\d+) of 80 GiB", said)
        [disk] = re.findall(r"disk: about ([\d.]+) GiB for 1 trained model and 3 checkpoints", said)
        assert float(disk) < 17  # the model, and adapters
        return [float(number) for number in found]

    one = ("--num_gpus", 1)
    kept, taken = told(*one)
    without, _ = told(*one, "--training_args.loss_type", "simpo")
    assert 14.5 < kept - without < 15.5 and taken == 24
    assert 29.9 < without < 32  # policy and reward model, and what trains adapters
    cache = ("--generation.kv_cache_gib", 10)
    assert told(*one, *cache)[1] == 25
    assert (
        told("--num_gpus", 2, "--share_gpus", "true", "--generation.tensor_parallel_size", 2, *cache)[1] == 17
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        (("--num_gpus", 1, "--share_gpus", "false"), "of one GPU there is nothing to share out"),
        (
            ("--num_gpus", 1, "--online.staleness", 1),
            "on shared GPUs, so nothing is sampled while it trains; give --online.staleness 0",
        ),
        (
            ("--training_args.loss_type", "kto"),
            "has no label smoothing: give --training_args.label_smoothing 0",
        ),
        (("--num_gpus", 1, "--generation.tensor_parallel_size", 2), "1 GPUs are visible"),
        (("--num_gpus", 1, "--generation.gpu_memory_utilization", 0.00001), "does not hold the policy"),
        (("--num_gpus", 1, "--generation.gpu_memory_utilization", 0.99999), "are more than a GPU's 80"),
        (("--num_gpus", 1, "--generation.kv_cache_gib", 80), "are more than a GPU's 80"),
        (("--num_gpus", 4, "--share_gpus", "true", "--sampling_gpus", 2), "all GPUs sample where they are"),
        (("--num_gpus", 4, "--sampling_gpus", 4), "some must sample and some must train"),
        (("--training_args.num_train_epochs", 2), "an online run decides it; give online.rounds"),
        (("--online.output_dir", "x"), "online.output_dir is what the run itself decides"),
        (("--online.sync_every", 26), "a step needs a pair"),
        (("--online.prompts_per_round", 700), "the prompt sets hold 675"),
        (("--training_args.loss_type", "aot"), "computes its losses itself"),
        (
            ("--generation.mixture", '[{"K": 4}, {"K": 4, "model": "previous"}]'),
            "generation.mixture has parts with model previous: an online run samples from the policy",
        ),
        (("--generation.mixture", '[{"K": 3}]'), "the parts of --generation.mixture have K 3 together"),
        (("--machines", 2), "an online run is for one machine"),
        (("--generation_backend", "servers"), "evaluates by the engine"),
        (("--iterations", 3), "a key of another kind of run: bash run_loop.sh"),
        (("--online.rouns", 3), "did you mean '--online.rounds'?"),
        (("--num_gpus", 2, "--gpu_memory_gib", 0.1), "policy, reference and reward models together"),
    ],
)
def test_what_cannot_work_is_refused(built, tmp_path, wrong, said, monkeypatch, capsys):
    monkeypatch.chdir(faults.ROOT)
    given = [CONFIG, "--run_dir", tmp_path / "run", "--gpu_memory_gib", 80, *wrong]
    monkeypatch.setattr(sys, "argv", ["online_plan.py", "check", *map(str, given)])
    with pytest.raises(UserError) as refused:
        online_plan.main()
    told = f"{refused.value}{capsys.readouterr().err}"
    assert said in told and told.count("parts of") <= 1  # a mixture that is wrong is told once
