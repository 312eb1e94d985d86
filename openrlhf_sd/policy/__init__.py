"""Pure policies: a frozen observation in, a decision out. No torch, vllm, ray, clock, log, RNG or I/O in this package."""
