"""What every architecture shares: buffers, the passes over a batch, norms, AdamW's update, sums over ranks.

The architecture is a plain module, as the op set is: Model(gpt2, ops, config, B, T) calls its functions by name, and
llmc/gpt2.py, where the forward and backward passes stand, is the file to read first. A module of an architecture has

    parameter_specs(config)                                     its tables: see llmc/buffers.py
    activation_specs(config, B, T, recompute, training)
    scratch_sizes(config, ops, B, T)                            scratch that its ops want
    init_weights(config, params, seed)                          fresh weights, on the host
    head(params)                                                the weight of the last matmul, which makes the logits
    forward_pass(model, b, t)                                   every forward call
    backward_pass(model, b, t, dloss, accumulate, final)        every backward call
    gradient_views(acts)                                        where it keeps gradients of activations, by name

and its config has max_seq_len, vocab_size and num_layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from . import rand
from .buffers import Array, TensorSpec, Views, carve, offsets, plan
from .errors import UserError

ALIGN = 256  # bytes: rows of the activation buffer start at multiples of it

# Positions whose logits are in memory at once. A larger micro-batch goes through the classifier in pieces, forward and
# backward, one after another: the logits would be the largest tensor by far (6.6 GB at 64 x 1024 in bf16). For this
# number of rows Hopper's matmul makes dlnf in whole rounds: 132 x 4 tiles are four for each of 132 multiprocessors.
# Half as many rows save 0.8 GiB, but dwte, which all pieces add to, is then read and written twice as often: the step
# takes 1.5 of 98 ms more.
HEAD_ROWS = 132 * 128


def pieces(positions: int) -> list[slice]:
    """The slices of up to HEAD_ROWS positions that the classifier takes one after another."""
    return [slice(i, min(i + HEAD_ROWS, positions)) for i in range(0, positions, HEAD_ROWS)]


def piece_sizes(positions: int) -> set[int]:
    """The numbers of positions in pieces(positions): those of the last one, and of all others."""
    return {min(positions, HEAD_ROWS), (positions - 1) % HEAD_ROWS + 1}


def head_shape(B: int, T: int) -> tuple[int, int]:
    """Batch and positions of the logits that a batch B x T has in memory: its own, or those of one piece."""
    return (B, T) if B * T <= HEAD_ROWS else (1, HEAD_ROWS)


def rows(array: Array, piece: slice) -> Array:
    """A slice of the positions of a (b, t, ...) array, as (1, rows, ...); the array itself if it is of all of them."""
    flat = array.reshape(1, -1, *array.shape[2:])
    return array if flat.shape[1] == piece.stop - piece.start else flat[:, piece]


# ----------------------------------------------------------------------------------------------------------------------
# the memory plan


class Buffer(NamedTuple):
    """One allocation: its rows, what they start at multiples of, and its bytes."""

    title: str
    specs: list[TensorSpec]
    align: int
    nbytes: int


def scratch_specs(arch: ModuleType, ops: ModuleType, config: Any, B: int, T: int) -> list[TensorSpec]:
    """What the ops want as scratch, and the small arrays that a step reads its scalars from."""
    specs = arch.parameter_specs(config)
    N, tensors = sum(spec.size for spec in specs), (len(specs),)
    f32, i32 = arch.scratch_sizes(config, ops, B, T)
    return [
        TensorSpec("f32", (max(f32, ops.global_norm_scratch_size(max(N, B * T))),), "f32"),
        TensorSpec("i32", (i32,), "i32"),
        TensorSpec("norm_squared", (2,), "f32"),  # of the gradients times the loss scale, and of the losses
        TensorSpec("hyper", (4,), "f32"),  # learning rate, 1 - beta1^t, 1 - beta2^t, 1 / loss scale
        TensorSpec("ends", tensors, "i64"),  # where each parameter tensor ends in the flat parameters
        TensorSpec("decays", tensors, "f32"),
        TensorSpec("seeds", tensors, "u32"),
        TensorSpec("encoder_seed", (1,), "u32"),
    ]


def memory_plan(
    arch: ModuleType, ops: ModuleType, config: Any, B: int, T: int, *, recompute: int = 1, training: bool = True,
    dtype: DTypeLike = "float32", use_master_weights: bool = True, grad_dtype: DTypeLike | None = None,
    partition: Any = None,
) -> list[Buffer]:  # fmt: skip
    """The buffers that Model(...) allocates with the same arguments, to the byte."""
    parameters = arch.parameter_specs(config)
    activations = arch.activation_specs(config, B, T, recompute, training)
    scratch = scratch_specs(arch, ops, config, B, T)
    letter = "f32" if grad_dtype == "float32" else "X"
    master = use_master_weights and np.dtype(dtype) != np.float32  # fp32 weights are their own master
    elements = partition.size if partition else sum(spec.size for spec in parameters)
    optimizer = [TensorSpec(name, (elements,), "f32") for name in (("m", "v", "master") if master else ("m", "v"))]
    plans = [("parameters", parameters, 1)]
    if training:
        plans += [("gradients", [spec._replace(dtype=letter) for spec in parameters], 1), ("optimizer", optimizer, 1)]
    if training and partition:
        plans += [("share", partition.specs(letter), ALIGN)]
    plans += [("activations", activations, ALIGN), ("scratch", scratch, ALIGN)]
    return [Buffer(title, specs, align, offsets(specs, dtype, align)[1]) for title, specs, align in plans]


def format_plan(plans: list[Buffer], dtype: DTypeLike = "float32") -> str:
    """The memory plan as text: a line a tensor with its bytes, a total a buffer, and the grand total."""
    lines = ["memory plan"]
    for title, specs, align, _ in plans:
        table = plan(title, specs, dtype, align)
        if title == "gradients":  # the same rows again would only hide the others
            table = [table[-1].replace(f"{title:<50}", f"{'gradients (tensor by tensor as the parameters)':<50}")]
        lines += table
    total = sum(buffer.nbytes for buffer in plans)
    return "\n".join([*lines, f"  {'total':<50}{total:>16,} bytes = {total / 2**20:,.1f} MiB"])


# ----------------------------------------------------------------------------------------------------------------------
# the model


@dataclass(frozen=True)
class AdamW:
    """The numbers of AdamW; they have no state, which the model holds (m, v, master)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices and embeddings alone: the rows of parameter_specs that say so
    grad_clip: float = 1.0  # the gradients' norm after clipping; 0 for no clipping


