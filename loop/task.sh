#!/usr/bin/env bash
# One task of a command that srun or loop/on_ray.py has started on several machines:
#
#   srun --nodes=2 --ntasks=8 --ntasks-per-node=4 bash loop/task.sh 2 python generation/get_hf2.py … --local_index TASK
#   srun --nodes=2 --ntasks=2 --ntasks-per-node=1 bash loop/task.sh all accelerate launch … --machine_rank MACHINE
#
# The first word says how many of the machine's GPUs are this task's: so many, by its number on the machine, or all. They are
# cut out of the machine's own CUDA_VISIBLE_DEVICES, which differ between the machines of one job. In the command, TASK is the
# number over all machines, MACHINE that of the machine, HEAD the address of machine 0 and PORT a port there.

set -euo pipefail

# shellcheck source=envs.sh
source "$(dirname "${BASH_SOURCE[0]}")/../envs.sh"

if [ -n "${RLHF_RAY-}" ]; then
  read -r _ task local machine head port <<<"$RLHF_RAY"
else
  task="${SLURM_PROCID?start it by srun or loop/on_ray.py}" local="$SLURM_LOCALID" machine="$SLURM_NODEID" head=''
  port="$((20000 + 3 * ((331 * SLURM_JOB_ID + SLURM_STEP_ID) % 3333)))" # and two more; jobs and steps on one machine must not meet
fi
if [ -n "${RLHF_LOG-}" ]; then # the driver's, with NUMBER for that of the task
  log="${RLHF_LOG/NUMBER/$task}"
  exec >>"$log" 2>&1
  export RLHF_PROGRESS="${log%.log}.progress.json"
fi

gpus="$1" there="$(count_gpus)"
shift
if [ "$gpus" != all ] && [ "$there" -gt 0 ]; then
  IFS=, read -r -a names <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((there - 1)))}"
  names=("${names[@]:0:there}")
  mine=("${names[@]:local * gpus:gpus}")
  if [ "${#mine[@]}" -lt "$gpus" ]; then
    envs_error "$(uname -n) has $there GPUs: none are left for its task $local of $gpus GPUs each; give machines alike, or num_shards"
    exit 2
  fi
  CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${mine[*]}")"
  export CUDA_VISIBLE_DEVICES
fi

command=()
for word in "$@"; do
  case "$word" in
    TASK) word="$task" ;;
    MACHINE) word="$machine" ;;
    PORT) word="$port" ;;
    HEAD)
      [ -n "$head" ] || head="$(scontrol show hostnames "$SLURM_STEP_NODELIST" | sed -n 1p)"
      word="$head" ;;
  esac
  command+=("$word")
done
[ -z "${RLHF_LOG-}" ] || printf '$ %s\n' "${command[*]}"
if [ -n "${RLHF_SEEN-}" ]; then # what the driver's machine sees of what the command names
  mapfile -t files <<<"$RLHF_SEEN"
  python loop/seen.py "${files[@]}"
fi
exec "${command[@]}"
