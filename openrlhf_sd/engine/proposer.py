"""The self-drafter inside vLLM: a quantized copy of the policy that reads and writes the policy's own KV cache.

Overrides of `vllm.v1.spec_decode.draft_model.DraftModelProposer` (vLLM 0.29.0). What differs from a separate draft model:
no KV cache, embedding, final norm or head of its own, and no pass over the prompt, because the policy already wrote that KV.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from openrlhf_sd.engine.cpu_sampling import sample_by_inversion
from openrlhf_sd.engine.drafter_weights import DrafterWeights
from openrlhf_sd.engine.quantize import compressed_tensors_config

_DRAFT_PREFIX = "draft_model."
"""Prefix that DraftModelProposer gives the draft's modules; without it the names are the policy's."""


class SelfDraftProposer(DraftModelProposer):
    """Args: as upstream, then the resolved scheme and group size, and what `DrafterWeights` waits for."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner, quant: str, group_size: int, finish_kernels: Callable[[], None]
    ) -> None:
        super().__init__(vllm_config, device, runner)
        self._quant = quant
        self._group_size = group_size
        self._finish_kernels = finish_kernels
        self.weights: DrafterWeights | None = None

    def _create_draft_vllm_config(self) -> VllmConfig:
        base = super()._create_draft_vllm_config()
        quantization = compressed_tensors_config(self._quant, self._group_size)
        return replace(
            base,
            quant_config=None if quantization is None else CompressedTensorsConfig.from_config(quantization),
            # No file holds the drafter: it starts empty and is filled like after any weight sync.
            load_config=replace(base.load_config, load_format="dummy"),
        )

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        self.model.model.norm = target_model.model.norm
        self.take_over_attention_scales()
        self.weights = DrafterWeights(self.model, self.draft_model_config, self._quant, self._group_size, self._finish_kernels)
        self.quantize_checkpoint(target_model)

    @torch.no_grad()
    def take_over_attention_scales(self) -> None:
        """The policy's scales of queries, keys, values and probabilities: the keys and values are the policy's. What a drafter without a
        file is given is random, and backends differ in when they look (FlashInfer always, FlashAttention with an fp8 cache)."""
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in self._draft_attn_layer_names:
            draft, policy = layers[name], layers[name.removeprefix(_DRAFT_PREFIX)]
            for scale in ("_q_scale", "_k_scale", "_v_scale", "_prob_scale"):
                getattr(draft, scale).copy_(getattr(policy, scale))
                setattr(draft, f"{scale}_float", getattr(policy, f"{scale}_float"))
            draft._k_scale_cpu, draft._v_scale_cpu = policy._k_scale_cpu, policy._v_scale_cpu

    def quantize_checkpoint(self, target_model: torch.nn.Module) -> None:
        """Fill the drafter from the policy's files, the way a weight broadcast would."""
        loader = get_model_loader(self.vllm_config.load_config)
        for name, weight in loader.get_all_weights(self.vllm_config.model_config, target_model):
            self.weights.feed(name, weight.to(device=self.device, dtype=self.dtype))
        self.weights.finish()

    def _maybe_share_embeddings(self, target_language_model: torch.nn.Module) -> None:
        del self.model.model.embed_tokens
        self.model.model.embed_tokens = target_language_model.model.embed_tokens

    def _maybe_share_lm_head(self, target_language_model: torch.nn.Module) -> None:
        del self.model.lm_head
        self.model.lm_head = target_language_model.lm_head

    @contextmanager
    def named_as_kv_sharers(self) -> Iterator[None]:
        """Within, every draft attention layer names the policy layer whose KV tensors it shall share, so that vLLM's layout gives it
        those and no memory of its own.

        Only while the layout is made: a layer that names a target never writes its keys and values, and a drafter must write those of
        its draft tokens. torch.compile bakes the name into its trace, which is taken right after the layout.
        """
        context = self.vllm_config.compilation_config.static_forward_context
        layers = {name: context[name] for name in self._draft_attn_layer_names}
        for name, layer in layers.items():
            layer.kv_sharing_target_layer_name = name.removeprefix(_DRAFT_PREFIX)
        try:
            yield
        finally:
            for layer in layers.values():
                layer.kv_sharing_target_layer_name = None

    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """With one token per request at most, as a draft step has; upstream's with a whole prefill's, `num_speculative_tokens` times over,
        would take most of an engine's start on CPU."""
        if not is_graph_capturing:
            # Not one: this run is what torch.compile traces, and it takes a size of one for a constant.
            num_tokens = min(num_tokens, max(2, self.vllm_config.scheduler_config.max_num_seqs))
        super().dummy_run(num_tokens, use_cudagraphs, is_graph_capturing, slot_mappings)

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs=None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings=None,
    ) -> torch.Tensor:
        """Draft from the newest token of each request on.

        Returns (B, num_speculative_tokens) int64 token ids; with 0 an empty tensor and no forward pass. Upstream's first pass over
        all scheduled tokens is left out: it would overwrite the policy's verified keys and values with the drafter's.
        """
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = None
        batch_size = common_attn_metadata.batch_size()
        if num_speculative_tokens == 0:
            return torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)

        attn_metadata, last_positions = self._one_token_per_request(common_attn_metadata, num_rejected_tokens_gpu)
        runtime_mode, num_input_tokens, num_tokens_across_dp = self._determine_batch_execution_and_padding(batch_size)
        token_ids = next_token_ids
        drafted: list[torch.Tensor] = []
        draft_probs: list[torch.Tensor] = []
        for step in range(num_speculative_tokens):
            # Not from what it returns: there a position past the context's end is 0, from where the next draft steps would go on and
            # overwrite the policy's keys and values of the first tokens.
            self._update_positions_dependent_metadata(last_positions + step, attn_metadata, batch_size, num_input_tokens, self.block_size)
            attn_metadata._num_computed_tokens_cache = None  # of the draft step before; the line above advances all but this
            _, per_layer_attn_metadata = self.build_per_group_and_layer_attn_metadata(attn_metadata, draft_index=step)
            self.input_ids[:batch_size] = token_ids
            with set_forward_context(
                per_layer_attn_metadata,
                self.vllm_config,
                num_tokens=num_input_tokens,
                num_tokens_across_dp=num_tokens_across_dp,
                cudagraph_runtime_mode=runtime_mode,
                slot_mapping=self._get_slot_mapping(num_input_tokens),
            ):
                hidden_states = self.model(
                    input_ids=self.input_ids[:num_input_tokens],
                    positions=self._get_positions(num_input_tokens),
                    inputs_embeds=None,
                )
            token_ids, probs = self._sample_draft_tokens(hidden_states[:batch_size], sampling_metadata)
            drafted.append(token_ids)
            if probs is not None:
                draft_probs.append(probs)
        if draft_probs:
            self._last_draft_probs = torch.stack(draft_probs, dim=1).contiguous()
        return torch.stack(drafted, dim=1)

    def _sample_from_logits(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft with the request's own top-k and top-p. Upstream drafts with its temperature only: exact, but the policy then rejects
        every draft outside its nucleus."""
        top_k, top_p = sampling_metadata.top_k, sampling_metadata.top_p
        if sampling_metadata.all_random and (top_k is not None or top_p is not None):
            temperature = sampling_metadata.temperature.view(-1, 1)
            # Upstream divides by the temperature itself, after this.
            logits = apply_top_k_top_p(logits.float() / temperature, top_k, top_p) * temperature
        if self.device.type == "cpu" and sampling_metadata.all_random:
            probs = (logits / sampling_metadata.temperature.view(-1, 1)).softmax(dim=-1, dtype=torch.float32)
            return sample_by_inversion(probs), probs
        return super()._sample_from_logits(logits, sampling_metadata)

    def _one_token_per_request(
        self, verified: CommonAttentionMetadata, num_rejected_tokens: torch.Tensor | None
    ) -> tuple[CommonAttentionMetadata, torch.Tensor]:
        """Metadata of a decode step of one token per request, and the position of each request's last verified token, (B,) int64.

        `_update_positions_dependent_metadata` advances the metadata by one before every draft step. Everything it writes to is a copy:
        on CPU the runner's "device" tensors are its own bookkeeping.
        """
        batch_size = verified.batch_size()
        seq_lens = verified.seq_lens[:batch_size].clone()
        if num_rejected_tokens is not None:
            seq_lens -= num_rejected_tokens
        upper_bound = verified.seq_lens_cpu_upper_bound
        attn_metadata = dataclasses.replace(
            verified,
            query_start_loc=self.arange[: batch_size + 1],
            query_start_loc_cpu=torch.arange(batch_size + 1, dtype=torch.int32),
            seq_lens=seq_lens,
            # The host-side copies would need a device sync to follow the rejections; upstream drops them here too.
            _seq_lens_cpu=None,
            _num_computed_tokens_cpu=None,
            # Filled by some attention backends (FlexAttention) while the policy's step was prepared.
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
            seq_lens_cpu_upper_bound=None if upper_bound is None else upper_bound[:batch_size].clone(),
            num_actual_tokens=batch_size,
            max_query_len=1,
        )
        return attn_metadata, (seq_lens - 1).to(torch.int64)
