"""fused_classifier: the loss of every position, and the gradient of the logits in place."""

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

# B, T, V, Vp. V that are no multiple of the vector width, and small ones, both of which llm.c gets wrong.
SHAPES = [
    (1, 1, 5, 8),
    (2, 3, 65, 128),
    (1, 7, 257, 384),
    (1, 5, 256, 256),
    (2, 33, 1003, 1024),
    (1, 2, 5000, 5120),
    (2, 3, 65, 67),
]
BIG = [(2, 65, 50257, 50304), (1, 130, 257, 384)]
CPU = [(1, 1, 1, 1), (2, 3, 5, 5), (1, 130, 67, 71)]
DLOSS = 1 / 12


def inputs(shape, dtype, scale=3.0):
    """Logits with NaN in the padded columns, losses of earlier micro-steps, targets at both ends of the vocabulary."""
    B, T, V, Vp = shape
    rng = np.random.default_rng(0)
    logits = ref.normal(rng, (B, T, Vp), dtype, scale)
    logits[..., V:] = np.nan
    targets = rng.integers(0, V, (B, T), dtype=np.int32)
    targets[0, 0], targets[-1, -1] = 0, V - 1
    return logits, ref.normal(rng, (B, T)), targets


def check(op, shape, logits=None, write_dlogits=True, dloss=DLOSS):
    B, T, V, Vp = shape
    drawn, losses, targets = inputs(shape, op.dtype)
    logits = drawn if logits is None else logits
    got, got_losses = logits.copy(), losses.copy()
    op(got, got_losses, dloss, targets, V, write_dlogits)
    real = np.ascontiguousarray(logits[..., :V])

    def loss(x):
        return ref.cross_entropy(x, ref.to_torch(targets))

    # losses are float32 in every dtype: compared with PyTorch in float32
    want = ref.added(losses, ref.forward(loss, real, dtype=ref.FP32))
    ref.assert_close(op, "losses", got_losses, want, scale=ref.largest(real) + 1)
    if write_dlogits:
        (grad,) = ref.backward(loss, np.full((B, T), dloss), real)
        # an error of one ulp in the largest logit is a relative error of the probabilities
        scale = dloss * (1 + ref.largest(real))
        ref.assert_close(op, "dlogits", np.ascontiguousarray(got[..., :V]), grad, scale=scale)
        ref.assert_bits(op, "padded columns", got[..., V:].copy(), logits[..., V:].copy())
    else:
        ref.assert_bits(op, "logits without write_dlogits", got, logits)
    return got, got_losses


@pytest.mark.op("fused_classifier", shapes=SHAPES, big=BIG, cpu=CPU)
def test_fused_classifier(op, shape):
    check(op, shape)


@pytest.mark.op("fused_classifier", public=True, shapes=[(1, 1, 56001, 56064)])
def test_fused_classifier_large_vocabulary(op, shape):
    """More columns than a block of threads can keep in registers."""
    check(op, shape)


@pytest.mark.op("fused_classifier", shapes=[(1, 1, 5, 8), (1, 7, 257, 384)], big=BIG)
def test_fused_classifier_without_gradient(op, shape):
    """Validation: the logits keep their bits, and the losses are those of training, bit for bit."""
    without = check(op, shape, write_dlogits=False)[1]
    ref.assert_bits(op, "losses without write_dlogits", without, check(op, shape)[1])


@pytest.mark.op("fused_classifier", shapes=[(2, 3, 65, 128)])
def test_fused_classifier_small_gradients(op, shape):
    """dloss as in a large batch, 1/2^19, or what loss scaling makes of it in fp16: relative accuracy holds."""
    check(op, shape, dloss=2.0**-19 if op.dtype != ref.FP16 else 2.0**-9)


@pytest.mark.op("fused_classifier", shapes=[(1, 5, 65, 128), (1, 3, 1003, 1024)])
def test_fused_classifier_extreme_logits(op, shape):
    """Logits of +-10,000: the largest takes all, in the target's column or elsewhere; the loss is 0 or a difference."""
    B, T, V, Vp = shape
    logits, _, targets = inputs(shape, op.dtype)
    logits[..., :V] = -1e4
    for t in range(T):
        logits[0, t, targets[0, t] if t % 2 else (targets[0, t] + 1) % V] = 1e4
    check(op, shape, logits)
    logits[..., :V] = -1e4  # all alike: the uniform distribution
    check(op, shape, logits)


@pytest.mark.op("fused_classifier", shapes=[(2, 7, 257, 384)])
def test_fused_classifier_gradient_sums_to_zero(op, shape):
    """The gradient of a row sums to nothing, within the rounding of its largest entry, the target's."""
    V = shape[2]
    logits, losses, targets = inputs(shape, op.dtype)
    op(logits, losses, 1.0, targets, V)
    rows = logits[..., :V].astype(np.float64)
    assert np.max(np.abs(rows.sum(-1))) < 4 * ref.EPS[op.dtype], f"{op}: rows sum to {rows.sum(-1)}"
    assert (np.argmin(rows, axis=-1) == targets).all(), f"{op}: the negative entry is not the target's"


@pytest.mark.op("fused_classifier", public=True)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 600), st.booleans())
def test_fused_classifier_any_shape(op, B, T, V, write_dlogits):
    Vp = V + V % 5 if op.kind == "cpu" else -(-V // 128) * 128
    check(op, (B, T, V, Vp), write_dlogits=write_dlogits)
