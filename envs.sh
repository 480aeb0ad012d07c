# shellcheck shell=bash
# Environments, to be sourced: `source envs.sh; use_env vllm`.
#
#   make_envs NAME…   make what is missing; does nothing where all is there
#   use_env NAME      leave the active environment and enter this one
#   count_gpus        GPUs that may be used, 0 without any
#
# NAME is vllm, rlhflow, ppo_train or lm_eval. Where conda is installed they are conda environments of that name, elsewhere
# virtual environments under .envs/. An environment is stamped with the checksum of its requirements when the install is
# whole; a missing stamp of ours means that the install was cut off, and it is made again, as it is when the requirements
# change. An environment that this file did not make is never altered.

envs_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
envs_dir="${envs_dir:-$envs_root/.envs}"     # virtual environments, marks and install logs
env_manager="${env_manager:-auto}"           # auto, conda or venv
own_envs="${own_envs:-no}"                   # yes: use environments of these names that somebody else made, as they are
vllm_requirements="${vllm_requirements:-}"   # a file to use in place of the one that fits the machine
python_version="${python_version:-3.11}"     # of a new conda environment

envs_error() { printf 'error: %s\n' "$*" >&2; }

count_gpus() {
  local present
  command -v nvidia-smi >/dev/null || { echo 0; return; }
  present="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)"
  if [ "$present" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cvE '^ *(-1)? *$' || true
  else
    echo "$present"
  fi
}

env_requirements() { # NAME → its requirements file
  case "$1" in
    vllm)
      if [ -n "$vllm_requirements" ]; then echo "$vllm_requirements"
      elif [ "$(count_gpus)" -gt 0 ]; then echo "$envs_root/requirements-vllm.txt"
      else echo "$envs_root/requirements-vllm-cpu.txt"; fi ;;
    rlhflow) echo "$envs_root/requirements-train.txt" ;;
    ppo_train) echo "$envs_root/ppo/requirements-ppo.txt" ;;
    lm_eval) echo "$envs_root/requirements-eval$([ "$(count_gpus)" -gt 0 ] || echo -cpu).txt" ;;
    *) envs_error "no environment is called $1; there are vllm, rlhflow, ppo_train and lm_eval"; return 2 ;;
  esac
}

with_conda() {
  case "$env_manager" in
    conda) command -v conda >/dev/null ;;
    venv) return 1 ;;
    *) command -v conda >/dev/null ;;
  esac
}

env_prefix() { # NAME → folder of the environment, empty where conda has none of that name
  if with_conda; then
    conda env list | awk -v name="$1" '$1 == name {print $NF}'
  elif [ -e "$envs_dir/$1" ]; then
    echo "$envs_dir/$1"
  fi
}

find_python() { # the Python that virtual environments are made with: 3.11 where there is one, else a newer one
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  envs_error "no Python 3.11 to 3.13 was found; install one, or name it: PYTHON=/path/to/python bash …"
  return 2
}

env_stamp() { # REQUIREMENTS → the line that a whole install carries; files that it includes count
  local included
  included="$(sed -n 's/^-r //p' "$1")"
  printf '%s %s\n' "$(cat "$1" ${included:+"$(dirname "$1")/$included"} | sha256sum | cut -c1-64)" "$(basename "$1")"
}

install_env() { # NAME REQUIREMENTS: make it anew; output to the log
  local name="$1" requirements="$2" prefix python
  mkdir -p "$envs_dir"
  : >"$envs_dir/$name.making" # from here on what stands under this name is ours, even if we are cut off
  prefix="$(env_prefix "$name")"
  if with_conda; then
    [ -z "$prefix" ] || conda env remove -y -n "$name" || return
    conda create -y -n "$name" "python=$python_version" pip || return
    prefix="$(env_prefix "$name")"
  else
    [ -z "$prefix" ] || rm -rf -- "$prefix" || return
    python="$(find_python)" || return
    prefix="$envs_dir/$name"
    "$python" -m venv "$prefix" || return
  fi
  python="$prefix/bin/python"
  if [ "$(basename "$requirements")" = requirements-ppo.txt ]; then
    # flash-attn, which OpenRLHF cannot start without, compiles against the torch that is there: the one that vllm brings.
    "$python" -m pip install --disable-pip-version-check --no-input "$(grep '^vllm==' "$requirements")" packaging ninja wheel setuptools psutil || return
    "$python" -m pip install --disable-pip-version-check --no-input --no-build-isolation "$(grep '^flash-attn==' "$requirements")" || return
  fi
  "$python" -m pip install --disable-pip-version-check --no-input -r "$requirements" || return
  if [ "${requirements##*-}" = cpu.txt ]; then
    "$python" -m pip uninstall --disable-pip-version-check -y torchvision torchaudio torchcodec || return
  fi
  env_stamp "$requirements" >"$prefix/.rlhf-stamp" && rm -f -- "$envs_dir/$name.making"
}

make_env() { # NAME
  local name="$1" requirements prefix log status=0
  requirements="$(env_requirements "$name")" || return
  [ -f "$requirements" ] || { envs_error "no such requirements file: $requirements"; return 2; }
  prefix="$(env_prefix "$name")"
  if [ -n "$prefix" ] && [ ! -e "$envs_dir/$name.making" ]; then
    if [ ! -f "$prefix/.rlhf-stamp" ]; then
      [ "$own_envs" = yes ] && return
      envs_error "environment $name ($prefix) was not made by this project and is left alone;" \
        "use it as it is with own_envs=yes, or remove or rename it"
      return 2
    fi
    [ "$(cat "$prefix/.rlhf-stamp")" != "$(env_stamp "$requirements")" ] || return 0
  fi
  mkdir -p "$envs_dir" 2>/dev/null || { envs_error "cannot write $envs_dir"; return 2; }
  log="$envs_dir/$name.log"
  (
    flock 9
    # Another process may have made it while this one waited.
    prefix="$(env_prefix "$name")"
    [ -n "$prefix" ] && [ ! -e "$envs_dir/$name.making" ] && [ -f "$prefix/.rlhf-stamp" ] &&
      [ "$(cat "$prefix/.rlhf-stamp")" = "$(env_stamp "$requirements")" ] && exit 0
    echo "making environment $name from $(basename "$requirements") (log: $log)"
    install_env "$name" "$requirements" >"$log" 2>&1
  ) 9>"$envs_dir/$name.lock" || status=$?
  if [ "$status" -ne 0 ]; then
    grep -iE 'error|no space|not find' "$log" | tail -n 5 >&2
    envs_error "environment $name could not be made (log: $log); mend the cause and start the same command again"
    return "$status"
  fi
}

make_envs() { # NAME…: side by side, each waited for by its own id
  local name pid pids=() status=0
  for name in "$@"; do
    make_env "$name" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return "$status"
}

use_env() { # NAME
  local prefix restore
  prefix="$(env_prefix "$1")"
  [ -n "$prefix" ] || { envs_error "there is no environment $1; make it: source envs.sh; make_envs $1"; return 2; }
  restore="$(set +o | grep nounset)" # activation scripts use variables that are not set
  set +u
  if with_conda; then
    eval "$(conda shell.bash hook)"
    conda activate "$1"
  else
    # shellcheck disable=SC1091
    source "$prefix/bin/activate"
  fi
  eval "$restore"
}
