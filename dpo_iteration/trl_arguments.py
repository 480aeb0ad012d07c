"""The settings of TRL's DPOConfig that run_dpo.py passes on as they are given; None is TRL's own default.

Plain lists, because importing TRL takes seconds and a misspelt key is to be refused at once. A test compares
them with the DPOConfig that is installed: after a change of the pinned version, write here what it asks for.
Those that run_dpo.py has arguments of its own for are in arguments.py.
"""

import argparse
import dataclasses

import yaml

from common.cli import arg

SHAPE_THE_MODEL = {  # type → names
    bool: """
        average_tokens_across_devices fp16 bf16_full_eval fp16_full_eval tf32 torch_compile
        use_liger_kernel auto_find_batch_size logging_nan_inf_filter prediction_loss_only eval_on_start
        eval_do_concat_batches eval_use_gather_object batch_eval_metrics save_only_model save_on_each_node
        enable_jit_checkpoint load_best_model_at_end greater_is_better ignore_data_skip
        restore_callback_states_from_checkpoint full_determinism use_cpu dataloader_drop_last
        dataloader_in_order remove_unused_columns ddp_find_unused_parameters ddp_broadcast_buffers
        ddp_static_graph skip_memory_metrics do_train do_eval do_predict disable_dropout padding_free
        precompute_ref_log_probs use_weighting activation_offloading sync_ref_model
    """,
    int: """
        eval_accumulation_steps data_seed ddp_bucket_cap_mb local_rank dataset_num_proc
        precompute_ref_batch_size ref_model_sync_steps
    """,
    float: """
        adam_beta1 adam_beta2 adam_epsilon label_smoothing_factor neftune_noise_alpha eval_delay
        router_aux_loss_coef ld_alpha f_alpha_divergence_coef discopop_tau ref_model_mixup_alpha
    """,
    str: """
        optim_args optim_target_modules torch_compile_backend torch_compile_mode eval_strategy
        save_strategy metric_for_best_model parallelism_config dataloader_multiprocessing_context
        train_sampling_strategy length_column_name ddp_backend fsdp debug resume_from_checkpoint
        truncation_mode pad_to_multiple_of f_divergence_type pad_token
    """,
    dict: """
        lr_scheduler_kwargs gradient_checkpointing_kwargs liger_kernel_config accelerator_config
        fsdp_config deepspeed model_init_kwargs
    """,
    list[str]: "include_for_metrics label_names",
    list[float]: "loss_weights",
}
CHANGE_NO_WEIGHT = {  # what is logged and pushed, how data are read
    bool: """
        use_cache logging_first_step log_on_each_node disable_tqdm push_to_hub hub_private_repo
        hub_always_push dataloader_pin_memory dataloader_persistent_workers
    """,
    int: """
        torch_empty_cache_steps dataloader_num_workers dataloader_prefetch_factor ddp_timeout
    """,
    str: """
        logging_strategy include_num_input_tokens_seen log_level log_level_replica trackio_space_id
        trackio_bucket_id trackio_static_space_id hub_token hub_model_id hub_strategy hub_revision
    """,
}
# Of several types (8 or "auto"): taken as text, which `given` reads as YAML.
MIXED = {
    "debug",
    "include_num_input_tokens_seen",
    "optim_target_modules",
    "pad_to_multiple_of",
    "trackio_static_space_id",
}

TRLArguments = dataclasses.make_dataclass(
    "TRLArguments",
    [
        (name, kind | None, arg(None, argparse.SUPPRESS, shapes=settings is SHAPE_THE_MODEL))  # not in --help
        for settings in (SHAPE_THE_MODEL, CHANGE_NO_WEIGHT)
        for kind, names in settings.items()
        for name in names.split()
    ],
    kw_only=True,
)
NAMES = tuple(field.name for field in dataclasses.fields(TRLArguments))


def given(args: TRLArguments) -> dict:
    """{name: value} of the settings that were given, as DPOConfig takes them."""
    values = {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}
    return values | {name: yaml.safe_load(values[name]) for name in MIXED & values.keys()}
