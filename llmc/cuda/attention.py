"""Causal self-attention on packed QKV: kernels/attention.cu has the math, the layouts and what was measured.

Four implementations have the whole contract of the public functions, which choose among them by head size, dtype and
GPU: for bf16 and fp16 sm90 (kernels/attention_sm90.cu) at compute capability 9.0 and mma elsewhere, ffma for fp32, and
naive where a head fits no tile. The sizes that kernels and launchers share are decided here. Kernels get them by -D,
and do not compile if a *_SHARED_BYTES is not what they need.
"""

import functools
import math

import numpy as np
from numpy import int32 as i32

from llmc.buffers import Array

from . import module

LARGEST_TILED_HEAD = 128
OLD_SHARED_BYTES = 64 << 10  # what a block has below compute capability 8.0

# kernels/attention.cu
NAIVE_THREADS = 128
FFMA_ROWS, FFMA_COLUMNS = 64, 32  # rows that a block owns (forward), which has twice as many threads; columns of a tile
KEYS, ROWS, MMA_THREADS = 64, 64, 128  # mma: columns of a forward tile; rows of a backward block

# kernels/attention_sm90.cu
SM90_HEAD_SIZES = (64, 128)
SM90_ROWS, SM90_COLUMNS, SM90_THREADS = 128, 64, 384  # rows that a block owns; rows of a backward tile
SM90_STAGES = {64: (6, 4, 4), 128: (4, 2, 3)}  # of the rings: forward, dq, dkv


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ----------------------------------------------------------------------------------------------------------------------
# the op


def attention_forward(out: Array, att: Array, qkvr: Array) -> None:
    """out = softmax(mask(q @ k^T / sqrt(HS))) @ v for each head;  att = log sum exp of the masked, scaled scores

    out (B, T, C) X written (=);  att (B, NH, T) f32 written, nats, for backward;
    qkvr (B, T, 3C) X, packed as (B, T, 3, NH, HS).
    Requires: HS = C / NH a multiple of 8, any T; all arrays C-contiguous and 16-byte aligned.
    Cost: 2*B*NH*T*T*HS FLOPs (the causal half of 4*B*NH*T*T*HS).
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/attention.cuh attention_forward; Dao 2023, arXiv:2307.08691, algorithm 1.
    """
    HS = out.shape[2] // att.shape[1]
    if HS > LARGEST_TILED_HEAD:
        forward_naive(out, att, qkvr)
    elif uses_sm90(HS, out.dtype):
        forward_sm90(out, att, qkvr)
    elif uses_mma(HS, out.dtype):
        forward_mma(out, att, qkvr)
    elif fits_ffma(HS, backward=False):
        forward_ffma(out, att, qkvr)
    else:
        forward_naive(out, att, qkvr)


def attention_backward(dqkvr: Array, scratch: Array, dout: Array, out: Array, qkvr: Array, att: Array) -> None:
    """p = exp(q @ k^T / sqrt(HS) - att);  dv = p^T @ dout;  ds = p * (dout @ v^T - rowsum(dout * out)) / sqrt(HS)
    dq = ds @ k;  dk = ds^T @ q

    dqkvr (B, T, 3C) X written (=), packed as qkvr;  scratch f32 flat, attention_scratch_size(B, T, C, NH), need not be
    zeroed;  dout, out (B, T, C) X;  qkvr (B, T, 3C) X;  att (B, NH, T) f32 from the forward pass.
    Requires: HS = C / NH a multiple of 8, any T; all arrays C-contiguous and 16-byte aligned.
    Cost: 5*B*NH*T*T*HS FLOPs counting each product once (the kernels spend 7, to be free of atomics).
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/attention.cuh attention_backward; Dao 2023, arXiv:2307.08691, algorithm 2.
    """
    HS = out.shape[2] // att.shape[1]
    if HS > LARGEST_TILED_HEAD:
        backward_naive(dqkvr, scratch, dout, out, qkvr, att)
    elif uses_sm90(HS, out.dtype):
        backward_sm90(dqkvr, scratch, dout, out, qkvr, att)
    elif uses_mma(HS, out.dtype):
        backward_mma(dqkvr, scratch, dout, out, qkvr, att)
    elif fits_ffma(HS, backward=True):
        backward_ffma(dqkvr, scratch, dout, out, qkvr, att)
    else:
        backward_naive(dqkvr, scratch, dout, out, qkvr, att)


