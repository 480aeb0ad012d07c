"""Each accelerate configuration with two processes on the CPU: it trains what one process trains, and leaves
a whole model.

FSDP2 and offloading run here for real (see `models.prepare_sharding`); offloaded states are stepped by
torch's Adam instead of DeepSpeed's, which has to be compiled for minutes.
"""

import json
import math
import os
import shutil
import socket
import stat
import subprocess
import sys
from types import SimpleNamespace

import micro
import pytest
import torch
import training
from training import ROOT, furthest, launch, logged, read_json, start, weights
from transformers import AutoModelForCausalLM

from dpo_iteration import memory

EXACT = (
    "--bf16 false --learning_rate 1e-3 --max_steps 3 --gradient_checkpointing true --save_steps 3 "
    "--keep_checkpoints"
)


@pytest.fixture(scope="module")
def work(work):
    """With a tied head, which what is gathered holds as if it were a weight of its own."""
    shutil.rmtree(work / "policy")
    micro.make_policy(work / "policy", tie_word_embeddings=True)
    return work


def launched(work, name, config, *more):
    """(what two processes said, their log)."""
    done = start(*training.argv(work, name, *more), launcher=launch(config))
    return done.stdout, logged(work / name)


def whole(folder, dtype):
    """The saved weights, once transformers has loaded them without a complaint."""
    _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    found = weights(folder)
    assert {weight.dtype for weight in found.values()} == {dtype} and "lm_head.weight" not in found
    return found


@pytest.fixture(scope="module")
def alone(work):
    """One process with twice the accumulation: the same pairs a step."""
    made = training.train(work, "alone", EXACT, "--gradient_accumulation_steps 4")
    return whole(made, torch.float32), logged(made)


def proof(config, checkpoint):
    """A file that only this way of training leaves in a checkpoint."""
    return {
        "ddp": checkpoint / "optimizer.pt",
        "fsdp2": checkpoint / "pytorch_model_fsdp.bin",
        "zero2": checkpoint / "global_step3" / "mp_rank_00_model_states.pt",
    }.get(config, checkpoint / "global_step3" / "zero_pp_rank_1_mp_rank_00_model_states.pt")


LONG = pytest.mark.long  # test_run_dpo.py has ZeRO-2 and ZeRO-3 in the ordinary run, in bf16


@pytest.mark.parametrize(
    "config",
    [*(pytest.param(name, marks=LONG) for name in ("ddp", "zero2", "zero3", "zero3_offload")), "fsdp2"],
)
def test_two_processes_train_what_one_trains(work, alone, config):
    expected, expected_log = alone
    _, log = launched(work, config, config, EXACT)
    assert proof(config, work / config / "checkpoint-3").exists()
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    losses = [entry["loss"] for entry in expected_log]
    assert [entry["loss"] for entry in log] == pytest.approx(losses, abs=1e-5)
    found = whole(work / config, torch.float32)
    assert furthest(found, expected) < 1e-5
    assert furthest(found, weights(work / "policy")) > 1e-3  # they have moved far more than that


def test_fsdp2_in_bf16_has_fp32_weights_and_unrounded_log_probabilities(work):
    """Log-probabilities rounded to bf16 would give another loss than ln 2 and margins of exactly 0."""
    more = "--learning_rate 5e-7 --max_steps 3 --save_steps 3 --keep_checkpoints --eval_fraction 0.25"
    _, log = launched(work, "bf16", "fsdp2", more)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["rewards/margins"] != 0
    whole(work / "bf16", torch.bfloat16)
    master = torch.load(work / "bf16" / "checkpoint-3" / "pytorch_model_fsdp.bin")
    assert {weight.dtype for weight in master.values()} == {torch.float32}
    # Still one weight, in two copies.
    assert master.pop("lm_head.weight").equal(master["model.embed_tokens.weight"])
    # Three steps of at most 5e-7 each, which bf16 weights could not hold.
    assert 1e-8 < furthest(master, weights(work / "policy")) < 1e-5


@LONG
def test_fsdp2_continues_from_a_checkpoint(work, alone):
    launched(work, "stopped", "fsdp2", EXACT, "--save_steps 2")
    (work / "stopped" / "config.json").unlink()  # as if it had been killed behind step 2
    (work / "stopped" / "checkpoint-3" / "trainer_state.json").unlink()
    manifest = read_json(work / "stopped.manifest.json") | {"complete": False}
    (work / "stopped.manifest.json").write_text(json.dumps(manifest))
    said, _ = launched(work, "stopped", "fsdp2", EXACT, "--save_steps 2")
    assert "continuing from" in said and "step 3/3" in said and "step 2/3" not in said
    assert furthest(whole(work / "stopped", torch.float32), alone[0]) < 1e-5


STAND_INS = {  # for a cluster whose two machines are this one: they start what they are given as Slurm does
    "srun": """while [[ "$1" = --* ]]; do shift; done
for rank in 0 1; do SLURM_NODEID=$rank "$@" & pids+=($!); done
status=0; for pid in "${pids[@]}"; do wait "$pid" || status=$?; done; exit "$status"
""",
    "scontrol": '[ "$*" = "show hostnames here[1-2]" ] && printf "127.0.0.1\\nelsewhere\\n"',
    "accelerate": f'shift; exec {sys.executable} -m accelerate.commands.launch "$@"',
}


@pytest.mark.parametrize("config", ["zero2", pytest.param("fsdp2", marks=LONG)])
def test_two_machines_train_what_one_process_trains(work, alone, tmp_path, config):
    """configs/train_multinode.slurm itself, with two launchers on this machine; Slurm is stood in for."""
    environment = tmp_path / "envs" / "rlhflow" / "bin"
    environment.mkdir(parents=True)
    (environment / "activate").write_text(f"PATH={environment}:$PATH\n")
    for name, text in STAND_INS.items():
        (environment / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (environment / name).chmod(stat.S_IRWXU)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "here[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "accelerate_config": f"configs/{config}.yaml",
        "gpus_per_node": "1",
        "main_port": str(port),
        "envs_dir": str(tmp_path / "envs"),
        "env_manager": "venv",
        "own_envs": "yes",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    out, script = work / f"machines_{config}", str(ROOT / "configs" / "train_multinode.slurm")
    command = ["bash", script, *training.argv(work, out.name, EXACT)]
    given = {"cwd": tmp_path, "env": os.environ | slurm, "timeout": 300}
    done = subprocess.run(command, capture_output=True, text=True, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(f"{out}.manifest.json")["num_processes"] == 2
    assert proof(config, out / "checkpoint-3").exists()
    size = sum(file.stat().st_size for file in (out / "checkpoint-3").rglob("*") if file.is_file())
    count = sum(weight.numel() for weight in weights(out).values())
    said = memory.checkpoint_bytes(SimpleNamespace(save_steps=3, save_total_limit=0, bf16=False), count)
    assert 0.7 * said < size < 1.1 * said, (size, said)  # FSDP2 has one set of weights less
    assert furthest(whole(out, torch.float32), alone[0]) < 1e-5
