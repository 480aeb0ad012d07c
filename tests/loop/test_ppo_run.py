"""The real thing: `bash run_ppo.sh configs/ppo_tiny.yaml` with real vLLM and the small PPO, and what may go
wrong.

One run of a few rollouts serves most tests. Three fresh seeds of the whole configuration run under --all.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import faults
import pytest

pytestmark = pytest.mark.usefixtures("built")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/ppo_tiny.yaml"
MOST_KL = 8.0  # nats per response; the whole run ends at about 4
ONLY_TRAIN = "--stage", "1.train", "--stop_stage", "1.train"


def command(*arguments, config=CONFIG):
    return [str(part) for part in ("bash", "run_ppo.sh", *([config] if config else []), *arguments)]


def ppo(*arguments, config=CONFIG, timeout=1500, **environment):
    """Run the driver to its end; returns the process."""
    whole = command(*arguments, config=config)
    return subprocess.run(
        whole,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def small_settings(folder):
    """Settings of a run of 12 rollouts of 8 × 2 responses; the data lies in `folder`."""
    prompts, heldout = folder / "prompts.jsonl", folder / "heldout.jsonl"
    for path, source, count in ((prompts, "iter1", 24), (heldout, "heldout", 6)):
        lines = (ROOT / f"tiny/built/prompts/{source}.jsonl").read_text(encoding="utf-8").split("\n")
        path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    ppo_settings = {
        "num_episodes": 4,
        "rollout_batch_size": 8,
        "samples_per_prompt": 2,
        "batch_size": 8,
        "micro_batch_size": 8,
        "save_steps": 2,
    }
    return [
        "--prompts",
        prompts,
        "--heldout_prompts",
        heldout,
        "--generation.K",
        4,
        "--generation.kv_cache_gib",
        0.25,
        *(word for key, value in ppo_settings.items() for word in (f"--ppo.{key}", value)),
    ]


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
    assert re.split(r"  +", head) == [
        "iterate",
        "reward",
        "best of K",
        "greedy reward",
        "gold",
        "greedy gold",
        "length",
        "cut off",
        "KL",
        "seconds",
    ]
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
    weights = [
        Path(place, "model.safetensors").read_bytes()
        for place in ("tiny/built/policy", folder / "iter1/model")
    ]
    assert weights[0] != weights[1] and not list((folder / "iter1/model").glob("checkpoint-*"))


def test_the_held_out_answers_are_the_loops(finished):
    """Same prompts, K and seed: the start's answers are what the DPO loop's iteration 0 would have, so that
    tables can be compared.
    """
    asked = [
        json.loads((finished[0] / f"iter0/heldout_{kind}.generated.manifest.json").read_text())["settings"]
        for kind in ("sampled", "greedy")
    ]
    assert [(one["iteration"], one["seed"], one["K"], one["temperature"]) for one in asked] == [
        (-1, 0, 4, 1.0),
        (-1, 0, 1, 0.0),
    ]


def test_a_second_start_does_nothing(finished):
    folder, settings, output = finished
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.name not in (".lock", "loop.yaml") and path.is_file()
    }
    begun = time.monotonic()
    again = ppo("--run_dir", folder, *settings)
    assert again.returncode == 0 and "policy" not in again.stdout, again.stdout + again.stderr
    assert f"every stage of {folder} is done, nothing is left to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert output.endswith(again.stdout) and again.stdout.startswith("iterate")
    print(f"{time.monotonic() - begun:.1f} s")


@pytest.mark.parametrize("change, named", [
    (("--ppo.kl_coef", "0.2"), "kl_coef was 0.1 and is now 0.2"),
    (("--generation.temperature", "0.7"), "temperature was 1.0 and is now 0.7"),
    (("--seed", "7"), "seed was 0 and is now 7"),
    (("--reward_name_or_path", "tiny/built/policy"), "reward_name_or_path was ['tiny/built/reward_mod"),
])  # fmt: skip
def test_a_changed_setting_is_refused_by_name(finished, change, named):
    folder, settings, _ = finished
    kept = (folder / "loop.yaml").read_text()
    refused = ppo("--run_dir", folder, *settings, *change)
    assert refused.returncode == 2 and named in refused.stderr and "Traceback" not in refused.stderr, (
        refused.stderr
    )
    assert (folder / "loop.yaml").read_text() == kept


def test_one_run_at_a_time(finished):
    folder, settings, _ = finished
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = ppo("--run_dir", folder, *settings)
    assert refused.returncode == 2 and "another run is at work" in refused.stderr


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
        faults.wait_for(
            lambda: (
                driver.poll() is not None
                or (path.exists() and len(path.read_text().splitlines()) >= rollouts)
            )
        )
        assert driver.poll() is None, Path(said.name).read_text()
        return driver, said.name

    driver, said = at_work(3)
    for pid in faults.started_by(folder, "ppo/train_ppo.py"):
        os.kill(pid, signal.SIGKILL)
    assert driver.wait(timeout=60) == 1
    text = Path(said).read_text()
    assert (
        "error: policy 0: train policy 1: ended with status" in text
        and f"log: {folder}/iter1/logs/train.log" in text
        and "to continue: bash run_ppo.sh" in text
    )

    driver, said = at_work(6)
    os.kill(driver.pid, signal.SIGINT)
    assert (
        driver.wait(timeout=60) == 130 and "stopped; to continue: bash run_ppo.sh" in Path(said).read_text()
    )
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
    assert (folder / "iter1/model/model.safetensors").read_bytes() == (
        finished[0] / "iter1/model/model.safetensors"
    ).read_bytes()
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
    pasted = subprocess.run(
        ["bash", "-c", f"set -e\n{only.stdout}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert pasted.returncode == 0, pasted.stderr
    again = ppo("--run_dir", folder, *settings, "--dry_run")
    assert again.returncode == 0 and "train" not in again.stdout and "# policy 1: measure" in again.stdout, (
        again.stdout + again.stderr
    )


def test_check_says_what_is_there_and_makes_nothing(built, tmp_path):
    told = ppo("--run_dir", tmp_path / "run", "--check")
    assert (
        told.returncode == 0
        and told.stdout == ""
        and "check: 1 generation process, 1 training process, CPU, backend small" in told.stderr
    ), told.stderr
    assert not (tmp_path / "run").exists()


def test_problems_are_found_before_anything_runs(built, tmp_path):
    prompts = tmp_path / "overlap.jsonl"
    prompts.write_text(
        (ROOT / "tiny/built/prompts/heldout.jsonl").read_text(encoding="utf-8").split("\n")[0] + "\n",
        encoding="utf-8",
    )
    found = ppo(
        "--run_dir",
        tmp_path / "run",
        "--check",
        "--prompts",
        prompts,
        "--reward_name_or_path",
        "tiny/built/reward_modle",
        "--generation.temprature",
        "1",
        "--ppo.gama",
        "1",
        "--gold_function",
        "nope.py:x",
    )
    assert found.returncode == 2 and "Traceback" not in found.stderr
    for problem in ("1 prompts of", "reward_modle", "temprature", "did you mean '--ppo.gamma'", "nope.py"):
        assert problem in found.stderr, found.stderr
    assert not (tmp_path / "run" / "loop.yaml").exists()


def test_without_a_gpu_the_recipe_says_so_before_any_environment(tmp_path):
    refused = ppo(config=None, CUDA_VISIBLE_DEVICES="", envs_dir=str(tmp_path / "envs"))
    assert (
        refused.returncode == 2
        and refused.stderr.count("\n") == 1
        and "bash run_ppo.sh configs/ppo_tiny.yaml" in refused.stderr
    ), refused.stderr
    assert not (tmp_path / "envs").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--ppoo.kl_coef", "2"), "did you mean '--ppo.kl_coef'"),
        (("--stage", "2.train"), "stage 2.train: one of 0.evaluate, 1.train and 1.evaluate was expected"),
        (
            ("--stage", "1.evaluate", "--stop_stage", "1.train"),
            "--stage 1.evaluate comes behind --stop_stage 1.train",
        ),
        (
            ("configs/ppo_tny.yaml",),
            "no such YAML file: configs/ppo_tny.yaml; there is configs/ppo_tiny.yaml",
        ),
        (("--backend", "openrlhf"), "backend openrlhf needs GPUs"),
        (("--stop_stage",), "--stop_stage needs a value"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, named, tmp_path):
    config = None if arguments[0].endswith(".yaml") else CONFIG
    refused = ppo("--run_dir", tmp_path / "run", *arguments, config=config, CUDA_VISIBLE_DEVICES="")
    assert refused.returncode == 2 and named in refused.stderr and "Traceback" not in refused.stderr, (
        refused.stderr
    )


@pytest.fixture
def eight_gpus(tmp_path):
    """Environment in which nvidia-smi lists eight GPUs; the environments stay those of this machine."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvidia-smi"
    answers = {"-L": "GPU 0: H100 80GB", "--query-gpu=memory.total --format=csv,noheader,nounits": "81559"}
    cases = "".join(
        f'"{asked}") for i in 0 1 2 3 4 5 6 7; do echo "{answer}"; done ;;\n'
        for asked, answer in answers.items()
    )
    tool.write_text(f'#!/usr/bin/env bash\ncase "$*" in\n{cases}esac\n')
    tool.chmod(0o755)
    stamp = Path(faults.vllm_python()).parents[1] / ".rlhf-stamp"
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "vllm_requirements": str(ROOT / stamp.read_text().split()[1]),
        "HF_HUB_OFFLINE": "1",
    }


