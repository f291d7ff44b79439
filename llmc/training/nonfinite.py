"""Where a NaN or Inf came from: a step done again op by op, and a file that does it again anywhere.

AdamW writes nothing where the gradient norm or a loss is not finite (llmc/model.py update), so the weights after such a
step are those before it, and the step can be repeated: the same batches and random numbers give the same bits. Then
every op is followed by a look at what it wrote, and the first tensor with a NaN or Inf is named, with its layer, op and
direction. A step that is finite pays nothing: nothing here runs.

In a run of many processes the norms and the mean loss are those of all, so all of them come here together. Each does
its whole step again, collectives included, and reports what it found in its own; only a rank that found something
saves it.
"""

import inspect
import json
import math
import os
import zipfile
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from llmc import gpt2
from llmc.buffers import Array, carve
from llmc.errors import UserError
from llmc.files import parse
from llmc.files.io import atomic_write, bf16_to_fp32, open_regular
from llmc.files.model_file import MODEL_WORDS
from llmc.model import Model, pieces, rows

WRITES = {  # op -> its arguments that it writes; scratch may hold anything
    "encoder_forward": ("out",),
    "encoder_backward": ("dwte", "dwpe"),
    "layernorm_forward": ("mean", "rstd", "out"),  # in the order of computation
    "residual_forward": ("out",),
    "fused_residual_forward": ("residual", "mean", "rstd", "normed"),
    "layernorm_backward": ("dinp", "dweight", "dbias"),
    "matmul_forward": ("pre_gelu", "out"),
    "matmul_backward": ("inp", "dinp", "dweight", "dbias"),  # inp with recompute
    "attention_forward": ("att", "out"),
    "attention_backward": ("dqkvr",),
    "gelu_forward": ("out",),
    "gelu_backward_inplace": ("d_in_out",),
    "fused_classifier": ("losses", "logits"),
    "global_norm_squared": ("out",),
}
DTYPES = ("float32", "float16", "bfloat16")  # of parameters and gradients
SMALL = 1 << 16  # elements below which an array is downloaded at once


Names = dict[Any, tuple[str, int | None]]  # what an array is known by -> (its tensor's name, its layer or None)


def address(array: Array) -> int:
    """Where an array begins in memory."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def names_of(model: Model) -> Names:
    """{address: (name, layer or None)} of every tensor. Rows that layers share under recomputation have no layer."""
    names: Names = {}
    L = model.config.num_layers
    for prefix, views in (("", model.acts), ("params.", model.params), ("grads.", model.grads)):
        for name in vars(views.h[0]):
            layers = [getattr(h, name) for h in views.h]
            shared = L > 1 and address(layers[0]) == address(layers[-1])
            for layer, row in enumerate(layers[:1] if shared else layers):
                names[address(row)] = (prefix + name, None) if shared else (f"{prefix}h[{layer}].{name}", layer)
        for name, array in vars(views).items():
            if name != "h":
                names.setdefault(address(array), (prefix + name, None))
    names[address(model.scratch.norm_squared)] = ("norm_squared of the gradients", None)
    names[address(model.scratch.norm_squared[1:])] = ("norm_squared of the losses", None)
    return names


def backward_names_of(model: Model) -> Names:
    """{(address, shape): (name, None)} of what backward writes over the memory of other tensors.

    Several of them begin at the same address, one after another. Of what a large batch does in pieces, those after the
    first are named by the position that they begin with.
    """
    names: Names = {}
    for name, array in [*vars(model.arch.gradient_views(model.acts)).items(), ("losses", model.acts.losses)]:
        for piece in pieces(model.acts.losses.size):
            part = rows(array, piece)
            text = f"{name} from position {piece.start} on" if piece.start else name
            names[address(part), part.shape] = (text, None)
        names[address(array), array.shape] = (name, None)
    return names


def on_host(ops: ModuleType, array: Array) -> np.ndarray:
    """The values of an array where NumPy can read them."""
    return array if isinstance(array, np.ndarray) else ops.device.host_view(array)


def count(ops: ModuleType, array: Array, scratch: Array = None) -> str | None:
    """'2 NaN, 1 Inf of 96, first at (0, 17, 5)', or None where all of array is finite. scratch: global_norm's."""
    if array.size > SMALL and not isinstance(array, np.ndarray):  # one pass over it on the device
        out = ops.device.alloc(4).view(np.float32)
        ops.global_norm_squared(out, scratch, array.reshape(-1))
        if math.isfinite(ops.device.download(out)[0]):
            return None
    host = on_host(ops, array)
    finite = np.isfinite(host)
    if finite.all():
        return None
    nan, bad = int(np.isnan(host).sum()), int(finite.size - np.count_nonzero(finite))
    first = tuple(int(i) for i in np.unravel_index(np.argmin(finite), finite.shape))
    return f"{nan} NaN, {bad - nan} Inf of {finite.size}, first at {first}"


