"""Rollouts simulated step by step with the very policies of the engine: what each saves against plain vLLM, or a recorded run replayed.

    python -m openrlhf_sd.simulator --sweep sweep.csv --model-config config.json --acceptance 0.9 --lengths lognormal:1500,1.0,8192
    python -m openrlhf_sd.simulator --calibration CAL.json --policy auto,oracle --lengths lengths.txt --json
    python -m openrlhf_sd.simulator --calibration CAL.json --trace RUN_DIR/metrics.jsonl

True step times come from a measured sweep, interpolated (simulation/step_times.py says how), and the policies then decide by a cost model
fitted on that sweep, or by --calibration, so that prediction and truth differ as they do in reality. Without a sweep the calibration is
the truth as well. A rollout begins with all prompts computed: prefill is not simulated (a replay adds it). Off, a speculating engine
takes as long as plain vLLM where the sweep does not say otherwise; the off steps of the published A100 sweeps are not used, since
under identical prompts they come out cheaper than plain vLLM at large batches.

Policies: ar (plain vLLM), fixed, toggle, adaptive, auto as in training, and oracle, which knows true step times and acceptance and takes
before every step the gamma in 0..16 with the fewest seconds per token. Flags --self-spec.FIELD VALUE set what they set in training;
--self-spec.gamma is for fixed and toggle, adaptive starts on the first rung of its ladder.
Reduction is 1 - makespan / makespan of plain vLLM on the very same requests, makespan being the slowest engine's seconds, summed over
rollouts. The first rollout knows no acceptance yet and is reported alone too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.command_line import CommandParser, number
from openrlhf_sd import flags
from openrlhf_sd.config import MODES, SelfSpecConfig, SelfSpecError
from openrlhf_sd.policy.speedup import StepCosts
from openrlhf_sd.simulation.acceptance import acceptance_process
from openrlhf_sd.simulation.lengths import length_source
from openrlhf_sd.simulation.rollouts import (
    ORACLE,
    PLAIN,
    RandomInputs,
    RolloutInputs,
    RolloutResult,
    simulate_seed,
    summary,
)
from openrlhf_sd.simulation.step_times import StepTimes, from_cost_model
from openrlhf_sd.simulation.sweep_truth import costs_of_sweep, true_step_times
from openrlhf_sd.simulation.tables import print_tables
from openrlhf_sd.simulation.trace import Trace, overall_error, read_trace, replay_rows

POLICIES = (PLAIN, *MODES, ORACLE)

RANDOM_DEFAULTS = {
    "lengths": "lognormal:1500,1.0,8192",
    "acceptance": "0.9",
    "engines": 8,
    "batch": 128,
    "prompt": 512,
    "rollouts": 6,
}
"""Of flags that a trace has its own values for. Sizes are those of the paper's experiments."""


def main(argv: Sequence[str] | None = None) -> int:
    try:
        parser = _parser()
        args, rest = parser.parse_known_args(argv)
        policy_flags = [token for token in rest if token.startswith(flags.PREFIX)]
        if rest and not policy_flags:
            parser.error(f"unknown argument {rest[0]}")
        document = run(args, rest)
    except SelfSpecError as error:
        print(f"simulator: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("simulator: interrupted", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        print_tables(document)
    return 0


def run(args: argparse.Namespace, policy_flags: Sequence[str]) -> dict[str, Any]:
    """The printed document. Raises SelfSpecError before anything is simulated."""
    _check_combinations(args)
    trace, inputs, max_batch, num_rollouts = _inputs(args)
    policies = _policies(args, policy_flags, trace)
    needs_costs = any(config is not None and config.mode != "fixed" for _, config in policies) and not args.no_calibration
    costs, times, truth = _costs_and_times(args, max_batch, needs_costs)
    job = Job(policies, inputs, times, costs, num_rollouts, args.noise)
    by_seed = simulate_seeds(job, range(args.seeds), args.jobs)

    document: dict[str, Any] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "json"},
        "policy_flags": list(policy_flags),
        "truth": {**truth, "filled_points": times.num_filled},
        "policies": {name: summary([results[name] for results in by_seed]) for name, _ in policies},
    }
    if trace is not None:
        document["replay"] = {name: _replay(trace, times, name, by_seed) for name, _ in policies}
    return document


