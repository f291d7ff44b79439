"""matmul: out = inp @ weight^T + bias with an optional GELU, and its three gradients."""

import itertools

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

from llmc.cuda import matmul as cuda_matmul
from llmc.cuda.ladder import matmul as ladder_matmul

# B, T, C, OC. 8456 output channels: past the point where llm.c overwrites bias gradients instead of accumulating them.
SHAPES = [(1, 1, 8, 8), (2, 3, 16, 24), (1, 7, 40, 72), (3, 65, 24, 136), (1, 130, 72, 264)]
# 17 tiles of 128 rows: more than a band. 4 tiles on 3 multiprocessors, more of k than a ring holds: turns
ROWS = [(1, 2100, 8, 136), (1, 390, 520, 8)]
# Input or weight gradient of 13 tiles: on 3 multiprocessors each half of a block has several that read what they change
TILES = [(1, 1600, 24, 16), (1, 33, 24, 1600)]
TOKENS = [(3, 257, 16, 24)]  # the weight gradient is summed in three ranges
BIG = [(1, 3, 8, 8456), (1, 257, 768, 2304), (3, 257, 96, 384), (2, 130, 3072, 768)]
FLAGS = list(itertools.product((False, True), repeat=3))  # with_bias, with_gelu, accumulate
CPU = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 130, 33, 65), (1, 2, 1025, 513)]


def inputs(shape, dtype):
    """inp, weight, bias, dout; weights as a network has them, so that results are of order one."""
    B, T, C, OC = shape
    rng = np.random.default_rng(0)
    return (ref.normal(rng, (B, T, C), dtype), ref.normal(rng, (OC, C), dtype, C**-0.5), ref.normal(rng, OC, dtype),
            ref.normal(rng, (B, T, OC), dtype))  # fmt: skip


def absolute(array):
    return np.abs(array.astype(np.float64))


def check_forward(op, shape, with_bias, with_gelu):
    B, T, C, OC = shape
    inp, weight, bias, _ = inputs(shape, op.dtype)
    bias = bias if with_bias else np.zeros_like(bias)
    out, pre_gelu = (np.empty((B, T, OC), op.dtype) for _ in range(2))
    op(out, inp, weight, bias if with_bias else None, pre_gelu if with_gelu else None)
    scale = np.max(absolute(inp) @ absolute(weight).T) + np.max(absolute(bias))
    ref.assert_close(op, "pre_gelu" if with_gelu else "out", pre_gelu if with_gelu else out,
                     ref.forward(ref.linear, inp, weight, bias), scale=scale)  # fmt: skip
    if with_gelu:
        want = ref.forward(lambda *x: ref.gelu(ref.linear(*x)), inp, weight, bias)
        ref.assert_close(op, "out", out, want, scale=scale)


def check_backward(op, shape, with_bias=True, with_gelu=False, accumulate=True, calls=1, grads=None):
    """grads: dtype of dweight and dbias where it is not the model's."""
    B, T, C, OC = shape
    inp, weight, bias, dout = inputs(shape, op.dtype)
    rng = np.random.default_rng(1)
    pre_gelu = ref.normal(rng, (B, T, C), op.dtype) if with_gelu else None
    if with_gelu:
        inp = ref.forward(ref.gelu, pre_gelu).truth.astype(op.dtype)
    start = [ref.normal(rng, s, grads or op.dtype, scale=1.0 if accumulate else 0.0) for s in ((OC, C), OC)]
    dinp, dweight, dbias = np.empty((B, T, C), op.dtype), start[0].copy(), start[1].copy()
    bias_or_none, scratch = dbias if with_bias else None, op.scratch(B, T, C, OC)
    for _ in range(calls):
        op(dinp, dweight, bias_or_none, scratch, dout, inp, weight, pre_gelu, accumulate)
    want_dinp = ref.backward(ref.linear, dout, inp, weight, bias)[0]
    want_dweight, want_dbias = ref.backward(ref.linear, dout, inp, weight, bias, dtype=grads)[1:]
    if with_gelu:
        (want_dinp,) = ref.backward(lambda x: ref.linear(ref.gelu(x), ref.to_torch(weight, x.dtype)), dout, pre_gelu)
    size = absolute(dout)
    ref.assert_close(op, "dinp", dinp, want_dinp, scale=np.max(size @ absolute(weight)))
    times = calls if accumulate else 1
    scale = np.max(size.reshape(-1, OC).T @ absolute(inp).reshape(-1, C)) * times + 4
    ref.assert_close(op, "dweight", dweight, ref.added(start[0], want_dweight, times), scale=scale)
    if with_bias:
        scale = np.max(size.sum(axis=(0, 1))) * times + 4
        ref.assert_close(op, "dbias", dbias, ref.added(start[1], want_dbias, times), scale=scale)
    else:
        ref.assert_bits(op, "dbias not given", dbias, start[1])


