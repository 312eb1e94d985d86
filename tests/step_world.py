"""An engine reduced to its step times and acceptances, for tests of controllers: a clock, a batch and a random draw per draft token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from openrlhf_sd.policy.observation import MeasuredStep, RolloutAcceptance, StepObservation


class GpuLike:
    """A roofline in ms: weights 10, 0.05 per token beyond what they hide, 0.001 per request and 100 tokens of context; drafts 0.45 of
    it."""

    def __init__(self, scale: float = 1.0, speculative_scale: float = 1.0) -> None:
        self.scale = scale
        self.speculative_scale = speculative_scale

    def target_step_s(self, batch, context):
        return self.scale * 1e-3 * (max(10.0, 0.05 * batch) + 0.02 * batch + 1e-5 * batch * context)

    def draft_step_s(self, batch, context):
        return 0.45 * self.speculative_scale * self.target_step_s(batch, context)

    def verify_step_s(self, batch, context, gamma):
        tokens = batch * (gamma + 1)
        return self.scale * self.speculative_scale * 1e-3 * (10.0 + 0.06 * tokens + 1e-5 * batch * context)


class CpuLike(GpuLike):
    """Compute-bound in ms: 4 for the weights and 1 per token; a draft step 0.65 of a plain one. Speculation hardly ever pays."""

    def target_step_s(self, batch, context):
        return 1e-3 * (4.0 + batch)

    def draft_step_s(self, batch, context):
        return 0.65 * self.target_step_s(batch, context)

    def verify_step_s(self, batch, context, gamma):
        return 1e-3 * (4.5 + batch * (gamma + 1))


@dataclass
class Run:
    seconds: float = 0.0
    gammas: list[int] = field(default_factory=list)
    num_changes: int = 0


def run(
    controller,
    truth: Callable[[int], GpuLike],
    lengths: list[int],
    acceptance: Callable[[int, int], float],
    noise: float = 0.03,
    seed: int = 0,
    prefill_steps: Callable[[int], int] = lambda step: 0,
) -> Run:
    """One rollout of requests of `lengths`, all started at once.

    Args:
        truth: step number -> step times.
        acceptance: (step number, position) -> probability.
        noise: sigma of the logarithm of step times.
        prefill_steps: step number -> prompt tokens computed in it, 0.1 ms each.
    """
    draw = random.Random(seed)
    remaining = list(lengths)
    context = 200.0
    verified_gamma = 0
    result = Run()
    step = 0
    while remaining:
        batch = len(remaining)
        prefill = prefill_steps(step)
        gamma = controller.next_gamma(StepObservation(batch, context, num_prefills=prefill // 100))
        costs = truth(step)
        seconds = costs.verify_step_s(batch, context, verified_gamma) if verified_gamma else costs.target_step_s(batch, context)
        seconds += gamma * costs.draft_step_s(batch, context) + 1e-4 * prefill
        seconds *= math.exp(draw.gauss(0, noise))
        drafted, accepted = [0] * verified_gamma, [0] * verified_gamma
        num_left = sum(remaining)
        for index in range(batch):
            num_tokens = 1
            for position in range(verified_gamma):
                drafted[position] += 1
            for position in range(verified_gamma):
                if draw.random() >= acceptance(step, position):
                    break
                accepted[position] += 1
                num_tokens += 1
            remaining[index] -= min(num_tokens, remaining[index])
        num_left -= sum(remaining)
        remaining = [length for length in remaining if length > 0]
        context += 1 + (sum(accepted) / batch if batch else 0)
        controller.observe(
            MeasuredStep(
                num_decodes=batch,
                mean_context=context,
                step_s=seconds,
                num_prefill_tokens=prefill,
                gamma_verified=verified_gamma,
                gamma_drafted=gamma,
                num_drafts=batch if verified_gamma else 0,
                num_draft_tokens_per_pos=tuple(drafted),
                num_accepted_tokens_per_pos=tuple(accepted),
                num_tokens=num_left,
                num_ended=batch - len(remaining),
            )
        )
        result.seconds += seconds
        result.num_changes += bool(result.gammas) and gamma != result.gammas[-1]
        result.gammas.append(gamma)
        verified_gamma = gamma
        step += 1
    controller.end_rollout(RolloutAcceptance(0, 0, 0))
    return result


def long_tail(num_requests: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [min(4000, max(8, int(draw.lognormvariate(5.5, 1.0)))) for _ in range(num_requests)]
