"""Every YAML in configs/ against the script that reads it."""

from pathlib import Path

import pytest
import yaml

from annotate_data import get_rewards
from common.cli import build, parse
from dpo_iteration import run_dpo
from evaluation import divergence
from generation import gen_hf
from loop.run import Run
from loop.settings import LoopSettings
from ppo.run import PPORun, PPOSettings

ROOT = Path(__file__).resolve().parents[1]
LOOPS = sorted((ROOT / "configs").glob("loop_*.yaml"))


@pytest.mark.parametrize("path", LOOPS, ids=lambda p: p.stem)
def test_a_loop_config_is_accepted_by_every_stage(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = Run(build(LoopSettings, yaml.safe_load(path.read_text()), path.name))
    for i in range(1, run.settings.iterations + 1):
        run.asked(i - 1, [*run.heldout_jobs(i - 1), run.responses_job(i)])
        build(gen_hf.Arguments, run.client(i - 1, run.responses_job(i)))
        build(get_rewards.Arguments, run.annotation(run.rewarded_files(i, "annotate")))
        if run.settings.eval_reward_model:
            build(get_rewards.Arguments, run.judging(run.judged_files(i)))
        build(divergence.Arguments, run.divergence(i))
        run_dpo.arguments(run.training(i))
    assert (ROOT / run.settings.accelerate_config).is_file()
    assert f"configs/{path.name}" in path.read_text() or "bash run_loop.sh\n" in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ppo_*.yaml")), ids=lambda p: p.stem)
def test_a_ppo_config_is_accepted_as_it_is_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = parse(PPOSettings, "", [str(path), "--backend", "openrlhf" if "8b" in path.stem else "small"])
    assert settings.problems == []
    PPORun(settings).arguments()


def test_a_key_of_both_backends_takes_the_values_of_either(monkeypatch):
    monkeypatch.chdir(ROOT)
    for key, value in (("lr_scheduler_type", "polynomial"), ("num_episodes", "0.5"), ("value_coef", "null")):
        assert parse(PPOSettings, "", ["configs/ppo_tiny.yaml", f"--ppo.{key}", value]).problems == []
    wrong = parse(
        PPOSettings,
        "",
        ["configs/ppo_tiny.yaml", "--ppo.lr_scheduler_type", "cosin", "--ppo.kl_estimator", "k4"],
    )
    assert [problem.partition(":")[0] for problem in wrong.problems] == [
        "--ppo.lr_scheduler_type",
        "--ppo.kl_estimator",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("training*.yaml")), ids=lambda p: p.stem)
def test_a_training_config_is_accepted_and_differs_from_the_recipe_where_it_says(path):
    recipe, values = (yaml.safe_load(p.read_text()) for p in (ROOT / "configs/training.yaml", path))
    run_dpo.arguments(
        {"model_name_or_path": "a/b", "train_dir": "r.jsonl", "output_dir": "out"} | values, path.name
    )
    if path.stem in ("training_lora", "training_qlora"):
        assert f"dpo_iteration/run_dpo.py ./configs/{path.name}\n" in path.read_text()
        assert {key for key in recipe if values.get(key, recipe[key]) != recipe[key]} == {
            "output_dir",
            "learning_rate",
        }
        assert values["load_in_4bit"] == (path.stem == "training_qlora")
