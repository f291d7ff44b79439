"""gelu (tanh form) and its in-place backward pass."""

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

SHAPES = [(1, 1, 1), (1, 3, 5), (1, 1, 8), (2, 3, 24), (1, 7, 72), (3, 65, 40)]
BIG = [(2, 257, 3072)]
CPU = [(1, 130, 33)]


def check_forward(op, inp):
    out = np.empty_like(inp)
    op(out, inp)
    ref.assert_close(op, "out", out, ref.forward(ref.gelu, inp))


def check_backward(op, inp):
    dout = ref.normal(np.random.default_rng(1), inp.shape, op.dtype)
    d_in_out = dout.copy()
    op(d_in_out, inp)
    (want,) = ref.backward(ref.gelu, dout, inp)
    ref.assert_close(op, "d_in_out", d_in_out, want)


def draw(op, shape, scale=2.0):
    return ref.normal(np.random.default_rng(0), shape, op.dtype, scale)


def extremes(op):
    """Both tails, signed zeros, the minimum near -0.75 and numbers that overflow a float32 cube."""
    values = [0.0, -0.0, 1e-3, -1e-3, 0.75, -0.75, 3.0, -3.0, 5.0, -5.0, 9.0, -9.0, 100.0, -100.0, 1e4, -1e4]
    values += [6e4, -6e4] if op.dtype == ref.FP16 else [1e12, -1e12]
    return np.array(values * 4, np.float32).astype(op.dtype).reshape(1, 9, 8)


@pytest.mark.op("gelu_forward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_gelu_forward(op, shape):
    check_forward(op, draw(op, shape))


@pytest.mark.op("gelu_backward_inplace", shapes=SHAPES, big=BIG, cpu=CPU)
def test_gelu_backward_inplace(op, shape):
    check_backward(op, draw(op, shape))


@pytest.mark.op("gelu_forward")
def test_gelu_forward_extremes(op):
    """Element by element, since one tolerance for all would be that of the largest."""
    inp = extremes(op)
    out = np.empty_like(inp)
    op(out, inp)
    for i in np.ndindex(inp.shape):
        want = ref.forward(ref.gelu, inp[i].reshape(1))
        ref.assert_close(f"{op} of {inp[i]}", "out", out[i].reshape(1), want, scale=min(abs(float(inp[i])), 10.0))


@pytest.mark.op("gelu_backward_inplace")
def test_gelu_backward_inplace_extremes(op):
    """In the tails the gradient is 0 or dout, exactly."""
    inp = extremes(op)
    dout = ref.normal(np.random.default_rng(1), inp.shape, op.dtype)
    d_in_out = dout.copy()
    op(d_in_out, inp)
    (want,) = ref.backward(ref.gelu, dout, inp)
    ref.assert_close(op, "d_in_out", d_in_out, want, scale=10 * np.max(np.abs(dout)))
    x = inp.astype(np.float64)
    assert (d_in_out[x < -20] == 0).all(), f"{op}: gradient {d_in_out[x < -20]} at {x[x < -20]}"
    ref.assert_bits(op, "d_in_out where inp > 20", d_in_out[x > 20], dout[x > 20])


@pytest.mark.op("gelu_forward")
def test_gelu_forward_small_values(op):
    """gelu(x) is x/2 near zero: relative accuracy must not be lost there."""
    check_forward(op, draw(op, (2, 5, 24), 1e-3))


@pytest.mark.op("gelu_forward", public=True)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 40))
def test_gelu_forward_any_shape(op, B, T, C):
    check_forward(op, draw(op, (B, T, C * op.multiple)))


@pytest.mark.op("gelu_backward_inplace", public=True)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 40))
def test_gelu_backward_inplace_any_shape(op, B, T, C):
    check_backward(op, draw(op, (B, T, C * op.multiple)))
