"""ZeRO-3 between two real gloo ranks: a gather hands out what was last written, whole."""

import json
import os
from pathlib import Path

import pytest
import torch

from openrlhf_sd.cpu import platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform is inactive where CUDA is present")

# The weight takes so much longer than the bias that, were only the bias waited for, most rounds would be wrong.
SIDE = 4096
ROUNDS = 10


def write_and_gather(rank: int, folder: Path) -> None:
    """Rank 0 writes a weight and its bias, as a checkpoint is loaded; then all ranks read both and report what they saw."""
    platform.install()
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        linear = torch.nn.Linear(SIDE, SIDE)
    together = [linear.weight, linear.bias]
    gathered = []
    for value in range(1, ROUNDS + 1):
        with deepspeed.zero.GatheredParameters(together, modifier_rank=0), torch.no_grad():
            if rank == 0:
                for parameter in together:
                    parameter.fill_(value)
        with deepspeed.zero.GatheredParameters(together):
            gathered.append([[extreme.item() for extreme in parameter.aminmax()] for parameter in together])
    report_of(rank, folder).write_text(json.dumps(gathered))
    torch.distributed.destroy_process_group()


def report_of(rank: int, folder: Path) -> Path:
    """File of the smallest and the largest element of the weight and of the bias, per round."""
    return folder / f"gathered_by_rank_{rank}.json"


def test_parameters_gathered_together_have_all_arrived(tmp_path):
    torch.multiprocessing.spawn(write_and_gather, args=(tmp_path,), nprocs=2)
    for rank in range(2):
        gathered = json.loads(report_of(rank, tmp_path).read_text())
        assert gathered == [[[value, value], [value, value]] for value in range(1, ROUNDS + 1)]
