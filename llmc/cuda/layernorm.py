"""LayerNorm, the residual add, and the two fused: kernels/layernorm.cu (llm.c: llmc/layernorm.cuh)."""

import numpy as np
from numpy import int32 as i32

from llmc.buffers import Array

from . import module

ROW_THREADS = 64  # of a forward block, where a row needs no more
FORWARD_BLOCK = 256  # most threads of a forward block; of rows that need more the wide kernels take care
PACKS_EACH = (3, 4)  # 16-byte packs of a row that a thread holds: whichever wastes fewer threads
RING_STAGES, RING_ARRAYS, RING_BLOCK = 2, 3, 128  # rows on their way, arrays of each, threads of a backward block
RING_SLICES = 264  # backward blocks, on every GPU the same: two on each of 132 multiprocessors
SLICES_AHEAD = 9  # of them for each of the 32 threads that add their sums up
WIDE_PACKS, WIDE_BLOCK = 3, 1024  # wide rows forward: packs of a thread, most threads of a block
WIDE_ELEMENTS, WIDE_BACKWARD_BLOCK = 24, 512  # wide rows backward: elements of a thread, most threads of a block
MAX_SLICES = 1024  # slices of rows with sums of their own; a constant, so that every GPU adds in the same order


def defines(C: int, itemsize: int) -> tuple[str, ...]:
    """The -D options of kernels/layernorm.cu for rows of C elements of so many bytes."""
    sizes = dict(PACKS=packs_each(C, itemsize), FORWARD_BLOCK=FORWARD_BLOCK, SLICES_AHEAD=SLICES_AHEAD)
    sizes |= dict(RING_STAGES=RING_STAGES, RING_BLOCK=RING_BLOCK, WIDE_PACKS=WIDE_PACKS, WIDE_BLOCK=WIDE_BLOCK)
    sizes |= dict(WIDE_ELEMENTS=WIDE_ELEMENTS, WIDE_BACKWARD_BLOCK=WIDE_BACKWARD_BLOCK)
    return tuple(f"{name}={size}" for name, size in sizes.items())


