"""What arrived in a weight sync: a checksum of every parameter's bits, and whether it is finite. At memory speed, without copies."""

from __future__ import annotations

import torch


class ReceivedWeights:
    """Results stay on the device until they are asked for, so that a sync waits for no GPU kernel between two parameters."""

    def __init__(self) -> None:
        self._checksums: dict[str, torch.Tensor] = {}
        self._extremes: dict[str, torch.Tensor] = {}

    def add(self, name: str, weight: torch.Tensor) -> None:
        """A parameter that comes twice counts as it came last."""
        self._checksums[name] = _checksum(weight)
        self._extremes[name] = torch.stack(torch.aminmax(weight))  # both are NaN if any value is

    def checksums(self) -> dict[str, int]:
        """Name -> sum of the bits as 64-bit words, modulo 2**64."""
        return dict(zip(self._checksums, torch.stack(list(self._checksums.values())).tolist())) if self._checksums else {}

    def non_finite(self) -> list[str]:
        """Names of parameters with NaN or infinity in them, in order of arrival."""
        if not self._extremes:
            return []
        is_finite = torch.stack(list(self._extremes.values())).isfinite().all(dim=1).tolist()
        return [name for name, finite in zip(self._extremes, is_finite) if not finite]


def fingerprint(checksums: dict[str, int]) -> str:
    """One 64-bit number for all parameters together, as 16 hexadecimal digits; in whatever order they came."""
    return f"{sum(checksums.values()) % 2**64:016x}"


def _checksum(weight: torch.Tensor) -> torch.Tensor:
    words = weight.contiguous().view(torch.uint8).flatten()
    num_whole = words.numel() // 8 * 8
    rest = words[num_whole:].sum(dtype=torch.int64)
    return words[:num_whole].view(torch.int64).sum() + rest
