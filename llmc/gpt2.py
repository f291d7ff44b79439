"""GPT-2: its sizes, its tensors, and every forward and backward call by hand. Read this file first.

There is no autograd and there are no modules. ``forward_pass`` and ``backward_pass`` are flat lists of op calls over
named views into flat buffers, in the order llm.c has them (train_gpt2.cu), with its tensor names:

    w   weights of one layer       params.h[l].qkvw ...     (checkpoint order, so that a checkpoint is one copy)
    g   their gradients            grads.h[l].qkvw ...
    a   activations of one layer   acts.h[l].atty ...

``ops`` is one of two plain modules with the same functions: llmc.cuda (kernels) or llmc.cpu (NumPy and BLAS).
``model`` is a llmc.model.Model: it owns the buffers that the tables here describe, and calls the passes.

Shapes: B batch, T positions, C channels, NH heads, L layers, V vocabulary, Vp vocabulary padded to a multiple of 128,
maxT the most positions. A batch may be smaller than the buffers: b x t.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np

from . import rand
from .buffers import Array, TensorSpec, Views
from .command import did_you_mean
from .errors import UserError
from .model import Model, head_shape, piece_sizes, pieces, rows


@dataclass(frozen=True)
class GPT2Config:
    """The six numbers of llm.c's GPT2Config, which are also the header of a model file."""

    max_seq_len: int = 1024
    vocab_size: int = 50257
    padded_vocab_size: int = 50304
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768

    def __post_init__(self) -> None:
        if self.channels % self.num_heads:
            C, NH = self.channels, self.num_heads
            raise UserError(f"channels {C} is not a multiple of num_heads {NH}. HINT: check the model file (-e).")


GPT2_CHANNELS = {6: 384, 12: 768, 24: 1024, 36: 1280, 48: 1600, 60: 1920, 72: 2880, 84: 3456}  # depth -> C
GPT3_LAYERS = {384: 6, 768: 12, 1024: 24, 1536: 24, 2048: 24, 2560: 32, 4096: 32, 12288: 96}  # C -> depth
GPT3_HEAD_SIZE = {1536: 96, 2560: 80, 2048: 128, 4096: 128, 12288: 128}  # 64 for the others
TINY = {1: (64, 4), 2: (64, 4), 3: (128, 4), 4: (128, 4), 6: (192, 6), 8: (256, 8)}  # depth -> C, NH: for CPUs
DESCRIPTORS = (
    "dN or gpt2:dN (N = 6, 12, 24, 36, 48, 60, 72, 84), gpt3:cN (N = 384, 768, 1024, 1536, 2048, 2560, 4096, 12288), "
    "tiny:dN (N = 1, 2, 3, 4, 6, 8)"
)


def every_descriptor() -> list[str]:
    """All names that config_from_descriptor knows."""
    names = [f"{prefix}d{n}" for prefix in ("", "gpt2:") for n in GPT2_CHANNELS]
    return names + [f"gpt3:c{n}" for n in GPT3_LAYERS] + [f"tiny:d{n}" for n in TINY]