def row_block(packs: int, packs_per_thread: int, threads: int = 256) -> tuple[int, int]:
    """(threads per row, rows per block): as many warps as it takes to hold a row, and some `threads` in all."""
    warps = -(-packs // (32 * packs_per_thread))
    return 32 * warps, max(1, threads // (32 * warps))


def packs_each(C: int, itemsize: int) -> int:
    """Packs of a row that a thread holds: 3, or 4 where the row then takes fewer warps (C = 1024, 1600 in 16 bits)."""
    return min(PACKS_EACH, key=lambda each: row_block(C * itemsize // 16, each)[0])


def rows_grid(N: int, C: int, itemsize: int, packs: int) -> tuple[tuple[int], tuple[int, int]]:
    """grid, block of the forward kernels, whose threads hold so many packs."""
    threads, rows = row_block(C * itemsize // 16, packs, ROW_THREADS)
    return (-(-N // rows),), (threads, rows)


def layernorm_forward(out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array) -> None:
    """out = (inp - mean) * rstd * weight + bias;  mean over C;  rstd = 1/sqrt(var + 1e-5), var biased.

    out     (B, T, C) floatX written (=)            inp  (B, T, C) floatX
    mean    (B, T)    f32 written, for backward     rstd (B, T)    f32 written, for backward
    weight  (C,)      floatX                        bias (C,)      floatX
    Requires: C % 8 == 0, C <= 24576 (fp32: 12288), all arrays C-contiguous. Statistics are fp32, the variance two-pass.
    Cost: 2*B*T*C*itemsize bytes.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/layernorm.cuh layernorm_forward; Ba et al. 2016, arXiv:1607.06450.
    """
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    options = defines(C, out.itemsize)
    grid, block = rows_grid(N, C, out.itemsize, packs_each(C, out.itemsize))
    if block[0] > FORWARD_BLOCK:
        return layernorm_forward_wide(out, mean, rstd, inp, weight, bias)
    kernel = module.kernel("layernorm.cu", "layernorm_forward_kernel", out.dtype, options)
    kernel(grid, block, (out, mean, rstd, inp, weight, bias, i32(N), i32(C)))


def layernorm_forward_wide(out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array) -> None:
    """layernorm_forward for rows that need more than FORWARD_BLOCK threads; it has other bits."""
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    grid, block = rows_grid(N, C, out.itemsize, WIDE_PACKS)
    assert block[0] <= WIDE_BLOCK, C
    kernel = module.kernel("layernorm.cu", "layernorm_forward_wide_kernel", out.dtype, defines(C, out.itemsize))
    kernel(grid, block, (out, mean, rstd, inp, weight, bias, i32(N), i32(C)))


def residual_forward(out: Array, inp1: Array, inp2: Array) -> None:
    """out = inp1 + inp2.

    out, inp1, inp2 (B, T, C) floatX; out written (=). All arrays C-contiguous, B*T*C a multiple of 8.
    Cost: 3*B*T*C*itemsize bytes.   Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/layernorm.cuh residual_forward.
    """
    check_residual(out, inp1, inp2)
    options = defines(out.shape[-1], out.itemsize)
    kernel = module.kernel("layernorm.cu", "residual_forward_kernel", out.dtype, options)
    kernel((-(-out.size // (256 * 16 // out.itemsize)),), (256,), (out, inp1, inp2, np.int64(out.size)))


def fused_residual_forward(
    residual: Array, normed: Array, mean: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, bias: Array
) -> None:
    """residual = inp1 + inp2, rounded to floatX;  normed = LN(residual), mean and rstd as in layernorm_forward.

    residual, normed (B, T, C) floatX written (=)    mean, rstd (B, T) f32 written (=), for backward
    inp1, inp2       (B, T, C) floatX                weight, bias (C,) floatX
    Requires: C % 8 == 0, C <= 24576 (fp32: 12288), all arrays C-contiguous. The bits are those of layernorm_forward.
    Cost: 4*B*T*C*itemsize bytes.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/layernorm.cuh fused_residual_forward5.
    """
    N, C = check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    options = defines(C, residual.itemsize)
    grid, block = rows_grid(N, C, residual.itemsize, packs_each(C, residual.itemsize))
    if block[0] > FORWARD_BLOCK:
        return fused_residual_forward_wide(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    kernel = module.kernel("layernorm.cu", "fused_residual_forward_kernel", residual.dtype, options)
    kernel(grid, block, (residual, normed, mean, rstd, inp1, inp2, weight, bias, i32(N), i32(C)))


def fused_residual_forward_wide(
    residual: Array, normed: Array, mean: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, bias: Array
) -> None:
    """fused_residual_forward for rows that need more than FORWARD_BLOCK threads; bits of layernorm_forward_wide."""
    N, C = check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    grid, block = rows_grid(N, C, residual.itemsize, WIDE_PACKS)
    assert block[0] <= WIDE_BLOCK, C
    options = defines(C, residual.itemsize)
    kernel = module.kernel("layernorm.cu", "fused_residual_forward_wide_kernel", residual.dtype, options)
    kernel(grid, block, (residual, normed, mean, rstd, inp1, inp2, weight, bias, i32(N), i32(C)))


def layernorm_scratch_size(B: int, T: int, C: int) -> int:
    """f32 elements of scratch that layernorm_backward wants: partial dweight and dbias of every slice of rows."""
    return min(MAX_SLICES, B * T) * 2 * C


def layernorm_backward(
    dinp: Array, dweight: Array, dbias: Array, scratch: Array, dout: Array, inp: Array, weight: Array, mean: Array,
    rstd: Array,
) -> None:  # fmt: skip
    """dinp += rstd * (dn - mean(dn) - xhat * mean(dn * xhat));  dn = dout * weight;  xhat = (inp - mean) * rstd
    dweight += sum over B,T of dout * xhat;  dbias += sum over B,T of dout.

    dinp    (B, T, C) floatX accumulated (+=)    dweight, dbias (C,) floatX or f32 accumulated (+=)
    scratch f32, layernorm_scratch_size(B, T, C)
    dout, inp (B, T, C) floatX;  weight (C,) floatX;  mean, rstd (B, T) f32 from the forward pass.
    Sums are fp32 in a fixed order, each element is rounded once: bitwise repeatable.
    Requires: C % 8 == 0, C <= 12288, all arrays C-contiguous.
    Cost: 4*B*T*C*itemsize bytes.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/layernorm.cuh layernorm_backward.
    """
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    options, packs = defines(C, inp.itemsize), packs_each(C, inp.itemsize)
    x, y = row_block(C * inp.itemsize // 16, packs, RING_BLOCK)
    if x > RING_BLOCK:
        return layernorm_backward_wide(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    slices, ring = min(RING_SLICES, -(-N // y)), RING_STAGES * RING_ARRAYS * packs * RING_BLOCK * 16
    smem = ring if ring >= 48 * 1024 else 0  # below, the kernel has it as static memory
    kernel = module.kernel("layernorm.cu", "layernorm_backward_kernel", inp.dtype, options, smem)
    kernel((slices,), (x, y), (dinp, scratch, dout, inp, weight, mean, rstd, i32(N), i32(C)), shared_mem=smem)
    options = (*options, *module.grad_defines(inp.dtype, (dweight, dbias)))
    kernel = module.kernel("layernorm.cu", "layernorm_backward_combine_kernel", inp.dtype, options)
    assert slices <= 32 * SLICES_AHEAD, slices
    kernel((2 * C // 16,), (4, 32), (dweight, dbias, scratch, i32(slices), i32(C)))


def layernorm_backward_wide(
    dinp: Array, dweight: Array, dbias: Array, scratch: Array, dout: Array, inp: Array, weight: Array, mean: Array,
    rstd: Array,
) -> None:  # fmt: skip
    """layernorm_backward for rows that need more than RING_BLOCK threads."""
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    threads, rows = row_block(C // 4, WIDE_ELEMENTS // 4)
    assert threads <= WIDE_BACKWARD_BLOCK, C
    slices, slice_rows = slices_of(N, rows)
    options = defines(C, inp.itemsize)
    kernel = module.kernel("layernorm.cu", "layernorm_backward_wide_kernel", inp.dtype, options)
    args = (dinp, scratch, dout, inp, weight, mean, rstd, i32(slice_rows), i32(N), i32(C))
    kernel((slices,), (threads, rows), args, shared_mem=2 * C * 4 if rows > 1 else 0)
    options = (*options, *module.grad_defines(inp.dtype, (dweight, dbias)))
    kernel = module.kernel("layernorm.cu", "layernorm_backward_wide_combine_kernel", inp.dtype, options)
    kernel((-(-2 * C // 32),), (32, 32), (dweight, dbias, scratch, i32(slices), i32(C)))


def slices_of(N: int, rows: int) -> tuple[int, int]:
    """(slices, rows in each): at most MAX_SLICES, of a multiple of `rows` rows."""
    slice_rows = -(-N // (MAX_SLICES * rows)) * rows
    return -(-N // slice_rows), slice_rows


def check_forward(
    out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array
) -> tuple[int, int]:  # fmt: skip
    """(N, C)"""
    B, T, C = inp.shape
    assert out.shape == inp.shape and mean.shape == rstd.shape == (B, T), (out.shape, inp.shape, mean.shape, rstd.shape)
    assert weight.shape == bias.shape == (C,) and C % 8 == 0, (weight.shape, bias.shape, C)
    assert out.dtype == inp.dtype == weight.dtype == bias.dtype, (out.dtype, inp.dtype, weight.dtype, bias.dtype)
    assert mean.dtype == rstd.dtype == np.float32, (mean.dtype, rstd.dtype)
    return B * T, C


def check_residual(out: Array, inp1: Array, inp2: Array) -> None:
    assert out.shape == inp1.shape == inp2.shape, (out.shape, inp1.shape, inp2.shape)
    assert out.dtype == inp1.dtype == inp2.dtype and out.size % 8 == 0, (out.dtype, inp1.dtype, inp2.dtype, out.size)


def check_fused(
    residual: Array, normed: Array, mean: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, bias: Array
) -> tuple[int, int]:
    """(N, C)"""
    assert residual.shape == inp1.shape == inp2.shape, (residual.shape, inp1.shape, inp2.shape)
    assert residual.dtype == inp1.dtype == inp2.dtype, (residual.dtype, inp1.dtype, inp2.dtype)
    return check_forward(normed, mean, rstd, residual, weight, bias)


def check_backward(
    dinp: Array, dweight: Array, dbias: Array, scratch: Array, dout: Array, inp: Array, weight: Array, mean: Array,
    rstd: Array,
) -> tuple[int, int]:  # fmt: skip
    """(N, C)"""
    B, T, C = inp.shape
    assert dinp.shape == dout.shape == inp.shape, (dinp.shape, dout.shape, inp.shape)
    assert mean.shape == rstd.shape == (B, T) and C % 8 == 0, (mean.shape, rstd.shape, C)
    assert dweight.shape == dbias.shape == weight.shape == (C,), (dweight.shape, dbias.shape, weight.shape)
    assert dinp.dtype == dout.dtype == inp.dtype == weight.dtype, inp.dtype
    assert mean.dtype == rstd.dtype == scratch.dtype == np.float32, (mean.dtype, rstd.dtype, scratch.dtype)
    assert scratch.size >= layernorm_scratch_size(B, T, C), (scratch.size, layernorm_scratch_size(B, T, C))
    return B * T, C
