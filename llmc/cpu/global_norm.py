"""The sum of squares of a flat array (llm.c: llmc/global_norm.cuh)."""

import numpy as np

from . import device

BLOCK = 1 << 18


def global_norm_scratch_size(N):
    """f32 elements of scratch that global_norm_squared wants: one partial sum for each block."""
    return -(-N // BLOCK)


def global_norm_squared(out, scratch, values):
    """out[0] = sum of values^2

    out (1,) f32 written (=);  scratch f32, global_norm_scratch_size(N);  values (N,) f32.
    Deterministic: blocks depend on N alone, and their sums are added in order, in float64.
    Source: llm.c llmc/global_norm.cuh.
    """
    assert out.shape == (1,) and values.ndim == 1, (out.shape, values.shape)
    n = global_norm_scratch_size(values.size)
    partial = scratch[:n]

    def body(i):
        x = values[i * BLOCK : (i + 1) * BLOCK]
        partial[i] = np.dot(x, x)

    device.parallel(body, n)
    out[0] = np.add.reduce(partial, dtype=np.float64)
