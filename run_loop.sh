#!/usr/bin/env bash
# Online iterative DPO. A run is a list of policies: each one is sampled, its answers are annotated and measured, and the next
# policy is trained on the best and worst of its responses.
#
#   bash run_loop.sh                                  the Llama-3-8B recipe on the GPUs there are
#   bash run_loop.sh configs/loop_tiny.yaml           the same on tiny models, without a GPU
#   bash run_loop.sh CONFIG --iterations 5 --generation.K 4 …    a key of the YAML, given here
#
#   --dry_run                 print each command, so that it can be pasted and run by hand
#   --check                   check settings, paths, GPUs, memory, disk, templates; then stop
#   --num_gpus 8 --gpu_memory_gib 80    behind --check or --dry_run: plan for GPUs that are elsewhere
#   --stage I.STAGE           start at a stage of iteration I: generate, annotate, train or evaluate (or 1 to 4)
#   --stop_stage I.STAGE      stop behind it; 0.evaluate measures the start
#
# A second start continues: what is finished is skipped, what was cut off is taken up where it stopped. Relative paths in a
# YAML and in --key value are from this file's folder. --dry_run and --check make no environment, write nothing into the
# run and do not run the setup command.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./envs.sh
source loop/launch.sh

turns() { # of one policy after the other; policy 0 is the start
  local i policy previous
  run="${plan[run_dir]}" settings="$run/loop.yaml"
  for ((i = 0; i <= plan[iterations]; i++)); do
    [ "$i" -eq 0 ] && policy="${plan[model_name_or_path]}" || policy="$run/iter$i/model"
    here="$run/iter$i" next="$run/iter$((i + 1))"
    step sample "$policy" "$i"
    step annotate "$policy" "$i"
    step measure "$policy" "$i"
    tell evaluation/run_metrics.py --run "$run"
    [ -z "${plan[report]}" ] || tell report/make_report.py "$run"
    news=no
    ! got_worse "$i" || break
    step train "$policy" "$i"
    prune "$i"
    previous="$policy"
  done
  at='the servers of the run end' worked=no
  serve_no_more "$here/logs/servers.log"
}

sample() { # POLICY I: held-out answers, and the responses that the next policy is trained on; one start of the engine for each model
  local n=$(($2 + 1)) names model file files=()
  for names in ${plan[parts.$n]:-policy}; do # of each model that responses are of, as the mixture calls it: policy previous,start
    local outputs=() sections=() prompts=() K=() temperature=() iteration=() parts_of=()
    case "$names" in policy*) model="$1" ;; previous) model="$previous" ;; *) model="${plan[model_name_or_path]}" ;; esac
    if [ "$model" = "$1" ] && wanted "$2.evaluate"; then # -1: seeds that no iteration meets
      job "$here/heldout_sampled.generated.jsonl" heldout "${plan[heldout_prompts]}" "${plan[heldout.K]}" "${plan[heldout.temperature]}" -1
      job "$here/heldout_greedy.generated.jsonl" heldout "${plan[heldout_prompts]}" 1 0 -1
    fi
    if wanted "$n.generate" && ! done_already "$next/generated.jsonl"; then
      [ "$names" = "${plan[parts.$n]:-policy}" ] && file="$next/generated.jsonl" || file="$next/generated.${names%%,*}.jsonl"
      files+=("$file")
      job "$file" generation "${plan[prompts.$n]}" "${plan[generation.K]}" "${plan[generation.temperature]}" "$n"
    fi
    [ -z "${plan[parts.$n]-}" ] || read -ra parts_of <<<"--parts_of ${names//,/ }"
    [ "${#outputs[@]}" -eq 0 ] || answer "$model"
  done
  [ "${#files[@]}" -gt 1 ] || return 0
  in_env vllm "$here/logs/sample.join.log" python generation/join_parts.py --parts "${files[@]}" --output_dir "$next/generated.jsonl"
  remove "${files[@]%jsonl}"
}

job() { # OUTPUT SECTION PROMPTS K TEMPERATURE ITERATION: one more for the engine, if the output is not there
  done_already "$1" || { outputs+=("$1") sections+=("$2") prompts+=("$3") K+=("$4") temperature+=("$5") iteration+=("$6"); }
}

