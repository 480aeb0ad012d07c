# shellcheck shell=bash
# How a driver (run_loop.sh, run_ppo.sh) starts what it names: in which environment, on which GPUs, into which log. To be
# sourced behind envs.sh.
#
#   begin PLAN ARGUMENTS…     settings into the array `plan` and the lists below it, the hold on the run's folder, all checks,
#                             the environments
#   wanted I.STAGE            whether --stage and --stop_stage leave this stage in
#   done_already FILE         whether an output is there; what exists is whole
#   step NAME POLICY I        call a step of the driver and write its seconds down
#   in_env ENV LOG COMMAND…   run a command; what it says goes into the log, and its failure ends the driver
#   tell SCRIPT RUN…          sum the run up where steps have done something since it was last told; a failure is only noted
#   serve LOG MODEL           servers of a policy, where none live; they never outlive this script
#   serve_no_more LOG         end them, where they live
#   shards ENV LOG COMMAND…   one process per group of GPUs, side by side and on all machines, each told its --local_index
#   prune I                   delete the weights that `keep_iterates` lets go
#   conclude                  the table, and where the page is
#
# PLAN is the Python that knows the settings (loop/plan.py, ppo/run.py). The driver defines `turns`, the loop itself, which
# is gone through in three modes: `count` finds out what is left, `run` runs it, `dry_run` prints it. --check and --dry_run
# hold nothing, stop nothing and write nothing into the run.

source common/lock.sh

log_lines="${log_lines:-15}"    # lines of a failed command's log that are shown
stop_limit="${stop_limit:-120}" # seconds that the command has which stops servers where this script is ended
declare -A plan=() # what PLAN printed, and its lists:
gpu_groups=()      # CUDA_VISIBLE_DEVICES of each process that generates here
each_gpu=()        # what starts one process per GPU: python, or accelerate launch …
everywhere=()      # what starts the command behind it on each machine; empty where this one is all
of_machines=()     # what accelerate is told of the others
shards_everywhere=() # what starts all processes that generate; empty where this machine is all
reward_models=()   # models that training is rewarded by
judges=()          # and those that only judge the held-out answers
prompt_sets=()     # all of them, for PPO and online training
trainer_env=()     # what gives online training its GPUs; empty without any
start_servers=() ask_servers=() stop_servers=() # of generation_backend servers
problems=()        # what is wrong with the settings by themselves
arguments=()       # what PLAN is called with
declare -A needed=()         # environments of what is left
mode=run serving='' leaves=() at='' worked=no news=no entered='' python='' again='' mark=''

say() { printf '[%(%H:%M:%S)T] %s\n' -1 "$*"; }

fail() { # MESSAGE…
  printf 'error: %s\n' "$*" >&2
  exit 2
}

wanted() { [[ " ${plan[stages]} " == *" $1 "* ]]; }

done_already() { # FILE, or the folder of a model, which is whole when its manifest says so
  [ ! -e "$1.pruned" ] || return 0
  [ "$mode" = run ] || [[ " ${leaves[*]} " != *" $1 "* ]] || return 0 # a command that is told before would leave it
  if [ -d "$1" ]; then grep -qs '"complete": true' "$1.manifest.json"; else [ -e "$1" ]; fi
}

# ---- Running a command -----------------------------------------------------------------------------------------------

enter() { # ENVIRONMENT: switch, or print how
  local found
  [ "$entered" != "$1" ] || return 0
  entered="$1"
  if [ "$mode" = run ]; then
    use_env "$1" || exit
  elif ! found="$(find_env "$1")"; then
    echo "${vllm_requirements:+$(shown "vllm_requirements=$vllm_requirements"); }source ./envs.sh; make_envs $1; use_env $1"
  elif with_conda; then
    echo "conda activate ${found%%$'\t'*}; export PYTHONNOUSERSITE=1"
  else
    printf 'source %q\n' "${found#*$'\t'}/bin/activate"
  fi
}

begins() { # ENVIRONMENT: whether its command is to be run now; said once a step
  needed[$1]=yes
  [ "$mode" != count ] || return 1
  [ "$worked" = yes ] || { if [ "$mode" = run ]; then say "$at …"; else echo "# $at"; fi; }
  worked=yes
  enter "$1"
}

