# shellcheck shell=bash disable=SC2034,SC2154 # the drivers set and read variables too
# What run_loop.sh and run_ppo.sh share, to be sourced behind envs.sh: arguments, the hold on a run's folder, running a
# command, and the steps of a stage.
#
# A driver sets `thinker` (the Python that knows settings and what is left: loop/run.py or ppo/run.py), `again` (its own
# command) and `caller` (the folder it was started from), and defines `ordinal` (name of a stage → a number that orders it)
# and `train`. Then it calls, from top to bottom:
#
#   read_arguments "$@"   → config, options, dry_run, check, first, last
#   refuse_early KIND     what can be refused before any environment is made
#   start_thinking        find `driver`, the Python of rlhflow that $thinker runs on
#   hold RUN_DIR KIND     one driver at a time; what was started ends with it
#   set_up COMMAND        the settings' setup command
#   settle CONFIG         check everything, and write the settings down
#   make_ready NAME…      environments for what is left; --check ends here, and --dry_run makes none
#   do_stage I NAME       what is left of one stage
#   conclude              the table, and where the page is
#
# --check and --dry_run hold nothing, stop nothing and write nothing into the run; a dry run's settings go into a temporary folder.

source common/lock.sh

log_lines="${log_lines:-15}" # lines of a failed stage's log that are shown

say() { printf '[%(%H:%M:%S)T] %s\n' -1 "$*"; }

fail() { # STATUS MESSAGE…
  local status="$1"
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$status"
}

# ---- Arguments -------------------------------------------------------------------------------------------------------

options=() # passed on to $thinker
dry_run=no check=no first=0 last=0

