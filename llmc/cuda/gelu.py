"""GELU, tanh form: kernels/gelu.cu (llm.c: llmc/gelu.cuh)."""

import numpy as np

from . import module


def gelu_forward1(out, inp):
    """out = 0.5 * inp * (1 + tanh(sqrt(2/pi) * (inp + 0.044715 * inp^3))).

    out, inp  any shape, floatX; out written (=). All arrays C-contiguous.
    Cost: 2*N*itemsize bytes.   Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/gelu.cuh gelu_forward; Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    assert out.shape == inp.shape and out.dtype == inp.dtype, (out.shape, inp.shape, out.dtype, inp.dtype)
    kernel = module.kernel("gelu.cu", "gelu_forward_kernel1", out.dtype)
    kernel((-(-out.size // 256),), (256,), (out, inp, np.int64(out.size)))


def gelu_forward2(out, inp):
    """gelu_forward1 with 16-byte accesses."""
    assert out.shape == inp.shape and out.dtype == inp.dtype, (out.shape, inp.shape, out.dtype, inp.dtype)
    kernel = module.kernel("gelu.cu", "gelu_forward_kernel2", out.dtype)
    kernel((-(-out.size // (256 * 16 // out.itemsize)),), (256,), (out, inp, np.int64(out.size)))


def gelu_backward_inplace1(d_in_out, inp):
    """d_in_out *= gelu'(inp), where inp is what gelu_forward was given.

    d_in_out, inp  any shape, floatX; d_in_out: gradient of the output in, gradient of the input out. C-contiguous.
    Cost: 3*N*itemsize bytes.   Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/gelu.cuh gelu_backward_inplace.
    """
    assert d_in_out.shape == inp.shape and d_in_out.dtype == inp.dtype, (d_in_out.shape, inp.shape, inp.dtype)
    kernel = module.kernel("gelu.cu", "gelu_backward_inplace_kernel1", inp.dtype)
    kernel((-(-inp.size // 256),), (256,), (d_in_out, inp, np.int64(inp.size)))


def gelu_backward_inplace2(d_in_out, inp):
    """gelu_backward_inplace1 with 16-byte accesses."""
    assert d_in_out.shape == inp.shape and d_in_out.dtype == inp.dtype, (d_in_out.shape, inp.shape, inp.dtype)
    kernel = module.kernel("gelu.cu", "gelu_backward_inplace_kernel2", inp.dtype)
    kernel((-(-inp.size // (256 * 16 // inp.itemsize)),), (256,), (d_in_out, inp, np.int64(inp.size)))


gelu_forward = gelu_forward2  # an eighth of the memory instructions
gelu_backward_inplace = gelu_backward_inplace2