def attention_scratch_size(B: int, T: int, C: int, NH: int) -> int:
    """f32 elements of scratch that attention_backward wants: D (B, NH, T) = rowsum(dout * out), and for sm90 as many of
    att, with T rounded up to a multiple of 64."""
    return B * NH * ceil_div(T, 64) * 128


def uses_sm90(HS: int, dtype: np.dtype) -> bool:
    return dtype != np.float32 and HS in SM90_HEAD_SIZES and module.hopper()


def uses_mma(HS: int, dtype: np.dtype) -> bool:
    """Below compute capability 8.0 shared memory has no room for larger heads."""
    return dtype != np.float32 and (module.capability() >= 80 or HS <= 64)


def fits_ffma(HS: int, backward: bool) -> bool:
    return module.capability() >= 80 or ffma_bytes(HS, backward) <= OLD_SHARED_BYTES


def check_forward(out: Array, att: Array, qkvr: Array) -> tuple[int, int, int, int]:
    """(B, T, NH, HS) of arguments that fit together, else AssertionError."""
    B, T, C = out.shape
    NH, HS = att.shape[1], C // att.shape[1]
    assert qkvr.shape == (B, T, 3 * C) and att.shape == (B, NH, T) and C == NH * HS, (out.shape, att.shape, qkvr.shape)
    assert HS % 8 == 0, HS
    assert qkvr.dtype == out.dtype and att.dtype == np.float32, (qkvr.dtype, out.dtype, att.dtype)
    return B, T, NH, HS


def check_backward(
    dqkvr: Array, scratch: Array, dout: Array, out: Array, qkvr: Array, att: Array
) -> tuple[int, int, int, int]:
    """(B, T, NH, HS) of arguments that fit together, else AssertionError."""
    B, T, NH, HS = check_forward(out, att, qkvr)
    assert dqkvr.shape == qkvr.shape and dout.shape == out.shape, (dqkvr.shape, qkvr.shape, dout.shape, out.shape)
    assert scratch.dtype == np.float32, scratch.dtype
    assert scratch.size >= attention_scratch_size(B, T, NH * HS, NH), (scratch.size, B, T, NH)
    assert dqkvr.dtype == dout.dtype == out.dtype, (dqkvr.dtype, dout.dtype, out.dtype)
    return B, T, NH, HS


def dims_of(B: int, T: int, NH: int, HS: int) -> tuple:
    """The last arguments of every kernel: scale, B, T, NH."""
    return np.float32(1 / math.sqrt(HS)), i32(B), i32(T), i32(NH)


# ----------------------------------------------------------------------------------------------------------------------
# naive, ffma and mma: kernels/attention.cu


def forward_naive(out: Array, att: Array, qkvr: Array) -> None:
    """attention_forward with a thread for each query, in any dtype and for any head size: rung 1."""
    B, T, NH, HS = check_forward(out, att, qkvr)
    args = (out, att, qkvr, *dims_of(B, T, NH, HS))
    _launch("forward_naive", out.dtype, HS, ceil_div(B * NH * T, NAIVE_THREADS), NAIVE_THREADS, args)


def backward_naive(dqkvr: Array, scratch: Array, dout: Array, out: Array, qkvr: Array, att: Array) -> None:
    """attention_backward with a thread for each query, then for each key, any dtype and head size: rung 1."""
    B, T, NH, HS = check_backward(dqkvr, scratch, dout, out, qkvr, att)
    _dot(scratch, dout, out, B, T, NH, HS)
    args = (dqkvr, scratch, dout, qkvr, att, *dims_of(B, T, NH, HS))
    for name in ("backward_dq_naive", "backward_dkv_naive"):
        _launch(name, out.dtype, HS, ceil_div(B * NH * T, NAIVE_THREADS), NAIVE_THREADS, args)


def forward_ffma(out: Array, att: Array, qkvr: Array) -> None:
    """attention_forward by FFMA, in any dtype: rung 2."""
    B, T, NH, HS = check_forward(out, att, qkvr)
    args = (out, att, qkvr, *dims_of(B, T, NH, HS))
    blocks, smem = ceil_div(T, FFMA_ROWS) * B * NH, ffma_bytes(HS, False)
    _launch("forward_ffma", out.dtype, HS, blocks, 2 * FFMA_ROWS, args, smem)


