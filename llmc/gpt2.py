"""GPT-2: its sizes, its tensors, and every forward and backward call by hand. Read this file first.

There is no autograd and there are no modules. ``forward`` and ``backward`` are flat lists of op calls over named views
into flat buffers, in the order llm.c has them (train_gpt2.cu), with its tensor names:

    w   weights of one layer       params.h[l].qkvw ...     (checkpoint order, so that a checkpoint is one copy)
    g   their gradients            grads.h[l].qkvw ...
    a   activations of one layer   acts.h[l].atty ...

``ops`` is one of two plain modules with the same functions: llmc.cuda (kernels) or llmc.cpu (NumPy and BLAS).

Shapes: B batch, T positions, C channels, NH heads, L layers, V vocabulary, Vp vocabulary padded to a multiple of 128.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from llmc.errors import UserError
from llmc.parallel import zero

from . import rand
from .buffers import TensorSpec, carve, offsets, plan

ALIGN = 256  # bytes: rows of the activation buffer start at multiples of it


@dataclass(frozen=True)
class GPT2Config:
    """The six numbers of llm.c's GPT2Config, which are also the header of a model file."""

    max_seq_len: int = 1024
    vocab_size: int = 50257
    padded_vocab_size: int = 50304
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768

    def __post_init__(self):
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


