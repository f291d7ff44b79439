import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.training.outlier_detector import WINDOW, OutlierDetector


def test_check_value():
    """Computed with llm.c's own outlier_detector.h."""
    detector = OutlierDetector()
    assert all(math.isnan(detector.update(float(i))) for i in range(128))
    assert round(detector.update(1000.0), 6) == 10.303162


def test_as_llmc_tests_it():
    """llm.c dev/test/test_outlier_detector.c: two windows of uniform noise stay within 3 sigma, 10.0 is beyond 5."""
    detector, rng = OutlierDetector(), random.Random(1337)
    for i in range(2 * WINDOW):
        z = detector.update(rng.uniform(-1, 1))
        assert math.isnan(z) if i < WINDOW else abs(z) <= 3.0
    assert detector.update(10.0) >= 5.0


def test_no_spread_is_zero():
    detector = OutlierDetector()
    values = [detector.update(2.0) for _ in range(WINDOW + 5)]
    assert all(map(math.isnan, values[:WINDOW])) and values[WINDOW:] == [0.0] * 5


@given(st.integers(0, 2**32 - 1), st.integers(WINDOW + 1, 4 * WINDOW), st.sampled_from([1.0, 1e-3, 1e3]))
def test_against_numpy(seed, count, scale):
    """The running sums are those of the last WINDOW values, the newest included."""
    values = np.random.default_rng(seed).normal(3.0, 1.0, count) * scale
    detector = OutlierDetector()
    z = [detector.update(float(value)) for value in values]
    last = values[-WINDOW:]
    # variance as a difference of two means near 10: about 1e-14 relative in float64, some hundred additions long
    assert z[-1] == pytest.approx((last[-1] - last.mean()) / last.std(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 300])
def test_state_continues_bit_for_bit(count):
    rng = random.Random(count)
    one, other = OutlierDetector(), OutlierDetector()
    for _ in range(count):
        one.update(rng.gauss(5, 1))
    other.load_state(json.loads(json.dumps(one.state())))
    for _ in range(2 * WINDOW):
        value = rng.gauss(5, 1)
        assert repr(one.update(value)) == repr(other.update(value))  # repr: NaN equals NaN
    assert one.state() == other.state()


def test_a_checkpoint_without_state_starts_afresh():
    detector = OutlierDetector()
    detector.load_state(None)
    assert math.isnan(detector.update(1.0)) and len(detector.values) == 1


def test_a_loaded_state_is_a_copy():
    one, other = OutlierDetector(), OutlierDetector()
    one.update(1.0)
    other.load_state(one.state())
    other.update(2.0)
    assert one.values == [1.0]
