"""Causal attention on packed QKV, its log-sum-exp, and the backward pass, which recomputes probabilities from it."""

import math
import tracemalloc

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

# B, T, NH, HS
SHAPES = [
    (1, 1, 1, 8),
    (1, 3, 2, 16),
    (2, 7, 1, 64),
    (1, 65, 2, 64),
    (2, 33, 3, 80),
    (1, 67, 1, 128),
    (1, 130, 1, 64),
    (3, 5, 12, 16),
    (1, 33, 2, 24),
]
BIG = [(1, 130, 2, 128), (2, 257, 2, 96), (1, 257, 3, 80), (2, 128, 12, 64), (1, 1024, 2, 64)]
CPU = [(1, 1, 1, 1), (2, 5, 3, 5), (1, 130, 2, 10), (3, 65, 4, 3)]


def qkvr_of(shape, dtype, scale=1.0):
    B, T, NH, HS = shape
    return ref.normal(np.random.default_rng(0), (B, T, 3 * NH * HS), dtype, scale)


# several 128-row blocks a head, an even and an odd number, and several rounds of the executor's three multiprocessors;
# tiles of one block that come to a stage of the ring which an earlier tile of it had
HOPPER = [(1, 385, 2, 64), (1, 300, 2, 64), (2, 140, 2, 128), (1, 330, 1, 128)]


def largest_score(qkvr, NH):
    """The largest |q . k| / sqrt(HS): one ulp of it, as an error of a score, is the relative error of a probability."""
    q, k, _ = ref.split_heads(ref.to_torch(qkvr).abs().double(), NH)
    return float((q @ k.transpose(-1, -2)).max()) / math.sqrt(q.shape[-1])


def skip_other_heads(op, HS):
    """Some rungs are for some head sizes alone."""
    if op.rung and op.rung.head_sizes and HS not in op.rung.head_sizes:
        pytest.skip(f"rung {op.rung.number} is for head sizes {op.rung.head_sizes}")


def check_forward(op, shape, qkvr=None):
    B, T, NH, HS = shape
    skip_other_heads(op, HS)
    qkvr = qkvr_of(shape, op.dtype) if qkvr is None else qkvr
    out, att = np.empty((B, T, NH * HS), op.dtype), np.empty((B, NH, T), np.float32)
    op(out, att, qkvr)
    score = largest_score(qkvr, NH)
    want = ref.forward(lambda x: ref.attention(x, NH), qkvr)
    ref.assert_close(op, "out", out, want, scale=ref.largest(qkvr[..., -NH * HS :]) * (1 + score))
    lse = ref.forward(lambda x: ref.attention_lse(x, NH), qkvr, dtype=ref.FP32)
    ref.assert_close(op, "att", att, lse, scale=1 + score)
    return out, att


def check_backward(op, shape, qkvr=None):
    B, T, NH, HS = shape
    skip_other_heads(op, HS)
    qkvr = qkvr_of(shape, op.dtype) if qkvr is None else qkvr
    dout = ref.normal(np.random.default_rng(1), (B, T, NH * HS), op.dtype)
    # what the forward pass saved, from the truth: this test does not depend on our forward
    out = ref.forward(lambda x: ref.attention(x, NH), qkvr).truth.astype(op.dtype)
    att = ref.forward(lambda x: ref.attention_lse(x, NH), qkvr).truth.astype(np.float32)
    dqkvr = np.empty_like(qkvr)
    op(dqkvr, op.scratch(B, T, NH * HS, NH), dout, out, qkvr, att)
    (want,) = ref.backward(lambda x: ref.attention(x, NH), dout, qkvr)
    score = largest_score(qkvr, NH)
    for i, name in enumerate(("dq", "dk", "dv")):  # each against its own size
        part = slice(i * NH * HS, (i + 1) * NH * HS)
        expected = ref.Expected(want.truth[..., part], want.torch[..., part])
        scale = (1 + score) * max(1.0, ref.largest(expected.truth))
        ref.assert_close(op, f"dqkvr ({name})", dqkvr[..., part], expected, scale=scale)


