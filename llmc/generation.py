"""Text from a model: the tokens that it starts from, and the loop that draws the others."""

from collections.abc import Iterable, Iterator

import numpy as np

from llmc.data.tokenizer import Tokenizer
from llmc.model import Model
from llmc.rand import random_f32
from llmc.sampler import sample_softmax

WINDOW = 64  # a forward pass has a multiple of this many tokens, so that there are few shapes


def generate(
    model: Model,
    prompt: Iterable[int],
    count: int,
    rng_state: int,
    temperature: float = 1.0,
    top_k: int = 0,
    n_vocab: int | None = None,
) -> Iterator[int]:
    """Yield `count` token ids that continue `prompt` (a non-empty list of ids), drawn by sampler.sample_softmax.

    Each token is one forward pass over the last T tokens at most (llm.c's sampling: no cache of keys and values).
    rng_state: xorshift64* state; the same state gives the same tokens.
    n_vocab: the number of tokens of the tokenizer. The model may have more; the ids beyond are never drawn.
    """
    ids = [int(i) for i in prompt]
    for _ in range(count):
        context = ids[-model.T :]
        length = min(-(-len(context) // WINDOW) * WINDOW, model.T)
        row = np.zeros((1, length), np.int32)  # positions after the last token do not reach it: attention is causal
        row[0, : len(context)] = context
        acts = model.forward(row)
        logits = model.ops.device.download(acts.output[0, len(context) - 1, : model.config.vocab_size])
        coin, rng_state = random_f32(rng_state)
        ids.append(sample_softmax(logits.astype(np.float32), coin, temperature, top_k, n_vocab))
        yield ids[-1]


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that start a text: end-of-text as in llm.c, but a newline for bytes, whose data has few of those."""
    return [tokenizer.eot] if tokenizer.name == "gpt2" else [ord("\n")]


def sample_text(model: Model, tokenizer: Tokenizer | None, length: int, temperature: float) -> str:
    """A sample of `length` positions as text, or as ids without a tokenizer; always from the same random state."""
    start = start_tokens(tokenizer) if tokenizer else [model.config.vocab_size - 1]
    n_vocab = tokenizer.n_vocab if tokenizer else None
    ids = generate(model, start, length - 1, 1337, temperature, n_vocab=n_vocab)
    return "".join(tokenizer.stream(ids)) if tokenizer else " ".join(str(i) for i in ids)
