#!/usr/bin/env bash
# Online iterative DPO: iterations × (generate → annotate → train → evaluate).
#
#   bash run_loop.sh                                  the Llama-3-8B recipe on the GPUs there are
#   bash run_loop.sh configs/loop_tiny.yaml           the same on tiny models, without a GPU
#   bash run_loop.sh CONFIG --iterations 5 --generation.K 4 …    a key of the YAML, given here
#
#   --dry_run                 print each command, so that it can be pasted and run by hand
#   --check                   check settings, paths, GPUs, memory, disk, templates; then stop
#   --stage I.S               start at stage S of iteration I: 1 generate, 2 annotate, 3 train, 4 evaluate
#   --stop_stage I.S          stop behind that stage; a bare S means iteration 1, 0.4 evaluates the start
#
# A second start continues: what is finished is skipped, what was cut off is taken up where it stopped. Relative paths in a
# YAML and in --key value are from this file's folder. --dry_run and --check too make the environments and run the setup command.

set -euo pipefail
caller="$PWD"
again="bash $(printf '%q' "$0")$([ "$#" -eq 0 ] || printf ' %q' "$@")"
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./envs.sh

log_lines="${log_lines:-15}" # lines of a failed stage's log that are shown

# ---- Arguments -------------------------------------------------------------------------------------------------------

config=configs/loop_llama3_8b.yaml
options=() # passed on to common/loop.py
dry_run=no check=no stage=0.4 stop_stage=999999.4

fail() { # STATUS MESSAGE…
  local status="$1"
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$status"
}

ordinal() { # I.S or S → a number that orders stages
  local name="$1" i=1 s="$1"
  case "$name" in *.*) i="${name%%.*}" s="${name#*.}" ;; esac
  case "$s" in generate) s=1 ;; annotate) s=2 ;; train) s=3 ;; evaluate) s=4 ;; esac
  [[ "$i" =~ ^[0-9]+$ && "$s" =~ ^[1-4]$ ]] ||
    fail 2 "stage $name: ITERATION.STAGE was expected, with STAGE 1 generate, 2 annotate, 3 train or 4 evaluate, for example 2.3"
  echo $((10#$i * 4 + s))
}

chosen=no key='' # key: the --key whose value comes next
while [ "$#" -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]##*/}"; exit 0 ;;
    --dry_run) dry_run=yes ;;
    --check) check=yes ;;
    --stage=* | --stop_stage=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --stage | --stop_stage)
      [ "$#" -ge 2 ] || fail 2 "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift ;;
    --*) options+=("$1") ;;
    *)
      if [ -n "$key" ]; then options+=("$1")
      elif [ "$chosen" = no ]; then config="$1" chosen=yes
      else fail 2 "unexpected argument $1; arguments are --key value"; fi ;;
  esac
  case "$1" in --dry_run | --check | --*=*) key='' ;; --*) key="$1" ;; *) [[ "$key" = --prompts || "$key" = --reward_name_or_path ]] || key='' ;; esac
  shift
done
[ "$caller" = "$PWD" ] || case "$config" in /*) ;; *) [ ! -f "$caller/$config" ] || config="$caller/$config" ;; esac
first="$(ordinal "$stage")"
last="$(ordinal "$stop_stage")"
[ "$first" -le "$last" ] || fail 2 "--stage $stage comes behind --stop_stage $stop_stage"

# ---- What can be refused before any environment is made --------------------------------------------------------------

[ -f "$config" ] || fail 2 "no such config: $config; there are: $(echo configs/loop_*.yaml)"
if [ "$(count_gpus)" -eq 0 ] && ! grep -Eiq '^without_gpu: *(true|yes|1)' "$config" &&
  [[ " ${options[*]-} " != *" --without_gpu"* ]]; then
  fail 2 "$config needs GPUs and none is visible here; the same loop on tiny models: bash run_loop.sh configs/loop_tiny.yaml"
fi

# ---- Environments ----------------------------------------------------------------------------------------------------

make_envs vllm rlhflow
use_env rlhflow
driver="$(command -v python)" # the Python of rlhflow, also while another environment is active
settings="$("$driver" common/loop.py setup "$config" "${options[@]}")"
run_dir='' setup_command='' iterations=0 processes=1 gpu_groups=() accelerate_config='' gold_function='' left='' keep_iterates='' steps=() answers=()
serving='' server_settings=() ports=()
eval "$settings"

# ---- One loop at a time holds a run's folder -------------------------------------------------------------------------

mkdir -p "$run_dir" 2>/dev/null || fail 2 "cannot write $run_dir; give another --run_dir"
exec {lock}>"$run_dir/.lock"
flock -n "$lock" || fail 2 "another loop is at work in $run_dir; wait for it, stop it, or give another --run_dir"
RUN_MARK="$(cd "$run_dir" && pwd -P)" # what we start carries it in its environment, so that exactly that can be stopped

stop_started() { # end what this run started, and what a killed driver of this run left behind
  local pid pids signal
  [ -z "$(find "$run_dir/servers" -name '*.server' 2>/dev/null)" ] ||
    stop_seconds=10 bash generation/register_server.sh stop "$run_dir/servers" >&2 {lock}>&- || true
  for signal in TERM KILL; do
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      pids="$(grep -lsxzF "RLHF_RUN=$RUN_MARK" /proc/[0-9]*/environ | cut -d/ -f3 || true)"
      [ -n "$pids" ] || return 0
      for pid in $pids; do kill -s "$signal" "$pid" 2>/dev/null || true; done
      sleep 1
    done
  done
}
trap stop_started EXIT
trap 'trap - INT; printf "\nstopped; to continue: %s\n" "$again" >&2; exit 130' INT
trap 'trap - TERM; printf "\nterminated; to continue: %s\n" "$again" >&2; exit 143' TERM
stop_started

