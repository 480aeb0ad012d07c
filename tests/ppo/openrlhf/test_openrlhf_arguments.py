"""The settings of run_openrlhf.py: what is refused at once, and what a run's section holds."""

import dataclasses
import math

import pytest
import yaml
from openrlhf_stub import ROOT, arguments

from common.cli import UserError, parse
from loop.settings import complete
from ppo import train_ppo
from ppo.openrlhf import run_openrlhf
from ppo.openrlhf.arguments import Arguments

REFUSED = [
    ("lora_r", 16, "1349"),
    ("save_total_limit", 1, "2 at least"),
    ("reward_name_or_path", None, "no reward"),
    ("batch_size", 0, "batch_size 0 must be above 0"),
    ("report_to", ["wandb"], "export WANDB_API_KEY"),
    ("reward_function", "nowhere.py:f", "2 scorers need"),
    ("reward_url", "host:5000", "http://"),
    ("reward_type", ["pair_preference"], "compares responses"),
    ("lr_scheduler_type", "constant", "constant_with_warmup"),
    ("chat_template", "none.jinja", "no such chat template"),
    ("reward_gpus", 3, "0 or 1"),
    ("top_p", 1.5, "from 0 to 1"),
    # argparse takes -inf for an option, vLLM no top_p of 0, numpy no seed beyond 32 bits: each after minutes
    ("reward_clip", math.inf, "reward_clip inf must be above 0 and finite"),
    ("kl_coef", math.inf, "kl_coef inf"),
    ("top_p", 0.0, "no token to sample"),
    ("seed", -1, "seed -1"),
    ("seed", 2**32, "at most 4294967295"),
    # keys of the small PPO
    ("kl_target", 4.0, "backend small.*nats a token"),
    ("value_coef", 0.1, "backend small.*optimizer of its own"),
    ("whiten_rewards", True, "backend small.*does not whiten"),
    ("bf16", False, "backend small.*always trains in bf16"),
]


@pytest.mark.parametrize("key, value, expected", REFUSED)
def test_what_openrlhf_cannot_do_is_refused_by_name(key, value, expected, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=expected) as caught:
        arguments(**{key: value})
    assert "\n" not in str(caught.value)


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
