# shellcheck shell=bash
# Environments, to be sourced: `source envs.sh; use_env vllm`.
#
#   make_envs NAME…   make what is missing; does nothing where all is there
#   use_env NAME      leave the active environment and enter this one
#   env_prefix NAME   its folder, empty where it is not made
#   count_gpus        GPUs that may be used, 0 without any
#
# NAME is vllm, rlhflow, ppo_train or lm_eval. Where conda is installed they are conda environments of that name, elsewhere
# virtual environments under .envs/. Without GPUs vllm and lm_eval are other environments, vllm-cpu and lm_eval-cpu.
#
# An environment is known by its stamp, the checksum and name of its requirements, which is written when the install is whole.
# Changed requirements make a new environment beside the old one, called vllm.1a2b3c4d after them. What is whole is never
# altered or removed: a run, another checkout or another machine may use it. An install that was cut off is cleared away.
# An environment that this file did not make is never altered, and used only with own_envs=yes.

[ -n "${BASH_VERSION:-}" ] || { echo "error: envs.sh is for bash: start bash first" >&2; return 2; }

envs_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
envs_dir="${envs_dir:-$envs_root/.envs}"     # virtual environments and install logs
case "$envs_dir" in /*) ;; *) envs_dir="$PWD/$envs_dir" ;; esac
env_manager="${env_manager:-auto}"           # auto, conda or venv
own_envs="${own_envs:-no}"                   # yes: use environments of these names that somebody else made, as they are
vllm_requirements="${vllm_requirements:-}"   # a file to use in place of the one that fits the machine
python_version="${python_version:-3.11}"     # of a new conda environment
oldest_driver=580                            # NVIDIA's, for the CUDA 13 builds that all requirements bring
declare -gA env_made=()                      # what make_envs found or made: NAME → "its own name<tab>its folder"
export PYTHONNOUSERSITE=1                    # packages in ~/.local are not part of an environment

envs_error() { printf 'error: %s\n' "$*" >&2; }

count_gpus() { # the same rule as visible_gpus in common/devices.py
  command -v nvidia-smi >/dev/null || { echo 0; return; }
  { nvidia-smi -L 2>/dev/null || true; } | awk -v set="${CUDA_VISIBLE_DEVICES+yes}" -v chosen="${CUDA_VISIBLE_DEVICES-}" '
    /^GPU / {present++}
    END {
      if (present && set) {
        # As CUDA does: what names no GPU hides itself and what stands behind it.
        for (last = split(chosen, names, ","); ++i <= last; count++) {
          gsub(/[ \t]/, "", names[i])
          if (names[i] !~ /^(GPU|MIG)-/ && (names[i] !~ /^[0-9]+$/ || names[i] + 0 >= present)) break
        }
        present = count
      }
      print present + 0
    }'
}

env_requirements() { # NAME → its requirements file
  local file
  case "$1" in
    vllm)
      if [ -n "$vllm_requirements" ]; then file="$vllm_requirements"
      elif [ "$(count_gpus)" -gt 0 ]; then file="$envs_root/requirements-vllm.txt"
      else file="$envs_root/requirements-vllm-cpu.txt"; fi ;;
    rlhflow) file="$envs_root/requirements-train.txt" ;;
    ppo_train) file="$envs_root/ppo/requirements-ppo.txt" ;;
    lm_eval) file="$envs_root/requirements-eval$([ "$(count_gpus)" -gt 0 ] || echo -cpu).txt" ;;
    *) envs_error "no environment is called $1; there are vllm, rlhflow, ppo_train and lm_eval"; return 2 ;;
  esac
  [ -f "$file" ] || { envs_error "no such requirements file: $file"; return 2; }
  echo "$file"
}

env_label() { # NAME REQUIREMENTS → name of a new environment
  case "$2" in *-cpu.txt) echo "$1-cpu" ;; *) echo "$1" ;; esac
}

env_stamp() { # REQUIREMENTS → the line that a whole install carries; files that it includes count
  local included
  included="$(sed -n 's/^-r //p' "$1")"
  printf '%s %s\n' "$(cat "$1" ${included:+"$(dirname "$1")/$included"} | sha256sum | cut -c1-64)" "$(basename "$1")"
}

with_conda() {
  case "$env_manager" in
    conda) return 0 ;; # list_envs says so where there is none
    venv) return 1 ;;
    *) command -v conda >/dev/null ;;
  esac
}

env_marks() { # folder of locks and of marks of what is being made; conda's names are shared by all checkouts
  if with_conda; then echo "${HOME:-$envs_dir}/.conda/online-rlhf"; else echo "$envs_dir"; fi
}

list_envs() { # a line "name<tab>folder" for each environment there is, whoever made it
  local folder listed
  if with_conda; then
    command -v conda >/dev/null ||
      { envs_error "env_manager=conda, but there is no conda command here: load it first (module load …, conda init bash), or say env_manager=venv"; return 2; }
    listed="$(conda env list)" || { envs_error "conda env list failed, see above"; return 2; }
    awk '!/^#/ && /\// {print $1 "\t" substr($0, index($0, "/"))}' <<<"$listed"
  else
    for folder in "$envs_dir"/*/; do
      [ ! -d "$folder" ] || printf '%s\t%s\n' "$(basename "$folder")" "${folder%/}"
    done
  fi
}

