"""Causal self-attention on packed QKV: kernels/attention.cu has the math, the layouts and the table of versions.

attention_forward1 .. 4 and attention_backward1 .. 4 have the whole contract of the public functions, which choose the
version: for bf16 and fp16 4 (kernels/attention_sm90.cu) at compute capability 9.0 and 3 (tensor cores) elsewhere, 2
(FFMA) for fp32, 1 where a head does not fit the tiles.
"""

import math

import numpy as np
from numpy import int32 as i32

from . import module

SIXTEEN_BIT = (3, 4)  # versions for bf16 and fp16 alone
HOPPER = (4,)  # versions for compute capability 9.0 alone
HEAD_SIZES = {4: (64, 128)}  # that a version is limited to
ROWS, COLUMNS2 = 64, 32  # kernel 2: rows of a forward block, columns of its tiles


def ceil_div(a, b):
    return -(-a // b)


def attention_scratch_size(B, T, C, NH):
    """f32 elements of scratch that attention_backward wants: D (B, NH, T) = rowsum(dout * out), and in version 4 as
    many of att, with T rounded up to a multiple of 64."""
    return B * NH * ceil_div(T, 64) * 128


def rows2(HS, backward):
    """Kernel 2: rows a block owns. As in kernels/attention.cu."""
    return ROWS // 2 if backward and HS > 96 else ROWS


def smem2(HS, backward):
    """Kernel 2: dynamic shared memory in bytes, fp32 tiles: one or two own tiles, two walking tiles, probabilities."""
    rows = rows2(HS, backward)
    return 4 * (((1 + backward) * rows + 2 * COLUMNS2) * (HS + 4) + rows * (COLUMNS2 + 4))


def smem3(HS, columns, own=0):
    """Kernel 3: bytes of dynamic shared memory: two buffers of two 16-bit tiles, two tiles of the block's own rows."""
    return 2 * (4 * columns + 2 * own) * (ceil_div(HS, 16) * 16 + 8)


def launch_sm90(name, dtype, B, T, NH, HS, tiles, args):
    """Kernel 4: each block takes every so many'th pair of 128-row blocks. tiles: bytes in the stages and own tiles."""
    defines = () if HS == 64 else (f"HEAD_SIZE={HS}",)
    smem = tiles + 256 * HS + 128 + 1024  # + staging, barriers, alignment
    kernel = module.kernel("attention_sm90.cu", f"attention_{name}_sm90", dtype, defines, smem, "sm_90a")
    pairs = ceil_div(ceil_div(T, 128), 2) * B * NH
    kernel((min(pairs, module.multiprocessors()),), (384,), args, shared_mem=smem)


def production(HS, dtype, backward):
    if HS > 128:
        return 1
    if dtype != np.float32 and HS in HEAD_SIZES[4] and module.hopper():
        return 4
    if dtype != np.float32 and (module.capability() >= 80 or HS <= 64):
        return 3  # below 8.0 a block has 64 KiB of shared memory
    return 2 if module.capability() >= 80 or smem2(HS, backward) <= 65536 else 1


def launch(name, version, dtype, HS, blocks, threads, args, smem=0):
    assert dtype != np.float32 or version not in SIXTEEN_BIT, (name, version, dtype)
    defines = () if HS == 64 else (f"HEAD_SIZE={HS}",)
    kernel = module.kernel("attention.cu", f"attention_{name}_kernel{version}", dtype, defines, smem)
    kernel((blocks,), (threads,), args, shared_mem=smem)


def forward(version, out, att, qkvr):
    B, T, C = out.shape
    NH, HS = att.shape[1], C // att.shape[1]
    assert qkvr.shape == (B, T, 3 * C) and att.shape == (B, NH, T) and C == NH * HS, (out.shape, att.shape, qkvr.shape)
    assert HS % 8 == 0 and (version == 1 or HS <= 128), (HS, version)
    assert HS in HEAD_SIZES.get(version, (HS,)), (HS, version)
    assert qkvr.dtype == out.dtype and att.dtype == np.float32, (qkvr.dtype, out.dtype, att.dtype)
    args = (out, att, qkvr, np.float32(1 / math.sqrt(HS)), i32(B), i32(T), i32(NH))
    if version == 4:
        maps = (module.tensor_map(qkvr, B * T, 3 * C, 128),)
        tiles = (7 if HS == 64 else 5) * 256 * HS  # the stages, and one of the block's own rows
        launch_sm90("forward", out.dtype, B, T, NH, HS, tiles, (out, att, *maps, *args[3:]))
    elif version == 1:
        launch("forward", 1, out.dtype, HS, ceil_div(B * NH * T, 128), 128, args)
    elif version == 2:
        launch("forward", 2, out.dtype, HS, ceil_div(T, ROWS) * B * NH, ROWS * 2, args, smem2(HS, False))
    else:
        queries = 128 if HS <= 64 else 64
        launch("forward", 3, out.dtype, HS, ceil_div(T, queries) * B * NH, 128, args, smem3(HS, 64))


def backward(version, dqkvr, scratch, dout, out, qkvr, att):
    B, T, C = out.shape
    NH, HS = att.shape[1], C // att.shape[1]
    assert dqkvr.shape == qkvr.shape == (B, T, 3 * C) and dout.shape == out.shape, (dqkvr.shape, qkvr.shape, out.shape)
    assert att.shape == (B, NH, T) and C == NH * HS, (att.shape, out.shape)
    assert scratch.size >= attention_scratch_size(B, T, C, NH), (scratch.size, B, T, NH)
    assert HS % 8 == 0 and (version == 1 or HS <= 128), (HS, version)
    assert HS in HEAD_SIZES.get(version, (HS,)), (HS, version)
    assert dqkvr.dtype == qkvr.dtype == dout.dtype == out.dtype, (dqkvr.dtype, qkvr.dtype, dout.dtype, out.dtype)
    assert att.dtype == scratch.dtype == np.float32, (att.dtype, scratch.dtype)
    dtype, dims = out.dtype, (np.float32(1 / math.sqrt(HS)), i32(B), i32(T), i32(NH))
    args = (dqkvr, scratch, dout, qkvr, att, *dims)
    if version < 3:
        blocks = ceil_div(B * NH * T, 128)
        launch("backward_dot", 1, dtype, HS, blocks, 128, (scratch, dout, out, *dims[1:]))
    if version == 1:
        launch("backward_dq", 1, dtype, HS, blocks, 128, args)
        launch("backward_dkv", 1, dtype, HS, blocks, 128, args)
    elif version == 2:
        rows = rows2(HS, True)
        blocks, smem = ceil_div(T, rows) * B * NH, smem2(HS, True)
        launch("backward_dq", 2, dtype, HS, blocks, rows * 2, args, smem)
        launch("backward_dkv", 2, dtype, HS, blocks, rows * 2, args, smem)
    elif version == 4:
        map_qkvr, map_dout, map_out = (module.tensor_map(a, B * T, a.shape[2], 64) for a in (qkvr, dout, out))
        stage, own = 256 * HS + 512, 256 * HS
        dq_args = (dqkvr, scratch, map_qkvr, map_dout, map_out, att, *dims)
        tiles = (4 if HS == 64 else 2) * stage + 3 * own
        launch_sm90("backward_dq", dtype, B, T, NH, HS, tiles, dq_args)
        tiles = (4 if HS == 64 else 3) * stage + 2 * own
        launch_sm90("backward_dkv", dtype, B, T, NH, HS, tiles, (dqkvr, scratch, map_qkvr, map_dout, *dims))
    else:
        blocks, columns = ceil_div(T, 64) * B * NH, 64 if HS <= 64 else 32
        dq_args = (dqkvr, scratch, dout, out, qkvr, att, *dims)
        launch("backward_dq", 3, dtype, HS, blocks, 128, dq_args, smem3(HS, columns))
        launch("backward_dkv", 3, dtype, HS, blocks, 128, args, smem3(HS, columns, 0 if HS <= 96 else 64))


def attention_forward1(out, att, qkvr):
    forward(1, out, att, qkvr)


def attention_forward2(out, att, qkvr):
    forward(2, out, att, qkvr)


def attention_forward3(out, att, qkvr):
    forward(3, out, att, qkvr)


def attention_forward4(out, att, qkvr):
    forward(4, out, att, qkvr)


def attention_backward1(dqkvr, scratch, dout, out, qkvr, att):
    backward(1, dqkvr, scratch, dout, out, qkvr, att)


def attention_backward2(dqkvr, scratch, dout, out, qkvr, att):
    backward(2, dqkvr, scratch, dout, out, qkvr, att)


def attention_backward3(dqkvr, scratch, dout, out, qkvr, att):
    backward(3, dqkvr, scratch, dout, out, qkvr, att)


def attention_backward4(dqkvr, scratch, dout, out, qkvr, att):
    backward(4, dqkvr, scratch, dout, out, qkvr, att)


def attention_forward(out, att, qkvr):
    """out = softmax(mask(q @ k^T / sqrt(HS))) @ v for each head;  att = log sum exp of the masked, scaled scores

    out (B, T, C) X written (=);  att (B, NH, T) f32 written, nats, for backward;
    qkvr (B, T, 3C) X, packed as (B, T, 3, NH, HS).
    Requires: HS = C / NH a multiple of 8, any T; all arrays C-contiguous and 16-byte aligned.
    Cost: 2*B*NH*T*T*HS FLOPs (the causal half of 4*B*NH*T*T*HS).
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/attention.cuh attention_forward; Dao 2023, arXiv:2307.08691, algorithm 1.
    """
    forward(production(out.shape[2] // att.shape[1], out.dtype, False), out, att, qkvr)


def attention_backward(dqkvr, scratch, dout, out, qkvr, att):
    """p = exp(q @ k^T / sqrt(HS) - att);  dv = p^T @ dout;  ds = p * (dout @ v^T - rowsum(dout * out)) / sqrt(HS)
    dq = ds @ k;  dk = ds^T @ q

    dqkvr (B, T, 3C) X written (=), packed as qkvr;  scratch f32 flat, attention_scratch_size(B, T, C, NH), need not be
    zeroed;  dout, out (B, T, C) X;  qkvr (B, T, 3C) X;  att (B, NH, T) f32 from the forward pass.
    Requires: HS = C / NH a multiple of 8, any T; all arrays C-contiguous and 16-byte aligned.
    Cost: 5*B*NH*T*T*HS FLOPs counting each product once (the kernels spend 7, to be free of atomics).
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/attention.cuh attention_backward; Dao 2023, arXiv:2307.08691, algorithm 2.
    """
    version = production(out.shape[2] // att.shape[1], out.dtype, True)
    backward(version, dqkvr, scratch, dout, out, qkvr, att)
