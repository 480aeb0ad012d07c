#!/usr/bin/env bash
# PPO: evaluate the starting policy → train by PPO → evaluate what came of it.
#
#   bash run_ppo.sh                                   Llama-3-8B by OpenRLHF on the GPUs there are
#   bash run_ppo.sh configs/ppo_tiny.yaml             tiny models by the small PPO of ppo/train_ppo.py, without a GPU
#   bash run_ppo.sh CONFIG --backend small --ppo.kl_coef 0.1 …    a key of the YAML, given here
#
#   --dry_run                 print each command, so that it can be pasted and run by hand
#   --check                   check settings, paths, GPUs, disk, templates; then stop
#   --num_gpus 8 --gpu_memory_gib 80    behind --check or --dry_run: plan for GPUs that are elsewhere
#   --stage STAGE             start at 0.evaluate (the start), 1.train or 1.evaluate
#   --stop_stage STAGE        stop behind that stage
#
# A second start continues: what is finished is skipped, what was cut off is taken up where it stopped. Relative paths in a
# YAML and in --key value are from this file's folder. --dry_run and --check make no environment, write nothing into the
# run and do not run the setup command. OpenRLHF's own environment, ppo_train, is made for training alone.

set -euo pipefail
caller="$PWD"
again="bash $(printf '%q' "$0")$([ "$#" -eq 0 ] || printf ' %q' "$@")"
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./envs.sh
source loop/stages.sh # how a command is run, and the steps of evaluation
thinker=ppo/run.py

# ---- Arguments -------------------------------------------------------------------------------------------------------

config=configs/ppo_llama3_8b.yaml stage=0.evaluate stop_stage=1.evaluate

ordinal() { # STAGE → a number that orders stages; the loop's numbers are understood too
  case "$1" in
    0.evaluate | 0.4) echo 1 ;;
    1.train | train | 1.3 | 3) echo 2 ;;
    1.evaluate | evaluate | 1.4 | 4) echo 3 ;;
    *) fail 2 "stage $1: one of 0.evaluate, 1.train and 1.evaluate was expected" ;;
  esac
}

read_arguments "$@"
refuse_early ppo

# ---- Settings, and what is left to do --------------------------------------------------------------------------------

start_thinking
backend=''
settings="$("$driver" ppo/run.py setup "$config" "${options[@]}")"
eval "$settings"
hold "$run_dir" "PPO run"
set_up "$setup_command"
settle "$config"
needed=(vllm rlhflow) # generation and annotation of the held-out prompts; the small PPO and metrics
[ "$backend" = small ] || [[ " $left " != *" 1.train "* ]] || needed+=(ppo_train) # made when it is trained
make_ready "${needed[@]}"

# ---- The three stages ------------------------------------------------------------------------------------------------

train() { # YAML
  if [ "$backend" = small ]; then
    enter rlhflow
    run "$logs/train.log" accelerate launch --config_file configs/ddp.yaml --num_processes "$processes" ppo/train_ppo.py "$1" ||
      failed training $? "$logs/train.log"
    return
  fi
  [ "$dry_run" = yes ] || make_for_run ppo_train
  enter ppo_train
  run "$logs/train.log" python ppo/openrlhf/run_openrlhf.py "$1" || failed training $? "$logs/train.log"
  [ "$dry_run" = no ] || "$driver" ppo/openrlhf/run_openrlhf.py "$1" --dry_run true | sed 's/^/# /' # what that would start
}

# do_stage (loop/stages.sh) runs what is left of a stage: evaluation answers the held-out prompts, scores the answers and
# sums them up; training reads RUN/iter1/train.yaml.
[ "$dry_run" = no ] || printf 'cd %q\n' "$PWD"
for name in 0.evaluate 1.train 1.evaluate; do
  number="$(ordinal "$name")"
  if [ "$number" -ge "$first" ] && [ "$number" -le "$last" ] && [[ " $left " == *" $name "* ]]; then
    do_stage "${name%%.*}" "${name#*.}"
  fi
done
conclude
