"""encoder: out = wte[inp] + wpe, and the scatter-add of its gradient."""

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

# B, T, C, V, Vp, maxT
SHAPES = [(1, 1, 8, 5, 5, 1), (2, 7, 24, 11, 16, 9), (3, 65, 40, 100, 128, 80), (1, 130, 72, 300, 384, 257)]
SHAPES += [(2, 600, 8, 300, 384, 600), (1, 40, 1032, 5, 8, 40)]  # many positions; many channels
BIG = [(4, 257, 768, 1000, 1024, 1024), (2, 64, 64, 50257, 50304, 64)]
CPU = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 8, 3), (3, 13, 130, 65, 128, 20)]


def inputs(shape, dtype, seed=0):
    B, T, C, V, Vp, maxT = shape
    rng = np.random.default_rng(seed)
    inp = rng.integers(0, V, (B, T), dtype=np.int32)
    inp[0, 0], inp[-1, -1] = 0, V - 1  # both ends of the table
    return inp, ref.normal(rng, (Vp, C), dtype), ref.normal(rng, (maxT, C), dtype), ref.normal(rng, (B, T, C), dtype)


def check_forward(op, shape):
    B, T, C, V, Vp, maxT = shape
    inp, wte, wpe, _ = inputs(shape, op.dtype)
    wte[V:] = np.nan  # padding rows and positions past T are not read
    wpe[T:] = np.nan
    out = np.empty((B, T, C), op.dtype)
    op(out, inp, wte, wpe)
    # one addition, rounded once: PyTorch's bits
    ref.assert_bits(op, "out", out, (wte[inp].astype(np.float32) + wpe[:T].astype(np.float32)).astype(op.dtype))


def expected_gradients(inp, dout, Vp, maxT):
    """Truth and PyTorch's own for dwte and dwpe, with the sum of absolute terms that bounds float32 rounding."""
    C = dout.shape[-1]
    zeros = np.zeros((Vp, C), dout.dtype), np.zeros((maxT, C), dout.dtype)
    grads = ref.backward(lambda wte, wpe: ref.encoder(wte, wpe, ref.to_torch(inp)), dout, *zeros)
    sizes = ref.backward(lambda wte, wpe: ref.encoder(wte, wpe, ref.to_torch(inp)), abs(dout), *zeros)
    return grads, [size.truth for size in sizes]


def check_backward(op, shape, inp=None):
    B, T, C, V, Vp, maxT = shape
    drawn, _, _, dout = inputs(shape, op.dtype)
    inp = drawn if inp is None else inp
    rng = np.random.default_rng(1)
    before = ref.normal(rng, (Vp, C), op.dtype), ref.normal(rng, (maxT, C), op.dtype)
    present = np.isin(np.arange(Vp), inp), np.arange(maxT) < T
    for grad, rows in zip(before, present, strict=True):
        grad[~rows] = np.nan  # rows that no token and no position uses are neither read nor written
    dwte, dwpe = before[0].copy(), before[1].copy()
    seed = np.array([1337], np.uint32)
    op(dwte, dwpe, op.scratch(B, T, C, Vp, dtype=np.int32), dout, inp, seed)
    grads, sizes = expected_gradients(inp, dout, Vp, maxT)
    for name, got, old, grad, size, rows in zip(
        ("dwte", "dwpe"), (dwte, dwpe), before, grads, sizes, present, strict=True
    ):
        ref.assert_bits(op, f"{name} rows not used", got[~rows], old[~rows])
        want = ref.Expected(grad.truth[rows], grad.torch[rows])
        if op.dtype == ref.BF16:
            slack = 4 * ref.EPS[ref.FP32] * (size[rows] + abs(old[rows].astype(np.float64)))
            value = old[rows].astype(np.float64) + want.truth
            ref.assert_stochastically_rounded(op, name, got[rows], value, slack)
        else:
            ref.assert_close(op, name, got[rows], ref.added(old[rows], want), scale=size.max())


