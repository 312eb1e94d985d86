#!/usr/bin/env bash
# The whole story on one machine, without a GPU or a download: installs, builds a small policy, warms it up, trains it with GRPO in two
# arms (vanilla OpenRLHF, and self-speculating where it pays; same seed, same data) and compares them on one page.
#     bash examples/quickstart.sh [--steps N] [--out DIR] [--venv DIR] [--arms vanilla,fixed,toggle,adaptive,auto] [more flags for all runs]
# Hardware: 2 CPU cores, 8 GB of memory, 6 GB of disk. Wall time: README, "Two commands".
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
steps=15 out=$PWD/quickstart_out setup=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --steps) steps=${2:?--steps: give a number}; shift 2 ;;
        --out) out=${2:?--out: give a folder}; shift 2 ;;
        --venv) setup=(--venv "${2:?--venv: give a folder}"); shift 2 ;;
        *) break ;;
    esac
done
python=$(bash "$root/examples/setup.sh" "${setup[@]}")
exec "$python" "$root/examples/quickstart/run.py" --steps "$steps" --out "$out" "$@"
