#!/usr/bin/env bash
# Start one OpenAI-compatible vLLM server per GPU (or group of GPUs) and return when all of them answer.
#
#   bash ./generation/register_server.sh RLHFlow/LLaMA3-SFT     # ports 8000, 8001, …; then generation/gen_hf.py
#   bash ./generation/register_server.sh stop                   # ends what was started, nothing else
#
# Every variable below can be set in front: gpus=0,1 tensor_parallel_size=2 bash ./generation/register_server.sh MODEL
# `stop` takes the state folder as its second argument where it is not the default.
set -euo pipefail

port="${port:-8000}"                                    # of the first server; the others follow
host="${host:-127.0.0.1}"                               # the address listened on
gpus="${gpus:-}"                                        # comma-separated; empty: all visible ones
tensor_parallel_size="${tensor_parallel_size:-1}"       # GPUs that hold one copy of the model together
servers="${servers:-}"                                  # empty: as many as the GPUs give, one without a GPU
max_model_len="${max_model_len:-}"                      # tokens of prompt and response; empty: the model's own
dtype="${dtype:-auto}"                                  # auto, bfloat16, float16, float32
gpu_memory_utilization="${gpu_memory_utilization:-0.9}" # share of a GPU's memory
kv_cache_gib="${kv_cache_gib:-}"                        # GiB of key-value cache; empty: what is left, 1 without a GPU
max_num_seqs="${max_num_seqs:-}"                        # responses decoded at once; empty: vLLM's own number
revision="${revision:-}"                                # branch, tag or commit of a model on the hub
engine_args="${engine_args:-}"                          # more arguments of vLLM's engine, JSON: '{"quantization": "fp8"}'
trust_remote_code="${trust_remote_code:-no}"            # yes: run Python code that comes with the model
deadline="${deadline:-1800}"                            # seconds until all servers must answer
stop_seconds="${stop_seconds:-30}"                      # grace period before SIGKILL, seconds
state_dir="${state_dir:-./data/servers}"                # which processes were started
log_dir="${log_dir:-$state_dir}"                        # server_PORT.log
python="${python:-python}"                              # of the environment `vllm`

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/common/lock.sh"
pids=()
ports=()

log() { echo "$(date +%H:%M:%S) $*"; }
fail() {
  echo "error: $*" >&2
  exit 2
}

# stat_of PID: "state parent group session … start", the fields of /proc/PID/stat behind the name; fails when gone.
stat_of() {
  local line
  { read -r line <"/proc/$1/stat"; } 2>/dev/null || return 1
  echo "${line##*) }"
}

