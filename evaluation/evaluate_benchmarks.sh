#!/usr/bin/env bash
# Standard benchmarks of an iterate by lm-evaluation-harness on vLLM: makes environment lm_eval and runs evaluate_benchmarks.py.
#
#   bash evaluation/evaluate_benchmarks.sh --run runs/NAME --iterate 3
#   bash evaluation/evaluate_benchmarks.sh --run runs/NAME --iterate 3 --dry_run     print the harness's commands
#
# --help lists the rest. Relative paths are from the folder that it is started in.

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/envs.sh"
case " $* " in
  *" -h "* | *" --help "*) exec "$(find_python)" "$root/evaluation/evaluate_benchmarks.py" --help ;;
  *" --dry_run false "*) make_envs lm_eval ;;
  *" --dry_run"*) ;; # makes no environment
  *) make_envs lm_eval ;;
esac
use_env lm_eval
exec python "$root/evaluation/evaluate_benchmarks.py" "$@"