class Model:
    """Buffers and the passes over them. Nothing is allocated on the device after __init__.

    arch, ops: the modules of the architecture (llmc.gpt2) and of the op set (llmc.cpu, llmc.cuda).
    B, T: the largest batch, B rows of T tokens; smaller ones use the same memory.
    recompute: 0 keeps all activations for backward, 1 makes GELU again there, 2 also the layernorms.
    training=False leaves out gradients and optimizer state, and keeps the activations of one layer.
    dtype: the precision of parameters, activations and gradients: float32, on a GPU also float16 and bfloat16.
    graphs=True replays the passes over a full batch as CUDA graphs: the same launches, without their cost on the host.
    use_master_weights=False: AdamW updates the parameters themselves, in bfloat16 by stochastic rounding.
    grad_dtype "float32" is for gradients that micro-steps add to without rounding; None: that of the model.
    ranks: parallel.communicators.Mpi or Nccl, over which gradients are summed; None for one process.
    partition: parallel.zero.partition's cut of AdamW's state over the ranks; None: each rank has all of it.
    Errors: UserError where the model has no positions for T tokens.
    """

    def __init__(
        self, arch: ModuleType, ops: ModuleType, config: Any, B: int, T: int, *, recompute: int = 1,
        training: bool = True, dtype: DTypeLike = "float32", graphs: bool = False, use_master_weights: bool = True,
        grad_dtype: DTypeLike | None = None, ranks: Any = None, partition: Any = None,
    ) -> None:  # fmt: skip
        if not 0 < T <= config.max_seq_len:
            raise UserError(f"-t {T}: the model has positions for 1 to {config.max_seq_len} tokens. HINT: lower -t.")
        self.arch, self.config, self.B, self.T = arch, config, B, T
        self.ops: Any = ops  # a module, or what stands in for one to watch its calls
        self.recompute, self.training, self.dtype = recompute, training, np.dtype(dtype)
        self.specs: list[TensorSpec] = arch.parameter_specs(config)
        buffers = {}
        for title, specs, align, nbytes in memory_plan(
            arch, ops, config, B, T, recompute=recompute, training=training, dtype=dtype,
            use_master_weights=use_master_weights, grad_dtype=grad_dtype, partition=partition,
        ):  # fmt: skip
            buffers[title] = (ops.device.alloc(nbytes), specs, align)

        def views(title: str) -> Views:
            flat, specs, align = buffers[title]
            return carve(flat, specs, config.num_layers, self.dtype, align)

        self.params, self.params_flat = views("parameters"), buffers["parameters"][0].view(self.dtype)
        self.master: Array = None
        if training:
            self.grads, self.grads_flat = views("gradients"), buffers["gradients"][0].view(grad_dtype or self.dtype)
            optimizer = views("optimizer")
            self.m, self.v, self.master = optimizer.m, optimizer.v, getattr(optimizer, "master", None)
        self.acts_flat, self.scratch = buffers["activations"][0], views("scratch")
        self.views: dict[tuple[int, int], Views] = {}  # (b, t) -> the activations of such a batch
        self.acts = self.activations(B, T)
        ops.device.upload(self.scratch.ends, np.cumsum([spec.size for spec in self.specs], dtype=np.int64))
        self.ranks, self.rank, self.num_ranks = ranks, ranks.rank if ranks else 0, ranks.size if ranks else 1
        self.partition: Any = partition if training else None
        self.share: Any = None  # with a partition: this rank's part of parameters and gradients, see parallel/zero.py
        if self.partition:
            self.share = views("share")
            ops.device.upload(self.share.ends, self.partition.ends())
        self.rng_state = 13371337  # of the stochastic-rounding seeds, as in llm.c; on all ranks the same
        self.rng_state_last_update = self.rng_state
        self.loss_scale = 1.0  # the gradients are this many times too large: a power of 2, so that no bit is lost
        self.steps = 0  # the t of the last update
        self.graphs: dict[tuple[str, tuple], Callable[[], None] | None] | None = {} if graphs else None  # see run()

    def __repr__(self) -> str:
        N, use = sum(spec.size for spec in self.specs), "training" if self.training else "forward passes alone"
        return (
            f"<{self.config}, {N:,} parameters in {self.dtype.name}, for B x T = {self.B} x {self.T} tokens and {use}, "
            f"by {self.ops.__name__} on {self.ops.device.describe()}>"
        )

    def activations(self, b: int, t: int) -> Views:
        """Views of the activations for a batch of b rows of t tokens, b*t <= B*T and t <= T."""
        if (b, t) not in self.views:
            specs = self.arch.activation_specs(self.config, b, t, self.recompute, self.training)
            self.views[b, t] = carve(self.acts_flat, specs, self.config.num_layers, self.dtype, ALIGN)
        return self.views[b, t]

    # ------------------------------------------------------------------------------------------------------------------
    # weights

    def host_parameters(self) -> np.ndarray:
        """A flat fp32 NumPy array to put weights into, for load_parameters; on a CPU the parameters themselves."""
        on_host = isinstance(self.params_flat, np.ndarray) and self.dtype == np.float32
        return self.params_flat if on_host else np.zeros(self.params_flat.size, np.float32)

    def load_parameters(self, host: np.ndarray) -> None:
        """Parameters = host (N,), rounded to nearest where it is finer; master weights = the rounded values."""
        rounded = host.astype(self.dtype, copy=False)
        if host is not self.params_flat:
            self.ops.device.upload(self.params_flat, rounded)
        if self.partition:
            rounded = self.partition.of(rounded)
            self.ops.device.upload(self.share.params, rounded)
        if self.master is not None:
            self.ops.device.upload(self.master, rounded.astype(np.float32))

    def init_weights(self, seed: int = 42) -> None:
        """Fresh weights, the same bits as llm.c for a seed."""
        host = self.host_parameters()
        params = carve(host.view(np.uint8), self.specs, self.config.num_layers, np.float32)
        self.arch.init_weights(self.config, params, seed)
        self.load_parameters(host)

    def round_master(self) -> None:
        """Parameters = the master weights, rounded with the noise of the last update (llm.c gpt2_build_from_state)."""
        seeds, _ = self.draw_seeds(self.rng_state_last_update)
        if self.partition:
            self.ops.device.upload(self.share.seeds, self.partition.seeds(seeds))
            for arenas, (ends, _, row_seeds) in self.partition.calls(self.share, self.share.params, self.master):
                self.ops.init_from_master(*arenas, ends, row_seeds)
            self.gather()
        else:
            self.ops.device.upload(self.scratch.seeds, seeds)
            self.ops.init_from_master(self.params_flat, self.master, self.scratch.ends, self.scratch.seeds)

    def draw_seeds(self, rng_state: int) -> tuple[np.ndarray, int]:
        """(the seed of the rounding noise of each parameter tensor, u32; the state of the generator after them)."""
        seeds = np.empty(len(self.specs), np.uint32)
        for i in range(len(seeds)):
            seeds[i], rng_state = rand.random_u32(rng_state)
        return seeds, rng_state

    def gather(self) -> None:
        """Parameters = the shares of all ranks."""
        self.ranks.all_gather(*self.partition.pairs(self.params_flat, self.share.params))
        self.ranks.wait()

    # ------------------------------------------------------------------------------------------------------------------
    # passes

    def step(self, inputs: np.ndarray, targets: np.ndarray, adamw: AdamW) -> float:
        """One update over a batch, or over M micro-batches whose gradients add up. Returns their mean loss in nats.

        inputs, targets: token ids on the host, (B, T) or (M, B, T). The t of AdamW's bias correction is counted here.
        Errors: UserError for arrays of another shape, or ids that the vocabulary does not have.
        """
        inputs, targets = np.asarray(inputs), np.asarray(targets)
        if inputs.ndim == 2:
            inputs, targets = inputs[None], targets[None]
        if not (inputs.shape == targets.shape and inputs.ndim == 3 and inputs.shape[1:] == (self.B, self.T)):
            raise UserError(
                f"step() of inputs {inputs.shape}, targets {targets.shape}: the model was made for B x T = "
                f"{self.B} x {self.T} tokens. HINT: give (B, T) or (M, B, T) token ids."
            )
        for name, ids in (("inputs", inputs), ("targets", targets)):
            if ids.size == 0 or ids.min() < 0 or ids.max() >= self.config.vocab_size:
                known = f"the vocabulary has the ids 0 to {self.config.vocab_size - 1}"
                raise UserError(f"step(): {name} has other token ids: {known}. HINT: check the tokenizer.")
        inputs, targets = inputs.astype(np.int32, copy=False), targets.astype(np.int32, copy=False)
        for micro_step, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            self.forward(x)
            self.backward(x, y, len(inputs), micro_step)
        self.update(adamw, self.steps + 1)
        return self.mean_loss(len(inputs))

    def run(self, passes: Callable[..., None], shape: tuple[int, ...], *args: Any) -> None:
        """passes(self, *args), or its graph: the first call launches, the second is captured, later ones replay."""
        if self.graphs is None or shape != (self.B, self.T):
            return passes(self, *args)
        key = (passes.__name__, args)
        if key not in self.graphs:
            self.graphs[key] = None
            return passes(self, *args)  # compiles what is not compiled yet, which no capture could do
        replay = self.graphs[key] or self.ops.device.capture(lambda: passes(self, *args))
        self.graphs[key] = replay
        replay()

    def forward(self, inputs: np.ndarray) -> Views:
        """Logits acts.output (b, t, Vp) for token ids inputs (b, t) i32 on the host. Returns the activations used.

        For more than HEAD_ROWS positions there are no logits yet: what reads them makes them piece by piece.
        """
        acts = self.activations(*inputs.shape)
        self.ops.device.upload(acts.inputs, inputs)
        self.run(self.arch.forward_pass, inputs.shape, *inputs.shape)
        return acts

    def logits(self, acts: Views, piece: slice) -> Array:
        """The logits (1, rows, Vp) of a piece of the positions, made here where there is no room for those of all."""
        output = rows(acts.output, slice(0, piece.stop - piece.start))
        if len(pieces(acts.losses.size)) > 1:
            self.ops.matmul_forward(output, rows(acts.lnf, piece), self.arch.head(self.params))
        return output

    def validate(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """Mean loss in nats over a batch. No gradient is computed or written."""
        return float(self.token_losses(inputs, targets).mean(dtype=np.float64))

    def token_losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The loss of each token in nats, (b, t) f32 on the host. No gradient is computed or written."""
        ops, acts = self.ops, self.forward(inputs)
        ops.device.upload(acts.targets, targets)
        ops.device.zero(acts.losses)
        for piece in pieces(inputs.size):
            logits, losses, ids = self.logits(acts, piece), rows(acts.losses, piece), rows(acts.targets, piece)
            ops.fused_classifier(logits, losses, 1.0, ids, self.config.vocab_size, write_dlogits=False)
        return ops.device.download(acts.losses)

    def backward(
        self, inputs: np.ndarray, targets: np.ndarray, grad_accum_steps: int = 1, micro_step: int = 0
    ) -> None:  # fmt: skip
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
        self.run(self.arch.backward_pass, inputs.shape, *inputs.shape, dloss, micro_step > 0, final)

    def zero_accumulated(self, acts: Views) -> None:
        """Zero what the ops only ever add to: the losses, and the gradients that parameter_specs says so of."""
        self.ops.device.zero(acts.losses)
        for spec in self.specs:
            if spec.accumulated:
                self.ops.device.zero(getattr(self.grads, spec.name))

    def mean_loss(self, grad_accum_steps: int = 1) -> float:
        """Mean loss in nats of the micro-batches since the last micro_step 0, on all ranks."""
        loss = float(self.ops.device.download(self.acts.losses).mean(dtype=np.float64)) / grad_accum_steps
        return self.ranks.sums([loss])[0] / self.num_ranks if self.ranks else loss

    # ------------------------------------------------------------------------------------------------------------------
    # sums over ranks, which backward_pass starts layer by layer while it goes on

    def reduce(self, layer: int) -> None:
        """Start the sum over all ranks of the gradients of a layer; for -1, of the tensors that belong to no layer."""
        if self.partition:
            whole, shares = self.partition.pairs(self.grads_flat, self.share.grads, layer)
            self.ranks.reduce_scatter(shares, whole)
        else:
            views = self.grads if layer < 0 else self.grads.h[layer]
            names = [spec.name for spec in self.specs if (spec.layers == 0) == (layer < 0)]
            self.ranks.all_reduce([getattr(views, name).reshape(-1) for name in names])

    def finish_reduction(self) -> None:
        """Sum what belongs to no layer, too, and wait for all sums."""
        self.reduce(-1)
        self.ranks.wait()

    # ------------------------------------------------------------------------------------------------------------------
    # the update

    def update(self, adamw: AdamW, t: int) -> None:
        """One AdamW step on all parameters; t counts updates from 1. Without finite norm and loss it does nothing."""
        upload, scratch = self.ops.device.upload, self.scratch
        self.steps, self.rng_state_last_update = t, self.rng_state
        seeds, self.rng_state = self.draw_seeds(self.rng_state)
        if self.partition:
            upload(self.share.seeds, self.partition.seeds(seeds))
            upload(self.share.decays, self.partition.decays(adamw.weight_decay))
        upload(scratch.seeds, seeds)
        decays = [adamw.weight_decay if spec.decay else 0.0 for spec in self.specs]
        upload(scratch.decays, np.array(decays, np.float32))
        hyper = [adamw.lr, 1.0 - adamw.beta1**t, 1.0 - adamw.beta2**t, 1.0 / self.loss_scale]
        upload(scratch.hyper, np.array(hyper, np.float32))
        self.run(Model.update_pass, (self.B, self.T), adamw.beta1, adamw.beta2, adamw.eps, adamw.grad_clip)

    def update_pass(self, beta1: float, beta2: float, eps: float, grad_clip: float) -> None:
        """The norms, then AdamW with the gradients clipped by theirs."""
        self.norm_pass()
        ops, scratch, share = self.ops, self.scratch, self.share
        scalars = (scratch.hyper, scratch.norm_squared, beta1, beta2, eps, grad_clip)
        if self.partition:
            arenas = (share.params, self.master, share.grads, self.m, self.v)
            for views, tables in self.partition.calls(share, *arenas):
                ops.adamw_update(*views, *tables, *scalars)
            self.gather()
        else:
            arenas = (self.params_flat, self.master, self.grads_flat, self.m, self.v)
            ops.adamw_update(*arenas, scratch.ends, scratch.decays, scratch.seeds, *scalars)

    def norm_pass(self) -> None:
        """The norms of the gradients and of the losses, those of all ranks."""
        ops, scratch = self.ops, self.scratch
        grads = self.share.grads if self.share else self.grads_flat
        ops.global_norm_squared(scratch.norm_squared[:1], scratch.f32, grads)
        ops.global_norm_squared(scratch.norm_squared[1:], scratch.f32, self.acts.losses.reshape(-1))
        if self.ranks:  # summed gradients are the same everywhere, shares of them are not
            self.ranks.all_reduce([scratch.norm_squared if self.share else scratch.norm_squared[1:]])
            self.ranks.wait()

    def measure_norm(self) -> None:
        """Find grad_norm() without an update, for a caller that decides by it whether to update."""
        self.run(Model.norm_pass, (self.B, self.T))

    def grad_norm(self) -> float:
        """The L2 norm of all gradients, before clipping, as the last update() or measure_norm() found it."""
        return math.sqrt(self.ops.device.download(self.scratch.norm_squared)[0]) / self.loss_scale
