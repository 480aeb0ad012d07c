"""Every YAML in configs/ against the script that reads it."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from annotate_data import get_rewards
from common.cli import build, parse
from dpo_iteration import checks, online_arguments
from evaluation import divergence
from generation import gen_hf, mixture
from loop.online_plan import OnlinePlan, OnlineSettings
from loop.plan import Plan
from loop.settings import LoopSettings
from ppo.run import PPOPlan, PPOSettings

ROOT = Path(__file__).resolve().parents[1]
LOOPS = [path for kind in ("loop", "paper") for path in sorted((ROOT / "configs").glob(f"{kind}_*.yaml"))]


@pytest.mark.parametrize("path", LOOPS, ids=lambda p: p.stem)
def test_a_loop_config_is_accepted_by_every_stage(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = Plan(build(LoopSettings, yaml.safe_load(path.read_text()), path.name))
    assert len(plan.jobs()) == 3
    resolved = plan.resolved()
    models = {
        "dataset_name_or_path": ["a"],
        "output_dir": ["b"],
        "reward_name_or_path": plan.settings.reward_name_or_path,
    }
    build(get_rewards.Arguments, resolved["annotation"] | models)
    checks.arguments(plan.training_of(1))
    (tmp_path / "loop.yaml").write_text(
        yaml.safe_dump(resolved)
    )  # every section is read by the scripts that are given it
    parse(gen_hf.Arguments, "", [f"{tmp_path}/loop.yaml:heldout", "--tokenizer", "a/b"])
    words = [
        "--model_name_or_path",
        "a/b",
        "--ref_model_name_or_path",
        "c/d",
        "--dataset_name_or_path",
        "x",
        "--output_dir",
        "y",
    ]
    parse(divergence.Arguments, "", [f"{tmp_path}/loop.yaml:heldout", *words])
    assert (ROOT / plan.settings.accelerate_config).is_file()
    assert f"configs/{path.name}" in path.read_text() or "bash run_loop.sh\n" in path.read_text()


def test_the_papers_settings(monkeypatch):
    """As its text has them; the concise model differs by its length penalty alone."""
    monkeypatch.chdir(ROOT)
    read = [
        yaml.safe_load((ROOT / f"configs/paper_llama3_8b{end}.yaml").read_text()) for end in ("", "_concise")
    ]
    paper, concise = (Plan(build(LoopSettings, given)) for given in read)
    parts = mixture.parts_of(paper.jobs()[0])
    assert [(part.K, part.temperature) for part in parts] == [(4, 1.0), (4, 0.7)]
    training, of_concise = paper.training(), concise.training()
    wanted = {
        **{"learning_rate": 5e-7, "lr_scheduler_type": "cosine", "num_train_epochs": 2, "warmup_steps": 0.03},
        **{"beta": 0.1, "label_smoothing": 0.0, "global_batch_size": 128, "choose_type": "max_min"},
    }
    assert {key: training[key] for key in wanted} == wanted and paper.settings.reference == "initial"
    assert training["max_length"] == sum(
        paper.generation()[k] for k in ("max_input_length", "max_new_tokens")
    )
    penalty = {"choose_type": "max_min_p", "length_penalty": 0.001, "length_penalty_unit": "character"}
    assert of_concise == training | penalty
    assert read[1] == read[0] | {key: read[1][key] for key in ("run_dir", "training_args")}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ppo_*.yaml")), ids=lambda p: p.stem)
def test_a_ppo_config_is_accepted_as_it_is_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = parse(PPOSettings, "", [str(path), "--backend", "openrlhf" if "8b" in path.stem else "small"])
    assert settings.problems == []
    PPOPlan(settings).arguments()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("online_*.yaml")), ids=lambda p: p.stem)
def test_an_online_config_is_accepted_and_read_again(path, tmp_path, monkeypatch):
    """By the planner, by the script from the sections of its loop.yaml, and as a config once more."""
    monkeypatch.chdir(ROOT)
    plan = OnlinePlan(build(OnlineSettings, yaml.safe_load(path.read_text()), path.name))
    args, resolved = plan.arguments(), plan.resolved()
    assert plan.until(plan.settings.iterations) == args.rounds
    again = OnlinePlan(build(OnlineSettings, yaml.safe_load(yaml.safe_dump(resolved)))).resolved()
    assert again == resolved and not online_arguments.OWN.keys() & resolved["training_args"].keys()
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(resolved))
    sections = {
        name: f"{tmp_path}/loop.yaml:{name}" for name in ("generation", "annotation", "training_args")
    }
    models = {"reward_name_or_path": plan.settings.reward_name_or_path}
    parts = online_arguments.read_parts(dataclasses.replace(args, **sections, **models))
    assert parts.training.max_steps == args.rounds * args.sync_every
    assert parts.server_dtype == plan.generation()["dtype"]
    assert f"configs/{path.name}" in path.read_text()


def test_a_key_of_both_backends_takes_the_values_of_either(monkeypatch):
    monkeypatch.chdir(ROOT)
    for key, value in (("lr_scheduler_type", "polynomial"), ("num_episodes", "0.5")):
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


@pytest.mark.parametrize(
    ("one", "other", "keys"),
    [
        ("training_sft_control", "training_sft", {"choose_type", "output_dir"}),
        ("training_sft", "training", {"loss_type", "learning_rate", "output_dir"}),
        ("training_sft_tiny", "training_tiny", {"loss_type"}),
    ],
)
def test_trainings_differ_as_they_say(one, other, keys):
    """In what both name: SFT leaves out what it does not look at."""
    one, other = (yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in (one, other))
    assert {key for key in one if key in other and one[key] != other[key]} == keys


TRAININGS = sorted(
    [*(ROOT / "configs").glob("training*.yaml"), *(ROOT / "configs").glob("offline_dpo_*.yaml")]
)


@pytest.mark.parametrize("path", TRAININGS, ids=lambda p: p.stem)
def test_a_training_config_is_accepted_and_differs_from_the_recipe_where_it_says(path):
    recipe, values = (yaml.safe_load(p.read_text()) for p in (ROOT / "configs/training.yaml", path))
    checks.arguments(
        {"model_name_or_path": "a/b", "train_dir": "r.jsonl", "output_dir": "out"} | values, path.name
    )
    if path.stem in ("training_lora", "training_qlora"):
        assert f"dpo_iteration/run_dpo.py ./configs/{path.name}\n" in path.read_text()
        assert {key for key in recipe if values.get(key, recipe[key]) != recipe[key]} == {
            "output_dir",
            "learning_rate",
        }
        assert values["load_in_4bit"] == (path.stem == "training_qlora")