def config_from_descriptor(
    descriptor: str, vocab_size: int = 50257, tiny_seq_len: int | None = None
) -> GPT2Config:  # fmt: skip
    """The GPT2Config that a descriptor names: llm.c's dN, gpt2:dN and gpt3:cN, and tiny:dN for CPUs.

    vocab_size is the tokenizer's; it is padded to a multiple of 128 as 50257 is to 50304. maxT is 1024
    for gpt2, 2048 for gpt3, and tiny_seq_len or 256 for tiny. Source: llm.c train_gpt2.cu gpt_build_from_descriptor.
    """
    match = re.fullmatch(r"(?:gpt2:)?(d)(\d{1,6})|gpt3:(c)(\d{1,6})|tiny:(d)(\d{1,6})", descriptor)
    n = int(next(filter(str.isdigit, filter(None, match.groups())))) if match else -1
    if match and match[1] and n in GPT2_CHANNELS:
        L, C = n, GPT2_CHANNELS[n]
        NH, maxT = C // (96 if n > 60 else 64), 1024
    elif match and match[3] and n in GPT3_LAYERS:
        L, C = GPT3_LAYERS[n], n
        NH, maxT = C // GPT3_HEAD_SIZE.get(n, 64), 2048
    elif match and match[5] and n in TINY:
        L, (C, NH) = n, TINY[n]
        maxT = tiny_seq_len or 256
    else:
        like = did_you_mean(descriptor, every_descriptor())
        raise UserError(f"-e {descriptor}: no such model descriptor, nor a file.{like} HINT: known are {DESCRIPTORS}.")
    return GPT2Config(maxT, vocab_size, -(-vocab_size // 128) * 128, L, NH, C)


def config_from_header(header: Mapping[str, int]) -> GPT2Config:
    """The GPT2Config of a model file; header is model_file.read_model_header's dict."""
    return GPT2Config(*(header[field] for field in GPT2Config.__dataclass_fields__))


# ----------------------------------------------------------------------------------------------------------------------
# the tensors


def parameter_specs(config: GPT2Config) -> list[TensorSpec]:
    """The parameter tensors, in the order of llm.c's checkpoint. Matrices are (out_features, in_features)."""
    Vp, maxT, L, C = config.padded_vocab_size, config.max_seq_len, config.num_layers, config.channels
    return [
        TensorSpec("wte", (Vp, C), init="normal", decay=True),  # rows V..Vp are zero, and stay zero
        TensorSpec("wpe", (maxT, C), init="normal", decay=True, accumulated=True),
        TensorSpec("ln1w", (C,), layers=L, init="ones", accumulated=True),
        TensorSpec("ln1b", (C,), layers=L, accumulated=True),
        TensorSpec("qkvw", (3 * C, C), layers=L, init="normal", decay=True),
        TensorSpec("qkvb", (3 * C,), layers=L),
        TensorSpec("attprojw", (C, C), layers=L, init="residual", decay=True),
        TensorSpec("attprojb", (C,), layers=L),
        TensorSpec("ln2w", (C,), layers=L, init="ones", accumulated=True),
        TensorSpec("ln2b", (C,), layers=L, accumulated=True),
        TensorSpec("fcw", (4 * C, C), layers=L, init="normal", decay=True),
        TensorSpec("fcb", (4 * C,), layers=L),
        TensorSpec("fcprojw", (C, 4 * C), layers=L, init="residual", decay=True),
        TensorSpec("fcprojb", (C,), layers=L),
        TensorSpec("lnfw", (C,), init="ones", accumulated=True),
        TensorSpec("lnfb", (C,), accumulated=True),
    ]


def activation_specs(
    config: GPT2Config, B: int, T: int, recompute: int, training: bool = True
) -> list[TensorSpec]:  # fmt: skip
    """The activations of a micro-batch of B rows of T tokens.

    recompute: 0 keeps all of them for backward, 1 makes GELU again there, 2 also the layernorms.
    Without training there is no backward pass to keep them for: all layers share those of one.
    """
    Vp, NH, C = config.padded_vocab_size, config.num_heads, config.channels
    L = config.num_layers if training else 1
    keep_gelu = L if recompute < 1 else 1
    keep_ln = L if recompute < 2 else 1
    return [
        TensorSpec("inputs", (B, T), "i32"),
        TensorSpec("targets", (B, T), "i32"),
        TensorSpec("encoded", (B, T, C)),
        TensorSpec("ln1", (B, T, C), "X", keep_ln),
        TensorSpec("ln1_mean", (B, T), "f32", L),
        TensorSpec("ln1_rstd", (B, T), "f32", L),
        TensorSpec("qkvr", (B, T, 3 * C), "X", L),  # packed (B, T, 3, NH, HS)
        TensorSpec("atty", (B, T, C), "X", L),
        TensorSpec("att", (B, NH, T), "f32", L),  # log-sum-exp of the scores; there is no T x T
        TensorSpec("residual2", (B, T, C), "X", L),
        TensorSpec("ln2", (B, T, C), "X", keep_ln),
        TensorSpec("ln2_mean", (B, T), "f32", L),
        TensorSpec("ln2_rstd", (B, T), "f32", L),
        TensorSpec("fch", (B, T, 4 * C), "X", L),
        TensorSpec("fch_gelu", (B, T, 4 * C), "X", keep_gelu),
        TensorSpec("residual3", (B, T, C), "X", L),  # the last layer's becomes dl_btc in backward
        TensorSpec("lnf", (B, T, C)),
        TensorSpec("lnf_mean", (B, T), "f32"),
        TensorSpec("lnf_rstd", (B, T), "f32"),
        TensorSpec("losses", (B, T), "f32"),
        TensorSpec("output", (*head_shape(B, T), Vp)),  # logits, then dlogits
        TensorSpec("scratch_btc", (B, T, C)),  # forward: what is added to the residual stream; backward: dresidual
        TensorSpec("scratch_bt4c", (B, T, 4 * C)),  # backward: dlnf, dfch, dqkvr, see gradient_views
    ]


def scratch_sizes(config: GPT2Config, ops: ModuleType, B: int, T: int) -> tuple[int, int]:
    """(f32, i32) elements of scratch: what the op that wants most of each wants, for a batch B x T."""
    Vp, NH, C = config.padded_vocab_size, config.num_heads, config.channels
    layer = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]  # (in, out features) of qkvw, attprojw, fcw, fcprojw
    f32 = max(
        ops.layernorm_scratch_size(B, T, C),
        ops.attention_scratch_size(B, T, C, NH),
        *(ops.matmul_scratch_size(B, T, c, oc) for c, oc in layer),
        *(ops.matmul_scratch_size(1, positions, C, Vp) for positions in piece_sizes(B * T)),
    )
    return f32, ops.encoder_scratch_size(B, T, C, Vp)


def num_parameters(config: GPT2Config) -> int:
    """The padded parameter count N, as llm.c prints it and counts its FLOPs with."""
    return sum(spec.size for spec in parameter_specs(config))


def flops_per_token(config: GPT2Config, T: int) -> int:
    """6 N + 6 L C T: forward and backward matmuls, and causal attention (llm.c train_gpt2.cu gpt2_estimate_mfu)."""
    return 6 * num_parameters(config) + 6 * config.num_layers * config.channels * T


def init_weights(config: GPT2Config, params: Views, seed: int) -> None:
    """Fresh weights on the host, the same bits as llm.c for a seed.

    params: fp32 views, written (=). wte, wpe, then the layers' matrices layer by layer are drawn from one MT19937.
    Source: llm.c train_gpt2.cu gpt2_build_from_descriptor.
    """
    f32, specs = np.float32, parameter_specs(config)  # std, too, is llm.c's float, to the last bit
    std = {"normal": f32(0.02), "residual": f32(0.02) * (f32(1) / np.sqrt(f32(2 * config.num_layers)))}
    for spec in specs:
        getattr(params, spec.name).fill(1.0 if spec.init == "ones" else 0.0)
    drawn = [(params.wte[: config.vocab_size], "normal"), (params.wpe, "normal")]
    drawn += [(getattr(w, s.name), s.init) for w in params.h for s in specs if s.layers and s.init in std]
    rand.normals_([(array, 0.0, std[init]) for array, init in drawn], rand.MT19937(seed))


# ----------------------------------------------------------------------------------------------------------------------
# the passes


def head(params: Views) -> Array:
    """The weight (Vp, C) of the last matmul, which makes the logits: GPT-2 ties it to the embedding."""
    return params.wte


# fmt: off
def forward_pass(model: Model, b: int, t: int) -> None:
    """Every forward call, for the token ids in acts.inputs (b, t).

    The residual stream is encoded, then residual2 (attention added) and residual3 (MLP added) of each layer. An add is
    one op with the layernorm that follows it, which is the next layer's or, after the last layer, the final one.
    """
    ops, params, acts = model.ops, model.params, model.activations(b, t)
    residual = acts.encoded  # (b, t, C)
    branch = acts.scratch_btc  # (b, t, C), what attention or the MLP adds to the residual stream

    ops.encoder_forward(out=residual, inp=acts.inputs, wte=params.wte, wpe=params.wpe)  # (b, t) ids -> (b, t, C)
    w, a = params.h[0], acts.h[0]
    ops.layernorm_forward(  # (b, t, C) -> (b, t, C), mean and rstd (b, t)
        out=a.ln1, mean=a.ln1_mean, rstd=a.ln1_rstd, inp=residual, weight=w.ln1w, bias=w.ln1b,
    )

    for layer, (w, a) in enumerate(zip(params.h, acts.h, strict=True)):
        ops.matmul_forward(out=a.qkvr, inp=a.ln1, weight=w.qkvw, bias=w.qkvb)  # (b, t, C) -> (b, t, 3C)
        ops.attention_forward(out=a.atty, att=a.att, qkvr=a.qkvr)  # (b, t, 3C) -> (b, t, C), att (b, NH, t)
        ops.matmul_forward(out=branch, inp=a.atty, weight=w.attprojw, bias=w.attprojb)  # (b, t, C) -> (b, t, C)
        ops.fused_residual_forward(  # two (b, t, C) -> their sum (b, t, C), its layernorm (b, t, C), mean, rstd (b, t)
            residual=a.residual2, normed=a.ln2, mean=a.ln2_mean, rstd=a.ln2_rstd,
            inp1=residual, inp2=branch, weight=w.ln2w, bias=w.ln2b,
        )
        ops.matmul_forward(  # (b, t, C) -> (b, t, 4C), before and after GELU
            out=a.fch_gelu, inp=a.ln2, weight=w.fcw, bias=w.fcb, pre_gelu=a.fch,
        )
        ops.matmul_forward(out=branch, inp=a.fch_gelu, weight=w.fcprojw, bias=w.fcprojb)  # (b, t, 4C) -> (b, t, C)
        if layer + 1 < len(params.h):
            next_w, next_a = params.h[layer + 1], acts.h[layer + 1]
            ops.fused_residual_forward(  # the same shapes
                residual=a.residual3, normed=next_a.ln1, mean=next_a.ln1_mean, rstd=next_a.ln1_rstd,
                inp1=a.residual2, inp2=branch, weight=next_w.ln1w, bias=next_w.ln1b,
            )
        else:
            ops.fused_residual_forward(  # the same shapes
                residual=a.residual3, normed=acts.lnf, mean=acts.lnf_mean, rstd=acts.lnf_rstd,
                inp1=a.residual2, inp2=branch, weight=params.lnfw, bias=params.lnfb,
            )
        residual = a.residual3

    if len(pieces(b * t)) == 1:  # the logits of more positions have no room: model.logits() makes them piece by piece
        ops.matmul_forward(out=acts.output, inp=acts.lnf, weight=params.wte)  # (b, t, C) -> (b, t, Vp)


def gradient_views(acts: Views) -> SimpleNamespace:
    """Where backward keeps the gradients of activations, those of one layer at a time."""
    b, t, C = acts.encoded.shape
    wide = acts.scratch_bt4c.reshape(-1)  # holds dlnf, then dfch and dqkvr of each layer, one at a time
    return SimpleNamespace(
        dresidual=acts.scratch_btc,  # (b, t, C), of the residual stream, which all ops add to
        dl_btc=acts.h[-1].residual3,  # (b, t, C), of what a layer computes; only the last layernorm reads residual3
        dfch=acts.scratch_bt4c,  # (b, t, 4C), of what goes into GELU
        dqkvr=wide[: 3 * b * t * C].reshape(b, t, 3 * C),
        dlnf=wide[: b * t * C].reshape(b, t, C),
    )


def backward_pass(model: Model, b: int, t: int, dloss: float, accumulate: bool, final: bool = False) -> None:
    """Every backward call, from the gradient dloss of each position's loss.

    accumulate: the gradients of the parameters are added to (+=), else written (=).
    final: they are complete after this pass but for those of other ranks, with which they are summed layer by layer,
    while the pass goes on.
    """
    ops, params, grads, acts = model.ops, model.params, model.grads, model.activations(b, t)
    d, scratch = gradient_views(acts), model.scratch.f32
    if not accumulate:
        model.zero_accumulated(acts)
    ops.device.zero(d.dresidual)

    for piece in pieces(b * t):  # (b, t) is (1, n) below where there is room for the logits of n positions only
        logits = model.logits(acts, piece)
        ops.fused_classifier(  # logits (b, t, Vp) become their gradient; losses (b, t) are added to
            logits=logits, losses=rows(acts.losses, piece), dloss=dloss, targets=rows(acts.targets, piece),
            V=model.config.vocab_size,
        )
        ops.matmul_backward(  # (b, t, Vp) -> (b, t, C), and the gradient (Vp, C) of wte
            dinp=rows(d.dlnf, piece), dweight=grads.wte, dbias=None, scratch=scratch, dout=logits,
            inp=rows(acts.lnf, piece), weight=params.wte, accumulate=accumulate or piece.start > 0,
        )
    ops.layernorm_backward(  # (b, t, C) -> added to (b, t, C)
        dinp=d.dresidual, dweight=grads.lnfw, dbias=grads.lnfb, scratch=scratch, dout=d.dlnf,
        inp=acts.h[-1].residual3, weight=params.lnfw, mean=acts.lnf_mean, rstd=acts.lnf_rstd,
    )

    for layer in reversed(range(model.config.num_layers)):
        w, g, a = params.h[layer], grads.h[layer], acts.h[layer]
        residual = acts.h[layer - 1].residual3 if layer > 0 else acts.encoded  # (b, t, C), what the layer began with
        ops.matmul_backward(  # (b, t, C) -> (b, t, 4C), through GELU; where fch_gelu was not kept, it is made again
            dinp=d.dfch, dweight=g.fcprojw, dbias=g.fcprojb, scratch=scratch, dout=d.dresidual, inp=a.fch_gelu,
            weight=w.fcprojw, pre_gelu=a.fch, accumulate=accumulate, recompute=model.recompute >= 1,
        )
        if model.recompute >= 2:  # (b, t, C) -> (b, t, C), as in the forward pass
            ops.layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, inp=a.residual2, weight=w.ln2w, bias=w.ln2b)
        ops.matmul_backward(  # (b, t, 4C) -> (b, t, C)
            dinp=d.dl_btc, dweight=g.fcw, dbias=g.fcb, scratch=scratch, dout=d.dfch, inp=a.ln2,
            weight=w.fcw, accumulate=accumulate,
        )
        ops.layernorm_backward(  # (b, t, C) -> added to (b, t, C)
            dinp=d.dresidual, dweight=g.ln2w, dbias=g.ln2b, scratch=scratch, dout=d.dl_btc,
            inp=a.residual2, weight=w.ln2w, mean=a.ln2_mean, rstd=a.ln2_rstd,
        )
        ops.matmul_backward(  # (b, t, C) -> (b, t, C)
            dinp=d.dl_btc, dweight=g.attprojw, dbias=g.attprojb, scratch=scratch, dout=d.dresidual, inp=a.atty,
            weight=w.attprojw, accumulate=accumulate,
        )
        ops.attention_backward(  # (b, t, C) -> (b, t, 3C)
            dqkvr=d.dqkvr, scratch=scratch, dout=d.dl_btc, out=a.atty, qkvr=a.qkvr, att=a.att,
        )
        if model.recompute >= 2:  # (b, t, C) -> (b, t, C), as in the forward pass
            ops.layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp=residual, weight=w.ln1w, bias=w.ln1b)
        ops.matmul_backward(  # (b, t, 3C) -> (b, t, C)
            dinp=d.dl_btc, dweight=g.qkvw, dbias=g.qkvb, scratch=scratch, dout=d.dqkvr, inp=a.ln1,
            weight=w.qkvw, accumulate=accumulate,
        )
        ops.layernorm_backward(  # (b, t, C) -> added to (b, t, C)
            dinp=d.dresidual, dweight=g.ln1w, dbias=g.ln1b, scratch=scratch, dout=d.dl_btc,
            inp=residual, weight=w.ln1w, mean=a.ln1_mean, rstd=a.ln1_rstd,
        )
        if final:
            model.reduce(layer)

    ops.encoder_backward(  # (b, t, C) -> added to wte's gradient (Vp, C), which has the head's part, and wpe's
        dwte=grads.wte, dwpe=grads.wpe, scratch=model.scratch.i32, dout=d.dresidual, inp=acts.inputs,
        seed=model.scratch.encoder_seed,
    )
    if final:
        model.finish_reduction()
# fmt: on