def backward_ffma(dqkvr: Array, scratch: Array, dout: Array, out: Array, qkvr: Array, att: Array) -> None:
    """attention_backward by FFMA, in any dtype: rung 2."""
    B, T, NH, HS = check_backward(dqkvr, scratch, dout, out, qkvr, att)
    _dot(scratch, dout, out, B, T, NH, HS)
    args = (dqkvr, scratch, dout, qkvr, att, *dims_of(B, T, NH, HS))
    rows, smem = ffma_backward_rows(HS), ffma_bytes(HS, True)
    for name in ("backward_dq_ffma", "backward_dkv_ffma"):
        _launch(name, out.dtype, HS, ceil_div(T, rows) * B * NH, 2 * rows, args, smem)


def forward_mma(out: Array, att: Array, qkvr: Array) -> None:
    """attention_forward by mma.sync, in bf16 and fp16: rung 3."""
    B, T, NH, HS = check_forward(out, att, qkvr)
    assert out.dtype != np.float32, out.dtype
    args = (out, att, qkvr, *dims_of(B, T, NH, HS))
    blocks, (smem, _, _) = ceil_div(T, mma_queries(HS)) * B * NH, mma_bytes(HS)
    _launch("forward_mma", out.dtype, HS, blocks, MMA_THREADS, args, smem)


def backward_mma(dqkvr: Array, scratch: Array, dout: Array, out: Array, qkvr: Array, att: Array) -> None:
    """attention_backward by mma.sync, in bf16 and fp16: rung 3."""
    B, T, NH, HS = check_backward(dqkvr, scratch, dout, out, qkvr, att)
    assert out.dtype != np.float32, out.dtype
    blocks, (_, dq_smem, dkv_smem), dims = ceil_div(T, ROWS) * B * NH, mma_bytes(HS), dims_of(B, T, NH, HS)
    args = (dqkvr, scratch, dout, out, qkvr, att, *dims)
    _launch("backward_dq_mma", out.dtype, HS, blocks, MMA_THREADS, args, dq_smem)
    args = (dqkvr, scratch, dout, qkvr, att, *dims)
    _launch("backward_dkv_mma", out.dtype, HS, blocks, MMA_THREADS, args, dkv_smem)


def _dot(D: Array, dout: Array, out: Array, B: int, T: int, NH: int, HS: int) -> None:
    """D = rowsum(dout * out), for naive and ffma."""
    args = (D, dout, out, i32(B), i32(T), i32(NH))
    _launch("backward_dot", out.dtype, HS, ceil_div(B * NH * T, NAIVE_THREADS), NAIVE_THREADS, args)


def _launch(name: str, dtype: np.dtype, HS: int, blocks: int, threads: int, args: tuple, smem: int = 0) -> None:
    assert smem == 0 or HS <= LARGEST_TILED_HEAD, (name, HS)  # all but naive have tiles, which are in shared memory
    kernel = module.kernel("attention.cu", f"attention_{name}", dtype, defines(HS), smem)
    kernel((blocks,), (threads,), args, shared_mem=smem)


@functools.cache
def defines(HS: int) -> tuple[str, ...]:
    """The -D options of kernels/attention.cu."""
    naive = f"HEAD_SIZE={HS}", f"NAIVE_THREADS={NAIVE_THREADS}"
    if HS > LARGEST_TILED_HEAD:
        return naive
    forward, dq, dkv = mma_bytes(HS)
    return (
        *naive,
        f"FFMA_ROWS={FFMA_ROWS}",
        f"FFMA_BACKWARD_ROWS={ffma_backward_rows(HS)}",
        f"FFMA_COLUMNS={FFMA_COLUMNS}",
        f"FFMA_SHARED_BYTES={ffma_bytes(HS, False)}",
        f"FFMA_BACKWARD_SHARED_BYTES={ffma_bytes(HS, True)}",
        f"QUERIES={mma_queries(HS)}",
        f"KEYS={KEYS}",
        f"ROWS={ROWS}",
        f"COLUMNS={mma_columns(HS)}",
        f"MMA_THREADS={MMA_THREADS}",
        f"FORWARD_SHARED_BYTES={forward}",
        f"DQ_SHARED_BYTES={dq}",
        f"DKV_SHARED_BYTES={dkv}",
    )


def ffma_backward_rows(HS: int) -> int:
    """Rows that a backward block owns: as many as 99 KiB of shared memory can hold."""
    return FFMA_ROWS if HS <= 96 else FFMA_ROWS // 2


def ffma_bytes(HS: int, backward: bool) -> int:
    """Shared memory: fp32 tiles of one or two matrices' own rows, two tiles that are walked over, probabilities."""
    own, rows = (2, ffma_backward_rows(HS)) if backward else (1, FFMA_ROWS)
    return 4 * ((own * rows + 2 * FFMA_COLUMNS) * (HS + 4) + rows * (FFMA_COLUMNS + 4))