@dataclass(frozen=True)
class Job:
    """Everything but the seed; picklable."""

    policies: Sequence[tuple[str, SelfSpecConfig | None]]
    inputs: RolloutInputs
    times: StepTimes
    costs: StepCosts | None
    num_rollouts: int
    noise: float

    def __call__(self, seed: int, on_rollout: Callable[[], None] = lambda: None) -> dict[str, list[RolloutResult]]:
        return simulate_seed(
            self.policies,
            self.inputs,
            self.times,
            self.costs,
            seed=seed,
            num_rollouts=self.num_rollouts,
            noise=self.noise,
            on_rollout=on_rollout,
        )


def simulate_seeds(job: Job, seeds: Sequence[int], num_jobs: int = 1) -> list[dict[str, list[RolloutResult]]]:
    """Results per seed, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating rollouts", total=len(seeds) * job.num_rollouts)
        if num_jobs == 1:
            return [job(seed, lambda: progress.advance(task)) for seed in seeds]
        with ProcessPoolExecutor(num_jobs) as pool:
            futures = [pool.submit(job, seed) for seed in seeds]
            for _ in as_completed(futures):
                progress.advance(task, job.num_rollouts)
            return [future.result() for future in futures]


def _check_combinations(args: argparse.Namespace) -> None:
    if args.sweep is None and args.calibration is None:
        raise SelfSpecError("--sweep or --calibration: give at least one; it says what steps cost")
    if args.model_config is not None and args.sweep is None:
        raise SelfSpecError("--model-config: means nothing without --sweep; drop it")
    if args.model_config is not None and args.calibration is not None:
        raise SelfSpecError("--model-config: is for fitting the sweep, and --calibration is fitted already; drop one of them")
    if args.no_calibration and args.sweep is not None and (args.calibration or args.model_config):
        raise SelfSpecError("--no-calibration: contradicts --calibration and --model-config; drop one of them")
    if args.trace is not None:
        for name in RANDOM_DEFAULTS:
            if name != "acceptance" and getattr(args, name) is not None:
                raise SelfSpecError(f"--{name}: comes from the run that --trace replays; drop it")
    elif args.policy is None:
        args.policy = ",".join(POLICIES)


def _inputs(args: argparse.Namespace) -> tuple[Trace | None, RolloutInputs, int, int]:
    """(trace if any, inputs, largest batch, number of rollouts)"""
    if args.trace is not None:
        trace = read_trace(args.trace, acceptance_process(args.acceptance) if args.acceptance else None)
        return trace, trace, trace.max_batch, len(trace.rollouts)
    for name, default in RANDOM_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    process = acceptance_process(args.acceptance)
    inputs = RandomInputs(length_source(args.lengths), process, args.engines, args.batch, args.prompt)
    return None, inputs, args.batch, args.rollouts


def _policies(args: argparse.Namespace, policy_flags: Sequence[str], trace: Trace | None) -> list[tuple[str, SelfSpecConfig | None]]:
    if args.policy is None:
        if trace.policy is None:
            raise SelfSpecError(f"--policy: {args.trace} has no readable config.json beside it that says what ran; name a policy")
        args.policy = trace.policy
    names = args.policy.split(",")
    policies = []
    for name in names:
        if name not in POLICIES:
            raise SelfSpecError(f"--policy: unknown policy {name!r}; choose among {','.join(POLICIES)}")
        if names.count(name) > 1:
            raise SelfSpecError(f"--policy: {name} is given twice")
        if name in (PLAIN, ORACLE):
            policies.append((name, None))
        elif trace is not None and name == trace.policy and not policy_flags:
            policies.append((name, trace.config))
        else:
            policies.append((name, _mode_config(name, policy_flags, args.no_calibration)))
    if trace is not None and not trace.knows_acceptance and set(names) != {PLAIN}:
        raise SelfSpecError(f"--trace: {args.trace} recorded no acceptance; give --acceptance, or --policy {PLAIN}")
    return policies


def _mode_config(name: str, policy_flags: Sequence[str], no_calibration: bool) -> SelfSpecConfig:
    config, _, unknown = flags.split_flags([flags.MODE_FLAG, "fixed", *policy_flags])
    if unknown:
        raise SelfSpecError(f"{unknown[0]}: no such flag; see python -m openrlhf_sd.simulator --help")
    gamma = config.ladder[0] if name == "adaptive" else config.gamma
    calibration = "none" if no_calibration else config.calibration
    return dataclasses.replace(config, mode=name, gamma=gamma, calibration=calibration)


def _costs_and_times(args: argparse.Namespace, max_batch: int, needs_costs: bool) -> tuple[StepCosts | None, StepTimes, dict]:
    """(what policies believe, what is true, where that comes from)"""
    costs = None
    if args.calibration is not None:
        from openrlhf_sd.calibration import load

        costs = load(args.calibration).cost_model
    if args.sweep is None:
        believed = costs if needs_costs else None
        return believed, from_cost_model(costs, max_batch), {"calibration": args.calibration.name}
    sweep, times = true_step_times(args.sweep, max_batch)
    if costs is not None:  # what policies believe is about the prompts that the truth was taken with
        costs = costs.under("distinct" if sweep.distinct_prompts else "identical")
    elif needs_costs:
        if args.model_config is None:
            raise SelfSpecError("--model-config: needed to fit the sweep for the policies; or give --calibration or --no-calibration")
        costs = costs_of_sweep(sweep, args.model_config)
    return costs if needs_costs else None, times, {"sweep": args.sweep.name, "sha256": sweep.sha256}


def _replay(trace: Trace, times: StepTimes, name: str, by_seed: list[dict[str, list[RolloutResult]]]) -> dict[str, Any]:
    predicted_s = [
        [
            max(engine.seconds + times.prefill_s(tokens) for engine, tokens in zip(result.engines, rollout.num_prompt_tokens, strict=True))
            for result, rollout in zip(results[name], trace.rollouts, strict=True)
        ]
        for results in by_seed
    ]
    rows = replay_rows(trace, predicted_s)
    return {
        "ran": trace.policy,
        "rollouts": rows,
        "overall_error": overall_error(rows, "measured_s"),
        "overall_engine_error": overall_error(rows, "engine_s"),
        "engine_error_after_first": overall_error(rows[1:], "engine_s"),
    }


def _parser() -> CommandParser:
    parser = CommandParser("openrlhf_sd.simulator", __doc__)
    source = parser.add_argument_group("what steps cost")
    source.add_argument("--sweep", type=Path, metavar="CSV", help="measured step times, the truth; ours or the published format")
    source.add_argument("--calibration", type=Path, metavar="JSON", help="what the policies believe; without --sweep the truth too")
    source.add_argument("--model-config", type=Path, metavar="JSON", help="the sweep's model: config.json or its folder, for the fit")
    source.add_argument("--no-calibration", action="store_true", help="the policies get no cost model (auto and fixed only)")
    source.add_argument("--noise", type=number(float, 0, 1), default=0.0, help="log-standard-deviation of step times (default: 0)")
    work = parser.add_argument_group("what is decoded")
    default = RANDOM_DEFAULTS
    work.add_argument(
        "--lengths",
        metavar="SPEC",
        help=f"lognormal:MEAN,SIGMA,MAX, MEAN being that before the cut at MAX; or a file to draw from: one integer per line, a JSON "
        f"list, or a metrics.jsonl (default: {default['lengths']})",
    )
    work.add_argument(
        "--acceptance",
        metavar="SPEC",
        help="of a draft token: 0.9, positions:0.95,0.9,0.8 (each given that those before it were; the last goes on), or bursty:0.9 "
        f"(easy and hard stretches, 0.9 on average) (default: {default['acceptance']})",
    )
    whole = number(int, 1, 100_000)
    work.add_argument("--engines", type=whole, help=f"default: {default['engines']}")
    work.add_argument("--batch", type=number(int, 1, 4096), help=f"requests per engine and rollout (default: {default['batch']})")
    work.add_argument("--prompt", type=whole, help=f"prompt tokens of each request (default: {default['prompt']})")
    work.add_argument("--rollouts", type=whole, help=f"in a row; policies learn across them (default: {default['rollouts']})")
    work.add_argument("--trace", type=Path, metavar="JSONL", help="replay a run's metrics.jsonl: its lengths, prompts, acceptance")
    run = parser.add_argument_group("how")
    run.add_argument("--policy", metavar="NAMES", help=f"comma-separated (default: {','.join(POLICIES)}; in a replay what ran)")
    run.add_argument("--seeds", type=whole, default=3, help="seeds 0, 1, ... (default: 3)")
    run.add_argument("--jobs", type=number(int, 1, 256), default=1, help="seeds at once, each in a process (default: 1)")
    run.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
