"""The settings of a PPO run: every configs/ppo_*.yaml against its backend, what goes to train.yaml, and what
is refused.
"""

import dataclasses
import datetime
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from common.cli import UserError, build
from generation.sampling import check_sampling
from loop import plan as loop_plan
from loop import settings as run_settings
from ppo import checks, train_ppo
from ppo import run as ppo_run
from ppo.run import PPOPlan, PPOSettings

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("ppo_*.yaml"))
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in a YAML are from the project's folder; no GPU, whatever the machine has."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run_settings, "visible_gpus", lambda: [])


@pytest.fixture
def settings(tmp_path):
    """Settings of a run on folders that look like models, prompts that do not overlap, and no weights."""
    for name, architecture in (("policy", "LlamaForCausalLM"), ("reward", "LlamaForSequenceClassification")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            json.dumps({"model_type": "llama", "architectures": [architecture], "num_labels": 1})
        )
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    for name, count in (("one", 13), ("two", 12), ("heldout", 2)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{name} {i}"}) + "\n" for i in range(count))
        )
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_accepted_by_every_stage(path):
    values = yaml.safe_load(path.read_text())
    run = PPOPlan(build(PPOSettings, values, path.name))
    for backend in [values["backend"]] if values.get("backend", "auto") != "auto" else ["openrlhf"]:
        run.settings.backend = backend
        assert run.arguments().output_dir == f"{values['run_dir']}/iter1/model"
    for job in run.jobs():
        check_sampling(job)
    assert f"configs/{path.name}" in path.read_text() or "bash run_ppo.sh\n" in path.read_text()


def test_the_tiny_run_is_comparable_with_the_tiny_loop():
    loop, ppo = (yaml.safe_load((ROOT / f"configs/{name}_tiny.yaml").read_text()) for name in ("loop", "ppo"))
    same = (
        "setup_command",
        "model_name_or_path",
        "reward_name_or_path",
        "prompts",
        "heldout_prompts",
        "gold_function",
        "generation",
        "seed",
    )
    assert [loop[key] for key in same] == [ppo[key] for key in same]


def test_the_tiny_run_trains_as_the_yaml_for_use_by_hand():
    by_hand = train_ppo.arguments(yaml.safe_load((ROOT / "configs/train_ppo_tiny.yaml").read_text()))
    run = PPOPlan(build(PPOSettings, yaml.safe_load((ROOT / "configs/ppo_tiny.yaml").read_text())))
    by_hand.date = run.settings.date  # resolved by each at its start
    assert train_ppo.shaping(run.arguments()) == train_ppo.shaping(by_hand)


def test_training_gets_what_evaluation_says_unless_ppo_says_otherwise(settings):
    settings["generation"] |= {"dataset_key": "prompt", "K": 4, "top_p": 0.8}
    settings["annotation"] = {"reward_function": "my.py:score", "reward_weights": [1, 2], "batch_tokens": 64}
    settings["ppo"] |= {"top_p": 1.0, "kl_coef": 0.3}
    found = made(settings).training_of(1)
    expected = {
        "model_name_or_path": settings["model_name_or_path"],
        "reward_name_or_path": settings["reward_name_or_path"],
        "dataset_name_or_path": settings["prompts"],
        "output_dir": f"{settings['run_dir']}/iter1/model",
        "seed": 42,
        "dataset_key": "prompt",
        "max_input_length": 50,
        "max_new_tokens": 20,
        "temperature": 0.9,
        "top_p": 1.0,
        "kl_coef": 0.3,
        "reward_function": "my.py:score",
        "reward_weights": [1, 2],
        "batch_size": 8,
        "rollout_batch_size": 8,
        "bf16": False,
        "date": str(datetime.date.today()),
    }
    assert expected.items() <= found.items()
    assert found.keys() == train_ppo.Arguments.__dataclass_fields__.keys()  # all of them, resolved