def test_a_dry_run_of_openrlhf_prints_its_command(built, eight_gpus, tmp_path):
    """On (pretended) GPUs the recipe's backend is OpenRLHF; its environment is not made, only named."""
    here = [
        *("--model_name_or_path", "tiny/built/policy"),
        *("--reward_name_or_path", "tiny/built/reward_model"),
        *("--model_size_b", "null"),
        *("--prompts", "tiny/built/prompts/iter1.jsonl"),
        *("--heldout_prompts", "tiny/built/prompts/heldout.jsonl"),
        *("--ppo.rollout_batch_size", 128),
    ]
    planned = ppo("--run_dir", tmp_path / "run", *here, "--dry_run", config=None, **eight_gpus)
    assert planned.returncode == 0 and "backend openrlhf" in planned.stderr, planned.stderr
    lines = planned.stdout.splitlines()
    assert (
        sum("generation/get_hf2.py" in line for line in lines) == 16
    )  # one process per GPU, before and after
    start = lines.index("# policy 0: train policy 1")
    part = lines[start + 1 : lines.index("# policy 1: sample")]
    assert any(
        line.startswith(f"python ppo/openrlhf/run_openrlhf.py {tmp_path}/run/loop.yaml:ppo ") for line in part
    )
    assert any("ppo_train" in line for line in part)
    command_shown = "\n".join(
        line.removeprefix("# ") for line in part[part.index("# python -m openrlhf.cli.train_ppo_ray \\") :]
    )
    words = shlex.split(command_shown)
    values = dict(zip(words, words[1:], strict=False))
    assert (
        values["--actor.num_gpus_per_node"],
        values["--rollout.batch_size"],
        values["--actor.adam.lr"],
    ) == ("8", "128", "5e-07")
    assert not (tmp_path / "run/iter1/model").exists()


