"""The real thing: `bash run_ppo.sh configs/ppo_tiny.yaml` with real vLLM and the small PPO, and what may go
wrong. What it shares with run_loop.sh, test_tiny_loop.py shows.

One run of a few rollouts serves most tests. Three fresh seeds of the whole configuration run under --all.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import faults
import pytest
from openrlhf_stub import fake_gpus

pytestmark = pytest.mark.usefixtures("built")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/ppo_tiny.yaml"
MOST_KL = 8.0  # nats per response; the whole run ends at about 4
ONLY_TRAIN = "--stage", "1.train", "--stop_stage", "1.train"


def command(*arguments, config=CONFIG):
    return [str(part) for part in ("bash", "run_ppo.sh", *([config] if config else []), *arguments)]


def ppo(*arguments, config=CONFIG, timeout=1500, **environment):
    """Run the driver to its end; returns the process."""
    whole, env = command(*arguments, config=config), os.environ | environment
    return subprocess.run(
        whole, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def small_settings(folder):
    """Settings of a run of 12 rollouts of 8 × 2 responses; the data lies in `folder`."""
    data = faults.small_settings(folder)[:4]  # --prompts and --heldout_prompts
    sampling = "--generation.K 4 --generation.kv_cache_gib 0.25 --ppo.num_episodes 4 --ppo.save_steps 2"
    sizes = (
        "--ppo.rollout_batch_size 8 --ppo.samples_per_prompt 2 --ppo.batch_size 8 --ppo.micro_batch_size 8"
    )
    return [*data, *sampling.split(), *sizes.split()]


@pytest.fixture(scope="module")
def finished(built, tmp_path_factory):
    """(folder of a finished run, its settings, what it printed)."""
    folder = tmp_path_factory.mktemp("ppo")
    settings = small_settings(folder)
    end = ppo("--run_dir", folder / "run", *settings)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    return folder / "run", settings, end.stdout


@pytest.fixture
def untrained(finished, tmp_path):
    """(copy of the finished run without its model, settings)."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/iter1")
    return tmp_path / "run", finished[1]


def log_of(folder):
    return faults.records(folder / "iter1/model.log.jsonl")


def test_a_run_ends_with_the_loops_table(finished):
    folder, _, output = finished
    head, _, start, end = output[output.index("iterate  ") :].split("\n")[:4]
    columns = "iterate,reward,best of K,greedy reward,gold,greedy gold,length,cut off,KL,seconds"
    assert re.split(r"  +", head) == columns.split(",")
    assert (start.split()[0], end.split()[0]) == ("0", "1") and "(K=4)" in end
    found = re.findall(r"^  (sampled|greedy) +(reward|gold) ", output, re.MULTILINE)
    assert found == [("sampled", "reward"), ("sampled", "gold"), ("greedy", "reward"), ("greedy", "gold")]
    manifest = json.loads((folder / "iter1/model.manifest.json").read_text())
    assert manifest["complete"] and len(log_of(folder)) == 12
    assert manifest["inputs"]["model_name_or_path"]["path"] == "tiny/built/policy"
    steps = [(entry["policy"], entry["step"]) for entry in faults.records(folder / "stages.jsonl")]
    each = ["sample", "annotate", "measure"]
    assert steps == [*((0, step) for step in [*each, "train"]), *((1, step) for step in each)]
    for i in (0, 1):
        metrics = json.loads((folder / f"iter{i}/metrics.json").read_text())
        assert metrics["sampled"]["prompts"] == 6 and metrics["gold_function"] == "tiny/task.py:gold_score"
    weights = [Path(place, "model.safetensors") for place in ("tiny/built/policy", folder / "iter1/model")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_the_held_out_answers_are_the_loops(finished):
    """Same prompts, K and seed: the start's answers are what the DPO loop's iteration 0 would have, so that
    tables can be compared.
    """
    for kind, K, temperature in (("sampled", 4, 1.0), ("greedy", 1, 0.0)):
        manifest = json.loads((finished[0] / f"iter0/heldout_{kind}.generated.manifest.json").read_text())
        wanted = {"iteration": -1, "seed": 0, "K": K, "temperature": temperature}
        assert wanted.items() <= manifest["settings"].items()


def test_a_second_start_does_nothing_and_a_changed_setting_is_refused_by_name(finished):
    folder, settings, output = finished
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in (".lock", "loop.yaml")]
    before, kept = [f.stat().st_mtime_ns for f in files], (folder / "loop.yaml").read_text()
    again = ppo("--run_dir", folder, *settings)
    assert again.returncode == 0 and "policy" not in again.stdout, again.stdout + again.stderr
    assert f"every stage of {folder} is done, nothing is left to do" in again.stderr
    assert [f.stat().st_mtime_ns for f in files] == before
    assert output.endswith(again.stdout) and again.stdout.startswith("iterate")
    refused = ppo("--run_dir", folder, *settings, "--ppo.kl_coef", "0.2")
    assert refused.returncode == 2 and "kl_coef was 0.1 and is now 0.2" in refused.stderr, refused.stderr
    assert (folder / "loop.yaml").read_text() == kept


