#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --job-name=openrlhf_sd
#SBATCH --output=%x-%j.log
# One arm of one experiment on a Slurm cluster: a Ray cluster over the job's nodes, and examples/run.sh on the first of them.
#     sbatch [--nodes=N] examples/slurm.sh MODEL ARM [flags of examples/run.sh]
# Submit it from the repository, on a file system that all nodes share, after `bash examples/setup.sh --need-gpu` on a node with a GPU.
# On several nodes also say so to OpenRLHF: docs/reproduce.md, "Several nodes".
# Hardware: nodes with 8 NVIDIA GPUs. Wall time: unknown. Not yet run by us: check it with one node first.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is set in a Slurm job: submit this file with sbatch}"
. "${VENV:-$PWD/.venv}/bin/activate"

# Whoever reaches a port of Ray runs code as you. With this token, which only your own processes can read, Ray answers nobody else.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_ADDRESS=$head:6379
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap env -u RAY_ADDRESS \
    ray start --head --port=6379 --num-gpus=8 --include-dashboard=false --block &
timeout 120 bash -c 'until ray status >/dev/null 2>&1; do sleep 2; done'
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    srun --nodes="$others" --ntasks="$others" --exclude="$head" --overlap ray start --address "$RAY_ADDRESS" --num-gpus=8 --block &
fi

# OpenRLHF's ray.init() joins the cluster of RAY_ADDRESS, and its placement group waits until the GPUs of all nodes are there.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap bash examples/run.sh "$@"