answer() { # MODEL: the jobs of one start
  local k parts=()
  if [ "${plan[generation_backend]}" = servers ]; then
    serve "$here/logs/servers.log" "$1"
    for k in "${!outputs[@]}"; do
      in_env vllm "$here/logs/client.log" python generation/gen_hf.py "$settings:${sections[k]}" --tokenizer "$1" "${ask_servers[@]}" \
        --dataset_name_or_path "${prompts[k]}" --output_dir "${outputs[k]}" \
        --K "${K[k]}" --temperature "${temperature[k]}" --iteration "${iteration[k]}" --seed "${plan[seed]}" "${parts_of[@]}"
    done
    serve_no_more "$here/logs/servers.log"
    return
  fi
  serve_no_more "$here/logs/servers.log" # of an online run, where an engine takes their place
  for k in "${outputs[@]}"; do parts+=("${k%/*}/shards/$(basename "$k" .jsonl).of${plan[num_shards]}."); done
  shards vllm "$here/logs/sample.NUMBER.log" python generation/get_hf2.py "$settings:$(IFS=,; echo "${sections[*]}")" \
    --model_name_or_path "$1" --dataset_name_or_path "${prompts[@]}" --output_dir "${parts[@]}" \
    --K "${K[@]}" --temperature "${temperature[@]}" --iteration "${iteration[@]}" --seed "${plan[seed]}" "${parts_of[@]}"
  for k in "${!outputs[@]}"; do
    in_env vllm "$here/logs/sample.merge.log" python generation/merge_data.py --base_path "${parts[k]}" --output_dir "${outputs[k]}" \
      --num_datasets "${plan[num_shards]}"
    remove "${parts[k]%of*}of" "${outputs[k]}.partial"
  done
}

annotate() { # POLICY I: rewards of its answers
  local files=()
  ! wanted "$2.evaluate" || files+=("$here"/heldout_{sampled,greedy})
  ! wanted "$(($2 + 1)).annotate" || files+=("$next/")
  rewards annotation rewarded "${files[@]}"
}

rewards() { # SECTION SUFFIX PREFIX…: score PREFIX.generated.jsonl into PREFIX.SUFFIX.jsonl where that is not there
  local file answers=() scores=() models=() log="$here/logs/annotate.log"
  for file in "${@:3}"; do
    [[ "$file" == */ ]] || file+=.
    done_already "$file$2.jsonl" || { answers+=("${file}generated.jsonl") scores+=("$file$2.jsonl"); }
  done
  [ "${#answers[@]}" -gt 0 ] || return 0
  if [ "$1" = annotation ]; then models=("${reward_models[@]}"); else models=("${judges[@]}") log="$here/logs/judge.log"; fi
  in_env vllm "$log" "${each_gpu[@]}" annotate_data/get_rewards.py "$settings:$1" \
    ${models[0]:+--reward_name_or_path "${models[@]}"} --dataset_name_or_path "${answers[@]}" --output_dir "${scores[@]}"
}

measure() { # POLICY I: what a second judge says, KL to the start, and the figures
  local more=()
  wanted "$2.evaluate" || return 0
  [ "${#judges[@]}" -eq 0 ] || rewards eval_annotation judged "$here"/heldout_{sampled,greedy}
  [ -z "${plan[divergence]}" ] || done_already "$here/divergence.json" || [ -e "$1.pruned" ] ||
    in_env rlhflow "$here/logs/divergence.log" "${each_gpu[@]}" evaluation/divergence.py "$settings:heldout" \
      --model_name_or_path "$1" --ref_model_name_or_path "${plan[model_name_or_path]}" \
      --dataset_name_or_path "$here/heldout_sampled.generated.jsonl" --output_dir "$here/divergence.jsonl"
  [ "$worked" = no ] && done_already "$here/metrics.json" && [[ " ${plan[stale]} " != *" $2 "* ]] && return
  [ -z "${plan[gold_function]}" ] || more+=(--gold_function "${plan[gold_function]}")
  [ "${#judges[@]}" -eq 0 ] || more+=(--judge_sampled "$here/heldout_sampled.judged.jsonl" --judge_greedy "$here/heldout_greedy.judged.jsonl")
  in_env rlhflow "$here/logs/metrics.log" python evaluation/metrics.py --sampled "$here/heldout_sampled.rewarded.jsonl" \
    --greedy "$here/heldout_greedy.rewarded.jsonl" --output_dir "$here/metrics.json" "${more[@]}"
}

declare -F train >/dev/null || train() { # POLICY I: policy I+1, by DPO on the best and worst of the responses; run_ppo.sh has another
  local reference="$1" n=$(($2 + 1)) data=("$next/rewarded.jsonl")
  wanted "$n.train" && ! done_already "$next/model" || return 0
  [ "${plan[reference]}" = previous ] || reference="${plan[model_name_or_path]}"
  [ "${plan[train_on]}" = new ] || mapfile -t data < <(seq -f "$run/iter%g/rewarded.jsonl" "$n")
  in_env rlhflow "$next/logs/train.log" "${everywhere[@]}" accelerate launch --config_file "${plan[accelerate_config]}" \
    "${of_machines[@]}" --num_processes "${plan[num_processes]}" dpo_iteration/run_dpo.py "$settings:training_args" --model_name_or_path "$1" \
    --ref_model_name_or_path "$reference" --train_dir "${data[@]}" --output_dir "$next/model" \
    --pairs_path "$next/pairs.jsonl" --reference_cache "$run/reference_logps" --seed "${plan[seed]}"
}

begin "${planner:-loop/plan.py}" "$@"
turns
conclude
