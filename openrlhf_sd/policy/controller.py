"""How far to draft at the next engine step, for the modes `fixed`, `toggle` and `adaptive` (reference: EfficientRollout, sections
on the toggle and on the gamma ladder).

The scheduler owns one controller per engine, asks it before every step and tells it when a rollout ends; nobody else decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf_sd.config import SelfSpecConfig


@dataclass(frozen=True)
class StepObservation:
    """What the scheduler knows before it schedules a step."""

    num_decodes: int
    """Running requests whose prompt is fully computed; prefills do not count."""


@dataclass(frozen=True)
class RolloutAcceptance:
    """Draft counts of one finished rollout, summed over its verify steps."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int


class AlwaysOn:
    """`fixed`: speculate at every step."""

    def is_on(self, observation: StepObservation) -> bool:
        return True

    def reset(self) -> None:
        pass


class BatchToggle:
    """`toggle`: off at the start of a rollout, on from the first step with few enough decoding requests, then on to its end.

    Not evaluated until more than `ramp_up` requests have decoded at once, so that the first prefills do not look like a tail.
    """

    def __init__(self, toggle_batch: int, ramp_up: int) -> None:
        self._toggle_batch = toggle_batch
        self._ramp_up = ramp_up
        self.reset()

    def is_on(self, observation: StepObservation) -> bool:
        self._ramped = self._ramped or observation.num_decodes > self._ramp_up
        if self._ramped and 0 < observation.num_decodes <= self._toggle_batch:
            self._fired = True
        return self._fired

    def reset(self) -> None:
        self._ramped = False
        self._fired = False


class GammaLadder:
    """`adaptive`: one rung up after `patience` rollouts in a row at or above `raise_at`, one down likewise at or below `lower_at`.

    A rollout that drafted nothing says nothing about acceptance and changes nothing.
    """

    def __init__(self, rungs: tuple[int, ...], start: int, raise_at: float, lower_at: float, patience: int) -> None:
        self._rungs = rungs
        self._index = rungs.index(start)
        self._raise_at = raise_at
        self._lower_at = lower_at
        self._patience = patience
        self._num_high = 0
        self._num_low = 0

    @property
    def gamma(self) -> int:
        return self._rungs[self._index]

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        if acceptance.num_draft_tokens == 0:
            return
        rate = acceptance.num_accepted_tokens / acceptance.num_draft_tokens
        self._num_high = self._num_high + 1 if rate >= self._raise_at else 0
        self._num_low = self._num_low + 1 if rate <= self._lower_at else 0
        if self._num_high == self._patience:
            self._index = min(self._index + 1, len(self._rungs) - 1)
            self._num_high = 0
        elif self._num_low == self._patience:
            self._index = max(self._index - 1, 0)
            self._num_low = 0


class ConstantGamma:
    """`fixed` and `toggle`: the draft length never moves."""

    def __init__(self, gamma: int) -> None:
        self.gamma = gamma

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        pass


class Controller:
    """When (a switch) and how far (a gamma) to draft."""

    def __init__(self, switch: AlwaysOn | BatchToggle, length: ConstantGamma | GammaLadder) -> None:
        self._switch = switch
        self._length = length

    def next_gamma(self, observation: StepObservation) -> int:
        """Draft tokens per request to propose at the end of the next step; 0 means: do not run the drafter."""
        return self._length.gamma if self._switch.is_on(observation) else 0

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        """Rollout boundary: the weights changed, the next request belongs to a new rollout."""
        self._length.end_rollout(acceptance)
        self._switch.reset()


def make_controller(config: SelfSpecConfig) -> Controller:
    switch = AlwaysOn() if config.mode == "fixed" else BatchToggle(config.toggle_batch, config.ramp_up)
    if config.mode == "adaptive":
        length = GammaLadder(config.ladder, config.gamma, config.raise_at, config.lower_at, config.patience)
    else:
        length = ConstantGamma(config.gamma)
    return Controller(switch, length)
