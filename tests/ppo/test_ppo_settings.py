"""The settings of a PPO run: what each backend gets, and what is refused."""

import dataclasses
import datetime
import json
import sys
import types
from pathlib import Path

import pytest
import yaml

from common.cli import UserError, build
from loop import machines
from loop import plan as loop_plan
from ppo import checks, train_ppo
from ppo import run as ppo_run
from ppo.run import PPOPlan, PPOSettings

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in a YAML are from the project's folder; no GPU, whatever the machine has."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(machines, "visible_gpus", lambda: [])


@pytest.fixture
def settings(tmp_path):
    """Settings of a run on folders that look like models, prompts that do not overlap, and no weights."""
    for name, architecture in (("policy", "LlamaForCausalLM"), ("reward", "LlamaForSequenceClassification")):
        (tmp_path / name).mkdir()
        config = {"model_type": "llama", "architectures": [architecture], "num_labels": 1}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    for name, count in (("one", 13), ("two", 12), ("heldout", 2)):
        lines = [json.dumps({"prompt": f"{name} {i}"}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return {
        "run_dir": str(tmp_path / "run"),
        "model_name_or_path": str(tmp_path / "policy"),
        "reward_name_or_path": [str(tmp_path / "reward")],
        "prompts": [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")],
        "heldout_prompts": str(tmp_path / "heldout.jsonl"),
        "without_gpu": True,
        "backend": "small",
        "ppo": {"batch_size": 8, "rollout_batch_size": 8, "bf16": False},
        "generation": {"max_input_length": 50, "max_new_tokens": 20, "temperature": 0.9, "dtype": "float32"},
    }


def made(values):
    return PPOPlan(build(PPOSettings, values))


def test_the_tiny_run_is_comparable_with_the_tiny_loop():
    loop, ppo = (yaml.safe_load((ROOT / f"configs/{name}_tiny.yaml").read_text()) for name in ("loop", "ppo"))
    models = "setup_command model_name_or_path reward_name_or_path gold_function"
    for key in f"{models} prompts heldout_prompts generation seed".split():
        assert loop[key] == ppo[key]


def test_training_gets_what_evaluation_says_unless_ppo_says_otherwise(settings):
    settings["generation"] |= {"dataset_key": "prompt", "K": 4, "top_p": 0.8}
    settings["annotation"] = {"reward_function": "my.py:score", "reward_weights": [1, 2], "batch_tokens": 64}
    settings["ppo"] |= {"top_p": 1.0, "kl_coef": 0.3}
    found = made(settings).training_of(1)
    expected = {key: settings[key] for key in ("model_name_or_path", "reward_name_or_path")} | settings["ppo"]
    expected |= {"dataset_name_or_path": settings["prompts"], "seed": 42, "dataset_key": "prompt"}
    expected |= {"output_dir": f"{settings['run_dir']}/iter1/model", "date": str(datetime.date.today())}
    expected |= {"max_input_length": 50, "max_new_tokens": 20, "temperature": 0.9}
    expected |= {"reward_function": "my.py:score", "reward_weights": [1, 2]}
    assert expected.items() <= found.items()
    assert found.keys() == train_ppo.Arguments.__dataclass_fields__.keys()  # all of them, resolved


def test_each_backend_gets_what_it_knows(settings):
    """A reward model's own template and length, and placement, have keys in one backend only."""
    settings["annotation"] = {"chat_template": "my.jinja", "max_length": 300, "template_kwargs": {}}
    settings["generation"]["template_kwargs"] = {"enable_thinking": False}
    settings["openrlhf"] = {"num_gpus": 4}
    del settings["ppo"]["bf16"]  # OpenRLHF has no such choice
    small, other = made(settings), made(settings | {"backend": "openrlhf"})
    both = {"template_kwargs": {"enable_thinking": False}}
    mine = {"reward_chat_template": "my.jinja", "reward_max_length": 300, "num_gpus": 4}
    assert both.items() <= small.training_of(1).items() and not mine.keys() & small.training_of(1)
    assert (both | mine).items() <= other.training_of(1).items()
    assert list(small.left_out()) == [("annotation", "chat_template")] and list(other.left_out()) == []


def test_which_backend(settings, monkeypatch):
    for backend, gpus, taken in (
        ("auto", 0, "small"),
        ("auto", 2, "openrlhf"),
        ("small", 2, "small"),
        ("openrlhf", 0, "openrlhf"),
    ):
        monkeypatch.setattr(machines, "visible_gpus", lambda gpus=gpus: [str(i) for i in range(gpus)])
        assert made(settings | {"backend": backend}).backend == taken


def test_the_stages(settings):
    plan = made(settings)
    assert plan.stages(None, None) == ["0.evaluate", "1.train", "1.evaluate"]
    assert plan.stages("1.3", "train") == ["1.train"] == plan.stages("1.train", "1.3")
    assert made(settings | {"heldout_prompts": None}).stages(None, None) == ["1.train"]
    with pytest.raises(UserError, match="stage 2.train: one of 0.evaluate, 1.train and 1.evaluate was"):
        plan.stages("2.train", None)
    with pytest.raises(UserError, match="--stage 1.evaluate comes behind --stop_stage 1.train"):
        plan.stages("1.evaluate", "1.train")


def check(values):
    ppo_run.check(made(values), left=True)


def test_what_is_right_passes_and_says_so(settings, capsys):
    check(settings)
    assert "1 training process, CPU, backend small" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, named", [
    ({"ppo": {"kl_coeff": 0.1}}, "unknown key 'kl_coeff' in ppo, did you mean 'kl_coef'?"),
    ({"ppo": {"output_dir": "x"}}, "output_dir is the run's own; give run_dir"),
    ({"ppo": {"missing_eos_penalty": -1.0}}, "ppo: missing_eos_penalty -1.0 must be 0 or above"),
    ({"ppo": {"missing_eos_penalty": -1.0}, "backend": "openrlhf"}, "missing_eos_penalty -1.0 must be"),
    ({"ppo": {"rollout_batch_size": 32}, "backend": "openrlhf"}, "25 prompts are fewer than a rollout takes"),
    ({"ppo": {"generation_batch_size": 8}, "backend": "openrlhf"}, "for backend small alone"),
    ({"ppo": {"reward_url": "x"}}, "ppo: reward_url for backend openrlhf alone; leave that out"),
    ({"ppo": {"batch_size": 8, "micro_batch_size": 4, "rollout_batch_size": 8}, "num_processes": 3},
     "batch_size 8 does not divide by 3 processes"),
    ({"heldout": {"top_k": 5}}, "generation: PPO (backend small) would train without top_k"),
    ({"generation": {"mixture": [{}, {"model": "start"}]}}, "would train without mixture"),
    ({"generation": {"temperature": [1.0, 0.7]}}, "generation.temperature [1.0, 0.7]: PPO samples at one"),
    ({"reward_name_or_path": None}, "names no reward model"),
    ({"model_name_or_path": "./nowhere"}, "no such folder"),
])  # fmt: skip
def test_wrong_set_ups_are_named(settings, capsys, wrong, named):
    with pytest.raises(UserError) as refused:
        check(settings | wrong)
    assert named in capsys.readouterr().err + str(refused.value)


def test_a_folder_of_the_other_kind_of_run_is_called_that(settings, tmp_path):
    """By both drivers, before anything is held, built or written."""
    dpo = {key: settings[key] for key in ("model_name_or_path", "prompts", "heldout_prompts", "without_gpu")}
    kinds = {
        "DPO (run_loop.sh)": (loop_plan.Plan, dpo | {"run_dir": str(tmp_path / "dpo")}),
        "PPO (run_ppo.sh)": (PPOPlan, settings),
    }
    for kind, values in kinds.values():
        Path(values["run_dir"]).mkdir()
        resolved = dataclasses.asdict(build(kind.Settings, values))
        Path(values["run_dir"], "loop.yaml").write_text(yaml.safe_dump(resolved))
    for wanted, held in (kinds, reversed(kinds)):
        (kind, values), (_, others) = kinds[wanted], kinds[held]
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values | {"run_dir": others["run_dir"]}))
        with pytest.raises(UserError, match="give another --run_dir") as refused:
            loop_plan.read(kind, [str(tmp_path / "mine.yaml")], planning=True)
        assert f"holds a run of {held}, this would be one of {wanted}" in str(refused.value)
        loop_plan.read(kind, [str(tmp_path / "mine.yaml"), "--run_dir", values["run_dir"]], planning=True)


