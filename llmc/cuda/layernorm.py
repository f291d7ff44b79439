"""LayerNorm, the residual add, and the two fused: kernels/layernorm.cu (llm.c: llmc/layernorm.cuh)."""

import numpy as np

from . import module

FORWARD_PACKS = 4  # kernels/layernorm.cu has the same number
BACKWARD_ELEMENTS = 24  # elements of a row that a thread of the one-pass backward kernel holds
ROW_PACKS, ROW_THREADS = 3, 64  # of forward kernel 4; kernels/layernorm.cu has the same 3; threads of a block
RING_PACKS, RING_STAGES, RING_THREADS = 3, 2, 128  # of backward kernels 4 and 6; kernels/layernorm.cu has the same
PACKS_EACH = (3, 4)  # in their place of forward kernel 5 and backward kernel 6: whichever wastes fewer threads
RING_SLICES = 264  # blocks, on every GPU the same: two on each of 132 multiprocessors
SLICES_AHEAD = 9  # of them for each of 32 threads of layernorm_backward6; kernels/layernorm.cu has the same number
MAX_SLICES = 1024  # slices of rows with sums of their own; a constant, so that every GPU adds in the same order


def row_block(packs, packs_per_thread, threads=256):
    """(threads per row, rows per block): as many warps as it takes to hold a row, and some `threads` in all."""
    warps = -(-packs // (32 * packs_per_thread))
    return 32 * warps, max(1, threads // (32 * warps))


def packs_each(packs):
    """Of a row of so many packs, those of a thread: 3, or 4 where the row then takes fewer warps (C = 1024, 1600)."""
    return min(PACKS_EACH, key=lambda each: row_block(packs, each)[0])


def check_forward(out, mean, rstd, inp, weight, bias):
    B, T, C = inp.shape
    assert out.shape == inp.shape and mean.shape == rstd.shape == (B, T), (out.shape, inp.shape, mean.shape, rstd.shape)
    assert weight.shape == bias.shape == (C,) and C % 8 == 0, (weight.shape, bias.shape, C)
    assert out.dtype == inp.dtype == weight.dtype == bias.dtype, (out.dtype, inp.dtype, weight.dtype, bias.dtype)
    assert mean.dtype == rstd.dtype == np.float32, (mean.dtype, rstd.dtype)
    return B * T, C


def layernorm_forward1(out, mean, rstd, inp, weight, bias):
    """out = (inp - mean) * rstd * weight + bias;  mean over C;  rstd = 1/sqrt(var + 1e-5), var biased.

    out     (B, T, C) floatX written (=)            inp  (B, T, C) floatX
    mean    (B, T)    f32 written, for backward     rstd (B, T)    f32 written, for backward
    weight  (C,)      floatX                        bias (C,)      floatX
    Requires: C % 8 == 0, all arrays C-contiguous. Statistics are fp32, the variance two-pass.
    Cost: 2*B*T*C*itemsize bytes.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/layernorm.cuh layernorm_forward; Ba et al. 2016, arXiv:1607.06450.
    """
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    kernel = module.kernel("layernorm.cu", "layernorm_forward_kernel1", out.dtype)
    kernel((-(-N // 64),), (64,), (out, mean, rstd, inp, weight, bias, np.int32(N), np.int32(C)))


def layernorm_forward2(out, mean, rstd, inp, weight, bias):
    """layernorm_forward1 with a warp per row."""
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    kernel = module.kernel("layernorm.cu", "layernorm_forward_kernel2", out.dtype)
    kernel((-(-N // 8),), (32, 8), (out, mean, rstd, inp, weight, bias, np.int32(N), np.int32(C)))


def layernorm_forward3(out, mean, rstd, inp, weight, bias):
    """layernorm_forward1 with the row in registers, read once in 16-byte accesses. C <= 32768 (fp32: 16384)."""
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    threads, rows = row_block(C * out.itemsize // 16, FORWARD_PACKS)
    assert threads <= 1024, C
    kernel = module.kernel("layernorm.cu", "layernorm_forward_kernel3", out.dtype)
    kernel((-(-N // rows),), (threads, rows), (out, mean, rstd, inp, weight, bias, np.int32(N), np.int32(C)))


def rows_grid(N, C, itemsize, packs=ROW_PACKS):
    """grid, block of the forward kernels 4 and 5."""
    threads, rows = row_block(C * itemsize // 16, packs, ROW_THREADS)
    assert threads <= 1024, C
    return (-(-N // rows),), (threads, rows)


def layernorm_forward4(out, mean, rstd, inp, weight, bias):
    """layernorm_forward3 with fewer instructions, in small blocks. C <= 24576 (fp32: 12288)."""
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    kernel = module.kernel("layernorm.cu", "layernorm_forward_kernel4", out.dtype)
    kernel(*rows_grid(N, C, out.itemsize), (out, mean, rstd, inp, weight, bias, np.int32(N), np.int32(C)))


def layernorm_forward5(out, mean, rstd, inp, weight, bias):
    """layernorm_forward4 with the weights loaded together with the row. C > 8192 (fp32: 4096): layernorm_forward4."""
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    packs = packs_each(C * out.itemsize // 16)
    grid, block = rows_grid(N, C, out.itemsize, packs)
    if block[0] > 256:
        return layernorm_forward4(out, mean, rstd, inp, weight, bias)
    kernel = module.kernel("layernorm.cu", f"layernorm_forward_kernel5_{packs}", out.dtype)
    kernel(grid, block, (out, mean, rstd, inp, weight, bias, np.int32(N), np.int32(C)))


def residual_forward1(out, inp1, inp2):
    """out = inp1 + inp2.

    out, inp1, inp2 (B, T, C) floatX; out written (=). All arrays C-contiguous, B*T*C a multiple of 8.
    Cost: 3*B*T*C*itemsize bytes.   Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/layernorm.cuh residual_forward.
    """
    assert out.shape == inp1.shape == inp2.shape, (out.shape, inp1.shape, inp2.shape)
    assert out.dtype == inp1.dtype == inp2.dtype and out.size % 8 == 0, (out.dtype, inp1.dtype, inp2.dtype, out.size)
    kernel = module.kernel("layernorm.cu", "residual_forward_kernel1", out.dtype)
    kernel((-(-out.size // 256),), (256,), (out, inp1, inp2, np.int64(out.size)))


def residual_forward2(out, inp1, inp2):
    """residual_forward1 with 16-byte accesses."""
    assert out.shape == inp1.shape == inp2.shape, (out.shape, inp1.shape, inp2.shape)
    assert out.dtype == inp1.dtype == inp2.dtype and out.size % 8 == 0, (out.dtype, inp1.dtype, inp2.dtype, out.size)
    kernel = module.kernel("layernorm.cu", "residual_forward_kernel2", out.dtype)
    kernel((-(-out.size // (256 * 16 // out.itemsize)),), (256,), (out, inp1, inp2, np.int64(out.size)))


def check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias):
    assert residual.shape == inp1.shape == inp2.shape, (residual.shape, inp1.shape, inp2.shape)
    assert residual.dtype == inp1.dtype == inp2.dtype, (residual.dtype, inp1.dtype, inp2.dtype)
    return check_forward(normed, mean, rstd, residual, weight, bias)


def fused_residual_forward1(residual, normed, mean, rstd, inp1, inp2, weight, bias):
    """residual = inp1 + inp2, rounded to floatX;  normed = LN(residual), mean and rstd as in layernorm_forward.

    residual, normed (B, T, C) floatX written (=)    mean, rstd (B, T) f32 written (=), for backward
    inp1, inp2       (B, T, C) floatX                weight, bias (C,) floatX
    Requires: C % 8 == 0, all arrays C-contiguous.
    Cost: 4*B*T*C*itemsize bytes.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/layernorm.cuh fused_residual_forward5.
    """
    residual_forward2(residual, inp1, inp2)
    layernorm_forward3(normed, mean, rstd, residual, weight, bias)


def fused_residual_forward2(residual, normed, mean, rstd, inp1, inp2, weight, bias):
    """fused_residual_forward1 in one launch, a warp per row."""
    N, C = check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    kernel = module.kernel("layernorm.cu", "fused_residual_forward_kernel2", residual.dtype)
    args = (residual, normed, mean, rstd, inp1, inp2, weight, bias, np.int32(N), np.int32(C))
    kernel((-(-N // 8),), (32, 8), args)


def fused_residual_forward3(residual, normed, mean, rstd, inp1, inp2, weight, bias):
    """fused_residual_forward1 in one pass over memory, the row in registers. C <= 32768 (fp32: 16384)."""
    N, C = check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    threads, rows = row_block(C * residual.itemsize // 16, FORWARD_PACKS)
    assert threads <= 1024, C
    kernel = module.kernel("layernorm.cu", "fused_residual_forward_kernel3", residual.dtype)
    args = (residual, normed, mean, rstd, inp1, inp2, weight, bias, np.int32(N), np.int32(C))
    kernel((-(-N // rows),), (threads, rows), args)


def fused_residual_forward4(residual, normed, mean, rstd, inp1, inp2, weight, bias):
    """fused_residual_forward3 with fewer instructions, in small blocks. C <= 24576 (fp32: 12288)."""
    N, C = check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    kernel = module.kernel("layernorm.cu", "fused_residual_forward_kernel4", residual.dtype)
    args = (residual, normed, mean, rstd, inp1, inp2, weight, bias, np.int32(N), np.int32(C))
    kernel(*rows_grid(N, C, residual.itemsize), args)


def fused_residual_forward5(residual, normed, mean, rstd, inp1, inp2, weight, bias):
    """fused_residual_forward4 with the weights loaded together with the row; wider rows as layernorm_forward5."""
    N, C = check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    packs = packs_each(C * residual.itemsize // 16)
    grid, block = rows_grid(N, C, residual.itemsize, packs)
    if block[0] > 256:
        return fused_residual_forward4(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    kernel = module.kernel("layernorm.cu", f"fused_residual_forward_kernel5_{packs}", residual.dtype)
    kernel(grid, block, (residual, normed, mean, rstd, inp1, inp2, weight, bias, np.int32(N), np.int32(C)))


def layernorm_scratch_size(B, T, C):
    """f32 elements of scratch that layernorm_backward wants: partial dweight and dbias of every slice of rows."""
    return min(MAX_SLICES, B * T) * 2 * C


def slices_of(N, rows):
    """(slices, rows in each): at most MAX_SLICES, of a multiple of `rows` rows."""
    slice_rows = -(-N // (MAX_SLICES * rows)) * rows
    return -(-N // slice_rows), slice_rows


def check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd):
    B, T, C = inp.shape
    assert dinp.shape == dout.shape == inp.shape, (dinp.shape, dout.shape, inp.shape)
    assert mean.shape == rstd.shape == (B, T) and C % 8 == 0, (mean.shape, rstd.shape, C)
    assert dweight.shape == dbias.shape == weight.shape == (C,), (dweight.shape, dbias.shape, weight.shape)
    assert dinp.dtype == dout.dtype == inp.dtype == weight.dtype, inp.dtype
    assert mean.dtype == rstd.dtype == scratch.dtype == np.float32, (mean.dtype, rstd.dtype, scratch.dtype)
    assert scratch.size >= layernorm_scratch_size(B, T, C), (scratch.size, layernorm_scratch_size(B, T, C))
    return B * T, C


def layernorm_backward1(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd):
    """dinp += rstd * (dn - mean(dn) - xhat * mean(dn * xhat));  dn = dout * weight;  xhat = (inp - mean) * rstd
    dweight += sum over B,T of dout * xhat;  dbias += sum over B,T of dout.

    dinp    (B, T, C) floatX accumulated (+=)    dweight, dbias (C,) floatX or f32 accumulated (+=)
    scratch f32, layernorm_scratch_size(B, T, C)
    dout, inp (B, T, C) floatX;  weight (C,) floatX;  mean, rstd (B, T) f32 from the forward pass.
    Sums are fp32 in a fixed order, each element is rounded once: bitwise repeatable.
    Requires: C % 8 == 0, all arrays C-contiguous.
    Cost: 4*B*T*C*itemsize bytes.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/layernorm.cuh layernorm_backward.
    """
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    kernel = module.kernel("layernorm.cu", "layernorm_backward_dinp_kernel1", inp.dtype)
    kernel((-(-N // 8),), (32, 8), (dinp, dout, inp, weight, mean, rstd, np.int32(N), np.int32(C)))
    defines = module.grad_defines(inp.dtype, (dweight, dbias))
    kernel = module.kernel("layernorm.cu", "layernorm_backward_dweight_kernel1", inp.dtype, defines)
    kernel((-(-C // 64),), (64,), (dweight, dbias, dout, inp, mean, rstd, np.int32(N), np.int32(C)))


def combine(dweight, dbias, scratch, slices, dtype):
    C, defines = dweight.size, module.grad_defines(dtype, (dweight, dbias))
    kernel = module.kernel("layernorm.cu", "layernorm_backward_combine_kernel", dtype, defines)
    kernel((-(-2 * C // 32),), (32, 32), (dweight, dbias, scratch, np.int32(slices), np.int32(C)))


def layernorm_backward2(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd):
    """layernorm_backward1, with dweight and dbias summed by many blocks."""
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    slices, slice_rows = slices_of(N, 16)
    kernel = module.kernel("layernorm.cu", "layernorm_backward_dinp_kernel1", inp.dtype)
    kernel((-(-N // 8),), (32, 8), (dinp, dout, inp, weight, mean, rstd, np.int32(N), np.int32(C)))
    kernel = module.kernel("layernorm.cu", "layernorm_backward_dweight_kernel2", inp.dtype)
    args = (scratch, dout, inp, mean, rstd, np.int32(slice_rows), np.int32(N), np.int32(C))
    kernel((-(-C // 128), slices), (128,), args)
    combine(dweight, dbias, scratch, slices, inp.dtype)


def layernorm_backward3(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd):
    """layernorm_backward1 in one pass over memory. C <= 12288."""
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    threads, rows = row_block(C // 4, BACKWARD_ELEMENTS // 4)
    assert threads <= 512, C
    slices, slice_rows = slices_of(N, rows)
    kernel = module.kernel("layernorm.cu", "layernorm_backward_kernel3", inp.dtype)
    args = (dinp, scratch, dout, inp, weight, mean, rstd, np.int32(slice_rows), np.int32(N), np.int32(C))
    kernel((slices,), (threads, rows), args, shared_mem=2 * C * 4 if rows > 1 else 0)
    combine(dweight, dbias, scratch, slices, inp.dtype)


def ring_block(C, itemsize):
    """(threads per row, rows per block, bytes of shared memory) of layernorm_backward4."""
    x, y = row_block(C * itemsize // 16, RING_PACKS, RING_THREADS)
    return x, y, x * y * RING_STAGES * 3 * RING_PACKS * 16


def layernorm_backward4(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd):
    """layernorm_backward1 in one pass over memory, the next rows on their way while one is worked on."""
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    x, y, smem = ring_block(C, inp.itemsize)
    assert x <= 512, C
    slices = min(RING_SLICES, -(-N // y))
    kernel = module.kernel("layernorm.cu", "layernorm_backward_kernel4", inp.dtype, smem=smem)
    args = (dinp, scratch, dout, inp, weight, mean, rstd, np.int32(N), np.int32(C))
    kernel((slices,), (x, y), args, shared_mem=smem)
    combine(dweight, dbias, scratch, slices, inp.dtype)


def layernorm_backward6(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd):
    """layernorm_backward4 with fewer instructions before, after and in the stream of rows.

    C > 4096 (fp32: 2048): layernorm_backward3. Every GPU has the 48 KiB of shared memory that it takes.
    """
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    packs = packs_each(C * inp.itemsize // 16)
    x, y = row_block(C * inp.itemsize // 16, packs, RING_THREADS)
    if x > RING_THREADS:
        return layernorm_backward3(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    slices = min(RING_SLICES, -(-N // y))
    smem = 0 if packs == 3 else RING_STAGES * 3 * packs * RING_THREADS * 16
    kernel = module.kernel("layernorm.cu", f"layernorm_backward_kernel6_{packs}", inp.dtype, smem=smem)
    kernel((slices,), (x, y), (dinp, scratch, dout, inp, weight, mean, rstd, np.int32(N), np.int32(C)), shared_mem=smem)
    defines = module.grad_defines(inp.dtype, (dweight, dbias))
    kernel = module.kernel("layernorm.cu", "layernorm_backward_combine_kernel6", inp.dtype, defines)
    assert slices <= 32 * SLICES_AHEAD, slices
    kernel((2 * C // 16,), (4, 32), (dweight, dbias, scratch, np.int32(slices), np.int32(C)))


layernorm_forward = layernorm_forward5  # the row is read once, and what is done to it takes less time than that
residual_forward = residual_forward2  # an eighth of the memory instructions
fused_residual_forward = fused_residual_forward5  # both inputs are read once; the bits of layernorm_forward5
layernorm_backward = layernorm_backward6  # 3 of 60 us less than 4 at B=32: fewer instructions around the same stream
