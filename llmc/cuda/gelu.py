"""GELU, tanh form: kernels/gelu.cu (llm.c: llmc/gelu.cuh)."""

import numpy as np

from llmc.buffers import Array

from . import module

BLOCK = 256


def gelu_forward(out: Array, inp: Array) -> None:
    """out = 0.5 * inp * (1 + tanh(sqrt(2/pi) * (inp + 0.044715 * inp^3))).

    out, inp  any shape, floatX; out written (=). All arrays C-contiguous.
    Cost: 2*N*itemsize bytes.   Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/gelu.cuh gelu_forward; Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    check(out, inp)
    kernel = module.kernel("gelu.cu", "gelu_forward_kernel", out.dtype)
    kernel((pack_blocks(out),), (BLOCK,), (out, inp, np.int64(out.size)))


def gelu_backward_inplace(d_in_out: Array, inp: Array) -> None:
    """d_in_out *= gelu'(inp), where inp is what gelu_forward was given.

    d_in_out, inp  any shape, floatX; d_in_out: gradient of the output in, gradient of the input out. C-contiguous.
    Cost: 3*N*itemsize bytes.   Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/gelu.cuh gelu_backward_inplace.
    """
    check(d_in_out, inp)
    kernel = module.kernel("gelu.cu", "gelu_backward_inplace_kernel", inp.dtype)
    kernel((pack_blocks(inp),), (BLOCK,), (d_in_out, inp, np.int64(inp.size)))


def check(array: Array, inp: Array) -> None:
    assert array.shape == inp.shape and array.dtype == inp.dtype, (array.shape, inp.shape, array.dtype, inp.dtype)


def pack_blocks(array: Array) -> int:
    """Blocks that it takes to give each thread 16 bytes of the array."""
    return -(-array.size // (BLOCK * 16 // array.itemsize))