def test_a_training_stopped_in_every_way_ends_as_an_undisturbed_one(finished, untrained, tmp_path):
    """kill -9 of training under the driver, Ctrl-C, kill -9 of the driver; the weights are those of the run
    that nothing disturbed.
    """
    folder, settings = untrained
    whole = command("--run_dir", folder, *settings, *ONLY_TRAIN)

    def at_work(rollouts):
        """Start, and wait until so many rollouts are in the log and training is alive; a process and the file
        of what it says.
        """
        said = open(tmp_path / f"said{rollouts}", "w+")
        driver = faults.begin(whole, said)
        path = folder / "iter1/model.log.jsonl"

        def far_enough():
            there = path.exists() and len(path.read_text().splitlines()) >= rollouts
            return there or driver.poll() is not None

        faults.wait_for(far_enough)
        assert driver.poll() is None, Path(said.name).read_text()
        return driver, said.name

    driver, said = at_work(3)
    for pid in faults.started_by(folder, "ppo/train_ppo.py"):
        os.kill(pid, signal.SIGKILL)
    assert driver.wait(timeout=60) == 1
    text = Path(said).read_text()
    assert "error: policy 0: train policy 1: ended with status" in text
    assert f"log: {folder}/iter1/logs/train.log" in text and "to continue: bash run_ppo.sh" in text

    driver, said = at_work(6)
    os.kill(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    assert "stopped; to continue: bash run_ppo.sh" in Path(said).read_text()
    assert not faults.started_by(folder)

    driver, _ = at_work(8)
    assert faults.kill(driver, whole=False)
    left = faults.started_by(folder, "ppo/train_ppo.py")
    for pid in left:
        os.kill(int(pid), signal.SIGSTOP)  # or it might be done before the check is
    checked = ppo("--run_dir", folder, *settings, "--check")  # looks only, and stops nothing
    assert left and checked.returncode == 0 and set(left) <= set(faults.started_by(folder)), checked.stderr
    for pid in left:
        os.kill(int(pid), signal.SIGCONT)

    end = ppo("--run_dir", folder, *settings, *ONLY_TRAIN)
    assert end.returncode == 0, end.stderr
    one, other = (run / "iter1/model/model.safetensors" for run in (folder, finished[0]))
    assert one.read_bytes() == other.read_bytes()
    assert [entry["reward"] for entry in log_of(folder)] == [entry["reward"] for entry in log_of(finished[0])]
    assert not (folder / "iter1/metrics.json").exists()  # --stop_stage


def test_printed_commands_run_by_hand(untrained, tmp_path):
    """A dry run of a fresh run names the three stages in order; the printed training, pasted, is what the
    driver then finds done.
    """
    folder, settings = untrained
    planned = ppo("--run_dir", folder, *settings, "--dry_run")
    assert planned.returncode == 0 and not (folder / "iter1/model").exists(), planned.stderr
    lines = planned.stdout.splitlines()
    assert [line for line in lines if line.startswith("# policy")] == [
        "# policy 0: train policy 1",
        *(f"# policy 1: {step}" for step in ("sample", "annotate", "measure")),
    ]
    scripts = [word for line in lines for word in shlex.split(line) if re.fullmatch(r"\w+/\w+\.py", word)]
    assert scripts == [
        "ppo/run.py",
        "ppo/train_ppo.py",
        "generation/get_hf2.py",
        *["generation/merge_data.py"] * 2,
        "annotate_data/get_rewards.py",
        "evaluation/divergence.py",
        "evaluation/metrics.py",
        "evaluation/run_metrics.py",
        "report/make_report.py",
    ]
    [training] = [line for line in lines if "train_ppo.py" in line]
    assert training.startswith(
        "accelerate launch --config_file configs/ddp.yaml --num_processes 1 ppo/train_ppo.py "
        f"{folder}/loop.yaml:ppo --model_name_or_path tiny/built/policy --reward_name_or_path "
    )
    only = ppo("--run_dir", folder, *settings, "--dry_run", *ONLY_TRAIN)
    bash = ["bash", "-c", f"set -e\n{only.stdout}"]
    pasted = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert pasted.returncode == 0, pasted.stderr
    again = ppo("--run_dir", folder, *settings, "--dry_run")
    assert again.returncode == 0 and "train" not in again.stdout, again.stdout + again.stderr
    assert "# policy 1: measure" in again.stdout


def test_without_a_gpu_the_recipe_says_so_before_any_environment(tmp_path):
    refused = ppo(config=None, CUDA_VISIBLE_DEVICES="", envs_dir=str(tmp_path / "envs"))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert "bash run_ppo.sh configs/ppo_tiny.yaml" in refused.stderr
    assert not (tmp_path / "envs").exists()


def test_a_dry_run_of_openrlhf_prints_its_command(built, tmp_path):
    """On (pretended) GPUs the recipe's backend is OpenRLHF; its environment is not made, only named."""
    stamp = Path(faults.vllm_python()).parents[1] / ".rlhf-stamp"  # the environments stay this machine's
    machine = {"PATH": fake_gpus(tmp_path, 8), "HF_HUB_OFFLINE": "1"}
    machine["vllm_requirements"] = str(ROOT / stamp.read_text().split()[1])
    here = [
        *("--model_name_or_path", "tiny/built/policy"),
        *("--reward_name_or_path", "tiny/built/reward_model"),
        *("--model_size_b", "null"),
        *("--prompts", "tiny/built/prompts/iter1.jsonl"),
        *("--heldout_prompts", "tiny/built/prompts/heldout.jsonl"),
        *("--ppo.rollout_batch_size", 128),
    ]
    planned = ppo("--run_dir", tmp_path / "run", *here, "--dry_run", config=None, **machine)
    assert planned.returncode == 0 and "backend openrlhf" in planned.stderr, planned.stderr
    lines = planned.stdout.splitlines()
    # One process per GPU, before and after.
    assert sum("generation/get_hf2.py" in line for line in lines) == 16
    start = lines.index("# policy 0: train policy 1")
    part = lines[start + 1 : lines.index("# policy 1: sample")]
    begins = f"python ppo/openrlhf/run_openrlhf.py {tmp_path}/run/loop.yaml:ppo "
    assert any(line.startswith(begins) for line in part) and any("ppo_train" in line for line in part)
    shown = part[part.index("# python -m openrlhf.cli.train_ppo_ray \\") :]
    words = shlex.split("\n".join(line.removeprefix("# ") for line in shown))
    values = dict(zip(words, words[1:], strict=False))
    wanted = {"--actor.num_gpus_per_node": "8", "--rollout.batch_size": "128", "--actor.adam.lr": "5e-07"}
    assert wanted.items() <= values.items()
    assert not (tmp_path / "run/iter1/model").exists()


def test_on_several_machines_openrlhf_gets_a_ray_cluster_of_its_own(built, tmp_path):
    """Planned for two machines of four GPUs each, of which this is none."""
    machine = {"PATH": fake_gpus(tmp_path, 0), "HF_HUB_OFFLINE": "1"}
    here = [
        *("--model_name_or_path", "tiny/built/policy", "--model_size_b", "null"),
        *("--prompts", "tiny/built/prompts/iter1.jsonl", "--heldout_prompts", "null"),
        *("--ppo.rollout_batch_size", 128, "--machines", 2, "--num_gpus", 4, "--gpu_memory_gib", 80),
        *("--annotation.reward_function", "tiny/task.py:gold_score", "--reward_name_or_path", "null"),
    ]
    planned = ppo("--run_dir", tmp_path / "run", *here, "--dry_run", *ONLY_TRAIN, config=None, **machine)
    assert planned.returncode == 0, planned.stderr
    assert "8 GPUs on 2 nodes, all roles on all of them; 8 engines × 1 GPUs" in planned.stderr
    [start] = [line for line in planned.stdout.splitlines() if line.startswith("srun ")]
    assert start.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 ")
    begins = "bash loop/task.sh all python ppo/openrlhf/ray_cluster.py MACHINE 2 HEAD PORT python "
    assert f" --kill-on-bad-exit=1 {begins}ppo/openrlhf/run_openrlhf.py {tmp_path}/run/loop.yaml:ppo" in start
    assert "RAY_ADDRESS=HEAD:PORT" in planned.stdout
    for flag in ("--actor.num_nodes 2 ", "--actor.num_gpus_per_node 4 ", "--vllm.num_engines 8 "):
        assert f"#   {flag}" in planned.stdout, planned.stdout
    theirs = [*here, "--openrlhf.ray_address", "head:6379"]
    planned = ppo("--run_dir", tmp_path / "run", *theirs, "--dry_run", *ONLY_TRAIN, config=None, **machine)
    assert planned.returncode == 2 and "our reward server must be started by hand" in planned.stderr


@pytest.mark.long
@pytest.mark.parametrize("seed", [101, 102, 103])
def test_three_of_three_fresh_seeds_learn(seed, tmp_path):
    """Models, prompts, sampling and training all follow the seed; reward and gold end above the start, and KL
    stays bounded.
    """
    place = tmp_path / "built"
    end = ppo(
        *("--run_dir", tmp_path / "run", "--seed", seed),
        *("--setup_command", f"python tiny/build.py --output_dir {place} --seed {seed}"),
        *("--model_name_or_path", place / "policy", "--reward_name_or_path", place / "reward_model"),
        *("--prompts", *(place / f"prompts/iter{i}.jsonl" for i in (1, 2, 3))),
        *("--heldout_prompts", place / "prompts/heldout.jsonl"),
    )
    assert end.returncode == 0, end.stderr[-3000:]
    print(end.stdout[-1500:])
    found = re.findall(r"^  sampled +(reward|gold) +\S+ +\[(\S+), \S+\]", end.stdout, re.MULTILINE)
    assert [what for what, _ in found] == ["reward", "gold"], end.stdout
    assert all(float(low) > 0 for _, low in found), end.stdout
    kl = [entry["kl"] for entry in log_of(tmp_path / "run")]
    print(f"KL: largest {max(kl):.2f}, last {kl[-1]:.2f} nats per response")
    assert kl[0] < 0.01 and max(kl) < MOST_KL
