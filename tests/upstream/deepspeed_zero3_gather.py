"""DeepSpeed 0.19.6: ZeRO-3 over gloo reads parameters that have not arrived

`Init._allgather_params_coalesced` starts an asynchronous all-gather per parameter and waits for the last one only. NCCL's end in order,
gloo's do not. (Mended after this version, pull request 8539.)

Expected: two ranks gather a weight and its bias together and read what was last written. Seen: the weight, which takes longer, is in
part that of a round before.
"""

import importlib
import os
import sys
import tempfile

import torch

ROUNDS, SIDE = 10, 4096


def stale_rounds(rank: int, folder: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    import deepspeed

    # Else it compiles for a minute first (deepspeed_cpu_collectives.py).
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        linear = torch.nn.Linear(SIDE, SIDE)
    together = [linear.weight, linear.bias]
    stale = 0
    for value in range(1, ROUNDS + 1):
        with deepspeed.zero.GatheredParameters(together, modifier_rank=0), torch.no_grad():
            if rank == 0:
                for parameter in together:
                    parameter.fill_(value)
        with deepspeed.zero.GatheredParameters(together):
            stale += any(not torch.all(parameter == value) for parameter in together)
    with open(f"{folder}/{rank}", "w") as report:
        report.write(str(stale))
    torch.distributed.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(stale_rounds, args=(folder,), nprocs=2)
        stale = [int(open(f"{folder}/{rank}").read()) for rank in range(2)]
    print(f"of {ROUNDS} rounds, stale or torn ones by rank: {stale}")
    if not any(stale):
        sys.exit("not reproduced")


if __name__ == "__main__":
    main()
