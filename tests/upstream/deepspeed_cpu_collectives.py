"""DeepSpeed 0.19.6: on a CPU a training compiles a C++ extension that only inference calls

`init_distributed` builds collectives in shared memory: a compiler is needed, and a minute at first use.

Expected: nothing is compiled before something calls it.
"""

import importlib
import sys

import deepspeed
from deepspeed.ops.op_builder import cpu

built = []
cpu.ShareMemCommBuilder.load = lambda self, verbose=True: built.append(self.absolute_name())


class Initialized(Exception):
    pass


def stop(*args, **kwargs):
    raise Initialized


backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
backend.init_process_group = stop  # what comes after the build is of no interest
try:
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
except Initialized:
    pass
print("built at the start:", built)
if not built:
    sys.exit("not reproduced")
