"""The linear layers: kernels/matmul.cu has the math, the layouts and the table of versions.

matmul_forward1 .. 11 and matmul_backward1 .. 11 have the whole contract of the public functions, which choose the
version for dtype and GPU: for bf16 and fp16 11 (kernels/matmul_sm90.cu) at compute capability 9.0 and 5 elsewhere, 3
for fp32.
"""

import functools

import numpy as np
from numpy import int32 as i32
from numpy import int64 as i64

from . import gelu, module

TILE = 128  # kernels 3, 4, 5: outputs of a block, in both directions
STAGES = {4: 1, 5: 3}  # kernels 4, 5: tiles in flight
SIXTEEN_BIT = (4, 5, 6, 7, 8, 9, 10, 11)  # versions for bf16 and fp16 alone
HOPPER = (6, 7, 8, 9, 10, 11)  # versions for compute capability 9.0 alone: kernels/matmul_sm90.cu
BIAS_PARTS = 128  # most row ranges of the bias gradient
# Weight gradient: as many token ranges as bring output tiles x ranges near this number, of 128 tokens or more each. It
# fills GPUs of 108 to 132 SMs with two blocks each three times over; a constant, so that results do not depend on the
# device. The partial sums then take at most 792 * 64 KiB.
WGRAD_BLOCKS, MIN_TOKENS = 792, 128


