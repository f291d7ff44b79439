"""Draw a token from logits: softmax sampling as in llm.c, with temperature and top-k.

Source: llm.c llmc/sampler.h sample_softmax. The coin is llmc.rand.random_f32, xorshift64* as there.
"""

import numpy as np

from llmc.errors import UserError


def sample_softmax(
    logits: np.ndarray, coin: float, temperature: float = 1.0, top_k: int = 0, n_vocab: int | None = None
) -> int:  # fmt: skip
    """Index drawn with probability softmax(logits / temperature): the first whose cumulative sum exceeds the coin.

    logits (V,) float32, not changed; coin in [0, 1). temperature 0: the largest logit, the first one of equals.
    n_vocab: ids from there on are never drawn, as the model has them but its tokenizer has not; None: all can be.
    top_k > 0: only the top_k largest logits, and all equal to the smallest of these, can be drawn; 0: off.
    Sums run as in llm.c, in index order: the normaliser in float64, the cumulative sum in float32. Unlike there the
    largest logit is subtracted first, so that no exponential overflows.
    Errors: UserError for a negative temperature or top_k and for logits that are NaN or Inf.
    """
    assert logits.ndim == 1 and logits.dtype == np.float32 and 0 <= coin < 1, (logits.shape, logits.dtype, coin)
    if not 0 <= temperature < np.inf or top_k < 0:
        raise UserError(f"temperature {temperature}, top_k {top_k}: must be >= 0. HINT: 0 is greedy, and no limit")
    logits = logits[:n_vocab]
    scale = np.float32(temperature)
    largest = logits.max()
    if not np.isfinite(largest):  # max() propagates NaN; -Inf below the largest is a mask, and allowed
        raise UserError("cannot sample: the logits hold NaN or Inf. HINT: the model has diverged, try a smaller -l")
    if scale == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a difference beyond float32 becomes -Inf, its exponential the right 0
        exps = np.exp((logits - largest) / scale)
    if 0 < top_k < logits.size:
        exps[logits < np.partition(logits, -top_k)[-top_k]] = 0
    # cumsum adds one by one. sum() adds pairwise, and could round to another token.
    normaliser = np.cumsum(exps, dtype=np.float64)[-1]
    cdf = np.cumsum(exps, dtype=np.float32)
    i = int(np.searchsorted(cdf, np.float32(coin * normaliser), side="right"))
    # The float32 sum can end below the coin: then it is the last token that has any probability.
    return i if i < logits.size else int(np.flatnonzero(exps)[-1])
