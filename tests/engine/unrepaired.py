"""Workers made faulty on purpose: upstream faults left in place, to show that each repair is needed, and a biased sampler."""

from __future__ import annotations

from vllm.model_executor.kernels.linear import _POSSIBLE_INT8_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.platforms import PlatformEnum
from vllm.v1.sample import rejection_sampler

from openrlhf_sd.engine import cpu_repairs
from openrlhf_sd.engine.cpu_int8 import TorchInt8LinearKernel
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
        # Without VNNI instructions another kernel comes first, which has no such fault.
        _POSSIBLE_INT8_KERNELS[PlatformEnum.CPU].remove(TorchInt8LinearKernel)


_upstream_rejection_sample = rejection_sampler.rejection_sample


def _accepting_too_often(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, *args, **kwargs):
    """Halving the draft's probabilities doubles every acceptance probability p / q."""
    halved = None if draft_probs is None else draft_probs * 0.5
    return _upstream_rejection_sample(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, halved, *args, **kwargs)


class BiasedSampler(SelfSpecWorker):
    def init_device(self) -> None:
        super().init_device()
        rejection_sampler.rejection_sample = _accepting_too_often


class ChangesWeightsUnderWay(SelfSpecWorker):
    """As a trainer would that went on with its optimizer step while its memory was still being read (CUDA IPC)."""

    def _self_spec_follow(self, policy) -> None:
        load_weights = policy.load_weights

        def load_and_change(weights):
            loaded = load_weights(weights)
            for _, weight in weights:
                weight.mul_(1.5)
            return loaded

        policy.load_weights = load_and_change
        super()._self_spec_follow(policy)


class UselessDrafter(SelfSpecWorker):
    """Its layers are right, so no check at the sync objects, and what comes out of the last one is turned round."""

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.drafter.model.register_forward_hook(lambda module, args, hidden_states: -hidden_states)


class LosesVerifiedKV(SelfSpecWorker):
    """Every verify step finds the keys and values of all tokens so far a tenth smaller than the policy wrote them."""

    def execute_model(self, scheduler_output):
        if scheduler_output.scheduled_spec_decode_tokens:
            for cache in self.model_runner.kv_caches:
                cache.mul_(0.9)
        return super().execute_model(scheduler_output)
