"""The settings of run_openrlhf.py: what is refused, where the roles go, and our flags, taken by the parser
and the validation of the published 0.11.2 wheel, without a GPU.
"""

import ast
import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from openrlhf_stub import ROOT, SMALL, arguments, captured, placed

from common.cli import UserError, parse
from loop.settings import complete
from ppo import train_ppo
from ppo.openrlhf import run_openrlhf
from ppo.openrlhf.arguments import Arguments, check_trackers
from ppo.openrlhf.command import flags, optimizer_steps, words
from ppo.openrlhf.plan import Plan

URL, WORK = "http://127.0.0.1:5000/get_reward", Path("/w")
PROMPTS = 20480
MANY = {
    "kl_coef": 0.0,
    "missing_eos_penalty": 0.0,
    "warmup_steps": 7,
    "lr_scheduler_type": "cosine",
    "save_steps": 0,
    "enforce_eager": False,
    "samples_per_prompt": 4,
    "zero_stage": 3,
    "kl_estimator": "k3",
    "max_grad_norm": 0.0,
    "ppo_epochs": 4,
    "extra_flags": {
        "vllm.enable_prefix_caching": True,
        "actor.adam.betas": [0.9, 0.999],
        "reward.clip_range": [-5.0, 5.0],
        "algo.advantage.is_correction_mode": "mask",
    },
}
NO_CRITIC = {"advantage_estimator": "rloo", "samples_per_prompt": 4}
CASES = {
    "8b": ({}, 8.03, (4, 8, 16)),
    "8b offloaded": ({"offload": True}, 8.03, (2, 8)),
    "small": (SMALL, 0.5, (1, 2, 4, 8)),
    "small, apart": (SMALL | {"colocate": False}, 0.5, (4, 8)),
    "small, padded": (SMALL | {"attn_implementation": "sdpa"}, 0.5, (1, 8)),
    "8b without a value model": (NO_CRITIC, 8.03, (4, 8)),
    "many keys": (SMALL | MANY, 0.5, (1, 8)),
}


@pytest.mark.parametrize("kind", ["local", "server"])
@pytest.mark.parametrize("case", CASES)
def test_every_command_passes_the_real_parser_and_means_what_we_meant(case, kind, source, monkeypatch):
    more, billions, counts = CASES[case]
    args = arguments(**more)
    for gpus, resume in itertools.product(counts, (False, True)):
        placement, _ = placed(args, gpus, billions=billions, reward=kind == "local")
        found = flags(args, Plan(placement, kind, None, [], None), WORK, URL, PROMPTS, resume)
        parsed = captured(source, words(found), monkeypatch)
        for name, value in found.items():  # every value arrives under its own name
            at = parsed
            for part in name.split("."):
                at = getattr(at, part)
            assert at == ([value] if name == "reward.remote_url" else value), name
        check_gpus(args, placement, kind == "local", parsed, gpus)
        check_training(args, parsed)
        assert bool(parsed.critic.model_name_or_path) == (args.advantage_estimator == "gae")


def check_gpus(args, placement, local, parsed, gpus):
    """All GPUs are used, and roles that share them sleep in turn."""
    assert placement.all_gpus == gpus and parsed.vllm.tensor_parallel_size == 1  # these models fit one GPU
    actors = parsed.actor.num_nodes * parsed.actor.num_gpus_per_node
    engines = parsed.vllm.num_engines * parsed.vllm.tensor_parallel_size
    roles = [getattr(parsed, role) for role in ("actor", "ref", "critic", "reward")]
    if args.colocate:
        assert len({(role.num_nodes, role.num_gpus_per_node) for role in roles}) == 1
        assert actors == engines == gpus and parsed.vllm.enable_sleep and parsed.ds.enable_sleep
        assert parsed.actor.num_gpus_per_node <= 8 and not parsed.train.colocate_actor_ref
    else:
        assert actors + parsed.critic.num_gpus_per_node + engines == gpus and not parsed.train.colocate_all
        assert parsed.train.colocate_actor_ref and not parsed.vllm.enable_sleep
        assert parsed.train.colocate_critic_reward == local
    assert parsed.ds.packing_samples == ("flash" in parsed.ds.attn_implementation)


