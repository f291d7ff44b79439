import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.errors import UserError
from llmc.training import schedulers
from llmc.training.schedulers import get_learning_rate

RUN = dict(learning_rate=6e-4, warmup_iterations=700, train_num_batches=18865, final_learning_rate_frac=0.1)


@pytest.mark.parametrize(
    "name, step, printed",  # by llm.c's compiled schedulers.h
    [
        ("cosine", 0, "8.5714e-07"),
        ("cosine", 5000, "5.287162e-04"),
        ("cosine", 18000, "6.301569e-05"),
        ("linear", 5000, "4.721718e-04"),
        ("wsd", 18000, "1.259245e-04"),
    ],
)
def test_values_of_llmc(name, step, printed):
    digits = len(printed.split(".")[1].split("e")[0])
    assert f"{get_learning_rate(name, step, **RUN):.{digits}e}" == printed


def reference(name, s, M, W, N, f):
    """The formulas in float64; D in float32 as in llm.c, it is a step count."""
    D = int(np.float32(0.8) * np.float32(N))
    if name == "constant":
        return M
    if s < W:
        return M * (s + 1) / W
    if name == "wsd":
        return M if s < D else f * M + (1 - math.sqrt((s - D) / (N - D))) * (M - f * M)
    d = (s - W) / (N - W)
    return f * M + 0.5 * (1 + math.cos(math.pi * d)) * (M - f * M) if name == "cosine" else M - d * (M - f * M)


@given(st.sampled_from(schedulers.NAMES), st.integers(1, 20000), st.floats(0, 1), st.floats(0, 2), st.floats(0, 1))
def test_formulas(name, N, at, warmup, f):
    s, W = int(at * (N - 1)), int(warmup * N)
    lr = get_learning_rate(name, s, 6e-4, W, N, f)
    assert lr == np.float32(lr)
    # a handful of float32 roundings of numbers up to M; cos and sqrt near their ends lose no more than that
    assert abs(lr - reference(name, s, 6e-4, W, N, f)) <= 8 * 6e-4 * 2.0**-24


def test_ends():
    assert schedulers.NAMES == ("cosine", "linear", "constant", "wsd")
    M = float(np.float32(6e-4))
    for name in schedulers.NAMES:
        warm = 700 if name == "constant" else 699  # full rate from the last step of the warm-up
        assert get_learning_rate(name, warm, **RUN) == get_learning_rate(name, 700, **RUN) == M
        assert get_learning_rate(name, 0, **RUN | dict(warmup_iterations=0)) == M
        end = M if name == "constant" else M * 0.1
        assert get_learning_rate(name, 18865, **RUN) == pytest.approx(end, rel=1e-6)
    assert get_learning_rate("constant", 0, **RUN) == M
    assert get_learning_rate("wsd", 15092, **RUN) == M > get_learning_rate("wsd", 15093, **RUN)


def test_beyond_the_end():
    with pytest.raises(AssertionError):
        get_learning_rate("linear", 18866, **RUN)


def test_unknown_name():
    for function in (lambda: schedulers.check("cosin"), lambda: get_learning_rate("cosin", 0, **RUN)):
        with pytest.raises(UserError, match=r"'cosin' .*HINT: use one of cosine, linear, constant, wsd"):
            function()
    for name in schedulers.NAMES:
        schedulers.check(name)
