"""The real thing: `bash run_loop.sh configs/loop_tiny.yaml` on real vLLM, TRL, accelerate and DeepSpeed, and
what may go wrong.

One run serves most tests (about six minutes with models built from nothing). Five fresh seeds run under
--all.
"""

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("built")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/loop_tiny.yaml"


def loop(*arguments, timeout=1500, config=CONFIG, **environment):
    """Run the driver; returns the finished process."""
    command = ["bash", "run_loop.sh", *([config] if config else []), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder and output of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    process = loop("--run_dir", folder)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return folder, process.stdout


def intervals(text):
    """{(kind, quantity): (difference, low, high)} of the lines under the table."""
    found = re.findall(
        r"^ *(sampled|greedy) +(reward|gold) +([+-][\d.]+) +\[([+-][\d.]+), ([+-][\d.]+)\]",
        text,
        re.MULTILINE,
    )
    return {(kind, quantity): tuple(map(float, numbers)) for kind, quantity, *numbers in found}


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_the_policy_gets_better(finished):
    folder, output = finished
    found = intervals(output)
    assert found["sampled", "reward"][1] > 0, output
    assert found["sampled", "gold"][1] > 0, output
    for i in range(4):
        metrics = json.loads((folder / f"iter{i}" / "metrics.json").read_text())
        assert metrics["sampled"]["prompts"] >= 256 and metrics["greedy"]["K"] == 1
    steps = [(entry["policy"], entry["step"]) for entry in records(folder / "stages.jsonl")]
    each = ("sample", "annotate", "measure", "train")
    assert steps == [(i, step) for i in range(4) for step in each][:-1]
    with open(folder / "metrics.csv", newline="") as file:
        assert all(float(row["seconds"]) > 0 for row in csv.DictReader(file))


def test_every_record_is_traced_through_the_stages(finished):
    folder, _ = finished
    prompts = (ROOT / "tiny/built/prompts/iter2.jsonl").read_text(encoding="utf-8").count("\n")
    rewarded = records(folder / "iter2" / "rewarded.jsonl")
    assert len(rewarded) == prompts == len({r["id"] for r in rewarded})
    assert all(len(r["responses"]) == len(r["rewards"]) == 8 for r in rewarded)
    by_id = {r["id"]: r for r in rewarded}
    pairs = records(folder / "iter2" / "pairs.jsonl")
    skipped = folder / "iter2" / "pairs.skipped.jsonl"
    assert len(pairs) + (len(records(skipped)) if skipped.exists() else 0) >= prompts
    for pair in pairs:
        source = by_id[pair["id"]]
        assert pair["chosen_reward"] == max(source["rewards"]) and pair["rejected_reward"] == min(
            source["rewards"]
        )
        assert pair["chosen"][-1]["content"] == source["responses"][pair["chosen_index"]]


def test_iterations_continue_from_each_other_and_share_the_reference(finished):
    folder, _ = finished
    manifest = json.loads((folder / "iter3" / "model.manifest.json").read_text())
    assert manifest["inputs"]["model_name_or_path"]["path"] == str(folder / "iter2" / "model")
    assert manifest["inputs"]["ref_model_name_or_path"]["path"] == "tiny/built/policy"
    seeds = [
        json.loads((folder / f"iter{i}" / "generated.manifest.json").read_text())["settings"]["iteration"]
        for i in (1, 2, 3)
    ]
    assert seeds == [1, 2, 3]


def test_a_run_leaves_its_kl_and_all_figures(finished):
    """Each iterate's KL to the start, which an own sum over its answers gives too, and the rows of
    metrics.csv.
    """
    folder, output = finished
    kl = [json.loads((folder / f"iter{i}" / "divergence.json").read_text()) for i in range(4)]
    assert kl[0]["kl"] == 0.0 and 0 < kl[1]["kl"] - 2 * kl[1]["kl_se"] and kl[1]["kl"] < kl[3]["kl"]
    assert all(
        one["exact"]
        and one["reference"] == "tiny/built/policy"
        and one["retokenised"] < 0.05 * one["responses"]
        for one in kl[1:]
    )
    entries = records(folder / "iter2" / "divergence.jsonl")
    means = [
        sum(a - b for a, b in zip(e["logps"], e["ref_logps"], strict=True)) / len(e["logps"]) for e in entries
    ]
    assert sum(means) / len(means) == pytest.approx(kl[2]["kl"], abs=1e-3) and len(entries) == 300
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["iterate"], float(row["kl"])) for row in rows] == [
        (str(i), one["kl"]) for i, one in enumerate(kl)
    ]
    assert (
        float(rows[3]["sampled_win_rate"]) > 0.6 and float(rows[2]["train_seconds"]) > 0 and " KL " in output
    )