shown() { # COMMAND…: as one would type it
  local word line=''
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]] || word="${word@Q}"
    line+=" $word"
  done
  printf '%s\n' "${line:1}"
}

start() { # LOG COMMAND…: in the background and waited for, so that a signal to this script is answered at once
  mkdir -p "$(dirname "$1")"
  printf '$ %s\n' "$(shown "${@:2}")" >>"$1"
  # vLLM renames its processes; without SPT_NOENV the new name is written over the environment that the mark stands in.
  # Where it has come to is kept in a file beside the log, for the report (common/progress.py).
  env RLHF_RUN="$mark" SPT_NOENV=1 RLHF_PROGRESS="${1%.log}.progress.json" RLHF_SEEN="$(seen_here "${@:2}")" "${@:2}" \
    >>"$1" 2>&1 {lock}>&- &
}

seen_here() { # COMMAND…: what it reads that this machine sees, a line each: other machines wait for the same (loop/seen.py)
  local word file more reads=yes words=()
  [ "${plan[sharing]-1}" -gt 1 ] || return 0
  for word in "$@"; do # not the launcher's, nor what the command itself makes, and removes
    case "$word" in loop/task.sh) words=() ;; --output_dir | --reference_cache) reads='' ;; --*) reads=yes ;; esac
    [ -z "$reads" ] || words+=("$word")
  done
  for word in "${words[@]}"; do
    [ -e "$word" ] || word="${word%:*}" # loop.yaml:generation
    [ -n "$word" ] && [ -e "$word" ] || continue
    more=0
    for file in "$word" "${word%.jsonl}.manifest.json" "$word"/*; do
      [ ! -e "$file" ] || [ "$((more += 1))" -gt 200 ] || printf '%s\n' "$file" # of a folder of data a part will do
    done
  done
}

made() { # COMMAND…: wait until this machine sees what it was to make by --output_dir
  local k outputs=() words=("$@")
  [ "${plan[sharing]-1}" -gt 1 ] || return 0
  for k in "${!words[@]}"; do
    [ "${words[k]}" != --output_dir ] || while [[ "${words[k + 1]---}" != --* ]]; do outputs+=("${words[k += 1]}"); done
  done
  [ "${#outputs[@]}" -eq 0 ] || waited "$python" loop/seen.py --made "${outputs[@]}"
}

in_env() { # ENVIRONMENT LOG COMMAND…
  begins "$1" || return 0
  if [ "$mode" = dry_run ]; then shown "${@:3}"; return; fi
  start "${@:2}"
  wait "$!" || failed "$2" "$?"
  made "${@:3}" || exit
}

shards() { # ENVIRONMENT LOG COMMAND…: NUMBER in LOG stands for that of the process. The others go on where one fails; here that is told at once
  local log="$2" k n="${#gpu_groups[@]}" visible command pids=() bad='' status=0
  begins "$1" || return 0
  if [ "${#shards_everywhere[@]}" -gt 0 ]; then
    command=("${shards_everywhere[@]}" "${@:3}" --local_index TASK --my_world_size "${plan[num_shards]}")
    if [ "$mode" = dry_run ]; then shown "${command[@]}"; return; fi
    for ((k = 0; k < plan[num_shards]; k++)); do # what they say is of this start, also where none begins
      [ ! -e "${log/NUMBER/$k}" ] || echo '$ on several machines' >>"${log/NUMBER/$k}"
    done
    RLHF_LOG="$log" start "${log/NUMBER/machines}" "${command[@]}"
    pids=("$!") # what tells failures starts others
    tell_failures "${pids[0]}" "$log"
    wait "${pids[0]}" || { status=$?; failed "$(worst "$log")" "$status"; }
    return
  fi
  for ((k = 0; k < n; k++)); do
    visible=()
    [ -z "${gpu_groups[k]}" ] || visible=(env "CUDA_VISIBLE_DEVICES=${gpu_groups[k]}")
    command=("${visible[@]}" "${@:3}" --local_index "$k" --my_world_size "$n")
    if [ "$mode" = dry_run ]; then
      if [ "$n" -eq 1 ]; then shown "${command[@]}"; else echo "($(shown "${command[@]}")) &"; fi
    else
      start "${log/NUMBER/$k}" "${command[@]}"
      pids+=("$!")
    fi
  done
  [ "$mode" != dry_run ] || [ "$n" -eq 1 ] || echo wait
  while [ "${#pids[@]}" -gt 0 ]; do # `wait -n` of bash 5.2 passes over those that have ended before it
    [ "${#pids[@]}" -eq 1 ] || sleep 0.2 {lock}>&-
    for k in "${!pids[@]}"; do
      [ "${#pids[@]}" -eq 1 ] || ! kill -0 "${pids[k]}" 2>/dev/null || continue
      wait "${pids[k]}" || { status=$? bad="$k"; }
      unset "pids[k]"
      [ "$bad" != "$k" ] || [ "${#pids[@]}" -eq 0 ] || say "note: process $k has failed, ${#pids[@]} go on; its log: ${log/NUMBER/$k}" >&2
    done
  done
  [ -z "$bad" ] || failed "${log/NUMBER/$bad}" "$status"
}

all_live() { # whether all servers live that were started
  local record pid
  for record in "${plan[run_dir]}"/servers/*.server; do
    [ "$mode" != run ] || { read -r pid _ <"$record" && kill -0 "$pid"; } 2>/dev/null || return 1
  done
}

serve() { # LOG MODEL: start its servers. A file says how they end, for this script or the next start
  [ "$serving" != "$mode" ] || all_live || serve_no_more "$1"
  [ "$serving" != "$mode" ] || return 0
  serving="$mode"
  [ "$mode" != run ] || { mkdir -p "${plan[run_dir]}/servers" && printf '%s\0' "${stop_servers[@]}" >"${plan[run_dir]}/servers/in_use"; }
  in_env vllm "$1" "${start_servers[@]}" "$2"
}

serve_no_more() { # LOG
  [ "$serving" = "$mode" ] || return 0
  serving=''
  in_env vllm "$1" "${stop_servers[@]}"
  [ "$mode" != run ] || rm -f -- "${plan[run_dir]}/servers/in_use"
}

remove() { # PREFIX…: files that begin so and are not needed any more
  local prefix
  for prefix in "$@"; do
    case "$mode" in run) rm -f -- "${prefix:?}"* ;; dry_run) echo "rm -f -- $(shown "$prefix")*" ;; esac
  done
}

tell_failures() { # PID LOG: each task of a launcher that has failed, as the launcher says it, at once; until it ends
  local line told=0 lines ours='^(srun: error: .*: tasks? ([0-9]+).*: |ray: task ([0-9]+) on .* ended with )'
  while kill -0 "$1" 2>/dev/null; do
    mapfile -t lines < <(awk '/^[$] /{n=0} {said[n++]=$0} END{for (k=0; k<n; k++) print said[k]}' "${2/NUMBER/machines}" | grep -E "$ours")
    sleep 0.5 {lock}>&-
    kill -0 "$1" 2>/dev/null || return 0 # that was the last one
    for line in "${lines[@]:told}"; do
      [[ "$line" =~ $ours ]] || continue
      say "note: ${line#srun: error: }, the others go on; its log: ${2/NUMBER/${BASH_REMATCH[2]}${BASH_REMATCH[3]}}" >&2
    done
    told="${#lines[@]}"
  done
}

worst() { # LOG: of the logs with a number for NUMBER, one whose last start ended in an error; else the launcher's
  local k
  for ((k = 0; k < plan[num_shards]; k++)); do
    [ -z "$(awk '/^[$] /{line=""} /^error: /{line=$0} END{print line}' "${1/NUMBER/$k}" 2>/dev/null)" ] || { echo "${1/NUMBER/$k}"; return; }
  done
  echo "${1/NUMBER/machines}"
}

failed() { # LOG STATUS
  local line servers="${plan[run_dir]-}/servers"
  local own=("$servers/logs"/*.log)
  printf '\n--- last lines of %s\n' "$1" >&2
  { grep -v '^ *$' "$1" | tail -n "$log_lines" >&2; } || true
  [ ! -e "$servers/in_use" ] || [ ! -e "${own[0]}" ] || printf "a server's own log: %s\n" "${own[@]}" >&2
  line="$(awk '/^[$] /{line=""} /^error: /{line=$0} END{print line}' "$1" || true)" # of the last start alone
  printf -- '---\n%s\nlog: %s\nto continue: %s\n' "${line:-error: $at: ended with status $2}" "$1" "$again" >&2
  exit 1
}

step() { # NAME POLICY I
  local began=$SECONDS
  at="policy $3: $1" worked=no
  [ "$1" != train ] || at="policy $3: train policy $(($3 + 1))"
  "$@"
  [ "$worked" = no ] || news=yes
  [ "$worked$mode" = yesrun ] || return 0
  [ -z "$(tail -c 1 "${plan[run_dir]}/stages.jsonl" 2>/dev/null)" ] || echo >>"${plan[run_dir]}/stages.jsonl" # a torn line
  printf '{"policy": %d, "step": "%s", "seconds": %d, "finished": "%(%Y-%m-%dT%H:%M:%S%z)T"}\n' \
    "$3" "$1" "$((SECONDS - began))" -1 >>"${plan[run_dir]}/stages.jsonl"
  say "$at: $((SECONDS - began)) s"
}

tell() { # SCRIPT RUN…: what cannot be done ends nothing
  local log="${plan[run_dir]}/report.log"
  [ "$news" = yes ] && begins rlhflow || return 0
  if [ "$mode" = dry_run ]; then shown python "$@"; return; fi
  start "$log" python "$@"
  wait "$!" || say "note: $(shown python "$@") failed, see $log"
}

chose() { # KEY VALUE: what RUN/best.json says; RUN/best is not there on a file system without links
  grep -qs "^ *\"$1\": $2,$" "${plan[run_dir]}/best.json"
}

got_worse() { # I: whether the loop is to end with policy I, by `stop_when` and what RUN/best.json says of it as the last one
  [ -n "${plan[stop_when]-}" ] && [ "$1" -gt 0 ] && chose worse true && chose last "$1" || return 1
  [ "$mode" = count ] || say "the loop ends here (stop_when): policy $1 is worse than an earlier one; ${plan[run_dir]}/best is the one to keep" >&2
}

prune() { # I: once policy I is there and measured, the weights before the last `keep_iterates`, never the start's
  local k old
  [ "$mode" = run ] && [ -n "${plan[keep_iterates]:-}" ] && done_already "${plan[run_dir]}/iter$1/model" || return 0
  for ((k = 0; k <= $1; k++)); do
    [ -e "${plan[run_dir]}/iter$k/metrics.json" ] || [ -z "${plan[heldout_prompts]}" ] || return 0
  done
  for ((k = 1; k <= $1 - plan[keep_iterates]; k++)); do
    old="${plan[run_dir]}/iter$k/model"
    [ -d "$old" ] && [ ! "$old" -ef "${plan[model_name_or_path]}" ] || continue
    ! chose iterate "$k" || continue
    : >"$old.pruned"
    rm -rf -- "$old"
    say "pruned $old (keep_iterates ${plan[keep_iterates]})"
  done
}

# ---- One driver at a time holds a run's folder -----------------------------------------------------------------------

stop_started() { # end what this run started, and what a killed driver of this run left behind
  local pid pids signal stopping in_use="${plan[run_dir]}/servers/in_use"
  if [ -s "$in_use" ]; then
    mapfile -d '' -t stopping <"$in_use"
    if stop_seconds=10 timeout "$stop_limit" "${stopping[@]}" >&2 {lock}>&-; then
      rm -f -- "$in_use"
    else
      say "note: the servers may still be there, this failed: $(shown "${stopping[@]}")" >&2
    fi
  fi
  for signal in TERM KILL; do
    for _ in {1..25}; do # loop/on_ray.py takes twenty to end what is on other machines
      pids="$(grep -lsxzF "RLHF_RUN=$mark" /proc/[0-9]*/environ | cut -d/ -f3 || true)"
      [ -n "$pids" ] || return 0
      for pid in $pids; do kill -s "$signal" "$pid" 2>/dev/null || true; done
      sleep 1
    done
  done
}