@pytest.mark.op("encoder_forward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_encoder_forward(op, shape):
    check_forward(op, shape)


@pytest.mark.op("encoder_backward", shapes=SHAPES, big=BIG, cpu=CPU)
def test_encoder_backward(op, shape):
    check_backward(op, shape)


@pytest.mark.op("encoder_backward", shapes=[(3, 130, 40, 10, 16, 130), (2, 64, 8, 10, 16, 64)])
def test_encoder_backward_one_token_everywhere(op, shape):
    """Its sum crosses all pieces of the sorted list; the second shape's list ends where a piece ends."""
    check_backward(op, shape, np.full(shape[:2], 7, np.int32))


@pytest.mark.op("encoder_backward")
def test_encoder_backward_token_that_begins_with_a_piece(op):
    """Of the sorted list's pieces of 32 entries, the second and third are one token's, from the first entry on."""
    check_backward(op, (1, 100, 8, 10, 16, 100), np.repeat([2, 5, 7], (32, 64, 4)).astype(np.int32)[None])


@pytest.mark.op("encoder_backward")
def test_encoder_backward_every_token_once(op):
    shape = (1, 96, 24, 96, 96, 96)
    check_backward(op, shape, np.random.default_rng(0).permutation(96).astype(np.int32)[None])


@pytest.mark.op("encoder_backward")
def test_encoder_backward_accumulates_over_micro_steps(op):
    B, T, C, V, Vp, maxT = shape = (2, 33, 40, 20, 32, 33)
    inp, _, _, dout = inputs(shape, op.dtype)
    grads = np.zeros((Vp, C), op.dtype), np.zeros((maxT, C), op.dtype)
    for seed in (1, 2):
        op(*grads, op.scratch(B, T, C, Vp, dtype=np.int32), dout, inp, np.array([seed], np.uint32))
    want, sizes = expected_gradients(inp, dout, Vp, maxT)
    for name, got, grad, size in zip(("dwte", "dwpe"), grads, want, sizes, strict=True):
        expected = ref.added(np.zeros_like(got), grad, times=2)
        ref.assert_close(op, name, got, expected, ulps=2, scale=size.max())  # 2: two stochastic roundings


@pytest.mark.op("encoder_backward", dtypes=("fp16", "bf16"))
def test_encoder_backward_with_fp32_gradients(op):
    """What three micro-steps add to the tables' gradients is not rounded to the model's dtype."""
    B, T, C, V, Vp, maxT = shape = (2, 33, 40, 20, 32, 33)
    inp, _, _, dout = inputs(shape, op.dtype)
    grads = np.zeros((Vp, C), np.float32), np.zeros((maxT, C), np.float32)
    for seed in (1, 2, 3):
        op(*grads, op.scratch(B, T, C, Vp, dtype=np.int32), dout, inp, np.array([seed], np.uint32))
    want, sizes = expected_gradients(inp, dout.astype(np.float32), Vp, maxT)
    for name, got, grad, size in zip(("dwte", "dwpe"), grads, want, sizes, strict=True):
        ref.assert_close(op, name, got, ref.added(np.zeros_like(got), grad, times=3), scale=size.max())


@pytest.mark.op("encoder_backward", dtypes=("bf16",))
def test_encoder_backward_stochastic_rounding(op):
    """An eighth of a bf16 step, added to +-1 everywhere, is lost by rounding to nearest; its mean must survive."""
    T, C, step = 64, 64, 2.0**-7
    inp = np.arange(T, dtype=np.int32)[None]
    sign = np.where(np.arange(C) % 2, -1, 1)
    dout = np.broadcast_to(sign * step / 8, (1, T, C)).astype(op.dtype)
    results = []
    for seed in (1, 1, 2):
        dwte, dwpe = (np.broadcast_to(sign, (T, C)).astype(op.dtype) for _ in range(2))
        op(dwte, dwpe, op.scratch(1, T, C, T, dtype=np.int32), dout, inp, np.array([seed], np.uint32))
        results.append((dwte, dwpe))
    for i, name in enumerate(("dwte", "dwpe")):
        added = np.mean(np.abs(results[0][i].astype(np.float64)) - 1) / step
        assert abs(added - 1 / 8) < 5 * np.sqrt(1 / 8 * 7 / 8 / (T * C)), f"{op}: {name} gained {added} steps, not 1/8"
        ref.assert_bits(op, f"{name} with the same seed", results[1][i], results[0][i])
        assert (ref.bits(results[2][i]) != ref.bits(results[0][i])).any(), f"{op}: {name} ignores the seed"
    assert (ref.bits(results[0][0]) != ref.bits(results[0][1])).any(), f"{op}: dwte and dwpe share their noise"


@pytest.mark.op("encoder_backward", public=True)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 12), st.integers(1, 70))
def test_encoder_any_shape(op, B, T, C, V):
    check_backward(op, (B, T, C * op.multiple, V, V + V % 3, T + V % 2))


@pytest.mark.op("encoder_backward", sets=("cpu",))
def test_encoder_backward_scratch_may_be_larger(op):
    shape = (2, 7, 24, 11, 16, 9)
    inp, _, _, dout = inputs(shape, op.dtype)
    results = []
    for extra in (0, 1000):
        dwte, dwpe = np.zeros((16, 24), op.dtype), np.zeros((9, 24), op.dtype)
        scratch = np.full(op.scratch(2, 7, 24, 16).size + extra, -1, np.int32)
        op(dwte, dwpe, scratch, dout, inp, np.array([1], np.uint32))
        results.append((dwte, dwpe))
    ref.assert_bits(op, "dwte", results[1][0], results[0][0])
    ref.assert_bits(op, "dwpe", results[1][1], results[0][1])
