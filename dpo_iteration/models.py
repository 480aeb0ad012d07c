"""Policy, reference and tokenizer: loaded alike, checked against each other, and saved as the source had
them.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from common import models, shared_prompts
from common.chat import ChatTemplate
from common.cli import UserError, one_line
from common.manifest import beside, write_json
from dpo_iteration import adapters, card, saved
from dpo_iteration.arguments import Arguments
from dpo_iteration.losses import needs_reference
from dpo_iteration.rows import with_mismatched

if TYPE_CHECKING:
    from trl import DPOConfig, DPOTrainer

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_template(args: Arguments) -> ChatTemplate:
    """The policy's tokenizer and its chat template, used as `args` ask."""
    tokenizer = models.load_tokenizer(args.model_name_or_path, args.revision, args.trust_remote_code)
    return ChatTemplate(tokenizer, args)


def prepare_cpu(threads: int | None = None):
    """Without a GPU: `threads` a process, or all cores shared out; and no kernel compiled at the first
    start.
    """
    if threads or "LOCAL_WORLD_SIZE" in os.environ:  # the launcher gives each process one thread
        threads = threads or max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed import ops

        # DeepSpeed's shared-memory all-reduce takes a compiler and minutes at the first start; gloo is there
        # already.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def attention(name: str, args: Arguments, revision: str | None = None) -> str | None:
    """The attention of the padded computation; None: transformers' own choice."""
    return args.attn_implementation or models.choose_attention(
        load_config(name, args, revision), AutoModelForCausalLM, torch.cuda.is_available() and args.bf16
    )


def prepare_sharding(config: "DPOConfig"):
    """FSDP's dtypes; and without a GPU what lets FSDP and offloading run there.

    accelerate 1.15 would have FSDP round all that the model returns to bf16, so that log-probabilities that
    differ by less than 1% look equal, and add up gradients in bf16. Here weights are fp32 and computed with
    in bf16; the rest stays.

    Args:
        config: TRL's DPOConfig, before the trainer is made.
    """
    state, on_cpu = config.distributed_state, not torch.cuda.is_available()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if config.bf16:
            dtypes = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            config.fsdp_plugin_args = {"mixed_precision_policy": dtypes}
        if state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate knows FSDP on accelerators only and would train plain data parallel, without a word.
            state.distributed_type = DistributedType.MULTI_GPU
    if on_cpu and config.deepspeed_plugin is not None:
        # For offloaded optimizer states: DeepSpeed's own Adam takes a compiler and minutes at the first
        # start.
        config.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False


def weights_dtype(args: Arguments, config: "DPOConfig") -> torch.dtype:
    """fp32; with `bf16` bf16 where nothing is lost by it: under DeepSpeed, which keeps fp32 master weights,
    and with LoRA, which freezes these.
    """
    return (
        torch.bfloat16
        if args.bf16 and (config.deepspeed_plugin is not None or args.use_peft)
        else torch.float32
    )


def load_model(
    name: str, args: Arguments, config: "DPOConfig", revision: str | None = None
) -> torch.nn.Module:
    """A causal language model in `weights_dtype`, or in 4 bits.

    Raises:
        UserError: it cannot be loaded, or the checkpoint lacks weights (transformers would make up random
            ones).
    """
    model, loading = models.load_weights(
        AutoModelForCausalLM,
        name,
        revision=revision,
        trust_remote_code=args.trust_remote_code,
        dtype=weights_dtype(args, config),
        attn_implementation=attention(name, args, revision),
        **(config.model_init_kwargs or {}),
        **adapters.loading(args),
    )
    if loading["missing_keys"]:
        some = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"{name} lacks the weights {some}: it is no whole causal language model")
    if args.disable_dropout is not False:  # TRL, which does so by default, knows modules of dropout only
        models.without_dropout(model)
    adapters.without_packing(model)
    if getattr(model, "hf_quantizer", None) is not None and not args.load_in_4bit:
        raise UserError(
            f"{name} is quantised: give the model it was made from, with --use_peft true --load_in_4bit true"
        )
    return model


