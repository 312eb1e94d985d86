"""Patches that let unmodified OpenRLHF 0.11.2 train without CUDA.

OpenRLHF names CUDA literally: as the current device, in a device mesh, in its replay buffer, in its weight broadcast,
and by importing flash-attn. `install()` answers each of those names on the CPU, one patch per name, each when its
module is imported. DeepSpeed's ZeRO-3 gets one too: it counts on CUDA's collectives to end in order. It runs in the
driver and, as Ray's `worker_process_setup_hook`, in every Ray worker; the vLLM engine's own processes need none of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from openrlhf_sd import garbage
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.import_patches import ModulePatch, patch_on_import


def is_needed() -> bool:
    """True only where torch is a build without CUDA.

    Raises:
        SelfSpecError: torch is a build for CUDA and cannot use a GPU here: training on the CPU is not what was asked for.
    """
    import torch

    if torch.cuda.is_available():
        return False
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise SelfSpecError(
                f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and cannot use a GPU here ({reason}); mend the driver "
                "or start this where the GPUs are; for a machine without one, install the CPU stack with examples/setup.sh"
            ) from error
    return True


def install() -> None:
    """Patch this process. Idempotent. The caller has made sure that `is_needed()`; in a Ray worker the driver has."""
    garbage.spare_imports()
    patch_on_import(PATCHES)


@contextmanager
def _torch(torch: ModuleType) -> Iterator[None]:
    yield
    # `.to(torch.cuda.current_device())` is how OpenRLHF puts tensors on the training device, all over the trainer.
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Called around training, weight sync and device selection. There is one device, nothing is asynchronous, nothing is
    # cached.
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    # Handed to the communicator's broadcast(), which ignores it on the CPU.
    torch.cuda.current_stream = lambda device=None: None
    # The trainer computes in bf16, which not every processor can.
    from openrlhf_sd.cpu import bf16_products

    bf16_products.install()


@contextmanager
def _rendezvous(module: ModuleType) -> Iterator[None]:
    yield
    # The trainer's ranks meet at a store that would listen on every interface.
    from openrlhf_sd.cpu.loopback import store_at_its_address

    module.TCPStore = store_at_its_address(module.TCPStore)


@contextmanager
def _ring_attn_utils(module: ModuleType) -> Iterator[None]:
    # It imports flash-attn at module level for packing and ring attention, neither of which a CPU run may ask for. The
    # stand-in is visible to this import only: transformers, vLLM and OpenRLHF's own loss probe for flash-attn and must
    # keep finding none.
    stand_ins = {
        "flash_attn": (),
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils": (),
        "flash_attn.utils.distributed": ("all_gather",),
    }
    for name, functions in stand_ins.items():
        stand_in = ModuleType(name)
        for function in functions:
            setattr(stand_in, function, _refuse(f"{name}.{function}"))
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _refuse(function: str) -> Callable[..., None]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError(
            f"{function} was called, but there is no flash-attn on the CPU: "
            "use --ds.attn_implementation sdpa or eager, and neither --ds.packing_samples nor "
            "--train.dynamic_batch_enable nor --ds.ring_attn_size > 1"
        )

    return refuse


@contextmanager
def _deepspeed_strategy(module: ModuleType) -> Iterator[None]:
    yield
    # setup_distributed() asks for a "cuda" mesh; DeepSpeed has initialized gloo.
    init_device_mesh = module.init_device_mesh
    module.init_device_mesh = lambda device_type, *args, **kwargs: init_device_mesh("cpu", *args, **kwargs)

    # DeepSpeed's fused Adam for the CPU is a C++ extension: a compiler, and 35 s at first use. torch's fused AdamW is
    # as fast (32 against 31 ms for 60M parameters on two cores; torch's default AdamW takes 130).
    get_train_ds_config = module.get_train_ds_config

    @functools.wraps(get_train_ds_config)
    def with_torch_adam(*args: object, **kwargs: object) -> dict:
        config = get_train_ds_config(*args, **kwargs)
        if config.get("optimizer", {}).get("type") == "AdamW":
            config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
        return config

    module.get_train_ds_config = with_torch_adam

    # The trainer passes "cuda" as the device of the moving average.
    moving_average = module.DeepspeedStrategy.moving_average
    module.DeepspeedStrategy.moving_average = lambda self, model, model_ema, beta, device: moving_average(
        self, model, model_ema, beta, "cpu"
    )


@contextmanager
def _deepspeed_comm(module: ModuleType) -> Iterator[None]:
    yield
    # At its start it compiles collectives in shared memory for inference, which a training never calls: a compiler, and a
    # minute at first use.
    module.build_shm_op = lambda: None


@contextmanager
def _partition_parameters(module: ModuleType) -> Iterator[None]:
    yield

    # Gathering several ZeRO-3 parameters together starts one asynchronous all-gather for each and waits for the last
    # one only. Those of CUDA end in order, those of gloo do not: weights are read, or loaded from the checkpoint,
    # before the old partitions arrive on top of them. The one by one gathering beside it waits for each. Mended after
    # 0.19.6 (github.com/deepspeedai/DeepSpeed/pull/8539).
    def gather(self: object, param_list: list, hierarchy: int = 0, quantize: bool = False) -> None:
        self._allgather_params_sequential(param_list, hierarchy)

    module.Init._allgather_params_coalesced = gather


@contextmanager
def _replay_buffer(module: ModuleType) -> Iterator[None]:
    yield
    # Its constructor writes torch.device(f"cuda:{current_device}"), with an index where ours answers "cpu".
    init = module.NaiveReplayBuffer.__init__
    torch = module.torch

    @functools.wraps(init)
    def init_on_cpu(self: object, *args: object, **kwargs: object) -> None:
        current_device = torch.cuda.current_device
        torch.cuda.current_device = lambda: 0
        try:
            init(self, *args, **kwargs)
        finally:
            torch.cuda.current_device = current_device
        self.target_device = torch.device("cpu")

    module.NaiveReplayBuffer.__init__ = init_on_cpu


@contextmanager
def _distributed_util(module: ModuleType) -> Iterator[None]:
    yield

    # The trainer's end of the weight broadcast; `ppo_actor` imports it by name, and always after this patch.
    def stateless_init_process_group(master_address: str, master_port: int, rank: int, world_size: int, device: object):
        from openrlhf_sd.cpu.gloo_broadcast import GlooBroadcastGroup

        return GlooBroadcastGroup(master_address, master_port, rank, world_size)

    module.stateless_init_process_group = stateless_init_process_group


@contextmanager
def _vllm_engine(module: ModuleType) -> Iterator[None]:
    yield
    # create_vllm_engines() names this actor and its GPU-sized engine arguments literally. Ray refuses to subclass an
    # actor class, so the subclass is made of what the decorator wrapped. Worker processes get it from the driver by
    # value.
    from openrlhf_sd.cpu.rollout_actor import cpu_rollout_actor

    module.RolloutRayActor = cpu_rollout_actor(module.RolloutRayActor)


PATCHES: dict[str, ModulePatch] = {
    "torch": _torch,
    "torch.distributed.rendezvous": _rendezvous,
    "deepspeed.comm.torch": _deepspeed_comm,
    "deepspeed.runtime.zero.partition_parameters": _partition_parameters,
    "openrlhf.models.ring_attn_utils": _ring_attn_utils,
    "openrlhf.utils.deepspeed.deepspeed": _deepspeed_strategy,
    "openrlhf.trainer.ppo_utils.replay_buffer": _replay_buffer,
    "openrlhf.utils.distributed_util": _distributed_util,
    "openrlhf.trainer.ray.vllm_engine": _vllm_engine,
}
