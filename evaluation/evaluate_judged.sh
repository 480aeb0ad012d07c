#!/usr/bin/env bash
# The judged benchmarks of an iterate, AlpacaEval 2, Arena-Hard and MT-Bench: makes environment vllm and runs evaluate_judged.py.
#
#   bash evaluation/evaluate_judged.sh --run runs/NAME --iterate 3 --alpaca_eval mine/alpaca_eval.json
#   bash evaluation/evaluate_judged.sh … --dry_run     print the commands
#
# --help lists the rest. Relative paths are from the folder that it is started in.

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/envs.sh"
case " $* " in
  *" -h "* | *" --help "*) exec "$(find_python)" "$root/evaluation/evaluate_judged.py" --help ;;
  *" --dry_run false "*) make_envs vllm ;;
  *" --dry_run"*) ;; # makes no environment
  *) make_envs vllm ;;
esac
use_env vllm
exec python "$root/evaluation/evaluate_judged.py" "$@"