class Trace:
    """The op set `model` uses, with a look at what each op has written. Stands in for it as model.ops."""

    def __init__(self, model: Model) -> None:
        self.model, self.ops, self.device = model, model.ops, model.ops.device
        self.names, self.backward_names = names_of(model), backward_names_of(model)
        self.direction, self.micro_step = "forward", 0
        self.found: str | None = None

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.ops, name)
        if name not in WRITES:
            return function

        def call(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)
            if self.found is None:
                self.look(name, inspect.signature(function).bind(*args, **kwargs).arguments)

        return call

    def look(self, op: str, arguments: dict[str, Any]) -> None:
        """Look at what an op has written; note the first tensor that is not finite."""
        for argument in WRITES[op]:
            written = argument != "inp" or arguments.get("recompute")  # matmul_backward makes inp again with recompute
            array = arguments.get(argument) if written else None
            text = None if array is None else count(self.ops, array, self.model.scratch.f32)
            if text:
                name, own_layer = self.name(array) or (argument, None)
                layer = own_layer if own_layer is not None and self.direction == "forward" else self.layer(arguments)
                if layer is not None and name in vars(self.model.acts.h[0]):  # a row that layers share
                    name = f"h[{layer}].{name}"
                where = [self.direction, f"layer {layer}" if layer is not None else ""]
                where += [f"micro-step {self.micro_step}" if self.direction != "update" else ""]
                place = f"{name}, written by {op} as {argument} ({', '.join(filter(None, where))})"
                self.found = f"the first non-finite value is in {place}: {text}"
                return

    def name(self, array: Array) -> tuple[str, int | None] | None:
        """(name, layer or None) of an array, None where it has no name."""
        found = self.backward_names.get((address(array), array.shape)) if self.direction == "backward" else None
        return found or self.names.get(address(array))

    def layer(self, arguments: dict[str, Any]) -> int | None:
        """The layer that an op works on: that of its weights; where it has none, that of its activations."""
        arrays = [array for array in arguments.values() if hasattr(array, "dtype") and hasattr(array, "shape")]
        names = [found for found in map(self.name, arrays) if found]
        weights = [layer for name, layer in names if name.startswith("params.")]
        return weights[0] if weights else next((layer for _, layer in names if layer is not None), None)


def bad_weights(model: Model) -> str | None:
    """The first of the weights that are not finite, described; None where all are."""
    if count(model.ops, model.params_flat, model.scratch.f32) is None:
        return None
    host = on_host(model.ops, model.params_flat)
    params = carve(host.view(np.uint8), model.specs, model.config.num_layers, model.dtype)
    layered = [(f"h[{layer}].{name}", array) for layer, h in enumerate(params.h) for name, array in vars(h).items()]
    outside = [(spec.name, getattr(params, spec.name)) for spec in model.specs if not spec.layers]
    first = next(i for i, spec in enumerate(model.specs) if spec.layers)  # so many tensors stand before the layers
    for name, array in [*outside[:first], *layered, *outside[first:]]:
        if text := count(model.ops, array):
            return f"the weights were not finite before the step: params.{name}: {text}"
    return None


