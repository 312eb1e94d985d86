"""What a sweep measures, cell by cell, and how the steps of a cell are laid out. Pure: numbers in, numbers out.

A cell is a (batch, context) with its gammas. It is measured in bouts: `batch` requests are prefilled to a little below the cell's
context and decode together until they are as much above it. A bout plays blocks, one per gamma g and rotating through the gammas,
so that a machine that drifts hurts all alike:

    gammas of the steps     0      g        g        g       0
    what the step holds   T_sd  T_sd+g*D  V_g+g*D  V_g+g*D  V_g

with T_sd a plain step of the self-speculating engine, D a draft step, V_g a verify step: a step verifies what the step before it
drafted and then drafts its own. Plain vLLM takes turns with it, bout by bout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from openrlhf_sd.config import SelfSpecError

CPU_BATCHES = (1, 2, 4, 8, 16, 32, 64)
CPU_CONTEXTS = (64, 256, 512)
CPU_GAMMAS = (1, 2, 3, 5)
GPU_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
GPU_CONTEXTS = (256, 1024, 2048, 4096)
GPU_GAMMAS = (1, 2, 3, 5, 7, 11)
"""Low gammas are where the decision is open, and where CUDA-graph padding shows."""

QUICK_CPU_GAMMAS = (1, 2, 4, 7)
QUICK_GPU_GAMMAS = (1, 3, 7, 11)

MIN_ROUNDS = 5
"""Times each gamma of a cell is played at least: three times every kind of step is too few for a median to mean anything, and the
quartiles of two cycles per round want about ten."""

BLOCK_TOKENS = 128
"""Tokens per block of vLLM-CPU's KV cache; on CUDA they are smaller."""

SPARE_BLOCKS = 8

PREFILL_CHUNK = 2048
"""vLLM computes at least this many prompt tokens per step; requests that are through already decode meanwhile."""


@dataclass(frozen=True)
class Cell:
    batch: int
    context: int
    gammas: tuple[int, ...]
    min_rounds: int = MIN_ROUNDS

    @property
    def largest_growth(self) -> int:
        """Most tokens a bout may add to a request while it is timed: the context is that of the cell within a quarter."""
        enough = self.min_rounds * sum(max_growth(block(gamma)) for gamma in self.gammas) + 1
        return max(min(self.context // 2, enough), max_growth([0, *block(max(self.gammas))]))

    @property
    def slack(self) -> int:
        """Most tokens a request may decode before the last of its batch has begun to, and after the script."""
        return 32 + self.batch + self.batch * self.context // PREFILL_CHUNK

    @property
    def request_tokens(self) -> int:
        """Tokens a request can have at the end of a bout, drafts included."""
        return self.context + self.largest_growth + self.slack + max(self.gammas) + 1

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache is made for: whole blocks of every request, and a few for vLLM's own."""
        return BLOCK_TOKENS * (self.batch * math.ceil(self.request_tokens / BLOCK_TOKENS) + SPARE_BLOCKS)


@dataclass(frozen=True)
class Bout:
    """One `generate` call: `max_tokens` are enough for the script and what is decoded around it."""

    batch: int
    prompt_tokens: int
    gammas: list[int]
    max_tokens: int


def block(gamma: int) -> tuple[int, ...]:
    return (0, gamma, gamma, gamma, 0)


def max_growth(gammas: Sequence[int]) -> int:
    """Tokens the steps of a script add to a request if every draft is accepted; the last one's own drafts are not verified in it."""
    return len(gammas) + sum(gammas[:-1])


def num_blocks(script: Sequence[int]) -> int:
    return (len(script) - 1) // len(block(0))


def blocks(gammas: Sequence[int]) -> Iterator[int]:
    """Gammas round after round, each round beginning with another."""
    for turn in itertools.count():
        first = turn % len(gammas)
        yield from (*gammas[first:], *gammas[:first])


def next_script(cell: Cell, gammas: Iterator[int]) -> list[int]:
    """As many blocks as the cell's context may grow by, at least one. The first step only starts the clock."""
    script = [0, *block(next(gammas))]
    while max_growth(script) + max_growth(block(max(cell.gammas))) <= cell.largest_growth:
        script += block(next(gammas))
    return script


def bout(cell: Cell, script: list[int], expected_growth: float, context_so_far: float | None) -> Bout:
    """Centre the script on the cell's context.

    Args:
        expected_growth: tokens per request that the script is expected to add.
        context_so_far: mean context of the cell's steps measured before; this bout errs to the other side.
    """
    aim = cell.context if context_so_far is None else 2 * cell.context - context_so_far
    prompt_tokens = min(cell.context, max(1, round(aim - expected_growth / 2)))
    return Bout(cell.batch, prompt_tokens, script, max_growth(script) + cell.slack)


def check_fits(cells: Sequence[Cell], max_positions: int) -> None:
    """Raises SelfSpecError naming the longest context that the model's positions allow."""
    for cell in cells:
        if cell.request_tokens > max_positions:
            largest = _largest_context(cell, max_positions)
            raise SelfSpecError(
                f"--seqs: {cell.context} at batch {cell.batch} grows to {cell.request_tokens} tokens while it is measured "
                f"and the model has {max_positions} positions; "
                + (f"give at most {largest}" if largest else "give smaller --gammas or --batches")
            )


def grid(batches: Iterable[int], contexts: Iterable[int], gammas: Sequence[int]) -> list[Cell]:
    """Every batch at every context, each number once, rising."""
    return [Cell(batch, context, tuple(sorted(set(gammas)))) for batch in sorted(set(batches)) for context in sorted(set(contexts))]


def capped(cells: Iterable[Cell], max_positions: int) -> list[Cell]:
    """Contexts no longer than the model's positions allow; cells that become the same are one."""
    found = (replace(cell, context=_largest_context(cell, max_positions) or cell.context) for cell in cells)
    return list(dict.fromkeys(found))


def _largest_context(cell: Cell, max_positions: int) -> int | None:
    contexts = range(min(cell.context, max_positions), 0, -1)
    fitting = (context for context in contexts if replace(cell, context=context).request_tokens <= max_positions)
    return next(fitting, None)


def quick_cells(points: Iterable[tuple[int, int, int]], gammas: Sequence[int]) -> list[Cell]:
    """Few-shot points, (batch, context, gamma), as cells. A plain step is measured with every cell, and so is the next of `gammas`
    in turn: beside what a cell costs to prefill, a second gamma is cheap."""
    found: dict[tuple[int, int], set[int]] = {}
    for batch, context, gamma in points:
        of_cell = found.setdefault((batch, context), set())
        if gamma:
            of_cell |= {gamma, gammas[(gammas.index(gamma) + 1) % len(gammas)]}
    return [Cell(*key, tuple(sorted(of_cell))) for key, of_cell in found.items()]
