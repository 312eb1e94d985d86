"""Seconds of a target, draft and verify step, from a model's shape and a few fitted terms of the machine it runs on.

    step   = linears + attention + launches and requests
    linears    roofline of bytes streamed and FLOPs over rows = batch * tokens per request, in the device's stairs (kernel_seconds.py)
    attention  the larger of KV bytes at stream bandwidth and tiles at attention_tile_s, in waves
    launches   per step, per layer, per request, and per token the activations and logits it moves

    paper                                       here
    BW_eff                                      Terms.stream_bytes_per_s
    F_eff                                       Terms.gemm_flops_per_s (target), Terms.draft_flops_per_s (quantized kernels)
    W_t, W_d                                    ModelConstants.weight_bytes("none"), .weight_bytes(quant); the head in, the embedding out
    kappa                                       ModelConstants.kv_bytes_per_token, counted and not fitted
    c_T, c_D, c_V                               Terms.target_request_s, .draft_request_s, .verify_request_s
    max(M, C)                                   kernel_seconds.roofline, an exponent in the place of the maximum
    T_T, T_D, T_V                               CostModel.target_step_s, .draft_step_s, .verify_step_s

Nearly all terms belong to the machine and none counts anything of the model, so a model's terms predict another model of the same
machine by changing `constants` alone (`calib.transfer`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy import kernel_seconds as kernels
from openrlhf_sd.policy.model_constants import BF16_BYTES, ModelConstants

PROMPTS = ("distinct", "identical")
"""distinct: every request reads its own keys and values from memory, as in RL. identical: all requests share one prompt under prefix
caching; it is read from memory once, and vLLM computes attention to it once (cascade). Sweeps so taken make long contexts look cheap."""

REFERENCE_HEAD_DIM = 128

ROWS_AT_ONCE = 256
"""Whole numbers of rows whose linears are computed together, when one of them is asked for."""

LOGIT_PASSES = 6
"""Times the sampler reads or writes a token's fp32 logits."""


@dataclass(frozen=True)
class Terms:
    """What is fitted. Seconds, bytes per second, FLOP per second, and ratios; all finite, none negative.

    The two exponents are 1 or more, rates are above 0.
    """

    compute_units: float
    """Streaming multiprocessors; 0 on a device without waves of tiles and CUDA graphs (CPU). Known, not fitted."""

    draft_pass_rows: float
    """Rows of one pass of the quantized kernel over its weights, in tiles of 16 (Marlin: 64); 0 for a kernel without such stairs. Known."""

    stream_bytes_per_s: float
    gemm_flops_per_s: float
    wide_tile_gain: float
    """How much faster a GEMM's wide tile computes."""
    roofline_exponent: float
    gemm_switch_s_per_byte: float
    """Per weight byte, from one row to many: CPUs without native bf16 leave a fast matrix-vector kernel there. About 0 on GPUs."""
    switch_half_rows: float
    """Rows after the first at which half of a switch has come; next to 0 where it comes at once."""

    attention_tile_s: float
    """One tile of 64 queries passing one key of head size 128; per layer."""
    attention_pair_cost: float
    cascade_layer_s: float
    """Identical prompts: launches that cascade attention adds, per layer."""
    cascade_min_context: float
    """Identical prompts: shortest context with cascade. 256 shared tokens in vLLM; a prompt of 256 without a BOS token is one too few."""

    layer_s: float
    """Launches of a target layer that hide behind nothing."""
    target_fixed_s: float
    verify_fixed_s: float
    target_request_s: float
    verify_request_s: float
    activation_passes: float
    """Activation and logit bytes of a token are moved at stream bandwidth so many times over."""

    draft_bytes_per_stream_byte: float
    """Bandwidth of the quantized kernels over stream bandwidth."""
    draft_flops_per_s: float
    draft_exponent: float
    draft_switch_s_per_byte: float
    """As gemm_switch_s_per_byte, for the drafter's quantized weights, in requests."""
    draft_layer_s: float
    draft_pass_layer_s: float
    """What every pass of 64 rows after the first adds per layer."""
    draft_fixed_s: float
    draft_request_s: float


TERM_NAMES = tuple(f.name for f in dataclasses.fields(Terms))
_POSITIVE = (
    "switch_half_rows",
    "stream_bytes_per_s",
    "gemm_flops_per_s",
    "wide_tile_gain",
    "draft_bytes_per_stream_byte",
    "draft_flops_per_s",
)
_EXPONENTS = ("roofline_exponent", "draft_exponent")


