#!/usr/bin/env bash
# Installs what is missing and runs the tests: bash tests/run.sh [--all] [--venv DIR] [pytest arguments]
# Without --all it leaves out tests/gpu, which needs an NVIDIA GPU; with it, it runs everything and refuses without one.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=() markers=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --all) setup+=(--need-gpu) markers=(-m ""); shift ;;
        --venv) setup+=(--venv "${2:?--venv: give a folder}"); shift 2 ;;
        *) break ;;
    esac
done
python=$(bash "$root/examples/setup.sh" "${setup[@]}")
. "$root/tests/env.sh"
cd "$root"
exec "$python" -m pytest --durations=15 "${markers[@]}" "$@"
