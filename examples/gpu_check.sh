#!/usr/bin/env bash
# Runs the engine tests that need an NVIDIA GPU, and only those: bash examples/gpu_check.sh [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/examples/setup.sh" --need-gpu)
. "$root/tests/env.sh"
cd "$root"
exec "$python" -m pytest tests/gpu -m gpu --durations=15 "$@"
