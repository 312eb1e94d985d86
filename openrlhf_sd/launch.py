"""`openrlhf-sd`: OpenRLHF's PPO/GRPO training, with self-speculating rollout engines if asked for.

    openrlhf-sd --self-spec [fixed|toggle|adaptive|auto] [--self-spec.FIELD VALUE ...] <OpenRLHF's flags>
    openrlhf-sd <OpenRLHF's flags>            vanilla OpenRLHF, also without a GPU
    openrlhf-sd --explain ... [--self-spec.gpu NAME]      what these flags would run, without running it
    openrlhf-sd compare RUN_DIR RUN_DIR ...   what runs have recorded, side by side
    openrlhf-sd watch RUN_DIR                 one run's records, while it goes or after it
    openrlhf-sd --help

OpenRLHF's flags are those of `python -m openrlhf.cli.train_ppo_ray`. `python -m openrlhf_sd.launch` is the same.
Exit codes: 0 finished, 2 bad input, 130 interrupted, 1 anything else, mostly with a traceback.
"""

from __future__ import annotations

import argparse
import gc
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrlhf_sd import flags, garbage, preflight, provenance, worker_setup
from openrlhf_sd.config import SelfSpecError, printable
from openrlhf_sd.controller_states import checkpoint_step, controller_states
from openrlhf_sd.cpu import platform, ray_start
from openrlhf_sd.process_tree import adopt_orphans, end_descendants
from openrlhf_sd.rollout_starts import EngineStartError, RolloutStarts

