"""`auto`: at every batch size, the draft length with the fewest predicted seconds per token, 0 included.

Seconds per cycle come from the calibration, or from rough ratios (rough_costs.py), corrected by the steps measured so far
(live_costs.py); tokens per cycle from the acceptance measured so far, at its lower bound (acceptance.py), less what is drafted past the
ends of requests (end_rate.py). Both ways: a batch that grows again turns speculation off again. What is off cannot be measured, so a short
trial is run now and then where a hopeful view says it might pay, within a fixed share of the time.
"""

from __future__ import annotations

import math
from typing import Any

from openrlhf_sd.policy.acceptance import AcceptanceEstimate
from openrlhf_sd.policy.end_rate import EndRate
from openrlhf_sd.policy.live_costs import LiveCosts
from openrlhf_sd.policy.observation import MeasuredStep, RolloutAcceptance, StepObservation
from openrlhf_sd.policy.rough_costs import RoughCosts
from openrlhf_sd.policy.speedup import StepCosts, acceptance_lengths
from openrlhf_sd.policy.step_belief import CALIBRATED, ROUGH

MIN_GAIN = 0.01
"""A change of gamma must promise this much; less is within the error of the step times and would only flap."""

MIN_STEPS_BETWEEN_CHANGES = 10
"""The optimum is flat; what looks better by a percent or two may wait for a few more measurements."""

DECIDE_EVERY = 4
"""Steps a decision stands while the batch stays: what is measured changes no faster, and a small model's step is a millisecond."""

CLEAR_GAIN = 0.08
"""A change that promises this much does not wait."""

TRIAL_STEPS = 5
"""Length of a trial: its first step still verifies what the steps before it drafted, the others are measured. It ends sooner when they
leave no hope."""

MIN_STEPS_BETWEEN_TRIALS = 20
"""From start to start: a quarter of the steps at most, where trials are free because they hardly lose."""

TRIAL_GAIN = 0.03
"""A trial must promise this much under the hopeful view."""

TRIAL_BUDGET, UNCALIBRATED_TRIAL_BUDGET = 0.001, 0.003
"""Share of the time that trials may lose, by the cautious view of what they cost. A calibration leaves less to find out."""

FIRST_BUDGET_STEPS = 4.0
"""Plain steps of one request that a run may lose to trials before it has saved up for them: seconds, so that a machine on which large
batches are dear waits for small ones, where it learns the same for less. What is saved moves on to the next rollout ..."""

MAX_BUDGET_STEPS = 20.0
"""... up to so many steps as they are now."""

DEEPER = 2
"""A trial from a gamma in use goes this much deeper at most: acceptance there is known by its neighbours only."""

MEASURED_STEPS = 2.5
"""Fading count of steps at a batch size from which on they count as measured there."""

PLAIN_KNOWN_STEPS = 500
"""Speculative steps after which plain ones are tried again wherever they were measured."""

KNOWN_DRAFTS = 64.0
"""Fading count of drafts that have reached a position, from which on its acceptance needs no trial."""

GOOD_PART_OF_THE_GAIN = 0.5
"""A trial takes the shortest drafts that promise this share of the best gain: they cost least if the hope is in vain, and tell as much
about the first positions."""

DOUBT_SIGMAS = 2.0
"""A gain within so many standard deviations of its costs is compared with plain steps measured at the same batch size."""

SHORT_GAMMA = 2
"""Draft length of most trials: what is in doubt of its cost decides about trying at all."""

UNCALIBRATED_CAUTION = 1.0
"""Off, a guessed cost is read so many standard deviations above its mean, as acceptance is below: where speculation does not pay then, it
is tried before it is used. A calibration is believed as it stands."""

WEIGHTS_CHANGED = 0.5
"""What acceptance of the rollout before is worth after the policy's weights have moved by one training step."""