env_folder() { # its own name → its folder
  list_envs | awk -F '\t' -v name="$1" '$1 == name {print $2}'
}

find_env() { # NAME [older] → "its own name<tab>its folder"; status 1 where it is not made. older: one of older requirements does too
  local requirements label stamp envs own folder held older=''
  requirements="$(env_requirements "$1")" || return
  label="$(env_label "$1" "$requirements")"
  stamp="$(env_stamp "$requirements")"
  envs="$(list_envs)" || return 2
  while IFS=$'\t' read -r own folder; do
    case "$own" in "$label" | "$1" | "$label".*) ;; *) continue ;; esac
    held=''
    [ ! -f "$folder/.rlhf-stamp" ] || held="$(<"$folder/.rlhf-stamp")"
    if [ -z "$held" ]; then
      [ "$own_envs" = yes ] && [[ "$own" != "$label".* ]] && [ ! -e "$(env_marks)/$own.making" ] || continue
    elif [ "$held" != "$stamp" ]; then
      [ "${held#* }" != "${stamp#* }" ] || older="$own"$'\t'"$folder"
      continue
    fi
    printf '%s\t%s\n' "$own" "$folder"
    return
  done <<<"$envs"
  [ "${2:-}" = older ] && [ -n "$older" ] && echo "$older"
}

env_prefix() { # NAME → folder of the environment, empty where it is not made
  local found status=0
  found="$(find_env "$1")" || status=$?
  [ "$status" -lt 2 ] || return "$status"
  echo "${found#*$'\t'}"
}