def test_each_backend_gets_what_it_knows(settings):
    """A reward model's own template and length have keys in one backend only."""
    settings["annotation"] = {"chat_template": "my.jinja", "max_length": 300, "template_kwargs": {}}
    settings["generation"]["template_kwargs"] = {"enable_thinking": False}
    del settings["ppo"]["bf16"]  # OpenRLHF has no such choice
    small, other = made(settings), made(settings | {"backend": "openrlhf"})
    assert small.training_of(1)["template_kwargs"] == {
        "enable_thinking": False
    } and "reward_chat_template" not in small.training_of(1)
    assert (
        other.training_of(1)["reward_chat_template"] == "my.jinja"
        and other.training_of(1)["reward_max_length"] == 300
    )
    assert other.training_of(1)["template_kwargs"] == {"enable_thinking": False}
    assert list(small.left_out()) == [("annotation", "chat_template")] and list(other.left_out()) == []


def test_placement_goes_to_openrlhf_alone(settings):
    settings["openrlhf"] = {"num_gpus": 4}
    assert "num_gpus" not in made(settings).training_of(1)
    del settings["ppo"]["bf16"]
    assert made(settings | {"backend": "openrlhf"}).training_of(1)["num_gpus"] == 4


@pytest.mark.parametrize(
    "backend, gpus, taken",
    [
        ("auto", 0, "small"),
        ("auto", 2, "openrlhf"),
        ("small", 2, "small"),
        ("openrlhf", 2, "openrlhf"),
        ("openrlhf", 0, "openrlhf"),
    ],
)
def test_which_backend(settings, monkeypatch, backend, gpus, taken):
    monkeypatch.setattr(run_settings, "visible_gpus", lambda: [str(i) for i in range(gpus)])
    assert made(settings | {"backend": backend}).backend == taken


def test_the_stages(settings):
    plan = made(settings)
    assert plan.stages(None, None) == ["0.evaluate", "1.train", "1.evaluate"]
    assert plan.stages("1.3", "train") == ["1.train"] == plan.stages("1.train", "1.3")
    assert made(settings | {"heldout_prompts": None}).stages(None, None) == ["1.train"]


def check(values):
    ppo_run.check(made(values), left=True)


def test_what_is_right_passes_and_says_so(settings, capsys):
    check(settings)
    assert "1 training process, CPU, backend small" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"ppo": {"kl_coeff": 0.1}}, "unknown key 'kl_coeff' in ppo, did you mean 'kl_coef'?"),
        ({"ppo": {"output_dir": "x"}}, "output_dir is the run's own; give run_dir"),
        ({"ppo": {"dataset_name_or_path": ["x"]}}, "give prompts"),
        ({"ppo": {"seed": 1}}, "seed is the run's own; give seed"),
        ({"ppo": {"missing_eos_penalty": -1.0}}, "missing_eos_penalty -1.0 must not be negative"),
        (
            {"ppo": {"batch_size": 32, "rollout_batch_size": 32}},
            "25 prompts are fewer than a rollout takes: lower rollout_batch_size 32",
        ),
        (
            {"ppo": {"missing_eos_penalty": -1.0}, "backend": "openrlhf"},
            "missing_eos_penalty -1.0 must not be negative",
        ),
        (
            {"ppo": {"generation_batch_size": 8}, "backend": "openrlhf"},
            "generation_batch_size for backend small alone",
        ),
        (
            {"ppo": {"reward_clip": 8}},
            "ppo: reward_clip for backend openrlhf alone; leave that out with backend small",
        ),
        ({"ppo": {"clip": 0}}, "clip 0.0 must be above 0"),
        (
            {"ppo": {"batch_size": 8, "micro_batch_size": 4, "rollout_batch_size": 8}, "num_processes": 3},
            "batch_size 8 does not divide by 3 processes",
        ),
        ({"generation": {"eos_ids": [1]}}, "generation: PPO (backend small) would train without eos_ids"),
        ({"heldout": {"top_k": 5}}, "would train without top_k"),
        (
            {"annotation": {"chat_template": "x.jinja"}},
            "annotation: PPO (backend small) would train without chat_template",
        ),
        ({"generation": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"reward_name_or_path": None}, "names no reward model"),
        ({"reward_name_or_path": ["nowhere/at/all"]}, "nowhere/at/all"),
        ({"model_name_or_path": "./nowhere"}, "no such folder"),
        ({"prompts": []}, "at least one set"),
        ({"gold_function": "nope.py:x"}, "nope.py"),
        ({"num_processes": 0}, "num_processes 0 must be at least 1"),
    ],
)
def test_wrong_set_ups_are_named(settings, capsys, wrong, named):
    with pytest.raises(UserError) as refused:
        check(settings | wrong)
    assert named in capsys.readouterr().err + str(refused.value)


