"""How Ray starts on a machine without GPUs, for an OpenRLHF that asks for one GPU per model replica."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from openrlhf_sd.cpu import loopback

SPARE_SLOTS = 4
"""Logical slots beyond the models': the trainer actor and OpenRLHF's short-lived helpers."""


@contextmanager
def session_dir() -> Iterator[str]:
    """Where Ray keeps sockets and logs: a new folder that only this user can enter, removed at the end unless the run
    fails; or RAY_TMPDIR, which is left alone."""
    chosen = os.environ.get("RAY_TMPDIR")
    # Not in TMPDIR: Ray's socket paths must stay under 108 characters.
    closed = None if chosen else tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    # Ray lets everyone write into the folder it is given; behind a closed one nobody gets there.
    folder = chosen or os.path.join(closed, "r")
    keep = chosen is not None
    try:
        yield folder
    except Exception:
        keep = True
        print(f"openrlhf-sd: Ray's logs of the failed run are in {folder}", file=sys.stderr)
        raise
    finally:
        if not keep:
            shutil.rmtree(closed, ignore_errors=True)  # a dying process of Ray may still be writing its log


def ray_init_on_cpu(ray_init: Callable[..., Any], upstream: argparse.Namespace, session_dir: str, worker_setup: str) -> Callable[..., Any]:
    """A `ray.init` for OpenRLHF's own call: it adds virtual GPUs and, in every worker, a call of the function named `worker_setup`.

    OpenRLHF calls it after its own checks of the flags, so nothing starts for a run that cannot begin.
    """

    def init(runtime_env: dict[str, Any], **kwargs: Any) -> Any:
        joins_cluster = bool(os.environ.get("RAY_ADDRESS"))  # one that someone else has sized
        runtime_env = {
            **runtime_env,
            "env_vars": {**runtime_env["env_vars"], **worker_env_vars(is_alone=not joins_cluster)},
            "worker_process_setup_hook": worker_setup,
        }
        if joins_cluster:
            return ray_init(runtime_env=runtime_env, **kwargs)
        loopback.keep_ray_on_loopback()
        slots = num_slots(upstream) + SPARE_SLOTS
        return ray_init(
            runtime_env=runtime_env,
            # Logical: what is placed on them shares the real cores.
            num_cpus=slots,
            num_gpus=slots,
            include_dashboard=False,
            _system_config={
                # Ray runs its workers at nice 15: beside anything else on the machine they would get next to nothing.
                "worker_niceness": 0,
                # Ray kills the children of a worker that exits, and so vLLM's engine and the process that removes its shared
                # memory: every run left 160 MiB in /dev/shm. `end_descendants` ends them in order.
                "kill_child_processes_on_worker_exit": False,
            },
            # A cluster and a folder of its own, or Ray would join another run's on the same machine, or another user's.
            address="local",
            _temp_dir=session_dir,
            **kwargs,
        )

    return init


def num_slots(upstream: argparse.Namespace) -> int:
    """One logical GPU for every model replica OpenRLHF may place, by its flags."""
    flags = vars(upstream)
    replicas = sum(flags[f"{role}.num_nodes"] * flags[f"{role}.num_gpus_per_node"] for role in ("actor", "ref", "reward", "critic"))
    return replicas + (flags["vllm.num_engines"] or 0) * flags["vllm.tensor_parallel_size"]


def worker_env_vars(is_alone: bool) -> dict[str, str]:
    """Settings of every Ray worker of the run, for OpenMP and, where one machine is all there is, for gloo, unless the user's
    environment says otherwise.

    vLLM's own number of threads is left at its default, which keeps one core free of them. Giving that core to the model
    too, when vLLM's scheduler ran there, brought nothing at best and decode steps 3 times slower at worst (3M and 60M
    parameters, batch 1 to 32, two cores shared with other work).
    """
    ours = {
        # Ray would give the trainer one OpenMP thread per logical CPU of its actor, that is one.
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        # Threads that spin at every barrier stall each other once anything else runs on the machine: with one busy
        # process beside it on two cores, a forward and backward pass of a 3M-parameter model took 0.75 s, not 0.17 s.
        # Alone, spinning is up to 1.7 times faster for tiny models. `CpuRolloutActor` takes this back for vLLM.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if is_alone:
        ours |= loopback.ENV_VARS
    return {name: os.environ.get(name, value) for name, value in ours.items()}