no_env() { # NAME: say why there is none
  local requirements own folder
  requirements="$(env_requirements "$1")" || return
  while IFS=$'\t' read -r own folder; do
    if [ "$own" = "$(env_label "$1" "$requirements")" ] && [ ! -f "$folder/.rlhf-stamp" ] && [ ! -e "$(env_marks)/$own.making" ]; then
      envs_error "environment $own ($folder) was not made by this project and is left alone;" \
        "use it as it is with own_envs=yes, or remove or rename it"
      return 2
    fi
  done <<<"$(list_envs)"
  [ "${2:-}" = foreign ] && return
  envs_error "there is no environment $1 of $(basename "$requirements") here; make it: source $(printf '%q' "$envs_root")/envs.sh; make_envs $1"
  return 2
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

# ---- What the machine must have ----------------------------------------------------------------------------------------

cuda_compat() { # whether NVIDIA's cuda-compat package stands in for a newer driver
  local folder version
  while read -r folder; do
    version="$(readlink -f "$folder/libcuda.so.1" 2>/dev/null)" || continue
    version="${version##*/libcuda.so.}"
    [[ ! "${version%%.*}" =~ ^[0-9]+$ ]] || [ "${version%%.*}" -lt "$oldest_driver" ] || return 0
  done < <(tr ':' '\n' <<<"${LD_LIBRARY_PATH:-}"; ldconfig -p 2>/dev/null | sed -n 's|.*=> \(.*\)/libcuda\.so\.1$|\1|p')
  return 1
}

cuda_toolkit() { # → major version of the CUDA toolkit, found where torch looks for it; empty without one
  local nvcc home="${CUDA_HOME:-${CUDA_PATH:-}}"
  nvcc="$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)"
  [ -z "$home" ] || nvcc="$home/bin/nvcc"
  [ ! -x "$nvcc" ] || "$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p'
}

check_machine() { # NAME…: refuse what their GPU builds cannot run on, all reasons at once, before gigabytes are installed
  local driver python toolkit compiler="${CC:-gcc}" problems=()
  [ "$own_envs" = no ] || return 0
  if [ "$(count_gpus)" -gt 0 ]; then
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p || true)"
    [[ ! "${driver%%.*}" =~ ^[0-9]+$ ]] || [ "${driver%%.*}" -ge "$oldest_driver" ] || cuda_compat ||
      problems+=("the NVIDIA driver is $driver, and the CUDA 13 builds that are installed need $oldest_driver or newer: have it updated, or on data-centre GPUs install NVIDIA's cuda-compat-13 and put its folder into LD_LIBRARY_PATH")
    command -v "${compiler%% *}" >/dev/null || command -v clang >/dev/null ||
      problems+=("no C compiler is here, and Triton compiles GPU kernels when they are first used: install gcc")
    if ! with_conda; then # conda's Python brings its headers
      python="$(env_prefix rlhflow)"
      if [ -n "$python" ]; then python="$python/bin/python"; else python="$(find_python)" || return; fi
      "$python" -c 'import os, sysconfig
scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
raise SystemExit(not os.path.isfile(os.path.join(sysconfig.get_path("include", scheme), "Python.h")))' ||
        problems+=("$python has no Python.h, and Triton compiles GPU kernels when they are first used: install its headers (python3-dev), or name another Python: PYTHON=/path/to/python")
    fi
  fi
  if [[ " $* " == *" ppo_train "* ]]; then
    toolkit="$(cuda_toolkit)"
    [ "$toolkit" = 13 ] ||
      problems+=("ppo_train compiles flash-attn with the CUDA toolkit 13 (nvcc), and $([ -n "$toolkit" ] && echo "version $toolkit" || echo none) is here: install it, or name its folder: CUDA_HOME=/usr/local/cuda-13.0")
  fi
  [ "${#problems[@]}" -eq 0 ] || { printf 'error: %s\n' "${problems[@]}" >&2; return 2; }
}

# ---- Making ------------------------------------------------------------------------------------------------------------

env_maker() { # PID → "machine boot processes pid@start": a living process, as a mark names its maker; empty where it is none
  local line
  local -a field
  { read -r line <"/proc/$1/stat"; } 2>/dev/null || return 0
  read -r -a field <<<"${line##*) }" # behind the name: state … start
  [ "${field[0]}" = Z ] || echo "${HOSTNAME:-?} $(</proc/sys/kernel/random/boot_id) $(readlink /proc/self/ns/pid) $1@${field[19]}"
}

drop_env() { # NAME: one that we began to make
  if with_conda; then conda env remove -y -n "$1"; else rm -rf -- "${envs_dir:?}/$1"; fi
}

