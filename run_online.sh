#!/usr/bin/env bash
# Online DPO: the loop of run_loop.sh, whose policies come from one training that is sampled from while it learns. vLLM servers
# live beside the trainer and take its weights every few optimizer steps (docs/online.md).
#
#   bash run_online.sh                                Llama-3-8B, half of the GPUs sample and half train
#   bash run_online.sh configs/online_tiny.yaml       tiny models, without a GPU
#   bash run_online.sh CONFIG --online.staleness 1 …  a key of the YAML, given here
#
#   --dry_run                 print each command, so that it can be pasted and run by hand
#   --check                   check settings, paths, GPUs, memory, disk, templates; then stop
#   --num_gpus 8 --gpu_memory_gib 80    behind --check or --dry_run: plan for GPUs that are elsewhere
#   --stage I.STAGE           start at 0.evaluate (the start), I.train or I.evaluate (policy I, after I × evaluate_every rounds)
#   --stop_stage I.STAGE      stop behind it
#
# A second start continues: what is finished is skipped, what was cut off is taken up where it stopped. Relative paths in a
# YAML and in --key value are from this file's folder. --dry_run and --check make no environment, write nothing into the
# run and do not run the setup command.

train() { # POLICY I: policy I+1, by the next rounds of the training, which its checkpoint continues
  local n=$(($2 + 1)) log="$next/logs/train.servers.log"
  wanted "$n.train" && ! done_already "$next/model" || return 0
  serve "$log" "${plan[model_name_or_path]}"
  in_env rlhflow "$next/logs/train.log" "${trainer_env[@]}" accelerate launch --config_file "${plan[accelerate_config]}" \
    --num_processes "${plan[training_processes]}" dpo_iteration/run_online.py "$settings:online" --generation "$settings:generation" \
    --annotation "$settings:annotation" --training_args "$settings:training_args" --model_name_or_path "${plan[model_name_or_path]}" \
    ${reward_models[0]:+--reward_name_or_path "${reward_models[@]}"} --dataset_name_or_path "${prompt_sets[@]}" "${ask_servers[@]}" \
    --rounds_dir "$run/online" --until_round "${plan[until.$n]}" --output_dir "$next/model" --seed "${plan[seed]}"
  if [ -n "${plan[servers_stay]}" ]; then
    leaves+=("$next"/heldout_{sampled,greedy}.generated.jsonl)
  else
    serve_no_more "$log"
  fi
}

planner=loop/online_plan.py
source "$(dirname "${BASH_SOURCE[0]}")/run_loop.sh"
