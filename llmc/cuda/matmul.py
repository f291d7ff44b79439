"""The linear layers: kernels/matmul.cu has the math, the layouts and the table of versions.

matmul_forward1 .. 5 and matmul_backward1 .. 5 have the whole contract of the public functions, which choose the version
for the dtype: 5 (tensor cores) for bf16 and fp16, 3 (FFMA) for fp32.
"""

import numpy as np
from numpy import int32 as i32
from numpy import int64 as i64

from . import module

TILE = 128  # kernels 3, 4, 5: outputs of a block, in both directions
STAGES = {4: 1, 5: 3}  # kernels 4, 5: tiles in flight
SIXTEEN_BIT = (4, 5)  # versions for bf16 and fp16 alone
BIAS_PARTS = 128  # most row ranges of the bias gradient
# Weight gradient: as many token ranges as bring output tiles x ranges near this number, of 128 tokens or more each. It
# fills GPUs of 108 to 132 SMs with two blocks each three times over; a constant, so that results do not depend on the
# device. The partial sums then take at most 792 * 64 KiB.
WGRAD_BLOCKS, MIN_TOKENS = 792, 128


def ceil_div(a, b):
    return -(-a // b)


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
    """f32 elements of scratch that matmul_backward wants: partial sums of the weight or the bias gradient."""
    splits = wgrad_splits(B * T, C, OC)
    return max(splits * OC * C if splits > 1 else 0, bias_parts(B * T) * OC)


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
    launch("forward", version, out.dtype, BT, OC, (out, pre_gelu, inp, weight, bias, i32(BT), i32(OC), i32(C)))


def backward(version, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate):
    OC, C = weight.shape
    BT = inp.size // C
    B_T, dtype, accumulate = inp.shape[:-1], dinp.dtype, i32(accumulate)
    assert dinp.shape == inp.shape == (*B_T, C) and dout.shape == (*B_T, OC), (dinp.shape, inp.shape, dout.shape)
    assert dweight.shape == weight.shape and (dbias is None or dbias.shape == (OC,)), (dweight.shape, weight.shape)
    assert pre_gelu is None or pre_gelu.shape == inp.shape, (pre_gelu.shape, inp.shape)
    assert C % 8 == 0 and OC % 8 == 0, (C, OC)  # 16-byte accesses
    assert all(x is None or x.dtype == dtype for x in (dout, inp, weight, pre_gelu)), dtype
    defines = module.grad_defines(dtype, (dweight, dbias))
    assert scratch.size >= matmul_scratch_size(1, BT, C, OC), (scratch.size, BT, C, OC)
    if dbias is not None:
        bias_grad(1 if version == 1 else 2, dbias, scratch, dout, BT, OC, accumulate, defines)
    launch("dgrad", version, dtype, BT, C, (dinp, dout, weight, pre_gelu, i32(BT), i32(C), i32(OC)))
    sizes = i32(OC), i32(C), i32(BT)
    if version not in (3, 5):
        launch("wgrad", version, dtype, OC, C, (dweight, dout, inp, *sizes, accumulate), defines=defines)
        return
    splits = wgrad_splits(BT, C, OC)
    args = (dweight, scratch, dout, inp, *sizes, i32(splits), accumulate)
    launch("wgrad", version, dtype, OC, C, args, splits, defines)
    if splits > 1:
        args = (dweight, scratch, i64(OC * C), i32(splits), accumulate)
        module.kernel("matmul.cu", "matmul_wgrad_reduce", dtype, defines)((ceil_div(OC * C, 2048),), (256,), args)


def bias_grad(version, dbias, scratch, dout, BT, OC, accumulate, defines):
    def kernel(name):
        return module.kernel("matmul.cu", name, dout.dtype, defines)

    if version == 1:
        kernel("matmul_bias_grad_kernel1")((ceil_div(OC, 256),), (256,), (dbias, dout, i32(BT), i32(OC), accumulate))
        return
    parts = bias_parts(BT)
    kernel("matmul_bias_grad_kernel2")((ceil_div(OC, 256), parts), (256,), (scratch, dout, i32(BT), i32(OC)))
    args = (dbias, scratch, i32(OC), i32(parts), accumulate)
    kernel("matmul_bias_grad_reduce_kernel2")((ceil_div(OC, 32),), (256,), args)


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


def matmul_backward1(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True):
    backward(1, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate)


def matmul_backward2(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True):
    backward(2, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate)


def matmul_backward3(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True):
    backward(3, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate)


def matmul_backward4(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True):
    backward(4, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate)


def matmul_backward5(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True):
    backward(5, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate)


def matmul_forward(out, inp, weight, bias=None, pre_gelu=None):
    """out = inp @ weight^T + bias;  with pre_gelu: pre_gelu = inp @ weight^T + bias, out = gelu(pre_gelu)

    out (B, T, OC) X written (=);  inp (B, T, C) X;  weight (OC, C) X;  bias (OC,) X or None;
    pre_gelu (B, T, OC) X written, or None.  Sums in fp32, one rounding.
    Requires: C, OC % 8 == 0, all arrays C-contiguous and 16-byte aligned.
    Cost: 2*B*T*C*OC FLOPs.
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/matmul.cuh matmul_forward_cublaslt.
    """
    forward(3 if out.dtype == np.float32 else 5, out, inp, weight, bias, pre_gelu)


def matmul_backward(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True):
    """dinp = dout @ weight, times gelu'(pre_gelu) if given;  dweight (+)= dout^T @ inp;  dbias (+)= column sums of dout

    dinp (B, T, C) X written (=), before dweight;  dweight (OC, C), dbias (OC,) or None, X or f32: += if accumulate,
    else =, in fp32 with one rounding;  scratch f32 flat, matmul_scratch_size(B, T, C, OC), need not be zeroed;
    dout (B, T, OC) X;  inp (B, T, C) X;  weight (OC, C) X;  pre_gelu (B, T, C) X: the values whose GELU was inp.
    dinp may not overlap dout or inp.
    Requires: C, OC % 8 == 0, all arrays C-contiguous and 16-byte aligned.
    Cost: 4*B*T*C*OC FLOPs.
    Errors: AssertionError on shape or dtype mismatch; never copies, casts, allocates or synchronises.
    Source: llm.c llmc/matmul.cuh matmul_backward.
    """
    version = 3 if dinp.dtype == np.float32 else 5
    backward(version, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate)