claim_env() { # LABEL REQUIREMENTS PID → a name that no environment has, marked as being made by this process
  local marks stamp own mark line folder pid here
  marks="$(env_marks)"
  stamp="$(env_stamp "$2")"
  for own in "$1" "$1.${stamp:0:8}" "$1.${stamp:0:8}."{2..9}; do
    mark="$marks/$own.making"
    if [ -e "$mark" ]; then
      line="$(<"$mark")" folder="$(env_folder "$own")"
      pid="${line##* }" pid="${pid%@*}"
      here="$(env_maker "$3")"
      if [ "${line% *}" != "${here% *}" ] || [ "$line" = "$(env_maker "$pid")" ]; then
        echo "note: ${folder:-$own} is being made elsewhere (${line%% *}), or was left half made; if nothing makes it, delete it and $mark" >&2
        continue
      fi
      # Its maker was killed.
      [ -z "$folder" ] || [ -f "$folder/.rlhf-stamp" ] || drop_env "$own" >/dev/null 2>&1 || continue
      rm -f -- "$mark"
    fi
    (set -C; : >"$mark") 2>/dev/null || continue
    # Looked at under our mark: another process marks before it begins, and takes its mark away when all is whole.
    if [ -n "$(env_folder "$own")" ]; then
      rm -f -- "$mark"
    elif env_maker "$3" >"$mark"; then
      echo "$own"
      return
    else
      rm -f -- "$mark"
      break
    fi
  done
  envs_error "no mark could be written for environment $1 in $marks"
  return 2
}

install_env() { # NAME REQUIREMENTS: make it; output to the log
  local name="$1" requirements="$2" prefix python pip
  local -x PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 # what a user's pip may be told to do everywhere
  if with_conda; then
    conda create -y -n "$name" "python=$python_version" pip || return
    prefix="$(env_folder "$name")"
  else
    python="$(find_python)" || return
    prefix="$envs_dir/$name"
    "$python" -m venv "$prefix" || return
  fi
  pip=("$prefix/bin/python" -m pip install --disable-pip-version-check --no-input)
  if [ "$(basename "$requirements")" = requirements-ppo.txt ]; then
    # flash-attn, which OpenRLHF cannot start without, compiles against the torch that is there: the one that vllm brings.
    "${pip[@]}" "$(grep '^vllm==' "$requirements")" packaging ninja wheel setuptools psutil || return
    FLASH_ATTN_CUDA_ARCHS="${FLASH_ATTN_CUDA_ARCHS:-$(gpu_architectures)}" \
      "${pip[@]}" --no-build-isolation "$(grep '^flash-attn==' "$requirements")" || return
  fi
  "${pip[@]}" -r "$requirements" || return
  if [ "${requirements##*-}" = cpu.txt ]; then
    "$prefix/bin/python" -m pip uninstall --disable-pip-version-check -y torchvision torchaudio torchcodec || return
  fi
  env_stamp "$requirements" >"$prefix/.rlhf-stamp.new" && mv -- "$prefix/.rlhf-stamp.new" "$prefix/.rlhf-stamp"
}

gpu_architectures() { # those of flash-attn that the GPUs here take, such as 80;90 (8.6 and 8.9 run what is made for 8.0)
  local found
  found="$({ nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } | sed -n 's/^\([0-9]*\)\.[0-9]*$/\10/p' | sort -nu | paste -sd ';')"
  echo "${found:-80;90;100;120}"
}

tell_older() { # NAME REQUIREMENTS: environments of the same requirements file that the new one takes the place of
  local own folder held how
  while IFS=$'\t' read -r own folder; do
    [ "$own" != "$1" ] && [ -f "$folder/.rlhf-stamp" ] || continue
    held="$(<"$folder/.rlhf-stamp")"
    [ "${held#* }" = "$(basename "$2")" ] || continue
    if with_conda; then how="conda env remove -n $own"; else how="rm -rf $(printf '%q' "$folder")"; fi
    echo "note: $own is of older requirements and kept for what may use it; when nothing does: $how"
  done <<<"$(list_envs)"
}

