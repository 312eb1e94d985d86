"""What a step of a dense decoder must read and compute, counted from its Hugging Face config.json alone.

Counts are per GPU (tensor-parallel rank). A decode step streams every decoder linear and the head once; the input embedding is a row
look-up and is not streamed, tied or not. Norms and biases are below 0.1% of the bytes and are left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from openrlhf_sd.config import DEFAULT_GROUP_SIZE, SelfSpecError

BF16_BYTES = 2
CHANNEL_SCALE_BYTES = 4
"""Eight-bit linears keep one float32 scale per output channel (`engine/quantize.py`)."""

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class ModelConstants:
    """The shape of a dense decoder with grouped-query attention and a gated MLP (three matrices), cut over tensor-parallel ranks.

    Fields are those of the whole model; properties are per rank.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_head: bool
    tensor_parallel_size: int = 1

    @property
    def layer_linears(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the matrices one layer multiplies by: qkv, attention output, gate and up, down. As vLLM fuses them."""
        ranks = self.tensor_parallel_size
        attention_width = self.rank_heads * self.head_dim
        return (
            (attention_width + 2 * self.rank_kv_heads * self.head_dim, self.hidden_size),
            (self.hidden_size, attention_width),
            (2 * self.intermediate_size // ranks, self.hidden_size),
            (self.hidden_size, self.intermediate_size // ranks),
        )

    @property
    def head_linear(self) -> tuple[int, int]:
        """(outputs, inputs) of the head; tied or not it is streamed in every step."""
        return (self.vocab_size // self.tensor_parallel_size, self.hidden_size)

    @property
    def rank_heads(self) -> int:
        """Query heads per rank."""
        return self.num_heads // self.tensor_parallel_size

    @property
    def rank_kv_heads(self) -> int:
        """Key/value heads per rank; vLLM replicates them where there are more ranks than heads."""
        return max(1, self.num_kv_heads // self.tensor_parallel_size)

    @property
    def layers_parameters(self) -> int:
        """Parameters of all decoder linears: what a drafter quantizes."""
        return self.num_layers * sum(outputs * inputs for outputs, inputs in self.layer_linears)

    @property
    def head_parameters(self) -> int:
        outputs, inputs = self.head_linear
        return outputs * inputs

    @property
    def policy_bytes(self) -> int:
        """bf16 weights in memory: what a step streams, and the input embedding where it is not the head's own matrix."""
        return BF16_BYTES * (self.layers_parameters + self.head_parameters * (1 if self.tied_head else 2))

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, bf16."""
        return 2 * self.num_layers * self.rank_kv_heads * self.head_dim * BF16_BYTES

    @property
    def dense_flops_per_token(self) -> int:
        """Multiply-adds count two; linears and head."""
        return 2 * (self.layers_parameters + self.head_parameters)

    @property
    def attention_flops_per_token_and_context(self) -> int:
        """FLOPs per query token and token in its context: scores and their product with the values."""
        return 4 * self.num_layers * self.rank_heads * self.head_dim

    def weight_bytes(self, quant: str, group_size: int = DEFAULT_GROUP_SIZE) -> float:
        """Bytes a step streams with decoder linears in scheme `quant` and the head in bf16. Raises SelfSpecError as `drafter_bytes`."""
        return self.drafter_bytes(quant, group_size) + self.head_parameters * BF16_BYTES

    def drafter_bytes(self, quant: str, group_size: int = DEFAULT_GROUP_SIZE) -> float:
        """Decoder linears in scheme `quant` with their scales: all that a drafter has of its own.

        Raises:
            SelfSpecError: an unknown scheme.
        """
        if quant == "none":
            return self.layers_parameters * BF16_BYTES
        if quant in ("w8a8", "w8", "fp8"):
            num_channels = self.num_layers * sum(outputs for outputs, _ in self.layer_linears)
            return self.layers_parameters + num_channels * CHANNEL_SCALE_BYTES
        if quant == "w4":
            return self.layers_parameters * (0.5 + BF16_BYTES / group_size)  # one bf16 scale per group of inputs
        raise SelfSpecError(f"quant: unknown scheme {quant!r}; choose one of w4, w8a8, fp8, none")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConstants:
        """Inverse of `to_dict`, also after a trip through JSON. Raises SelfSpecError on a missing or unknown key or a bad value."""
        if not isinstance(values, dict):
            raise SelfSpecError(f"model constants: {values!r} is not a table of fields")
        known = {f.name for f in dataclasses.fields(cls)}
        missing, unknown = sorted(known - set(values)), sorted(set(values) - known)
        if missing or unknown:
            wrong = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
            raise SelfSpecError(f"model constants: {', '.join(wrong)}; write the file with calib.fit or calib.transfer")
        for name, value in values.items():
            _check(name, value, bool if name == "tied_head" else int)
        return cls(**values)


def model_constants(config: dict[str, Any], tensor_parallel_size: int = 1) -> ModelConstants:
    """The constants of a model from its config.json, already parsed.

    Raises:
        SelfSpecError: the config lacks a field, is a mixture of experts, or cannot be cut over the ranks.
    """
    experts = [key for key in _EXPERT_KEYS if config.get(key)]
    if experts:
        raise SelfSpecError(f"model config: {experts[0]} says mixture of experts; the cost model knows dense decoders only")

    def need(key: str) -> int:
        if key not in config:
            raise SelfSpecError(f"model config: no {key!r}; give the config.json of a dense Hugging Face decoder")
        _check(key, config[key], int)
        return config[key]

    num_heads, hidden_size = need("num_attention_heads"), need("hidden_size")
    constants = ModelConstants(
        num_layers=need("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=need("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=need("num_key_value_heads") if config.get("num_key_value_heads") is not None else num_heads,
        # Qwen3 and Mistral name a head size that is not hidden_size / heads; others leave it out or write null.
        head_dim=need("head_dim") if config.get("head_dim") is not None else hidden_size // num_heads,
        vocab_size=need("vocab_size"),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        tensor_parallel_size=tensor_parallel_size,
    )
    ranks = tensor_parallel_size
    if ranks < 1 or constants.num_heads % ranks or constants.intermediate_size % ranks:
        raise SelfSpecError(
            f"tensor_parallel_size: {ranks} does not divide {num_heads} heads and {constants.intermediate_size} MLP columns"
        )
    return constants


def _check(name: str, value: Any, kind: type) -> None:
    if type(value) is not kind or (kind is int and value < 1):
        raise SelfSpecError(f"model config: {name} is {value!r}, not a {'positive integer' if kind is int else 'true or false'}")