def trace(model: Model, inputs: np.ndarray, targets: np.ndarray, rng_state: int) -> str | None:
    """The step over these micro-batches, (M, B, T) i32 each, op by op. Returns what was found, or None.

    rng_state is the model's before the step. Weights, optimizer state and the model's own rng_state stay as they are;
    activations and gradients are written.
    """
    found = bad_weights(model)
    if found:
        return found
    kept, traced = (model.ops, model.graphs, model.rng_state), Trace(model)
    model.ops, model.graphs, model.rng_state = traced, None, rng_state
    try:
        for traced.micro_step, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            traced.direction = "forward"
            model.forward(x)
            traced.direction = "backward"
            model.backward(x, y, len(inputs), traced.micro_step)
        traced.direction = "update"
        model.norm_pass()
    finally:
        model.ops, model.graphs, model.rng_state = kept
    return traced.found


# ----------------------------------------------------------------------------------------------------------------------
# the file


def save(path: str | os.PathLike, model: Model, inputs: np.ndarray, targets: np.ndarray, **about: Any) -> None:
    """Write a step for replay: one .npz with the weights, the tokens of all micro-steps and, as JSON, the rest.

    params (N,) in the model's precision (bf16 as its 16 bits); inputs, targets (M, B, T) i32; about: a dict with the
    model's sizes, dtype, grad_dtype, recompute and loss_scale, and what the caller adds: rng_state, found, update.
    """
    params = on_host(model.ops, model.params_flat)
    about |= dict(dtype=model.dtype.name, grad_dtype=model.grads_flat.dtype.name, recompute=model.recompute)
    about |= dict(loss_scale=model.loss_scale / model.num_ranks, config=vars(model.config))
    params = params.view(np.uint16) if model.dtype.name == "bfloat16" else params
    with atomic_write(path) as file:
        np.savez(file, params=params, inputs=inputs, targets=targets, about=json.dumps(about))


def load(path: str | os.PathLike) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """(about, params (N,) f32, inputs, targets) of save()'s file. UserError where it is none."""
    hint = "HINT: give the nonfinite_*.npz that a stopped run wrote"
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:
                if any(item.file_size != item.compress_size for item in archive.infolist()):
                    raise ValueError("it is compressed, which no run writes")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                text, params, inputs, targets = (arrays[n] for n in ("about", "params", "inputs", "targets"))
        about = about_of(str(text), f"--replay {path}")
        N, V = sum(spec.size for spec in gpt2.parameter_specs(about["config"])), about["config"].vocab_size
        kind = np.uint16 if about["dtype"] == "bfloat16" else np.dtype(about["dtype"])
        tokens = inputs.shape == targets.shape and inputs.ndim == 3 and inputs.dtype == targets.dtype == np.int32
        if params.shape != (N,) or params.dtype != kind or not tokens or inputs.size == 0:
            raise ValueError("its arrays do not fit its model")
        if min(inputs.min(), targets.min()) < 0 or max(inputs.max(), targets.max()) >= V:
            raise ValueError(f"it has tokens that are not below {V}")
        if inputs.shape[2] > about["config"].max_seq_len:
            raise ValueError(f"its rows of {inputs.shape[2]} tokens are longer than the model's")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, OverflowError) as error:
        why = (getattr(error, "strerror", None) or str(error) or "damaged").splitlines()[0]
        raise UserError(f"--replay {path}: cannot be read ({why}). {hint}.") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--replay {path}: cannot be read (it is no .npz file, or not all of one). {hint}.") from error
    params = bf16_to_fp32(params) if about["dtype"] == "bfloat16" else params.astype(np.float32)
    return about, params, inputs, targets


def about_of(text: str, what: str) -> dict[str, Any]:
    """What the JSON of a saved step says, with its config as a GPT2Config. Errors: UserError about `what`."""
    about = parse.dictionary(parse.json_of(text, what), what)
    sizes = parse.dictionary(about.get("config"), f"{what}: config")
    config = {name: parse.integer(sizes.get(name), f"{what}: config.{name}", 1, 1 << 24) for name in MODEL_WORDS}
    if config["vocab_size"] > config["padded_vocab_size"]:
        raise UserError(f"{what}: config has vocab_size above padded_vocab_size. HINT: the file is damaged")
    for name, allowed in (("dtype", DTYPES), ("grad_dtype", DTYPES), ("recompute", (0, 1, 2))):
        if about.get(name) not in allowed:
            raise UserError(f"{what}: {name} is {parse.shown(about.get(name))}, not of {allowed}. HINT: it is damaged")
    parse.integer(about.get("rng_state"), f"{what}: rng_state")
    parse.number(about.get("loss_scale"), f"{what}: loss_scale", 2.0**-64, 2.0**127)
    parse.string(about.get("found"), f"{what}: found")
    return about | dict(config=gpt2.config_from_header(config))


