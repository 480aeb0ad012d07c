"""LoRA and QLoRA of run_dpo.py on micro models: what moves, what is merged and saved, resume, ZeRO-2, and the
refusals.
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time

import micro
import pytest
import torch
import training
from safetensors.torch import load_file
from training import ROOT, read_json, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cli import UserError
from dpo_iteration import adapters, memory
from dpo_iteration.arguments import arguments

LORA = "--use_peft true --lora_r 4 --lora_alpha 12 --learning_rate 2e-3 --max_steps 4".split()


def argv(work, name, *more):
    return training.argv(work, name, *LORA, *more)


def losses(folder):
    return [
        entry["loss"] for entry in read_json(f"{folder}.trainer_state.json")["log_history"] if "loss" in entry
    ]


def added(folder):
    """Weight name → alpha / r · B·A in float64, from the adapter's files alone."""
    config, tensors = (
        read_json(folder / "adapter_config.json"),
        load_file(folder / "adapter_model.safetensors"),
    )
    sums = {}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            B = tensors[name.replace(".lora_A.", ".lora_B.")]
            key = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            sums[key] = config["lora_alpha"] / config["r"] * (B.double() @ A.double())
    return sums


def is_merged(work, name, largest):
    """Whether the model of run `name` is the policy plus its adapter, in every weight to `largest`; returns
    both.
    """
    policy, model = (
        load_file(work / "policy" / "model.safetensors"),
        load_file(work / name / "model.safetensors"),
    )
    delta = added(work / name / "adapter")
    assert set(model) == set(policy) and set(delta) < set(policy)
    for key, weight in policy.items():
        expected = weight.double() + delta.get(key, 0)
        assert (model[key].double() - expected).abs().max() <= largest * (1 + expected.abs().max()), key
    assert max(update.abs().max() for update in delta.values()) > 1e-4, "nothing was learnt"
    return policy, model


def loads(folder, dtype):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and model.dtype == dtype
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert "quantization_config" not in read_json(folder / "config.json")
    return model


def test_the_model_is_the_policy_plus_the_adapter(work, here):
    here(argv(work, "plain", "--bf16", "false"))
    policy, model = is_merged(work, "plain", 1e-6)
    still = [key for key in policy if torch.equal(policy[key], model[key])]
    assert {key for key in policy if key not in added(work / "plain" / "adapter")} == set(still)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < set(still)
    assert losses(work / "plain")[0] == pytest.approx(
        math.log(2), abs=1e-6
    )  # the reference is the policy without adapters
    loads(work / "plain", torch.float32)
    assert read_json(work / "plain" / "config.json") == read_json(work / "policy" / "config.json")
    manifest = read_json(work / "plain.manifest.json")
    assert manifest["complete"] and manifest["settings"]["lora_r"] == 4