hold() { # RUN_DIR: until this script ends, however it does
  local path="$1"
  if [ "$mode" != run ]; then
    while [ ! -e "$path" ] && [ ! -L "$path" ]; do path="$(dirname "$path")"; done
    [ -d "$path" ] && [ -w "$path" ] || fail "cannot write $1; give another --run_dir"
    exec {lock}</dev/null # nothing to hold
    return 0
  fi
  mkdir -p "$1" 2>/dev/null && [ -w "$1" ] || fail "cannot write $1; give another --run_dir"
  lock_file "$1/.lock" || fail "another run is at work in $1; wait for it, stop it, or give another --run_dir"
  mark="$(cd "$1" && pwd -P)" # what we start carries it in its environment, so that exactly that can be stopped
  trap 'trap "" INT TERM HUP; stop_started; lock_no_more "${plan[run_dir]}/.lock"' EXIT # a second Ctrl-C would leave processes
  trap 'printf "\nstopped; to continue: %s\n" "$again" >&2; exit 130' INT
  trap 'printf "\nterminated; to continue: %s\n" "$again" >&2; exit 143' TERM
  trap 'printf "\nthe terminal or the job is gone; to continue: %s\n" "$again" >&2; exit 129' HUP # salloc sends it, too
  stop_started
}

beside() { # COMMAND…: of our own, in the background; its output on stderr, since stdout is for commands and the table
  ([ -z "${lock:-}" ] || exec {lock}>&-; [ -z "$mark" ] || export RLHF_RUN="$mark"; "$@") >&2 & # it ends with this script
}