def replay(
    path: str | os.PathLike, ops: ModuleType, dtype: DTypeLike | None = None
) -> tuple[dict[str, Any], str | None]:  # fmt: skip
    """Do the saved step again on an op set, in its own precision or in dtype. Returns (about, what was found or None).

    Errors: UserError where the file cannot be read, or holds a precision that the CPU op set does not have.
    """
    about, params, inputs, targets = load(path)
    dtype = np.dtype(dtype) if dtype is not None else dtype_named(about["dtype"])
    if ops.__name__ == "llmc.cpu" and dtype != np.float32:
        have = f"--replay {path}: the step is in {about['dtype']}, the CPU op set has fp32 only"
        raise UserError(f"{have}. HINT: --device cuda, or --dtype fp32 to see whether it fails there, too.")
    grad_dtype = "float32" if about["grad_dtype"] == "float32" else None
    model = Model(
        gpt2, ops, about["config"], *inputs.shape[1:], recompute=about["recompute"], dtype=dtype,
        grad_dtype=grad_dtype, use_master_weights=False,
    )  # fmt: skip
    model.loss_scale = about["loss_scale"]
    model.load_parameters(params)
    return about, trace(model, inputs, targets, about["rng_state"])


def dtype_named(name: str) -> np.dtype:
    """The NumPy dtype of a name, also bfloat16, which NumPy knows from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def step_failed(
    model: Model, inputs: np.ndarray, targets: np.ndarray, *, step: int, rng_state: int, loss: float,
    grad_norm: float, update: dict[str, float], output_dir: str | None, on_nonfinite: str,
) -> str:  # fmt: skip
    """After a step whose loss or gradient norm is not finite: find out why, and save it. Returns a line to print.

    inputs, targets: the micro-batches (M, B, T) i32 of the 0-based step; rng_state: the model's before it.
    update: the numbers of AdamW and its t, for the file; output_dir: its folder, None for the working directory.
    on_nonfinite: "stop" or "skip". Under "skip" only the first such step is saved: the files are large.
    Errors: UserError with the line under "stop"; also under "skip" where the weights themselves are not finite, as no
    later step can then be.
    """
    found = trace(model, inputs, targets, rng_state)
    hopeless = found is not None and found.startswith("the weights")
    stop = on_nonfinite == "stop" or hopeless
    folder, suffix = output_dir or ".", f"_{model.rank:05d}.npz"
    line = f"step {step + 1}: loss {loss:.4g}, gradient norm {grad_norm:.4g}: "
    line += f"on rank {model.rank} " if model.ranks else ""
    elsewhere = model.ranks and (found is None or "(update)" in found)  # what came in with the sums over all ranks
    line += found if found and not elsewhere else "every tensor is finite"
    others = [name for name in os.listdir(folder) if name.startswith("nonfinite_") and name.endswith(suffix)]
    if not elsewhere and (stop or not others):
        path = os.path.join(folder, f"nonfinite_{step + 1:08d}{suffix}")
        try:
            save(path, model, inputs, targets, rng_state=rng_state, found=line, update=update)
            line += f"; saved: llmc.train --replay {path}"
        except UserError as error:
            line += f"; not saved: {str(error).partition('. HINT')[0]}"
    if model.ranks:  # this waits for all, too: the first to stop takes the others with it, maybe while they write
        here = model.ranks.sums([float(r == model.rank and not elsewhere) for r in range(model.num_ranks)])
        line += f" (non-finite on {', '.join(f'rank {r}' for r, found in enumerate(here) if found) or 'no rank'})"
    if stop:
        hint = "an update made them so, or the file they come from" if hopeless else "lower -l, raise -u"
        hint += "" if hopeless or on_nonfinite == "skip" else ", or go on with --on-nonfinite skip"
        raise UserError(f"{line}. The weights were not updated. HINT: {hint}.")
    return f"{line}. Skipped: the weights were not updated."