def test_what_is_not_there_is_named_with_what_may_be_meant(settings, capsys, tmp_path):
    """A set that has another part already is not offered."""
    sets = {"heldout_prompts": f"{tmp_path}/nothing.jsonl", "prompts": [f"{tmp_path}/tow.jsonl"]}
    sets["prompts"] += settings["prompts"][:1]
    there = f"{tmp_path}/heldout.jsonl, {tmp_path}/two.jsonl"
    column = {"generation": settings["generation"] | {"dataset_key": "promt"}}
    for wrong, problems in (
        (sets, [f"{tmp_path}/nothing.jsonl; there are {there}", f"tow.jsonl; there is {tmp_path}/two.jsonl"]),
        (column, ["has no promt, did you mean 'prompt'?", "--generation.dataset_key"]),
    ):
        with pytest.raises(UserError) as refused:
            check(settings | wrong)
        told = capsys.readouterr().err + str(refused.value)
        assert all(problem in told for problem in problems), told


def test_all_that_is_wrong_is_told_at_once_with_sizes_that_fit(settings, capsys, tmp_path):
    """The sizes of a small set: each was refused after the other had been mended."""
    sizes = {"rollout_batch_size": 128, "batch_size": 128, "micro_batch_size": 8}
    wrong = sizes | {"clip": 0, "top_p": 2, "report_to": ["wanbd"]}
    template, heldout = tmp_path / "policy" / "chat_template.jinja", (tmp_path / "heldout.jsonl").read_text()
    template.unlink()
    (tmp_path / "heldout.jsonl").write_text((tmp_path / "one.jsonl").read_text())
    with pytest.raises(UserError) as refused:
        check(settings | {"ppo": wrong, "num_processes": 1})
    told = capsys.readouterr().err + str(refused.value)
    for problem in (
        "has no chat template",
        "3 prompts of",
        "clip 0.0 must be above 0",
        "top_p 2.0",
        "report_to wanbd",
        "25 prompts are fewer than a rollout takes: lower rollout_batch_size 128, or give more; these fit "
        "together: rollout_batch_size 24, batch_size 24, micro_batch_size 8",
    ):
        assert problem in told
    template.write_text(TEMPLATE)
    (tmp_path / "heldout.jsonl").write_text(heldout)
    offered = {"rollout_batch_size": 24, "batch_size": 24, "micro_batch_size": 8}
    check(settings | {"ppo": offered, "num_processes": 1})


