"""Which points to measure when few can be measured. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from openrlhf_sd.config import SelfSpecError


def few_shot_points(
    batches: Sequence[int], contexts: Sequence[int], gammas: Sequence[int], num_timings: int = 24
) -> list[tuple[int, int, int]]:
    """Which (batch, context, gamma) to measure when few can be: pairs of a plain step (gamma 0, one timing) and of drafting at one gamma
    (a draft and a verify step, two timings) in num_timings // 3 cells.

    The rule: batches evenly along the list, from the smallest to the largest; contexts in turn the shortest, the longest and the middle
    one, but the longest for the lower half of the batches only (there is no memory for it above, and no time to fill it); gammas in turn
    so that the smallest batch meets the smallest and the largest the largest. Where a cell comes up twice it takes its next context.

    Raises:
        SelfSpecError: a list is empty, or fewer than two cells are asked for.
    """
    batches, contexts, gammas = sorted(set(batches)), sorted(set(contexts)), sorted(set(gammas) - {0})
    num_cells = num_timings // 3
    if not (batches and contexts and gammas) or num_cells < 2:
        raise SelfSpecError("few-shot points: give batches, contexts, gammas above 0, and 6 timings or more")
    middle = contexts[(len(contexts) - 1) // 2]
    points: dict[tuple[int, int, int], None] = {}  # an ordered set
    for index in range(num_cells):
        from_last = num_cells - 1 - index
        batch_index = round(index * (len(batches) - 1) / (num_cells - 1))
        longest = contexts[-1] if 2 * batch_index < len(batches) - 1 else middle
        turn = (contexts[0], longest, middle)
        gamma = gammas[-1 - from_last % len(gammas)] if index else gammas[0]
        for step in range(3):
            cell = (batches[batch_index], turn[(index + step) % 3])
            if (*cell, 0) not in points:
                break
        points[*cell, 0] = points[*cell, gamma] = None
    return list(points)