def load_config(name: str, args: Arguments, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model, without its weights, with what `model_init_kwargs` changes in it."""
    return models.load_config(name, revision, args.trust_remote_code, **(args.model_init_kwargs or {}))


def reason_against_sharing(args: Arguments) -> str:
    """Why the policy's architecture cannot compute a shared prompt once, as a phrase; empty where it can."""
    config = load_config(args.model_name_or_path, args, args.revision)
    try:
        model = models.without_weights(config, args.trust_remote_code)
    except Exception as error:
        return f"its architecture cannot be looked at: {one_line(error)}"
    reason = shared_prompts.reason_against(model)
    if reason:
        return reason
    # A pass without weights shows whether the layers hand the layout on, and what they ask of their
    # attention.
    model.train().set_attn_implementation(shared_prompts.NAME)
    if args.disable_dropout is not False:
        models.without_dropout(model)
    try:
        shared_prompts.hidden_states(model.base_model, shared_prompts.pack([[[1, 2, 3], [1, 2, 4]]], "meta"))
    except shared_prompts.Unsupported as error:
        return str(error)
    except Exception as error:
        if "shared_prompts" in str(error):
            return "its layers do not hand on what shared prompts need"
    return ""  # what else goes wrong goes wrong for want of weights


def has_auxiliary_loss(args: Arguments) -> bool:
    """Whether TRL adds a mixture of experts' load-balancing loss, which depends on all tokens of a pass."""
    shape = load_config(args.model_name_or_path, args, args.revision).get_text_config()
    return hasattr(shape, "output_router_logits") and getattr(shape, "router_aux_loss_coef", 0.0) != 0


def reference_name(args: Arguments) -> tuple[str, str | None]:
    """(hub name or folder of the reference, its revision); the policy's start where no loss looks at one."""
    other = args.ref_model_name_or_path not in (None, args.model_name_or_path)
    other = other and needs_reference(args.loss_type)
    return (args.ref_model_name_or_path, None) if other else (args.model_name_or_path, args.revision)


def check_models(args: Arguments, tokenizer: PreTrainedTokenizerBase, rows: dict):
    """Look at policy and reference before the weights of either are loaded.

    Raises:
        UserError: token ids without an embedding, rows longer than the model's positions, or a reference that
            has other tokens than the policy.
    """
    name, (reference, commit) = args.model_name_or_path, reference_name(args)
    every = with_mismatched([row for split in rows.values() for row in split])
    highest = max(
        max(row[key]) for row in every for key in ("prompt_ids", "chosen_ids", "rejected_ids") if row[key]
    )
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in every
    )
    if reference != name:
        try:
            vocabulary = models.load_tokenizer(reference, commit, args.trust_remote_code).get_vocab()
        except UserError:  # a folder of weights alone
            vocabulary = tokenizer.get_vocab()
        if vocabulary != tokenizer.get_vocab():
            raise UserError(f"{name} and {reference} have different vocabularies: one text, other tokens")
    for path, revision in {(name, args.revision), (reference, commit)}:
        config = load_config(path, args, revision)
        models.check_embeddings(path, highest, config.get_text_config().vocab_size)
        positions = models.positions(config)
        if positions and longest > positions:
            raise UserError(
                f"{path} has {positions} positions, a pair has {longest} tokens: lower --max_length"
            )


def check_master_weights(trainer: "DPOTrainer"):
    """Refuse to train weights that are bf16 only: at a learning rate of 5e-7 a step rounds away."""
    if trainer.is_deepspeed_enabled:
        deepspeed = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        bare = deepspeed.get("bf16", {}).get("bf16_master_weights_and_grads")
    else:
        bare = any(p.requires_grad and p.dtype != torch.float32 for p in trainer.model.parameters())
    if bare:
        raise UserError("no fp32 master weights, small steps round away: unset bf16_master_weights_and_grads")


@dataclass
class Source:
    """What came with the policy and is to go with the trained model, as the Trainer and TRL change their
    own.
    """

    tokenizer: object
    config: object
    generation_config: dict

    @classmethod
    def of(cls, policy: torch.nn.Module, template: ChatTemplate, args: Arguments) -> "Source":
        """Remember the three; set the policy's special tokens, which the Trainer else does with a warning."""
        generation_config = saved.generation_config(
            args.model_name_or_path, template, args.revision, card.sampling_stops(args)
        )
        tokenizer = template.tokenizer
        source = cls(copy.deepcopy(tokenizer), copy.deepcopy(policy.config), generation_config)
        policy.generation_config = GenerationConfig(**{key: getattr(tokenizer, key) for key in TOKENS})
        for key in TOKENS:
            setattr(policy.config, key, getattr(tokenizer, key))
        return source

    def save(self, trainer: "DPOTrainer", args: Arguments):
        """Write model (in the training's dtype), tokenizer, chat template, generation config; on all
        ranks.
        """
        folder, model = Path(trainer.args.output_dir), trainer.accelerator.unwrap_model(trainer.model)
        if args.use_peft:
            adapters.save(trainer, args, folder)
        else:
            if trainer.args.bf16 and not trainer.is_deepspeed_enabled:
                model.to(torch.bfloat16)
            for key in (*TOKENS, "use_cache"):
                setattr(model.config, key, getattr(self.config, key, None))
            # Else it pushes to the hub what is not whole yet.
            trainer.save_model(str(folder), _internal_call=True)
        if trainer.args.should_save:
            # What was logged is no part of the model.
            trainer.state.save_to_json(str(beside(folder, ".trainer_state.json")))
            self.tokenizer.save_pretrained(folder)  # the trainer's own may have been given a pad token
            write_json(folder / "generation_config.json", self.generation_config)
            saved.copy_companions(args.model_name_or_path, folder, args.revision)
            (folder / "training_args.bin").unlink(missing_ok=True)