if [ -n "$setup_command" ]; then
  env RLHF_RUN="$RUN_MARK" bash -c "$setup_command" >&2 {lock}>&- & # stdout is for commands and the table
  wait "$!" || fail 2 "the setup command failed: $setup_command"
fi
settings="$("$driver" common/loop.py prepare "$config" "${options[@]}")"
eval "$settings"
[ "$stage" = 0.4 ] || [ "$first" -le $((iterations * 4 + 4)) ] || fail 2 "--stage $stage: there are $iterations iterations"
[ "$check" = no ] || exit 0

# ---- Running a command -----------------------------------------------------------------------------------------------

say() { printf '[%(%H:%M:%S)T] %s\n' -1 "$*"; }

enter() { # ENVIRONMENT: switch, or print how
  if [ "$dry_run" = yes ]; then
    if with_conda; then echo "conda activate $1"; else printf 'source %q\n' "$(env_prefix "$1")/bin/activate"; fi
  else
    use_env "$1"
  fi
}

run() { # LOG COMMAND…: into the log; printed only, in a dry run
  local log="$1"
  shift
  if [ "$dry_run" = yes ]; then
    printf '%q ' "$@"
    echo
    return
  fi
  printf '$ %s\n' "${*@Q}" >>"$log"
  # In the background and waited for: a signal to this script is then answered at once, not when the stage has ended.
  # vLLM renames its processes; without SPT_NOENV the new name is written over the environment that the mark stands in.
  env RLHF_RUN="$RUN_MARK" SPT_NOENV=1 "$@" >>"$log" 2>&1 {lock}>&- &
  wait "$!"
}

failed() { # STEP STATUS LOG
  local line
  printf '\n--- last lines of %s\n' "$3" >&2
  { grep -v '^ *$' "$3" | tail -n "$log_lines" >&2; } || true
  line="$(awk '/^[$] /{line=""} /^error: /{line=$0} END{print line}' "$3" || true)" # of the last start alone
  printf -- '---\n%s\nlog: %s\nto continue: %s\n' "${line:-error: $1 ended with status $2}" "$3" "$again" >&2
  exit 1
}

# ---- The steps -------------------------------------------------------------------------------------------------------