def test_a_finished_run_of_before_gets_its_kl_and_no_more(finished, tmp_path):
    """Nothing of it is refused or made anew, and pruned weights or `divergence: false` leave nothing to
    do.
    """
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    for path in folder.glob("iter*/divergence*"):
        path.unlink()
    planned = loop("--run_dir", folder, "--dry_run")
    assert planned.returncode == 0 and planned.stdout.count("evaluation/divergence.py") == 4, (
        planned.stdout + planned.stderr
    )
    assert (
        "get_hf2" not in planned.stdout
        and "get_rewards" not in planned.stdout
        and "run_dpo" not in planned.stdout
    )
    assert "# policy" not in loop("--run_dir", folder, "--divergence", "false", "--dry_run").stdout
    shutil.rmtree(folder / "iter1/model")
    (folder / "iter1/model.pruned").touch()
    assert loop("--run_dir", folder, "--dry_run").stdout.count("evaluation/divergence.py") == 3


def test_a_second_reward_model_may_come_later(finished, tmp_path):
    """A finished run is then judged and measured anew; the reward model of training itself is refused."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    other = tmp_path / "judge"
    shutil.copytree(ROOT / "tiny/built/reward_model", other)
    planned = loop("--run_dir", folder, "--eval_reward_model", other, "--dry_run")
    assert planned.stdout.count("loop.yaml:eval_annotation") == 4 and "get_hf2" not in planned.stdout, (
        planned.stdout + planned.stderr
    )
    ran = loop("--run_dir", folder, "--eval_reward_model", other, "--stage", "3.4", "--stop_stage", "3.4")
    metrics = json.loads((folder / "iter3/metrics.json").read_text())
    assert ran.returncode == 0 and metrics["judge"]["sampled"]["reward"] == pytest.approx(
        metrics["sampled"]["reward"], abs=1e-4
    ), ran.stderr  # it is a copy
    same = loop("--run_dir", folder, "--eval_reward_model", "tiny/built/reward_model", "--dry_run")
    assert same.returncode == 2 and "is what training is rewarded by" in same.stderr


def test_a_second_start_skips_what_is_finished(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")}
    again = loop("--run_dir", folder)
    assert again.returncode == 0 and "policy 0" not in again.stdout, again.stdout
    assert f"every stage of {folder} is done, nothing is left to do" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")} == before
    assert intervals(again.stdout)


@pytest.mark.parametrize(
    "change, named",
    [
        (("--generation.temperature", "0.7"), "temperature was 1.0 and is now 0.7"),
        (("--training_args.beta", "0.3"), "beta was"),
        (
            ("--reward_name_or_path", "tiny/built/policy"),
            "reward_name_or_path was ['tiny/built/reward_model'] and is now",
        ),
        (("--seed", "7"), "seed was 0 and is now 7"),
    ],
)
def test_a_changed_setting_is_refused_by_name(finished, change, named):
    folder, _ = finished
    settings = (folder / "loop.yaml").read_text()
    refused = loop("--run_dir", folder, *change)
    assert refused.returncode == 2 and named in refused.stderr, refused.stderr
    assert (folder / "loop.yaml").read_text() == settings


def test_weights_are_pruned_behind_the_last_finished_iteration_only(finished, tmp_path):
    """keep_iterates deletes what is no longer read, never what an unfinished iteration starts from."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    settings = [*("--run_dir", folder), *("--keep_iterates", 1)]
    shutil.rmtree(folder / "iter3")
    early = loop(*settings, "--stage", "3.1", "--stop_stage", "3.1", "--dry_run")
    assert early.returncode == 0 and (folder / "iter2" / "model").exists(), early.stderr
    loop(*settings, "--stage", "2.4", "--stop_stage", "2.4")
    assert not (folder / "iter1" / "model").exists() and (folder / "iter2" / "model").exists()
    again = loop(*settings, "--dry_run")
    assert "# policy 2: train policy 3" in again.stdout and "# policy 1" not in again.stdout, (
        again.stdout + again.stderr
    )


