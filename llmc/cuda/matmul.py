"""The linear layers: kernels/matmul.cu has the math, the layouts and what was measured.

Three implementations have the whole contract of the public functions, which choose among them by dtype and GPU: ffma
for fp32; for bf16 and fp16 sm90 (kernels/matmul_sm90.cu) at compute capability 9.0, and mma elsewhere. The sizes that
kernels and launchers share are decided here. Kernels get them by -D, and do not compile if SHARED_BYTES is not what
they need.
"""

import functools

import numpy as np
from numpy import int32 as i32
from numpy import int64 as i64

from llmc.buffers import Array

from . import gelu, module

# kernels/matmul.cu
TILE = 128  # rows and columns of a block's outputs
STAGES = 3  # mma: tiles of both operands in flight, 32 of k each
BAND = 16  # mma: rows of tiles in a band, which decides what running blocks share in L2
RANGE_UNIT = 32  # tokens: what ranges of a weight gradient are multiples of
THREADS, MMA_THREADS = 256, 128
# A weight gradient is summed in as many ranges of tokens as bring tiles x ranges near this number; a range has 128
# tokens or more. That fills GPUs of 108 to 132 multiprocessors with two blocks each three times over. It is a constant,
# so that results do not depend on the device. The partial sums then take at most 792 * 64 KiB.
WGRAD_BLOCKS, MIN_TOKENS = 792, 128
BIAS_PARTS = 128  # most row ranges of the bias gradient

# kernels/matmul_sm90.cu
WIDE, TALL = (128, 192), (192, 128)  # rows and columns of a tile
SM90_STAGES, SM90_SLOTS = 4, 4  # of the ring; boxes of 64 x 64 results that a consumer has room for
SM90_BAND, LOW_BAND, LOW_COLUMNS = 16, 4, 64  # rows of tiles in a band; the low one up to so many columns of tiles
SM90_THREADS, REDUCE_THREADS = 384, 256
MULTIPROCESSORS = 132  # that ranges of tokens are to keep busy: a constant, as WGRAD_BLOCKS is
# So many tokens take as long as writing and adding one range's sums of 132 tiles: measured with GPT-2's shapes.
RANGE_TOKENS = 1350


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ----------------------------------------------------------------------------------------------------------------------
# the op


