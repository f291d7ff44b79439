"""Multiple-choice scoring against PyTorch in float64, and HellaSwag's way from its jsonl into the training loop."""

import json

import numpy as np
import pytest
import torch
from reference import GPT2_TENSORS, cross_entropy, gpt2_logits, to_torch

from llmc import UserError, cpu, evaluate
from llmc.gpt2 import GPT2, GPT2Config

V, T = 61, 80
CONFIG = GPT2Config(T, V, 128, 2, 2, 16)


def build(B, t=T):
    """A model whose predictions are far from uniform: the same weights at every call."""
    model = GPT2(CONFIG, cpu, B, t, recompute=2, training=False)
    model.init_weights(3)
    model.params.wte *= 20
    model.params.wpe *= 20
    return model


def example(rng, context, lengths):
    """(label, context, completions) of random tokens."""
    label = int(rng.integers(4))
    return label, rng.integers(0, V, context).tolist(), [rng.integers(0, V, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def examples():
    """Rows of 2 to 81 tokens: shorter and longer than a block of positions, and as long as T + 1 allows."""
    rng = np.random.default_rng(5)
    return [example(rng, c, n) for c, n in ((1, (1, 2, 1, 9)), (75, (6, 1, 3, 2)), (40, (3, 24, 25, 30)), (3, (7,) * 4))] + [
        example(rng, int(rng.integers(1, 60)), rng.integers(1, 20, 4)) for _ in range(20)
    ]  # fmt: skip


def torch_losses(model, examples):
    """Summed and mean loss of each completion, a row at a time, in float64 with the weights of the model."""
    params = {name: to_torch(getattr(model.params, name), torch.float64) for name in GPT2_TENSORS}
    sums, means = np.zeros((2, len(examples), 4))
    for i, (_, context, completions) in enumerate(examples):
        for c, completion in enumerate(completions):
            row = torch.tensor([[*context, *completion]])
            losses = cross_entropy(gpt2_logits(params, row[:, :-1], 2, V), row[:, 1:])[0, len(context) - 1 :]
            assert len(losses) == len(completion)
            sums[i, c], means[i, c] = losses.sum(), losses.mean()
    return sums, means


@pytest.mark.parametrize("B", (1, 3, 7))
def test_losses_and_accuracies_are_those_of_pytorch(B, examples):
    model = build(B)
    expected_sums, expected_means = torch_losses(model, examples)
    sums, lengths = evaluate.completion_losses(model, examples)
    np.testing.assert_allclose(sums, expected_sums, rtol=2e-5)
    np.testing.assert_allclose(sums / lengths, expected_means, rtol=2e-5)
    labels = [label for label, *_ in examples]
    score = evaluate.score(model, examples)
    assert score.correct == (expected_means.argmin(1) == labels).sum()
    assert score.correct_sum == (expected_sums.argmin(1) == labels).sum() != score.correct
    assert score.total == len(examples) == 24
    assert 0 < score.correct < 24


def test_an_answer_that_the_model_prefers_is_found(examples):
    """Labels of the lowest mean loss give 100 %, others 0: the label is compared, nothing else."""
    model = build(4)
    sums, lengths = evaluate.completion_losses(model, examples)
    best = (sums / lengths).argmin(1)
    right = [(int(b), *rest) for b, (_, *rest) in zip(best, examples, strict=True)]
    wrong = [((label + 1) % 4, *rest) for label, *rest in right]
    assert evaluate.score(model, right).correct == 24 and evaluate.score(model, wrong).correct == 0


def test_results_do_not_depend_on_company_or_order(examples):
    """Each example alone, all in another order, and the parts that ranks take: the same losses and sums of counts."""
    model = build(5)
    sums, _ = evaluate.completion_losses(model, examples)
    alone = np.concatenate([evaluate.completion_losses(model, [e])[0] for e in examples])
    np.testing.assert_allclose(alone, sums, rtol=1e-5)
    np.testing.assert_allclose(evaluate.completion_losses(model, examples[::-1])[0][::-1], sums, rtol=1e-5)
    parts = [evaluate.score(model, examples[rank::5]) for rank in range(5)]
    assert tuple(map(sum, zip(*parts, strict=True))) == evaluate.score(model, examples)
    assert evaluate.score(model, []) == (0, 0, 0)


def test_ties_go_to_the_first(examples):
    same = [(2, context, [completions[0]] * 4) for _, context, completions in examples[:2]]
    assert evaluate.score(build(2), same).correct == 0
    assert evaluate.score(build(2), [(0, *rest) for _, *rest in same]).correct == 2


def test_batches_are_full_and_rows_short(examples, monkeypatch):
    """As many rows as B*T tokens hold, of no more blocks of positions than their longest needs."""
    model, shapes, token_losses = build(4), [], GPT2.token_losses
    monkeypatch.setattr(GPT2, "token_losses", lambda self, i, t: (shapes.append(i.shape), token_losses(self, i, t))[1])
    done = []
    evaluate.score(model, examples, done.append)
    assert sum(b for b, _ in shapes) == sum(done) == 4 * len(examples)
    assert shapes[0] == (4, T) and all(b == 4 * T // t for b, t in shapes[:-1]) and shapes[-1][1] == 64


def test_long_contexts_lose_their_beginning(examples):
    """At T = 32 an example scores as one whose context starts later; all four completions keep the same context."""
    model, t = build(2, 32), 32
    cut = [(label, context[-(t + 1 - max(map(len, cs))) :], cs) for label, context, cs in examples]
    changed = sum(len(a[1]) != len(b[1]) for a, b in zip(cut, examples, strict=True))
    assert evaluate.cut_contexts(t, examples) == changed > 5 and evaluate.cut_contexts(T, examples) == 0
    np.testing.assert_allclose(evaluate.completion_losses(model, examples)[0], torch_losses(model, cut)[0], rtol=2e-5)
    with pytest.raises(UserError, match=r"-t 29: a completion .* has 30 tokens. HINT: -t 30 or more"):
        evaluate.score(build(2, 29), examples)
