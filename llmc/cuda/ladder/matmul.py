"""The rungs of the linear layers.

All but the naive rung have the bias gradient of kernels/matmul.cu; all recompute GELU by gelu_forward.
"""

from collections.abc import Callable

import numpy as np
from numpy import int32 as i32

from llmc.buffers import Array

from .. import gelu, matmul, module
from ..matmul import ceil_div, check_backward, check_forward
from .rung import SIXTEEN_BIT, Rung

# ----------------------------------------------------------------------------------------------------------------------
# rungs 1, 2 and 4: a block for each tile of the output


def forward_naive(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """Rung 1 of matmul_forward: a thread for each output."""
    _forward(_launch_naive, out, inp, weight, bias, pre_gelu)


def forward_shared_tiles(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """Rung 2 of matmul_forward: tiles in shared memory."""
    _forward(_launch_shared_tiles, out, inp, weight, bias, pre_gelu)


def forward_one_stage(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """Rung 4 of matmul_forward: tensor cores, a tile at a time."""
    _forward(_launch_one_stage, out, inp, weight, bias, pre_gelu)


def backward_naive(
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
    """Rung 1 of matmul_backward: a thread for each output, and for each column of the bias gradient."""
    _backward(_launch_naive, dinp, dweight, None, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)
    if dbias is not None:
        defines, (OC,) = module.grad_defines(dinp.dtype, (dweight, dbias)), dbias.shape
        kernel = module.kernel("ladder/matmul_01_naive.cu", "matmul_bias_grad_naive", dinp.dtype, defines)
        kernel((ceil_div(OC, 256),), (256,), (dbias, dout, i32(dout.size // OC), i32(OC), i32(accumulate)))


def backward_shared_tiles(
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
    """Rung 2 of matmul_backward: tiles in shared memory."""
    launch = _launch_shared_tiles
    _backward(launch, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def backward_one_stage(
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
    """Rung 4 of matmul_backward: tensor cores, a tile at a time."""
    launch = _launch_one_stage
    _backward(launch, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def _forward(
    launch: Callable, out: Array, inp: Array, weight: Array, bias: Array | None, pre_gelu: Array | None
) -> None:
    BT, C, OC = check_forward(out, inp, weight, bias, pre_gelu)
    launch("forward", out.dtype, BT, OC, (out, pre_gelu, inp, weight, bias, i32(BT), i32(OC), i32(C)))


def _backward(
    launch: Callable, dinp: Array, dweight: Array, dbias: Array | None, scratch: Array, dout: Array, inp: Array,
    weight: Array, pre_gelu: Array | None, accumulate: bool, recompute: bool,
) -> None:  # fmt: skip
    """matmul_backward by launch(name, dtype, M, N, args, defines), which makes a product with (M, N) outputs."""
    BT, C, OC = check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, recompute)
    if recompute:
        gelu.gelu_forward(inp, pre_gelu)
    matmul.bias_grad(dbias, scratch, dout, accumulate)
    launch("dgrad", dinp.dtype, BT, C, (dinp, dout, weight, pre_gelu, i32(BT), i32(C), i32(OC)))
    args = (dweight, dout, inp, i32(OC), i32(C), i32(BT), i32(accumulate))
    launch("wgrad", dinp.dtype, OC, C, args, module.grad_defines(dinp.dtype, (dweight,)))


def _launch_naive(name: str, dtype: np.dtype, M: int, N: int, args: tuple, defines: tuple[str, ...] = ()) -> None:
    kernel = module.kernel("ladder/matmul_01_naive.cu", f"matmul_{name}_naive", dtype, defines)
    kernel((ceil_div(M * N, 256),), (256,), args)


def _launch_shared_tiles(
    name: str, dtype: np.dtype, M: int, N: int, args: tuple, defines: tuple[str, ...] = ()
) -> None:
    kernel = module.kernel("ladder/matmul_02_shared_tiles.cu", f"matmul_{name}_shared_tiles", dtype, defines)
    kernel((ceil_div(N, 16), ceil_div(M, 16)), (256,), args)


def _launch_one_stage(name: str, dtype: np.dtype, M: int, N: int, args: tuple, defines: tuple[str, ...] = ()) -> None:
    assert dtype != np.float32, (name, dtype)
    smem = 36864
    defines = (f"SHARED_BYTES={smem}", *defines)
    kernel = module.kernel("ladder/matmul_04_mma.cu", f"matmul_{name}_one_stage", dtype, defines, smem)
    kernel((ceil_div(N, 128), ceil_div(M, 128)), (128,), args, shared_mem=smem)


# ----------------------------------------------------------------------------------------------------------------------
# rungs 6 and 7: blocks that stay, for compute capability 9.0

WGMMA, TURNS = "06_wgmma", "07_turns"
SHARED_BYTES = {WGMMA: 4 * 40960 + 32768 + 64 + 1024, TURNS: 4 * 40960 + 32768 + 80 + 1024}


def forward_wgmma(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """Rung 6 of matmul_forward: Hopper's own units, two warpgroups share a tile."""
    forward_hopper(WGMMA, out, inp, weight, bias, pre_gelu)


def forward_turns(
    out: Array, inp: Array, weight: Array, bias: Array | None = None, pre_gelu: Array | None = None
) -> None:
    """Rung 7 of matmul_forward: two warpgroups take turns at tiles."""
    forward_hopper(TURNS, out, inp, weight, bias, pre_gelu)


def backward_wgmma(
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
    """Rung 6 of matmul_backward: Hopper's own units, two warpgroups share a tile."""
    _backward_hopper(WGMMA, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def backward_turns(
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
    """Rung 7 of matmul_backward: two warpgroups take turns at tiles."""
    _backward_hopper(TURNS, dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, accumulate, recompute)


def forward_hopper(
    rung: str, out: Array, inp: Array, weight: Array, bias: Array | None, pre_gelu: Array | None
) -> None:
    BT, C, OC = check_forward(out, inp, weight, bias, pre_gelu)
    maps = module.tensor_map(inp, BT, C, 128), module.tensor_map(weight, OC, C, 192)
    args = (out, pre_gelu, *maps, bias, i32(BT), i32(OC), i32(C))
    _launch_hopper("forward", rung, out.dtype, tiles(BT, OC), args)


def _backward_hopper(
    rung: str, dinp: Array, dweight: Array, dbias: Array | None, scratch: Array, dout: Array, inp: Array,
    weight: Array, pre_gelu: Array | None, accumulate: bool, recompute: bool,
) -> None:  # fmt: skip
    check_backward(dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu, recompute)
    if recompute:
        gelu.gelu_forward(inp, pre_gelu)
    matmul.bias_grad(dbias, scratch, dout, accumulate)
    dgrad_hopper(rung, dinp, dout, weight, pre_gelu)
    wgrad_hopper(rung, dweight, scratch, dout, inp, accumulate)


def dgrad_hopper(rung: str, dinp: Array, dout: Array, weight: Array, pre_gelu: Array | None = None) -> None:
    """dinp = dout @ weight, times gelu'(pre_gelu) if given."""
    (OC, C), BT = weight.shape, dinp.size // weight.shape[1]
    maps = module.tensor_map(dout, BT, OC, 128), module.tensor_map(weight, OC, C, 64)
    args = (dinp, *maps, pre_gelu, i32(BT), i32(C), i32(OC))
    _launch_hopper("dgrad", rung, dinp.dtype, tiles(BT, C), args)


def wgrad_hopper(rung: str, dweight: Array, scratch: Array, dout: Array, inp: Array, accumulate: bool) -> None:
    """dweight (+)= dout^T @ inp."""
    (OC, C), BT = dweight.shape, inp.size // dweight.shape[1]
    splits, defines = ranges(BT, C, OC, scratch.size), module.grad_defines(inp.dtype, (dweight,))
    assert splits == 1 or scratch.size >= splits * tiles(OC, C) * 128 * 192, (splits, scratch.size)
    maps = module.tensor_map(dout, BT, OC, 64), module.tensor_map(inp, BT, C, 64)
    args: tuple = (dweight, scratch, *maps, i32(OC), i32(C), i32(BT), i32(splits), i32(accumulate))
    _launch_hopper("wgrad", rung, inp.dtype, tiles(OC, C) * splits, args, defines)
    if splits > 1:
        kernel = _kernel_hopper("wgrad_reduce", rung, inp.dtype, defines)
        args = (dweight, scratch, i32(OC), i32(C), i32(splits), i32(accumulate))
        kernel((128 * 192 // 2048, tiles(OC, C)), (256,), args)


def tiles(M: int, N: int) -> int:
    return ceil_div(M, 128) * ceil_div(N, 192)


def ranges(BT: int, C: int, OC: int, room: int) -> int:
    """Ranges of tokens in which all tiles of a weight gradient are made: the number that leaves 132 multiprocessors
    idle least, as far as `room` floats are enough for the sums."""
    count, most = tiles(OC, C), max(1, min(16, BT // 128, room // (tiles(OC, C) * 128 * 192)))

    def tokens(splits: int) -> float:
        """What each multiprocessor has to do; the sums of 132 tiles take as long as 1350 tokens."""
        return BT * ceil_div(count * splits, 132) / splits + (1350 * splits * count / 132 if splits > 1 else 0)

    return min(range(1, most + 1), key=tokens)


def _kernel_hopper(name: str, rung: str, dtype: np.dtype, defines: tuple[str, ...]) -> Callable:
    defines = (f"SHARED_BYTES={SHARED_BYTES[rung]}", *defines)
    full_name, smem = (name, 0) if name == "wgrad_reduce" else (name + rung[2:], SHARED_BYTES[rung])
    return module.kernel(f"ladder/matmul_{rung}.cu", f"matmul_{full_name}", dtype, defines, smem, "sm_90a")


def _launch_hopper(
    name: str, rung: str, dtype: np.dtype, items: int, args: tuple, defines: tuple[str, ...] = ()
) -> None:
    """Each block takes every so many'th of the items, which are tiles or ranges of tiles."""
    kernel = _kernel_hopper(name, rung, dtype, defines)
    kernel((min(items, module.multiprocessors()),), (384,), args, shared_mem=SHARED_BYTES[rung])


RUNGS = (
    Rung("matmul_forward", 1, forward_naive),
    Rung("matmul_forward", 2, forward_shared_tiles),
    Rung("matmul_forward", 3, matmul.forward_ffma, production=True),
    Rung("matmul_forward", 4, forward_one_stage, SIXTEEN_BIT),
    Rung("matmul_forward", 5, matmul.forward_mma, SIXTEEN_BIT, production=True),
    Rung("matmul_forward", 6, forward_wgmma, SIXTEEN_BIT, arch=90),
    Rung("matmul_forward", 7, forward_turns, SIXTEEN_BIT, arch=90),
    Rung("matmul_forward", 11, matmul.forward_sm90, SIXTEEN_BIT, arch=90, production=True),
    Rung("matmul_backward", 1, backward_naive),
    Rung("matmul_backward", 2, backward_shared_tiles),
    Rung("matmul_backward", 3, matmul.backward_ffma, production=True),
    Rung("matmul_backward", 4, backward_one_stage, SIXTEEN_BIT),
    Rung("matmul_backward", 5, matmul.backward_mma, SIXTEEN_BIT, production=True),
    Rung("matmul_backward", 6, backward_wgmma, SIXTEEN_BIT, arch=90),
    Rung("matmul_backward", 7, backward_turns, SIXTEEN_BIT, arch=90),
    Rung("matmul_backward", 11, matmul.backward_sm90, SIXTEEN_BIT, arch=90, production=True),
)