@pytest.mark.op("attention_forward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_attention_forward(op, shape):
    check_forward(op, shape)


@pytest.mark.op("attention_backward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_attention_backward(op, shape):
    check_backward(op, shape)


@pytest.mark.op("attention_forward", rungs=(4,), dtypes=("bf16",), shapes=HOPPER)
def test_attention_forward_of_blocks_that_stay(op, shape):
    check_forward(op, shape)


@pytest.mark.op("attention_backward", rungs=(4,), dtypes=("bf16",), shapes=HOPPER)
def test_attention_backward_of_blocks_that_stay(op, shape):
    check_backward(op, shape)


@pytest.mark.op("attention_backward", rungs=(4,), dtypes=("bf16",), sets=("gpu",), big=[(32, 1024, 12, 64)])
def test_attention_of_a_full_gpu(op, shape):
    """Some races show only when all multiprocessors are busy: once, TMA brought a block's rows while ldmatrix still
    read those of the block before. Ten calls have the same bits (two in each call of an op)."""
    B, T, NH, HS = shape
    qkvr, dout = qkvr_of(shape, op.dtype), ref.normal(np.random.default_rng(1), (B, T, NH * HS), op.dtype)
    out, att, found = np.empty((B, T, NH * HS), op.dtype), np.empty((B, NH, T), np.float32), []
    for _ in range(5):
        dqkvr = np.empty_like(qkvr)
        op.sibling("attention_forward")(out, att, qkvr)
        op(dqkvr, op.scratch(B, T, NH * HS, NH), dout, out, qkvr, att)
        found.append((out.copy(), dqkvr))
        for name, array, first in zip(("out", "dqkvr"), found[-1], found[0], strict=True):
            ref.assert_bits(op, name, array, first)


@pytest.mark.op("attention_forward", shapes=[(1, 67, 2, 64)])
def test_attention_forward_is_causal(op, shape):
    """Other queries, keys and values from position t on leave the rows before t as they are, bit for bit."""
    B, T, NH, HS = shape
    qkvr = qkvr_of(shape, op.dtype)
    first = check_forward(op, shape, qkvr)
    for t in (1, 33, 66):
        changed = qkvr.copy()
        changed[:, t:] = -3 * changed[:, t:]
        out, att = np.empty_like(first[0]), np.empty_like(first[1])
        op(out, att, changed)
        ref.assert_bits(op, f"out before {t}", out[:, :t].copy(), first[0][:, :t].copy())
        ref.assert_bits(op, f"att before {t}", att[..., :t].copy(), first[1][..., :t].copy())


def with_scores(op, shape, score):
    """q and k whose scores are all near `score`, with values of order one: every q is +a, every k is +-a."""
    B, T, NH, HS = shape
    qkvr = qkvr_of(shape, op.dtype, 0.01).reshape(B, T, 3, NH, HS)
    a = math.sqrt(abs(score) / math.sqrt(HS))
    qkvr[:, :, 0] = a
    qkvr[:, :, 1] = math.copysign(a, score)
    qkvr[:, :, 2] = ref.normal(np.random.default_rng(2), (B, T, NH, HS), op.dtype)
    return qkvr.reshape(B, T, 3 * NH * HS)


@pytest.mark.parametrize("score", (-1e4, 1e4))
@pytest.mark.op("attention_forward", shapes=[(1, 65, 1, 64)])
def test_attention_forward_extreme_scores(op, shape, score):
    """Scores of +-10,000, all alike: exp overflows or vanishes unless the maximum is taken off."""
    check_forward(op, shape, with_scores(op, shape, score))


@pytest.mark.parametrize("score", (-300, 300))
@pytest.mark.op("attention_backward", shapes=[(1, 65, 1, 64)])
def test_attention_backward_extreme_scores(op, shape, score):
    check_backward(op, shape, with_scores(op, shape, score))


@pytest.mark.op("attention_forward", shapes=[(1, 65, 2, 16)])
def test_attention_forward_one_key_wins(op, shape):
    """Widely spread scores: probabilities of nearly 0 and 1, maxima that move from tile to tile."""
    check_forward(op, shape, qkvr_of(shape, op.dtype, 8.0))


@pytest.mark.op("attention_backward", shapes=[(1, 65, 2, 16)])
def test_attention_backward_one_key_wins(op, shape):
    check_backward(op, shape, qkvr_of(shape, op.dtype, 4.0))


@pytest.mark.op("attention_forward", public=True, shapes=[(1, 9, 1, 136), (2, 5, 1, 256)])
def test_attention_forward_large_heads(op, shape):
    """Heads that no tile holds."""
    check_forward(op, shape)


@pytest.mark.op("attention_backward", public=True, shapes=[(1, 9, 1, 136), (2, 5, 1, 256)])
def test_attention_backward_large_heads(op, shape):
    check_backward(op, shape)


@pytest.mark.op("attention_forward", public=True)
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.sampled_from((16, 64, 80)))
def test_attention_forward_any_shape(op, B, T, NH, HS):
    check_forward(op, (B, T, NH, HS))


@pytest.mark.op("attention_backward", public=True)
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.sampled_from((16, 64, 80)))
def test_attention_backward_any_shape(op, B, T, NH, HS):
    check_backward(op, (B, T, NH, HS))


@pytest.mark.op("attention_backward", sets=("cpu",))
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 5), st.integers(1, 40))
def test_attention_any_head_size(op, B, T, NH, HS):
    check_backward(op, (B, T, NH, HS))


def allocated(op, *args):
    """Peak bytes that a call allocates, beyond what a tiny call has set up before (the threads and their scratch)."""
    tracemalloc.start()
    op.run(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.op("attention_forward", sets=("cpu",))
def test_attention_forward_never_stores_T_by_T(op):
    """At T = 2048 one head's T x T scores would be 16 MiB; an eighth of that bounds all that is allocated."""
    B, T, NH, HS = 1, 2048, 2, 16
    check_forward(op, (1, 1, 1, 1))
    out, att = np.empty((B, T, NH * HS), np.float32), np.empty((B, NH, T), np.float32)
    peak = allocated(op, out, att, qkvr_of((B, T, NH, HS), op.dtype))
    assert peak < T * T * 4 / 8, f"{op} allocates {peak} bytes at T={T}"


@pytest.mark.op("attention_backward", sets=("cpu",))
def test_attention_backward_never_stores_T_by_T(op):
    B, T, NH, HS = 1, 2048, 2, 16
    check_backward(op, (1, 1, 1, 1))
    out, att = np.ones((B, T, NH * HS), np.float32), np.full((B, NH, T), 8, np.float32)
    qkvr, scratch = qkvr_of((B, T, NH, HS), op.dtype), op.scratch(B, T, NH * HS, NH)
    assert scratch.nbytes < T * T * 4 / 8, f"{op} wants {scratch.nbytes} bytes of scratch at T={T}"
    peak = allocated(op, np.empty_like(qkvr), scratch, out, out, qkvr, att)
    assert peak < T * T * 4 / 8, f"{op} allocates {peak} bytes at T={T}"