class AutoController:
    """Args:
    costs: None without a calibration.
    gamma_max: draft lengths 0..gamma_max are considered.
    """

    def __init__(self, costs: StepCosts | None, gamma_max: int) -> None:
        self._gammas = range(gamma_max + 1)
        self._caution = UNCALIBRATED_CAUTION if costs is None else 0.0
        self._costs = LiveCosts(RoughCosts(), ROUGH, gamma_max) if costs is None else LiveCosts(costs, CALIBRATED, gamma_max)
        self._budget_share = UNCALIBRATED_TRIAL_BUDGET if costs is None else TRIAL_BUDGET
        self._acceptance = AcceptanceEstimate(gamma_max)
        self._end_rate = EndRate()
        self._gamma = 0
        self._steps_since_change = MIN_STEPS_BETWEEN_CHANGES
        self._steps_since_draft = 0
        self._steps_since_trial = MIN_STEPS_BETWEEN_TRIALS
        self._steps_since_plain = PLAIN_KNOWN_STEPS
        self._trial_steps_left = 0
        self._batch = 0
        self._steps_since_decision = 0
        self._budget_s: float | None = None
        self._lengths: tuple[list[float], list[float]] | None = None
        self._has_said_off = False
        self._news: list[str] = []

    def next_gamma(self, observation: StepObservation) -> int:
        """Draft tokens per request to propose at the end of the next step."""
        # Requests about to join count: what pays for the few that decode already may not pay a step later.
        batch = observation.num_decodes + observation.num_prefills
        if observation.num_decodes == 0 or not self._costs.can_decide:
            return 0
        self._steps_since_change += 1
        self._steps_since_trial += 1
        if self._trial_steps_left > 0:
            self._trial_steps_left -= 1
            is_measured = self._trial_steps_left <= TRIAL_STEPS - 3  # drafted, and drafted and verified, in a step each
            if is_measured and self._gamma > 0 and self._is_hopeless(batch, observation.mean_context):
                self._trial_steps_left = 0
                self._gamma = 0
            return self._gamma
        if batch == self._batch and self._steps_since_decision < DECIDE_EVERY:
            self._steps_since_decision += 1
            return self._gamma
        self._batch = batch
        self._steps_since_decision = 1
        self._gamma = self._choose(batch, observation.mean_context)
        return self._gamma

    def _choose(self, batch: int, context: float) -> int:
        if self._budget_s is None:
            self._budget_s = FIRST_BUDGET_STEPS * self._costs.cycles_s(1, context)[0]
        lower, upper = self._expected_lengths()
        seconds = self._costs.cycles_s(batch, context)
        per_token_s = [cycle / length for cycle, length in zip(seconds, lower)]
        best = min(self._gammas, key=per_token_s.__getitem__)
        gain = per_token_s[self._gamma] / per_token_s[best]
        sigma = self._costs.sigma(batch, SHORT_GAMMA) if self._gamma == 0 else 0.0
        gain /= math.exp(self._caution * sigma)
        may_change = self._steps_since_change > MIN_STEPS_BETWEEN_CHANGES or gain > 1 + CLEAR_GAIN
        if best != self._gamma and gain > 1 + MIN_GAIN and may_change:
            if best == 0:
                self._say_off(batch, seconds, lower)
            self._steps_since_change = 0
            return best
        return self._trial(batch, seconds, lower, upper, sigma)

    def _trial(self, batch: int, seconds: list[float], lower: list[float], upper: list[float], sigma: float) -> int:
        """The gamma to go on with: another one for a few steps if a hopeful view promises enough, else the one in use."""
        current = self._gamma
        if self._steps_since_trial < MIN_STEPS_BETWEEN_TRIALS:
            return current
        if current > 0:
            gain = seconds[0] * lower[current] / seconds[current]
            in_doubt = (
                math.log(gain) < DOUBT_SIGMAS * self._costs.sigma(batch, current)
                and self._costs.num_measured(batch, is_speculative=False) < MEASURED_STEPS
            )
            if in_doubt or self._steps_since_plain >= PLAIN_KNOWN_STEPS:
                return self._begin_trial(0, price_s=TRIAL_STEPS * max(0.0, seconds[0] * (1 - 1 / gain)))
        if current == self._gammas[-1]:
            return current
        if current > 0 and self._acceptance.num_reached(current) >= KNOWN_DRAFTS:
            return current
        per_token_s = seconds[current] / lower[current]
        longer = self._gammas[current + 1 :] if current == 0 else self._gammas[current + 1 : current + 1 + DEEPER]
        hope, doubt = math.exp(sigma), math.exp(self._caution * sigma)
        gains = [per_token_s * upper[gamma] * hope / seconds[gamma] - 1 for gamma in longer]
        for gamma, gain in zip(longer, gains):
            if gain >= max(TRIAL_GAIN, GOOD_PART_OF_THE_GAIN * max(gains)):
                return self._begin_trial(gamma, TRIAL_STEPS * max(0.0, seconds[gamma] * doubt - lower[gamma] * per_token_s))
        return current

    def _begin_trial(self, gamma: int, price_s: float) -> int:
        if price_s > self._budget_s:
            return self._gamma
        self._budget_s -= price_s
        self._trial_steps_left = TRIAL_STEPS - 1
        self._steps_since_trial = 0
        self._steps_since_change = MIN_STEPS_BETWEEN_CHANGES  # what it shows need not wait
        self._steps_since_decision = DECIDE_EVERY
        return gamma

    def _is_hopeless(self, batch: int, context: float) -> bool:
        """Whether the trial has already shown that it costs more than even the acceptance hoped for would bring."""
        seconds = self._costs.cycles_s(batch, context)
        return seconds[self._gamma] > seconds[0] * self._expected_lengths()[1][self._gamma]

    def _expected_lengths(self) -> tuple[list[float], list[float]]:
        """Tokens per cycle for every gamma, at the lower and the upper bound of acceptance."""
        if self._lengths is None:
            goes_on = 1 - self._end_rate.per_token()
            bounds = self._acceptance.lower(), self._acceptance.upper()
            lower, upper = (acceptance_lengths([goes_on * acceptance for acceptance in bound]) for bound in bounds)
            self._lengths = lower, upper
        return self._lengths

    def observe(self, step: MeasuredStep) -> None:
        """What the step became. Its time counts if it did nothing but decode."""
        self._end_rate.observe(step.num_decodes, step.num_tokens, step.num_ended)
        if step.num_ended:
            self._lengths = None
        if step.num_drafts:
            self._acceptance.observe(step.num_draft_tokens_per_pos, step.num_accepted_tokens_per_pos)
            self._lengths = None
            self._steps_since_draft = 0
        else:
            self._steps_since_draft += 1
            if self._steps_since_draft % 64 == 0:  # what was learned long ago is known less well
                self._acceptance.fade(0.9)
                self._lengths = None
        is_plain = step.gamma_verified == step.gamma_drafted == 0 and step.num_prefill_tokens == 0
        self._steps_since_plain = 0 if is_plain else self._steps_since_plain + 1
        if step.step_s is not None and step.num_prefill_tokens == 0 and step.num_decodes > 0:
            if step.is_followed_alike:
                self._costs.observe(step.num_decodes, step.mean_context, step.gamma_verified, step.gamma_drafted, step.step_s)
            if self._budget_s is not None and self._budget_s < MAX_BUDGET_STEPS * step.step_s:
                self._budget_s += self._budget_share * step.step_s

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        self._acceptance.fade(WEIGHTS_CHANGED)
        self._end_rate = EndRate()
        self._lengths = None
        self._gamma = 0
        self._trial_steps_left = 0
        self._has_said_off = False

    def _say_off(self, batch: int, seconds: list[float], lower: list[float]) -> None:
        """Once per rollout: the measurements speak against speculating where it was tried."""
        if self._has_said_off:
            return
        self._has_said_off = True
        plain_s, speculative_s = seconds[0], seconds[self._gamma] / lower[self._gamma]
        self._news.append(
            f"speculation off at {batch} requests: measured {1e3 * speculative_s / batch:.3f} ms per token with gamma {self._gamma}, "
            f"{1e3 * plain_s / batch:.3f} without"
        )

    def take_news(self) -> list[str]:
        """Lines for the log since the last call."""
        news, self._news = self._news, []
        return news

    def state(self) -> dict[str, Any]:
        return {"acceptance": self._acceptance.state(), "costs": self._costs.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state was saved with another gamma_max, or with a calibration where there is none now."""
        self._acceptance.restore(state["acceptance"])
        self._costs.restore(state["costs"])
        self._lengths = None
