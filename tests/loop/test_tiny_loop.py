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

import faults
import pytest
from faults import ROOT, records, started_by

pytestmark = pytest.mark.usefixtures("built")


def loop(*arguments, config=faults.CONFIG, **environment):
    """Run the driver; returns the finished process."""
    command = ["bash", "run_loop.sh", *([config] if config else []), *arguments]
    return faults.ended(command, 1500, environment)


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


def contents(path):
    return json.loads(path.read_text(encoding="utf-8"))


def figures(folder):
    """The rows of metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, for a test that changes it."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_the_policy_gets_better(finished):
    folder, output = finished
    found = intervals(output)
    assert found["sampled", "reward"][1] > 0, output
    assert found["sampled", "gold"][1] > 0, output
    for i in range(4):
        metrics = contents(folder / f"iter{i}" / "metrics.json")
        assert metrics["sampled"]["prompts"] >= 256 and metrics["greedy"]["K"] == 1
    steps = [(entry["policy"], entry["step"]) for entry in records(folder / "stages.jsonl")]
    each = ("sample", "annotate", "measure", "train")
    assert steps == [(i, step) for i in range(4) for step in each][:-1]
    assert all(float(row["seconds"]) > 0 for row in figures(folder))


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
        assert pair["chosen_reward"] == max(source["rewards"])
        assert pair["rejected_reward"] == min(source["rewards"])
        assert pair["chosen"][-1]["content"] == source["responses"][pair["chosen_index"]]


def test_iterations_continue_from_each_other_and_share_the_reference(finished):
    folder, _ = finished
    inputs = contents(folder / "iter3" / "model.manifest.json")["inputs"]
    assert inputs["model_name_or_path"]["path"] == str(folder / "iter2" / "model")
    assert inputs["ref_model_name_or_path"]["path"] == "tiny/built/policy"
    for i in (1, 2, 3):
        settings = contents(folder / f"iter{i}" / "generated.manifest.json")["settings"]
        assert settings["iteration"] == i


def test_a_run_leaves_its_kl_and_all_figures(finished):
    """Each iterate's KL to the start, which an own sum over its answers gives too, and the rows of
    metrics.csv.
    """
    folder, output = finished
    kl = [contents(folder / f"iter{i}" / "divergence.json") for i in range(4)]
    assert kl[0]["kl"] == 0.0 and 0 < kl[1]["kl"] - 2 * kl[1]["kl_se"] and kl[1]["kl"] < kl[3]["kl"]
    for one in kl[1:]:
        assert one["exact"] and one["reference"] == "tiny/built/policy"
        assert one["retokenised"] < 0.05 * one["responses"]
    entries = records(folder / "iter2" / "divergence.jsonl")
    means = [(sum(e["logps"]) - sum(e["ref_logps"])) / len(e["logps"]) for e in entries]
    assert sum(means) / len(means) == pytest.approx(kl[2]["kl"], abs=1e-3) and len(entries) == 300
    rows = figures(folder)
    assert [float(row["kl"]) for row in rows] == [one["kl"] for one in kl] and " KL " in output
    assert float(rows[3]["sampled_win_rate"]) > 0.6 and float(rows[2]["train_seconds"]) > 0


def test_a_finished_run_of_before_gets_its_kl_and_no_more(copy):
    """Nothing of it is refused or made anew, and pruned weights or `divergence: false` leave nothing to
    do.
    """
    for path in copy.glob("iter*/divergence*"):
        path.unlink()
    planned = loop("--run_dir", copy, "--dry_run")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert not re.search("get_hf2|get_rewards|run_dpo", planned.stdout)
    assert planned.stdout.count("evaluation/divergence.py") == 4
    assert "# policy" not in loop("--run_dir", copy, "--divergence", "false", "--dry_run").stdout
    shutil.rmtree(copy / "iter1/model")
    (copy / "iter1/model.pruned").touch()
    assert loop("--run_dir", copy, "--dry_run").stdout.count("evaluation/divergence.py") == 3


def test_a_second_reward_model_may_come_later(copy, tmp_path):
    """A finished run is then judged and measured anew."""
    judge = shutil.copytree(ROOT / "tiny/built/reward_model", tmp_path / "judge")
    planned = loop("--run_dir", copy, "--eval_reward_model", judge, "--dry_run")
    assert planned.stdout.count("loop.yaml:eval_annotation") == 4, planned.stdout + planned.stderr
    assert "get_hf2" not in planned.stdout
    only = "--stage 3.4 --stop_stage 3.4".split()
    ran = loop("--run_dir", copy, "--eval_reward_model", judge, *only)
    assert ran.returncode == 0, ran.stderr
    metrics = contents(copy / "iter3/metrics.json")  # it is a copy
    reward = pytest.approx(metrics["sampled"]["reward"], abs=1e-4)
    assert metrics["judge"]["sampled"]["reward"] == reward


def test_a_second_start_skips_what_is_finished(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")}
    again = loop("--run_dir", folder)
    assert again.returncode == 0 and "policy 0" not in again.stdout, again.stdout
    assert f"every stage of {folder} is done, nothing is left to do" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")} == before
    assert intervals(again.stdout)


def test_a_changed_setting_is_refused_by_name(finished):
    folder, _ = finished
    settings = (folder / "loop.yaml").read_text()
    refused = loop("--run_dir", folder, "--generation.temperature", "0.7")
    assert refused.returncode == 2 and "temperature was 1.0 and is now 0.7" in refused.stderr, refused.stderr
    assert (folder / "loop.yaml").read_text() == settings


def test_weights_are_pruned_behind_the_last_finished_iteration_only(copy):
    """keep_iterates deletes what is no longer read, never what an unfinished iteration starts from."""
    settings = "--run_dir", copy, "--keep_iterates", 1
    shutil.rmtree(copy / "iter3")
    early = loop(*settings, "--stage", "3.1", "--stop_stage", "3.1", "--dry_run")
    assert early.returncode == 0 and (copy / "iter2" / "model").exists(), early.stderr
    loop(*settings, "--stage", "2.4", "--stop_stage", "2.4")
    assert not (copy / "iter1" / "model").exists() and (copy / "iter2" / "model").exists()
    again = loop(*settings, "--dry_run")
    assert "# policy 2: train policy 3" in again.stdout, again.stdout + again.stderr
    assert "# policy 1" not in again.stdout


def test_more_iterations_can_be_given(finished):
    folder, _ = finished
    planned = loop("--run_dir", folder, "--iterations", 4, "--dry_run")
    assert planned.returncode == 0, planned.stderr
    assert "# policy 3: train policy 4" in planned.stdout and "# policy 2" not in planned.stdout
    assert "run_dpo.py" in planned.stdout and f"--output_dir {folder}/iter4/model" in planned.stdout


def test_a_printed_command_runs_by_hand(copy, tmp_path):
    """Paste what a dry run prints for the metrics of a policy."""
    (copy / "iter3" / "metrics.json").rename(tmp_path / "metrics.json")
    planned = loop("--run_dir", copy, "--dry_run")
    assert "evaluation/metrics.py" in planned.stdout, planned.stdout + planned.stderr
    command = ["bash", "-c", f"set -e\n{planned.stdout}"]
    pasted = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert pasted.returncode == 0, pasted.stderr
    old, new = (contents(place / "metrics.json") for place in (tmp_path, copy / "iter3"))
    assert old["sampled"] == new["sampled"]


def test_one_loop_at_a_time(finished):
    folder, _ = finished
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = loop("--run_dir", folder)
    assert refused.returncode == 2 and "another run is at work" in refused.stderr


def test_a_failing_stage_shows_its_log_and_how_to_continue(copy):
    failed = loop("--run_dir", copy, "--iterations", 4, "--stage", "4.train", "--stop_stage", "4.3")
    assert failed.returncode == 1
    assert "error: no such file of rewarded answers" in failed.stderr, failed.stderr
    assert f"log: {copy}/iter4/logs/train.log" in failed.stderr
    assert "to continue: bash run_loop.sh" in failed.stderr


def test_the_saved_model_is_whole(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    made, start = finished[0] / "iter3" / "model", ROOT / "tiny/built/policy"
    _, info = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    eos = [GenerationConfig.from_pretrained(folder).eos_token_id for folder in (made, start)]
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (made, start)]
    assert eos[0] == eos[1] and templates[0] == templates[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_loop_leaves_nothing_running_and_continues(finished, tmp_path, how):
    """Ctrl-C ends what was started; after kill -9 of the driver the next start does. Then the run goes on."""
    folder, said = tmp_path / "run", tmp_path / "stderr"
    with open(said, "w") as errors:  # a pipe would be waited for until what was left behind has closed it
        driver = subprocess.Popen(
            faults.loop_command(folder, "--stop_stage", "0.4"),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    log = folder / "iter0" / "logs" / "sample.0.log"
    faults.wait_for(lambda: log.exists() and started_by(folder), 120)
    os.kill(driver.pid, how)
    driver.wait(timeout=60)
    killed = how == signal.SIGKILL
    assert bool(started_by(folder)) == killed
    if not killed:
        assert driver.returncode == 128 + how and "to continue: bash run_loop.sh" in said.read_text()
    planned = loop("--run_dir", folder, "--check")  # looks only, and stops nothing
    assert planned.returncode == 0 and bool(started_by(folder)) == killed, planned.stderr
    # refused, but by then the folder is held
    started = loop("--run_dir", folder, "--gold_function", "nope.py:x")
    assert started.returncode == 2 and "nope.py" in started.stderr, started.stderr
    assert not started_by(folder)


def test_problems_are_found_before_anything_runs(tmp_path):
    prompts, heldout = tmp_path / "overlap.jsonl", ROOT / "tiny/built/prompts/heldout.jsonl"
    prompts.write_bytes(heldout.read_bytes().splitlines(keepends=True)[0])
    wrong = (
        "--generation.temprature 1 --accelerate_config configs/zero22.yaml --gold_function nope.py:x".split()
    )
    wrong += ["--prompts", prompts, "--reward_name_or_path", "tiny/built/reward_modle"]
    found = loop("--run_dir", tmp_path / "run", "--check", *wrong)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    for problem in ("1 prompts of", "reward_modle", "temprature", "zero22.yaml", "nope.py"):
        assert problem in found.stderr, found.stderr
    assert not (tmp_path / "run" / "loop.yaml").exists()


def test_without_a_gpu_the_recipe_says_so_at_once():
    refused = loop(config=None, CUDA_VISIBLE_DEVICES="")
    assert refused.returncode == 2 and "bash run_loop.sh configs/loop_tiny.yaml" in refused.stderr


def fresh(tmp_path, seed, *more, reward_model="reward_model", build=(), config=faults.CONFIG):
    """A run of a seed whose models and prompts are built from nothing by that seed too; what it said."""
    built = tmp_path / "built"
    setup = ["python", "tiny/build.py", "--output_dir", built, "--seed", seed, *build]
    models = ["--model_name_or_path", built / "policy", "--reward_name_or_path", built / reward_model]
    prompts = ["--prompts", *(built / f"prompts/iter{i}.jsonl" for i in (1, 2, 3))]
    heldout = ["--heldout_prompts", built / "prompts/heldout.jsonl"]
    settings = ["--seed", seed, "--setup_command", " ".join(map(str, setup)), *models, *prompts, *heldout]
    process = loop("--run_dir", tmp_path / "run", *settings, *more, config=config)
    assert process.returncode == 0, process.stderr[-3000:]
    print(process.stdout[-1500:])
    return process.stdout


@pytest.mark.long
@pytest.mark.parametrize("seed", [101, 102, 103, 104, 105])
def test_five_of_five_fresh_seeds_learn(seed, tmp_path):
    """Models, prompts, sampling and training all follow the seed; reward rises at every iteration, gold from
    start to end.
    """
    output = fresh(tmp_path, seed)
    rewards = [float(row["sampled_reward"]) for row in figures(tmp_path / "run")]
    assert rewards == sorted(rewards) and intervals(output)["sampled", "gold"][1] > 0, output


@pytest.mark.long
@pytest.mark.parametrize("seed", [201, 202])
def test_the_overoptimised_run_is_just_that(seed, tmp_path):
    """Reward rises at every iteration; gold falls from its best iterate to the last, beyond chance."""
    fresh(
        tmp_path,
        seed,
        *("--eval_reward_model", tmp_path / "built/reward_model"),
        reward_model="weak_reward_model",
        build=("--weak_reward_model", "true"),
        config="configs/loop_tiny_overoptimised.yaml",
    )
    rows = figures(tmp_path / "run")
    rewards, golds = ([float(row[f"sampled_{name}"]) for row in rows] for name in ("reward", "gold"))
    assert rewards == sorted(rewards)
    assert golds[-1] < max(golds) - 4 * float(rows[-1]["sampled_gold_se"]), golds
    best = golds.index(max(golds))
    assert 1 <= best < 3 and (tmp_path / "run/best").resolve() == tmp_path / f"run/iter{best}/model"
