"""Our settings as OpenRLHF's flags, held against the parser and the validation of the published 0.11.2 wheel,
without a GPU.
"""

import dataclasses
import itertools
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import openrlhf_stub
import pytest
import yaml

from common.cli import UserError
from dpo_iteration.memory import GIB, shape_like
from ppo.openrlhf import arguments as openrlhf_arguments
from ppo.openrlhf import preflight, run_openrlhf
from ppo.openrlhf.command import Paths, Reward, accumulation, check_batches, flags, optimizer_steps, words
from ppo.openrlhf.placement import needs, place

ROOT = Path(__file__).resolve().parents[3]
PATHS = Paths("/w/policy", "/w/policy", "/w/prompts.jsonl", "/w/ckpt", "/w/model", "/w/tb")
PROMPTS = 20480


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The published wheel, unzipped."""
    return openrlhf_stub.unzip(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def options(source):
    """Every whole option string of the real parser."""
    parser = preflight.parser_of((source / "openrlhf/cli/train_ppo_ray.py").read_text())
    return {option for action in parser._actions for option in action.option_strings}


def flat(name="ppo_llama3_8b.yaml", **more):
    """One flat mapping of a PPO run's YAML, as ppo/run.py makes it."""
    run = yaml.safe_load((ROOT / "configs" / name).read_text())
    decided = {
        "model_name_or_path": run["model_name_or_path"],
        "reward_name_or_path": run["reward_name_or_path"],
        "seed": run["seed"],
        "dataset_name_or_path": run["prompts"],
        "output_dir": "out/model",
        "model_size_b": run.get("model_size_b"),
    }
    decided |= {key: run["generation"][key] for key in ("max_input_length", "max_new_tokens")}
    return run["ppo"] | run["openrlhf"] | decided | more


def arguments(**more):
    return openrlhf_arguments.arguments(flat(**more))


def shapes(billions=8.03, reward=True):
    shape = shape_like(billions)
    return {"actor": shape, "ref": shape, "critic": shape, "reward": shape if reward else None}


def placed(args, gpus, gib=80, billions=8.03, reward=True, flash=True):
    return place(args, shapes(billions, reward), gpus, min(gpus, 8), gib * GIB, flash)[0]


REWARDS = {
    "local": Reward("local", model="org/reward"),
    "server": Reward("server", url="http://127.0.0.1:5000/get_reward"),
    "function": Reward("function", url="/p/ppo/openrlhf/reward.py"),
}
SMALL = {"model_size_b": 0.5}
CASES = {
    "8b": ({}, 8.03, (4, 8, 16)),
    "8b offloaded": ({"offload": True}, 8.03, (2, 8)),
    "small": (SMALL, 0.5, (1, 2, 4, 8)),
    "small, apart": (SMALL | {"colocate": False}, 0.5, (4, 8)),
    "small, padded": (SMALL | {"packing": False, "attn_implementation": "sdpa"}, 0.5, (1, 2, 4, 8)),
    "lora, patched": (
        {"lora_r": 16, "patched_lora": True, "lora_target_modules": ["q_proj", "v_proj"]},
        8.03,
        (2, 4, 8),
    ),
    "all keys": (
        SMALL
        | {
            "kl_coef": 0.0,
            "missing_eos_penalty": 0.0,
            "warmup_steps": 7,
            "lr_scheduler_type": "cosine",
            "critic_only_rollouts": 2,
            "save_hf": True,
            "save_critic": True,
            "save_steps": 0,
            "sampling_correction": "off",
            "enforce_eager": False,
            "samples_per_prompt": 4,
            "zero_stage": 3,
            "kl_estimator": "k3",
            "max_grad_norm": 0.0,
            "ppo_epochs": 4,
            "extra_flags": {"vllm.enable_prefix_caching": True, "actor.adam.betas": [0.9, 0.999]},
        },
        0.5,
        (1, 2, 8),
    ),
}


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("case", CASES)
def test_every_command_passes_the_real_parser_and_means_what_we_meant(
    case, kind, source, options, monkeypatch
):
    more, billions, counts = CASES[case]
    args = arguments(**more)
    for gpus, resume in itertools.product(counts, (False, True)):
        placement = placed(args, gpus, billions=billions, reward=kind == "local")
        found = flags(args, placement, REWARDS[kind], PATHS, PROMPTS, resume)
        assert {f"--{name}" for name, _ in found} <= options  # whole names: argparse takes abbreviations too
        assert len({name for name, _ in found}) == len(found)
        parsed = openrlhf_stub.captured(source, words(found), monkeypatch)
        for name, value in found:  # every value arrives under its own name
            at = parsed
            for part in name.split("."):
                at = getattr(at, part)
            if name not in ("reward.remote_url",):
                assert (list(at) if isinstance(at, (list, tuple)) else at) == value, name
        compare(args, placement, kind, parsed, gpus, resume)


