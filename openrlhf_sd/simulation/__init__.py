"""Parts of the rollout simulator: true step times, lengths, acceptance, one engine's loop, rollouts, traces. See `openrlhf_sd.simulator`."""
