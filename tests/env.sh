# Sourced by tests/run.sh and examples/gpu_check.sh: nothing is downloaded or reported while tests run.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 WANDB_MODE=offline DO_NOT_TRACK=1
# A value left over from elsewhere (Ray exports 1) would slow every engine; without it vLLM and torch take all cores.
unset OMP_NUM_THREADS
