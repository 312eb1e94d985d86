"""A vLLM engine in a process of its own that measures bouts of decode steps; its chatter goes to a log file.

    engine = TimingEngine(EngineSettings(...), folder, log)   # starts at once; start several, then wait for each
    engine.wait_until_ready()
    steps = engine.measure(Bout(batch=8, prompt_tokens=200, gammas=[0, 3, 3, 3, 0], max_tokens=64))
    engine.close()

What a step's time holds: `openrlhf_sd/engine/step_timing.py`. Importing this imports neither torch nor vLLM; the process does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from calib.cell_times import TimedStep
from calib.sweep_plan import Bout
from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.cpu.engine_kwargs import IN_PROCESS_EXECUTOR, PLAIN_WORKER

START_LIMIT_S = 1800.0
"""A large model on a GPU loads, compiles and captures graphs for minutes; half an hour is a hang."""

KILL_GRACE_S = 5.0

NUM_LOG_LINES = 8


@dataclass(frozen=True)
class EngineSettings:
    model: str
    drafter: SelfSpecConfig | None
    """None: plain vLLM."""

    tensor_parallel_size: int
    max_model_len: int
    kv_cache_bytes: int
    max_num_seqs: int
    logprobs: int = 0
    """Per sampled token, as a rollout asks for them; 0 for none."""

    @property
    def name(self) -> str:
        return "plain" if self.drafter is None else "self-speculating"


class TimingEngine:
    """Raises SelfSpecError with what its log says where it cannot start or dies.

    Args:
        folder: for the times on their way here.
        log: file that takes everything vLLM prints.
    """

    def __init__(self, settings: EngineSettings, folder: Path, log: Path) -> None:
        self._settings = settings
        self._log = log
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs, log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "calib.timing_engine", str(theirs.fileno()), str(folder / f"{settings.name}.jsonl")],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
                    "VLLM_NO_USAGE_STATS": "1",
                },
            )
        self._send(settings)

    def wait_until_ready(self) -> None:
        if not self._connection.poll(START_LIMIT_S):
            raise SelfSpecError(f"the {self._settings.name} engine took over {START_LIMIT_S:.0f} s to start{self._complaints()}")
        self._receive("could not start")

    def measure(self, bout: Bout) -> list[TimedStep]:
        """Play one bout. The first step of a script has no step before it to be timed from, so there is one time less than gammas."""
        self._send(bout)
        steps = self._receive(f"failed at batch {bout.batch}, {bout.prompt_tokens} prompt tokens")
        return [TimedStep(*step) for step in steps]

    def close(self) -> None:
        """End the process and every process that vLLM started in it. Not by vLLM's own way out, which takes ten seconds and saves
        nothing here."""
        import psutil

        processes = []
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            processes = [top, *top.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, timeout=KILL_GRACE_S)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._connection.close()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; `_receive` says so
            self._connection.send(message)

    def _receive(self, what: str) -> Any:
        try:
            good, answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            good, answer = False, "its process has ended"
        if not good:
            raise SelfSpecError(f"the {self._settings.name} engine {what}: {answer}{self._complaints()}")
        return answer

    def _complaints(self) -> str:
        """The last errors in the log (vLLM's own last lines only say that something failed above), or its last lines."""
        lines = [line[:200] for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\wError: ", line) and "See root cause above" not in line]
        shown = list(dict.fromkeys(errors or lines))[-NUM_LOG_LINES:]
        return "".join(f"\n    {line}" for line in (*shown, f"whole log: {self._log}"))


def main(argv: Sequence[str] | None = None) -> int:
    """The process: takes its settings, then bouts, until the other end closes; one answer (is good, result or message) each."""
    descriptor, times_file = sys.argv[1:] if argv is None else argv
    connection = Connection(int(descriptor))
    llm = None
    try:
        settings = connection.recv()
        llm = _start(settings, Path(times_file))
        connection.send((True, None))
        for number in itertools.count():
            connection.send((True, _play(llm, number, Path(times_file), connection.recv(), settings.logprobs)))
    except EOFError:
        return 0
    except Exception as error:
        import traceback

        traceback.print_exc()
        connection.send((False, str(error).splitlines()[0] if str(error) else type(error).__name__))
        return 1
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def _start(settings: EngineSettings, times_file: Path) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    from openrlhf_sd.engine import step_timing
    from openrlhf_sd.engine.args import engine_args

    arguments = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "max_num_seqs": settings.max_num_seqs,
        # vLLM wants this share of a GPU to be free at the start and with the line above makes no other use of it.
        "gpu_memory_utilization": 0.1,
        "dtype": "bfloat16",
        # On CPU compilation takes half a minute per engine; on CUDA the graphs are what is to be timed.
        "enforce_eager": current_platform.is_cpu(),
        "skip_tokenizer_init": True,
        "load_format": "safetensors",
        "enable_prefix_caching": False,
    }
    if settings.logprobs:
        arguments["logprobs_mode"] = "processed_logprobs"  # OpenRLHF's
    if settings.drafter is None:
        arguments |= {"scheduler_cls": step_timing.PLAIN_QUALNAME, "additional_config": {}}
        if current_platform.is_cpu():  # as every engine of a training
            arguments["worker_cls"] = PLAIN_WORKER
            if settings.tensor_parallel_size == 1:
                arguments["distributed_executor_backend"] = IN_PROCESS_EXECUTOR
    else:
        arguments |= engine_args(settings.drafter, settings.model, settings.tensor_parallel_size)
        arguments["scheduler_cls"] = step_timing.SELF_SPEC_QUALNAME
    arguments["additional_config"] |= {step_timing.TIMES_FILE_ARG: str(times_file)}
    return LLM(settings.model, **arguments)


def _play(llm: Any, number: int, times_file: Path, bout: Bout, logprobs: int) -> list[list[float]]:
    from vllm import SamplingParams

    from openrlhf_sd.engine.step_timing import BOUT_ARG

    vocab_size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    random_token = random.Random(number).randrange
    prompts = [{"prompt_token_ids": [random_token(vocab_size) for _ in range(bout.prompt_tokens)]} for _ in range(bout.batch)]
    params = SamplingParams(
        temperature=1.0,
        max_tokens=bout.max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs or None,
        extra_args={BOUT_ARG: {"bout": number, "batch": bout.batch, "gammas": bout.gammas}},
    )
    times_file.write_text("")
    llm.generate(prompts, params, use_tqdm=False)
    lines = times_file.read_text().splitlines()
    if len(lines) != 1 or (record := json.loads(lines[0]))["bout"] != number:
        raise RuntimeError("the requests ended before their script was played: they never decoded all at once")
    return record["steps"]


if __name__ == "__main__":
    sys.exit(main())
