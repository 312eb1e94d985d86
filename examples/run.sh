#!/usr/bin/env bash
# Trains one arm of one experiment, installing first what is missing:
#     bash examples/run.sh [--venv DIR] MODEL ARM [--dry-run] [--model-dir DIR] [--data-dir DIR] [--steps N] [overrides]
# MODEL: qwen2.5-7b, qwen2.5-14b, llama3.1-8b-instruct, quickstart. ARM: vanilla, fixed, toggle, adaptive, auto.
# Overrides: any flag of OpenRLHF or --self-spec.*. Hardware, wall time and what has been run: the files in examples/settings.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=()
if [[ ${1:-} == --venv ]]; then setup=(--venv "${2:?--venv: give a folder}"); shift 2; fi
python=$(bash "$root/examples/setup.sh" "${setup[@]}")
exec "$python" "$root/examples/launcher/run_arm.py" "$@"
