"""The rungs of LayerNorm, of the residual add, and of the two fused."""

import numpy as np
from numpy import int32 as i32

from llmc.buffers import Array

from .. import layernorm, module
from ..layernorm import check_backward, check_forward, check_fused, check_residual, row_block, slices_of
from .rung import Rung

FORWARD_PACKS = 4  # rung 3: 16-byte packs of a row that a thread holds
NAIVE, SLICES = "ladder/layernorm_01_naive.cu", "ladder/layernorm_02_slices.cu"
WARP_PER_ROW, REGISTERS = "ladder/layernorm_02_warp_per_row.cu", "ladder/layernorm_03_registers.cu"


def forward_naive(out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array) -> None:
    """Rung 1 of layernorm_forward: one thread per row."""
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    kernel = module.kernel(NAIVE, "layernorm_forward_naive", out.dtype)
    kernel((-(-N // 64),), (64,), (out, mean, rstd, inp, weight, bias, i32(N), i32(C)))


def forward_warp_per_row(out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array) -> None:
    """Rung 2 of layernorm_forward: one warp per row."""
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    kernel = module.kernel(WARP_PER_ROW, "layernorm_forward_warp_per_row", out.dtype)
    kernel((-(-N // 8),), (32, 8), (out, mean, rstd, inp, weight, bias, i32(N), i32(C)))


def forward_registers(out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array) -> None:
    """Rung 3 of layernorm_forward: the row is read once and stays in registers. C <= 32768 (fp32: 16384)."""
    N, C = check_forward(out, mean, rstd, inp, weight, bias)
    threads, rows = row_block(C * out.itemsize // 16, FORWARD_PACKS)
    assert threads <= 1024, C
    kernel = module.kernel(REGISTERS, "layernorm_forward_registers", out.dtype, (f"FORWARD_PACKS={FORWARD_PACKS}",))
    kernel((-(-N // rows),), (threads, rows), (out, mean, rstd, inp, weight, bias, i32(N), i32(C)))


def residual_naive(out: Array, inp1: Array, inp2: Array) -> None:
    """Rung 1 of residual_forward: one thread per element."""
    check_residual(out, inp1, inp2)
    kernel = module.kernel(NAIVE, "residual_forward_naive", out.dtype)
    kernel((-(-out.size // 256),), (256,), (out, inp1, inp2, np.int64(out.size)))


def fused_two_launches(
    residual: Array, normed: Array, mean: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, bias: Array
) -> None:
    """Rung 1 of fused_residual_forward: the residual add, then LayerNorm."""
    layernorm.residual_forward(residual, inp1, inp2)
    forward_registers(normed, mean, rstd, residual, weight, bias)


def fused_warp_per_row(
    residual: Array, normed: Array, mean: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, bias: Array
) -> None:
    """Rung 2 of fused_residual_forward: one warp per row, which reads the residual back."""
    N, C = check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    kernel = module.kernel(WARP_PER_ROW, "fused_residual_forward_warp_per_row", residual.dtype)
    kernel((-(-N // 8),), (32, 8), (residual, normed, mean, rstd, inp1, inp2, weight, bias, i32(N), i32(C)))


def fused_registers(
    residual: Array, normed: Array, mean: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, bias: Array
) -> None:
    """Rung 3 of fused_residual_forward: one pass, the row in registers. C <= 32768 (fp32: 16384)."""
    N, C = check_fused(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    threads, rows = row_block(C * residual.itemsize // 16, FORWARD_PACKS)
    assert threads <= 1024, C
    defines = (f"FORWARD_PACKS={FORWARD_PACKS}",)
    kernel = module.kernel(REGISTERS, "fused_residual_forward_registers", residual.dtype, defines)
    args = (residual, normed, mean, rstd, inp1, inp2, weight, bias, i32(N), i32(C))
    kernel((-(-N // rows),), (threads, rows), args)


def backward_naive(
    dinp: Array, dweight: Array, dbias: Array, scratch: Array, dout: Array, inp: Array, weight: Array, mean: Array,
    rstd: Array,
) -> None:  # fmt: skip
    """Rung 1 of layernorm_backward: one warp per row for dinp, one thread per channel for dweight and dbias."""
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    kernel = module.kernel(NAIVE, "layernorm_backward_dinp_naive", inp.dtype)
    kernel((-(-N // 8),), (32, 8), (dinp, dout, inp, weight, mean, rstd, i32(N), i32(C)))
    defines = module.grad_defines(inp.dtype, (dweight, dbias))
    kernel = module.kernel(NAIVE, "layernorm_backward_dweight_naive", inp.dtype, defines)
    kernel((-(-C // 64),), (64,), (dweight, dbias, dout, inp, mean, rstd, i32(N), i32(C)))


def backward_slices(
    dinp: Array, dweight: Array, dbias: Array, scratch: Array, dout: Array, inp: Array, weight: Array, mean: Array,
    rstd: Array,
) -> None:  # fmt: skip
    """Rung 2 of layernorm_backward: dweight and dbias are summed by many blocks, a slice of rows each."""
    N, C = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd)
    slices, slice_rows = slices_of(N, 16)
    kernel = module.kernel(SLICES, "layernorm_backward_dinp_slices", inp.dtype)
    kernel((-(-N // 8),), (32, 8), (dinp, dout, inp, weight, mean, rstd, i32(N), i32(C)))
    kernel = module.kernel(SLICES, "layernorm_backward_dweight_slices", inp.dtype)
    kernel((-(-C // 128), slices), (128,), (scratch, dout, inp, mean, rstd, i32(slice_rows), i32(N), i32(C)))
    defines = module.grad_defines(inp.dtype, (dweight, dbias))
    kernel = module.kernel(SLICES, "layernorm_backward_combine", inp.dtype, defines)
    kernel((-(-2 * C // 32),), (32, 32), (dweight, dbias, scratch, i32(slices), i32(C)))


RUNGS = (
    Rung("layernorm_forward", 1, forward_naive),
    Rung("layernorm_forward", 2, forward_warp_per_row),
    Rung("layernorm_forward", 3, forward_registers),
    Rung("layernorm_forward", 4, layernorm.layernorm_forward_wide, production=True),
    Rung("layernorm_forward", 5, layernorm.layernorm_forward, production=True),
    Rung("residual_forward", 1, residual_naive),
    Rung("residual_forward", 2, layernorm.residual_forward, production=True),
    Rung("fused_residual_forward", 1, fused_two_launches),
    Rung("fused_residual_forward", 2, fused_warp_per_row),
    Rung("fused_residual_forward", 3, fused_registers),
    Rung("fused_residual_forward", 4, layernorm.fused_residual_forward_wide, production=True),
    Rung("fused_residual_forward", 5, layernorm.fused_residual_forward, production=True),
    Rung("layernorm_backward", 1, backward_naive),
    Rung("layernorm_backward", 2, backward_slices),
    Rung("layernorm_backward", 3, layernorm.layernorm_backward_wide, production=True),
    Rung("layernorm_backward", 6, layernorm.layernorm_backward, production=True),
)
