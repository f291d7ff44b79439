"""layernorm: forward, residual add, both fused, and the backward pass."""

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

# B, T, C. Channels beyond 4096 do not fit llm.c's shared memory in the backward pass.
SHAPES = [(1, 1, 8), (2, 3, 16), (1, 7, 24), (2, 33, 72), (1, 65, 264), (1, 9, 1000), (1, 2, 4096), (1, 2, 5120)]
BIG = [(2, 130, 768), (1, 257, 1600), (8, 257, 320), (9, 257, 1024)]
CPU = [(1, 1, 1), (2, 3, 5), (1, 65, 33), (3, 130, 130)]


def inputs(shape, dtype, scale=1.0, mean=0.3):
    """inp, weight, bias, dout"""
    rng = np.random.default_rng(0)
    C = shape[-1]
    return (ref.normal(rng, shape, dtype, scale, mean), ref.normal(rng, C, dtype, 0.5, 1.0), ref.normal(rng, C, dtype),
            ref.normal(rng, shape, dtype))  # fmt: skip


def statistics(inp):
    """mean and rstd as the forward pass saves them, from float64."""
    mean, rstd = ref.forward(ref.layernorm_statistics, inp)
    return mean.truth.astype(np.float32), rstd.truth.astype(np.float32)


def empty_outputs(shape, dtype):
    return np.empty(shape, dtype), np.empty(shape[:2], np.float32), np.empty(shape[:2], np.float32)


def check_normalised(op, name, out, mean, rstd, inp, weight, bias):
    """out, mean and rstd of LN(inp). `scale` is what an error of one ulp in the mean does to the result."""
    want_mean, want_rstd = ref.forward(ref.layernorm_statistics, inp, dtype=ref.FP32)
    size = ref.largest(inp)
    ref.assert_close(op, "mean", mean, want_mean, scale=size)
    ref.assert_close(op, "rstd", rstd, want_rstd)
    scale = size * ref.largest(want_rstd.truth) * ref.largest(weight) + ref.largest(bias)
    ref.assert_close(op, name, out, ref.forward(ref.layernorm, inp, weight, bias), scale=scale)


def check_forward(op, shape, inp=None):
    drawn, weight, bias, _ = inputs(shape, op.dtype)
    inp = drawn if inp is None else inp
    out, mean, rstd = empty_outputs(shape, op.dtype)
    op(out, mean, rstd, inp, weight, bias)
    check_normalised(op, "out", out, mean, rstd, inp, weight, bias)


def check_backward(op, shape, inp=None, calls=1, grads=None):
    """grads: dtype of dweight and dbias where it is not the model's."""
    drawn, weight, bias, dout = inputs(shape, op.dtype)
    inp = drawn if inp is None else inp
    rng = np.random.default_rng(1)
    dtypes = (op.dtype, grads or op.dtype, grads or op.dtype)
    before = [ref.normal(rng, s, dtype) for s, dtype in zip((shape, shape[-1], shape[-1]), dtypes, strict=True)]
    dinp, dweight, dbias = (a.copy() for a in before)
    mean, rstd = statistics(inp)
    for _ in range(calls):
        op(dinp, dweight, dbias, op.scratch(*shape), dout, inp, weight, mean, rstd)
    want = ref.backward(ref.layernorm, dout, inp, weight, bias)
    want[1:] = ref.backward(ref.layernorm, dout, inp, weight, bias, dtype=grads)[1:]
    # sums of absolute terms: over channels for dinp, over rows for dweight and dbias
    norm = np.abs((inp.astype(np.float64) - mean[..., None]) * rstd[..., None])
    size = np.abs(dout.astype(np.float64))
    scales = (ref.largest(rstd) * ref.largest(dout) * ref.largest(weight) * (1 + ref.largest(norm)),
              np.max(np.sum(size * norm, axis=(0, 1))) + 4, np.max(np.sum(size, axis=(0, 1))) + 4)  # fmt: skip
    names = ("dinp", "dweight", "dbias")
    for name, got, old, grad, scale in zip(names, (dinp, dweight, dbias), before, want, scales, strict=True):
        ref.assert_close(op, name, got, ref.added(old, grad, calls), scale=scale)