waited() { # COMMAND…: the same, waited for, so that a signal is answered at once
  beside "$@"
  wait "$!"
}

# ---- Settings, checks, environments ----------------------------------------------------------------------------------

find_planner() { # → a Python that can read the settings before any environment is made; empty without one
  local candidate
  for candidate in "$(env_prefix rlhflow 2>/dev/null)/bin/python" python3 python; do
    ! "$candidate" -c 'import sys, yaml; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "$candidate"; return; }
  done
}

read_plan() { # PYTHON PLAN ARGUMENTS…: its lines KEY<TAB>VALUE into `plan`, and KEY[]<TAB>VALUE into the list KEY
  local lines key value
  lines="$("$1" "$2" values "${@:3}")" || exit
  # shellcheck disable=SC2034 # the driver reads them
  gpu_groups=() each_gpu=() everywhere=() of_machines=() shards_everywhere=() reward_models=() judges=() prompt_sets=() trainer_env=() start_servers=() ask_servers=() stop_servers=() problems=()
  while IFS= read -r value; do
    key="${value%%$'\t'*}" value="${value#*$'\t'}"
    case "$key" in
      *'[]') local -n values="${key%'[]'}" && values+=("$value") ;;
      *) plan[$key]="$value" ;;
    esac
  done <<<"$lines"
  export RLHF_MACHINES="${plan[sharing]}" # files of other machines are waited for (common/files.py)
  [ "${plan[gpus]}" -gt 0 ] || export DS_ACCELERATOR=cpu # DeepSpeed would warn at every start that it found none
  [ -n "${plan[ray]}" ] || return 0
  export RLHF_RAY_CLUSTER="${plan[ray]}"
  # as the cluster's machines want it, whatever this one has
  [ -n "$vllm_requirements" ] || vllm_requirements="${envs_root:?}/requirements-vllm$([ "${plan[gpus]}" -gt 0 ] || echo -cpu).txt"
}

