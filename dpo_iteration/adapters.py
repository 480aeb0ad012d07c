"""LoRA and QLoRA: settings, adapters around the policy, and the plain model that training leaves.

LoRA (Hu et al. 2021, arXiv 2106.09685) trains W + (alpha / r)·B·A with W frozen; QLoRA (Dettmers et al. 2023,
arXiv 2305.14314) holds W in 4 bits meanwhile. Afterwards B·A is added to the policy's own weights, read once
more from where they came: what training held (bf16, 4 bits) is coarser, and under ZeRO-3 in pieces.
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel
    from trl import DPOTrainer

    from dpo_iteration.arguments import Arguments

SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit")
FOLDER = "adapter"  # in the model's folder; at its top, loaders would take the adapter for the model


def check(args: "Arguments"):
    """Refuse what cannot work, and settings without effect, before torch is imported."""
    if not args.use_peft:
        for field in dataclasses.fields(args):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory
            if field.name in SETTINGS and getattr(args, field.name) != (
                default() if callable(default) else default
            ):
                raise UserError(
                    f"--{field.name} is of LoRA and has no effect alone: give --use_peft true too"
                )
        return
    for key in ("lora_r", "lora_alpha"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)} must be at least 1")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora_dropout {args.lora_dropout} must be from 0 to below 1")
    if args.lora_dropout and args.disable_dropout is not False:
        raise UserError(
            "--lora_dropout has no effect: TRL switches all dropout off; give --disable_dropout false too"
        )
    check_targets(args.lora_target_modules)
    if importlib.util.find_spec("peft") is None:
        raise UserError("--use_peft: peft is not installed here; it is in requirements-train.txt")
    if args.load_in_4bit:
        sharded = shards_weights()
        if sharded:
            raise UserError(
                f"--load_in_4bit does not work with {sharded}, which would cut up packed 4-bit weights: take "
                "configs/zero2.yaml or ddp.yaml"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "--load_in_4bit: bitsandbytes is not installed here; it is in requirements-train.txt"
            )


def check_targets(names: list[str]):
    """Refuse target modules that LoRA cannot train here. `names`: list of name endings, or `all-linear`."""
    if not names or ("all-linear" in names and len(names) > 1):
        raise UserError(
            "--lora_target_modules: give all-linear, or the names of modules such as q_proj v_proj"
        )
    for name, why in (
        ("lm_head", "the loss reads lm_head's own weights, the adapter would not be trained"),
        ("embed_tokens", "where lm_head shares these weights, merging would change it too"),
    ):
        if any(given.endswith(name) for given in names):
            raise UserError(f"--lora_target_modules {name}: {why}; leave it out")


def method_here() -> str:
    """The method that the launcher's environment says, a key of memory.SHARES."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp2"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        stage = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage")
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE") == "cpu"
    if str(stage) not in ("1", "2", "3"):
        return "ddp"
    return "zero3_offload" if str(stage) == "3" and offload else f"zero{stage}"


def shards_weights() -> str | None:
    """FSDP or ZeRO-3, where the launcher's environment says so, else None."""
    return {"fsdp2": "FSDP", "zero3": "ZeRO-3", "zero3_offload": "ZeRO-3"}.get(method_here())


def lora_config(args: "Arguments") -> "LoraConfig | None":
    """What TRL's trainer is to wrap the policy in, or None."""
    if not args.use_peft:
        return None
    from peft import LoraConfig

    # A list holds the ends of names; one name alone as text would be a regular expression for whole names.
    targets = "all-linear" if args.lora_target_modules == ["all-linear"] else args.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        bias="none",
        revision=args.revision,
    )


def loading(args: "Arguments") -> dict:
    """Arguments with which `from_pretrained` quantises the weights, for policy and reference alike; else
    none.
    """
    if not args.load_in_4bit:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if args.bf16 else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": quantization}


def without_packing(model: "torch.nn.Module"):
    """Keep bitsandbytes from packing 4-bit weights anew for CPUs with AVX512-BF16, at a layer's first pass in
    evaluation.

    That layout computes in bf16 whatever was asked for, has no gradient when training goes on with the same
    weights, and cannot hold widths that are no multiples of the block size.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_fp32(trainer: "DPOTrainer"):
    """Back to fp32 with the adapters that TRL turned into bf16 (QLoRA's): small steps would round away.

    Under DeepSpeed they are left as they are: it keeps fp32 master weights itself.
    """
    if not trainer.is_deepspeed_enabled:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def save(trainer: "DPOTrainer", args: "Arguments", folder: Path):
    """Write the adapter to `folder`/adapter and the policy with the adapter merged to `folder`; on all ranks.

    One rank holds the whole policy in memory once more, in the dtype in which it came (fp32 where bf16 is
    off).
    """
    trainer.save_model(str(folder / FOLDER), _internal_call=True)  # gathers what ZeRO-3 has cut up
    if not trainer.args.should_save:
        return
    for file in (folder / FOLDER).iterdir():  # tokenizer and arguments stand with the model
        if not file.name.startswith("adapter_"):
            file.unlink()
    for file in folder.glob("adapter_*"):  # copied from a checkpoint that was pushed to the hub
        file.unlink()
    model = merged(args, folder / FOLDER)
    model.generation_config = trainer.accelerator.unwrap_model(trainer.model).generation_config
    model.save_pretrained(folder)


def merged(args: "Arguments", adapter: str | Path) -> "PreTrainedModel":
    """The policy's own weights with the adapter of the folder `adapter` added, summed in fp32 and rounded
    once.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would cut up this model too
    base = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        dtype="auto" if args.bf16 else torch.float32,
        **(args.model_init_kwargs or {}),
    )
    model = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu").merge_and_unload()
    return model.to(torch.bfloat16) if args.bf16 else model
