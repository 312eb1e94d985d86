"""When and how far to draft: one controller object per engine, asked by the scheduler before every step. Nobody else decides.

    fixed     always gamma
    toggle    Toggle, gamma constant
    adaptive  Toggle, gamma of the GammaLadder: the paper's full method
    auto      AutoController

The same objects run in the engine and in the simulator.
"""

from __future__ import annotations

from typing import Any, Protocol

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.policy.auto import AutoController
from openrlhf_sd.policy.gamma_ladder import ConstantGamma, GammaLadder
from openrlhf_sd.policy.observation import MeasuredStep, RolloutAcceptance, StepObservation
from openrlhf_sd.policy.speedup import StepCosts
from openrlhf_sd.policy.toggle import Toggle

FIRST_LENGTH_DISCOUNT = 0.8
"""`toggle` before any acceptance is known expects this share of gamma as the mean acceptance length. The paper takes "a discount"
without naming it; this one is ours."""


class Controller(Protocol):
    def next_gamma(self, observation: StepObservation) -> int:
        """Draft tokens per request to propose at the end of the next step; 0 means: do not run the drafter."""

    def observe(self, step: MeasuredStep) -> None:
        """What a step became, in the order of the steps."""

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        """Rollout boundary: the weights have changed."""

    def take_news(self) -> list[str]:
        """Lines for the log, each given once."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`. Raises ValueError when it belongs to other settings."""


class FixedController:
    """`fixed`."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    def next_gamma(self, observation: StepObservation) -> int:
        return self._gamma

    def observe(self, step: MeasuredStep) -> None:
        pass

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        pass

    def take_news(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class ToggleController:
    """`toggle` and `adaptive`: the toggle decides when, the ladder (or a constant) how far. The mean acceptance length that the toggle
    expects is that of the last rollout; after a move on the ladder it is the new gamma."""

    def __init__(self, toggle: Toggle, ladder: GammaLadder | ConstantGamma, first_length: float) -> None:
        self._toggle = toggle
        self._ladder = ladder
        self._mean_acceptance_length = first_length

    def next_gamma(self, observation: StepObservation) -> int:
        gamma = self._ladder.gamma
        return gamma if self._toggle.is_on(observation, gamma, self._mean_acceptance_length) else 0

    def observe(self, step: MeasuredStep) -> None:
        pass

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        self._toggle.reset()
        gamma = self._ladder.gamma
        self._ladder.end_rollout(acceptance)
        if self._ladder.gamma != gamma:
            self._mean_acceptance_length = float(self._ladder.gamma)
        elif acceptance.num_drafts:
            self._mean_acceptance_length = acceptance.mean_acceptance_length

    def take_news(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any]:
        return {"ladder": self._ladder.state(), "mean_acceptance_length": self._mean_acceptance_length}

    def restore(self, state: dict[str, Any]) -> None:
        self._ladder.restore(state["ladder"])
        self._mean_acceptance_length = state["mean_acceptance_length"]


def make_controller(config: SelfSpecConfig, costs: StepCosts | None) -> Controller:
    """Args:
        costs: calibrated step times; `toggle` and `adaptive` cannot do without, `auto` can, `fixed` does not look.

    Raises:
        ValueError: `toggle` or `adaptive` without costs.
    """
    if config.mode == "fixed":
        return FixedController(config.gamma)
    if config.mode == "auto":
        return AutoController(costs, config.gamma_max)
    if costs is None:
        raise ValueError(f"{config.mode} decides by a calibration and was given none")
    toggle = Toggle(costs, config.margin, config.ramp_up)
    if config.mode == "toggle":
        return ToggleController(toggle, ConstantGamma(config.gamma), FIRST_LENGTH_DISCOUNT * config.gamma)
    ladder = GammaLadder(config.ladder, config.gamma, config.raise_at, config.lower_at, config.patience)
    return ToggleController(toggle, ladder, float(config.gamma))