enter_rlhflow() { # the checks run there: one of older requirements will do, and it is made only where there is none at all
  local found status=0
  found="$(find_env rlhflow older)" || status=$?
  [ "$status" -lt 2 ] || exit "$status"
  if [ "$status" -eq 1 ]; then
    [ "$mode" != check ] || check_machine vllm rlhflow || true # told before gigabytes are installed
    [ "$mode" = run ] || { no_env rlhflow; exit 2; }
    waited make_envs rlhflow || exit 2
    found="$(find_env rlhflow)"
    beside make_envs vllm # and the setup command; make_ready waits for it
  fi
  enter_env "$found"
  python="$(command -v python)" # also while another environment is active
}

check_envs() { # NAME…: in --check, what a start would make and what this machine lacks for it
  local name status
  for name in "$@"; do
    status=0
    find_env "$name" >/dev/null || status=$?
    [ "$status" -lt 2 ] || return 2
    [ "$status" -eq 0 ] || no_env "$name" foreign || return
    [ "$status" -eq 0 ] ||
      echo "check: environment $name is not made yet, a start makes it from $(basename "$(env_requirements "$name")")" >&2
  done
  [ -n "${plan[ray]}" ] || check_machine "$@" # there others do the work
}

make_ready() { # ENVIRONMENT…: of what is left; --check ends here, and --dry_run makes none
  if [ "$mode" = check ]; then
    [ -n "${plan[elsewhere]-}" ] || check_envs "$@" || exit 2
    exit 0
  fi
  [ "$#" -gt 0 ] || say "every stage of ${plan[run_dir]} is done, nothing is left to do$([ "$mode" != dry_run ] || echo '; --run_dir with a new folder shows all commands')" >&2
  [ "$#" -gt 0 ] && [ "$mode" = run ] || return 0
  [ -n "${plan[ray]}" ] || check_machine "$@" || exit 2
  waited make_envs "$@" || exit 2
  enter rlhflow
  python="$(command -v python)"
  say "to watch it in another terminal: $(shown "$python" report/watch.py "${plan[run_dir]}")" >&2
}