def test_more_iterations_can_be_given(finished):
    folder, _ = finished
    planned = loop("--run_dir", folder, "--iterations", 4, "--dry_run")
    assert planned.returncode == 0, planned.stderr
    assert "# policy 3: train policy 4" in planned.stdout and "# policy 2" not in planned.stdout
    assert "run_dpo.py" in planned.stdout and f"--output_dir {folder}/iter4/model" in planned.stdout
    loop("--run_dir", folder)  # back to three


def test_a_printed_command_runs_by_hand(finished, tmp_path):
    """Paste what a dry run prints for the metrics of a new run's start."""
    folder, _ = finished
    (folder / "iter3" / "metrics.json").rename(tmp_path / "metrics.json")
    planned = loop("--run_dir", folder, "--dry_run")
    assert "evaluation/metrics.py" in planned.stdout, planned.stdout + planned.stderr
    pasted = subprocess.run(
        ["bash", "-c", f"set -e\n{planned.stdout}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert pasted.returncode == 0, pasted.stderr
    old, new = (json.loads((place / "metrics.json").read_text()) for place in (tmp_path, folder / "iter3"))
    assert old["sampled"] == new["sampled"]


def test_one_loop_at_a_time(finished):
    folder, _ = finished
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = loop("--run_dir", folder)
    assert refused.returncode == 2 and "another run is at work" in refused.stderr


def test_a_failing_stage_shows_its_log_and_how_to_continue(finished):
    folder, _ = finished
    failed = loop("--run_dir", folder, "--iterations", 4, "--stage", "4.train", "--stop_stage", "4.3")
    assert failed.returncode == 1
    assert "error: no such rewarded file" in failed.stderr, failed.stderr
    assert (
        f"log: {folder}/iter4/logs/train.log" in failed.stderr
        and "to continue: bash run_loop.sh" in failed.stderr
    )
    loop("--run_dir", folder)


def test_the_saved_model_is_whole(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder, _ = finished
    model, info = AutoModelForCausalLM.from_pretrained(folder / "iter3" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    start = GenerationConfig.from_pretrained(ROOT / "tiny/built/policy")
    assert GenerationConfig.from_pretrained(folder / "iter3" / "model").eos_token_id == start.eos_token_id
    assert (
        AutoTokenizer.from_pretrained(folder / "iter3" / "model").chat_template
        == AutoTokenizer.from_pretrained(ROOT / "tiny/built/policy").chat_template
    )


def marked(folder):
    """Processes that a run of this folder has started."""
    mark = f"RLHF_RUN={folder.resolve()}".encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_loop_leaves_nothing_running_and_continues(finished, tmp_path, how):
    """Ctrl-C ends what was started; after kill -9 of the driver the next start does. Then the run goes on."""
    folder = tmp_path / "run"
    command = ["bash", "run_loop.sh", CONFIG, "--run_dir", str(folder), "--stop_stage", "0.4"]
    said = tmp_path / "stderr"
    with open(said, "w") as errors:  # a pipe would be waited for until what was left behind has closed it
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
    deadline = time.time() + 120
    log = folder / "iter0" / "logs" / "sample.0.log"
    while not (log.exists() and marked(folder)) and time.time() < deadline:
        time.sleep(0.2)
    assert marked(folder)
    os.kill(driver.pid, how)
    driver.wait(timeout=60)
    if how == signal.SIGKILL:
        assert marked(folder)
    else:
        assert (
            driver.returncode == 128 + how
            and "to continue: bash run_loop.sh" in said.read_text()
            and not marked(folder)
        )
    planned = loop("--run_dir", folder, "--check")  # looks only, and stops nothing
    assert planned.returncode == 0 and bool(marked(folder)) == (how == signal.SIGKILL), planned.stderr
    started = loop(
        "--run_dir", folder, "--gold_function", "nope.py:x"
    )  # refused, but by then the folder is held
    assert started.returncode == 2 and "nope.py" in started.stderr and not marked(folder), started.stderr


def test_problems_are_found_before_anything_runs(tmp_path):
    prompts = tmp_path / "overlap.jsonl"
    prompts.write_text(
        (ROOT / "tiny/built/prompts/heldout.jsonl").read_text(encoding="utf-8").split("\n")[0] + "\n",
        encoding="utf-8",
    )
    found = loop(
        "--run_dir",
        tmp_path / "run",
        "--check",
        "--prompts",
        prompts,
        "--reward_name_or_path",
        "tiny/built/reward_modle",
        "--generation.temprature",
        "1",
        "--accelerate_config",
        "configs/zero22.yaml",
        "--gold_function",
        "nope.py:x",
    )
    assert found.returncode == 2
    for problem in ("1 prompts of", "reward_modle", "temprature", "zero22.yaml", "nope.py"):
        assert problem in found.stderr, found.stderr
    assert not (tmp_path / "run" / "loop.yaml").exists() and "Traceback" not in found.stderr


def test_without_a_gpu_the_recipe_says_so_at_once():
    refused = loop(config=None, CUDA_VISIBLE_DEVICES="")
    assert refused.returncode == 2 and "bash run_loop.sh configs/loop_tiny.yaml" in refused.stderr


@pytest.mark.parametrize("arguments, named", [
    (("--iteratons", "2"), "did you mean '--iterations'"),
    (("--K", "4"), "unknown argument --K, did you mean --generation.K"),
    (("--beta", "0.2"), "did you mean --training_args.beta?"),
    (("--stage", "7"), "stage 7: ITERATION.STAGE was expected"),
    (("configs/loop_tny.yaml",), "loop_tny.yaml"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(arguments, named):
    refused = loop(*arguments)
    assert refused.returncode == 2 and named in refused.stderr and "Traceback" not in refused.stderr, (
        refused.stderr
    )


@pytest.mark.long
@pytest.mark.parametrize("seed", [101, 102, 103, 104, 105])
def test_five_of_five_fresh_seeds_learn(seed, tmp_path):
    """Models, prompts, sampling and training all follow the seed; reward rises at every iteration, gold from
    start to end.
    """
    built = tmp_path / "built"
    process = loop(
        "--run_dir",
        tmp_path / "run",
        "--seed",
        seed,
        "--setup_command",
        f"python tiny/build.py --output_dir {built} --seed {seed}",
        "--model_name_or_path",
        built / "policy",
        "--reward_name_or_path",
        built / "reward_model",
        "--prompts",
        *(built / f"prompts/iter{i}.jsonl" for i in (1, 2, 3)),
        "--heldout_prompts",
        built / "prompts/heldout.jsonl",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    rewards = [
        json.loads((tmp_path / "run" / f"iter{i}" / "metrics.json").read_text())["sampled"]["reward"]
        for i in range(4)
    ]
    print(process.stdout[-1500:])
    assert rewards == sorted(rewards) and intervals(process.stdout)["sampled", "gold"][1] > 0, process.stdout


@pytest.mark.long
@pytest.mark.parametrize("seed", [201, 202])
def test_the_overoptimised_run_is_just_that(seed, tmp_path):
    """Reward rises at every iteration; gold falls from its best iterate to the last, beyond chance."""
    built = tmp_path / "built"
    process = loop(
        "--run_dir",
        tmp_path / "run",
        "--seed",
        seed,
        "--model_name_or_path",
        built / "policy",
        "--reward_name_or_path",
        built / "weak_reward_model",
        "--setup_command",
        f"python tiny/build.py --output_dir {built} --seed {seed} --weak_reward_model true",
        "--eval_reward_model",
        built / "reward_model",
        "--prompts",
        *(built / f"prompts/iter{i}.jsonl" for i in (1, 2, 3)),
        "--heldout_prompts",
        built / "prompts/heldout.jsonl",
        config="configs/loop_tiny_overoptimised.yaml",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    print(process.stdout[-1500:])
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rewards, golds = ([float(row[f"sampled_{name}"]) for row in rows] for name in ("reward", "gold"))
    assert rewards == sorted(rewards)
    assert golds[-1] < max(golds) - 4 * float(rows[-1]["sampled_gold_se"]), golds