def test_peft_reads_the_adapter(work):
    from peft import PeftModel

    assert {f.name for f in (work / "plain" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    weights = load_file(work / "plain" / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(work / "policy")
    wrapped, merged = (
        PeftModel.from_pretrained(base, work / "plain" / "adapter"),
        loads(work / "plain", torch.float32),
    )
    assert (wrapped(ids).logits - merged(ids).logits).abs().max() < 1e-5


def test_an_overwritten_run_keeps_no_adapter(work, here):
    here(argv(work, "twice", "--bf16", "false", "--max_steps", "1"))
    assert (work / "twice" / "adapter").is_dir()
    off = ["--use_peft", "false", "--lora_r", "16", "--lora_alpha", "32"]
    here(argv(work, "twice", "--bf16", "false", "--max_steps", "1", *off, "--overwrite"))
    assert not (work / "twice" / "adapter").exists()


def test_bf16_holds_the_policy_in_bf16_and_the_adapters_in_fp32(work, here):
    """The base is frozen, so bf16 loses nothing while training; the sum is made in the source's fp32 and
    rounded once.
    """
    here(argv(work, "bf16", "--gradient_checkpointing", "true"))
    is_merged(work, "bf16", 2**-8)
    model = loads(work / "bf16", torch.bfloat16).state_dict()
    for key, update in added(work / "bf16" / "adapter").items():
        once = (load_file(work / "policy" / "model.safetensors")[key].double() + update).float().bfloat16()
        assert (model[key] != once).float().mean() < 1e-3, (
            key
        )  # but for ties that fp32 and float64 break otherwise
    weights = load_file(work / "bf16" / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert losses(work / "bf16")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_gradient_checkpointing_gives_the_same_model(work, here):
    here(argv(work, "checkpointed", "--bf16", "false", "--gradient_checkpointing", "true"))
    same = [load_file(work / name / "model.safetensors") for name in ("plain", "checkpointed")]
    assert max((same[0][key] - same[1][key]).abs().max() for key in same[0]) < 1e-6


def test_chosen_modules_a_tied_head_and_another_reference(work, here, tmp_path):
    micro.make_policy(tmp_path / "policy", tie_word_embeddings=True)
    more = [
        "--model_name_or_path",
        tmp_path / "policy",
        "--ref_model_name_or_path",
        work / "policy",
        "--bf16",
        "false",
    ]
    here(
        argv(
            work,
            tmp_path / "some",
            *more,
            "--lora_target_modules",
            "q_proj",
            "down_proj",
            "--lora_dropout",
            "0.1",
            "--disable_dropout",
            "false",
        )
    )
    delta = added(tmp_path / "some" / "adapter")
    assert len(delta) == 4 and all(key.split(".")[-2] in ("q_proj", "down_proj") for key in delta)
    is_merged(tmp_path, "some", 1e-6)
    loads(tmp_path / "some", torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "some" / "model.safetensors")
    assert abs(losses(tmp_path / "some")[0] - math.log(2)) > 1e-6  # another model than the policy


def test_a_killed_run_ends_at_the_same_weights(work, here, capfd):
    settings = ["--bf16", "false", "--max_steps", "12", "--save_steps", "4"]
    here(argv(work, "whole", *settings))
    command = [sys.executable, training.SCRIPT, *argv(work, "killed", *settings)]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        for _ in range(6000):
            if (
                work / "killed" / "checkpoint-4" / "trainer_state.json"
            ).exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert read_json(work / "killed.manifest.json")["complete"] is False, "it ended before it was killed"
    capfd.readouterr()
    here(argv(work, "killed", *settings))
    assert "continuing from" in capfd.readouterr().out
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        weights = [load_file(work / name / file) for name in ("whole", "killed")]
        assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 1e-6
    is_merged(work, "killed", 1e-6)


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_zero_on_two_processes(work, stage):
    launch = ["--config_file", ROOT / "configs" / f"{stage}.yaml", "--num_processes", 2]
    done = start(*argv(work, stage, "--gradient_checkpointing", "true"), launcher=launch)
    assert done.returncode == 0, done.stdout + done.stderr
    is_merged(work, stage, 2**-8)
    loads(work / stage, torch.bfloat16)
    assert losses(work / stage)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.fixture(scope="module")
def bitsandbytes():
    """QLoRA's tests run without a GPU too: bitsandbytes has CPU kernels for nf4."""
    pytest.importorskip(
        "bitsandbytes", reason="an environment from before bitsandbytes was in requirements-train.txt"
    )


@pytest.mark.parametrize("avx512_bf16", [False, True])
def test_qlora_merges_into_the_unquantised_policy(work, here, bitsandbytes, monkeypatch, avx512_bf16):
    """On either kind of CPU: bitsandbytes packs 4-bit weights in another way where it finds AVX512-BF16,
    which is stood in for.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: avx512_bf16)
    name, seen = f"qlora_{avx512_bf16}", []
    monkeypatch.setattr(
        adapters,
        "keep_fp32",
        lambda trainer, keep=adapters.keep_fp32: (keep(trainer), seen.append(trainer.model)),
    )
    here(argv(work, name, "--load_in_4bit", "true", "--bf16", "false", "--gradient_checkpointing", "true"))
    [model] = seen
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert (
        type(layer).__name__ == "Linear4bit"
        and layer.weight.dtype == torch.uint8
        and layer.weight.quant_state.nested
    )
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and all(".lora_" in name for name in trained)
    is_merged(work, name, 1e-6)
    loads(work / name, torch.float32)
    assert losses(work / name)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.long
def test_qlora_on_two_processes(work, bitsandbytes):
    launch = ["--config_file", ROOT / "configs" / "zero2.yaml", "--num_processes", 2]
    done = start(*argv(work, "qlora2", "--load_in_4bit", "true"), launcher=launch)
    assert done.returncode == 0, done.stdout + done.stderr
    is_merged(work, "qlora2", 2**-8)
    assert losses(work / "qlora2")[0] == pytest.approx(math.log(2), abs=1e-6)


def refusal(*more, launcher=None, monkeypatch=None):
    values = {"model_name_or_path": "policy", "train_dir": "r.jsonl", "output_dir": "out"}
    for name, value in (launcher or {}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        arguments(values | dict(more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


ON = ("use_peft", True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([("load_in_4bit", True)], "--load_in_4bit is of LoRA and has no effect alone: give --use_peft true"),
        ([("lora_r", 8)], "--lora_r is of LoRA"),
        ([("lora_target_modules", "q_proj")], "--lora_target_modules is of LoRA"),
        ([ON, ("lora_r", 0)], "--lora_r 0 must be at least 1"),
        ([ON, ("lora_alpha", -1)], "--lora_alpha -1 must be"),
        ([ON, ("lora_dropout", 1.0)], "from 0 to below 1"),
        ([ON, ("lora_dropout", 0.1)], "--disable_dropout false"),
        ([ON, ("lora_target_modules", ["q_proj", "lm_head"])], "the adapter would not be trained"),
        ([ON, ("lora_target_modules", ["model.embed_tokens"])], "merging would change it too"),
        ([ON, ("lora_target_modules", [])], "give all-linear, or the names"),
        ([ON, ("lora_target_modules", ["all-linear", "q_proj"])], "give all-linear, or the names"),
        ([("model_init_kwargs", {"quantization_config": {}})], "give --use_peft true --load_in_4bit true"),
    ],
)
def test_refusals(settings, message):
    assert message in refusal(*settings)


def test_missing_packages_are_named(monkeypatch):
    find = importlib.util.find_spec
    for missing, settings in (("peft", [ON]), ("bitsandbytes", [ON, ("load_in_4bit", True)])):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else find(name)
        )
        assert f"{missing} is not installed here" in refusal(*settings)


def test_qlora_where_weights_are_cut_up(monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    save = {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
    for launcher, name in (
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"} | save, "ZeRO-3"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}, "ZeRO-3"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
    ):
        with monkeypatch.context() as patch:
            said = refusal(ON, ("load_in_4bit", True), launcher=launcher, monkeypatch=patch)
            assert f"does not work with {name}" in said and "configs/zero2.yaml" in said


def test_modules_that_are_not_there_and_a_quantised_policy(work, here, tmp_path, bitsandbytes):
    with pytest.raises(UserError, match="Target modules .* not found"):
        here(argv(work, tmp_path / "none", "--lora_target_modules", "no_such_proj"))
    from transformers import BitsAndBytesConfig

    small = AutoModelForCausalLM.from_pretrained(
        work / "policy", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    small.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(work / "policy").save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="small is quantised: give the model it was made from"):
        here(argv(work, tmp_path / "out", "--model_name_or_path", tmp_path / "small"))


def test_frozen_weights_take_their_own_memory_alone():
    few = 0.04e9
    assert memory.states("zero2", 8e9, 1, few)[0] == pytest.approx(2 * 8e9 + 16 * few)
    assert memory.states("ddp", 8e9, 1, few, frozen=0.6)[0] == pytest.approx(0.6 * 8e9 + 16 * few)
    assert memory.states("zero3", 8e9, 8, few)[0] == pytest.approx((2 * 8e9 + 16 * few) / 8)
