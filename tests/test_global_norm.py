"""global_norm: the sum of squares of a flat array."""

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

SHAPES = [(1,), (2,), (7,), (8,), (1023,), (4096,), (65537,)]
BIG = [(1_000_001,), (1 << 24,)]


def check(op, values):
    out = np.empty(1, np.float32)
    op(out, op.scratch(values.size), values)
    truth = np.sum(values.astype(np.float64) ** 2, keepdims=True)
    # all terms are positive: a blocked float32 sum keeps a relative error of a few ulps, whatever the length
    ref.assert_close(op, "out", out, ref.Expected(truth, truth), ulps=4)


@pytest.mark.op("global_norm_squared", shapes=SHAPES, big=BIG)
def test_global_norm_squared(op, shape):
    check(op, ref.normal(np.random.default_rng(0), shape, op.dtype))


@pytest.mark.op("global_norm_squared", shapes=[(4097,)], big=[(3_000_001,)])
def test_global_norm_squared_of_equal_numbers(op, shape):
    """Equal terms are the worst case of a running sum: its rounding errors all have one sign."""
    check(op, np.full(shape, 0.1, np.float32).astype(op.dtype))


@pytest.mark.op("global_norm_squared", shapes=[(1000,)])
def test_global_norm_squared_of_exact_numbers(op, shape):
    """A sum of integers below 2^24 is exact, so every element counts exactly once."""
    values = (np.arange(1000) % 8).astype(np.float32).astype(op.dtype)
    out = np.empty(1, np.float32)
    op(out, op.scratch(1000), values)
    assert out[0] == 125 * (0 + 1 + 4 + 9 + 16 + 25 + 36 + 49), f"{op}: {out[0]}"


@pytest.mark.parametrize("bad", (np.inf, -np.inf, np.nan))
@pytest.mark.op("global_norm_squared", shapes=[(1,), (1000,)])
def test_global_norm_squared_shows_what_is_not_finite(op, shape, bad):
    values = np.ones(shape, op.dtype)
    values[-1] = bad
    out = np.empty(1, np.float32)
    op(out, op.scratch(*shape), values)
    assert np.isnan(out[0]) if np.isnan(bad) else out[0] == np.inf, f"{op}: {out[0]} with {bad} among the values"


@pytest.mark.op("global_norm_squared", public=True)
@given(st.integers(1, 20000))
def test_global_norm_squared_any_size(op, n):
    check(op, ref.normal(np.random.default_rng(n), n, op.dtype))
