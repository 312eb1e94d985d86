"""Seconds of the kernels a step is made of, on a device that works in waves of tiles: dense GEMM, quantized GEMM, attention.

A GPU cuts a matrix product into tiles and hands them to its `units` (streaming multiprocessors) wave by wave; the last wave takes as
long as a full one. So time is a staircase in the rows, and the height of a stair depends on how the model's matrices divide into tiles:
why two models of one size differ by 20% in the same step. `units` 0 stands for a device without such stairs (a CPU): the same
formulas, with nothing rounded up.

Every function takes floats, or numpy arrays that broadcast. Comparisons enter as factors of 0 and 1, so that both go the same way.
"""

from __future__ import annotations

TILE_ROWS = 128
"""Rows (tokens) of the largest GEMM tile. Smaller products run on tiles of 16, 32 and 64 rows."""

TILE_COLUMNS = 128
WIDE_TILE_COLUMNS = 256
"""Outputs per tile. The wide tile computes faster and divides coarser; above TILE_ROWS rows the library takes the better of the two."""

SPLIT_INPUTS = 4096
"""A product may be split along its inputs, a part per so many: narrow, deep matrices (the MLP's down projection) still fill the device."""

HALF_TAIL_ROWS = 32
"""Tiles of at most so many rows are half as wide, so that a ragged last wave costs about half."""

MARLIN_PASS_ROWS = 64
"""Marlin goes over the weights once per 64 rows."""

MARLIN_STAIRS = ((0, 9.0), (8, 5.5), (16, 20.0), (32, 14.5), (48, 17.5))
"""(rows above which it holds, rows' worth of FLOPs that it adds): what a pass over so many rows computes, tile by tile of 16 (the first
may be of 8). Found alike in two models on an A100; the second tile comes with another, slower kernel shape."""

QUERY_TILE = 64
"""Queries per attention tile. With one query per request the heads that share keys share a tile; with more, every head has its own."""

SPLIT_KV_FILL = 1.6
"""Decode attention is split along the context while its tiles are fewer than so many times the units (FlashAttention 2's rule)."""
SPLIT_KV_COST = 1.04
"""Writing and joining the parts."""

CASCADE_MIN_BATCH = 8
"""vLLM computes a prefix shared by all requests once, from so many requests on (cascade attention)."""


def ceil_div(numerator, denominator):
    return -(-numerator // denominator)


def larger(a, b):
    return (a + b + abs(a - b)) / 2


def smaller(a, b):
    return (a + b - abs(a - b)) / 2


def either(condition, if_true, if_false):
    return condition * if_true + (1 - condition) * if_false


def roofline(memory_s, compute_s, exponent):
    """Memory and compute time overlap: their maximum for a large exponent, their sum for 1."""
    return (memory_s**exponent + compute_s**exponent) ** (1 / exponent)


def graph_rows(batch, multiple):
    """Rows that a CUDA graph runs for `batch` requests: captured for 1, 2, 4, 8, 16, 24, ... requests, each rounded up to `multiple`."""
    captured = either(batch > 4, 8 * ceil_div(batch, 8), either(batch > 2, 4, either(batch > 1, 2, 1)))
    return multiple * ceil_div(captured, multiple)


def gemm_s(rows, outputs: int, inputs: int, units, bytes_per_s, flops_per_s, wide_tile_gain, exponent):
    """rows x inputs times inputs x outputs in bf16."""
    memory_s = 2.0 * inputs * outputs / bytes_per_s
    if not units:
        return roofline(memory_s, 2.0 * rows * inputs * outputs / flops_per_s, exponent)
    tiled_rows = either(rows > 64, TILE_ROWS * ceil_div(rows, TILE_ROWS), either(rows > 32, 64, either(rows > 16, 32, 16)))
    compute_s = 2.0 * tiled_rows * inputs * outputs / flops_per_s
    row_tiles = ceil_div(rows, TILE_ROWS)
    num_splits = max(1, inputs // SPLIT_INPUTS)
    # Streaming suffers from a ragged last wave too, in every kernel that is not made for a handful of rows.
    raggedness = (rows > 16) * (1 + (rows > HALF_TAIL_ROWS)) / 2
    memory_s = memory_s * (1 + raggedness * (_tail(outputs, TILE_COLUMNS, 1, num_splits, units) - 1))
    tail = 1 + raggedness * (_tail(outputs, TILE_COLUMNS, row_tiles, num_splits, units) - 1)
    wide_tail = _tail(outputs, WIDE_TILE_COLUMNS, row_tiles, num_splits, units) / wide_tile_gain
    best_tail = either(rows > TILE_ROWS, smaller(tail, wide_tail), tail)
    return roofline(memory_s, compute_s * best_tail, exponent)


def _tail(outputs: int, tile_columns: int, row_tiles, num_splits: int, units):
    """Waves taken over waves' worth of work, 1 or more. A product of less than one wave is split until it fills the device."""
    waves = ceil_div(outputs, tile_columns) * row_tiles / units
    taken = ceil_div(waves, 1)
    for split in range(2, num_splits + 1):
        taken = smaller(taken, ceil_div(waves * split, 1) / split)
    return either(waves > 1, taken / waves, 1.0)


def quantized_s(rows, parameters, weight_bytes, layers, pass_rows, bytes_per_s, flops_per_s, exponent, pass_s):
    """All quantized linears of a step.

    Args:
        pass_rows: rows of one pass over the weights in Marlin's stairs, or 0 for a kernel without passes and stairs.
        pass_s: what another pass costs beyond its bytes and FLOPs, per layer.
    """
    memory_s = weight_bytes / bytes_per_s
    row_s = 2.0 * parameters / flops_per_s
    if not pass_rows:
        return roofline(memory_s, rows * row_s, exponent)
    full_passes = rows // pass_rows
    left = rows - pass_rows * full_passes
    left_rows = sum((left > threshold) * cost for threshold, cost in MARLIN_STAIRS)
    full_rows = sum(cost for _, cost in MARLIN_STAIRS)
    full_pass_s = roofline(memory_s, full_rows * row_s, exponent)
    left_s = (left > 0) * roofline(memory_s, left_rows * row_s, exponent)
    return full_passes * full_pass_s + left_s + (full_passes + (left > 0) - 1) * layers * pass_s


def attention_waves(tiles, units, pair_cost):
    """Times one tile's own time that `tiles` of them take. Two tiles on one unit share it and take 1 + pair_cost."""
    waves = ceil_div(tiles, units)
    pairs = waves // 2
    return pairs * (1 + pair_cost) + (waves - 2 * pairs)


def decode_attention_waves(tiles, units, pair_cost):
    """The same where a tile can be split along the context: few tiles then fill the device evenly."""
    even = SPLIT_KV_COST * tiles / units * (1 + pair_cost) / 2
    return either(tiles >= SPLIT_KV_FILL * units, attention_waves(tiles, units, pair_cost), even)
