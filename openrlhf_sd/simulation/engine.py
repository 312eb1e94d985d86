"""One simulated engine through one rollout: ask the controller, step, tell it what the step turned out to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from openrlhf_sd.config import MAX_GAMMA
from openrlhf_sd.policy.observation import MeasuredStep, StepObservation
from openrlhf_sd.simulation.acceptance import PADDING, AcceptanceProcess, Draws
from openrlhf_sd.simulation.step_times import StepTimes

NOISE_BLOCK = 1024


@dataclass
class EngineRollout:
    """What one engine did in one rollout."""

    seconds: float = 0.0
    num_steps: int = 0
    num_extrapolated_steps: int = 0
    num_output_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    steps_by_gamma: list[int] = field(default_factory=lambda: [0] * (MAX_GAMMA + 1))
    """Steps that drafted 0, 1, ... tokens per request."""


@dataclass(frozen=True)
class Workload:
    """The requests of one engine in one rollout and their luck; every policy gets the very same."""

    lengths: np.ndarray
    """Output tokens per request, int64."""

    prompt_tokens: float
    draws: Draws
    starts: np.ndarray
    """Place of each request's first token in `draws`."""

    @classmethod
    def draw(cls, rng: np.random.Generator, lengths: np.ndarray, prompt_tokens: float, process: AcceptanceProcess) -> Workload:
        sizes = lengths + PADDING
        return cls(lengths, prompt_tokens, process.draw(rng, sizes), np.cumsum(sizes) - sizes)


def plain_rollout_s(work: Workload, times: StepTimes) -> float:
    """Plain vLLM: after t steps every request still decoding has t tokens, so the whole rollout is one sum."""
    steps = np.arange(work.lengths.max())
    batches = len(work.lengths) - np.searchsorted(np.sort(work.lengths), steps, side="right")
    return times.plain_rollout_s(batches, work.prompt_tokens + steps)


def simulate(controller, work: Workload, times: StepTimes, noise: Iterator[float] | None = None) -> EngineRollout:
    """Decode all requests of `work`; a step verifies the drafts of the step before it, then drafts.

    The prompts count as computed when it begins. As in vLLM, drafts are made for all requests of the step, also for those that it ends.

    Args:
        controller: any `openrlhf_sd.policy.controller.Controller`.
        noise: factors that the true step times are multiplied by.
    """
    run = EngineRollout(num_output_tokens=int(work.lengths.sum()))
    remaining, generated, starts = work.lengths.copy(), np.zeros_like(work.lengths), work.starts
    num_decodes, num_generated, shortest = len(remaining), 0, int(remaining.min())
    num_plain = 0  # tokens by which all requests are further than the arrays say: plain steps need no array work
    gamma_verified = 0
    while num_decodes:
        context = work.prompt_tokens + num_generated / num_decodes
        gamma = controller.next_gamma(StepObservation(num_decodes, context))
        step_s = times.verify_s(num_decodes, context, gamma_verified) + (times.draft_s(num_decodes, context, gamma) if gamma else 0.0)
        if noise is not None:
            step_s *= next(noise)

        drafts = (0, (), ())
        batch = num_decodes
        if gamma_verified == 0:
            num_plain += 1
            num_tokens = num_decodes
        else:
            if num_plain:
                generated += num_plain
                remaining -= num_plain
                shortest -= num_plain
                num_plain = 0
            accepted = work.draws.accepted(starts + generated, gamma_verified)
            advance = np.minimum(accepted + 1, remaining)
            generated += advance
            remaining -= advance
            num_tokens = int(advance.sum())
            shortest = int(remaining.min())
            drafts = _drafts(accepted, num_decodes, gamma_verified)
            run.num_drafts += num_decodes
            run.num_draft_tokens += num_decodes * gamma_verified
            run.num_accepted_tokens += sum(drafts[2])
        num_generated += num_tokens
        if num_plain == shortest:
            generated += num_plain
            remaining -= num_plain
            going_on = remaining > 0
            remaining, generated, starts = remaining[going_on], generated[going_on], starts[going_on]
            num_plain = 0
            num_decodes, num_generated = len(remaining), int(generated.sum())
            shortest = int(remaining.min()) if num_decodes else 0

        ended = batch - num_decodes
        controller.observe(
            MeasuredStep(batch, context, step_s if run.num_steps else None, 0, gamma_verified, gamma, *drafts, num_tokens, ended)
        )
        run.seconds += step_s
        run.num_steps += 1
        run.steps_by_gamma[gamma] += 1
        run.num_extrapolated_steps += times.is_extrapolated(batch, context, max(gamma, gamma_verified))
        gamma_verified = gamma
    return run


def _drafts(accepted: np.ndarray, num_decodes: int, gamma: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Three fields of MeasuredStep: drafts, draft tokens and accepted tokens per position."""
    by_count = np.bincount(accepted, minlength=gamma + 1)
    reached = num_decodes - np.cumsum(by_count[:gamma])
    return num_decodes, (num_decodes,) * gamma, tuple(reached.tolist())


def log_normal_noise(rng: np.random.Generator, sigma: float) -> Iterator[float]:
    """Endless factors of mean 1 and log-standard-deviation `sigma`."""
    while True:
        yield from np.exp(sigma * rng.standard_normal(NOISE_BLOCK) - sigma**2 / 2).tolist()
