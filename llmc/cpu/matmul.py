"""The linear layers, forward and backward, with their epilogues (llm.c: llmc/matmul.cuh).

Each op is cut into blocks of the output; a block is one single-threaded BLAS call, and what follows it (bias, GELU,
its derivative, the add into a gradient) is done on the block while it is in cache.
"""

import numpy as np

from llmc.buffers import Array

from . import device, gelu
from .gelu import gelu_backward_block, gelu_block

ROWS, COLUMNS = 512, 512  # the largest block of an output


def matmul_scratch_size(B: int, T: int, C: int, OC: int) -> int:
    """f32 elements of scratch that matmul_backward wants: B*T ones, for the bias gradient as a matrix product."""
    return B * T


def _grid(M: int, N: int) -> list[tuple[slice, slice]]:
    """The blocks of an (M, N) output, as pairs of slices: the columns are what the threads share."""
    rows = [slice(a, min(a + ROWS, M)) for a in range(0, M, ROWS)]
    return [(r, slice(*c)) for c in device.split(N, COLUMNS, 16) for r in rows]


def matmul_forward(
    out: Array, inp: Array, weight: Array, bias: Array = None, pre_gelu: Array = None
) -> None:  # fmt: skip
    """out = inp @ weight^T + bias;  with pre_gelu: pre_gelu = inp @ weight^T + bias, out = gelu(pre_gelu)

    out (B, T, OC) f32 written (=);  inp (B, T, C);  weight (OC, C);  bias (OC,) or None;  pre_gelu (B, T, OC) written.
    Cost: 2*B*T*C*OC FLOPs.  Source: llm.c llmc/matmul.cuh matmul_forward_cublaslt.
    """
    OC, C = weight.shape
    assert inp.shape[-1] == C and out.shape == (*inp.shape[:-1], OC), (out.shape, inp.shape, weight.shape)
    assert bias is None or bias.shape == (OC,), (bias.shape, OC)
    assert pre_gelu is None or pre_gelu.shape == out.shape, (pre_gelu.shape, out.shape)
    x, final = inp.reshape(-1, C), out.reshape(-1, OC)
    y = final if pre_gelu is None else pre_gelu.reshape(-1, OC)
    grid = _grid(x.shape[0], OC)

    def body(i: int) -> None:
        r, c = grid[i]
        block = y[r, c]
        np.matmul(x[r], weight[c].T, out=block)
        if bias is not None:
            block += bias[c]
        if pre_gelu is not None:
            gelu_block(final[r, c], block)

    device.parallel(body, len(grid))


def matmul_backward(
    dinp: Array, dweight: Array, dbias: Array, scratch: Array, dout: Array, inp: Array, weight: Array,
    pre_gelu: Array = None, accumulate: bool = True, recompute: bool = False,
) -> None:  # fmt: skip
    """dinp = dout @ weight, times gelu'(pre_gelu) if given;  dweight (+)= dout^T @ inp;  dbias (+)= column sums of dout

    dinp (B, T, C) f32 written (=);  dweight (OC, C), dbias (OC,) or None: accumulated (+=) if accumulate, else written;
    scratch f32, matmul_scratch_size(B, T, C, OC);  dout (B, T, OC);  inp (B, T, C);  weight (OC, C);
    pre_gelu (B, T, C): the values whose GELU was inp.  With recompute, inp is written first (=), as
    gelu(pre_gelu), with the bits that matmul_forward and gelu_forward give it.  dinp may not overlap dout or inp.
    Cost: 4*B*T*C*OC FLOPs.  Source: llm.c llmc/matmul.cuh matmul_backward.
    """
    OC, C = weight.shape
    assert dinp.shape == inp.shape and inp.shape[-1] == C, (dinp.shape, inp.shape, weight.shape)
    assert dout.shape == (*inp.shape[:-1], OC) and dweight.shape == weight.shape, (dout.shape, dweight.shape)
    assert dbias is None or dbias.shape == (OC,), (dbias.shape, OC)
    assert pre_gelu is None or pre_gelu.shape == inp.shape, (pre_gelu.shape, inp.shape)
    if recompute:
        gelu.gelu_forward(inp, pre_gelu)
    x, dx, dy = inp.reshape(-1, C), dinp.reshape(-1, C), dout.reshape(-1, OC)
    x_pre = None if pre_gelu is None else pre_gelu.reshape(-1, C)
    BT = x.shape[0]
    ones = scratch[:BT]
    ones.fill(1.0)
    grid = _grid(BT, C)
    rows = device.split(OC, min(COLUMNS, device.SCRATCH // C), 16)

    def input_gradient(r: slice, c: slice) -> None:
        np.matmul(dy[r], weight[:, c], out=dx[r, c])
        if x_pre is not None:
            gelu_backward_block(dx[r, c], x_pre[r, c])

    def weight_gradient(c0: int, c1: int) -> None:
        dyt = dy[:, c0:c1].T
        if accumulate:
            t = device.scratch(c1 - c0, C)
            dweight[c0:c1] += np.matmul(dyt, x, out=t)
        else:
            np.matmul(dyt, x, out=dweight[c0:c1])
        if dbias is not None:
            total = np.matmul(dyt, ones)
            dbias[c0:c1] = dbias[c0:c1] + total if accumulate else total

    def body(i: int) -> None:
        if i < len(grid):
            input_gradient(*grid[i])
        else:
            weight_gradient(*rows[i - len(grid)])

    device.parallel(body, len(grid) + len(rows))
