"""Our settings as OpenRLHF's flags, taken by the parser and the validation of the published 0.11.2 wheel,
without a GPU.
"""

import itertools
from types import SimpleNamespace

import pytest
from openrlhf_stub import SMALL, arguments, captured, placed

from ppo.openrlhf.command import Paths, Reward, accumulation, flags, optimizer_steps, words

PATHS = Paths("/w/policy", "/w/policy", "/w/prompts.jsonl", "/w/ckpt", "/w/model", "/w/tb")
PROMPTS = 20480
REWARDS = {
    "local": Reward("local", model="org/reward"),
    "server": Reward("server", url="http://127.0.0.1:5000/get_reward"),
    "function": Reward("server", url="/p/ppo/openrlhf/reward.py"),
}
LORA = {"lora_r": 16, "patched_lora": True, "lora_target_modules": ["q_proj", "v_proj"]}
MANY = {
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
}
CASES = {
    "8b": ({}, 8.03, (4, 8, 16)),
    "8b offloaded": ({"offload": True}, 8.03, (2, 8)),
    "small": (SMALL, 0.5, (1, 2, 4, 8)),
    "small, apart": (SMALL | {"colocate": False}, 0.5, (4, 8)),
    "small, padded": (SMALL | {"packing": False, "attn_implementation": "sdpa"}, 0.5, (1, 2, 4, 8)),
    "lora, patched": (LORA, 8.03, (2, 4, 8)),
    "many keys": (SMALL | MANY, 0.5, (1, 2, 8)),
}


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("case", CASES)
def test_every_command_passes_the_real_parser_and_means_what_we_meant(case, kind, source, monkeypatch):
    more, billions, counts = CASES[case]
    args = arguments(**more)
    for gpus, resume in itertools.product(counts, (False, True)):
        placement, _ = placed(args, gpus, billions=billions, reward=kind == "local")
        found = flags(args, placement, REWARDS[kind], PATHS, PROMPTS, resume)
        parsed = captured(source, words(found), monkeypatch)
        for name, value in found:  # every value arrives under its own name
            at = parsed
            for part in name.split("."):
                at = getattr(at, part)
            if name != "reward.remote_url":
                assert (list(at) if isinstance(at, (list, tuple)) else at) == value, name
        check_gpus(args, placement, kind, parsed, gpus)
        check_training(args, placement, parsed)


def check_gpus(args, placement, kind, parsed, gpus):
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
        assert parsed.train.colocate_critic_reward == (kind == "local")
    assert parsed.ds.packing_samples == ("flash" in parsed.ds.attn_implementation) == placement.packing
    if kind != "local":
        assert parsed.reward.remote_url == [REWARDS[kind].url] and parsed.reward.model_name_or_path is None


def check_training(args, placement, parsed):
    """Batches divide as DeepSpeed asserts; warm-up, frozen rollouts and clipping are what was asked for."""
    actors = parsed.actor.num_nodes * parsed.actor.num_gpus_per_node
    responses = parsed.rollout.n_samples_per_prompt * parsed.rollout.batch_size
    assert responses // parsed.rollout.micro_batch_size >= actors
    if not parsed.train.dynamic_batch_enable:
        passes = accumulation(args, placement)
        assert parsed.train.batch_size == passes * actors * parsed.train.micro_batch_size
    assert parsed.data.max_len == args.max_input_length + args.max_new_tokens
    assert parsed.actor.eps_clip_low_high == (0.2, 0.2) and tuple(parsed.reward.clip_range) == (-10.0, 10.0)
    assert parsed.reward.stop_properly_penalty_coef is None and not parsed.data.apply_chat_template
    steps = PROMPTS * parsed.rollout.n_samples_per_prompt // parsed.train.batch_size
    steps *= parsed.train.num_episodes * parsed.train.max_epochs
    assert steps == optimizer_steps(args, PROMPTS)
    if args.warmup_steps >= 1:
        assert -(-steps * parsed.actor.lr_warmup_ratio // 1) == args.warmup_steps
    if args.critic_only_rollouts:  # it trains the policy where global_step > freezing_steps, from step 0 on
        assert [step > parsed.critic.freezing_steps for step in range(4)] == [False, False, True, True]


def test_the_penalty_for_a_missing_end_is_openrlhfs_overlong_penalty_with_a_buffer_of_one(source):
    """The wheel's own function on responses of 5, 7 and 8 tokens of at most 8: only the last loses."""
    text = (source / "openrlhf/trainer/ppo_utils/length_penalty.py").read_text()
    names = {"init_logger": lambda name: None}
    exec(text.replace("from openrlhf.utils.logging_utils import init_logger", ""), names)
    lengths = [SimpleNamespace(item=lambda n=n: n) for n in (5, 7, 8)]
    experience = SimpleNamespace(response_length=lengths, rewards=[1.0, 1.0, 1.0])
    assert names["apply_overlong_penalty"]([experience], 8, 1.0, 2.5) == 1
    assert experience.rewards == [1.0, 1.0, -1.5]


def test_wandb_is_switched_on_without_the_key_in_the_command(source, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    args = arguments(report_to=["wandb"])
    command = words(flags(args, placed(args, 8)[0], REWARDS["local"], PATHS, PROMPTS))
    assert captured(source, command, monkeypatch).logger.wandb.key and "s3cret" not in " ".join(command)


def test_the_real_validation_is_what_runs(source, monkeypatch):
    """A command without engines, with packing, dies there: the harness is no parser of our own."""
    given = ["--actor.model_name_or_path", "a", "--reward.model_name_or_path", "b"]
    with pytest.raises(TypeError):
        captured(source, [*given, "--ds.packing_samples"], monkeypatch)
    for wrong in ("--train.batch", "--train.batch_siz"):
        with pytest.raises(SystemExit):
            captured(source, [*given, wrong, "8"], monkeypatch)