make_env() { # NAME
  local name="$1" requirements label marks maker own log status=0
  find_env "$name" >/dev/null || status=$?
  [ "$status" -eq 1 ] || return "$status"
  requirements="$(env_requirements "$name")" || return
  label="$(env_label "$name" "$requirements")" marks="$(env_marks)"
  no_env "$name" foreign || return
  { mkdir -p "$envs_dir" "$marks" && : >>"$marks/$label.lock"; } 2>/dev/null && [ -w "$envs_dir" ] ||
    { envs_error "environment $name is not made yet, and $envs_dir cannot be written; say envs_dir=/another/folder"; return 2; }
  log="$envs_dir/$label.log" status=0
  (
    flock -n 9 2>/dev/null || status=$?
    if [ "$status" -eq 1 ]; then # anything else: the file system has no locks, and the mark keeps two from making one and the same
      echo "waiting for another process, which makes environment $label (log: $log)" >&2
      flock 9
    fi
    status=0
    ! find_env "$name" >/dev/null || exit 0 # another process has made it while this one waited
    maker="$BASHPID"
    own="$(claim_env "$label" "$requirements" "$maker")" || exit
    echo "making environment $own from $(basename "$requirements") (log: $log)"
    install_env "$own" "$requirements" >"$log" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then
      why_not "$label" "$log"
      drop_env "$own" >>"$log" 2>&1
    fi
    rm -f -- "$marks/$own.making"
    [ "$status" -ne 0 ] || tell_older "$own" "$requirements"
    exit "$status"
  ) 9>>"$marks/$label.lock" || status=$?
  return "$status"
}

why_not() { # LABEL LOG: say why an install failed
  local free
  free="$(df -Pk "$envs_dir" | awk 'NR == 2 {print $4}')"
  { grep -iE 'error|no space|not find' "$2" | tail -n 5 >&2; } || true
  [ "${free:-1000000}" -gt 100000 ] || envs_error "the disk of $envs_dir is full"
  ! grep -q CondaToS "$2" ||
    envs_error "conda's default channels want their terms accepted: conda tos accept, or take conda-forge (conda config --add channels conda-forge), or env_manager=venv"
  envs_error "environment $1 could not be made (log: $2); mend the cause and start the same command again"
}

make_envs() { # NAME…: side by side, each waited for by its own id; Ctrl-C ends them
  local name found missing=() status=0
  for name in "$@"; do
    status=0
    found="$(find_env "$name")" || status=$?
    [ "$status" -lt 2 ] || return "$status"
    if [ "$status" -eq 0 ]; then env_made[$name]="$found"; else missing+=("$name"); fi
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  check_machine "${missing[@]}" || return
  (
    pids=() status=0
    trap 'trap - INT TERM; for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2>/dev/null; done; exit 130' INT TERM
    for name in "${missing[@]}"; do
      set -m # a group of its own: its processes would not know Ctrl-C otherwise
      make_env "$name" &
      pids+=("$!")
      set +m
    done
    for pid in "${pids[@]}"; do
      wait "$pid" || status=$?
    done
    exit "$status"
  ) || return
  for name in "${missing[@]}"; do
    env_made[$name]="$(find_env "$name")" || return
  done
}

# ---- Using -------------------------------------------------------------------------------------------------------------

use_env() { # NAME: what make_envs found in this shell, else what is there
  local found="${env_made[$1]:-}" status=0
  [ -n "$found" ] || found="$(find_env "$1")" || status=$?
  [ "$status" -ne 1 ] || no_env "$1" || return
  [ "$status" -eq 0 ] || return "$status"
  enter_env "$found"
}

enter_env() { # "its own name<tab>its folder"
  local prefix="${1#*$'\t'}" unset=+u
  [[ $- != *u* ]] || unset=-u # activation scripts use variables that are not set
  set +u
  if with_conda; then
    eval "$(conda shell.bash hook)"
    conda activate "${1%%$'\t'*}" || { set "$unset"; return 2; }
    # conda takes the place of its own last environment in PATH; a virtual environment in front of that would win.
    [ "$(command -v python)" = "$prefix/bin/python" ] || PATH="$prefix/bin:$PATH"
    unset VIRTUAL_ENV VIRTUAL_ENV_PROMPT
  else
    # shellcheck disable=SC1091
    source "$prefix/bin/activate" || { set "$unset"; return 2; }
  fi
  hash -r
  set "$unset"
}
