"""What a self-speculating run is told: one frozen `SelfSpecConfig`, and the flags that fill it.

This is the only home of mode names, scheme names, defaults and bounds. It imports nothing heavy, so `--help`, the tests of bad
input and the engine processes all read the same table. Values travel as values: flags -> `SelfSpecConfig` -> `config.json` ->
Ray actor -> vLLM's `additional_config`; there are no environment variables of our own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

MODES = ("fixed", "toggle", "adaptive", "auto")
"""fixed: always speculate, constant gamma (paper: rtn). toggle: switch on once in a rollout (paper: toggle).
adaptive: toggle plus a gamma ladder between rollouts (paper: the full method). auto: gamma chosen within a rollout, 0 included.
Vanilla is the absence of a mode."""

CALIBRATED_MODES = ("toggle", "adaptive", "auto")
"""Modes that decide by predicted step times. `auto` can do without a calibration, the paper's two cannot."""

DEFAULT_MODE = "auto"
"""What a bare `--self-spec` means; README, section "Which mode", has the measurements."""

QUANT_SCHEMES = ("w4", "w8a8", "none")
"""w4: int4 weights, symmetric, one scale per group (W4A16; W4A8 on a CPU with AVX-512 VNNI). w8a8: int8 weights per channel, int8
activations per token. none: an unquantized copy, accepted 100% by construction; for tests of exactness, not for speed."""

MAX_GAMMA = 16
"""The paper sweeps to 15. vLLM's rejection sampler allows 128, but each unit costs draft slots for every request."""

GROUP_SIZES = (128, 64, 32)
"""Of w4, largest first; what the kernels have in common: Marlin on CUDA, PyTorch's int4 kernel on CPU."""

DEFAULT_GROUP_SIZE = GROUP_SIZES[0]


