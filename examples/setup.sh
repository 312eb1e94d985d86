#!/usr/bin/env bash
# Installs the CPU or the CUDA stack and this package, whichever this machine needs:
#     bash examples/setup.sh [--venv DIR] [--need-gpu] [--dry-run]
# Prints the path of the environment's Python on stdout, everything else on stderr. See openrlhf_sd/setup_stack.py.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || {
    echo "setup: error: no python3 here, or one from before 3.8; install python3.11 and its venv module" >&2
    exit 2
}
exec python3 -m openrlhf_sd.setup_stack --called-from "$from" "$@"
