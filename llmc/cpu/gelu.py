"""GELU, tanh form (llm.c: llmc/gelu.cuh; Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

import math

import numpy as np

from llmc.buffers import Array

from . import device

SCALE = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715 * SCALE
BLOCK = 1 << 15


def gelu_block(out: Array, x: Array) -> None:
    """out = gelu(x) for one block of any shape. matmul's epilogue calls it, too, while the block is in cache."""
    np.multiply(x, x, out=out)
    out *= CUBIC
    out += SCALE
    out *= x  # u = sqrt(2/pi) * (x + 0.044715 x^3)
    np.tanh(out, out=out)
    out += 1.0
    out *= x
    out *= 0.5


def gelu_backward_block(d: Array, x: Array) -> None:
    """d *= gelu'(x) for one block."""
    slope, t, sech2 = device.scratch(3, *x.shape)
    np.multiply(x, x, out=slope)
    np.multiply(slope, CUBIC, out=t)
    t += SCALE
    t *= x
    np.tanh(t, out=t)
    slope *= 3.0 * CUBIC
    slope += SCALE  # du/dx
    slope *= x
    np.multiply(t, t, out=sech2)
    np.subtract(1.0, sech2, out=sech2)  # 1 - tanh^2
    slope *= sech2
    slope += t
    slope += 1.0
    slope *= 0.5
    d *= slope


def gelu_forward(out: Array, inp: Array) -> None:
    """out = 0.5 * inp * (1 + tanh(sqrt(2/pi) * (inp + 0.044715 * inp^3)))

    out, inp: f32, one shape;  out written (=).  Source: llm.c llmc/gelu.cuh gelu_forward.
    """
    assert out.shape == inp.shape, (out.shape, inp.shape)
    o, x = out.reshape(-1), inp.reshape(-1)
    pieces = device.split(x.size, BLOCK)
    device.parallel(lambda i: gelu_block(o[slice(*pieces[i])], x[slice(*pieces[i])]), len(pieces))


def gelu_backward_inplace(d_in_out: Array, inp: Array) -> None:
    """d_in_out = d_in_out * gelu'(inp);  u = sqrt(2/pi) * (x + 0.044715 x^3)
    gelu'(x) = 0.5 * (1 + tanh u) + 0.5 * x * sech^2(u) * sqrt(2/pi) * (1 + 3 * 0.044715 * x^2)

    d_in_out, inp: f32, one shape;  d_in_out holds dL/dout and becomes dL/dinp.
    Source: llm.c llmc/gelu.cuh gelu_backward_inplace.
    """
    assert d_in_out.shape == inp.shape, (d_in_out.shape, inp.shape)
    d, x = d_in_out.reshape(-1), inp.reshape(-1)
    pieces = device.split(x.size, BLOCK)
    device.parallel(lambda i: gelu_backward_block(d[slice(*pieces[i])], x[slice(*pieces[i])]), len(pieces))