def test_a_folder_of_the_other_kind_of_run_is_called_that(settings, tmp_path, monkeypatch, capsys):
    """By both drivers, before anything is held, built or written."""
    dpo = {
        "run_dir": str(tmp_path / "dpo"),
        "model_name_or_path": "a/b",
        "prompts": ["p"],
        "heldout_prompts": "h",
        "without_gpu": True,
    }
    for kind, values, name in ((PPOPlan, settings, "ppo"), (loop_plan.Plan, dpo, "dpo")):
        Path(values["run_dir"]).mkdir()
        Path(values["run_dir"], "loop.yaml").write_text(
            yaml.safe_dump(dataclasses.asdict(build(kind.Settings, values)))
        )
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    for kind, name, other, held, wanted in (
        (PPOPlan, "ppo", "dpo", "DPO (run_loop.sh)", "PPO (run_ppo.sh)"),
        (loop_plan.Plan, "dpo", "ppo", "PPO (run_ppo.sh)", "DPO (run_loop.sh)"),
    ):
        own, others = ({"dpo": dpo, "ppo": settings}[which]["run_dir"] for which in (name, other))
        with pytest.raises(UserError) as refused:
            loop_plan.read(kind, [str(tmp_path / f"{name}.yaml"), "--run_dir", others], planning=True)
        assert (
            str(refused.value)
            == f"{others} holds a run of {held}, this would be one of {wanted}: give another --run_dir"
        )
        plan, _, _ = loop_plan.read(kind, [str(tmp_path / f"{name}.yaml")], planning=True)
        assert plan.settings.run_dir == own


def test_a_set_that_is_not_there_is_not_mistaken_for_one_that_has_another_part(settings, capsys, tmp_path):
    with pytest.raises(UserError) as refused:
        check(
            settings
            | {
                "heldout_prompts": str(tmp_path / "nothing.jsonl"),
                "prompts": [str(tmp_path / "tow.jsonl"), settings["prompts"][0]],
            }
        )
    told = capsys.readouterr().err + str(refused.value)
    assert (
        f"no such prompt set: {tmp_path}/nothing.jsonl; there are {tmp_path}/heldout.jsonl, "
        f"{tmp_path}/two.jsonl" in told
    )
    assert f"no such prompt set: {tmp_path}/tow.jsonl; there is {tmp_path}/two.jsonl" in told


def test_a_column_that_is_not_there_is_named_by_its_key_in_the_run(settings, capsys):
    with pytest.raises(UserError) as refused:
        check(settings | {"generation": settings["generation"] | {"dataset_key": "promt"}})
    assert "has no promt, did you mean 'prompt'?" in (told := capsys.readouterr().err + str(refused.value))
    assert "--generation.dataset_key" in told and " --dataset_key" not in told


def test_all_that_is_wrong_is_told_at_once_with_sizes_that_fit(settings, capsys):
    """The sizes of a small set: each was refused after the other had been mended."""
    wrong = {
        "rollout_batch_size": 128,
        "batch_size": 128,
        "micro_batch_size": 8,
        "clip": 0,
        "top_p": 2,
        "report_to": ["wanbd"],
    }
    with pytest.raises(UserError) as refused:
        check(settings | {"ppo": wrong, "num_processes": 1})
    told = capsys.readouterr().err + str(refused.value)
    for problem in ("clip 0.0 must be above 0", "top_p 2.0", "report_to wanbd"):
        assert problem in told
    sizes = "rollout_batch_size 24, batch_size 24, micro_batch_size 8"
    assert (
        "25 prompts are fewer than a rollout takes: lower rollout_batch_size 128, or give more; these "
        f"fit together: {sizes}" in told
    )
    check(
        settings
        | {"ppo": {"rollout_batch_size": 24, "batch_size": 24, "micro_batch_size": 8}, "num_processes": 1}
    )  # what was offered


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


