#!/usr/bin/env bash
# Installs what is missing and runs the tests: bash tests/run.sh [--all] [--venv DIR] [pytest arguments]
# With --all, all that this machine can run: also tests of minutes (marker slow), those that need every core, and tests/gpu
# where there is an NVIDIA GPU. In two lanes (tests/lanes.py); for one, with output as it comes: -n 0.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=() rest=() all=
while [[ $# -gt 0 ]]; do
    case $1 in
        --all) all=1; shift ;;
        --venv) setup+=(--venv "${2:?--venv: give a folder}"); shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
python=$(bash "$root/examples/setup.sh" "${setup[@]}")
. "$root/tests/env.sh"
cd "$root"
pytest=("$python" -m pytest --durations=40)
lanes=(-n "$(($(nproc) > 1 ? 2 : 0))")
[[ $all ]] || exec "${pytest[@]}" "${lanes[@]}" "${rest[@]}"

none_of_them=5 # pytest's exit code where its arguments select no test
together=0 alone=0
"${pytest[@]}" "${lanes[@]}" -m "not gpu and not whole_machine" "${rest[@]}" || together=$?
[[ $together -le 1 || $together -eq $none_of_them ]] || exit "$together" # interrupted, or arguments that it cannot read
"${pytest[@]}" -m "gpu or whole_machine" "${rest[@]}" || alone=$?
[[ $alone -ne $none_of_them ]] || { alone=$together together=0; }
[[ $together -ne $none_of_them ]] || together=0
exit "$((together ? together : alone))"
