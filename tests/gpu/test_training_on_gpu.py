"""Training by each accelerate configuration with one process: the same figures, and memory as foretold."""

import math

import micro
import pytest
import training
from training import ROOT

for needed in ("trl", "deepspeed"):
    pytest.importorskip(needed)

from dpo_iteration import memory  # noqa: E402
from dpo_iteration.memory import GIB  # noqa: E402

STEPS = 3
PRECISE = (
    "--bf16 true --learning_rate 1e-5 --max_length 1024 --max_prompt_length 512 --optim adamw_torch_fused"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory, sizes):
    folder = tmp_path_factory.mktemp("training")
    # in bf16, as policies are stored: ZeRO rounds fp32 ones before it starts, and trains from another point
    micro.make_policy(folder / "policy", dtype="bfloat16" if sizes else "float32", **sizes)
    training.write_rewarded(folder / "rewarded.jsonl", 200 if sizes else 24)
    return folder


@pytest.fixture(scope="module")
def figures(work):
    """{method: entries of its log}, as they come."""
    return {}


@pytest.mark.parametrize("method", ["ddp", "zero2", "zero3", "fsdp2"])
def test_every_configuration_trains_alike_and_within_its_memory(method, work, figures, device):
    launcher = ["--config_file", ROOT / "configs" / f"{method}.yaml", "--num_processes", 1]
    steps = f"--max_steps {STEPS} --gradient_accumulation_steps 1 --per_device_train_batch_size 8"
    environment = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    precise = PRECISE if device.type == "cuda" else PRECISE.replace("--bf16 true", "--bf16 false")
    done = training.start(*training.argv(work, method, precise, steps), launcher=launcher, **environment)
    print("\n".join(line for line in done.stdout.splitlines() if "GiB" in line or "rows of" in line))
    log = figures[method] = training.logged(work / method)
    assert len(log) == STEPS and log[0]["loss"] == pytest.approx(math.log(2), abs=0.01)
    assert all(math.isfinite(entry["loss"] + entry["grad_norm"]) for entry in log)
    for other in figures.values():
        assert log[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=0.01)
        for mine, theirs in zip(log, other, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=0.02)
            assert mine["logps/chosen"] == pytest.approx(theirs["logps/chosen"], rel=0.01)
    if device.type == "cuda":
        metrics = training.read_json(f"{work / method}.manifest.json")["metrics"]
        shape = memory.shape_of(str(work / "policy"))
        needed = memory.need(method, shape, 1, 8, 1024, False).total
        print(f"{method}: {metrics['gpu_memory_gib']:.2f} GiB held, {needed / GIB:.2f} foretold")
        assert metrics["gpu_memory_gib"] * GIB <= 1.1 * needed


def test_the_small_ppo_starts_where_its_reference_is(work, device):
    """It stops by itself where bf16 passes of the same weights differ by more than rounding."""
    (work / "reward.py").write_text("def f(messages, response):\n    return float(len(response))\n")
    micro.write_prompts(work / "prompts.jsonl", 16)
    words = f"""--model_name_or_path {work}/policy --output_dir {work}/ppo
        --reward_function {work}/reward.py:f --dataset_name_or_path {work}/prompts.jsonl
        --max_input_length 300 --max_new_tokens 32
        --rollout_batch_size 8 --samples_per_prompt 2 --batch_size 8 --micro_batch_size 4"""
    environment = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    launcher = ["--config_file", ROOT / "configs/ddp.yaml", "--num_processes", 1]
    training.start(*words.split(), launcher=launcher, script=ROOT / "ppo/train_ppo.py", **environment)
    log = training.read_jsonl(work / "ppo.log.jsonl")
    assert len(log) == 2 and abs(log[0]["kl"]) < 1 and 0.7 < log[0]["ratio"] < 1.3
