#!/usr/bin/env bash
# Installs what is missing and runs the tests: bash tests/run.sh [--all] [--venv DIR] [pytest arguments]
# With --all, all that this machine can run: also tests of minutes (marker slow), and tests/gpu where there is an NVIDIA GPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=() markers=() rest=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --all) markers=(-m ""); shift ;;
        --venv) setup+=(--venv "${2:?--venv: give a folder}"); shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
python=$(bash "$root/examples/setup.sh" "${setup[@]}")
. "$root/tests/env.sh"
cd "$root"
exec "$python" -m pytest --durations=40 "${markers[@]}" "${rest[@]}"