def matmul_forward(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """out = inp @ weight^T + bias;  with pre_gelu: pre_gelu = inp @ weight^T + bias, out = gelu(pre_gelu)

    out (B, T, OC) X written (=);  inp (B, T, C) X;  weight (OC, C) X;  bias (OC,) X or None;
    pre_gelu (B, T, OC) X written, or None.  Sums in fp32, one rounding.
    Requires: C, OC % 8 == 0, all arrays C-contiguous and 16-byte aligned.
    Cost: 2*B*T*C*OC FLOPs.
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/matmul.cuh matmul_forward_cublaslt.
    """
    if out.dtype == np.float32:
        forward_ffma(out, inp, weight, bias, pre_gelu)
    elif module.hopper():
        forward_sm90(out, inp, weight, bias, pre_gelu)
    else:
        forward_mma(out, inp, weight, bias, pre_gelu)


def matmul_backward(
    dinp: Array,
    dweight: Array,
    dbias: Array | None,
    scratch: Array,
    dout: Array,
    inp: Array,
    weight: Array,
    pre_gelu: Array | None = None,
    accumulate: bool = True,
    recompute: bool = False,
) -> None:
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
    if dinp.dtype == np.float32:
        backward_ffma(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)
    elif module.hopper():
        backward_sm90(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)
    else:
        backward_mma(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def matmul_scratch_size(B: int, T: int, C: int, OC: int) -> int:
    """f32 elements of scratch that matmul_backward wants on any GPU: partial sums of the weight or the bias gradient,
    or of both (sm90)."""
    splits = wgrad_splits(B * T, C, OC)
    partials = splits * OC * C if splits > 1 else 0
    return max(partials, bias_parts(B * T) * OC, sum(scratch_sm90(B * T, C, OC)))


def check_forward(
    out: Array, inp: Array, weight: Array, bias: Array | None, pre_gelu: Array | None
) -> tuple[int, int, int]:
    """(B*T, C, OC) of arguments that fit together, else AssertionError."""
    OC, C = weight.shape
    assert inp.shape[-1] == C and out.shape == (*inp.shape[:-1], OC), (out.shape, inp.shape, weight.shape)
    assert bias is None or bias.shape == (OC,), (bias.shape, OC)
    assert pre_gelu is None or pre_gelu.shape == out.shape, (pre_gelu.shape, out.shape)
    assert C % 8 == 0 and OC % 8 == 0, (C, OC)  # 16-byte accesses
    assert all(x is None or x.dtype == out.dtype for x in (inp, weight, bias, pre_gelu)), out.dtype
    return inp.size // C, C, OC


def check_backward(
    dinp: Array,
    dweight: Array,
    dbias: Array | None,
    scratch: Array,
    dout: Array,
    inp: Array,
    weight: Array,
    pre_gelu: Array | None,
    recompute: bool,
) -> tuple[int, int, int]:
    """(B*T, C, OC) of arguments that fit together, else AssertionError."""
    OC, C = weight.shape
    B_T, dtype = inp.shape[:-1], dinp.dtype
    assert dinp.shape == inp.shape == (*B_T, C) and dout.shape == (*B_T, OC), (dinp.shape, inp.shape, dout.shape)
    assert dweight.shape == weight.shape and (dbias is None or dbias.shape == (OC,)), (dweight.shape, weight.shape)
    assert pre_gelu is None or pre_gelu.shape == inp.shape, (pre_gelu.shape, inp.shape)
    assert pre_gelu is not None or not recompute
    assert C % 8 == 0 and OC % 8 == 0, (C, OC)  # 16-byte accesses
    assert all(x is None or x.dtype == dtype for x in (dout, inp, weight, pre_gelu)), dtype
    module.grad_defines(dtype, (dweight, dbias))  # they have one dtype
    BT = inp.size // C
    assert scratch.dtype == np.float32 and scratch.size >= matmul_scratch_size(1, BT, C, OC), (scratch.size, BT, C, OC)
    return BT, C, OC


# ----------------------------------------------------------------------------------------------------------------------
# ffma and mma: kernels/matmul.cu


def forward_ffma(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """matmul_forward by FFMA, in any dtype: rung 3."""
    BT, C, OC = check_forward(out, inp, weight, bias, pre_gelu)
    _launch_ffma("forward", out.dtype, BT, OC, (out, pre_gelu, inp, weight, bias, i32(BT), i32(OC), i32(C)))


def forward_mma(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """matmul_forward by mma.sync, in bf16 and fp16: rung 5."""
    BT, C, OC = check_forward(out, inp, weight, bias, pre_gelu)
    _launch_mma("forward", out.dtype, BT, OC, (out, pre_gelu, inp, weight, bias, i32(BT), i32(OC), i32(C)))


def backward_ffma(
    dinp: Array,
    dweight: Array,
    dbias: Array | None,
    scratch: Array,
    dout: Array,
    inp: Array,
    weight: Array,
    pre_gelu: Array | None = None,
    accumulate: bool = True,
    recompute: bool = False,
) -> None:
    """matmul_backward by FFMA, in any dtype: rung 3."""
    BT, C, OC = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, recompute)
    if recompute:
        gelu.gelu_forward(inp, pre_gelu)
    bias_grad(dbias, scratch, dout, accumulate)
    _launch_ffma("dgrad", dinp.dtype, BT, C, (dinp, dout, weight, pre_gelu, i32(BT), i32(C), i32(OC)))
    defines, splits = module.grad_defines(dinp.dtype, (dweight,)), wgrad_splits(BT, C, OC)
    args = (dweight, scratch, dout, inp, i32(OC), i32(C), i32(BT), i32(splits), i32(accumulate))
    _launch_ffma("wgrad", dinp.dtype, OC, C, args, splits, defines)
    _wgrad_reduce(dweight, scratch, splits, dinp.dtype, accumulate, defines)


def backward_mma(
    dinp: Array,
    dweight: Array,
    dbias: Array | None,
    scratch: Array,
    dout: Array,
    inp: Array,
    weight: Array,
    pre_gelu: Array | None = None,
    accumulate: bool = True,
    recompute: bool = False,
) -> None:
    """matmul_backward by mma.sync, in bf16 and fp16: rung 5."""
    BT, C, OC = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, recompute)
    if recompute:
        gelu.gelu_forward(inp, pre_gelu)
    bias_grad(dbias, scratch, dout, accumulate)
    _launch_mma("dgrad", dinp.dtype, BT, C, (dinp, dout, weight, pre_gelu, i32(BT), i32(C), i32(OC)))
    defines, splits = module.grad_defines(dinp.dtype, (dweight,)), wgrad_splits(BT, C, OC)
    args = (dweight, scratch, dout, inp, i32(OC), i32(C), i32(BT), i32(splits), i32(accumulate))
    _launch_mma("wgrad", dinp.dtype, OC, C, args, splits, defines)
    _wgrad_reduce(dweight, scratch, splits, dinp.dtype, accumulate, defines)


def wgrad_splits(BT: int, C: int, OC: int) -> int:
    """Ranges of tokens in which ffma and mma sum a weight gradient: a function of the shapes alone. Ranges are
    multiples of RANGE_UNIT tokens, none is empty."""
    tiles = ceil_div(OC, TILE) * ceil_div(C, TILE)
    wanted = max(1, min(WGRAD_BLOCKS // tiles, BT // MIN_TOKENS))
    units = ceil_div(BT, RANGE_UNIT)
    return ceil_div(units, ceil_div(units, wanted))


def _launch_ffma(
    name: str, dtype: np.dtype, M: int, N: int, args: tuple, splits: int = 1, defines: tuple[str, ...] = ()
) -> None:
    """A product with (M, N) outputs, summed over k in `splits` ranges."""
    kernel = module.kernel("matmul.cu", f"matmul_{name}_ffma", dtype, (*defines_portable(), *defines))
    kernel((ceil_div(N, TILE), ceil_div(M, TILE), splits), (THREADS,), args)


def _launch_mma(
    name: str, dtype: np.dtype, M: int, N: int, args: tuple, splits: int = 1, defines: tuple[str, ...] = ()
) -> None:
    """The same."""
    assert dtype != np.float32, (name, dtype)
    smem = shared_bytes_mma()
    kernel = module.kernel("matmul.cu", f"matmul_{name}_mma", dtype, (*defines_portable(), *defines), smem)
    kernel((ceil_div(N, TILE) * ceil_div(M, TILE) * splits,), (MMA_THREADS,), args, shared_mem=smem)


@functools.cache
def defines_portable() -> tuple[str, ...]:
    """The -D options of kernels/matmul.cu."""
    return (
        f"TILE={TILE}",
        f"STAGES={STAGES}",
        f"BAND={BAND}",
        f"RANGE_UNIT={RANGE_UNIT}",
        f"THREADS={THREADS}",
        f"MMA_THREADS={MMA_THREADS}",
        f"SHARED_BYTES={shared_bytes_mma()}",
    )


def shared_bytes_mma() -> int:
    """Dynamic shared memory of a block of mma: the ring, or later for each warp 32 rows of 64 floats, 8 apart."""
    return max(STAGES * 2 * TILE * 32 * 2, MMA_THREADS * 72 * 4)


def _wgrad_reduce(
    dweight: Array, partials: Array, splits: int, dtype: np.dtype, accumulate: bool, defines: tuple[str, ...]
) -> None:
    """dweight (+)= the sums of its ranges, where there are several."""
    if splits > 1:
        kernel = module.kernel("matmul.cu", "matmul_wgrad_reduce", dtype, (*defines_portable(), *defines))
        args = (dweight, partials, i64(dweight.size), i32(splits), i32(accumulate))
        kernel((ceil_div(dweight.size, 8 * THREADS),), (THREADS,), args)


def bias_parts(BT: int) -> int:
    """Row ranges in which bias_grad sums, each for a block of its own."""
    return min(BIAS_PARTS, ceil_div(BT, 32))


def bias_grad(dbias: Array | None, scratch: Array, dout: Array, accumulate: bool) -> None:
    """dbias (+)= column sums of dout, in two kernels; nothing where dbias is None. Arguments as in matmul_backward."""
    if dbias is None:
        return
    OC, BT = dbias.size, dout.size // dbias.size
    parts = bias_parts(BT)
    kernel = module.kernel("matmul.cu", "matmul_bias_grad", dout.dtype, defines_portable())
    kernel((ceil_div(OC, THREADS), parts), (THREADS,), (scratch, dout, i32(BT), i32(OC)))
    bias_reduce(dbias, scratch, parts, dout.dtype, accumulate)


def bias_reduce(dbias: Array, partials: Array, parts: int, dtype: np.dtype, accumulate: bool) -> None:
    """dbias (OC,) (+)= the sum over partials (parts, OC) f32. dtype: the model's, dbias may be f32."""
    defines = (*defines_portable(), *module.grad_defines(dtype, (dbias,)))
    kernel = module.kernel("matmul.cu", "matmul_bias_grad_reduce", dtype, defines)
    args = (dbias, partials, i32(dbias.size), i32(parts), i32(accumulate))
    kernel((ceil_div(dbias.size, 32),), (THREADS,), args)  # a column for each lane of a warp


# ----------------------------------------------------------------------------------------------------------------------
# sm90: kernels/matmul_sm90.cu


def forward_sm90(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """matmul_forward by wgmma, in bf16 and fp16 at compute capability 9.0: rung 11."""
    BT, C, OC = check_forward(out, inp, weight, bias, pre_gelu)
    rows, columns = tile_sm90(BT, OC)
    operands = module.tensor_map(inp, BT, C, rows), module.tensor_map(weight, OC, C, columns)
    results = (module.tensor_map(a, BT, OC, 64) for a in (out if pre_gelu is None else pre_gelu, out))
    args = (out, pre_gelu, *operands, *results, bias, i32(BT), i32(OC), i32(C))
    _launch_sm90("forward", out.dtype, (rows, columns), tiles_sm90(BT, OC), args)


def backward_sm90(
    dinp: Array,
    dweight: Array,
    dbias: Array | None,
    scratch: Array,
    dout: Array,
    inp: Array,
    weight: Array,
    pre_gelu: Array | None = None,
    accumulate: bool = True,
    recompute: bool = False,
) -> None:
    """matmul_backward by wgmma, in bf16 and fp16 at compute capability 9.0: rung 11. dgrad recomputes inp, and the
    weight gradient makes the bias gradient too."""
    check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, recompute)
    dgrad_sm90(dinp, dout, weight, pre_gelu, inp if recompute else None)
    wgrad_sm90(dweight, dbias, scratch, dout, inp, accumulate)


def dgrad_sm90(
    dinp: Array, dout: Array, weight: Array, pre_gelu: Array | None = None, gelu_out: Array | None = None
) -> None:
    """dinp = dout @ weight, times gelu'(pre_gelu) if given; then gelu_out = gelu(pre_gelu) if given, too."""
    (OC, C), BT = weight.shape, dinp.size // weight.shape[1]
    tile = tile_sm90(BT, C)
    operands = module.tensor_map(dout, BT, OC, tile[0]), module.tensor_map(weight, OC, C, 64)
    maps = (module.tensor_map(dinp if a is None else a, BT, C, 64) for a in (dinp, pre_gelu, gelu_out))
    args = (dinp, *operands, *maps, pre_gelu, gelu_out, i32(BT), i32(C), i32(OC))
    _launch_sm90("dgrad", dinp.dtype, tile, tiles_sm90(BT, C), args)


def wgrad_sm90(dweight: Array, dbias: Array | None, scratch: Array, dout: Array, inp: Array, accumulate: bool) -> None:
    """dweight (+)= dout^T @ inp;  dbias (+)= column sums of dout, if given."""
    (OC, C), BT = dweight.shape, inp.size // dweight.shape[1]
    tile, tiles, (whole, splits) = tile_sm90(OC, C), tiles_sm90(OC, C), ranges_sm90(BT, C, OC)
    defines = module.grad_defines(inp.dtype, (dweight,))
    operands = module.tensor_map(dout, BT, OC, 64), module.tensor_map(inp, BT, C, 64)
    to = operands[0] if defines else module.tensor_map(dweight, OC, C, 64)  # f32 gradients are not stored by TMA
    bias_sums = None if dbias is None else scratch[scratch_sm90(BT, C, OC)[0] :]
    sizes, ranges = (i32(OC), i32(C)), (i32(whole), i32(splits), i32(accumulate))
    args = (dweight, scratch, bias_sums, *operands, to, *sizes, i32(BT), *ranges)
    _launch_sm90("wgrad", inp.dtype, tile, tiles + (tiles - whole) * (splits - 1), args, defines)
    if tiles > whole:
        defines = (*defines_sm90(tile), *defines)
        kernel = module.kernel("matmul_sm90.cu", "matmul_wgrad_reduce_sm90", inp.dtype, defines, 0, "sm_90a")
        grid = tile[0] * tile[1] // (8 * REDUCE_THREADS), tiles - whole
        kernel(grid, (REDUCE_THREADS,), (dweight, scratch, *sizes, *ranges))
    if dbias is not None:
        bias_reduce(dbias, bias_sums, splits * ceil_div(C, tile[1]), inp.dtype, accumulate)


def _launch_sm90(
    name: str, dtype: np.dtype, tile: tuple[int, int], items: int, args: tuple, defines: tuple[str, ...] = ()
) -> None:
    """Blocks stay: each takes every so many'th of the items, which are tiles or parts of tiles."""
    smem, defines = shared_bytes_sm90(tile), (*defines_sm90(tile), *defines)
    kernel = module.kernel("matmul_sm90.cu", f"matmul_{name}_sm90", dtype, defines, smem, "sm_90a")
    kernel((min(items, module.multiprocessors()),), (SM90_THREADS,), args, shared_mem=smem)


def tile_sm90(M: int, N: int) -> tuple[int, int]:
    """Rows and columns of the tiles of an (M, N) output. Wide tiles are turned where that takes 4 % fewer: 1024 columns
    are 8 times 128, but 6 times 192 with 128 left over. With fewer columns wgmma reads more of shared memory for the
    same product, and a chip at its power limit is 2 to 4 % slower then."""
    wide, tall = (ceil_div(M, rows) * ceil_div(N, columns) for rows, columns in (WIDE, TALL))
    return TALL if tall < wide * 0.96 else WIDE


def tiles_sm90(M: int, N: int) -> int:
    rows, columns = tile_sm90(M, N)
    return ceil_div(M, rows) * ceil_div(N, columns)


def turned(C: int, Vp: int) -> bool:
    """Whether a step of a model has products whose tiles are turned: its kernels are compiled once more for them. A
    step of few positions may have others, which are compiled at the first step."""
    BT = 2**20 * 3  # whole tiles of either kind
    weights = (3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (Vp, C)
    shapes = (*weights, *((BT, width) for shape in weights for width in shape))
    return any(tile_sm90(*shape) == TALL for shape in shapes)


@functools.cache
def ranges_sm90(BT: int, C: int, OC: int) -> tuple[int, int]:
    """(whole, splits): the first `whole` tiles of the weight gradient are made at once, each of the others in `splits`
    ranges of tokens. What is left after whole rounds of 132 tiles is cut so that multiprocessors are idle least. This
    depends on the shapes alone."""
    tiles = tiles_sm90(OC, C)
    tail = tiles % MULTIPROCESSORS

    def tokens(splits: int) -> float:  # that each multiprocessor has to do for the tail
        extra = RANGE_TOKENS * splits * tail / MULTIPROCESSORS if splits > 1 else 0
        return BT * ceil_div(tail * splits, MULTIPROCESSORS) / splits + extra

    splits = min(range(1, max(1, min(16, BT // MIN_TOKENS)) + 1), key=tokens)
    return (tiles if splits == 1 else tiles - tail), splits


def scratch_sm90(BT: int, C: int, OC: int) -> tuple[int, int]:
    """f32 elements of partial sums: those of the weight gradient, whole tiles of it, and those of the bias gradient."""
    (whole, splits), tiles, (rows, columns) = ranges_sm90(BT, C, OC), tiles_sm90(OC, C), tile_sm90(OC, C)
    return (tiles - whole) * splits * rows * columns, splits * ceil_div(C, columns) * OC


@functools.cache
def defines_sm90(tile: tuple[int, int]) -> tuple[str, ...]:
    return (
        f"ROWS={tile[0]}",
        f"COLUMNS={tile[1]}",
        f"STAGES={SM90_STAGES}",
        f"SLOTS={SM90_SLOTS}",
        f"BAND={SM90_BAND}",
        f"LOW_BAND={LOW_BAND}",
        f"LOW_COLUMNS={LOW_COLUMNS}",
        f"THREADS={SM90_THREADS}",
        f"REDUCE_THREADS={REDUCE_THREADS}",
        f"SHARED_BYTES={shared_bytes_sm90(tile)}",
    )


def shared_bytes_sm90(tile: tuple[int, int]) -> int:
    """Dynamic shared memory of a block: the kernel's struct Shared, and 1024 bytes to align it."""
    rows, columns = tile
    stages, slots = SM90_STAGES * (rows + columns) * 128, 2 * SM90_SLOTS * 64 * 128  # 64 values of 16 bits in a row
    barriers = 8 * (2 * rows * columns // 64**2 + 2 * SM90_STAGES + 2)
    return ceil_div(stages + slots + 2 * columns * 4 + barriers, 128) * 128 + 1024
