"""vLLM's worker hosting the self-drafter: installs it, follows weight syncs, refuses to run a drafter older than the policy."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.sampler import Sampler

from openrlhf_sd import garbage
from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine import compat
from openrlhf_sd.engine.drafter_probe import MAX_ERROR, relative_errors
from openrlhf_sd.engine.drafter_weights import DrafterWeights
from openrlhf_sd.engine.longest_drafts import profile_longest_drafts
from openrlhf_sd.engine.proposer import SelfDraftProposer
from openrlhf_sd.engine.quantize import is_decoder_weight
from openrlhf_sd.engine.weight_checks import ReceivedWeights, fingerprint


class StaleDrafterError(RuntimeError):
    """The drafter is older than the policy, or either is only partly updated."""


class BrokenWeightsError(RuntimeError):
    """The weights of the policy or the drafter are no numbers to compute with."""


class _SelfSpecWorking:
    """Mixed into the platform's own Worker."""

    def _self_spec_finish_kernels(self) -> None:
        """Nothing is done with loaded weights in the background."""

    def init_device(self) -> None:
        compat.check_versions()
        garbage.end_without_search()
        super().init_device()
        config = SelfSpecConfig.from_dict(self.vllm_config.additional_config["self_spec"])
        if self.use_v2_model_runner:
            raise RuntimeError("self-speculation: needs vLLM's V1 model runner; unset VLLM_USE_V2_MODEL_RUNNER")
        runner = self.model_runner
        runner.drafter = SelfDraftProposer(
            self.vllm_config, runner.device, runner, config.quant, config.group_size, finish_kernels=self._self_spec_finish_kernels
        )
        self._self_spec_end_drafts_with_the_context()
        profile_longest_drafts(runner, config.num_speculative_tokens)

        if not runner.use_async_scheduling:
            runner.propose_draft_token_ids = _skipping_gamma_0(runner.propose_draft_token_ids)

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        self._self_spec_policy_is_whole = True
        self._self_spec_received = ReceivedWeights()
        self._self_spec_fingerprint: str | None = None
        self._self_spec_drafter_error = self._self_spec_probe()
        self._self_spec_follow(self.model_runner.get_model())

    def update_max_model_len(self, max_model_len: int) -> None:
        """vLLM has found out how much context fits (`max_model_len=-1`); where drafts end moves with it."""
        super().update_max_model_len(max_model_len)
        self._self_spec_end_drafts_with_the_context()

    def _self_spec_end_drafts_with_the_context(self) -> None:
        """Upstream stops drafting num_speculative_tokens tokens before the context ends and schedules zeros as drafts from there on. Our
        drafter needs no such margin: positions past the end get a padding slot and the scheduler trims the drafts."""
        runner = self.model_runner
        runner.drafter.max_model_len = runner.max_model_len
        runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens + 1

    def get_kv_cache_spec(self):
        with self.model_runner.drafter.named_as_kv_sharers():
            return super().get_kv_cache_spec()

    @property
    def self_spec_drafter(self) -> DrafterWeights:
        return self.model_runner.drafter.weights

    def _self_spec_follow(self, policy: torch.nn.Module) -> None:
        """Every transport (NCCL, gloo, CUDA IPC, vLLM's own) hands its tensors to `policy.load_weights`; listen in there."""
        load_policy_weights = policy.load_weights

        def load_weights(weights):
            weights = list(weights)
            self._self_spec_policy_is_whole = False
            for name, weight in weights:
                self._self_spec_received.add(name, weight)
            loaded = load_policy_weights(weights)
            for name, weight in weights:
                self.self_spec_drafter.feed(name, weight)
            return loaded

        policy.load_weights = load_weights

    def self_spec_finish_sync(self) -> None:
        """End of a weight broadcast: from here on policy and drafter are whole and of one version.

        Raises:
            BrokenWeightsError: a parameter arrived with NaN or infinity, or a drafter layer no longer computes what the policy's does.
            StaleDrafterError: the drafter was made of other weights than the policy got.
        """
        received, self._self_spec_received = self._self_spec_received, ReceivedWeights()
        non_finite = received.non_finite()
        if non_finite:
            raise BrokenWeightsError(
                f"self-speculation: {len(non_finite)} parameters arrived with NaN or infinity, the first {non_finite[0]}: the training has "
                "diverged; lower --actor.adam.lr or go back to a checkpoint"
            )
        sources, checksums = self.self_spec_drafter.finish(), received.checksums()
        self.model_runner.drafter.take_over_attention_scales()  # sleep(level=2) has thrown them away with the weights
        stale = [name for name in checksums if is_decoder_weight(name) and sources.get(name) != checksums[name]]
        if stale:
            raise StaleDrafterError(
                f"self-speculation: {len(stale)} parameters changed between their arrival and their quantization, the first {stale[0]}, so "
                "the drafter is not the policy's; the trainer must leave a parameter alone until its update_weight has returned"
            )
        self._self_spec_drafter_error = self._self_spec_probe()
        self._self_spec_fingerprint = fingerprint(checksums)
        self._self_spec_policy_is_whole = True

    def _self_spec_probe(self) -> float:
        errors = relative_errors(self.model_runner.get_model(), self.model_runner.drafter.model)
        broken = [name for name, error in errors.items() if not error <= MAX_ERROR]
        if broken:
            raise BrokenWeightsError(
                f"self-speculation: {len(broken)} of {len(errors)} drafter layers do not compute what the policy's do, the first "
                f"{broken[0]} (relative error {errors[broken[0]]:.2f}); try another --self-spec.quant and report it"
            )
        return max(errors.values())

    def self_spec_sync_report(self) -> dict[str, Any]:
        """Of the last weight sync (an RPC for the rollout actor): seconds of the re-quantization, largest relative error of a drafter
        layer's output, and a fingerprint of the weights that arrived (None before the first sync)."""
        return {
            "requantize_s": self.self_spec_drafter.requantize_s,
            "drafter_error": self._self_spec_drafter_error,
            "fingerprint": self._self_spec_fingerprint,
        }

    def self_spec_score_at(self, temperature: float) -> None:
        """Prompt logprobs are from now on those of `temperature`, where vLLM's own are those of 1 (an RPC for the audit)."""
        sampler = self.model_runner.sampler
        if temperature == 1:  # upstream's own, which copies no logits
            sampler.__dict__.pop("compute_logprobs", None)
            return
        sampler.compute_logprobs = lambda logits: Sampler.compute_logprobs(logits / temperature)

    def self_spec_requantize_checkpoint(self) -> float:
        """Quantize the policy's files once more and return the seconds it took without reading them (an RPC for measurements)."""
        self.model_runner.drafter.quantize_checkpoint(self.model_runner.get_model())
        return self.self_spec_drafter.requantize_s

    def execute_model(self, scheduler_output: SchedulerOutput):
        if not (self._self_spec_policy_is_whole and self.self_spec_drafter.is_whole):
            raise StaleDrafterError(
                "self-speculation: a weight update is under way or ended without its end mark, or sleep(level=2) threw the weights away, "
                "so policy and drafter are not of one version; before generating, send every parameter, the last one with "
                "update_weight(..., empty_cache=True)"
            )
        return super().execute_model(scheduler_output)