def mma_queries(HS: int) -> int:
    """Rows that a forward block owns: as many as its registers allow."""
    return 128 if HS <= 64 else 64


def mma_columns(HS: int) -> int:
    """Columns of a backward tile."""
    return 64 if HS <= 64 else 32


def mma_bytes(HS: int) -> tuple[int, int, int]:
    """Shared memory of forward, dq and dkv: two buffers of two 16-bit tiles; for dkv of large heads its own keys and
    values, too."""
    row, columns = 2 * (ceil_div(HS, 16) * 16 + 8), mma_columns(HS)
    own = 0 if HS <= 96 else 2 * ROWS
    return 4 * KEYS * row, 4 * columns * row, (4 * columns + own) * row


# ----------------------------------------------------------------------------------------------------------------------
# sm90: kernels/attention_sm90.cu


def forward_sm90(out: Array, att: Array, qkvr: Array) -> None:
    """attention_forward by wgmma, in bf16 and fp16 at compute capability 9.0, for heads of 64 and 128: rung 4."""
    B, T, NH, HS = check_forward(out, att, qkvr)
    map_qkvr = module.tensor_map(qkvr, B * T, qkvr.shape[2], SM90_ROWS)
    args = (out, att, map_qkvr, *dims_of(B, T, NH, HS))
    _launch_sm90("forward", out.dtype, B, T, NH, HS, args)


def backward_sm90(dqkvr: Array, scratch: Array, dout: Array, out: Array, qkvr: Array, att: Array) -> None:
    """attention_backward by wgmma, in bf16 and fp16 at compute capability 9.0, for heads of 64 and 128: rung 4."""
    B, T, NH, HS = check_backward(dqkvr, scratch, dout, out, qkvr, att)
    maps = (module.tensor_map(a, B * T, a.shape[2], SM90_COLUMNS) for a in (qkvr, dout, out))
    (map_qkvr, map_dout, map_out), dims = maps, dims_of(B, T, NH, HS)
    args = (dqkvr, scratch, map_qkvr, map_dout, map_out, att, *dims)
    _launch_sm90("backward_dq", out.dtype, B, T, NH, HS, args)
    _launch_sm90("backward_dkv", out.dtype, B, T, NH, HS, (dqkvr, scratch, map_qkvr, map_dout, *dims))


def _launch_sm90(name: str, dtype: np.dtype, B: int, T: int, NH: int, HS: int, args: tuple) -> None:
    """Blocks stay: each takes every so many'th pair of 128-row blocks."""
    assert HS in SM90_HEAD_SIZES, HS
    smem = sm90_bytes(HS)[("forward", "backward_dq", "backward_dkv").index(name)]
    kernel = module.kernel("attention_sm90.cu", f"attention_{name}_sm90", dtype, defines_sm90(HS), smem, "sm_90a")
    pairs = ceil_div(ceil_div(T, SM90_ROWS), 2) * B * NH
    kernel((min(pairs, module.multiprocessors()),), (SM90_THREADS,), args, shared_mem=smem)


@functools.cache
def defines_sm90(HS: int) -> tuple[str, ...]:
    """The -D options of kernels/attention_sm90.cu."""
    names = "FORWARD", "DQ", "DKV"
    return (
        f"HEAD_SIZE={HS}",
        f"ROWS={SM90_ROWS}",
        f"COLUMNS={SM90_COLUMNS}",
        f"THREADS={SM90_THREADS}",
        *(f"{name}_STAGES={stages}" for name, stages in zip(names, SM90_STAGES[HS], strict=True)),
        *(f"{name}_SHARED_BYTES={smem}" for name, smem in zip(names, sm90_bytes(HS), strict=True)),
    )


@functools.cache
def sm90_bytes(HS: int) -> tuple[int, int, int]:
    """Dynamic shared memory of forward, dq and dkv: the kernels' structs, and 1024 bytes to align them."""
    rows = SM90_ROWS * HS * 2  # bytes of a block's own rows, of a forward tile, and of two backward tiles
    forward, dq, dkv = SM90_STAGES[HS]

    def total(stages: int, own: int, statistics: int = 0) -> int:
        """The bytes with staging for 8 warps, and two barriers for each stage and for the block's own rows."""
        return stages * (rows + statistics) + own * rows + 8 * 16 * HS * 2 + 8 * (2 * stages + 2) + 1024

    statistics = 2 * SM90_COLUMNS * 4
    return total(forward, 1), total(dq, 3, statistics), total(dkv, 2, statistics)