@pytest.mark.op("layernorm_forward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_layernorm_forward(op, shape):
    check_forward(op, shape)


@pytest.mark.op("residual_forward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_residual_forward(op, shape):
    rng = np.random.default_rng(0)
    inp1, inp2 = ref.normal(rng, shape, op.dtype), ref.normal(rng, shape, op.dtype)
    out = np.empty(shape, op.dtype)
    op(out, inp1, inp2)
    # one addition, rounded once: PyTorch's bits
    ref.assert_bits(op, "out", out, (inp1.astype(np.float32) + inp2.astype(np.float32)).astype(op.dtype))


@pytest.mark.op("fused_residual_forward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_fused_residual_forward(op, shape):
    """The normalisation starts from the residual as stored, rounded to the model's dtype."""
    inp1, weight, bias, inp2 = inputs(shape, op.dtype)
    residual, (normed, mean, rstd) = np.empty(shape, op.dtype), empty_outputs(shape, op.dtype)
    op(residual, normed, mean, rstd, inp1, inp2, weight, bias)
    ref.assert_bits(op, "residual", residual, (inp1.astype(np.float32) + inp2.astype(np.float32)).astype(op.dtype))
    check_normalised(op, "normed", normed, mean, rstd, residual, weight, bias)


@pytest.mark.op("fused_residual_forward", public=True, shapes=SHAPES, big=BIG, cpu=CPU)
def test_fused_residual_forward_is_layernorm_forward(op, shape):
    """Recomputing the normalisation from the residual gives its bits: recomputation changes nothing."""
    inp1, weight, bias, inp2 = inputs(shape, op.dtype)
    residual, fused, again = np.empty(shape, op.dtype), empty_outputs(shape, op.dtype), empty_outputs(shape, op.dtype)
    op(residual, *fused, inp1, inp2, weight, bias)
    op.sibling("layernorm_forward")(*again, residual, weight, bias)
    for name, got, expected in zip(("normed", "mean", "rstd"), fused, again, strict=True):
        ref.assert_bits(op, name, got, expected)


@pytest.mark.op("layernorm_backward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_layernorm_backward(op, shape):
    check_backward(op, shape)


@pytest.mark.op("layernorm_backward", public=True, shapes=[(1, 8200, 8)])
def test_layernorm_backward_many_rows(op, shape):
    """More rows than there are slices with sums of their own."""
    check_backward(op, shape)


@pytest.mark.op("layernorm_backward")
def test_layernorm_backward_accumulates_over_micro_steps(op):
    check_backward(op, (2, 33, 40), calls=2)


@pytest.mark.op("layernorm_backward", dtypes=("fp16", "bf16"))
def test_layernorm_backward_with_fp32_gradients(op):
    """What three micro-steps add to the weights' gradients is not rounded to the model's dtype."""
    check_backward(op, (2, 33, 40), calls=3, grads=ref.FP32)


@pytest.mark.op("layernorm_forward")
def test_layernorm_forward_constant_rows(op):
    """No variance: rstd = 1/sqrt(eps), and the output is the bias."""
    inp = np.zeros((1, 4, 40), op.dtype)
    inp[0, :, :] = np.array([0.0, 1.0, -2.5, 512.0])[:, None]
    check_forward(op, inp.shape, inp)


@pytest.mark.op("layernorm_backward")
def test_layernorm_backward_constant_rows(op):
    inp = np.zeros((1, 3, 40), op.dtype)
    inp[0, :, :] = np.array([0.0, 1.0, -2.5])[:, None]
    check_backward(op, inp.shape, inp)


@pytest.mark.op("layernorm_forward")
def test_layernorm_forward_large_mean(op):
    """A mean of 1000 standard deviations: E[x^2] - E[x]^2 would leave no correct digit in float32."""
    rng = np.random.default_rng(0)
    inp = np.float32(1000) + rng.integers(-1, 2, (2, 5, 72)).astype(np.float32) * (8 if op.dtype == ref.BF16 else 1)
    check_forward(op, inp.shape, inp.astype(op.dtype))


@pytest.mark.op("layernorm_forward")
def test_layernorm_forward_large_and_small_values(op):
    rng = np.random.default_rng(0)
    for scale in (1e-4, 1e4):
        check_forward(op, (2, 5, 72), ref.normal(rng, (2, 5, 72), op.dtype, scale))


@pytest.mark.op("layernorm_forward", public=True)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40))
def test_layernorm_forward_any_shape(op, B, T, C):
    check_forward(op, (B, T, C * op.multiple))


@pytest.mark.op("layernorm_backward", public=True)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40))
def test_layernorm_backward_any_shape(op, B, T, C):
    check_backward(op, (B, T, C * op.multiple))
