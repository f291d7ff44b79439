"""An architecture for tests: embeddings, L linear layers, a head of its own. What llmc/model.py asks of a module.

Nothing in it has GPT-2's number of tensors, its names within a layer, or its tied head.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from llmc.buffers import TensorSpec
from llmc.model import head_shape, pieces, rows


class Config(NamedTuple):
    max_seq_len: int
    vocab_size: int
    num_layers: int
    channels: int


def parameter_specs(config):
    maxT, V, L, C = config
    return [
        TensorSpec("wte", (V, C), "X", 0, "normal", True, accumulated=True),
        TensorSpec("wpe", (maxT, C), "X", 0, "normal", True, accumulated=True),
        TensorSpec("linw", (C, C), "X", L, "normal", True),
        TensorSpec("linb", (C,), "X", L),
        TensorSpec("headw", (V, C), "X", 0, "normal", True),
    ]


def activation_specs(config, B, T, recompute, training=True):
    _, V, L, C = config
    return [
        TensorSpec("inputs", (B, T), "i32"),
        TensorSpec("targets", (B, T), "i32"),
        TensorSpec("encoded", (B, T, C)),
        TensorSpec("lin", (B, T, C), "X", L if training else 1),
        TensorSpec("lnf", (B, T, C)),  # what the head reads
        TensorSpec("losses", (B, T), "f32"),
        TensorSpec("output", (*head_shape(B, T), V)),
        TensorSpec("scratch", (2, B, T, C)),
    ]


def scratch_sizes(config, ops, B, T):
    _, V, _, C = config
    f32 = max(ops.matmul_scratch_size(B, T, C, C), ops.matmul_scratch_size(B, T, C, V))
    return f32, ops.encoder_scratch_size(B, T, C, V)


def init_weights(config, params, seed):
    rng = np.random.default_rng(seed)
    for spec in parameter_specs(config):
        getattr(params, spec.name)[...] = 0.3 * rng.standard_normal(getattr(params, spec.name).shape)


def head(params):
    return params.headw


def forward_pass(model, b, t):
    ops, params, acts = model.ops, model.params, model.activations(b, t)
    ops.encoder_forward(acts.encoded, acts.inputs, params.wte, params.wpe)
    x = acts.encoded
    for layer, (w, a) in enumerate(zip(params.h, acts.h, strict=True)):
        out = a.lin if layer + 1 < len(params.h) else acts.lnf
        ops.matmul_forward(out, x, w.linw, w.linb)
        x = out
    if len(pieces(b * t)) == 1:
        ops.matmul_forward(acts.output, acts.lnf, params.headw)


def gradient_views(acts):
    return SimpleNamespace(dlin=acts.scratch[0], dinp=acts.scratch[1])


def backward_pass(model, b, t, dloss, accumulate, final=False):
    ops, params, grads, acts, f32 = model.ops, model.params, model.grads, model.activations(b, t), model.scratch.f32
    d, other = acts.scratch
    if not accumulate:
        model.zero_accumulated(acts)
    for piece in pieces(b * t):
        logits = model.logits(acts, piece)
        ops.fused_classifier(
            logits, rows(acts.losses, piece), dloss, rows(acts.targets, piece), model.config.vocab_size
        )
        ops.matmul_backward(
            rows(d, piece), grads.headw, None, f32, logits, rows(acts.lnf, piece), params.headw,
            accumulate=accumulate or piece.start > 0,
        )  # fmt: skip
    for layer in reversed(range(model.config.num_layers)):
        w, g, x = params.h[layer], grads.h[layer], acts.h[layer - 1].lin if layer else acts.encoded
        ops.matmul_backward(other, g.linw, g.linb, f32, d, x, w.linw, accumulate=accumulate)
        d, other = other, d
        if final:
            model.reduce(layer)
    ops.encoder_backward(grads.wte, grads.wpe, model.scratch.i32, d, acts.inputs, model.scratch.encoder_seed)
    if final:
        model.finish_reduction()
