#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../evaluation/evaluate_benchmarks.sh" "$@" # moved
