"""The paper's gamma ladder: how far to draft, moved between rollouts (EfficientRollout, section on the adaptive draft length)."""

from __future__ import annotations

from typing import Any

from openrlhf_sd.policy.observation import RolloutAcceptance


class GammaLadder:
    """One rung up after `patience` rollouts in a row with an acceptance rate of at least `raise_at`, one down after as many at or below
    `lower_at`; any other rollout starts the count anew, and so does a move.

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
        rate = acceptance.acceptance_rate
        if rate is None:
            return
        self._num_high = self._num_high + 1 if rate >= self._raise_at else 0
        self._num_low = self._num_low + 1 if rate <= self._lower_at else 0
        if self._num_high == self._patience:
            self._index = min(self._index + 1, len(self._rungs) - 1)
            self._num_high = 0
        elif self._num_low == self._patience:
            self._index = max(self._index - 1, 0)
            self._num_low = 0

    def state(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "num_high": self._num_high, "num_low": self._num_low}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the saved gamma is no rung of this ladder."""
        if state["gamma"] not in self._rungs:
            raise ValueError(f"saved gamma {state['gamma']} is no rung of the ladder {','.join(map(str, self._rungs))}")
        self._index = self._rungs.index(state["gamma"])
        self._num_high, self._num_low = state["num_high"], state["num_low"]


class ConstantGamma:
    """The draft length of `fixed` and `toggle`."""

    def __init__(self, gamma: int) -> None:
        self.gamma = gamma

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"gamma": self.gamma}

    def restore(self, state: dict[str, Any]) -> None:
        if state["gamma"] != self.gamma:
            raise ValueError(f"the saved run drafted {state['gamma']} tokens and this one {self.gamma}")
