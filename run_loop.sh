#!/usr/bin/env bash
# Online iterative DPO: iterations × (generate → annotate → train → evaluate).
#
#   bash run_loop.sh                                  the Llama-3-8B recipe on the GPUs there are
#   bash run_loop.sh configs/loop_tiny.yaml           the same on tiny models, without a GPU
#   bash run_loop.sh CONFIG --iterations 5 --generation.K 4 …    a key of the YAML, given here
#
#   --dry_run                 print each command, so that it can be pasted and run by hand
#   --check                   check settings, paths, GPUs, memory, disk, templates; then stop
#   --num_gpus 8 --gpu_memory_gib 80    behind --check or --dry_run: plan for GPUs that are elsewhere
#   --stage I.S               start at stage S of iteration I: 1 generate, 2 annotate, 3 train, 4 evaluate
#   --stop_stage I.S          stop behind that stage; a bare S means iteration 1, 0.4 evaluates the start
#
# A second start continues: what is finished is skipped, what was cut off is taken up where it stopped. Relative paths in a
# YAML and in --key value are from this file's folder. --dry_run and --check make no environment, write nothing into the
# run and do not run the setup command.

set -euo pipefail
caller="$PWD"
again="bash $(printf '%q' "$0")$([ "$#" -eq 0 ] || printf ' %q' "$@")"
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./envs.sh
source loop/stages.sh # how a command is run, and the steps of generate, annotate and evaluate
thinker=loop/run.py

# ---- Arguments -------------------------------------------------------------------------------------------------------

config=configs/loop_llama3_8b.yaml stage=0.4 stop_stage=999999.4

ordinal() { # I.S or S → a number that orders stages
  local name="$1" i=1 s="$1"
  case "$name" in *.*) i="${name%%.*}" s="${name#*.}" ;; esac
  case "$s" in generate) s=1 ;; annotate) s=2 ;; train) s=3 ;; evaluate) s=4 ;; esac
  [[ "$i" =~ ^[0-9]+$ && "$s" =~ ^[1-4]$ ]] ||
    fail 2 "stage $name: ITERATION.STAGE was expected, with STAGE 1 generate, 2 annotate, 3 train or 4 evaluate, for example 2.3"
  echo $((10#$i * 4 + s))
}

read_arguments "$@"
refuse_early loop

# ---- Settings, and what is left to do --------------------------------------------------------------------------------

start_thinking
iterations=0 accelerate_config='' keep_iterates=''
settings="$("$driver" loop/run.py setup "$config" "${options[@]}")"
eval "$settings"
hold "$run_dir" loop
set_up "$setup_command"
settle "$config"
[ "$stage" = 0.4 ] || [ "$first" -le $((iterations * 4 + 4)) ] || fail 2 "--stage $stage: there are $iterations iterations"
make_ready vllm rlhflow

# ---- The loop --------------------------------------------------------------------------------------------------------

train() { # YAML
  enter rlhflow
  run "$logs/train.log" accelerate launch --config_file "$accelerate_config" --num_processes "$processes" \
    dpo_iteration/run_dpo.py "$1" || failed training $? "$logs/train.log"
}

# do_stage (loop/stages.sh) runs what is left of a stage: generate.yaml and annotate.yaml in environment vllm, train.yaml in
# rlhflow; evaluation answers and scores the held-out prompts, and with the same engine the next iteration's.
[ "$dry_run" = no ] || printf 'cd %q\n' "$PWD"
number=0
for ((i = 0; i <= iterations; i++)); do
  for name in generate annotate train evaluate; do
    number="$(ordinal "$i.$name")"
    [ "$i" -gt 0 ] || [ "$name" = evaluate ] || continue # iteration 0 is the starting policy: evaluated only
    if [ "$number" -ge "$first" ] && [ "$number" -le "$last" ] && [[ " $left " == *" $i.$name "* ]]; then
      do_stage "$i" "$name"
    fi
  done
  [ -z "$keep_iterates" ] || [ "$dry_run" = yes ] || [ "$number" -gt "$last" ] || "$driver" loop/run.py prune "$run_dir" "$i"
done
conclude