generate() { # YAML: one process per GPU (or group of GPUs), then the shards of each output are merged
  local k pid pids=() status=0 bad='' visible
  enter vllm
  for k in "${!gpu_groups[@]}"; do
    visible=()
    [ "$dry_run" = no ] || [ "${#gpu_groups[@]}" -eq 1 ] || printf '(' # pasted, the shards run side by side too
    [ -z "${gpu_groups[k]}" ] || visible=(env "CUDA_VISIBLE_DEVICES=${gpu_groups[k]}")
    run "$logs/$name.$k.log" "${visible[@]}" python generation/get_hf2.py "$1" \
      --local_index "$k" --my_world_size "${#gpu_groups[@]}" {lock}>&- & # a subshell would hold the lock beyond our death
    pids+=("$!")
    [ "$dry_run" = no ] || { wait "$!"; [ "${#gpu_groups[@]}" -eq 1 ] || echo ') &'; }
  done
  [ "$dry_run" = no ] || [ "${#gpu_groups[@]}" -eq 1 ] || echo wait
  for k in "${!pids[@]}"; do
    pid="${pids[k]}"
    [ "$dry_run" = yes ] || wait "$pid" || { status=$?; bad="$k"; }
  done
  [ -z "$bad" ] || failed "generation shard $bad" "$status" "$logs/$name.$bad.log"
  for ((k = 0; k < ${#answers[@]}; k += 2)); do
    run "$logs/$name.merge.log" python generation/merge_data.py --base_path "${answers[k]}" --output_dir "${answers[k + 1]}" \
      --num_datasets "${#gpu_groups[@]}" || failed merge $? "$logs/$name.merge.log"
    # Every answer stands in the merged file; servers may have begun on it before the backend was changed.
    [ "$dry_run" = yes ] || rm -f -- "${answers[k]:?}"* "${answers[k + 1]}.partial"
  done
}

serve() { # API servers of one iterate answer each job in turn; they end here, or with this script
  local k status
  enter vllm
  run "$logs/$name.servers.log" env "${server_settings[@]}" "state_dir=$run_dir/servers" "log_dir=$logs" \
    bash generation/register_server.sh "$serving" || failed "start of servers" $? "$logs/$name.servers.log"
  for ((k = 0; k < ${#answers[@]}; k += 2)); do
    run "$logs/$name.client.log" python generation/gen_hf.py "${answers[k]}" --ports "${ports[@]}" || {
      status=$?
      printf "the servers' own logs: %s\n" "$logs"/server_*.log >&2
      failed "generation by servers" "$status" "$logs/$name.client.log"
    }
  done
  run "$logs/$name.servers.log" bash generation/register_server.sh stop "$run_dir/servers" ||
    failed "end of servers" $? "$logs/$name.servers.log"
}

annotate() { # YAML
  enter vllm
  local launch=(python)
  [ "$processes" -eq 1 ] || launch=(accelerate launch --multi_gpu --num_processes "$processes" --num_machines 1 --mixed_precision no --dynamo_backend no)
  run "$logs/$name.rewards.log" "${launch[@]}" annotate_data/get_rewards.py "$1" || failed annotation $? "$logs/$name.rewards.log"
}

train() { # YAML
  enter rlhflow
  run "$logs/train.log" accelerate launch --config_file "$accelerate_config" --num_processes "$processes" \
    dpo_iteration/run_dpo.py "$1" || failed training $? "$logs/train.log"
}

spent() { # ITERATION → seconds of its stages so far
  awk -v i="$1," '$2 == i {sum += $6} END {print sum + 0}' "$run_dir/stages.jsonl" 2>/dev/null || echo 0
}

metrics() { # ITERATION
  local gold=()
  [ -z "$gold_function" ] || gold=(--gold_function "$gold_function")
  enter rlhflow
  run "$logs/metrics.log" python report/metrics.py --sampled "$folder/heldout_sampled.rewarded.jsonl" \
    --greedy "$folder/heldout_greedy.rewarded.jsonl" --output_dir "$folder/metrics.json" \
    --seconds "$(($(spent "$1") + SECONDS - began))" "${gold[@]}" ||
    failed metrics $? "$logs/metrics.log"
}

do_stage() { # ITERATION NAME
  local began folder="$run_dir/iter$1" logs="$run_dir/iter$1/logs" name="$2" text step
  text="$("$driver" common/loop.py todo "$run_dir" "$1" "$2")"
  eval "$text"
  [ "${#steps[@]}" -gt 0 ] || return 0
  if [ "$dry_run" = yes ]; then
    if [ "$1" = "${planned:-}" ] && [[ "$2" = generate || "$2" = annotate ]]; then
      echo "# iteration $1, $2: done by the evaluation of iterate $(($1 - 1))"
      return 0
    fi
    [ "$2" != evaluate ] || planned=$(($1 + 1))
    echo "# iteration $1, $2"
  else
    mkdir -p "$logs"
    say "iteration $1, $2 …"
  fi
  began=$SECONDS
  for step in "${steps[@]}"; do
    case "$step" in
      generate) generate "$folder/$name.yaml" ;;
      serve) serve ;;
      annotate) annotate "$folder/$([ "$name" = evaluate ] && echo evaluate_rewards || echo annotate).yaml" ;;
      train) train "$folder/train.yaml" ;;
      metrics) metrics "$1" ;;
    esac
  done
  [ "$dry_run" = no ] || return 0
  printf '{"iteration": %d, "stage": "%s", "seconds": %d, "finished": "%(%Y-%m-%dT%H:%M:%S%z)T"}\n' \
    "$1" "$2" "$((SECONDS - began))" -1 >>"$run_dir/stages.jsonl"
  say "iteration $1, $2: $((SECONDS - began)) s"
}

# ---- The loop --------------------------------------------------------------------------------------------------------

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
  [ -z "$keep_iterates" ] || [ "$dry_run" = yes ] || [ "$number" -gt "$last" ] || "$driver" common/loop.py prune "$run_dir" "$i"
done
[ "$dry_run" = yes ] || "$driver" report/metrics.py --run "$run_dir"