begin() { # PLAN ARGUMENTS…
  local script="$1" planner chosen left start=(bash "$0")
  [ -z "${RLHF_SUBMIT:-}" ] || read -ra start <<<"$RLHF_SUBMIT" # of configs/*.slurm: how a job is submitted
  again="$(shown "${start[@]}" "${@:2}")"
  for chosen in "${@:2}"; do
    case "$chosen" in
      -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$(basename "$0")"; exit 0 ;;
      --dry_run) mode=dry_run ;;
      --check) mode=check ;;
      *) arguments+=("$chosen") ;;
    esac
  done
  chosen="$mode"
  export RLHF_CALLER="$OLDPWD" # where a relative path of a config is from
  RLHF_RAY_PYTHON="$(command -v python3 || command -v python || true)" # before an environment is entered
  export RLHF_RAY_PYTHON
  planner="$(find_planner)"
  [ -n "$planner" ] || { enter_rlhflow; planner="$python"; }
  read_plan "$planner" "$script" "${arguments[@]}"
  if [ "$mode" = run ] && [ "${#problems[@]}" -gt 0 ]; then # --check tells them with all others
    printf 'error: %s\n' "${problems[@]}" >&2
    exit 2
  fi
  hold "${plan[run_dir]}"
  enter_rlhflow
  if [ -n "${plan[setup_command]:-}" ] && [ "$mode" = run ]; then
    waited bash -c "${plan[setup_command]}" || fail "the setup command failed: ${plan[setup_command]}"
    [ "${#start_servers[@]}" -eq 0 ] || read_plan "$python" "$script" "${arguments[@]}" # servers fit the model
  fi

  mode=count needed=()
  turns
  mode="$chosen" left="${!needed[*]}"
  RLHF_VLLM_ENV="$(env_prefix vllm)" "$python" "$script" "$([ "$mode" = run ] && echo write || echo check)" --left "$left" \
    "${arguments[@]}" || exit
  # shellcheck disable=SC2086
  make_ready $left
  if [ "$mode" = dry_run ] && [ -n "$left" ]; then
    shown cd "$PWD"
    enter rlhflow
    [ "${plan[sharing]}" -eq 1 ] || echo "export RLHF_MACHINES=${plan[sharing]}"
    [ -z "${plan[ray]}" ] || shown export ${RAY_ADDRESS:+"RAY_ADDRESS=$RAY_ADDRESS"} "RLHF_RAY_PYTHON=$RLHF_RAY_PYTHON"
    [ -z "${plan[setup_command]:-}" ] || shown bash -c "${plan[setup_command]}"
    shown python "$script" write "${arguments[@]}" # RUN/loop.yaml, which the commands read
  fi
}

conclude() { # the table where a policy has been measured, or none is to be, and the page
  local page="${plan[run_dir]}/report/index.html"
  [ "$mode" = run ] || return 0
  [ -z "${plan[report]-}" ] || [ -f "$page" ] || "$python" report/make_report.py "${plan[run_dir]}" >/dev/null ||
    say "note: the page could not be made" >&2
  if [ -z "${plan[heldout_prompts]-none}" ] || [ -n "$(find "${plan[run_dir]}" -maxdepth 2 -path '*/iter*/metrics.json' 2>/dev/null)" ]; then
    "$python" evaluation/run_metrics.py --run "${plan[run_dir]}"
  else
    say "no policy of ${plan[run_dir]} has been measured yet, so there is no table" >&2
  fi
  [ ! -f "$page" ] || say "the page of this run: $page" >&2
}