# start_of PID: ticks after boot at which it started; with the boot's id it tells a process from a later one of its number.
start_of() {
  local -a field
  read -r -a field <<<"$(stat_of "$1")"
  [[ ${#field[@]} -gt 19 && ${field[0]} != Z ]] && echo "${field[19]}@$(</proc/sys/kernel/random/boot_id)"
}

# members GROUP: living processes of the group and session that the server with this pid leads.
members() {
  local dir
  local -a field
  for dir in /proc/[0-9]*; do
    read -r -a field <<<"$(stat_of "${dir#/proc/}" || true)"
    if [[ ${#field[@]} -gt 3 && ${field[0]} != Z && ${field[2]} == "$1" && ${field[3]} == "$1" ]]; then
      echo "${dir#/proc/}"
    fi
  done
}

# owned FILE: whether anything of the server recorded in FILE still lives; sets pid and start.
owned() {
  pid="" start="" boot="$(</proc/sys/kernel/random/boot_id)"
  read -r pid start _ <"$1" || return 1
  if [[ -d /proc/$pid && "$(start_of "$pid" || true)" ]]; then
    [[ "$(start_of "$pid" || true)" == "$start" ]]
  else # the server itself is gone; children that it left keep its group's number from being given away
    [[ "${start#*@}" == "$boot" && -n "$(members "$pid")" ]]
  fi
}

# end_recorded FILE…: end the servers recorded in these files, and wait until they are gone.
end_recorded() {
  local file pid start boot
  local -a living=() left
  for file in "$@"; do
    if owned "$file"; then
      kill -TERM -- "-$pid" 2>/dev/null || true
      living+=("$pid")
    fi
  done
  local until=$((SECONDS + stop_seconds)) signal=""
  while ((${#living[@]})); do
    left=()
    for pid in "${living[@]}"; do
      if [[ -n "$(members "$pid")" ]]; then left+=("$pid"); fi
    done
    living=("${left[@]}")
    if ((${#living[@]} && SECONDS >= until)); then
      [[ -z $signal ]] || fail "processes of group ${living[*]} do not end, not even when killed"
      signal=KILL until=$((SECONDS + stop_seconds))
      for pid in "${living[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
    fi
    if ((${#living[@]})); then sleep 0.2; fi
  done
  rm -f -- "$@"
}

stop_recorded() {
  local -a files
  local file pid start boot count=0
  shopt -s nullglob
  files=("$state_dir"/*.server)
  for file in "${files[@]}"; do
    if owned "$file"; then count=$((count + 1)); fi
  done
  if ((${#files[@]})); then end_recorded "${files[@]}"; fi
  log "stopped $count servers (recorded in $state_dir)"
}

# ask PORT PATH SECONDS [JSON]: the body of the answer; fails where there is none or an error.
ask() {
  "$python" - "http://$reach:$1$2" "$3" "${4:-}" <<'PYTHON' 2>/dev/null
import sys, urllib.request
url, seconds, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode() or None, {"Content-Type": "application/json"})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
print(opener.open(request, timeout=float(seconds)).read().decode())
PYTHON
}

# served PORT: the name of the model that answers there.
served() {
  ask "$1" /v1/models 5 | "$python" -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])' 2>/dev/null
}

# check_port PORT: refuse a port whose server of an earlier start still lives, or that somebody listens on, saying who.
check_port() {
  local pid start boot there="" taken=no
  if (exec 3<>"/dev/tcp/$reach/$1") 2>/dev/null; then taken=yes there="$(served "$1" || true)"; fi
  if [[ -f "$state_dir/$1.server" ]] && owned "$state_dir/$1.server"; then # its record is what ends it: keep that
    [[ $there ]] || fail "port $1 has a server of an earlier start that does not answer yet (process $pid):" \
      "wait for it, or end it with: bash $0 stop $state_dir"
    fail "port $1 already serves $there, started by this script:" \
      "use it as it is, or end it with: bash $0 stop $state_dir"
  fi
  [[ $taken == yes ]] || return 0
  fail "port $1 is in use${there:+, it serves $there} and was not started from $state_dir:" \
    "give another with port=… in front (--server_port of a driver)"
}

# start_server PORT GPU…: one server in a session of its own, so that it outlives this script and can be ended whole.
start_server() {
  local gpus environment=("${needed[@]}") options=(
    --model "$model"
    --served-model-name "$model"
    --host "$host"
    --port "$1"
    --dtype "$dtype"
    --generation-config vllm
    "${formats[@]}"
  )
  if [[ -n $max_model_len ]]; then options+=(--max-model-len "$max_model_len"); fi
  if [[ -n $max_num_seqs ]]; then options+=(--max-num-seqs "$max_num_seqs"); fi
  if [[ -n $revision ]]; then options+=(--revision "$revision" --tokenizer-revision "$revision"); fi
  if [[ $trust_remote_code == yes ]]; then options+=(--trust-remote-code); fi
  options+=("${more_options[@]}")
  if [[ -n $cache_bytes ]]; then options+=(--kv-cache-memory-bytes "$cache_bytes"); fi
  gpus="$(IFS=, && echo "${*:2}")"
  if [[ -n $gpus ]]; then
    environment+=(CUDA_VISIBLE_DEVICES="$gpus")
    options+=(--tensor-parallel-size "$tensor_parallel_size" --gpu-memory-utilization "$gpu_memory_utilization")
  else
    # As get_hf2.py does: a seeded request must not be split over two steps on a CPU, so whole prompts in one step.
    # Idle threads sleep: spinning ones cost a busy machine several times the work itself.
    environment+=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}")
    options+=(--enforce-eager --no-enable-chunked-prefill)
    if [[ -n $max_model_len ]]; then
      options+=(--max-num-batched-tokens "$((max_model_len > 4096 ? max_model_len : 4096))")
    fi
  fi
  setsid env "${environment[@]}" "$python" -m vllm.entrypoints.openai.api_server "${options[@]}" \
    >"$log_dir/server_$1.log" 2>&1 </dev/null {lock}>&- &
  pids+=("$!")
  ports+=("$1")
  echo "$! $(start_of "$!") $model" >"$state_dir/$1.server"
}

# stop_started: the way out of a start that failed or was interrupted.
stop_started() {
  local status=$? p files=()
  trap - EXIT
  for p in "${ports[@]}"; do files+=("$state_dir/$p.server"); done
  if ((${#files[@]})); then
    end_recorded "${files[@]}"
    for p in "${pids[@]}"; do wait "$p" 2>/dev/null || true; done
    log "stopped the ${#files[@]} servers that were started" >&2
  fi
  exit "$status"
}

# wait_ready: return when every server has answered a request of one token.
wait_ready() {
  local i waiting=("${!ports[@]}") left until=$((SECONDS + deadline))
  while ((${#waiting[@]})); do
    left=()
    for i in "${waiting[@]}"; do
      if ! start_of "${pids[i]}" >/dev/null; then
        tail -n 20 "$log_dir/server_${ports[i]}.log" >&2
        fail "the server on port ${ports[i]} ended at its start; its last lines are above," \
          "its log is $log_dir/server_${ports[i]}.log"
      fi
      if ask "${ports[i]}" /v1/completions 30 "$probe" >/dev/null; then
        log "http://$reach:${ports[i]} serves $model"
      else
        left+=("$i")
      fi
    done
    waiting=("${left[@]}")
    if ((${#waiting[@]} && SECONDS >= until)); then
      fail "no answer on port ${ports[waiting[0]]} after ${deadline}s;" \
        "see $log_dir/server_${ports[waiting[0]]}.log, or give deadline=… more seconds"
    fi
    if ((${#waiting[@]})); then sleep 1; fi
  done
}

model="${1:-}"
case "$model" in
  "" | -h | --help)
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    echo
    # The variables, from the lines that set them.
    sed -nE 's/^[a-z_]+="\$\{([A-Za-z_]+):-([^}]*)\}" +# (.*)$/\1=\2\t\3/p' "$0" | awk -F '\t' '{ printf "  %-34s %s\n", $1, $2 }'
    [[ -n $model ]] || fail "no MODEL given: a hub name or a folder"
    exit 0
    ;;
  stop)
    state_dir="${2:-$state_dir}"
    [[ $# -lt 2 || -d $state_dir ]] || fail "no folder $state_dir: give the state folder that the servers were started with"
    stop_recorded
    exit 0
    ;;
esac
[[ $# -le 1 ]] || fail "unexpected argument $2: settings stand in front, as in servers=2 bash $0 $1"

[[ ${kv_cache_gib:-1} =~ ^[0-9]*[.]?[0-9]+$ ]] || fail "kv_cache_gib=$kv_cache_gib is not a number"
for name in port tensor_parallel_size servers max_model_len max_num_seqs deadline stop_seconds; do
  [[ ${!name} =~ ^[0-9]{0,9}$ ]] || fail "$name=${!name} is not a whole number"
  if [[ ${!name} ]]; then printf -v "$name" %d "$((10#${!name}))"; fi # 08 is eight, not a broken octal number
done
((tensor_parallel_size >= 1)) || fail "tensor_parallel_size=$tensor_parallel_size: at least 1 was expected"
command -v "$python" >/dev/null || fail "no $python here: activate the environment vllm, or give python=… in front"
reach="$host"
[[ $host != 0.0.0.0 ]] || reach=127.0.0.1

# One start of Python checks what needs Python, and prints a line each: the visible GPUs, the usable cores, variables and
# flags of every engine, and then the words of engine_args.
found="$(PYTHONPATH="$root" "$python" - "$model" "$engine_args" <<'PYTHON'
import importlib.util, os, sys
from common import engine
from common.arguments import convert
from common.cli import UserError
from common.devices import visible_gpus
from common.models import check_model
try:
    check_model(sys.argv[1], "MODEL")
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"{sys.executable} has no vLLM: activate the environment vllm, or give python=… in front")
    more = convert("engine_args", sys.argv[2], dict) if sys.argv[2] else {}
    engine.check_engine_args(more, bool(visible_gpus()))
except UserError as error:
    sys.exit(f"error: {error}")
print(",".join(visible_gpus()))
print(len(os.sched_getaffinity(0)))
print(*(f"{key}={value}" for key, value in engine.variables(bool(visible_gpus())).items()))
print(*(word for key, value in engine.FORMATS.items() for word in (f"--{key.replace('_', '-')}", value)))
print(*engine.engine_flags(more), sep="\n")
PYTHON
)" || exit 2
more_options=()
{ read -r visible; read -r cores; read -r -a needed; read -r -a formats; mapfile -t more_options; } <<<"$found"
IFS=, read -r -a devices <<<"${gpus:-$visible}"
if ((${#devices[@]})); then
  [[ -n $visible ]] || fail "gpus=$gpus, but there is no GPU here"
  possible=$((${#devices[@]} / tensor_parallel_size))
  ((possible)) || fail "tensor_parallel_size=$tensor_parallel_size, but there are ${#devices[@]} GPUs (${devices[*]})"
  servers="${servers:-$possible}"
  ((servers <= possible)) ||
    fail "servers=$servers with $tensor_parallel_size GPUs each, but there are ${#devices[@]} GPUs (${devices[*]})"
else
  ((tensor_parallel_size == 1)) || fail "tensor_parallel_size=$tensor_parallel_size needs GPUs, there is none here"
  servers="${servers:-1}"
  kv_cache_gib="${kv_cache_gib:-1}"
fi
((servers >= 1)) || fail "servers=$servers: at least one was expected"
((port >= 1 && port + servers <= 65536)) || fail "port=$port with servers=$servers: ports go from 1 to 65535"
threads=$((cores / servers > 0 ? cores / servers : 1))
cache_bytes=""
if [[ -n $kv_cache_gib ]]; then cache_bytes="$(LC_ALL=C awk -v gib="$kv_cache_gib" 'BEGIN { printf "%d", gib * 2^30 }')"; fi

mkdir -p "$state_dir" "$log_dir" 2>/dev/null || fail "cannot write $state_dir or $log_dir; give another state_dir=… and log_dir=…"
# Of starts only: servers do not hold it, and stop ends a start that is at work.
lock_file "$state_dir/.lock" 5 || fail "another start is at work in $state_dir:" \
  "wait for it, end it with: bash $0 stop $state_dir, or give another state_dir=… and port=…"
for ((i = 0; i < servers; i++)); do check_port $((port + i)); done
probe="$("$python" -c 'import json, sys; print(json.dumps({"model": sys.argv[1], "prompt": [0], "max_tokens": 1}))' "$model")"
trap 'stop_started; lock_no_more "$state_dir/.lock"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for ((i = 0; i < servers; i++)); do
  start_server $((port + i)) "${devices[@]:i * tensor_parallel_size:tensor_parallel_size}"
done
log "starting $servers servers of $model from port $port on; logs in $log_dir"
wait_ready
trap - EXIT
lock_no_more "$state_dir/.lock"
log "ready; stop them with: bash $0 stop $state_dir"
