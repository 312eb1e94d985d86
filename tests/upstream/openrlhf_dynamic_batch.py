"""OpenRLHF 0.11.2: with `--train.dynamic_batch_enable`, a rollout smaller than `--train.batch_size` never updates the policy

`NaiveReplayBuffer.setup_dynamic_batch` finds no whole step in it and leaves an empty buffer; the training loop runs over nothing and the
run goes on without a word.

Expected: an update, as without the flag, or an error.
"""

import sys
import tempfile
from types import SimpleNamespace

import torch
import torch.distributed as dist
from openrlhf.trainer.ppo_utils.replay_buffer import NaiveReplayBuffer

torch.cuda.current_device = lambda: "cpu"  # so that it runs on a machine without CUDA too

with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    samples = [SimpleNamespace(total_length=torch.tensor(10), action_mask=torch.ones(5)) for _ in range(4)]
    arguments = SimpleNamespace(
        train=SimpleNamespace(batch_size=8, max_tokens_per_gpu=64),
        rollout=SimpleNamespace(batch_size=4, n_samples_per_prompt=1),
        ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1),
    )
    mesh = {"dp": SimpleNamespace(get_group=lambda: dist.group.WORLD)}
    buffer = SimpleNamespace(items=samples, dynamic_batch=True)
    NaiveReplayBuffer.setup_dynamic_batch(buffer, SimpleNamespace(args=arguments, ds_device_mesh=mesh))
    num_micro_batches = NaiveReplayBuffer.__len__(buffer)
    dist.destroy_process_group()
print(f"{len(samples)} samples, --train.batch_size 8: {num_micro_batches} micro batches, {sum(buffer.dynamic_optimizer_step)} updates")
if num_micro_batches:
    sys.exit("not reproduced")
