"""Lossless self-speculation for OpenRLHF rollouts on stock OpenRLHF and vLLM.

from openrlhf_sd import SelfSpecConfig, engine_args
"""

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError

__all__ = ["SelfSpecConfig", "SelfSpecError", "engine_args"]


def __getattr__(name: str):
    # Lazy: the config and the pure policies must be importable without vLLM.
    if name == "engine_args":
        from openrlhf_sd.engine.args import engine_args

        return engine_args
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
