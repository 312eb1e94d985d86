"""A scheduler that drafts as its requests say, so that one engine serves many tests: a gamma, "random", or "auto" by simulated times."""

from __future__ import annotations

from random_gamma import RandomGamma
from simulated_times import TimesOfAGpu

from openrlhf_sd.engine.scripted_gamma import DRAFT_ARG, ScriptedGammaScheduler
from openrlhf_sd.policy.controller import Controller


class DraftsByRequestScheduler(ScriptedGammaScheduler):
    def _mode(self, mode: str) -> Controller:
        if mode not in self._modes:
            self._modes[mode] = RandomGamma(self.num_spec_tokens) if mode == "random" else TimesOfAGpu(super()._mode(mode))
        return self._modes[mode]


QUALNAME = f"{DraftsByRequestScheduler.__module__}.{DraftsByRequestScheduler.__qualname__}"


def drafting(draft: int | str) -> dict[str, dict[str, int | str]]:
    """For `engines.greedy` and `engines.sampled`."""
    return {"extra_args": {DRAFT_ARG: draft}}
