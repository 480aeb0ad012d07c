"""LoRA and QLoRA of run_dpo.py on micro models: what moves, what is merged and saved, resume, ZeRO-2, and the
refusals.
"""

import importlib.util
import json
import math

import micro
import pytest
import torch
import training
from safetensors.torch import load_file
from training import ROOT, furthest, launch, logged, read_json, start, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cli import UserError
from dpo_iteration import adapters
from dpo_iteration.checks import arguments
from dpo_iteration.fitting import METHODS

LORA = "--use_peft true --lora_r 4 --lora_alpha 12 --learning_rate 2e-3 --max_steps 4"
LN_2 = pytest.approx(math.log(2), abs=1e-6)  # the reference is the policy without adapters


@pytest.fixture
def lora(train):
    return lambda name, *more: train(name, LORA, *more)


def added(folder):
    """Weight name → alpha / r · B·A in float64, from the adapter's files alone."""
    config = read_json(folder / "adapter_config.json")
    tensors, sums = load_file(folder / "adapter_model.safetensors"), {}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            B = tensors[name.replace(".lora_A.", ".lora_B.")]
            key = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            sums[key] = config["lora_alpha"] / config["r"] * (B.double() @ A.double())
    return sums


def is_merged(folder, largest):
    """Whether a model is the policy plus its adapter, in every weight to `largest`; returns both."""
    policy, model, delta = (
        weights(folder.parent / "policy"),
        weights(folder),
        added(folder / "adapter"),
    )
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