@pytest.mark.parametrize("with_bias, with_gelu", ((0, 0), (1, 0), (1, 1)), ids=("plain", "bias", "bias_gelu"))
@pytest.mark.op("matmul_forward", shapes=SHAPES + ROWS, big=BIG, cpu=CPU)
def test_matmul_forward(op, shape, with_bias, with_gelu):
    check_forward(op, shape, with_bias, with_gelu)


@pytest.mark.parametrize("with_gelu", (False, True), ids=("plain", "dgelu"))
@pytest.mark.op("matmul_backward", shapes=SHAPES + TILES + TOKENS, big=BIG, cpu=CPU)
def test_matmul_backward(op, shape, with_gelu):
    check_backward(op, shape, with_gelu=with_gelu)


@pytest.mark.op("matmul_backward", public=True, shapes=[(1, 264, 8, 24), (1, 513, 16, 136)])
def test_matmul_backward_of_many_tokens(op, shape):
    """The weight gradient is summed in several ranges of tokens, and the ranges are added up in order."""
    check_backward(op, shape, calls=2)


@pytest.mark.parametrize("whole", (0, 1, 3), ids="whole{}".format)
@pytest.mark.op("matmul_backward", rungs=(11,), dtypes=("bf16",), shapes=[(1, 264, 200, 264)])
def test_matmul_backward_in_ranges_on_hopper(op, shape, whole, monkeypatch):
    """The same for the production rung of Hopper, which takes one range where there are so few tokens. Of 2 x 2 tiles
    the first are made at once, as it does with those that fill all multiprocessors."""
    monkeypatch.setattr(cuda_matmul, "ranges_sm90", lambda BT, C, OC: (whole, 3))
    check_backward(op, shape, calls=2)


@pytest.mark.op("matmul_backward", rungs=(6, 7), dtypes=("bf16",), shapes=[(1, 264, 200, 264)])
def test_matmul_backward_in_ranges_below_production(op, shape, monkeypatch):
    """The same for the rungs below, which make all tiles in ranges, or none."""
    monkeypatch.setattr(cuda_matmul, "ranges_sm90", lambda BT, C, OC: (0, 5))  # of fewer tiles: scratch
    monkeypatch.setattr(ladder_matmul, "ranges", lambda BT, C, OC, room: 3)
    check_backward(op, shape, calls=2)


def test_rungs_make_as_many_ranges_as_scratch_has_room_for():
    """Production needs less of it than they could use: 12 x 25 tiles of 128 x 192 for what 9 x 34 have."""
    BT, C, OC = 2**16, 1600, 4800
    room = cuda_matmul.matmul_scratch_size(1, BT, C, OC)
    found = ladder_matmul.ranges(BT, C, OC, room)
    assert found * ladder_matmul.tiles(OC, C) * 128 * 192 <= room or found == 1
    assert found < ladder_matmul.ranges(BT, C, OC, 2**40)


@pytest.mark.parametrize("with_bias", (False, True), ids=("no_bias", "bias"))
@pytest.mark.op("matmul_backward", shapes=[(2, 33, 40, 72)], cpu=[(2, 7, 13, 29)])
def test_matmul_backward_overwrites(op, shape, with_bias):
    """accumulate=False: whatever dweight and dbias held is gone (the fixture fills them with NaN)."""
    check_backward(op, shape, with_bias=with_bias, accumulate=False)


@pytest.mark.op("matmul_backward", shapes=[(2, 33, 40, 72)])
def test_matmul_backward_without_bias(op, shape):
    check_backward(op, shape, with_bias=False)


@pytest.mark.op("matmul_backward", shapes=[(2, 33, 40, 72)], big=[(1, 3, 8, 8456), (1, 2, 8, 9216)])
def test_matmul_backward_accumulates_over_micro_steps(op, shape):
    check_backward(op, shape, calls=2)


@pytest.mark.parametrize("accumulate", (False, True), ids=("overwrite", "accumulate"))
@pytest.mark.op("matmul_backward", dtypes=("fp16", "bf16"), shapes=[(2, 33, 40, 72), (1, 264, 8, 24)])
def test_matmul_backward_with_fp32_gradients(op, shape, accumulate):
    """What three micro-steps add to the weights' gradients is not rounded to the model's dtype."""
    check_backward(op, shape, accumulate=accumulate, calls=3, grads=ref.FP32)


