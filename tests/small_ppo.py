"""What the tests of ppo/train_ppo.py share: settings of a run on micro models, and ways to start it."""

import os
import subprocess
import sys

import torch
import training
from training import ROOT

from common.cli import build
from ppo import train_ppo

SCRIPT = str(ROOT / "ppo" / "train_ppo.py")


def settings(work, name, **more):
    values = {
        "model_name_or_path": str(work / "policy"),
        "reward_function": f"{work / 'reward.py'}:letters",
        "output_dir": str(work / name),
        "dataset_name_or_path": [str(work / "prompts.jsonl")],
        "max_input_length": 200,
        "max_new_tokens": 6,
        "rollout_batch_size": 4,
        "samples_per_prompt": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "generation_batch_size": 4,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "kl_coef": 0.05,
        "num_episodes": 1,
        "cpu_threads": 1,
        "bf16": False,
    }
    values |= more
    return {key: value for key, value in values.items() if value is not ...}


def argv(work, name, **more):
    words = []
    for key, value in settings(work, name, **more).items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def make(work, precision="no", **more):
    """A PPO object in this process, without a launcher."""
    from accelerate import Accelerator

    training.reset()
    args = build(train_ppo.Arguments, settings(work, "unused", **more))
    return train_ppo.PPO(args, Accelerator(cpu=True, mixed_precision=precision))


def begin(words, launcher=()):
    hidden = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    return subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, *words],
        cwd=ROOT,
        env=env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def equal(a, b, **limits):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **({"rtol": 0, "atol": 0} | limits))
