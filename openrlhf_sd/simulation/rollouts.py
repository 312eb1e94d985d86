"""Several rollouts in a row, several engines, several policies on the very same requests; and what came of it, as numbers for a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from openrlhf_sd.config import MAX_GAMMA, SelfSpecConfig
from openrlhf_sd.policy.controller import Controller, make_controller
from openrlhf_sd.policy.observation import MeasuredStep, RolloutAcceptance, StepObservation
from openrlhf_sd.policy.speedup import StepCosts
from openrlhf_sd.simulation.acceptance import AcceptanceProcess
from openrlhf_sd.simulation.engine import EngineRollout, Workload, log_normal_noise, plain_rollout_s, simulate
from openrlhf_sd.simulation.lengths import DrawLengths
from openrlhf_sd.simulation.step_times import StepTimes

PLAIN, ORACLE = "ar", "oracle"
"""The two policies that are no mode of training: plain vLLM, and the best that can be known."""


class Oracle:
    """Before every step the gamma in 0..MAX_GAMMA with the fewest true seconds per expected token. Looks one cycle ahead, and does not
    know where requests end."""

    def __init__(self, times: StepTimes, process: AcceptanceProcess) -> None:
        self._times = times
        self._lengths = np.array([process.mean_acceptance_length(gamma) for gamma in range(MAX_GAMMA + 1)])

    def next_gamma(self, observation: StepObservation) -> int:
        return int(np.argmin(self._times.cycles_s(observation.num_decodes, observation.mean_context) / self._lengths))

    def observe(self, step: MeasuredStep) -> None:
        pass

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        pass


@dataclass(frozen=True)
class EngineInput:
    """What one engine is given in one rollout."""

    lengths: np.ndarray
    prompt_tokens: float
    process: AcceptanceProcess


RolloutInputs = Callable[[int, int], list[EngineInput]]
"""(seed, rollout) -> the input of each engine."""


@dataclass(frozen=True)
class RandomInputs:
    """`RolloutInputs` with lengths drawn anew in every rollout, the same for the same seed and rollout."""

    draw_lengths: DrawLengths
    process: AcceptanceProcess
    num_engines: int
    batch: int
    prompt_tokens: float

    def __call__(self, seed: int, rollout: int) -> list[EngineInput]:
        rng = np.random.default_rng([seed, rollout])
        lengths = [self.draw_lengths(rng, self.batch) for _ in range(self.num_engines)]
        return [EngineInput(each, self.prompt_tokens, self.process) for each in lengths]


@dataclass
class RolloutResult:
    """One policy in one rollout."""

    makespan_s: float
    """Seconds of the slowest engine."""

    plain_makespan_s: float
    """The same of plain vLLM, on the same requests."""

    engines: list[EngineRollout] = field(repr=False)


def simulate_seed(
    policies: Sequence[tuple[str, SelfSpecConfig | None]],
    inputs: RolloutInputs,
    times: StepTimes,
    costs: StepCosts | None,
    *,
    seed: int,
    num_rollouts: int,
    noise: float,
    on_rollout: Callable[[], None] = lambda: None,
) -> dict[str, list[RolloutResult]]:
    """Results per policy and rollout. Policies carry their state from rollout to rollout; each engine has a controller of its own, and
    all are told the acceptance of all, as in training.

    Args:
        policies: name, and the settings of a training mode; None for PLAIN and ORACLE.
        costs: what the policies believe that steps cost; None where they must do without.
        noise: log-standard-deviation of a step's seconds around its mean.
    """
    controllers: dict[str, list[Controller]] = {}
    results: dict[str, list[RolloutResult]] = {name: [] for name, _ in policies}
    for rollout in range(num_rollouts):
        works, oracles, plain_s = [], [], []
        for engine, given in enumerate(inputs(seed, rollout)):
            rng = np.random.default_rng([seed, rollout, engine])
            works.append(Workload.draw(rng, given.lengths, given.prompt_tokens, given.process))
            oracles.append(Oracle(times, given.process))
            plain_s.append(plain_rollout_s(works[-1], times))
        for name, config in policies:
            if name == PLAIN:
                engines = [_plain_engine(work, seconds) for work, seconds in zip(works, plain_s, strict=True)]
            else:
                if name not in controllers and name != ORACLE:
                    controllers[name] = [make_controller(config, costs) for _ in works]
                asked = oracles if name == ORACLE else controllers[name]
                engines = []
                for engine, (controller, work) in enumerate(zip(asked, works, strict=True)):
                    jitter = log_normal_noise(np.random.default_rng([seed, rollout, engine, 1]), noise) if noise else None
                    engines.append(simulate(controller, work, times, jitter))
                pooled = pooled_acceptance(engines)
                for controller in asked:
                    controller.end_rollout(pooled)
            results[name].append(RolloutResult(max(engine.seconds for engine in engines), max(plain_s), engines))
        on_rollout()
    return results


def _plain_engine(work: Workload, seconds: float) -> EngineRollout:
    engine = EngineRollout(seconds, int(work.lengths.max()), num_output_tokens=int(work.lengths.sum()))
    engine.steps_by_gamma[0] = engine.num_steps
    return engine


def pooled_acceptance(engines: Sequence[EngineRollout]) -> RolloutAcceptance:
    return RolloutAcceptance(
        sum(engine.num_drafts for engine in engines),
        sum(engine.num_draft_tokens for engine in engines),
        sum(engine.num_accepted_tokens for engine in engines),
    )


def reduction(results: Sequence[RolloutResult]) -> float:
    """Share of plain vLLM's rollout time that is saved; negative where it took longer."""
    return 1 - sum(result.makespan_s for result in results) / sum(result.plain_makespan_s for result in results)


@dataclass(frozen=True)
class Spread:
    """Over seeds; standard deviation None with one seed."""

    mean: float
    sd: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, min(values), max(values))


def summary(by_seed: Sequence[list[RolloutResult]]) -> dict[str, Any]:
    """One policy over all seeds, as JSON. With a single rollout there is none after the first, and null stands there."""
    engines = [engine for results in by_seed for result in results for engine in result.engines]
    num_steps = sum(engine.num_steps for engine in engines)
    by_gamma = np.sum([engine.steps_by_gamma for engine in engines], axis=0)
    acceptance = pooled_acceptance(engines)
    later = [results[1:] for results in by_seed]
    return {
        "reduction_after_first": asdict(Spread.of([reduction(results) for results in later])) if later[0] else None,
        "reduction_first": asdict(Spread.of([reduction(results[:1]) for results in by_seed])),
        "makespan_s": statistics.fmean(result.makespan_s for results in by_seed for result in results),
        "num_output_tokens": sum(engine.num_output_tokens for engine in engines),
        "num_steps": num_steps,
        "speculating_share": 1 - float(by_gamma[0]) / num_steps,
        "mean_gamma_when_on": _mean_gamma(by_gamma),
        "acceptance_rate": acceptance.acceptance_rate,
        "mean_acceptance_length": acceptance.mean_acceptance_length,
        "extrapolated_share": sum(engine.num_extrapolated_steps for engine in engines) / num_steps,
    }


def _mean_gamma(by_gamma: np.ndarray) -> float | None:
    steps = by_gamma[1:].sum()
    return float((np.arange(1, len(by_gamma)) * by_gamma[1:]).sum() / steps) if steps else None
