"""The sum of squares of a flat array: kernels/global_norm.cu (llm.c: llmc/global_norm.cuh)."""

import numpy as np

from . import module

MAX_BLOCKS = 1024  # a constant, not the number of multiprocessors: the same bits on every GPU


def global_norm_scratch_size(N):
    """f32 elements of scratch that global_norm_squared wants: a partial sum for each block."""
    return MAX_BLOCKS


def check(out, scratch, values):
    assert out.shape == (1,) and values.ndim == 1, (out.shape, values.shape)
    assert out.dtype == scratch.dtype == np.float32 and scratch.size >= MAX_BLOCKS, (out.dtype, scratch.dtype)


def global_norm_squared1(out, scratch, values):
    """out[0] = sum of values^2.

    out (1,) f32 written (=)    scratch f32, global_norm_scratch_size(N)    values (N,) floatX or f32
    Deterministic: the order of additions depends on N alone.
    Cost: N*itemsize bytes.   Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/global_norm.cuh global_norm_squared.
    """
    check(out, scratch, values)
    kernel = module.kernel("global_norm.cu", "global_norm_squared_kernel1", values.dtype)
    kernel((1,), (1024,), (out, values, np.int64(values.size)))


def combine(out, scratch, blocks, dtype, threads=256):
    kernel = module.kernel("global_norm.cu", "global_norm_combine_kernel", dtype)
    kernel((1,), (threads,), (out, scratch, np.int32(blocks)))


def global_norm_squared2(out, scratch, values):
    """global_norm_squared1 on many blocks, whose sums a second kernel adds."""
    check(out, scratch, values)
    blocks = max(1, min(MAX_BLOCKS, -(-values.size // 256)))
    kernel = module.kernel("global_norm.cu", "global_norm_squared_kernel2", values.dtype)
    kernel((blocks,), (256,), (scratch, values, np.int64(values.size)))
    combine(out, scratch, blocks, values.dtype)


def global_norm_squared3(out, scratch, values):
    """global_norm_squared2 with 16-byte accesses."""
    check(out, scratch, values)
    blocks = max(1, min(MAX_BLOCKS, values.size // (256 * 16 // values.itemsize)))
    kernel = module.kernel("global_norm.cu", "global_norm_squared_kernel3", values.dtype)
    kernel((blocks,), (256,), (scratch, values, np.int64(values.size)))
    combine(out, scratch, blocks, values.dtype)


def global_norm_squared4(out, scratch, values):
    """global_norm_squared3 with four loads of each thread under way."""
    check(out, scratch, values)
    blocks = max(1, min(MAX_BLOCKS, values.size // (256 * 16 // values.itemsize)))
    kernel = module.kernel("global_norm.cu", "global_norm_squared_kernel4", values.dtype)
    kernel((blocks,), (256,), (scratch, values, np.int64(values.size)))
    combine(out, scratch, blocks, values.dtype, threads=1024)


global_norm_squared = global_norm_squared4  # four 16-byte loads of each thread under way