@dataclass(frozen=True)
class CostModel:
    """`StepCosts` of one model with one drafter on one machine. Batch, context, gamma: numbers, or numpy arrays that broadcast.

    Raises:
        SelfSpecError: an unknown scheme or regime of prompts.
    """

    constants: ModelConstants
    quant: str
    """Scheme of the drafter's linears."""
    terms: Terms
    prompts: str = "distinct"
    """The regime that is predicted, one of PROMPTS; `under` changes it."""

    _linears_s: dict[tuple[str, float], float] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Linears' seconds by rows. A controller asks thousands of times per second, about rows that are whole numbers."""

    def __post_init__(self) -> None:
        if self.prompts not in PROMPTS:
            raise SelfSpecError(f"cost model: prompts is {self.prompts!r}; it is one of {', '.join(PROMPTS)}")
        constants = self.constants
        layer_values = 10 * constants.hidden_size + 4 * constants.intermediate_size // constants.tensor_parallel_size
        activation_bytes = BF16_BYTES * constants.num_layers * layer_values + 4 * LOGIT_PASSES * constants.head_linear[0]
        derived = {
            "_draft_layers_bytes": constants.drafter_bytes(self.quant),
            "_target_bytes": constants.weight_bytes("none"),
            "_head_bytes": BF16_BYTES * constants.head_parameters,
            "_kv_bytes": constants.kv_bytes_per_token,
            "_token_s": self.terms.activation_passes * activation_bytes / self.terms.stream_bytes_per_s,
            "_tile_s": self.terms.attention_tile_s * constants.num_layers * constants.head_dim / REFERENCE_HEAD_DIM,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def target_step_s(self, batch, context):
        """A plain decode step."""
        terms = self.terms
        rows = kernels.graph_rows(batch, 1) if terms.compute_units else batch
        launches_s = terms.target_fixed_s + terms.target_request_s * batch + self._token_s * batch
        return self._linears(rows) + self._attention_s(batch, context, 1, may_cascade=True) + launches_s

    def verify_step_s(self, batch, context, gamma):
        """The target on gamma + 1 tokens of every request."""
        terms = self.terms
        rows = batch * (gamma + 1)
        launches_s = terms.verify_fixed_s + terms.verify_request_s * batch + self._token_s * rows
        return self._linears(rows) + self._attention_s(batch, context, gamma + 1, may_cascade=True) + launches_s

    def draft_step_s(self, batch, context, gamma=None):
        """One draft step.

        Args:
            gamma: what the engine was built for, where its CUDA graphs are captured for multiples of gamma + 1 rows, as in the published
                sweeps with their one engine per gamma. None: graphs of 1, 2, 4, 8, 16, 24, ... rows.
        """
        terms = self.terms
        rows = batch
        if terms.compute_units:
            rows = kernels.graph_rows(batch, 1 if gamma is None else gamma + 1)
        launches_s = terms.draft_fixed_s + terms.draft_request_s * batch
        switch_s = self._switched(batch) * terms.draft_switch_s_per_byte * self._draft_layers_bytes
        return self._draft_linears(rows) + self._attention_s(batch, context, 1, may_cascade=False) + switch_s + launches_s

    def under(self, prompts: str) -> CostModel:
        """The same machine and model, predicting for `prompts`."""
        return self if prompts == self.prompts else dataclasses.replace(self, prompts=prompts)

    def _attention_s(self, batch, context, queries, may_cascade: bool):
        terms, constants = self.terms, self.constants
        distinct = self.prompts == "distinct"
        memory_s = (batch if distinct else 1) * context * self._kv_bytes / terms.stream_bytes_per_s
        units = terms.compute_units
        if not units:
            tiles = constants.rank_heads * batch * queries / kernels.QUERY_TILE
            return memory_s + tiles * self._tile_s * context
        if isinstance(queries, int) and queries == 1:
            waves = kernels.decode_attention_waves(constants.rank_kv_heads * batch, units, terms.attention_pair_cost)
        else:
            tiles = constants.rank_heads * batch * kernels.ceil_div(queries, kernels.QUERY_TILE)
            waves = kernels.attention_waves(tiles, units, terms.attention_pair_cost)
        if distinct or not may_cascade:
            return kernels.larger(memory_s, waves * self._tile_s * context)
        cascades = self._cascades(batch, context, queries)
        tiles = constants.rank_heads * kernels.ceil_div(batch * queries, kernels.QUERY_TILE)
        shared_waves = kernels.attention_waves(tiles, units, terms.attention_pair_cost)
        kernel_s = kernels.either(cascades, shared_waves, waves) * self._tile_s * context
        return kernels.larger(memory_s, kernel_s) + cascades * constants.num_layers * terms.cascade_layer_s

    def _cascades(self, batch, context, queries):
        """vLLM's own rule (use_cascade_attention): always when verifying; in decode when the shared pass takes fewer waves than a pass per
        request."""
        shared = (batch >= kernels.CASCADE_MIN_BATCH) & (context >= self.terms.cascade_min_context)
        if not (isinstance(queries, int) and queries == 1):
            return shared
        units = self.terms.compute_units
        shared_waves = kernels.ceil_div(self.constants.rank_heads * kernels.ceil_div(batch, kernels.TILE_ROWS), units)
        own_waves = kernels.ceil_div(self.constants.rank_kv_heads * batch, units)
        return shared & (shared_waves < own_waves)

    def _linears(self, rows):
        return self._remembered("target", rows, self._target_linears_s)

    def _draft_linears(self, rows):
        return self._remembered("draft", rows, self._draft_linears_s)

    def _remembered(self, kind: str, rows, compute):
        try:
            return self._linears_s[kind, rows]
        except KeyError:
            if rows != int(rows) or rows < 1:
                return compute(rows)
        except TypeError:  # an array cannot be a key
            return compute(rows)
        # A whole block at once takes hardly longer than one number: a rollout that shrinks passes by nearly all of them.
        import numpy as np  # here, because reading a calibration needs nothing but the standard library

        first = (int(rows) - 1) // ROWS_AT_ONCE * ROWS_AT_ONCE + 1
        block = range(first, first + ROWS_AT_ONCE)
        self._linears_s.update(zip(((kind, number) for number in block), compute(np.array(block)).tolist()))
        return self._linears_s[kind, rows]

    def _target_linears_s(self, rows):
        layers = self.constants.num_layers
        layers_s = layers * sum(self._gemm_s(rows, shape) for shape in self.constants.layer_linears)
        switch_s = self._switched(rows) * self.terms.gemm_switch_s_per_byte * self._target_bytes
        return layers_s + self._gemm_s(rows, self.constants.head_linear) + layers * self.terms.layer_s + switch_s

    def _draft_linears_s(self, rows):
        terms, constants = self.terms, self.constants
        if self.quant == "none":
            return self._target_linears_s(rows)
        head_s = self._gemm_s(rows, constants.head_linear)
        head_s = head_s + self._switched(rows) * terms.gemm_switch_s_per_byte * self._head_bytes
        layers_s = kernels.quantized_s(
            rows,
            constants.layers_parameters,
            self._draft_layers_bytes,
            constants.num_layers,
            pass_rows=terms.draft_pass_rows,
            bytes_per_s=terms.draft_bytes_per_stream_byte * terms.stream_bytes_per_s,
            flops_per_s=terms.draft_flops_per_s,
            exponent=terms.draft_exponent,
            pass_s=terms.draft_pass_layer_s,
        )
        return layers_s + head_s + constants.num_layers * terms.draft_layer_s

    def _switched(self, rows):
        return (rows - 1) / (rows - 1 + self.terms.switch_half_rows)

    def _gemm_s(self, rows, shape: tuple[int, int]):
        terms = self.terms
        return kernels.gemm_s(
            rows,
            *shape,
            units=terms.compute_units,
            bytes_per_s=terms.stream_bytes_per_s,
            flops_per_s=terms.gemm_flops_per_s,
            wide_tile_gain=terms.wide_tile_gain,
            exponent=terms.roofline_exponent,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "constants": self.constants.to_dict(),
            "quant": self.quant,
            "prompts": self.prompts,
            "terms": dataclasses.asdict(self.terms),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostModel:
        """Inverse of `to_dict`, also after a trip through JSON.

        Raises:
            SelfSpecError: a missing or unknown key, or a term that is no finite number of 0 or more.
        """
        _check_keys("cost model", values, ("constants", "quant", "prompts", "terms"))
        _check_keys("cost model: terms", values["terms"], TERM_NAMES)
        for name, value in values["terms"].items():
            _check_term(name, value)
        constants = ModelConstants.from_dict(values["constants"])
        return cls(constants, values["quant"], Terms(**values["terms"]), values["prompts"])


def _check_keys(what: str, values: Any, expected: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        raise SelfSpecError(f"{what}: {values!r} is not a table; make the file anew with calib.fit")
    missing = [name for name in expected if name not in values]
    unknown = [name for name in values if name not in expected]
    if missing or unknown:
        wrong = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
        raise SelfSpecError(f"{what}: {', '.join(wrong)}; make the file anew with calib.fit")


def _check_term(name: str, value: Any) -> None:
    least = 1 if name in _EXPONENTS else 0
    good = type(value) in (int, float) and math.isfinite(value) and value >= least and not (name in _POSITIVE and value == 0)
    if not good:
        bounds = "above 0" if name in _POSITIVE else f"of {least} or more"
        raise SelfSpecError(f"cost model: term {name} is {value!r}, not a finite number {bounds}; make the file anew with calib.fit")
