"""Multiple-choice accuracy: HellaSwag in the training loop, and any such set in llmc.evaluate.

A multiple-choice example is a context and four completions. The model gives each completion a loss, that of its tokens
after the context. Its answer is the completion with the lowest loss. acc_norm, the number that llm.c reports, compares
the mean loss over the tokens; acc compares the sum, which favours short completions.

llm.c scores B/4 examples at a time in rows of T tokens. Here a row is only as long as its completion needs, and a batch
has as many rows as fit the model's B*T tokens. For HellaSwag at T = 1024 that is a tenth of the work.

Source: llm.c llmc/dataloader.h (EvalLoader), train_gpt2.cu main, dev/data/hellaswag.py.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llmc.data.eval_sets import Example, read_eval_set
from llmc.errors import UserError
from llmc.model import Model

BLOCK = 64  # the length of a row is a multiple of this many tokens, so that there are few shapes
HELLASWAG = os.path.join("hellaswag", "hellaswag_val.bin")


class Score(NamedTuple):
    """What an evaluation counted; the scores of parts, or of ranks, add up field by field."""

    correct: int  # by mean loss: acc_norm
    correct_sum: int  # by summed loss: acc
    total: int


def completion_losses(
    model: Model, examples: list[Example], progress: Callable[[int], object] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss in nats and number of tokens of each completion: two (examples, 4) float64 arrays.

    examples: (label, context, completions), the latter two as token ids. A context loses its first tokens where it has,
    with the longest of its completions, more than model.T + 1 tokens. UserError for a completion longer than model.T.
    The result of a completion does not depend on the others, except that other matrix shapes may round otherwise.
    progress: called with the number of completions done after each batch.
    """
    rows = []  # (number of tokens, place in the result, tokens, tokens of the context)
    for i, (_, context, completions) in enumerate(examples):
        keep = room_for_context(model.T, completions)
        for c, completion in enumerate(completions):
            tokens = [*context[-keep:], *completion]
            rows.append((len(tokens) - 1, (i, c), tokens, len(tokens) - len(completion)))
    rows.sort(key=lambda row: -row[0])
    sums, lengths = np.zeros((2, len(examples), 4))
    while rows:
        t = min(-(-rows[0][0] // BLOCK) * BLOCK, model.T)
        batch, rows = rows[: model.B * model.T // t], rows[model.B * model.T // t :]
        inputs, targets = np.zeros((2, len(batch), t), np.int32)  # what follows a row does not reach it
        for b, (n, _, tokens, _) in enumerate(batch):
            inputs[b, :n], targets[b, :n] = tokens[:-1], tokens[1:]
        losses = model.token_losses(inputs, targets)
        for b, (n, place, _, start) in enumerate(batch):
            sums[place] = losses[b, start - 1 : n].sum(dtype=np.float64)
            lengths[place] = n - start + 1
        if progress:
            progress(len(batch))
    return sums, lengths


def room_for_context(T: int, completions: list[list[int]]) -> int:
    """The most context tokens that T positions hold with the longest completion; its last token is no input."""
    longest = max(len(completion) for completion in completions)
    if longest > T:
        raise UserError(f"-t {T}: a completion of the evaluation set has {longest} tokens. HINT: -t {longest} or more.")
    return T + 1 - longest


def cut_contexts(T: int, examples: list[Example]) -> int:
    """How many examples lose the beginning of their context at T positions."""
    return sum(len(context) > room_for_context(T, completions) for _, context, completions in examples)


def score(model: Model, examples: list[Example], progress: Callable[[int], object] | None = None) -> Score:
    """The Score of a model on multiple-choice examples; of equal losses the first counts, as in llm.c."""
    if not examples:
        return Score(0, 0, 0)
    sums, lengths = completion_losses(model, examples, progress)
    labels = [label for label, *_ in examples]
    means = sums / lengths
    return Score(int((means.argmin(1) == labels).sum()), int((sums.argmin(1) == labels).sum()), len(examples))


def score_line(s: Score) -> str:
    """llm.c's line, with the accuracy by summed loss behind it."""
    return f"HellaSwag: {s.correct}/{s.total} = {s.correct / s.total:f} (by summed loss: {s.correct_sum / s.total:f})"


def load_examples(path: str, vocab_size: int, T: int) -> tuple[list[Example], str | None]:
    """(examples, what to say about them or None) of an eval set; UserError for tokens that the model does not have."""
    examples = read_eval_set(path)
    for i, (_, context, completions) in enumerate(examples):
        largest = max(map(max, (context, *completions)))
        if largest >= vocab_size:
            limit = f"the model's vocabulary ends at {vocab_size - 1}"
            hint = "HINT: llmc.data prepare hellaswag FILE.jsonl --tokenizer NAME, with the model's"
            raise UserError(f"{path}: example {i} has a token {largest}, {limit}. {hint}")
    cut = cut_contexts(T, examples)
    return examples, f"{cut} of {len(examples)} contexts lose their beginning: -t {T} is too short" if cut else None


def find_hellaswag(train_pattern: str) -> tuple[str | None, str | None]:
    """(file for -h 1 or None, a line or None). It is llm.c's, or beside the training shards, or in $LLMC_DATA_DIR."""
    places = [os.path.join("dev", "data", HELLASWAG), os.path.join(os.path.dirname(train_pattern), "hellaswag_val.bin")]
    if os.environ.get("LLMC_DATA_DIR"):
        places.append(os.path.join(os.environ["LLMC_DATA_DIR"], HELLASWAG))
    for place in places:
        if os.path.isfile(place):
            return place, None
    hint = "HINT: llmc.data prepare hellaswag hellaswag_val.jsonl, or take llm.c's hellaswag_val.bin"
    return None, f"-h 1: there is no {', '.join(places)}: running without HellaSwag. {hint}"


def score_over_ranks(model: Model, examples: list[Example], sums: Any) -> Score:
    """score() of all examples. Each rank does every P-th of them. sums: the communicator, None for one process."""
    result = score(model, examples[model.rank :: model.num_ranks])
    return Score(*(round(n) for n in sums.sums(result))) if sums else result