read_arguments() { # ARGUMENTS…: the config, our own flags, and --key value for $thinker
  local chosen=no key='' # key: the --key whose value comes next
  while [ "$#" -gt 0 ]; do
    case "$1" in
      -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[-1]##*/}"; exit 0 ;;
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
    case "$1" in --dry_run | --check | --*=*) key='' ;; --*) key="$1" ;; *) [[ " --prompts --reward_name_or_path --eval_reward_model --report_to " == *" ${key:--} "* ]] || key='' ;; esac
    shift
  done
  [ "$caller" = "$PWD" ] || case "$config" in /*) ;; *) [ ! -f "$caller/$config" ] || config="$caller/$config" ;; esac
  first="$(ordinal "$stage")"
  last="$(ordinal "$stop_stage")"
  [ "$first" -le "$last" ] || fail 2 "--stage $stage comes behind --stop_stage $stop_stage"
}

refuse_early() { # KIND (loop, ppo): what the settings alone show, by any Python here that can read them
  local python near
  if [ ! -f "$config" ]; then
    near=("${config%.*}".y*ml) # a folder's own, of that name
    [ -f "${near[0]}" ] || near=("configs/$1"_*.yaml)
    fail 2 "no such config: $config; there $([ "${#near[@]}" -gt 1 ] && echo are || echo is): ${near[*]}"
  fi
  for python in "$(env_prefix rlhflow 2>/dev/null)/bin/python" python3 python; do # start_thinking says what is wrong with them
    if "$python" -c 'import sys, yaml; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" "$thinker" setup "$config" "${options[@]}" >/dev/null || exit
      return 0
    fi
  done # without one, the same is said behind the making of environments
}

# ---- Environments: --check, --dry_run and a finished run make none ---------------------------------------------------

start_thinking() { # enter rlhflow, one of older requirements if need be; made only where a start finds none at all
  local found status=0
  found="$(find_env rlhflow older)" || status=$?
  [ "$status" -lt 2 ] || exit "$status"
  if [ "$status" -eq 1 ]; then
    [ "$check" = no ] || check_machine vllm rlhflow || true # told before gigabytes are installed
    [ "$check$dry_run" = nono ] || { no_env rlhflow; exit 2; }
    make_envs vllm rlhflow || exit
    found="${env_made[rlhflow]}"
  fi
  enter_env "$found"
  driver="$(command -v python)" # also while another environment is active
}

check_envs() { # NAME…: in --check, what a start would make and what this machine lacks for it
  local name status
  for name in "$@"; do
    status=0
    find_env "$name" >/dev/null || status=$?
    [ "$status" -lt 2 ] || return 2
    [ "$status" -eq 0 ] || no_env "$name" foreign || return
    [ "$status" -eq 0 ] || echo "check: environment $name is not made yet, a start makes it from $(basename "$(env_requirements "$name")")" >&2
  done
  check_machine "$@"
}

make_ready() { # NAME…: those of the stages that are left
  if [ "$check" = yes ]; then
    check_envs "$@" || exit 2
    exit 0
  fi
  [ -n "$left" ] || say "every stage of $run_dir is done, nothing is left to do" >&2
  [ -n "$left" ] && [ "$dry_run" = no ] || return 0
  check_machine "$@" || exit 2
  make_for_run vllm rlhflow
  use_env rlhflow
  driver="$(command -v python)"
}

make_for_run() { # NAME…: as `run`, a signal is answered at once, and what was started ends with this script
  (exec {lock}>&-; export RLHF_RUN="$RUN_MARK"; make_envs "$@") &
  wait "$!" || exit 2
  make_envs "$@" # which finds them now
}

# What $thinker prints is evaluated into these.
judge=no report=no trackers=()
run_dir='' settings_dir='' setup_command='' processes=1 gpu_groups=() gold_function='' left='' steps=() answers=() serving='' server_settings=() ports=()

# ---- One driver at a time holds a run's folder -----------------------------------------------------------------------

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

writes() { [ "$check$dry_run" = nono ]; } # whether this start may write into the run

can_write() { # PATH: whether it, or the folder that it would be made in, can be written; writes nothing
  local path="$1"
  while [ ! -e "$path" ] && [ ! -L "$path" ]; do path="$(dirname "$path")"; done
  [ -d "$path" ] && [ -w "$path" ]
}

hold() { # RUN_DIR KIND: until this script ends, however it does
  if ! writes; then
    can_write "$1" || fail 2 "cannot write $1; give another --run_dir"
    exec {lock}</dev/null # nothing to hold
    return 0
  fi
  mkdir -p "$1" 2>/dev/null || fail 2 "cannot write $1; give another --run_dir"
  lock_file "$1/.lock" || fail 2 "another $2 is at work in $1; wait for it, stop it, or give another --run_dir"
  RUN_MARK="$(cd "$1" && pwd -P)" # what we start carries it in its environment, so that exactly that can be stopped
  trap stop_started EXIT
  trap 'trap - INT; printf "\nstopped; to continue: %s\n" "$again" >&2; exit 130' INT
  trap 'trap - TERM; printf "\nterminated; to continue: %s\n" "$again" >&2; exit 143' TERM
  stop_started
}

set_up() { # COMMAND: such as building the tiny models; quick where there is nothing to do
  [ -n "$1" ] && writes || return 0
  env RLHF_RUN="$RUN_MARK" bash -c "$1" >&2 {lock}>&- & # stdout is for commands and the table
  wait "$!" || fail 2 "the setup command failed: $1"
}

settle() { # CONFIG: check everything that can be known now, write the settings down, and ask what is left
  local text
  if [ "$check" = yes ]; then settings_dir=''
  elif [ "$dry_run" = yes ]; then settings_dir="$(mktemp -d "${TMPDIR:-/tmp}/rlhf-dry-run.XXXXXX")"
  else settings_dir="$run_dir"; fi
  text="$(RLHF_VLLM_ENV="$(env_prefix vllm)" "$driver" "$thinker" prepare "$settings_dir" "$1" "${options[@]}")"
  eval "$text"
}

# ---- Running a command -----------------------------------------------------------------------------------------------

enter() { # ENVIRONMENT: switch, or print how
  local found
  if [ "$dry_run" = no ]; then
    use_env "$1"
  elif ! found="$(find_env "$1")"; then
    echo "source ./envs.sh; make_envs $1; use_env $1"
  elif with_conda; then
    echo "conda activate ${found%%$'\t'*}; export PYTHONNOUSERSITE=1"
  else
    printf 'source %q\n' "${found#*$'\t'}/bin/activate"
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
  local k pid pids=() status=0 bad='' visible jobs
  jobs="$(sed -n 's/^\(job[0-9]*\):.*/\1/p' "$1" | paste -sd,)"
  enter vllm
  for k in "${!gpu_groups[@]}"; do
    visible=()
    [ "$dry_run" = no ] || [ "${#gpu_groups[@]}" -eq 1 ] || printf '(' # pasted, the shards run side by side too
    [ -z "${gpu_groups[k]}" ] || visible=(env "CUDA_VISIBLE_DEVICES=${gpu_groups[k]}")
    run "$logs/$name.$k.log" "${visible[@]}" python generation/get_hf2.py "$1:$jobs" \
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