def _skipping_gamma_0(propose_draft_token_ids):
    """With gamma 0 upstream still prepares the drafter's inputs, request by request in Python, and copies a tensor without columns: a tenth
    of a small model's step. Synchronous scheduling needs nothing of it (asynchronous scheduling reads the counts of accepted tokens
    it leaves behind)."""

    def propose(scheduler_output: SchedulerOutput, *args, **kwargs):
        if scheduler_output.num_spec_tokens_to_schedule == 0:
            return [[] for _ in scheduler_output.num_scheduled_tokens]
        return propose_draft_token_ids(scheduler_output, *args, **kwargs)

    return propose


if current_platform.is_cpu():
    from openrlhf_sd.cpu.memory import give_freed_memory_back
    from openrlhf_sd.cpu.worker import PlainCpuWorker
    from openrlhf_sd.engine import cpu_int4, cpu_int8, cpu_repairs

    class SelfSpecWorker(_SelfSpecWorking, PlainCpuWorker):
        def init_device(self) -> None:
            cpu_repairs.install()
            cpu_int4.install()
            cpu_int8.install()
            # As LINEARS_ARG: the drafter's kernels are chosen by it, and vLLM's digest knows nothing of the processor.
            self.vllm_config.additional_config["self_spec_vnni"] = torch.cpu._is_vnni_supported()
            super().init_device()

        def _self_spec_finish_kernels(self) -> None:
            cpu_int8.finish_packing()

        def self_spec_finish_sync(self) -> None:
            super().self_spec_finish_sync()
            give_freed_memory_back()

else:
    from vllm.v1.worker.gpu_worker import Worker

    class SelfSpecWorker(_SelfSpecWorking, Worker):
        def sleep(self, level: int = 1) -> None:
            super().sleep(level)
            if level == 2:  # throws the weights away; level 1, OpenRLHF's, keeps them
                self._self_spec_policy_is_whole = False