def test_what_a_backend_refuses_is_said_of_its_section(settings):
    def refuse():
        raise UserError("offload true needs more memory")

    with pytest.raises(UserError, match="^ppo: offload true needs more memory$"):
        made(settings | {"backend": "openrlhf"}).ask(refuse)


def test_all_problems_are_told_at_once(settings, capsys, tmp_path):
    (tmp_path / "policy" / "chat_template.jinja").unlink()
    (tmp_path / "heldout.jsonl").write_text((tmp_path / "one.jsonl").read_text())
    with pytest.raises(UserError) as refused:
        check(settings | {"ppo": {"epochs": 1}})
    said = capsys.readouterr().err + str(refused.value)
    for problem in ("has no chat template", "3 prompts of", "unknown key 'epochs' in ppo"):
        assert problem in said


def test_more_processes_than_gpus(settings, monkeypatch):
    monkeypatch.setattr(run_settings, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(UserError, match="num_processes 4, but 2 GPUs are visible"):
        check(settings | {"num_processes": 4})


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "ppo/run.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_overrides_and_the_drivers_values(settings, tmp_path):
    """What run_ppo.sh reads, and the settings that stand in loop.yaml."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        yaml.safe_dump(settings | {"run_dir": str(tmp_path / "a run"), "setup_command": "echo 'it'"})
    )
    values = [line.split("\t") for line in command("values", config).stdout.splitlines()]
    assert {
        "run_dir": str(tmp_path / "a run"),
        "setup_command": "echo 'it'",
        "backend": "small",
    }.items() <= dict(values).items()
    assert [value for key, value in values if key == "prompt_sets[]"] == settings["prompts"]
    more = ("--ppo.kl_coef", "0.1", "--ppo.learning_rate", "1e-5", "--prompts", tmp_path / "two.jsonl")
    ready = command("write", config, *more)
    assert ready.returncode == 0, ready.stderr
    written = yaml.safe_load((tmp_path / "a run/loop.yaml").read_text())
    assert written["prompts"] == [str(tmp_path / "two.jsonl")]
    assert (written["ppo"]["kl_coef"], written["ppo"]["learning_rate"], written["ppo"]["batch_size"]) == (
        0.1,
        1e-5,
        8,
    )
    refused = command("write", config, *more, "--num_gpus", 8)
    assert refused.returncode == 2 and "are for --check and --dry_run" in refused.stderr


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--bakend", "small"), "did you mean '--backend'"),
        (("--backend", "big"), "'big' is not one of auto, openrlhf, small"),
        (("--iterations", "2"), "unknown argument --iterations"),
        (("--run_dir", " "), "run_dir is empty"),
        (
            ("--backend", "openrlhf"),
            "backend openrlhf needs GPUs and none is visible here; --backend small, or on tiny models: bash "
            "run_ppo.sh",
        ),
        (("--without_gpu", "false"), "the same on tiny models: bash run_ppo.sh configs/ppo_tiny.yaml"),
    ],
)
def test_wrong_arguments_are_one_line(settings, tmp_path, monkeypatch, arguments, named):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    refused = command("values", tmp_path / "mine.yaml", *arguments)
    assert refused.returncode == 2 and named in refused.stderr and refused.stderr.count("\n") == 1, (
        refused.stderr
    )


def test_an_unknown_key_of_the_yaml_names_the_nearest(settings, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings | {"heldout_prompt": "x"}))
    refused = command("values", tmp_path / "mine.yaml")
    assert (
        refused.returncode == 2
        and "unknown key 'heldout_prompt'" in refused.stderr
        and "did you mean 'heldout_prompts'" in refused.stderr
    )
