import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc.errors import UserError
from llmc.sampler import sample_softmax

COINS = st.integers(0, 2**24 - 1).map(lambda i: i / 2**24)  # what xorshift64*'s float can be
LOGITS = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-50, 50, width=32))


def scalar_sums(logits):
    """The sums of llm.c's loop, one token at a time, on the exponentials relative to the largest logit."""
    norm, cdf, sums = 0.0, np.float32(0), []
    for e in np.exp(logits - logits.max()):
        norm += float(e)
        cdf += e
        sums.append(cdf)
    return norm, np.array(sums)


def scalar_loop(coin, norm, sums):
    """The token of llm.c's loop: the first whose sum exceeds the coin."""
    above = sums > np.float32(coin * norm)
    return int(above.argmax()) if above.any() else sums.size - 1


@given(LOGITS, COINS)
def test_equals_the_scalar_loop(logits, coin):
    assert sample_softmax(logits, coin) == scalar_loop(coin, *scalar_sums(logits))


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_scalar_loop_on_a_vocabulary(seed):
    """50257 tokens: here the order and the precision of the sums decide. The coins lie where the token changes."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(50257)).astype(np.float32)
    norm, sums = scalar_sums(logits)
    assert sums.dtype == np.float32
    coins = np.clip(rng.choice(sums, 100) / norm, 0, 1 - 2**-24)
    for coin in (0.0, *coins.tolist(), *rng.random(20).tolist(), 1 - 2**-24):
        assert sample_softmax(logits, coin) == scalar_loop(coin, norm, sums)


def test_float32_sum_that_ends_below_the_coin():
    """2^24 + 1 + 1 + ... stays 2^24 in float32, and the normaliser does not: no cumulative sum exceeds this coin."""
    logits = np.full(3000, -np.log(2.0**24), np.float32)
    logits[0] = 0
    exps = np.exp(logits)
    assert np.cumsum(exps)[-1] == 1
    coin = 1 - 2**-24
    assert np.float32(coin * exps.astype(np.float64).sum()) > 1
    assert sample_softmax(logits, coin) == scalar_loop(coin, *scalar_sums(logits)) == 2999
    logits[2000:] = -np.inf  # llm.c would return 2999 still, which has no probability
    assert sample_softmax(logits, coin) == 1999


def test_float64_normaliser():
    """The same logits: with a float32 normaliser, 1, this coin would give token 0."""
    logits = np.full(3000, -np.log(2.0**24), np.float32)
    logits[0] = 0
    total = np.exp(logits).astype(np.float64).sum()
    coin = 1 - 2**-14
    assert total > 1 + 2**-13
    assert coin * total > 1 > coin
    assert sample_softmax(logits, coin) == 2999


def test_frequencies():
    """Coins on an even grid: each token is drawn as often as its probability says, to one coin."""
    logits = np.float32([0.3, -1, 2, 0, -30, 1.5])
    for temperature in (1.0, 0.5, 3.0):
        counts = np.zeros(6)
        for i in range(4096):
            counts[sample_softmax(logits, i / 4096, temperature)] += 1
        p = np.exp(logits.astype(np.float64) / temperature)
        assert np.abs(counts - 4096 * p / p.sum()).max() <= 1.01, (temperature, counts)


def test_large_logits():
    """Without the largest subtracted exp(1000) is Inf, and every coin gives the last token."""
    logits = np.float32([990, 1000, 3e38, 980, 3e38, -3e38])
    assert sample_softmax(logits, 0.25) == 2
    assert sample_softmax(logits, 0.75) == 4
    assert sample_softmax(np.float32([-2000, -2001]), 0.7) == 0
    assert sample_softmax(np.float32([-2000, -2001]), 0.75) == 1


@given(LOGITS, COINS, st.integers(1, 250))
def test_top_k(logits, coin, k):
    i = sample_softmax(logits, coin, top_k=k)
    assert np.count_nonzero(logits > logits[i]) < k
    kept = np.where(logits >= np.sort(logits)[::-1][min(k, logits.size) - 1], logits, np.float32(-np.inf))
    assert i == sample_softmax(kept, coin)


@given(LOGITS, COINS)
def test_limits_of_top_k_and_temperature(logits, coin):
    plain = sample_softmax(logits, coin)
    assert sample_softmax(logits, coin, 1.0, logits.size) == sample_softmax(logits, coin, 1.0, 10**6) == plain
    largest = int(np.argmax(logits))
    assert sample_softmax(logits, coin, 0) == sample_softmax(logits, coin, 0.0, 3) == largest
    assert logits[sample_softmax(logits, coin, top_k=1)] == logits[largest]
    assert logits[sample_softmax(logits, coin, 1e-40)] == logits[largest]
    assert sample_softmax(logits, coin, 1e-60) == largest  # 0 in float32


@given(LOGITS, COINS, st.sampled_from([0.5, 2.0]))
def test_temperature_divides(logits, coin, temperature):
    assert sample_softmax(logits, coin, temperature) == sample_softmax(logits / np.float32(temperature), coin)


def test_logits_stay():
    logits = np.float32([1, 3, 2, 5])
    before = logits.copy()
    sample_softmax(logits, 0.5, 0.7, 2)
    assert np.array_equal(logits, before)


def test_masked_logits():
    logits = np.float32([-np.inf, 1, -np.inf, 1, -np.inf])
    assert [sample_softmax(logits, c) for c in (0, 0.4999, 0.5001, 1 - 2**-24)] == [1, 1, 3, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_diverged_model(bad, temperature):
    logits = np.float32([bad, bad, bad]) if bad == -np.inf else np.float32([0, bad, 1])
    with pytest.raises(UserError, match="NaN or Inf.*HINT"):
        sample_softmax(logits, 0.5, temperature)


@pytest.mark.parametrize(
    "kwargs", [dict(temperature=-1), dict(temperature=np.nan), dict(temperature=np.inf), dict(top_k=-1)]
)
def test_bad_arguments(kwargs):
    with pytest.raises(UserError, match=f"{next(iter(kwargs.values()))}.*HINT"):
        sample_softmax(np.zeros(4, np.float32), 0.5, **kwargs)


@given(LOGITS, COINS, st.integers(1, 300))
def test_ids_beyond_n_vocab_are_as_if_not_there(logits, coin, n_vocab):
    for options in (dict(), dict(temperature=0), dict(top_k=3), dict(temperature=0.5)):
        drawn = sample_softmax(logits, coin, n_vocab=n_vocab, **options)
        assert drawn == sample_softmax(logits[:n_vocab].copy(), coin, **options) < n_vocab