if TYPE_CHECKING:
    from openrlhf_sd.rollout_engines import SelfSpecRun


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["compare"]:
            from openrlhf_sd import report

            return report.main(argv[1:]) or 0
        if argv[:1] == ["watch"]:
            from openrlhf_sd import watch

            return watch.main(argv[1:])
        if not argv or "-h" in argv or "--help" in argv:
            upstream_help = flags.upstream_parser().format_help()
            print(__doc__.strip(), flags.our_help(), "OpenRLHF's own flags:", upstream_help, sep="\n\n")
            return 0
        if flags.asks_to_explain(argv):
            from openrlhf_sd import explain

            return explain.main(argv)
        with garbage.search_postponed():
            return run(argv)
    except SelfSpecError as error:
        print(f"openrlhf-sd: error: {error}", file=sys.stderr)
        return 2
    except EngineStartError as error:
        print(f"openrlhf-sd: error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("openrlhf-sd: interrupted", file=sys.stderr)
        return 130


def run(argv: Sequence[str]) -> int:
    """Check, record and train. Raises SelfSpecError before anything has started."""
    config, run_dir, upstream_argv = flags.split_flags(argv)
    upstream = flags.parse_upstream(upstream_argv)
    preflight.check(config, run_dir, upstream)
    for warning in preflight.warnings(upstream):
        print(f"openrlhf-sd: warning: {printable(warning)}", file=sys.stderr)
    if run_dir is not None:
        # As they are now: the default of the name has the minute in it. One word each: a name may begin with a dash.
        tensorboard_dir = vars(upstream)["logger.tensorboard_dir"] or Path(run_dir) / "tensorboard"
        upstream_argv.append(f"--logger.tensorboard_dir={Path(tensorboard_dir).resolve()}")
        upstream_argv.append(f"--logger.wandb.run_name={vars(upstream)['logger.wandb.run_name']}")
        upstream = flags.parse_upstream(upstream_argv)

    # From here on torch is loaded, and soon the rest: say so before the silence.
    mode = "vanilla OpenRLHF" if config is None else f"OpenRLHF with self-speculation ({config.mode})"
    print(f"openrlhf-sd: {mode}: checking flags, then starting Ray and the engines (about a minute)", flush=True)
    on_cpu = platform.is_needed()
    if on_cpu:
        preflight.check_cpu(upstream)
    flags.check_upstream(upstream)
    settings = vars(upstream)
    resumed_step = checkpoint_step(settings) if config is not None or run_dir is not None else 0
    self_spec = calibration = None
    if config is not None:
        from openrlhf_sd.calibration_choice import choose_calibration, rollout_logprobs
        from openrlhf_sd.engine.args import resolve
        from openrlhf_sd.rollout_engines import SelfSpecRun

        # The scheme and group size that will run go into config.json, not the question.
        model, ranks = settings["actor.model_name_or_path"], settings["vllm.tensor_parallel_size"]
        config = resolve(config, model, ranks, "--actor.model_name_or_path")
        states = controller_states(settings, config.mode)
        with _ending_what_is_interrupted():
            calibration = choose_calibration(config, model, ranks, rollout_logprobs(settings))
        if calibration is not None:
            print(f"openrlhf-sd: {config.mode} decides by a calibration {calibration.describe()}", flush=True)
        self_spec = SelfSpecRun(config, calibration and calibration.cost_model, states)
        if states is not None:
            states.check(config, self_spec.costs)

    if run_dir is None:
        train(self_spec, None, resumed_step, upstream_argv, upstream, on_cpu)
        return 0
    provenance.begin_run(Path(run_dir), argv, config, vars(upstream))
    if calibration is not None:
        calibration.save(Path(run_dir) / "calibration.json")
    status = "failed"
    try:
        train(self_spec, run_dir, resumed_step, upstream_argv, upstream, on_cpu)
        status = "finished"
    finally:
        try:
            provenance.end_run(Path(run_dir), status)
        except OSError as error:
            print(f"openrlhf-sd: RECORDS INCOMPLETE: provenance.json could not be ended ({error.strerror})", file=sys.stderr)
        print(f"openrlhf-sd: {status}; records in {run_dir}", flush=True)
    return 0


def train(
    self_spec: SelfSpecRun | None,
    run_dir: str | None,
    resumed_step: int,
    upstream_argv: Sequence[str],
    upstream: argparse.Namespace,
    on_cpu: bool,
) -> None:
    """Run OpenRLHF's own main program in this process until training has ended. Leaves no process behind either way."""
    if on_cpu:
        platform.install()

    import openrlhf.trainer.ray
    import ray

    is_ours = self_spec is not None or run_dir is not None
    starts = RolloutStarts()
    if is_ours:
        from openrlhf_sd.rollout_engines import make_create_vllm_engines

        openrlhf.trainer.ray.create_vllm_engines = make_create_vllm_engines(self_spec, run_dir, resumed_step, starts.watch)

    adopt_orphans()
    garbage.end_without_search()
    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as at_end:
        start_ray = ray.init
        if on_cpu:
            folder = at_end.enter_context(ray_start.session_dir())
            setup = "openrlhf_sd.worker_setup.install_on_cpu" if is_ours else "openrlhf_sd.cpu.platform.install"
            start_ray = ray_start.ray_init_on_cpu(ray.init, upstream, folder, setup)
        elif is_ours:
            start_ray = worker_setup.with_setup_hook(ray.init)

        def init(*args: Any, **kwargs: Any) -> Any:
            gc.enable()  # what this process imports it has imported
            context = start_ray(*args, **kwargs)
            # Ray's own handler, installed just now, aborts the driver and leaves its processes.
            signal.signal(signal.SIGTERM, _interrupt)
            return context

        ray.init = init
        at_end.callback(end_descendants)
        at_end.callback(ray.shutdown)
        sys.argv = ["openrlhf-sd", *upstream_argv]
        try:
            runpy.run_module(flags.UPSTREAM_MODULE, run_name="__main__")
        except KeyboardInterrupt:
            starts.raise_failure()
            raise
        finally:
            starts.close()


@contextmanager
def _ending_what_is_interrupted() -> Iterator[None]:
    """A calibration may measure first, with engines of its own: they do not outlive a Ctrl-C or SIGTERM either."""
    adopt_orphans()
    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        end_descendants()
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _interrupt(signum: int, frame: object) -> None:
    """A SIGTERM ends the run like Ctrl-C does, so that Ray and the engines go with it."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
