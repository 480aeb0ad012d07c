#!/usr/bin/env bash
# PPO: the loop of run_loop.sh over two policies, the start and what PPO makes of it.
#
#   bash run_ppo.sh                                   Llama-3-8B by OpenRLHF on the GPUs there are
#   bash run_ppo.sh configs/ppo_tiny.yaml             tiny models by the small PPO of ppo/train_ppo.py, without a GPU
#   bash run_ppo.sh CONFIG --backend small --ppo.kl_coef 0.1 …    a key of the YAML, given here
#
#   --dry_run                 print each command, so that it can be pasted and run by hand
#   --check                   check settings, paths, GPUs, disk, templates; then stop
#   --num_gpus 8 --gpu_memory_gib 80    behind --check or --dry_run: plan for GPUs that are elsewhere
#   --stage STAGE             start at 0.evaluate (the start), 1.train or 1.evaluate
#   --stop_stage STAGE        stop behind it
#
# A second start continues: what is finished is skipped, what was cut off is taken up where it stopped. Relative paths in a
# YAML and in --key value are from this file's folder. --dry_run and --check make no environment, write nothing into the
# run and do not run the setup command. OpenRLHF's own environment, ppo_train, is made where it is to train.

train() { # POLICY I: policy I+1 by PPO on responses that it samples itself, scored by the reward models as it goes
  local trainer=("${everywhere[@]}" accelerate launch --config_file configs/ddp.yaml "${of_machines[@]}" --num_processes "${plan[num_processes]}" ppo/train_ppo.py) env=rlhflow
  wanted "$(($2 + 1)).train" && ! done_already "$next/model" || return 0
  [ "${plan[backend]}" = small ] || { trainer=(python ppo/openrlhf/run_openrlhf.py) env=ppo_train; }
  [ -z "${plan[own_cluster]}" ] || trainer=("${everywhere[@]}" python ppo/openrlhf/ray_cluster.py MACHINE "${plan[machines]}" HEAD PORT "${trainer[@]}")
  in_env "$env" "$next/logs/train.log" "${trainer[@]}" "$settings:ppo" --model_name_or_path "$1" \
    ${reward_models[0]:+--reward_name_or_path "${reward_models[@]}"} --dataset_name_or_path "${prompt_sets[@]}" --output_dir "$next/model" --seed "${plan[seed]}"
  [ "$mode$env" != dry_runppo_train ] || "$python" ppo/run.py plan "${arguments[@]}" | sed 's/^/# /' # what that would start
}

planner=ppo/run.py
source "$(dirname "${BASH_SOURCE[0]}")/run_loop.sh"
