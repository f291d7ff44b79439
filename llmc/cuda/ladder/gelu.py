"""The rungs of GELU and its gradient."""

import numpy as np

from llmc.buffers import Array

from .. import module
from ..gelu import check, gelu_backward_inplace, gelu_forward
from .rung import Rung


def forward_naive(out: Array, inp: Array) -> None:
    """Rung 1 of gelu_forward: one thread per element."""
    check(out, inp)
    kernel = module.kernel("ladder/gelu_01_naive.cu", "gelu_forward_naive", out.dtype)
    kernel((-(-out.size // 256),), (256,), (out, inp, np.int64(out.size)))


def backward_naive(d_in_out: Array, inp: Array) -> None:
    """Rung 1 of gelu_backward_inplace: one thread per element."""
    check(d_in_out, inp)
    kernel = module.kernel("ladder/gelu_01_naive.cu", "gelu_backward_inplace_naive", inp.dtype)
    kernel((-(-inp.size // 256),), (256,), (d_in_out, inp, np.int64(inp.size)))


RUNGS = (
    Rung("gelu_forward", 1, forward_naive),
    Rung("gelu_forward", 2, gelu_forward, production=True),
    Rung("gelu_backward_inplace", 1, backward_naive),
    Rung("gelu_backward_inplace", 2, gelu_backward_inplace, production=True),
)
