"""Workers made faulty on purpose: upstream faults left in place, to show that each repair is needed, and a biased sampler."""

from __future__ import annotations

from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.v1.sample import rejection_sampler

from openrlhf_sd.engine import cpu_repairs
from openrlhf_sd.engine.worker import SelfSpecWorker

_upstream_expand = rejection_sampler.expand_batch_to_tokens


class WithoutExpandRepair(SelfSpecWorker):
    def init_device(self) -> None:
        super().init_device()
        rejection_sampler.expand_batch_to_tokens = _upstream_expand


class WithoutScaleRepair(SelfSpecWorker):
    def init_device(self) -> None:
        super().init_device()
        CPUInt8ScaledMMLinearKernel.process_weights_for_onednn = cpu_repairs._process_weights_for_onednn


_upstream_rejection_sample = rejection_sampler.rejection_sample


def _accepting_too_often(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, *args, **kwargs):
    """Halving the draft's probabilities doubles every acceptance probability p / q."""
    halved = None if draft_probs is None else draft_probs * 0.5
    return _upstream_rejection_sample(
        draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, halved, *args, **kwargs
    )


class BiasedSampler(SelfSpecWorker):
    def init_device(self) -> None:
        super().init_device()
        rejection_sampler.rejection_sample = _accepting_too_often
