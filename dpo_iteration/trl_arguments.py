"""The settings of TRL's DPOConfig that run_dpo.py passes on as they are given; None is TRL's own default.

A plain list, because importing TRL takes seconds and a misspelt key is to be refused at once. A test compares
it with the DPOConfig that is installed: after a change of the pinned version, write here what it asks for.
Those that run_dpo.py has arguments of its own for are in arguments.py.
"""

import argparse
import dataclasses
import functools

import yaml

from common.cli import arg

passed_on = functools.partial(arg, None, argparse.SUPPRESS)  # not in --help; shapes=False: changes no weight
# Of several types (8 or "auto"): taken as text, which `given` reads as YAML.
MIXED = {
    "debug",
    "include_num_input_tokens_seen",
    "optim_target_modules",
    "pad_to_multiple_of",
    "trackio_static_space_id",
}


@dataclasses.dataclass(kw_only=True)
class TRLArguments:
    # of transformers' TrainingArguments
    lr_scheduler_kwargs: dict | None = passed_on()
    optim_args: str | None = passed_on()
    adam_beta1: float | None = passed_on()
    adam_beta2: float | None = passed_on()
    adam_epsilon: float | None = passed_on()
    optim_target_modules: str | None = passed_on()
    average_tokens_across_devices: bool | None = passed_on()
    label_smoothing_factor: float | None = passed_on()
    fp16: bool | None = passed_on()
    bf16_full_eval: bool | None = passed_on()
    fp16_full_eval: bool | None = passed_on()
    tf32: bool | None = passed_on()
    gradient_checkpointing_kwargs: dict | None = passed_on()
    torch_compile: bool | None = passed_on()
    torch_compile_backend: str | None = passed_on()
    torch_compile_mode: str | None = passed_on()
    use_liger_kernel: bool | None = passed_on()
    liger_kernel_config: dict | None = passed_on()
    use_cache: bool | None = passed_on(shapes=False)
    neftune_noise_alpha: float | None = passed_on()
    torch_empty_cache_steps: int | None = passed_on(shapes=False)
    auto_find_batch_size: bool | None = passed_on()
    logging_strategy: str | None = passed_on(shapes=False)
    logging_first_step: bool | None = passed_on(shapes=False)
    log_on_each_node: bool | None = passed_on(shapes=False)
    logging_nan_inf_filter: bool | None = passed_on()
    include_num_input_tokens_seen: str | None = passed_on(shapes=False)
    log_level: str | None = passed_on(shapes=False)
    log_level_replica: str | None = passed_on(shapes=False)
    disable_tqdm: bool | None = passed_on(shapes=False)
    trackio_space_id: str | None = passed_on(shapes=False)
    trackio_bucket_id: str | None = passed_on(shapes=False)
    trackio_static_space_id: str | None = passed_on(shapes=False)
    eval_strategy: str | None = passed_on()
    eval_delay: float | None = passed_on()
    prediction_loss_only: bool | None = passed_on()
    eval_on_start: bool | None = passed_on()
    eval_do_concat_batches: bool | None = passed_on()
    eval_use_gather_object: bool | None = passed_on()
    eval_accumulation_steps: int | None = passed_on()
    include_for_metrics: list[str] | None = passed_on()
    batch_eval_metrics: bool | None = passed_on()
    save_only_model: bool | None = passed_on()
    save_strategy: str | None = passed_on()
    save_on_each_node: bool | None = passed_on()
    enable_jit_checkpoint: bool | None = passed_on()
    push_to_hub: bool | None = passed_on(shapes=False)
    hub_token: str | None = passed_on(shapes=False)
    hub_private_repo: bool | None = passed_on(shapes=False)
    hub_model_id: str | None = passed_on(shapes=False)
    hub_strategy: str | None = passed_on(shapes=False)
    hub_always_push: bool | None = passed_on(shapes=False)
    hub_revision: str | None = passed_on(shapes=False)
    load_best_model_at_end: bool | None = passed_on()
    metric_for_best_model: str | None = passed_on()
    greater_is_better: bool | None = passed_on()
    ignore_data_skip: bool | None = passed_on()
    restore_callback_states_from_checkpoint: bool | None = passed_on()
    full_determinism: bool | None = passed_on()
    data_seed: int | None = passed_on()
    use_cpu: bool | None = passed_on()
    accelerator_config: dict | None = passed_on()
    parallelism_config: str | None = passed_on()
    dataloader_drop_last: bool | None = passed_on()
    dataloader_num_workers: int | None = passed_on(shapes=False)
    dataloader_pin_memory: bool | None = passed_on(shapes=False)
    dataloader_persistent_workers: bool | None = passed_on(shapes=False)
    dataloader_prefetch_factor: int | None = passed_on(shapes=False)
    dataloader_multiprocessing_context: str | None = passed_on()
    dataloader_in_order: bool | None = passed_on()
    remove_unused_columns: bool | None = passed_on()
    label_names: list[str] | None = passed_on()
    train_sampling_strategy: str | None = passed_on()
    length_column_name: str | None = passed_on()
    ddp_find_unused_parameters: bool | None = passed_on()
    ddp_bucket_cap_mb: int | None = passed_on()
    ddp_broadcast_buffers: bool | None = passed_on()
    ddp_static_graph: bool | None = passed_on()
    ddp_backend: str | None = passed_on()
    ddp_timeout: int | None = passed_on(shapes=False)
    fsdp: str | None = passed_on()
    fsdp_config: dict | None = passed_on()
    deepspeed: dict | None = passed_on()
    debug: str | None = passed_on()
    skip_memory_metrics: bool | None = passed_on()
    do_train: bool | None = passed_on()
    do_eval: bool | None = passed_on()
    do_predict: bool | None = passed_on()
    resume_from_checkpoint: str | None = passed_on()
    local_rank: int | None = passed_on()

    # of TRL's DPOConfig
    model_init_kwargs: dict | None = passed_on()
    router_aux_loss_coef: float | None = passed_on()
    disable_dropout: bool | None = passed_on()
    dataset_num_proc: int | None = passed_on()
    truncation_mode: str | None = passed_on()
    padding_free: bool | None = passed_on()
    pad_to_multiple_of: str | None = passed_on()
    precompute_ref_log_probs: bool | None = passed_on()
    precompute_ref_batch_size: int | None = passed_on()
    loss_weights: list[float] | None = passed_on()
    ld_alpha: float | None = passed_on()
    f_divergence_type: str | None = passed_on()
    f_alpha_divergence_coef: float | None = passed_on()
    use_weighting: bool | None = passed_on()
    discopop_tau: float | None = passed_on()
    activation_offloading: bool | None = passed_on()
    sync_ref_model: bool | None = passed_on()
    ref_model_mixup_alpha: float | None = passed_on()
    ref_model_sync_steps: int | None = passed_on()
    pad_token: str | None = passed_on()


NAMES = tuple(field.name for field in dataclasses.fields(TRLArguments))


def given(args: TRLArguments) -> dict:
    """{name: value} of the settings that were given, as DPOConfig takes them."""
    values = {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}
    return values | {name: yaml.safe_load(values[name]) for name in MIXED & values.keys()}