def config_from_descriptor(descriptor, vocab_size=50257, tiny_seq_len=None):
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
        raise UserError(f"-e {descriptor}: no such model descriptor, nor a .bin file. HINT: known are {DESCRIPTORS}.")
    return GPT2Config(maxT, vocab_size, -(-vocab_size // 128) * 128, L, NH, C)


def config_from_header(header):
    """The GPT2Config of a model file; header is model_file.read_model_header's dict."""
    return GPT2Config(*(header[field] for field in GPT2Config.__dataclass_fields__))


# ----------------------------------------------------------------------------------------------------------------------
# the tensors


def parameter_specs(config):
    """The 16 parameter tensors, in the order of llm.c's checkpoint. Matrices are (out_features, in_features)."""
    Vp, maxT, L, C = config.padded_vocab_size, config.max_seq_len, config.num_layers, config.channels
    return [
        TensorSpec("wte", (Vp, C), "X", 0, "normal", True),  # rows V..Vp are zero, and stay zero
        TensorSpec("wpe", (maxT, C), "X", 0, "normal", True),
        TensorSpec("ln1w", (C,), "X", L, "ones"),
        TensorSpec("ln1b", (C,), "X", L),
        TensorSpec("qkvw", (3 * C, C), "X", L, "normal", True),
        TensorSpec("qkvb", (3 * C,), "X", L),
        TensorSpec("attprojw", (C, C), "X", L, "residual", True),
        TensorSpec("attprojb", (C,), "X", L),
        TensorSpec("ln2w", (C,), "X", L, "ones"),
        TensorSpec("ln2b", (C,), "X", L),
        TensorSpec("fcw", (4 * C, C), "X", L, "normal", True),
        TensorSpec("fcb", (4 * C,), "X", L),
        TensorSpec("fcprojw", (C, 4 * C), "X", L, "residual", True),
        TensorSpec("fcprojb", (C,), "X", L),
        TensorSpec("lnfw", (C,), "X", 0, "ones"),
        TensorSpec("lnfb", (C,), "X", 0),
    ]


# Positions whose logits are in memory at once. A larger micro-batch goes through the classifier in pieces, forward and
# backward, one after another: the logits would be the largest tensor by far (6.6 GB at 64 x 1024 in bf16). A number of
# rows that Hopper's matmul makes dlnf of in whole rounds: 132 x 4 tiles are four for each of 132 multiprocessors. Half
# as many rows save 0.8 GiB and take 1.5 of 98 ms more: dwte, which all pieces add to, is read and written for each.
HEAD_ROWS = 132 * 128


def pieces(positions):
    """Slices of up to HEAD_ROWS positions."""
    return [slice(i, min(i + HEAD_ROWS, positions)) for i in range(0, positions, HEAD_ROWS)]


def rows(array, piece):
    """A slice of the positions of a (b, t, ...) array, as (1, rows, ...); of all of them, the array."""
    flat = array.reshape(1, -1, *array.shape[2:])
    return array if flat.shape[1] == piece.stop - piece.start else flat[:, piece]


def activation_specs(config, B, T, recompute, training=True):
    """The activations of a micro-batch. recompute 0 keeps all, 1 recomputes GELU in backward, 2 also the layernorms.

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
        TensorSpec("residual3", (B, T, C), "X", L),  # the last layer's becomes scratch (dl_btc) in backward
        TensorSpec("lnf", (B, T, C)),
        TensorSpec("lnf_mean", (B, T), "f32"),
        TensorSpec("lnf_rstd", (B, T), "f32"),
        TensorSpec("losses", (B, T), "f32"),
        TensorSpec("output", (B, T, Vp) if B * T <= HEAD_ROWS else (1, HEAD_ROWS, Vp)),  # logits, then dlogits
        TensorSpec("scratch_btc", (B, T, C)),  # forward: input of a residual add; backward: dresidual
        TensorSpec("scratch_bt4c", (B, T, 4 * C)),  # backward: dlnf, dfch, dqkvr
    ]


def scratch_specs(config, ops, B, T):
    """What the ops want as scratch, and the small arrays that a step reads its scalars from."""
    Vp, NH, C = config.padded_vocab_size, config.num_heads, config.channels
    N = num_parameters(config)
    shapes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    last = B * T % HEAD_ROWS or min(B * T, HEAD_ROWS)  # positions of the classifier's last piece, and of the others
    scratch = max(
        ops.layernorm_scratch_size(B, T, C),
        ops.attention_scratch_size(B, T, C, NH),
        ops.global_norm_scratch_size(max(N, B * T)),  # of the gradients, of the losses
        *(ops.matmul_scratch_size(B, T, c, oc) for c, oc in shapes),
        *(ops.matmul_scratch_size(1, positions, C, Vp) for positions in (last, min(B * T, HEAD_ROWS))),
    )
    return [
        TensorSpec("f32", (scratch,), "f32"),
        TensorSpec("i32", (ops.encoder_scratch_size(B, T, C, Vp),), "i32"),
        TensorSpec("norm_squared", (2,), "f32"),  # of the gradients times the loss scale, and of the losses
        TensorSpec("hyper", (4,), "f32"),  # learning rate, 1 - beta1^t, 1 - beta2^t, 1 / loss scale
        TensorSpec("ends", (16,), "i64"),  # where each of the 16 tensors ends in the flat parameters
        TensorSpec("decays", (16,), "f32"),
        TensorSpec("seeds", (16,), "u32"),
        TensorSpec("encoder_seed", (1,), "u32"),
    ]


OUTSIDE = ("wte", "wpe", "lnfw", "lnfb")  # the tensors that belong to no layer


def num_parameters(config):
    """The padded parameter count N, as llm.c prints it and counts its FLOPs with."""
    return sum(spec.size for spec in parameter_specs(config))


def flops_per_token(config, T):
    """6 N + 6 L C T: forward and backward matmuls, and causal attention (llm.c train_gpt2.cu gpt2_estimate_mfu)."""
    return 6 * num_parameters(config) + 6 * config.num_layers * config.channels * T


def memory_plan(
    config, ops, B, T, recompute=1, dtype="float32", training=True, use_master_weights=True, grad_dtype=None,
    shards=1,
):  # fmt: skip
    """[(title, specs, align, bytes)] for each buffer that GPT2(...) allocates with the same arguments."""
    parameters, activations = parameter_specs(config), activation_specs(config, B, T, recompute, training)
    scratch = scratch_specs(config, ops, B, T)
    gradients = [spec._replace(dtype="f32") for spec in parameters] if grad_dtype == "float32" else parameters
    master = use_master_weights and np.dtype(dtype) != np.float32  # fp32 weights are their own master
    state = ("m", "v", "master") if master else ("m", "v")
    optimizer = [TensorSpec(name, (num_parameters(config) // shards,), "f32") for name in state]
    plans = [("parameters", parameters, 1)]
    if training:
        plans += [("gradients", gradients, 1), ("optimizer", optimizer, 1)]
    if training and shards > 1:
        plans += [("share", zero.share_specs(parameters, shards, gradients[0].dtype), ALIGN)]
    plans += [("activations", activations, ALIGN), ("scratch", scratch, ALIGN)]
    return [(title, specs, align, offsets(specs, dtype, align)[1]) for title, specs, align in plans]


def format_plan(plans, dtype="float32"):
    """The memory plan as text: a line a tensor with its bytes, a total a buffer, and the grand total."""
    lines = ["memory plan"]
    for title, specs, align, _ in plans:
        rows = plan(title, specs, dtype, align)
        if title == "gradients":  # the same rows again would only hide the others
            rows = [rows[-1].replace(f"{title:<50}", f"{'gradients (tensor by tensor as the parameters)':<50}")]
        lines += rows
    total = sum(nbytes for *_, nbytes in plans)
    return "\n".join([*lines, f"  {'total':<50}{total:>16,} bytes = {total / 2**20:,.1f} MiB"])


# ----------------------------------------------------------------------------------------------------------------------
# the model


class GPT2:
    """Buffers and the three passes. Nothing is allocated on the device after __init__.

    dtype is the precision of parameters, activations and gradients: float32, or on a GPU also float16 and bfloat16.
    grad_dtype "float32" is for gradients that micro-steps add to without rounding; None: that of the model.
    use_master_weights=False: AdamW updates the parameters themselves, in bfloat16 by stochastic rounding.
    training=False leaves out gradients and optimizer state, and keeps the activations of one layer. graphs=True replays
    the passes over a full batch as CUDA graphs: the same launches, without their cost on the host.
    ranks: distributed.Mpi or Nccl, over which gradients are summed; None for one process. shards: 1, or with ZeRO-1 the
    number of ranks: m, v and master are then this rank's share, see zero.py.
    """

    def __init__(
        self, config, ops, B, T, recompute=1, training=True, dtype="float32", graphs=False, use_master_weights=True,
        grad_dtype=None, ranks=None, shards=1,
    ):  # fmt: skip
        if not 0 < T <= config.max_seq_len:
            raise UserError(f"-t {T}: the model has positions for 1 to {config.max_seq_len} tokens. HINT: lower -t.")
        self.config, self.ops, self.B, self.T, self.recompute, self.training = config, ops, B, T, recompute, training
        self.dtype = np.dtype(dtype)
        L = config.num_layers
        buffers = {}
        precision = (use_master_weights, grad_dtype, shards)
        for title, specs, align, nbytes in memory_plan(config, ops, B, T, recompute, self.dtype, training, *precision):
            buffers[title] = (ops.device.alloc(nbytes), specs, align)

        def views(title):
            flat, specs, align = buffers[title]
            return carve(flat, specs, L, self.dtype, align)

        self.params, self.params_flat = views("parameters"), buffers["parameters"][0].view(self.dtype)
        self.master = None
        if training:
            self.grads, self.grads_flat = views("gradients"), buffers["gradients"][0].view(grad_dtype or self.dtype)
            optimizer = views("optimizer")
            self.m, self.v, self.master = optimizer.m, optimizer.v, getattr(optimizer, "master", None)
        self.acts_flat = buffers["activations"][0]
        self.scratch = views("scratch")
        self.views = {}  # (b, t) -> activation views; smaller batches (validation tails, sampling) use the same memory
        self.acts = self.activations(B, T)
        ends = np.cumsum([spec.size for spec in parameter_specs(config)], dtype=np.int64)
        ops.device.upload(self.scratch.ends, ends)
        self.ranks, self.rank, self.num_ranks = ranks, ranks.rank if ranks else 0, ranks.size if ranks else 1
        self.share = None
        if training and shards > 1:
            self.share = zero.Share(parameter_specs(config), self.rank, shards, views("share"), ops.device)
        self.rng_state = 13371337  # of the stochastic-rounding seeds, as in llm.c; on all ranks the same
        self.rng_state_last_update = self.rng_state
        self.loss_scale = 1.0  # the gradients are this many times too large: a power of 2, so that no bit is lost
        self.graphs = {} if graphs else None  # what is replayed, by pass and arguments

    def activations(self, b, t):
        """Views of the activations for a batch of b rows of t tokens, b*t <= B*T and t <= T."""
        if (b, t) not in self.views:
            specs = activation_specs(self.config, b, t, self.recompute, self.training)
            self.views[b, t] = carve(self.acts_flat, specs, self.config.num_layers, self.dtype, ALIGN)
        return self.views[b, t]

    def host_parameters(self):
        """A flat fp32 NumPy array to put weights into, for load_parameters; on a CPU the parameters themselves."""
        on_host = isinstance(self.params_flat, np.ndarray) and self.dtype == np.float32
        return self.params_flat if on_host else np.zeros(self.params_flat.size, np.float32)

    def load_parameters(self, host):
        """Parameters = host (N,), rounded to nearest where it is finer; master weights = the rounded values."""
        rounded = host.astype(self.dtype, copy=False)
        if host is not self.params_flat:
            self.ops.device.upload(self.params_flat, rounded)
        if self.share:
            rounded = self.share.of(rounded)
            self.ops.device.upload(self.share.params, rounded)
        if self.master is not None:
            self.ops.device.upload(self.master, rounded.astype(np.float32))

    def init_weights(self, seed=42):
        """Fresh weights, the same bits as llm.c for a seed: wte, wpe, then layer by layer, drawn from one MT19937."""
        config, mt, f32 = self.config, rand.MT19937(seed), np.float32  # std too is llm.c's float, to the last bit
        std = {"normal": f32(0.02), "residual": f32(0.02) * (f32(1) / np.sqrt(f32(2 * config.num_layers)))}
        specs, host = parameter_specs(config), self.host_parameters()
        params = carve(host.view(np.uint8), specs, config.num_layers, np.float32)
        for spec in specs:
            getattr(params, spec.name).fill(1.0 if spec.init == "ones" else 0.0)
        drawn = [(params.wte[: config.vocab_size], "normal"), (params.wpe, "normal")]
        drawn += [(getattr(w, s.name), s.init) for w in params.h for s in specs if s.layers and s.init in std]
        rand.normals_([(array, 0.0, std[init]) for array, init in drawn], mt)
        self.load_parameters(host)

    def run(self, passes, shape, *args):
        """passes(*args), or its graph: the first call of a kind launches, the second is captured, later ones replay."""
        if self.graphs is None or shape != (self.B, self.T):
            return passes(*args)
        key = (passes.__name__, args)
        if key not in self.graphs:
            self.graphs[key] = None
            return passes(*args)  # compiles what is not compiled yet, which no capture could do
        if self.graphs[key] is None:
            self.graphs[key] = self.ops.device.capture(lambda: passes(*args))
        self.graphs[key]()

    def forward(self, inputs):
        """Logits acts.output (b, t, Vp) for token ids inputs (b, t) i32 on the host. Returns the activations used.

        For more than HEAD_ROWS positions there are no logits yet: what reads them makes them piece by piece.
        """
        acts = self.activations(*inputs.shape)
        self.ops.device.upload(acts.inputs, inputs)
        self.run(self.forward_pass, inputs.shape, *inputs.shape)
        return acts

    def forward_pass(self, b, t):
        """Every forward call, for the tokens in acts.inputs."""
        ops, acts, params = self.ops, self.activations(b, t), self.params
        ops.encoder_forward(acts.encoded, acts.inputs, params.wte, params.wpe)
        w, a = params.h[0], acts.h[0]
        ops.layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, acts.encoded, w.ln1w, w.ln1b)
        residual, x = acts.encoded, acts.scratch_btc
        for w, a, next_w, next_a in zip(params.h, acts.h, [*params.h[1:], None], [*acts.h[1:], None], strict=True):
            ops.matmul_forward(a.qkvr, a.ln1, w.qkvw, w.qkvb)
            ops.attention_forward(a.atty, a.att, a.qkvr)
            ops.matmul_forward(x, a.atty, w.attprojw, w.attprojb)
            ops.fused_residual_forward(a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, residual, x, w.ln2w, w.ln2b)
            ops.matmul_forward(a.fch_gelu, a.ln2, w.fcw, w.fcb, pre_gelu=a.fch)
            ops.matmul_forward(x, a.fch_gelu, w.fcprojw, w.fcprojb)
            if next_w is not None:  # the residual add is fused with the layernorm that follows it
                n = (next_a.ln1, next_a.ln1_mean, next_a.ln1_rstd)
                ops.fused_residual_forward(a.residual3, *n, a.residual2, x, next_w.ln1w, next_w.ln1b)
            else:
                n = (acts.lnf, acts.lnf_mean, acts.lnf_rstd)
                ops.fused_residual_forward(a.residual3, *n, a.residual2, x, params.lnfw, params.lnfb)
            residual = a.residual3
        if b * t <= HEAD_ROWS:
            ops.matmul_forward(acts.output, acts.lnf, params.wte)

    def logits(self, acts, piece):
        """The logits of a piece of the positions, made here where there is no room for those of all."""
        output = rows(acts.output, slice(0, piece.stop - piece.start))
        if acts.losses.size > HEAD_ROWS:
            self.ops.matmul_forward(output, rows(acts.lnf, piece), self.params.wte)
        return output

    def validate(self, inputs, targets):
        """Mean loss in nats over a batch. No gradient is computed or written."""
        return float(self.token_losses(inputs, targets).mean(dtype=np.float64))

    def token_losses(self, inputs, targets):
        """The loss of each token in nats, (b, t) f32 on the host. No gradient is computed or written."""
        ops, acts = self.ops, self.forward(inputs)
        ops.device.upload(acts.targets, targets)
        ops.device.zero(acts.losses)
        for piece in pieces(inputs.size):
            logits, losses, targets = self.logits(acts, piece), rows(acts.losses, piece), rows(acts.targets, piece)
            ops.fused_classifier(logits, losses, 1.0, targets, self.config.vocab_size, write_dlogits=False)
        return ops.device.download(acts.losses)

    def backward(self, inputs, targets, grad_accum_steps=1, micro_step=0):
        """Gradients of loss_scale times the mean loss over grad_accum_steps micro-batches, of which this is one.

        Call forward(inputs) with it first. The first micro-step writes the gradients (=), later ones add to them (+=).
        acts.losses likewise.
        """
        upload, seeds = self.ops.device.upload, np.empty(self.num_ranks, np.uint32)
        for i in range(self.num_ranks):  # one for each micro-batch of all ranks, so that P does not matter
            seeds[i], self.rng_state = rand.random_u32(self.rng_state)
        upload(self.scratch.encoder_seed, seeds[self.rank : self.rank + 1])
        upload(self.activations(*inputs.shape).targets, targets)
        dloss = self.loss_scale / (inputs.size * grad_accum_steps * self.num_ranks)
        final = self.ranks is not None and micro_step == grad_accum_steps - 1
        self.run(self.backward_pass, inputs.shape, *inputs.shape, dloss, micro_step > 0, final)

    def backward_pass(self, b, t, dloss, more, final=False):
        """Every backward call, from the gradient dloss of each position's loss. more: gradients accumulate.

        final: the gradients are complete but for those of other ranks, with which they are summed layer by layer,
        while the pass goes on.
        """
        ops, acts, params, grads = self.ops, self.activations(b, t), self.params, self.grads
        C, scratch = self.config.channels, self.scratch
        if not more:  # what only ever accumulates starts from zero; matmuls write their gradients outright
            ops.device.zero(acts.losses)
            for name in ("wpe", "ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb"):
                ops.device.zero(getattr(grads, name))

        dresidual = acts.scratch_btc
        dl_btc, dl_bt4c = acts.h[-1].residual3, acts.scratch_bt4c  # lnf is the last to need the last residual3
        dlnf, dqkvr = dl_bt4c.reshape(-1)[: b * t * C].reshape(b, t, C), dl_bt4c.reshape(-1)[: b * t * 3 * C]
        dqkvr = dqkvr.reshape(b, t, 3 * C)
        ops.device.zero(dresidual)
        for piece in pieces(b * t):
            logits, losses, targets = self.logits(acts, piece), rows(acts.losses, piece), rows(acts.targets, piece)
            ops.fused_classifier(logits, losses, dloss, targets, self.config.vocab_size)
            x, dx, again = rows(acts.lnf, piece), rows(dlnf, piece), more or piece.start > 0
            ops.matmul_backward(dx, grads.wte, None, scratch.f32, logits, x, params.wte, accumulate=again)
        n = (params.lnfw, acts.lnf_mean, acts.lnf_rstd)
        ops.layernorm_backward(dresidual, grads.lnfw, grads.lnfb, scratch.f32, dlnf, acts.h[-1].residual3, *n)

        residuals = [acts.encoded, *(a.residual3 for a in acts.h[:-1])]
        for layer in reversed(range(self.config.num_layers)):
            w, g, a, residual = params.h[layer], grads.h[layer], acts.h[layer], residuals[layer]
            d, again = (g.fcprojw, g.fcprojb, scratch.f32), self.recompute >= 1  # again: fch_gelu = gelu(fch)
            ops.matmul_backward(dl_bt4c, *d, dresidual, a.fch_gelu, w.fcprojw, a.fch, accumulate=more, recompute=again)
            if self.recompute >= 2:
                ops.layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, w.ln2w, w.ln2b)
            ops.matmul_backward(dl_btc, g.fcw, g.fcb, scratch.f32, dl_bt4c, a.ln2, w.fcw, accumulate=more)
            n = (w.ln2w, a.ln2_mean, a.ln2_rstd)
            ops.layernorm_backward(dresidual, g.ln2w, g.ln2b, scratch.f32, dl_btc, a.residual2, *n)
            d = (g.attprojw, g.attprojb, scratch.f32)
            ops.matmul_backward(dl_btc, *d, dresidual, a.atty, w.attprojw, accumulate=more)
            ops.attention_backward(dqkvr, scratch.f32, dl_btc, a.atty, a.qkvr, a.att)
            if self.recompute >= 2:
                ops.layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, w.ln1w, w.ln1b)
            ops.matmul_backward(dl_btc, g.qkvw, g.qkvb, scratch.f32, dqkvr, a.ln1, w.qkvw, accumulate=more)
            n = (w.ln1w, a.ln1_mean, a.ln1_rstd)
            ops.layernorm_backward(dresidual, g.ln1w, g.ln1b, scratch.f32, dl_btc, residual, *n)
            if final:
                self.reduce(layer)
        ops.encoder_backward(grads.wte, grads.wpe, scratch.i32, dresidual, acts.inputs, scratch.encoder_seed)
        if final:
            self.reduce(-1)  # wte has had both its parts by now
            self.ranks.wait()

    def reduce(self, layer):
        """Start the sum over all ranks of the gradients of a layer, of what is outside the layers for -1."""
        if self.share:
            whole, shares = self.share.pairs(self.grads_flat, self.share.grads, layer)
            self.ranks.reduce_scatter(shares, whole)
        else:
            tensors = vars(self.grads.h[layer]) if layer >= 0 else {n: getattr(self.grads, n) for n in OUTSIDE}
            self.ranks.all_reduce([tensor.reshape(-1) for tensor in tensors.values()])

    def mean_loss(self, grad_accum_steps=1):
        """Mean loss in nats of the micro-batches since the last micro_step 0, on all ranks."""
        loss = float(self.ops.device.download(self.acts.losses).mean(dtype=np.float64)) / grad_accum_steps
        return self.ranks.sums([loss])[0] / self.num_ranks if self.ranks else loss

    def round_master(self):
        """Parameters = the master weights, rounded with the noise of the last update (llm.c gpt2_build_from_state)."""
        rng_state, seeds = self.rng_state_last_update, np.empty(16, np.uint32)
        for i in range(16):
            seeds[i], rng_state = rand.random_u32(rng_state)
        if self.share:
            self.share.set_tables(seeds, 0.0)
            for arenas, (ends, _, row_seeds) in self.share.calls(self.share.params, self.master):
                self.ops.init_from_master(*arenas, ends, row_seeds)
            self.gather()
        else:
            self.ops.device.upload(self.scratch.seeds, seeds)
            self.ops.init_from_master(self.params_flat, self.master, self.scratch.ends, self.scratch.seeds)

    def gather(self):
        """Parameters = the shares of all ranks."""
        self.ranks.all_gather(*self.share.pairs(self.params_flat, self.share.params))
        self.ranks.wait()

    def update(self, learning_rate, beta1, beta2, eps, weight_decay, grad_clip, t):
        """One AdamW step on all parameters; t counts updates from 1. Without finite norm and loss it does nothing."""
        upload, scratch = self.ops.device.upload, self.scratch
        self.rng_state_last_update = self.rng_state
        seeds = np.empty(16, np.uint32)
        for i in range(16):
            seeds[i], self.rng_state = rand.random_u32(self.rng_state)
        decays = [weight_decay if spec.decay else 0.0 for spec in parameter_specs(self.config)]
        if self.share:
            self.share.set_tables(seeds, weight_decay)
        upload(scratch.seeds, seeds)
        upload(scratch.decays, np.array(decays, np.float32))
        hyper = [learning_rate, 1.0 - beta1**t, 1.0 - beta2**t, 1.0 / self.loss_scale]
        upload(scratch.hyper, np.array(hyper, np.float32))
        self.run(self.update_pass, (self.B, self.T), beta1, beta2, eps, grad_clip)

    def update_pass(self, beta1, beta2, eps, grad_clip):
        """The norms, then AdamW with the gradients clipped by theirs."""
        self.norm_pass()
        ops, scratch = self.ops, self.scratch
        scalars = (scratch.hyper, scratch.norm_squared, beta1, beta2, eps, grad_clip)
        if self.share:
            for arenas, tables in self.share.calls(self.share.params, self.master, self.share.grads, self.m, self.v):
                ops.adamw_update(*arenas, *tables, *scalars)
            self.gather()
        else:
            arenas = (self.params_flat, self.master, self.grads_flat, self.m, self.v)
            ops.adamw_update(*arenas, scratch.ends, scratch.decays, scratch.seeds, *scalars)

    def norm_pass(self):
        """The norms of the gradients and of the losses, those of all ranks."""
        ops, scratch = self.ops, self.scratch
        grads = self.share.grads if self.share else self.grads_flat
        ops.global_norm_squared(scratch.norm_squared[:1], scratch.f32, grads)
        ops.global_norm_squared(scratch.norm_squared[1:], scratch.f32, self.acts.losses.reshape(-1))
        if self.ranks:  # summed gradients are the same everywhere, shares of them are not
            self.ranks.all_reduce([scratch.norm_squared if self.share else scratch.norm_squared[1:]])
            self.ranks.wait()

    def measure_norm(self):
        """Find grad_norm() without an update, for a caller that decides by it whether to update."""
        self.run(self.norm_pass, (self.B, self.T))

    def grad_norm(self):
        """The L2 norm of all gradients, before clipping, as the last update() or measure_norm() found it."""
        return math.sqrt(self.ops.device.download(self.scratch.norm_squared)[0]) / self.loss_scale
