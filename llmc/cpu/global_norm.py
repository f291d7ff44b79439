"""The sum of squares of a flat array (llm.c: llmc/global_norm.cuh)."""

import numpy as np

from llmc.buffers import Array

from . import device

ROW = 1 << 12  # elements that are summed pairwise in float32
BLOCK = 64 * ROW


def global_norm_scratch_size(N: int) -> int:
    """f32 elements of scratch that global_norm_squared wants: one partial sum for each row, and one for the rest."""
    return N // ROW + 1


def global_norm_squared(out: Array, scratch: Array, values: Array) -> None:
    """out[0] = sum of values^2

    out (1,) f32 written (=);  scratch f32, global_norm_scratch_size(N);  values (N,) f32.
    The result is deterministic: rows depend on N alone, and their sums are added in order, in float64.
    Source: llm.c llmc/global_norm.cuh.
    """
    assert out.shape == (1,) and values.ndim == 1, (out.shape, values.shape)
    N = values.size
    rows = values[: N // ROW * ROW].reshape(-1, ROW)
    partial, step = scratch[: len(rows) + 1], BLOCK // ROW

    def body(i: int) -> None:
        x = rows[i * step : (i + 1) * step]
        square = device.scratch(*x.shape)
        np.multiply(x, x, out=square)
        np.add.reduce(square, axis=1, out=partial[i * step : i * step + len(x)])  # pairwise

    device.parallel(body, -(-len(rows) // step))
    rest = values[rows.size :]
    partial[-1] = np.add.reduce(rest * rest)
    out[0] = np.add.reduce(partial, dtype=np.float64)
