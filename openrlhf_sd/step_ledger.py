"""What one engine's steps of a rollout were, added up: the timeline of gamma and batch, and what speculation was worth. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openrlhf_sd.policy.observation import MeasuredStep
from openrlhf_sd.policy.speedup import StepCosts, cycle_s

MAX_SEGMENTS = 400
"""Beyond it a timeline is coarsened: it is for looking at, and it travels in every row of metrics.jsonl."""

MIN_PLAIN_STEPS = 10
"""Fewer measured plain steps say nothing about how far the calibration is off: those of a ramp-up are the slow ones."""

CONTEXT_GRAIN = 64
"""Tokens: a prediction serves all contexts of such a stretch."""


@dataclass
class Segment:
    """Consecutive steps with one gamma."""

    gamma: int
    first_step: int
    num_steps: int
    first_batch: int
    last_batch: int
    seconds: float
    num_tokens: int

    def as_list(self) -> list[float]:
        """In the order of TIMELINE_COLUMNS."""
        return [
            self.gamma,
            self.first_step,
            self.num_steps,
            self.first_batch,
            self.last_batch,
            round(self.seconds, 6),
            self.num_tokens,
        ]


TIMELINE_COLUMNS = ("gamma", "first_step", "num_steps", "first_batch", "last_batch", "seconds", "num_tokens")


class StepLedger:
    """Args:
    costs: predicted step times, for the predicted and measured speed-up; None without a calibration.
    """

    def __init__(self, costs: StepCosts | None) -> None:
        self._costs = costs
        self._segments: list[Segment] = []
        self._predictions: dict[tuple[int, int, int], tuple[float, float]] = {}
        self._num_steps = 0
        self._toggle: tuple[int, int] | None = None
        self._num_draft_steps = 0
        self._gamma_sum = 0
        self._num_plain_steps = 0
        self._plain_measured_s = 0.0
        self._plain_predicted_s = 0.0
        self._speculative_measured_s = 0.0
        self._speculative_predicted_s = 0.0
        self._replaced_s = 0.0

    def add(self, step: MeasuredStep) -> None:
        if step.gamma_drafted and self._toggle is None:
            self._toggle = (self._num_steps, step.num_decodes)
        self._extend_timeline(step)
        self._num_steps += 1
        self._num_draft_steps += step.gamma_drafted > 0
        self._gamma_sum += step.gamma_drafted
        is_steady = step.gamma_verified == step.gamma_drafted and step.is_followed_alike
        if self._costs is None or step.step_s is None or step.num_prefill_tokens or not step.num_decodes or not is_steady:
            return
        gamma, batch = step.gamma_verified, step.num_decodes
        plain_s, predicted_s = self._predict(batch, int(step.mean_context) // CONTEXT_GRAIN, gamma)
        if gamma:
            self._speculative_measured_s += step.step_s
            self._speculative_predicted_s += predicted_s
            self._replaced_s += plain_s * step.num_tokens / batch
        else:
            self._num_plain_steps += 1
            self._plain_measured_s += step.step_s
            self._plain_predicted_s += predicted_s

    def _predict(self, batch: int, rounded_context: int, gamma: int) -> tuple[float, float]:
        """Seconds of a plain step and of a cycle. Kept: a step of a small model is a millisecond, and this would be a percent of it."""
        key = (batch, rounded_context, gamma)
        if key not in self._predictions:
            context = (rounded_context + 0.5) * CONTEXT_GRAIN
            plain_s = float(self._costs.target_step_s(batch, context))
            self._predictions[key] = plain_s, float(cycle_s(self._costs, batch, context, gamma))
        return self._predictions[key]

    def _extend_timeline(self, step: MeasuredStep) -> None:
        last = self._segments[-1] if self._segments else None
        batch, gamma = step.num_decodes, step.gamma_drafted
        halved = last is not None and (batch * 2 <= last.first_batch or batch >= last.first_batch * 2 + 1)
        if last is None or last.gamma != gamma or halved:
            if len(self._segments) >= MAX_SEGMENTS:
                self._coarsen()
            last = Segment(gamma, self._num_steps, 0, batch, batch, 0.0, 0)
            self._segments.append(last)
        last.num_steps += 1
        last.last_batch = batch
        last.seconds += step.step_s or 0.0
        last.num_tokens += step.num_tokens

    def _coarsen(self) -> None:
        """Merge neighbours two by two; the longer one's gamma stands for both."""
        merged = []
        for first, second in zip(self._segments[::2], self._segments[1::2]):
            longer = first if first.num_steps >= second.num_steps else second
            merged.append(
                Segment(
                    longer.gamma,
                    first.first_step,
                    first.num_steps + second.num_steps,
                    first.first_batch,
                    second.last_batch,
                    first.seconds + second.seconds,
                    first.num_tokens + second.num_tokens,
                )
            )
        self._segments = merged + self._segments[len(merged) * 2 :]

    def report(self) -> dict[str, Any]:
        """Keys as in metrics.jsonl. Speed-ups cover the speculating steps only, against plain decoding of the same tokens: predicted by
        the calibration, and measured with the calibration's plain steps scaled by the plain steps this rollout has measured, where those
        are MIN_PLAIN_STEPS or more."""
        predicted = measured = None
        if self._speculative_predicted_s:
            predicted = self._replaced_s / self._speculative_predicted_s
            if self._num_plain_steps >= MIN_PLAIN_STEPS:
                plain_scale = self._plain_measured_s / self._plain_predicted_s
                measured = self._replaced_s * plain_scale / self._speculative_measured_s
        return {
            "num_steps": self._num_steps,
            # Mean over the steps that drafted: the gamma itself where it is constant.
            "gamma": self._gamma_sum / self._num_draft_steps if self._num_draft_steps else None,
            "toggle_step": self._toggle and self._toggle[0],
            "toggle_batch": self._toggle and self._toggle[1],
            "predicted_speedup": predicted,
            "measured_speedup": measured,
            "timeline": [segment.as_list() for segment in self._segments],
        }
