"""common/devices.py where nvidia-smi lists GPUs and torch sees none.

Nvidia-smi and torch are stand-ins; what torch says is quoted from it.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import micro
import pytest
import training

from annotate_data import get_rewards
from common import devices
from common.cli import UserError, build
from dpo_iteration import run_dpo
from evaluation import divergence, evaluate_benchmarks
from generation import get_hf2
from ppo import train_ppo
from ppo.openrlhf import reward as openrlhf_reward

ROOT = Path(__file__).resolve().parents[2]
OLD = "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver."


def machine(folder, cuda, available=False, driver="570.124.06"):
    """Environment of a process on a machine with one GPU and such a torch."""
    (folder / "torch").mkdir(exist_ok=True)
    (folder / "torch/__init__.py").write_text(f"""
__version__ = "2.13.0"
class version: cuda = {cuda!r}
class cuda:
    def is_available(): return {available}
    def init(): raise RuntimeError({OLD!r})
""")
    smi = folder / "nvidia-smi"
    answers = f'-L) echo "GPU 0: Stand-in (UUID: GPU-0)" ;; *driver*) echo {driver} ;;'
    smi.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    smi.chmod(0o755)
    base = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA", "ACCELERATE"))}
    return base | {"PATH": f"{folder}:{base['PATH']}", "PYTHONPATH": f"{folder}:{ROOT}"}


def checked(env, **more):
    """What check_torch says there; empty where it lets pass."""
    code = "from common.devices import *\ntry: check_torch()\nexcept UserError as error: print(error)"
    command, env = [sys.executable, "-c", code], env | more
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_a_driver_that_is_too_old(tmp_path):
    told = checked(machine(tmp_path, "13.0"))
    parts = ("shows 1 GPU, and torch sees none", "driver is 570.124.06", "CUDA 13.0", "driver 580 or newer")
    for part in (*parts, OLD, "CUDA_VISIBLE_DEVICES="):
        assert part in told, told
    assert "driver 525 or newer" in checked(machine(tmp_path, "12.6", driver="470.1"))


def test_a_torch_for_the_cpu_beside_gpus(tmp_path):
    told = checked(machine(tmp_path, None))
    assert "is a build for the CPU" in told and "make_envs" in told


def test_the_cpu_on_purpose_and_a_torch_that_sees_gpus(tmp_path):
    env = machine(tmp_path, "13.0")
    assert checked(env, CUDA_VISIBLE_DEVICES="") == checked(env, ACCELERATE_USE_CPU="true") == ""
    assert checked(machine(tmp_path, "13.0", available=True)) == ""


def test_every_script_asks_before_it_loads_a_model(tmp_path, monkeypatch):
    policy, reward = micro.make_policy(tmp_path / "policy"), micro.make_reward_model(tmp_path / "reward")
    reference, rows = micro.make_policy(tmp_path / "reference", seed=5), tmp_path / "generated.jsonl"
    training.write_rewarded(rows, 2)
    given = ["--dataset_name_or_path", str(rows), "--output_dir", str(tmp_path / "out.jsonl")]

    def refuse():
        raise UserError("torch sees none")

    for module in (devices, get_hf2, run_dpo, train_ppo):
        monkeypatch.setattr(module, "check_torch", refuse)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def main(module, *argv):
        monkeypatch.setattr(sys, "argv", ["script", *given, *map(str, argv)])
        module.main()

    asked = openrlhf_reward.RewardArguments(policy=str(policy), reward_name_or_path=[str(reward)])
    for start in (
        lambda: main(get_rewards, "--reward_name_or_path", reward),
        lambda: main(divergence, "--model_name_or_path", policy, "--ref_model_name_or_path", reference),
        lambda: main(get_hf2, "--model_name_or_path", policy),
        lambda: run_dpo.prepare(None, None, 1),
        lambda: train_ppo.train(None, None, 0.0),
        lambda: openrlhf_reward.Rewards(asked).load(),
    ):
        with pytest.raises(UserError, match="torch sees none"):
            start()


@pytest.mark.parametrize("set_before", [None, "1"])
def test_vllm_starts_without_nvcc(monkeypatch, set_before):
    """It would compile a sampler at its start that seeded requests never use.

    Vllm is a stand-in: GPUs are needed to see the real one.
    """
    name = "VLLM_USE_FLASHINFER_SAMPLER"
    monkeypatch.setitem(os.environ, name, "")
    monkeypatch.delenv(name)
    if set_before:
        monkeypatch.setenv(name, set_before)
    seen = []

    def engine(**options):
        seen.append(os.environ[name])
        core = types.SimpleNamespace(shutdown=lambda: None)
        return types.SimpleNamespace(llm_engine=types.SimpleNamespace(engine_core=core))

    vllm = types.SimpleNamespace(LLM=engine)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")  # so that it is put back
    for module in (get_hf2, devices):
        monkeypatch.setattr(module, "visible_gpus", lambda: ["0"])
    monkeypatch.setattr(get_hf2, "check_torch", lambda: None)
    assert evaluate_benchmarks.variables([]) == ({} if set_before else {name: "0"})
    given = {"model_name_or_path": "policy", "dataset_name_or_path": "prompts", "output_dir": "out"}
    get_hf2.start_engine(build(get_hf2.Arguments, given, "generation"), None, 100)
    assert seen == [set_before or "0"]