@pytest.mark.long
@pytest.mark.parametrize("seed", [101, 102, 103])
def test_three_of_three_fresh_seeds_learn(seed, tmp_path):
    """Models, prompts, sampling and training all follow the seed; reward and gold end above the start, and KL
    stays bounded.
    """
    place = tmp_path / "built"
    end = ppo(
        "--run_dir",
        tmp_path / "run",
        "--seed",
        seed,
        "--setup_command",
        f"python tiny/build.py --output_dir {place} --seed {seed}",
        "--model_name_or_path",
        place / "policy",
        "--reward_name_or_path",
        place / "reward_model",
        "--prompts",
        *(place / f"prompts/iter{i}.jsonl" for i in (1, 2, 3)),
        "--heldout_prompts",
        place / "prompts/heldout.jsonl",
    )
    assert end.returncode == 0, end.stderr[-3000:]
    print(end.stdout[-1500:])
    found = re.findall(r"^  sampled +(reward|gold) +\S+ +\[(\S+), \S+\]", end.stdout, re.MULTILINE)
    assert [what for what, _ in found] == ["reward", "gold"] and all(float(low) > 0 for _, low in found), (
        end.stdout
    )
    kl = [entry["kl"] for entry in log_of(tmp_path / "run")]
    print(f"KL: largest {max(kl):.2f}, last {kl[-1]:.2f} nats per response")
    assert kl[0] < 0.01 and max(kl) < MOST_KL