launch() { # LOG SCRIPT YAML: by plain python, or one process per GPU
  local launcher=(python)
  [ "$processes" -eq 1 ] || launcher=(accelerate launch --multi_gpu --num_processes "$processes" --num_machines 1 --mixed_precision no --dynamo_backend no)
  run "$1" "${launcher[@]}" "${@:2}"
}

annotate() { # YAML [WHAT]
  local log="$logs/$name.${2:-rewards}.log"
  enter vllm
  launch "$log" annotate_data/get_rewards.py "$1" || failed annotation $? "$log"
}

divergence() { # YAML
  enter rlhflow
  launch "$logs/divergence.log" evaluation/divergence.py "$1" || failed divergence $? "$logs/divergence.log"
}

metrics() { # ITERATION
  local more=()
  [ -z "$gold_function" ] || more+=(--gold_function "$gold_function")
  [ "$judge" = no ] || more+=(--judge_sampled "$folder/heldout_sampled.judged.jsonl" --judge_greedy "$folder/heldout_greedy.judged.jsonl")
  enter rlhflow
  run "$logs/metrics.log" python evaluation/metrics.py --sampled "$folder/heldout_sampled.rewarded.jsonl" \
    --greedy "$folder/heldout_greedy.rewarded.jsonl" --output_dir "$folder/metrics.json" "${more[@]}" ||
    failed metrics $? "$logs/metrics.log"
  more=()
  [ "${#trackers[@]}" -eq 0 ] || more=(--report_to "${trackers[@]}")
  # What it sums up is on disk: a night's run does not end because an earlier iterate's file cannot be read.
  run "$logs/metrics.log" python evaluation/run_metrics.py --run "$run_dir" "${more[@]}" || say "note: the run was not summed up, see $logs/metrics.log"
}

refresh_report() { # a page that cannot be made ends nothing
  [ "$report" = yes ] || return 0
  run "$run_dir/report.log" "$driver" report/make_report.py "$run_dir" || say "note: the report was not made, see $run_dir/report.log"
}

do_stage() { # ITERATION NAME
  local began folder="$run_dir/iter$1" yamls="$settings_dir/iter$1" logs="$run_dir/iter$1/logs" name="$2" text step
  text="$("$driver" "$thinker" todo "$settings_dir" "$1" "$2")"
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
      generate) generate "$yamls/$name.yaml" ;;
      serve) serve ;;
      annotate) annotate "$yamls/$([ "$name" = evaluate ] && echo evaluate_rewards || echo annotate).yaml" ;;
      judge) annotate "$yamls/evaluate_judge.yaml" judge ;;
      divergence) divergence "$yamls/divergence.yaml" ;;
      train) train "$yamls/train.yaml" ;;
      metrics) metrics "$1" ;;
    esac
  done
  [ "$dry_run" = no ] || return 0
  printf '{"iteration": %d, "stage": "%s", "seconds": %d, "finished": "%(%Y-%m-%dT%H:%M:%S%z)T"}\n' \
    "$1" "$2" "$((SECONDS - began))" -1 >>"$run_dir/stages.jsonl"
  say "iteration $1, $2: $((SECONDS - began)) s"
  refresh_report
}

conclude() { # the table where an iterate has been evaluated, and the page
  [ "$dry_run" = no ] || { printf '# the settings that these commands read are in %s\n' "$settings_dir"; return 0; }
  if [ -n "$(find "$run_dir" -maxdepth 2 -path '*/iter*/metrics.json' 2>/dev/null)" ]; then
    "$driver" evaluation/run_metrics.py --run "$run_dir"
  else
    say "no iterate of $run_dir has been evaluated yet, so there is no table" >&2
  fi
  [ ! -f "$run_dir/report/index.html" ] || say "the page of this run: $run_dir/report/index.html" >&2
}
