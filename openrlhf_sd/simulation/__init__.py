"""Parts of the simulator (`openrlhf_sd.simulator`): true step times, lengths, acceptance, one engine's loop, rollouts, traces."""