def ceil_div(a, b):
    return -(-a // b)


def production(dtype):
    return 3 if dtype == np.float32 else 11 if module.hopper() else 5


def wgrad_splits(BT, C, OC):
    """Token ranges of the weight gradient (kernels 3 and 5): a function of the shapes alone. Ranges are multiples of 32
    tokens, none is empty."""
    tiles = ceil_div(OC, TILE) * ceil_div(C, TILE)
    wanted = max(1, min(WGRAD_BLOCKS // tiles, BT // MIN_TOKENS))
    units = ceil_div(BT, 32)
    return ceil_div(units, ceil_div(units, wanted))


def bias_parts(BT):
    return min(BIAS_PARTS, ceil_div(BT, 32))


def matmul_scratch_size(B, T, C, OC):
    """f32 elements of scratch that matmul_backward wants: partial sums of the weight or the bias gradient, or of both
    (from kernel 9 on)."""
    splits = wgrad_splits(B * T, C, OC)
    sizes = [splits * OC * C if splits > 1 else 0, bias_parts(B * T) * OC]
    for version in (9, 10, 11):
        partials, bias_sums = wgrad_scratch_sm90(version, B * T, C, OC)
        sizes.append(partials + bias_sums)
    return max(sizes)


def tile_sm90(version, M, N):
    """Rows and columns of a tile of Hopper's kernels. 10 turns it where M x N then takes fewer: 1024 columns are 8
    times 128, but 6 times 192 with 128 left over. 11 where they are 4 % fewer: wgmma with fewer columns reads more of
    shared memory for the same product, and a chip at its power limit is 2 to 4 % slower then."""
    wide, tall = ceil_div(M, 128) * ceil_div(N, 192), ceil_div(M, 192) * ceil_div(N, 128)
    return (192, 128) if version >= 10 and tall < (wide * 0.96 if version >= 11 else wide) else (128, 192)


def tiles_sm90(version, M, N):
    rows, columns = tile_sm90(version, M, N)
    return ceil_div(M, rows) * ceil_div(N, columns)


def turned(version, C, Vp):
    """Whether a step of a model has products whose tiles are turned: its kernels are compiled once more for them. Of
    few positions others may be; those are compiled at the first step."""
    BT = 2**20 * 3  # whole tiles of either kind
    weights = (3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (Vp, C)
    shapes = (*weights, *((BT, width) for shape in weights for width in shape))
    return any(tile_sm90(version, *shape)[0] == 192 for shape in shapes)


@functools.cache
def wgrad_ranges_sm90(version, BT, C, OC):
    """(whole, splits): the first `whole` tiles of the weight gradient are made at once, each of the others in `splits`
    ranges of tokens, which leaves 132 multiprocessors idle least. A constant too. 11 cuts what is left after whole
    rounds of 132 tiles, 6 to 10 all tiles or none. Writing and adding one range's sums of 132 tiles takes as long as
    1350 tokens: measured for 1 to 16 ranges with GPT-2's shapes."""
    tiles = tiles_sm90(version, OC, C)
    whole = tiles // 132 * 132 if version >= 11 else 0
    tail = tiles - whole

    def tokens(splits):  # that each multiprocessor has to do for the tail
        return BT * ceil_div(tail * splits, 132) / splits + (1350 * splits * tail / 132 if splits > 1 else 0)

    splits = min(range(1, max(1, min(16, BT // MIN_TOKENS)) + 1), key=tokens)
    return (tiles if splits == 1 else whole), splits


def wgrad_scratch_sm90(version, BT, C, OC):
    """f32 elements of partial sums: of the weight's gradient, whole tiles of it, and of the bias gradient."""
    (whole, splits), tiles = wgrad_ranges_sm90(version, BT, C, OC), tiles_sm90(version, OC, C)
    rows, columns = tile_sm90(version, OC, C)
    return (tiles - whole) * splits * rows * columns, splits * ceil_div(C, columns) * OC


def kernel_sm90(name, version, dtype, tall, smem=0, defines=()):
    defines = (f"RUNG={version}", *(("TALL",) if tall else ()), *defines)
    return module.kernel("matmul_sm90.cu", f"matmul_{name}_sm90", dtype, defines, smem, "sm_90a")


def launch_sm90(name, version, dtype, M, N, args, items=None, defines=()):
    """Kernels 6 to 11: each block takes every so many'th tile, or of `items`, every so many'th of these."""
    rows, _ = tile_sm90(version, M, N)
    items = items or tiles_sm90(version, M, N)
    smem = 4 * 40960 + 80 + 1024 + (32768 if version < 8 else 65536 + 96 + 1536)  # sizeof(Shared) and to align it
    kernel = kernel_sm90(name, version, dtype, rows == 192, smem, defines)
    kernel((min(items, module.multiprocessors()),), (384,), args, shared_mem=smem)


def dgrad_sm90(version, dinp, dout, weight, pre_gelu, gelu_out=None):
    """gelu_out: from kernel 10 on, or None."""
    (OC, C), BT = weight.shape, dinp.size // weight.shape[1]
    rows, _ = tile_sm90(version, BT, C)
    operands = module.tensor_map(dout, BT, OC, rows), module.tensor_map(weight, OC, C, 64)
    maps = (module.tensor_map(dinp if a is None else a, BT, C, 64) for a in (dinp, pre_gelu, gelu_out))
    launch_sm90(
        "dgrad", version, dinp.dtype, BT, C, (dinp, *operands, *maps, pre_gelu, gelu_out, i32(BT), i32(C), i32(OC))
    )


def wgrad_sm90(version, dweight, dbias, scratch, dout, inp, accumulate, defines=()):
    """dbias: from kernel 9 on, or None."""
    (OC, C), BT = dweight.shape, inp.size // dweight.shape[1]
    (whole, splits), tiles = wgrad_ranges_sm90(version, BT, C, OC), tiles_sm90(version, OC, C)
    (partials, _), (rows, columns) = wgrad_scratch_sm90(version, BT, C, OC), tile_sm90(version, OC, C)
    operands = module.tensor_map(dout, BT, OC, 64), module.tensor_map(inp, BT, C, 64)
    to = operands[0] if defines else module.tensor_map(dweight, OC, C, 64)  # f32 gradients are not stored by TMA
    bias_sums = None if dbias is None else scratch[partials:]
    sizes, ranges = (i32(OC), i32(C)), (i32(whole), i32(splits), accumulate)
    args = (dweight, scratch, bias_sums, *operands, to, *sizes, i32(BT), *ranges)
    launch_sm90("wgrad", version, inp.dtype, OC, C, args, tiles + (tiles - whole) * (splits - 1), defines)
    if tiles > whole:
        reduce = kernel_sm90("wgrad_reduce", version, inp.dtype, rows == 192, defines=defines)
        reduce((rows * columns // 2048, tiles - whole), (256,), (dweight, scratch, *sizes, *ranges))
    if dbias is not None:
        bias_reduce(dbias, bias_sums, splits * ceil_div(C, columns), inp.dtype, accumulate, defines)


def launch(name, version, dtype, M, N, args, repeat=1, defines=()):
    """Kernel `version` of a product with (M, N) outputs; repeat: split-K ranges."""
    kernel_name = f"matmul_{name}_kernel{version}"
    if version == 1:
        grid, block, smem = (ceil_div(M * N, 256),), 256, 0
    elif version == 2:
        grid, block, smem = (ceil_div(N, 16), ceil_div(M, 16)), 256, 0
    elif version == 3:
        grid, block, smem = (ceil_div(N, TILE), ceil_div(M, TILE), repeat), 256, 0
    else:
        assert dtype != np.float32, (name, version, dtype)
        grid, block, smem = (ceil_div(N, TILE), ceil_div(M, TILE)), 128, max(STAGES[version] * 16384, 36864)
    if version == 5:
        grid = (grid[0] * grid[1] * repeat,)
    module.kernel("matmul.cu", kernel_name, dtype, defines, smem=smem)(grid, (block,), args, shared_mem=smem)


def forward(version, out, inp, weight, bias, pre_gelu):
    OC, C = weight.shape
    BT = inp.size // C
    assert inp.shape[-1] == C and out.shape == (*inp.shape[:-1], OC), (out.shape, inp.shape, weight.shape)
    assert bias is None or bias.shape == (OC,), (bias.shape, OC)
    assert pre_gelu is None or pre_gelu.shape == out.shape, (pre_gelu.shape, out.shape)
    assert C % 8 == 0 and OC % 8 == 0, (C, OC)  # 16-byte accesses
    assert all(x is None or x.dtype == out.dtype for x in (inp, weight, bias, pre_gelu)), out.dtype
    sizes = i32(BT), i32(OC), i32(C)
    if version in HOPPER:
        rows, columns = tile_sm90(version, BT, OC)
        operands = module.tensor_map(inp, BT, C, rows), module.tensor_map(weight, OC, C, columns)
        results = (module.tensor_map(a, BT, OC, 64) for a in (out if pre_gelu is None else pre_gelu, out))
        launch_sm90("forward", version, out.dtype, BT, OC, (out, pre_gelu, *operands, *results, bias, *sizes))
    else:
        launch("forward", version, out.dtype, BT, OC, (out, pre_gelu, inp, weight, bias, *sizes))


def backward(version, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute):
    OC, C = weight.shape
    BT = inp.size // C
    B_T, dtype, accumulate = inp.shape[:-1], dinp.dtype, i32(accumulate)
    assert dinp.shape == inp.shape == (*B_T, C) and dout.shape == (*B_T, OC), (dinp.shape, inp.shape, dout.shape)
    assert dweight.shape == weight.shape and (dbias is None or dbias.shape == (OC,)), (dweight.shape, weight.shape)
    assert pre_gelu is None or pre_gelu.shape == inp.shape, (pre_gelu.shape, inp.shape)
    assert pre_gelu is not None or not recompute
    assert C % 8 == 0 and OC % 8 == 0, (C, OC)  # 16-byte accesses
    assert all(x is None or x.dtype == dtype for x in (dout, inp, weight, pre_gelu)), dtype
    defines = module.grad_defines(dtype, (dweight, dbias))
    assert scratch.size >= matmul_scratch_size(1, BT, C, OC), (scratch.size, BT, C, OC)
    fused = version >= 9  # the bias gradient, with the weight's
    if recompute and version < 10:
        gelu.gelu_forward(inp, pre_gelu)
    if dbias is not None and not fused:
        bias_grad(1 if version == 1 else 2, dbias, scratch, dout, BT, OC, accumulate, defines)
    if version in HOPPER:
        dgrad_sm90(version, dinp, dout, weight, pre_gelu, inp if recompute and version >= 10 else None)
        wgrad_sm90(version, dweight, dbias if fused else None, scratch, dout, inp, accumulate, defines)
        return
    sizes, wgrad_sizes = (i32(BT), i32(C), i32(OC)), (i32(OC), i32(C), i32(BT))
    launch("dgrad", version, dtype, BT, C, (dinp, dout, weight, pre_gelu, *sizes))
    splits, args = 1, (dweight, dout, inp, *wgrad_sizes, accumulate)
    if version in (3, 5):
        splits = wgrad_splits(BT, C, OC)
        args = (dweight, scratch, dout, inp, *wgrad_sizes, i32(splits), accumulate)
    launch("wgrad", version, dtype, OC, C, args, splits, defines)
    wgrad_reduce(dweight, scratch, splits, dtype, accumulate, defines)


def wgrad_reduce(dweight, scratch, splits, dtype, accumulate, defines):
    if splits > 1:
        args = (dweight, scratch, i64(dweight.size), i32(splits), accumulate)
        module.kernel("matmul.cu", "matmul_wgrad_reduce", dtype, defines)((ceil_div(dweight.size, 2048),), (256,), args)


def bias_grad(version, dbias, scratch, dout, BT, OC, accumulate, defines):
    def kernel(name):
        return module.kernel("matmul.cu", name, dout.dtype, defines)

    if version == 1:
        kernel("matmul_bias_grad_kernel1")((ceil_div(OC, 256),), (256,), (dbias, dout, i32(BT), i32(OC), accumulate))
        return
    parts = bias_parts(BT)
    kernel("matmul_bias_grad_kernel2")((ceil_div(OC, 256), parts), (256,), (scratch, dout, i32(BT), i32(OC)))
    bias_reduce(dbias, scratch, parts, dout.dtype, accumulate, defines)


def bias_reduce(dbias, partials, parts, dtype, accumulate, defines):
    kernel = module.kernel("matmul.cu", "matmul_bias_grad_reduce_kernel2", dtype, defines)
    kernel((ceil_div(dbias.size, 32),), (256,), (dbias, partials, i32(dbias.size), i32(parts), accumulate))


def matmul_forward1(out, inp, weight, bias=None, pre_gelu=None):
    forward(1, out, inp, weight, bias, pre_gelu)


def matmul_forward2(out, inp, weight, bias=None, pre_gelu=None):
    forward(2, out, inp, weight, bias, pre_gelu)


def matmul_forward3(out, inp, weight, bias=None, pre_gelu=None):
    forward(3, out, inp, weight, bias, pre_gelu)


def matmul_forward4(out, inp, weight, bias=None, pre_gelu=None):
    forward(4, out, inp, weight, bias, pre_gelu)


def matmul_forward5(out, inp, weight, bias=None, pre_gelu=None):
    forward(5, out, inp, weight, bias, pre_gelu)


def matmul_forward6(out, inp, weight, bias=None, pre_gelu=None):
    forward(6, out, inp, weight, bias, pre_gelu)


def matmul_forward7(out, inp, weight, bias=None, pre_gelu=None):
    forward(7, out, inp, weight, bias, pre_gelu)


def matmul_forward8(out, inp, weight, bias=None, pre_gelu=None):
    forward(8, out, inp, weight, bias, pre_gelu)


def matmul_forward9(out, inp, weight, bias=None, pre_gelu=None):
    forward(9, out, inp, weight, bias, pre_gelu)


def matmul_forward10(out, inp, weight, bias=None, pre_gelu=None):
    forward(10, out, inp, weight, bias, pre_gelu)


def matmul_forward11(out, inp, weight, bias=None, pre_gelu=None):
    forward(11, out, inp, weight, bias, pre_gelu)


def matmul_backward1(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(1, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward2(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(2, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward3(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(3, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward4(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(4, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward5(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(5, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward6(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(6, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward7(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(7, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward8(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(8, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward9(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    backward(9, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward10(
    dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False
):
    backward(10, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_backward11(
    dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False
):
    backward(11, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_forward(out, inp, weight, bias=None, pre_gelu=None):
    """out = inp @ weight^T + bias;  with pre_gelu: pre_gelu = inp @ weight^T + bias, out = gelu(pre_gelu)

    out (B, T, OC) X written (=);  inp (B, T, C) X;  weight (OC, C) X;  bias (OC,) X or None;
    pre_gelu (B, T, OC) X written, or None.  Sums in fp32, one rounding.
    Requires: C, OC % 8 == 0, all arrays C-contiguous and 16-byte aligned.
    Cost: 2*B*T*C*OC FLOPs.
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/matmul.cuh matmul_forward_cublaslt.
    """
    forward(production(out.dtype), out, inp, weight, bias, pre_gelu)


def matmul_backward(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, recompute=False):
    """dinp = dout @ weight, times gelu'(pre_gelu) if given;  dweight (+)= dout^T @ inp;  dbias (+)= column sums of dout

    dinp (B, T, C) X written (=), before dweight;  dweight (OC, C), dbias (OC,) or None, X or f32: += if accumulate,
    else =, in fp32 with one rounding;  scratch f32 flat, matmul_scratch_size(B, T, C, OC), need not be zeroed;
    dout (B, T, OC) X;  inp (B, T, C) X;  weight (OC, C) X;  pre_gelu (B, T, C) X: the values whose GELU was inp.
    recompute: inp is written first (=), as gelu(pre_gelu), to the bits that matmul_forward and gelu_forward give it.
    dinp may not overlap dout or inp.
    Requires: C, OC % 8 == 0, all arrays C-contiguous and 16-byte aligned.
    Cost: 4*B*T*C*OC FLOPs.
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/matmul.cuh matmul_backward.
    """
    backward(production(dinp.dtype), dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)
