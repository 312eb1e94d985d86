#!/usr/bin/env bash
# Trains the arms of one experiment in turns over several seeds, then compares them on one page; goes on where it was interrupted:
#     bash examples/compare.sh [--venv DIR] MODEL [--arms vanilla,fixed,adaptive,auto] [--seeds 1,2] [--out DIR] [--dry-run] [--steps N] [overrides]
# MODEL: qwen2.5-7b, qwen2.5-14b, llama3.1-8b-instruct, quickstart. Hardware, wall time and what has been run: the files in examples/settings.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=()
if [[ ${1:-} == --venv ]]; then setup=(--venv "${2:?--venv: give a folder}"); shift 2; fi
python=$(bash "$root/examples/setup.sh" "${setup[@]}")
exec "$python" "$root/examples/launcher/compare_arms.py" "$@"