@pytest.mark.parametrize(
    "sizes, world, prompts",
    [
        ((128, 1, 128, 8), 1, 40),
        ((128, 4, 128, 8), 3, 50),
        ((30, 1, 128, 8), 2, None),
        ((7, 1, 128, 8), 1, 7),
        ((1024, 1, 128, 8), 8, 11),
        ((5, 1, 8, 8), 8, 5),
    ],
)
def test_sizes_that_are_offered_fit(sizes, world, prompts):
    keys = ("rollout_batch_size", "samples_per_prompt", "batch_size", "micro_batch_size")
    args = types.SimpleNamespace(**dict(zip(keys, sizes)))
    assert checks.check_batches(args, world, prompts)
    offered = checks.fitting(args, world, prompts)
    assert bool(offered) == (min(sizes[0], prompts or sizes[0]) * sizes[1] >= world)
    if offered:
        vars(args).update(offered)
        assert checks.check_batches(args, world, prompts) == [] and args.rollout_batch_size <= (
            prompts or sizes[0]
        )


def test_a_context_that_is_too_small_is_told_before_anything_is_loaded(settings, capsys, tmp_path):
    config = tmp_path / "policy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 60}))
    with pytest.raises(
        UserError,
        match="60 positions: generation.max_input_length 50 [+] generation.max_new_tokens 20 are more",
    ):
        check(settings)
    stretched = {
        "max_position_embeddings": 35,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    }
    for longer in ({"max_position_embeddings": 70}, stretched):
        config.write_text(json.dumps(json.loads(config.read_text()) | longer))
        check(settings)
    assert "positions" not in capsys.readouterr().err


def test_more_processes_than_gpus(settings, monkeypatch):
    monkeypatch.setattr(machines, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(UserError, match="num_processes 4, but 2 GPUs are visible"):
        check(settings | {"num_processes": 4})


@pytest.fixture
def command(settings, tmp_path, monkeypatch, capsys):
    """A function that starts ppo/run.py in this process on mine.yaml; returns what it prints."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings | {"setup_command": "echo 'it'"}))

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", name, str(tmp_path / "mine.yaml"), *map(str, arguments)])
        capsys.readouterr()
        ppo_run.main()
        return capsys.readouterr().out

    return start


def test_overrides_and_the_drivers_values(settings, tmp_path, command):
    """What run_ppo.sh reads, and the settings that stand in loop.yaml."""
    values = [line.split("\t") for line in command("values").splitlines()]
    wanted = {"run_dir": str(tmp_path / "run"), "setup_command": "echo 'it'", "backend": "small"}
    assert wanted.items() <= dict(values).items()
    assert [value for key, value in values if key == "prompt_sets[]"] == settings["prompts"]
    more = ("--ppo.kl_coef", "0.1", "--ppo.learning_rate", "1e-5", "--prompts", tmp_path / "two.jsonl")
    command("write", *more)
    written = yaml.safe_load((tmp_path / "run/loop.yaml").read_text())
    assert written["prompts"] == [str(tmp_path / "two.jsonl")]
    given = {"kl_coef": 0.1, "learning_rate": 1e-5, "batch_size": 8}
    assert given.items() <= written["ppo"].items()
    with pytest.raises(UserError, match="are for --check and --dry_run"):
        command("write", *more, "--num_gpus", 8)


@pytest.mark.parametrize("arguments, named", [
    (("--bakend", "small"), "did you mean '--backend'"),
    (("--backend", "big"), "'big' is not one of auto, openrlhf, small"),
    (("--iterations", "2"), "unknown argument --iterations"),
    (("--run_dir", " "), "run_dir is empty"),
    (("--backend", "openrlhf"), "openrlhf needs GPUs and none is visible here; --backend small, or on tiny"),
    (("--without_gpu", "false"), "the same on tiny models: bash run_ppo.sh configs/ppo_tiny.yaml"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(command, arguments, named):
    with pytest.raises(UserError) as refused:
        command("values", *arguments)
    assert named in str(refused.value) and "\n" not in str(refused.value)
