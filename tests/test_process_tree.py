"""The end of a run's processes, in a process of its own: it would end the tests too."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import signal, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
shared = SharedMemory(create=True, size=100)
print(shared.name, flush=True)
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys
import psutil
from openrlhf_sd import process_tree
process_tree.GRACE_S = 1.0
process_tree.adopt_orphans()
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
segment = "/dev/shm/" + child.stdout.readline().strip()
descendants = psutil.Process().children(recursive=True)
existed = os.path.exists(segment)
process_tree.end_descendants()
print(len(descendants), existed, os.path.exists(segment), sum(process.is_running() for process in descendants))
"""


def test_a_process_that_must_be_killed_leaves_no_shared_memory():
    ended = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    num_descendants, existed, exists_still, num_running = ended.stdout.split()
    assert (int(num_descendants), existed) == (2, "True"), "the child and its resource tracker"
    assert (exists_still, int(num_running)) == ("False", 0)


IMPATIENT = """
import os, signal, subprocess, sys, threading
from openrlhf_sd import process_tree
process_tree.GRACE_S = 1.0
process_tree.adopt_orphans()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
for number in (signal.SIGINT, signal.SIGTERM):
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
process_tree.end_descendants()
print(child.poll() is not None, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_a_second_ctrl_c_leaves_nothing_alive():
    ended = subprocess.run([sys.executable, "-c", IMPATIENT], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.split()) == (0, ["True", "True"]), ended.stderr
