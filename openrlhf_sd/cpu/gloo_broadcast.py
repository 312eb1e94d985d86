"""The trainer-to-engine weight broadcast over gloo, in the place NCCL has on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class GlooBroadcastGroup:
    """The one method of vLLM's `PyNcclCommunicator` that OpenRLHF calls, over a gloo process group of its own.

    vLLM's CPU worker is a plain subprocess, not a Ray actor, so `ray.util.collective` does not reach it; a stateless
    group does.
    Blocks in the constructor until all `world_size` ranks have joined. Rank 0's store listens at `host` only.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group

        from openrlhf_sd.cpu.loopback import listen_at

        self._group = stateless_init_torch_distributed_process_group(
            host=host,
            port=port,
            rank=rank,
            world_size=world_size,
            backend="gloo",
            listen_socket=listen_at(host, port) if rank == 0 else None,
        )

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        """Send `tensor` (contiguous, on the CPU) from rank `src` of the group, or receive into it. `stream` means
        nothing here."""
        import torch.distributed as dist

        # torch.distributed.broadcast() wants a rank of the default group; this group has no place in it.
        options = dist.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        self._group.broadcast([tensor], options).wait()
