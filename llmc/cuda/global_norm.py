"""The sum of squares of a flat array: kernels/global_norm.cu (llm.c: llmc/global_norm.cuh)."""

import numpy as np

from llmc.buffers import Array

from . import module

MAX_BLOCKS = 1024  # a constant, not the number of multiprocessors: the same bits on every GPU
BLOCK = 256


def defines() -> tuple[str, ...]:
    """The -D options of kernels/global_norm.cu."""
    return (f"BLOCK={BLOCK}",)


def global_norm_scratch_size(N: int) -> int:
    """f32 elements of scratch that global_norm_squared wants: a partial sum for each block."""
    return MAX_BLOCKS


def global_norm_squared(out: Array, scratch: Array, values: Array) -> None:
    """out[0] = sum of values^2.

    out (1,) f32 written (=)    scratch f32, global_norm_scratch_size(N)    values (N,) floatX or f32
    Deterministic: the order of additions depends on N alone.
    Cost: N*itemsize bytes.   Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/global_norm.cuh global_norm_squared.
    """
    check(out, scratch, values)
    blocks = max(1, min(MAX_BLOCKS, values.size // (BLOCK * 16 // values.itemsize)))
    kernel = module.kernel("global_norm.cu", "global_norm_squared_kernel", values.dtype, defines())
    kernel((blocks,), (BLOCK,), (scratch, values, np.int64(values.size)))
    combine = module.kernel("global_norm.cu", "global_norm_combine_kernel", values.dtype, defines())
    combine((1,), (1024,), (out, scratch, np.int32(blocks)))


def check(out: Array, scratch: Array, values: Array) -> None:
    assert out.shape == (1,) and values.ndim == 1, (out.shape, values.shape)
    assert out.dtype == scratch.dtype == np.float32 and scratch.size >= MAX_BLOCKS, (out.dtype, scratch.dtype)
