"""What runs inside vLLM: the scheduler that asks the controller, the worker that follows weight syncs, the drafter itself."""
