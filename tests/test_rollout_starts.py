"""What the launcher's main thread hears of engines that start: real Ray, idle actors. In a whole run: tests/engine/test_faults.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os, threading, signal, sys, time
import ray
from openrlhf_sd.cpu.ray_start import session_dir
from openrlhf_sd.rollout_starts import EngineStartError, RolloutStarts

@ray.remote
class Engine:
    def __init__(self, fails):
        if fails is None:
            time.sleep(60)
        if fails:
            raise ValueError("no memory left")

def interrupt(*_):
    raise KeyboardInterrupt

with session_dir() as folder:
    ray.init(num_cpus=2, address="local", include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    signal.signal(signal.SIGTERM, interrupt)
    num_threads = threading.active_count()
    starts = RolloutStarts()
    engines = [Engine.remote(fails) for fails in {fails}]
    if {is_closed}:
        starts.close()
    starts.watch(engines)
    try:
        {meanwhile}
        print("not interrupted")
    except KeyboardInterrupt:
        try:
            starts.raise_failure()
            print("interrupted by somebody else")
        except EngineStartError as error:
            print(error)
    starts.close()
    assert threading.active_count() == num_threads, "a thread of ours is in Ray while it shuts down"
    ray.shutdown()
"""


@pytest.mark.parametrize(
    "fails, is_closed, meanwhile, heard",
    [
        pytest.param([False, True], False, "time.sleep(60)", "a rollout engine could not start (ValueError: no memory left);", id="fails"),
        pytest.param([False, False], False, "time.sleep(5)", "not interrupted", id="starts"),
        pytest.param([True], True, "time.sleep(8)", "not interrupted", id="fails when the run has ended"),
        pytest.param([None], False, "os.kill(os.getpid(), signal.SIGTERM)", "interrupted by somebody else", id="SIGTERM"),
    ],
)
def test_main_thread(fails, is_closed, meanwhile, heard):
    code = CODE.format(fails=fails, is_closed=is_closed, meanwhile=meanwhile)
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1].startswith(heard), finished.stdout + finished.stderr