def test_the_model_is_the_policy_plus_the_adapter(work, lora):
    plain = lora("plain", "--bf16 false")
    policy, model = is_merged(plain, 1e-6)
    still = {key for key in policy if torch.equal(policy[key], model[key])}
    assert policy.keys() - added(plain / "adapter") == still
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < still
    assert logged(plain)[0]["loss"] == LN_2
    assert read_json(plain / "config.json") == read_json(work / "policy" / "config.json")
    manifest = read_json(work / "plain.manifest.json")
    assert manifest["complete"] and manifest["settings"]["lora_r"] == 4
    checkpointed = lora("checkpointed", "--bf16 false --gradient_checkpointing true")
    assert furthest(weights(checkpointed), model) < 1e-6

    from peft import PeftModel

    assert {f.name for f in (plain / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    ids, base = torch.arange(20)[None], AutoModelForCausalLM.from_pretrained(work / "policy")
    wrapped, merged = PeftModel.from_pretrained(base, plain / "adapter"), loads(plain, torch.float32)
    assert (wrapped(ids).logits - merged(ids).logits).abs().max() < 1e-5


def test_an_overwritten_run_keeps_no_adapter(lora):
    model = lora("twice", "--bf16 false --max_steps 1")
    assert (model / "adapter").is_dir()
    lora("twice", "--bf16 false --max_steps 1 --use_peft false --lora_r 16 --lora_alpha 32 --overwrite")
    assert not (model / "adapter").exists()
    assert read_json(f"{model}.manifest.json")["settings"]["use_peft"] is False


def test_bf16_holds_the_policy_in_bf16_and_the_adapters_in_fp32(work, lora):
    """The base is frozen, so bf16 loses nothing while training; the sum is made in the source's fp32 and
    rounded once.
    """
    made = lora("bf16", "--gradient_checkpointing true")
    policy, _ = is_merged(made, 2**-8)
    model = loads(made, torch.bfloat16).state_dict()
    for key, update in added(made / "adapter").items():
        once = (policy[key].double() + update).float().bfloat16()
        # But for ties that fp32 and float64 break otherwise.
        assert (model[key] != once).float().mean() < 1e-3, key
    adapter = load_file(made / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert logged(made)[0]["loss"] == LN_2


def test_chosen_modules_a_tied_head_and_another_reference(work, lora, tmp_path):
    micro.make_policy(tmp_path / "policy", tie_word_embeddings=True)
    more = f"--model_name_or_path {tmp_path}/policy --ref_model_name_or_path {work}/policy --bf16 false"
    modules = "--lora_target_modules q_proj down_proj --lora_dropout 0.1 --disable_dropout false"
    made = lora(tmp_path / "some", more, modules)
    delta = added(made / "adapter")
    assert len(delta) == 4 and all(key.split(".")[-2] in ("q_proj", "down_proj") for key in delta)
    is_merged(made, 1e-6)
    loads(made, torch.float32)
    assert "lm_head.weight" not in weights(made)
    assert logged(made)[0]["loss"] != LN_2  # another model than the policy


def test_a_run_that_was_cut_off_ends_at_the_same_weights(lora, capsys):
    settings = "--bf16 false --max_steps 6 --save_steps 2 --keep_checkpoints"
    model = lora("cut", settings)
    files = [model / "model.safetensors", model / "adapter" / "adapter_model.safetensors"]
    whole = [load_file(file) for file in files]
    for file in (*files, model / "checkpoint-6" / "trainer_state.json"):
        file.unlink()
    capsys.readouterr()
    lora("cut", settings)
    assert "checkpoint-4" in capsys.readouterr().out
    assert max(furthest(load_file(file), before) for file, before in zip(files, whole)) < 1e-6


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_zero_on_two_processes(work, stage):
    start(*training.argv(work, stage, LORA, "--gradient_checkpointing true"), launcher=launch(stage))
    is_merged(work / stage, 2**-8)
    loads(work / stage, torch.bfloat16)
    assert logged(work / stage)[0]["loss"] == LN_2


@pytest.mark.parametrize("avx512_bf16", [False, True])
def test_qlora_merges_into_the_unquantised_policy(lora, monkeypatch, avx512_bf16):
    """On either kind of CPU: bitsandbytes packs 4-bit weights in another way where it finds AVX512-BF16,
    which is stood in for.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: avx512_bf16)
    seen, keep = [], adapters.keep_fp32
    monkeypatch.setattr(adapters, "keep_fp32", lambda trainer: (keep(trainer), seen.append(trainer.model)))
    more = "--load_in_4bit true --bf16 false --gradient_checkpointing true"
    made = lora(f"qlora_{avx512_bf16}", more)
    [model] = seen
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and all(".lora_" in name for name in trained)
    is_merged(made, 1e-6)
    loads(made, torch.float32)
    assert logged(made)[0]["loss"] == LN_2


@pytest.mark.long
def test_qlora_on_two_processes(work):
    start(*training.argv(work, "qlora2", LORA, "--load_in_4bit true"), launcher=launch("zero2"))
    is_merged(work / "qlora2", 2**-8)
    assert logged(work / "qlora2")[0]["loss"] == LN_2


def refusal(**more):
    with pytest.raises(UserError) as caught:
        arguments({"model_name_or_path": "policy", "train_dir": "r.jsonl", "output_dir": "out"} | more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True}, "--load_in_4bit is of LoRA and has no effect alone: give --use_peft true"),
        ({"lora_target_modules": "q_proj"}, "--lora_target_modules is of LoRA"),
        ({"use_peft": True, "lora_r": 0}, "--lora_r 0 must be at least 1"),
        ({"use_peft": True, "lora_dropout": 1.0}, "from 0 to below 1"),
        ({"use_peft": True, "lora_dropout": 0.1}, "--disable_dropout false"),
        ({"use_peft": True, "lora_target_modules": ["q_proj", "lm_head"]}, "adapter would not be trained"),
        ({"use_peft": True, "lora_target_modules": ["model.embed_tokens"]}, "merging would change it too"),
        (
            {"use_peft": True, "lora_target_modules": ["all-linear", "q_proj"]},
            "give all-linear, or the names",
        ),
    ],
)
def test_refusals(settings, message):
    assert message in refusal(**settings)


@pytest.mark.parametrize("missing", ["peft", "bitsandbytes"])
def test_missing_packages_are_named(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert f"{missing} is not installed here" in refusal(use_peft=True, load_in_4bit=True)


@pytest.mark.parametrize("kind", ["ZeRO-3", "ZeRO-3 in a file", "FSDP"])
def test_qlora_where_weights_are_cut_up(monkeypatch, tmp_path, kind):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    launcher = {
        "ZeRO-3": {"DEEPSPEED_ZERO_STAGE": "3", "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
        "ZeRO-3 in a file": {"DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")},
        "FSDP": {"USE_FSDP": "true"},
    }
    for name, value in launcher[kind].items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    said = refusal(use_peft=True, load_in_4bit=True)
    assert f"does not work with {kind.split()[0]}" in said and "configs/zero2.yaml" in said


def test_modules_that_are_not_there_and_a_quantised_policy(work, lora, tmp_path):
    with pytest.raises(UserError, match="Target modules .* not found"):
        lora(tmp_path / "none", "--lora_target_modules no_such_proj")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True)
    small = AutoModelForCausalLM.from_pretrained(work / "policy", quantization_config=quantization)
    small.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(work / "policy").save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="small is quantised: give the model it was made from"):
        lora(tmp_path / "out", f"--model_name_or_path {tmp_path}/small")


def test_the_method_is_known_from_what_the_launcher_says(monkeypatch):
    """By accelerate's own functions, which make the environment of what it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda *_: False)
    for method in METHODS:
        words = [
            "--config_file",
            str(ROOT / "configs" / f"{method}.yaml"),
            "--num_processes",
            "2",
            "script.py",
        ]
        given, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        given.deepspeed_fields_from_accelerate_config = ""  # deepspeed_launcher's own
        made = prepare_deepspeed_cmd_env(given)[1] if given.use_deepspeed else prepare_multi_gpu_env(given)
        with monkeypatch.context() as patch:
            for key, value in made.items():
                if key.startswith("ACCELERATE_"):
                    patch.setenv(key, value)
            assert adapters.method_here() == method


def test_a_file_of_deepspeeds_own_says_the_stage(monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert adapters.method_here() == "zero2"