def check_training(args, parsed):
    """Batches divide as DeepSpeed asserts; warm-up and clipping are what was asked for."""
    actors = parsed.actor.num_nodes * parsed.actor.num_gpus_per_node
    responses = parsed.rollout.n_samples_per_prompt * parsed.rollout.batch_size
    assert responses % (actors * parsed.rollout.micro_batch_size) == 0
    assert parsed.train.batch_size % (actors * parsed.train.micro_batch_size) == 0
    assert parsed.data.max_len == args.max_input_length + args.max_new_tokens
    clip = args.extra_flags.get("reward.clip_range", [-10.0, 10.0])
    assert parsed.actor.eps_clip_low_high == (0.2, 0.2) and list(parsed.reward.clip_range) == clip
    assert parsed.reward.stop_properly_penalty_coef is None and not parsed.data.apply_chat_template
    steps = PROMPTS * parsed.rollout.n_samples_per_prompt // parsed.train.batch_size
    steps *= parsed.train.num_episodes * parsed.train.max_epochs
    assert steps == optimizer_steps(args, PROMPTS)
    if args.warmup_steps >= 1:
        assert -(-steps * parsed.actor.lr_warmup_ratio // 1) == args.warmup_steps


def test_the_penalty_for_a_missing_end_is_openrlhfs_overlong_penalty_with_a_buffer_of_one(source):
    """The wheel's own function on responses of 5, 7 and 8 tokens of at most 8: only the last loses."""
    text = (source / "openrlhf/trainer/ppo_utils/length_penalty.py").read_text()
    names = {"init_logger": lambda name: None}
    exec(text.replace("from openrlhf.utils.logging_utils import init_logger", ""), names)
    lengths = [SimpleNamespace(item=lambda n=n: n) for n in (5, 7, 8)]
    experience = SimpleNamespace(response_length=lengths, rewards=[1.0, 1.0, 1.0])
    assert names["apply_overlong_penalty"]([experience], 8, 1.0, 2.5) == 1
    assert experience.rewards == [1.0, 1.0, -1.5]


def test_several_reward_servers_are_asked_in_turn(source, monkeypatch):
    urls = ["http://a:1/get_reward", "http://b:2/get_reward"]
    args = arguments(reward_url=urls)
    plan = Plan(placed(args, 8, reward=False)[0], "url", None, [], None)
    command = words(flags(args, plan, WORK, ",".join(args.reward_url), PROMPTS))
    assert captured(source, command, monkeypatch).reward.remote_url == urls


def test_wandb_is_switched_on_without_the_key_in_the_command(source, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    args = arguments(report_to=["wandb"])
    plan = Plan(placed(args, 8)[0], "local", None, [], None)
    command = words(flags(args, plan, WORK, URL, PROMPTS))
    assert captured(source, command, monkeypatch).logger.wandb.key and "s3cret" not in " ".join(command)
    args.extra_flags = {"logger.wandb.key": "s3cret"}
    assert "a W&B key would be printed" in check_trackers(args)[0]


def test_the_real_validation_is_what_runs(source, monkeypatch):
    """A command without engines, with packing, dies there: the harness is no parser of our own."""
    given = ["--actor.model_name_or_path", "a", "--reward.model_name_or_path", "b"]
    with pytest.raises(TypeError):
        captured(source, [*given, "--ds.packing_samples"], monkeypatch)
    with pytest.raises(SystemExit):
        captured(source, [*given, "--train.batch", "8"], monkeypatch)


@pytest.mark.parametrize("key, value, expected", [
    ("save_total_limit", 1, "2 at least"),
    ("reward_name_or_path", None, "no reward"),
    ("batch_size", 0, "batch_size 0 must be above 0"),
    ("report_to", ["wandb"], "export WANDB_API_KEY"),
    ("report_to", ["mlflow"], "reports to tensorboard"),
    ("reward_function", "nowhere.py:f", "2 scorers need"),
    ("reward_url", ["http://a:1/get_reward", "host:5000"], "reward_url host:5000: http://"),
    ("extra_flags", {"reward.normalize_enable": True}, "rewards would be garbage"),
    ("reward_type", ["pair_preference"], "compares responses"),
    ("lr_scheduler_type", "constant", "constant_with_warmup"),
    ("chat_template", "none.jinja", "no such chat template"),
    ("top_p", 1.5, "from 0 to 1"),
    ("critic_name_or_path", "c", "advantage_estimator rloo has none"),
    ("colocate", False, "advantage_estimator rloo has none"),
    ("kl_target", 4.0, "backend small.*nats a token"),  # a key of the small PPO
])  # fmt: skip
def test_what_openrlhf_cannot_do_is_refused_by_name(key, value, expected, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=expected) as caught:
        arguments(**(NO_CRITIC if "rloo" in expected else {}) | {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gpus, gib, more, expected", [
    (1, 80, {}, ("1 GPU of 80 GiB", "193 GB in all", "take 4 GPUs of 80 GiB", "LoRA is out")),
    (1, 141, {}, ("1 GPU of 141 GiB", "take 2 GPUs", "offload true")),
    (2, 80, {}, ("take 4 GPUs of 80 GiB",)),
    (8, 80, {"max_tokens_per_gpu": 100}, ("below the 2048 tokens",)),
    (6, 80, {}, ("does not divide by 6 processes", "rollout_batch_size 1008, batch_size 126")),
    (12, 80, {}, ("no multiple of gpus_per_node 8",)),
    (8, 80, {"tensor_parallel_size": 3}, ("does not divide the 8 GPUs",)),
    (16, 80, {"tensor_parallel_size": 16}, ("or a node's 8",)),
    (2, 80, {"colocate": False}, ("needs one node with 4 or 8 GPUs",)),
    (8, 80, {"batch_size": 96}, ("does not divide into steps of batch_size 96",)),
])  # fmt: skip
def test_what_does_not_fit_or_divide_is_refused_with_what_would(gpus, gib, more, expected):
    with pytest.raises(UserError) as caught:
        placed(arguments(**more), gpus, gib)
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_offered_fits_then():
    placed(arguments(**NO_CRITIC), 4)
    placed(arguments(), 4), placed(arguments(), 2, 141), placed(arguments(offload=True), 1, 141)
    placed(arguments(rollout_batch_size=960, batch_size=120), 6)


def test_large_models_and_machines_with_little_memory():
    found, _ = placed(arguments(), 16, 80, billions=32)
    assert (found.tensor_parallel, found.engines, found.zero_stage) == (2, 8, 3)
    found, note = placed(arguments(), 8, memory=200)
    assert found.gpus == 8 and "of the machines' memory" in note
    with pytest.raises(UserError, match="1 machine of 100 GiB cannot take them; take colocate false"):
        placed(arguments(), 8, memory=100)
    placed(arguments(), 16, memory=100)  # two of them can


def test_yaml_and_defaults_agree():
    run = yaml.safe_load((ROOT / "configs" / "ppo_llama3_8b.yaml").read_text())
    defaults, args = {f.name: f.default for f in dataclasses.fields(Arguments)}, arguments()
    for key in [*run["ppo"], *run["openrlhf"], "max_input_length", "max_new_tokens"]:
        assert getattr(args, key) == defaults[key], key


@pytest.mark.parametrize("backend", [train_ppo, run_openrlhf])
def test_a_resolved_section_is_complete_and_can_be_read_again(backend, tmp_path):
    """What a run keeps under `ppo`, with models, prompts and output on the command line."""
    decided = {"model_name_or_path": "c/d", "dataset_name_or_path": ["p", "q"], "output_dir": "o"}
    section = complete(backend.Arguments, {"kl_coef": "1e-3", "reward_name_or_path": ["a/b"]}, decided, "ppo")
    assert section.keys() | decided == backend.Arguments.__dataclass_fields__.keys()
    assert section["kl_coef"] == 1e-3
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"seed": 1, "ppo": section}))
    words = ["--model_name_or_path", "c/d", "--dataset_name_or_path", "p", "q", "--output_dir", "o"]
    args = parse(backend.Arguments, "", [f"{tmp_path / 'loop.yaml'}:ppo", *words])
    assert dataclasses.asdict(args) == section | decided


def test_where_it_runs_does_not_shape_the_model():
    one, other = arguments(), arguments(num_gpus=4, offload=True, report_to=["none"], output_dir="elsewhere")
    assert run_openrlhf.shaping(one) == run_openrlhf.shaping(other)
    assert run_openrlhf.shaping(one)[0]["kl_coef"] == one.kl_coef


def test_every_argument_reaches_openrlhf():
    """One that train_ppo.py gets is inherited: it must be read here, or stand in LACKS with the reason."""
    paths = [*(ROOT / "ppo/openrlhf").glob("*.py"), ROOT / "ppo/inputs.py"]
    paths += [ROOT / "common/chat.py", ROOT / "common/records.py"]  # of all who read and write prompts
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant)}  # by getattr
    assert [name for name in Arguments.__dataclass_fields__ if name not in read] == []