def compare(args, placement, kind, parsed, gpus, resume):
    """What the parsed arguments must say, in OpenRLHF's words."""
    assert placement.all_gpus == gpus
    actors = parsed.actor.num_nodes * parsed.actor.num_gpus_per_node
    engines = parsed.vllm.num_engines * parsed.vllm.tensor_parallel_size
    if args.colocate:
        sizes = {
            (getattr(parsed, role).num_nodes, getattr(parsed, role).num_gpus_per_node)
            for role in ("actor", "ref", "critic", "reward")
        }
        assert len(sizes) == 1 and actors == engines == gpus and parsed.train.colocate_all
        assert parsed.vllm.enable_sleep and parsed.ds.enable_sleep and not parsed.train.colocate_actor_ref
        assert parsed.actor.num_gpus_per_node <= 8
    else:
        critics = parsed.critic.num_gpus_per_node
        assert (
            actors + critics + engines == gpus
            and not parsed.train.colocate_all
            and parsed.train.colocate_actor_ref
        )
        assert not parsed.vllm.enable_sleep and parsed.train.colocate_critic_reward == (kind == "local")
    assert parsed.vllm.tensor_parallel_size == 1  # 8 × 1, not 4 × 2: these models fit one GPU
    assert (
        parsed.rollout.n_samples_per_prompt * parsed.rollout.batch_size // parsed.rollout.micro_batch_size
        >= actors
    )
    assert (parsed.train.batch_size, parsed.rollout.batch_size, parsed.train.max_epochs) == (
        128,
        1024,
        args.ppo_epochs,
    )
    if not parsed.train.dynamic_batch_enable:
        assert (
            parsed.train.batch_size == accumulation(args, placement) * actors * parsed.train.micro_batch_size
        )  # as DeepSpeed asserts
    assert (parsed.data.max_len, parsed.rollout.max_new_tokens) == (2048, 1024)
    assert parsed.ds.packing_samples == ("flash" in parsed.ds.attn_implementation) == placement.packing
    assert (parsed.actor.adam.lr, parsed.critic.adam.lr, parsed.algo.kl.init_coef) == (
        5e-7,
        9e-6,
        args.kl_coef,
    )
    assert parsed.actor.eps_clip_low_high == (0.2, 0.2) and tuple(parsed.reward.clip_range) == (-10.0, 10.0)
    assert (
        parsed.algo.advantage.estimator == "gae"
        and not parsed.data.apply_chat_template
        and parsed.data.input_key == "prompt"
    )
    assert parsed.ckpt.load_enable == resume and parsed.ckpt.save_steps == (args.save_steps or -1)
    assert parsed.logger.tensorboard_dir and parsed.logger.wandb.key is None
    assert parsed.ds.lora.rank == args.lora_r and parsed.ds.adam_offload == placement.offload
    assert parsed.critic.model_name_or_path == "/w/policy"
    assert (
        (parsed.reward.model_name_or_path == "org/reward")
        == (kind == "local")
        == (parsed.reward.remote_url is None)
    )
    if kind != "local":
        assert parsed.reward.remote_url == [REWARDS[kind].url]
    penalty = args.missing_eos_penalty
    assert (parsed.reward.overlong_buffer_len, parsed.reward.stop_properly_penalty_coef) == (
        1 if penalty else None,
        None,
    )
    if args.warmup_steps >= 1:
        steps = (
            PROMPTS
            * parsed.rollout.n_samples_per_prompt
            // parsed.train.batch_size
            * parsed.train.num_episodes
            * parsed.train.max_epochs
        )
        assert (
            steps == optimizer_steps(args, PROMPTS)
            and -(-steps * parsed.actor.lr_warmup_ratio // 1) == args.warmup_steps
        )
    if args.critic_only_rollouts:  # it trains the policy where global_step > freezing_steps, from step 0 on
        assert [step > parsed.critic.freezing_steps for step in range(4)] == [False, False, True, True]


def test_the_penalty_for_a_missing_end_is_openrlhfs_overlong_penalty_with_a_buffer_of_one(source):
    """The wheel's own function on responses of 5, 7 and 8 tokens of at most 8: only the last loses, and loses
    the sum.
    """
    text = (
        (source / "openrlhf/trainer/ppo_utils/length_penalty.py")
        .read_text()
        .replace("from openrlhf.utils.logging_utils import init_logger", "")
    )
    names = {"init_logger": lambda name: None}
    exec(text, names)
    lengths = [SimpleNamespace(item=lambda n=n: n) for n in (5, 7, 8)]
    experience = SimpleNamespace(response_length=lengths, rewards=[1.0, 1.0, 1.0])
    assert names["apply_overlong_penalty"]([experience], 8, 1.0, 2.5) == 1 and experience.rewards == [
        1.0,
        1.0,
        -1.5,
    ]


def test_wandb_is_switched_on_without_the_key_in_the_command(source, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    args = arguments(report_to=["wandb"])
    command = words(flags(args, placed(args, 8), REWARDS["local"], PATHS, PROMPTS))
    assert openrlhf_stub.captured(source, command, monkeypatch).logger.wandb.key and "s3cret" not in " ".join(
        command
    )


def test_the_real_validation_is_what_runs(source, monkeypatch):
    """A command without engines, with packing, dies there: the harness is no parser of our own."""
    with pytest.raises(TypeError):
        openrlhf_stub.captured(
            source,
            ["--actor.model_name_or_path", "a", "--reward.model_name_or_path", "b", "--ds.packing_samples"],
            monkeypatch,
        )
    with pytest.raises(AttributeError, match="split"):
        openrlhf_stub.captured(source, ["--actor.model_name_or_path", "a"], monkeypatch)
    with pytest.raises(UserError, match="has no flag --train.batch, did you mean"):
        preflight.check_options(
            preflight.parser_of((source / "openrlhf/cli/train_ppo_ray.py").read_text()),
            ["--train.batch", "8"],
        )


def test_yaml_and_defaults_agree():
    run = yaml.safe_load((ROOT / "configs" / "ppo_llama3_8b.yaml").read_text())
    defaults = {f.name: f.default for f in dataclasses.fields(openrlhf_arguments.Arguments)}
    args = arguments()
    for key in [*run["ppo"], *run["openrlhf"]]:
        assert getattr(args, key) == defaults[key], key
    assert (args.max_input_length, args.max_new_tokens) == (
        defaults["max_input_length"],
        defaults["max_new_tokens"],
    )


REFUSED = {
    "kl_target": (4.0, "nats a token"),
    "value_coef": (0.1, "optimizer of its own"),
    "whiten_rewards": (True, "does not whiten"),
    "whiten_advantages": (False, "always whitens"),
    "bf16": (False, "bf16 or fp16"),
    "lora_r": (16, "1349"),
    "save_total_limit": (1, "2 at least"),
    "reward_name_or_path": (None, "no reward"),
    "batch_size": (0, "above 0"),
    "report_to": (["wandb"], "export WANDB_API_KEY"),
    "reward_function": ("nowhere.py:f", "2 scorers need"),
    "reward_url": ("host:5000", "http://"),
    "top_p": (1.5, "from 0 to 1"),
    "reward_type": (["pair_preference"], "compares responses"),
    "lr_scheduler_type": ("constant", "constant_with_warmup"),
    "chat_template": ("none.jinja", "no such chat template"),
    "reward_gpus": (3, "0 or 1"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_openrlhf_cannot_do_is_refused_by_name(key, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    value, expected = REFUSED[key]
    with pytest.raises(UserError) as caught:
        arguments(**{key: value})
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("reward_clip", math.inf),
        ("kl_coef", math.inf),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_numbers_that_would_end_the_launch_are_refused_before_it(key, value):
    """argparse takes -inf for an option, vLLM no top_p of 0, numpy no seed beyond 32 bits: each after minutes
    of loading.
    """
    with pytest.raises(UserError, match=f"^{key} "):
        arguments(**{key: value})


@pytest.mark.parametrize(
    "gpus, gib, more, expected",
    [
        (1, 80, {}, ("1 GPU of 80 GiB", "193 GB in all", "take 4 GPUs of 80 GiB", "LoRA is out")),
        (1, 141, {}, ("1 GPU of 141 GiB", "take 2 GPUs", "--offload true")),
        (2, 80, {}, ("take 4 GPUs of 80 GiB", "--offload true")),
        (8, 80, {"max_tokens_per_gpu": 100}, ("below the 2048 tokens",)),
        (6, 80, {}, ("does not divide by 6 GPUs", "batch_size 126")),
        (8, 80, {"num_engines": 4}, ("must be the 8 GPUs that sample", "take 8")),
        (8, 80, {"tensor_parallel_size": 3}, ("does not divide the 8 GPUs",)),
        (2, 80, {"colocate": False}, ("needs one node with 4 or 8 GPUs",)),
        (8, 80, {"packing": True, "attn_implementation": "sdpa"}, ("needs flash attention",)),
        (8, 80, {"batch_size": 96}, ("no multiple of batch_size 96",)),
        (
            8,
            80,
            {"rollout_batch_size": 8, "batch_size": 8},
            ("8 responses a rollout do not divide by 8 GPUs × micro_batch_size 2",),
        ),
    ],
)
def test_what_does_not_fit_or_divide_is_refused_with_what_would(gpus, gib, more, expected):
    with pytest.raises(UserError) as caught:
        placed(arguments(**more), gpus, gib)
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_offered_fits_then():
    placed(arguments(), 4), placed(arguments(), 2, 141), placed(arguments(offload=True), 1, 141)


def test_without_sleeping_roles_a_gpu_holds_a_model_with_all_its_states():
    """Weights, gradients, master weights and moments of a model of 8 billion parameters, 16 bytes each."""
    args = arguments(zero_stage=2)
    one = shape_like(8.0)
    shares = {"actor": one, "ref": None, "critic": one, "reward": None}
    placement = placed(arguments(**SMALL, colocate=False), 4, billions=0.5)
    apart = needs(placement, shares, 1, args.gradient_checkpointing)[0]
    assert apart > 16 * one.parameters  # one GPU holds policy or value model with all states


def test_a_model_beyond_one_gpu_gets_engines_of_several():
    found = placed(arguments(), 16, 80, billions=32, reward=True)
    assert (found.tensor_parallel, found.engines, found.zero_stage) == (2, 8, 3)


def test_without_flash_attention_nothing_is_packed():
    found = placed(arguments(**SMALL), 8, billions=0.5, flash=False)
    assert (found.attn_implementation, found.packing, found.max_tokens_per_gpu) == ("sdpa", False, None)
    check_batches(arguments(**SMALL), found)


def test_versions_are_looked_at(monkeypatch):
    there = dict(preflight.PINS) | {"torch": "2.10.0"}
    monkeypatch.setattr(preflight, "installed", lambda package: there.get(package))
    preflight.check_versions()
    wrong = {
        "openrlhf": ("0.11.0", "openrlhf 0.11.0 is installed, 0.11.2 is needed"),
        "flash-attn": (None, "--no-build-isolation"),
        "ray": (None, "make_envs ppo_train"),
        "vllm": ("0.28.1", "0.29.0 is needed"),
        "transformers": ("5.19.0", "5.15.0"),
    }
    for package, (version, expected) in wrong.items():
        there[package] = version
        with pytest.raises(UserError, match=expected):
            preflight.check_versions()
        there[package] = preflight.PINS[package]
    there["vllm"] = "0.30.0+cu129"
    preflight.check_versions()


def test_the_requirements_pin_what_is_checked_and_what_the_wheel_asks_for(source):
    lines = [
        line.split("#")[0].strip()
        for line in (ROOT / "ppo" / "requirements-ppo.txt").read_text().splitlines()
    ]
    pins = {line.split("==")[0].split("[")[0]: line.split("==")[1] for line in lines if "==" in line}
    asked = next(source.parents[1].glob("*.dist-info")).joinpath("METADATA").read_text()
    for package, version in preflight.PINS.items():
        assert pins[package] == version
        if package != "openrlhf":
            assert f"{package}=={version}" in asked or f"{package}[default]=={version}" in asked


def test_ray_clusters(monkeypatch):
    args = arguments(ray_address="head:6379")
    monkeypatch.setattr(preflight, "cluster_gpus", lambda address: [0, 8, 8])
    assert preflight.count_gpus(args)[:2] == (16, 8)
    args.num_gpus = 24
    with pytest.raises(UserError, match="num_gpus 24, but 16 GPUs are of the Ray cluster head:6379"):
        preflight.count_gpus(args)
    monkeypatch.setattr(preflight, "cluster_gpus", lambda address: [4, 8])
    with pytest.raises(UserError, match="nodes have 4, 8 GPUs"):
        preflight.count_gpus(arguments(ray_address="head:6379"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="no Ray cluster answers"):
        preflight.cluster_gpus("127.0.0.1:1")


def test_a_ray_cluster_that_nobody_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "somebodys:6379")
    with pytest.raises(
        UserError, match="RAY_ADDRESS is somebodys:6379: .* --ray_address somebodys:6379 to use it, or unset"
    ):
        preflight.check_ray(arguments())
    assert preflight.check_ray(arguments(ray_address="ours:6379")) == []
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert preflight.check_ray(arguments()) == []
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379")
    assert "ray stop" in preflight.check_ray(arguments())[0]


def test_too_few_cores_for_ray(monkeypatch):
    """Ray waits for ever for a core that is not there."""
    monkeypatch.setattr(preflight.os, "sched_getaffinity", lambda pid: set(range(8)))
    with pytest.raises(
        UserError, match="on 8 GPUs needs 10 CPU cores and this process may use 8: .* --cpus-per-task"
    ):
        preflight.check_cores(arguments(), 8)
    preflight.check_cores(arguments(), 6)
    preflight.check_cores(arguments(ray_address="head:6379"), 8)


def test_what_openrlhfs_engines_and_optimizer_need(monkeypatch):
    """vLLM starts without nvcc; DeepSpeed compiles with any CUDA 13. What is set already stays."""
    monkeypatch.setattr(run_openrlhf, "visible_gpus", lambda: ["0"])
    plan = SimpleNamespace(placement=SimpleNamespace(all_gpus=1), kind="local")
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    monkeypatch.setenv("DS_SKIP_CUDA_CHECK", "0")
    found = run_openrlhf.environment(arguments(), plan)
    assert found == {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    assert (
        run_openrlhf.show(["python", "-m", "m", "--a", "b c"], found)
        == "VLLM_USE_FLASHINFER_SAMPLER=0 \\\npython -m m \\\n  --a 'b c'"
    )


def test_a_tokenizer_of_several_templates_comes_along(monkeypatch, tmp_path):
    import dpo_iteration.saved

    monkeypatch.setattr(dpo_iteration.saved, "check_saved", lambda *args: None)
    monkeypatch.setattr(dpo_iteration.saved, "store_once", lambda *args: None)  # these weights are none
    for name in ("policy", "made"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "made/model.safetensors").write_text("")
    (tmp_path / "policy/additional_chat_templates").mkdir()
    (tmp_path / "policy/additional_chat_templates/rag.jinja").write_text("rag")
    args = arguments(output_dir=str(tmp_path / "out"))
    run_openrlhf.place_model(
        args, SimpleNamespace(model=str(tmp_path / "made"), policy=str(tmp_path / "policy"))
    )
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "rag"


def fake_gpus(folder, count, gib=80):
    """An nvidia-smi that lists so many GPUs."""
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    listed = "".join(f"echo 'GPU {i}: fake'; " for i in range(count))
    sizes = f"echo {gib * 1024}; " * count
    smi.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then {listed or ":"} \nelse {sizes or ":"} \nfi\n')
    smi.chmod(0o755)
    base = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "WANDB_API_KEY")}
    return base | {
        "PATH": f"{smi.parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def test_a_dry_run_prints_the_command_without_secrets_and_writes_nothing(tmp_path, source, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    values = flat(
        output_dir=str(tmp_path / "out dir" / "model"), dataset_name_or_path=str(tmp_path / "prompts.jsonl")
    )
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        str(ROOT / "ppo/openrlhf/run_openrlhf.py"),
        str(tmp_path / "train.yaml"),
        "--dry_run",
        "true",
        "--report_to",
        "wandb",
        "--machine_memory_gib",
        "1000",
    ]
    env = fake_gpus(tmp_path, 8) | {"WANDB_API_KEY": "s3cret"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace(" \\\n", "\n").splitlines()
    assert lines[:2] == [
        "VLLM_USE_FLASHINFER_SAMPLER=0 DS_SKIP_CUDA_CHECK=1",
        "python -m openrlhf.cli.train_ppo_ray",
    ]
    assert all(line.startswith("  --") for line in lines[2:])
    parsed = openrlhf_stub.captured(source, shlex.split(" ".join(lines[2:])), monkeypatch)
    assert (
        parsed.ckpt.output_dir == str(tmp_path / "out dir" / "model.work" / "model")
        and parsed.vllm.num_engines == 8
    )
    assert "s3cret" not in done.stdout + done.stderr and not (tmp_path / "out dir").exists()
    assert "8 engines × 1 GPUs" in done.stderr and "is assumed" in done.stderr


def test_a_plan_for_gpus_that_are_elsewhere(tmp_path, source, monkeypatch):
    """By `ppo/run.py plan`, from the YAML of run_ppo.sh, on a machine without GPUs; an ordinary start is
    refused there.
    """
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Hi {i}"}}\n' for i in range(2000)))
    given = [
        "--run_dir",
        str(tmp_path / "run"),
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--openrlhf.gpu_memory_gib",
        "80",
        "--openrlhf.num_gpus",
    ]
    command = [
        sys.executable,
        str(ROOT / "ppo/run.py"),
        "plan",
        str(ROOT / "configs/ppo_llama3_8b.yaml"),
        *given,
    ]
    env = fake_gpus(tmp_path, 0)
    done = subprocess.run([*command, "8"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "8 GPUs on one node" in done.stderr and not (tmp_path / "run").exists(), (
        done.stderr
    )
    parsed = openrlhf_stub.captured(
        source, shlex.split(done.stdout.partition("train_ppo_ray ")[2].replace("\\\n", " ")), monkeypatch
    )
    assert parsed.actor.num_gpus_per_node == 8 and parsed.vllm.num_engines == 8
    few = subprocess.run([*command, "2"], capture_output=True, text=True, env=env)
    assert (
        few.returncode == 2 and "--openrlhf.offload true" in few.stderr and "4 GPUs of 80 GiB" in few.stderr
    ), few.stderr
    start = subprocess.run(
        [sys.executable, str(ROOT / "ppo/run.py"), "setup", *command[3:], "8"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert start.returncode == 2 and "needs GPUs and none is visible" in start.stderr


def test_a_machine_whose_memory_cannot_take_what_is_moved_out_is_refused(monkeypatch):
    found, notes = place(arguments(), shapes(), 8, 8, 80 * GIB, True, machine=200 * GIB)
    assert found.gpus == 8 and "of the machines' memory" in notes[0]
    with pytest.raises(
        UserError,
        match=(
            "GiB of states are moved out .* 1 machine of 100 GiB cannot take them; take --colocate false, "
            "more nodes"
        ),
    ):
        place(arguments(), shapes(), 8, 8, 80 * GIB, True, machine=100 * GIB)
    place(arguments(), shapes(), 16, 8, 80 * GIB, True, machine=100 * GIB)  # two of them can
    assert (
        preflight.machine_memory(arguments(machine_memory_gib=64)) == 64 * GIB
        and preflight.machine_memory(arguments(ray_address="head:6379")) is None
    )
    monkeypatch.setattr(preflight, "visible_gpus", lambda: ["0"])
    with open("/proc/meminfo") as file:
        assert preflight.machine_memory(arguments()) == pytest.approx(
            int(file.readline().split()[1]) * 1024, rel=0.01
        )


@pytest.mark.parametrize("more, visible, expected", [
    (["--num_gpus", "4"], None, "num_gpus 4, but 2 GPUs are visible; give --num_gpus 2"),
    (["--num_gpus", "2"], "0", "num_gpus 2, but 1 GPUs are visible"),
    (["--logger.wandb.key", "s3cret"], None, "export WANDB_API_KEY"),
    (["--kl_ceof", "1"], None, "did you mean '--kl_coef'"),
    (["--model_name_or_path", "./nowhere"], None, "no such folder"),
])  # fmt: skip
def test_wrong_set_ups_end_in_one_line(more, visible, expected, tmp_path):
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(flat(output_dir=str(tmp_path / "model"))))
    env = fake_gpus(tmp_path, 2) | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    command = [
        sys.executable,
        str(ROOT / "ppo/openrlhf/run_openrlhf.py"),
        str(tmp_path / "train.yaml"),
        "--dry_run",
        "true",
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    ), done.stderr
    assert expected in done.stderr and "s3cret" not in done.stderr