def printable(text: str) -> str:
    """`text` for a terminal: control characters, such as the escapes in a hostile name, become '?'. Line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


class SelfSpecError(ValueError):
    """Bad input from a user. The message is one line, names the flag or file at fault and says how to mend it. It is made printable:
    names in it are somebody else's text, and it ends in a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class SelfSpecConfig:
    """Everything the drafter, the policies and the records need to know.

    Raises:
        SelfSpecError: a value is out of bounds; the message names the flag.
    """

    mode: str = field(default=DEFAULT_MODE, metadata={"help": "When to speculate: " + ", ".join(MODES) + "."})
    gamma: int = field(
        default=5,
        metadata={"help": "Draft tokens per cycle; with `adaptive`, the rung to start on. `auto` does not look at it."},
    )
    gamma_max: int = field(
        default=11,
        metadata={"help": "`auto` chooses among 0 and up to this many draft tokens per cycle."},
    )
    quant: str | None = field(
        default=None,
        metadata={
            "help": "Drafter weights: w4, w8a8 or none. Default: w4; w8a8 on an x86 CPU with neither AVX-512 nor bf16, being faster."
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={"help": "Input channels per w4 scale; must divide every quantized linear. Default: 128, smaller where it must."},
    )
    calibration: str = field(
        default="auto",
        metadata={
            "help": "Step times that toggle, adaptive and auto decide by: a file of calib.fit; `auto`: the one shipped for this GPU and "
            "model, else measured once on this machine and kept; `none` (mode auto only): learn from the rollout alone."
        },
    )
    margin: float = field(
        default=0.05,
        metadata={"help": "`toggle` and `adaptive` switch on where the predicted speed-up is at least 1 + this."},
    )
    ladder: tuple[int, ...] = field(
        default=(5, 7, 9, 11),
        metadata={"help": "Rungs of gamma for `adaptive`, comma-separated, rising."},
    )
    ramp_up: int = field(
        default=32,
        metadata={"help": "`toggle` and `adaptive` wait until more than this many requests have decoded at once."},
    )
    raise_at: float = field(default=0.94, metadata={"help": "`adaptive` climbs a rung at or above this acceptance rate."})
    lower_at: float = field(default=0.85, metadata={"help": "`adaptive` descends a rung at or below this acceptance rate."})
    patience: int = field(default=2, metadata={"help": "Rollouts in a row before `adaptive` moves."})
    audit: int = field(
        default=0,
        metadata={
            "help": "Every this many rollouts score a few responses again without speculation, and stop the run where their logprobs "
            "differ by more than bf16 noise. 0: never."
        },
    )

    def __post_init__(self) -> None:
        _require(self.mode in MODES, "--self-spec", f"unknown mode {self.mode!r}; choose one of {', '.join(MODES)}")
        _require(
            self.quant is None or self.quant in QUANT_SCHEMES,
            "--self-spec.quant",
            f"unknown scheme {self.quant!r}; choose one of {', '.join(QUANT_SCHEMES)}",
        )
        _require(0 <= self.gamma <= MAX_GAMMA, "--self-spec.gamma", f"{self.gamma} is out of range; give 0..{MAX_GAMMA}")
        _require(
            self.group_size is None or self.group_size in GROUP_SIZES,
            "--self-spec.group_size",
            f"{self.group_size} is not a group size that all kernels have; give one of {', '.join(map(str, GROUP_SIZES))}",
        )
        _require(
            self.group_size is None or self.quant in (None, "w4"),
            "--self-spec.group_size",
            f"means nothing with --self-spec.quant {self.quant}; drop it or use --self-spec.quant w4",
        )
        rungs = self.ladder
        _require(
            len(rungs) > 0 and list(rungs) == sorted(set(rungs)) and 1 <= rungs[0] and rungs[-1] <= MAX_GAMMA,
            "--self-spec.ladder",
            f"{','.join(map(str, rungs))} must rise strictly within 1..{MAX_GAMMA}, for example 5,7,9,11",
        )
        _require(
            self.mode != "adaptive" or self.gamma in rungs,
            "--self-spec.gamma",
            f"{self.gamma} is not a rung of --self-spec.ladder {','.join(map(str, rungs))}; start on one of its rungs",
        )
        _require(1 <= self.gamma_max <= MAX_GAMMA, "--self-spec.gamma_max", f"{self.gamma_max} is out of range; give 1..{MAX_GAMMA}")
        _require(
            self.calibration != "none" or self.mode not in ("toggle", "adaptive"),
            "--self-spec.calibration",
            f"{self.mode} decides by a calibration; give a file or auto, or use --self-spec auto",
        )
        _require(0.0 <= self.margin < 1.0, "--self-spec.margin", f"{self.margin} is out of range; give 0 up to 1, for example 0.05")
        _require(self.ramp_up >= 0, "--self-spec.ramp_up", f"{self.ramp_up} must be 0 or more")
        _require(
            0.0 <= self.lower_at < self.raise_at <= 1.0,
            "--self-spec.lower_at",
            f"needs 0 <= lower_at < raise_at <= 1, got {self.lower_at} and {self.raise_at}",
        )
        _require(self.audit >= 0, "--self-spec.audit", f"{self.audit} must be 0 (never) or more, for example 10")
        _require(self.patience >= 1, "--self-spec.patience", f"{self.patience} must be at least 1")

    @property
    def num_speculative_tokens(self) -> int:
        """The largest gamma this run can draft, at least 1: vLLM sizes its buffers by it."""
        if self.mode == "auto":
            return self.gamma_max
        return max(1, self.gamma, *(self.ladder if self.mode == "adaptive" else ()))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SelfSpecConfig:
        """Inverse of `to_dict`, also after a trip through JSON. Raises SelfSpecError on an unknown key."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        _require(not unknown, "SelfSpecConfig", f"unknown field {', '.join(unknown)}")
        return cls(**{**values, "ladder": tuple(values.get("ladder", cls.ladder))})


def _require(condition: bool, what: str, message: str) -> None:
    if not condition:
        raise SelfSpecError(f"{what}: {message}")