@pytest.mark.op("matmul_backward", shapes=[(1, 3, 8, 8456)], big=[(1, 33, 40, 8456)])
def test_matmul_backward_of_exact_numbers(op, shape):
    """Small integers have no rounding in any dtype: sums of them, added to what was there, are exact."""
    B, T, C, OC = shape
    if op.kind == "executor" and op.rung and op.rung.number in (6, 7):
        pytest.skip("the kernels of the bias gradient are those of rung 5, and the executor takes long")
    rng = np.random.default_rng(0)
    inp = rng.integers(-1, 2, (B, T, C)).astype(np.float32)
    dout = rng.integers(-1, 2, (B, T, OC)).astype(np.float32)
    weight = np.zeros((OC, C), op.dtype)
    weight[:40] = 1
    dinp, dweight, dbias = np.empty((B, T, C), op.dtype), np.ones((OC, C), op.dtype), np.ones(OC, op.dtype)
    op(dinp, dweight, dbias, op.scratch(B, T, C, OC), dout.astype(op.dtype), inp.astype(op.dtype), weight)
    ref.assert_bits(op, "dinp", dinp, (dout[..., :40].sum(axis=2, keepdims=True) + np.zeros_like(inp)).astype(op.dtype))
    ref.assert_bits(op, "dweight", dweight, (1 + np.einsum("btn,btc->nc", dout, inp)).astype(op.dtype))
    ref.assert_bits(op, "dbias", dbias, (1 + dout.sum(axis=(0, 1))).astype(op.dtype))


@pytest.mark.op("matmul_forward", shapes=[(1, 65, 136, 72)])
def test_matmul_forward_of_exact_numbers(op, shape):
    """Small integers: every element of the product lands in its own place, exactly."""
    B, T, C, OC = shape
    rng = np.random.default_rng(0)
    inp = rng.integers(0, 2, (B, T, C)).astype(np.float32)
    weight = rng.integers(-1, 2, (OC, C)).astype(np.float32)
    out = np.empty((B, T, OC), op.dtype)
    op(out, inp.astype(op.dtype), weight.astype(op.dtype))
    ref.assert_bits(op, "out", out, (inp @ weight.T).astype(op.dtype))


@pytest.mark.op(
    "matmul_forward", public=True, shapes=[(2, 33, 40, 72)], big=[(1, 257, 768, 3072)], cpu=[(2, 7, 13, 29)]
)
def test_matmul_forward_gelu_is_that_of_gelu_forward(op, shape):
    """Recomputing the activation from pre_gelu gives its bits: recomputation changes nothing."""
    B, T, C, OC = shape
    inp, weight, bias, _ = inputs(shape, op.dtype)
    out, pre_gelu, again = (np.empty((B, T, OC), op.dtype) for _ in range(3))
    op(out, inp, weight, bias, pre_gelu)
    op.sibling("gelu_forward")(again, pre_gelu)
    ref.assert_bits(op, "out", out, again)


@pytest.mark.op("matmul_backward", shapes=[(1, 65, 72, 40), (2, 130, 200, 136)], cpu=[(2, 7, 13, 29)])
def test_matmul_backward_recomputes_its_input(op, shape):
    """With recompute everything has the bits that it has with inp given, and inp is written, whatever it held."""
    B, T, C, OC = shape
    _, weight, _, dout = inputs(shape, op.dtype)
    pre_gelu, inp, again = (np.random.default_rng(1).standard_normal((B, T, C)).astype(op.dtype) * 2 for _ in range(3))
    op.sibling("gelu_forward")(inp, pre_gelu)
    results = []
    for recompute, source in ((False, inp), (True, again)):
        grads = [np.full(s, np.nan, op.dtype) for s in ((B, T, C), (OC, C), (OC,))]
        scratch, flags = op.scratch(B, T, C, OC), dict(accumulate=False, recompute=recompute)
        if recompute:
            source[...] = np.nan
        op.run(*grads, scratch, dout, source, weight, pre_gelu, **flags)
        results.append([source, *grads])
    for name, before, recomputed in zip(("inp", "dinp", "dweight", "dbias"), *results, strict=True):
        ref.assert_bits(op, name, recomputed, before)


@pytest.mark.op("matmul_forward", public=True)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20), st.sampled_from(FLAGS))
def test_matmul_forward_any_shape(op, B, T, C, OC, flags):
    check_forward(op, (B, T, C * op.multiple, OC * op.multiple), *flags[:2])


@pytest.mark.op("matmul_backward", public=True)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20), st.sampled_from(FLAGS))
def test_matmul_backward_any_shape(op, B, T, C, OC, flags):
    check_backward(op, (B, T, C * op.multiple, OC * op.multiple), *flags)


def test_models_whose_tiles_are_turned():
    """Their kernels are compiled at start-up. 2048 columns are 11 tiles of 192, or 16 of 128: 3 % fewer, not 4."""
    found = {C: cuda_matmul.turned(C, 50304) for C in (768, 1024, 1280, 1600, 2048)}
    assert found == {768: False, 1024: True, 1280: True, 1600: True, 2048: False}
