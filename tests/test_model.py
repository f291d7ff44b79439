"""llmc/model.py by itself: an architecture that is not GPT-2, whole steps, and what a model says about itself.

The passes of GPT-2 are in test_gpt2.py, sums over ranks in test_distributed.py.
"""

import dataclasses
import inspect
import re

import linear_model
import numpy as np
import pytest
import torch
from reference import Expected, assert_bits, assert_close, to_torch

import llmc.model
from llmc import cpu, gpt2
from llmc.errors import UserError
from llmc.model import AdamW, Model
from llmc.parallel import zero

CONFIG, B, T = linear_model.Config(max_seq_len=12, vocab_size=40, num_layers=3, channels=16), 2, 9
ADAMW = AdamW(lr=1e-2, weight_decay=0.1)


def tokens(count, seed=0, V=CONFIG.vocab_size):
    """Inputs and targets (count, B, T) i32."""
    return np.random.default_rng(seed).integers(0, V, (2, count, B, T), dtype=np.int32)


def build(**options):
    model = Model(linear_model, cpu, CONFIG, B, T, **options)
    model.init_weights(1)
    return model


def by_hand(model, inputs, targets, adamw, t):
    for i, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        model.forward(x)
        model.backward(x, y, len(inputs), i)
    model.update(adamw, t)
    return model.mean_loss(len(inputs))


def assert_same(one, other):
    for name in ("params_flat", "grads_flat", "m", "v"):
        assert_bits("model", name, getattr(one, name), getattr(other, name))


def gradients(dtype, params, x, y):
    """{name: gradient} and the mean loss, of the linear model in PyTorch."""
    p = {name: to_torch(values, dtype).requires_grad_() for name, values in params.items()}
    hidden = p["wte"][torch.from_numpy(x).long()] + p["wpe"][:T]
    for w, b in zip(p["linw"], p["linb"], strict=True):
        hidden = hidden @ w.T + b
    loss = torch.nn.functional.cross_entropy(
        (hidden @ p["headw"].T).flatten(0, 1), torch.from_numpy(y).flatten().long()
    )
    loss.backward()
    return {name: tensor.grad.numpy() for name, tensor in p.items()} | {"loss": loss.detach().numpy()}


def test_architectures_are_modules_with_the_same_functions():
    """Those that the top of llmc/model.py lists, with the same arguments."""
    listed = re.findall(r"^    (\w+)\(([\w, ]+)\)(?: {2,}|$)", llmc.model.__doc__, re.M)
    assert len(listed) == 8
    for name, arguments in listed:
        for arch in (gpt2, linear_model):
            found = list(inspect.signature(getattr(arch, name)).parameters)
            assert found == arguments.split(", "), (arch.__name__, name)


@pytest.mark.parametrize("head_rows", (100, 8))
def test_an_architecture_of_another_shape(monkeypatch, head_rows):
    """Its gradients are PyTorch's, whether the logits have room for all positions or come in three pieces."""
    monkeypatch.setattr(llmc.model, "HEAD_ROWS", head_rows)
    model, ((x,), (y,)) = build(), tokens(1)
    params = {spec.name: getattr(model.params, spec.name).copy() for spec in model.specs}
    model.grads_flat[:] = np.nan  # a gradient that is not written shows
    model.forward(x)
    model.backward(x, y)
    truth, own = (gradients(dtype, params, x, y) for dtype in (torch.float64, torch.float32))
    for name in params:
        assert_close("linear", name, getattr(model.grads, name), Expected(truth[name], own[name]))
    assert model.mean_loss() == pytest.approx(float(truth["loss"]), rel=1e-6)
    assert model.validate(x, y) == pytest.approx(float(truth["loss"]), rel=1e-6)


def test_tables_have_a_row_for_each_tensor():
    model = build()
    sizes = [spec.size for spec in linear_model.parameter_specs(CONFIG)]
    assert model.scratch.ends.tolist() == np.cumsum(sizes).tolist() and len(sizes) == 5
    assert model.scratch.decays.shape == model.scratch.seeds.shape == (5,)
    model.step(*tokens(1), ADAMW)
    assert model.scratch.decays.tolist() == [np.float32(0.1)] * 3 + [0, np.float32(0.1)]
    cut = zero.partition(model.specs, 1, 2)
    assert [len(part) for part in cut.parts] == [5, 4] and cut.size * 2 == sum(sizes)
    assert [spec.shape for spec in cut.specs()[2:]] == [(2, 5)] * 3


def test_a_step_is_forward_backward_and_update():
    one, other = build(), build()
    for t in range(1, 4):
        inputs, targets = tokens(t, seed=t)  # t micro-batches
        assert one.step(inputs, targets, ADAMW) == by_hand(other, inputs, targets, ADAMW, t)
        assert one.steps == other.steps == t
    assert_same(one, other)
    (x,), (y,) = tokens(1, seed=9)
    assert one.step(x.astype(np.uint16), y.tolist(), ADAMW) == by_hand(
        other, [x], [y], ADAMW, 4
    )  # (B, T), any integers
    assert_same(one, other)


def test_steps_learn():
    model, batch = build(), tokens(1)
    losses = [model.step(*batch, ADAMW) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "inputs, targets, text",
    [
        (np.zeros((B, T + 1), int), np.zeros((B, T + 1), int), "made for B x T = 2 x 9 tokens"),
        (np.zeros((B, T), int), np.zeros((B, T - 1), int), "made for B x T = 2 x 9 tokens"),
        (np.zeros(T, int), np.zeros(T, int), "made for B x T = 2 x 9 tokens"),
        (np.full((B, T), 40), np.zeros((B, T), int), "inputs has other token ids: the vocabulary has the ids 0 to 39"),
        (np.zeros((B, T), int), np.full((B, T), -1), "targets has other token ids"),
    ],
)
def test_a_step_over_what_is_no_batch(inputs, targets, text):
    model = build()
    before = model.params_flat.copy()
    with pytest.raises(UserError, match=f"{text}.*HINT: "):
        model.step(inputs, targets, ADAMW)
    assert model.steps == 0 and np.array_equal(model.params_flat, before)


def test_adamw_is_a_value():
    assert AdamW(1e-3) == AdamW(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ADAMW.lr = 1.0


def test_a_model_says_what_it_is():
    config = gpt2.config_from_descriptor("tiny:d2", 257, 32)
    text = repr(Model(gpt2, cpu, config, 3, 8))
    assert "GPT2Config(max_seq_len=32" in text and f"{gpt2.num_parameters(config):,} parameters in float32" in text
    assert "B x T = 3 x 8 tokens and training, by llmc.cpu" in text and cpu.device.describe() in text
    assert "forward passes alone" in repr(Model(gpt2, cpu, config, 3, 8, training=False))
