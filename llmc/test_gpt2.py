"""llm.c's test_gpt2 for this package: `python -m llmc.test_gpt2 [gpt2_124M.bin] [gpt2_124M_debug_state.bin]`.

Both files are in llm.c's starter pack. The debug state holds one batch, and the logits, loss and 16 gradients that
PyTorch computed on it. They are computed again here and compared. Then ten steps are trained on that batch, once with
the settings of test_gpt2.cu and once with those of test_gpt2.c, and their losses are compared with the published ones.
Those are known for GPT-2 124M alone. For another model (llm.c's train_gpt2.py writes the files) losses only have to
fall. The exit code is 0 if all is well, 1 if not, 2 if the files cannot be used.

Source: llm.c test_gpt2.cu, test_gpt2.c, test_gpt2_fp32.cu; the files: llmc/files.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from llmc.model import Model

import os
import sys

from llmc import devices, loading
from llmc.command import Parser, add_device_flags, command
from llmc.errors import UserError

STARTER_PACK = "https://huggingface.co/datasets/karpathy/llmc-starter-pack"
PUBLISHED_FOR = dict(num_parameters=124475904, B=4, T=64, loss=5.27)  # the model and batch of the published losses
RUNS = (  # name, settings, published losses, how far a loss may be off with fp32 weights
    (
        "test_gpt2.cu",
        dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip=1.0),
        (5.270009, 4.060681, 3.320085, 2.717550, 2.181066, 1.653923, 1.168050, 0.736873, 0.401021, 0.187493),
        1e-3,
    ),
    (
        "test_gpt2.c",
        # llm.c decays every tensor here, this package only matrices and embeddings; the difference is far below 1e-2
        dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, grad_clip=0.0),
        (5.270007, 4.059707, 3.375123, 2.800783, 2.315382, 1.849029, 1.394656, 0.999147, 0.624080, 0.376511),
        1e-2,
    ),
)
LEARNING_RATE = 1e-4
# In fp32 an element may be off by this share of the largest one in its tensor. The loss has the limit of the logits.
LOGITS_SHARE, GRADIENT_SHARE = 1e-4, 1e-3
# The debug state is of fp32 weights. If the file or --dtype has rounded them to 16 bits, llm.c's limits for bf16 hold.
BF16_LOGITS, BF16_LOSS, BF16_SLOPE = 25.0, 0.05, 0.079
BF16_GRADIENTS = (5e-1, 4e-3, 1e-1, 4e-2, 5e-2, 3.5e-2, 2e-2, 3e-2, 5e-2, 3e-2, 3e-2, 3e-2, 2e-2, 1e-2, 1e-1, 2e-2)


def read_files(model_path: str, debug_path: str) -> tuple[dict[str, int], dict[str, Any]]:
    """(model header, debug state), checked against each other; UserError where they cannot be used."""
    from llmc.files import debug_state, model_file

    for path in (model_path, debug_path):
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist. HINT: llm.c's starter pack has it, {STARTER_PACK}")
    header = model_file.read_model_header(model_path)
    debug = debug_state.read_debug_state(debug_path, header)
    T, V = debug["x"].shape[1], header["vocab_size"]
    if T > header["max_seq_len"]:
        limit = f"{model_path} has {header['max_seq_len']}"
        raise UserError(f"{debug_path} has T = {T} positions, {limit}. HINT: give the two files of one model.")
    for tokens in (debug["x"], debug["y"]):
        if tokens.min() < 0 or tokens.max() >= V:
            wrong = next(int(t) for t in tokens.flat if not 0 <= t < V)
            limit = f"{model_path} has 0 to {V - 1}"
            raise UserError(f"{debug_path} has a token {wrong}, {limit}. HINT: give the two files of one model.")
    return header, debug


def largest(array: "np.ndarray") -> float:
    """The largest finite magnitude in an array."""
    import numpy as np

    return np.abs(array).max(where=np.isfinite(array), initial=0.0)


def compare(name: str, got: Any, expected: Any, absolute: float, slope: float = 0.0) -> bool:
    """Print the element furthest beyond the limit, absolute + slope * |expected|; returns whether all are within."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        difference, limit = np.abs(got - expected), absolute + slope * np.abs(expected)
        worst = np.unravel_index(np.argmax(difference - limit), difference.shape)  # to argmax a NaN is the largest
    ok = bool(np.isfinite(difference[worst]) and difference[worst] <= limit[worst])
    where = ", ".join(str(i) for i in worst)
    print(f"{name:<12}{difference[worst]:>13.2e}{limit[worst]:>12.2e}   {where:<26}{verdict(ok)}")
    return ok


def compare_passes(model: "Model", debug: dict[str, Any], exact: bool) -> bool:
    """Compare forward and backward with the debug state, print a table, return whether all is within the limits.

    exact: whether file and model are fp32. If not, the limits are those of llm.c's bf16 build.
    """
    import numpy as np

    from llmc.buffers import carve
    from llmc.gpt2 import parameter_specs

    V = model.config.vocab_size
    specs = parameter_specs(model.config)
    expected = carve(debug["grads"].view(np.uint8), specs, model.config.num_layers, np.float32)
    print(f"{'tensor':<12}{'max abs diff':>13}{'limit':>12}   {'where':<26}")

    def download(array: Any) -> "np.ndarray":
        return model.ops.device.download(array).astype(np.float32)

    logits = download(model.forward(debug["x"]).output)[..., :V]
    limit = LOGITS_SHARE * largest(debug["logits"]) if exact else BF16_LOGITS
    all_ok = compare("logits", logits, debug["logits"], limit)
    model.backward(debug["x"], debug["y"])
    loss = np.float32(model.mean_loss())
    all_ok &= compare("loss", loss, np.float32(debug["loss"]), limit if exact else BF16_LOSS)
    for spec, bf16_limit in zip(specs, BF16_GRADIENTS, strict=True):
        got, reference = download(getattr(model.grads, spec.name)), getattr(expected, spec.name)
        limits = (GRADIENT_SHARE * largest(reference), 0.0) if exact else (bf16_limit, BF16_SLOPE)
        all_ok &= compare(f"d{spec.name}", got, reference, *limits)
    return all_ok


def train(model: "Model", debug: dict[str, Any], settings: dict[str, float]) -> Iterator[float]:
    """Yield the losses of ten steps on the debug state's batch."""
    from llmc.model import AdamW

    model.ops.device.zero(model.m)
    model.ops.device.zero(model.v)
    for t in range(1, 11):
        model.forward(debug["x"])
        model.backward(debug["x"], debug["y"])
        yield model.mean_loss()
        model.update(AdamW(LEARNING_RATE, **settings), t)


def compare_losses(losses: Iterable[float], published: Iterable[float], limit: float) -> bool:
    """Print ten losses beside the published ones; returns whether all are within the limit."""
    print(f"{'step':<7}{'loss':<13}{'published':<13}{'abs diff':>8}{'limit':>10}")
    all_ok = True
    for step, (loss, expected) in enumerate(zip(losses, published, strict=True), 1):
        ok = abs(loss - expected) <= limit
        all_ok &= ok
        print(f"{step:<7}{loss:<13.6f}{expected:<13.6f}{abs(loss - expected):>8.1e}{limit:>10.1e}   {verdict(ok)}")
    return all_ok


def compare_fall(losses: Iterable[float]) -> bool:
    """Print ten losses; returns whether they fall."""
    losses = list(losses)
    ok = losses[-1] < losses[0]
    print("\n".join(f"{step:<7}{loss:.6f}" for step, loss in enumerate(losses, 1)))
    print(f"the last is {'lower' if ok else 'NOT lower'} than the first   {verdict(ok)}")
    return ok


def verdict(ok: bool) -> str:
    return "ok" if ok else "NOT OK"


def parser() -> Parser:
    p = Parser(prog="llmc.test_gpt2", description="Compare this package with llm.c's debug state.", allow_abbrev=False)
    p.add_argument("model", nargs="?", default="gpt2_124M.bin", help="model file (gpt2_124M.bin)")
    p.add_argument("debug_state", nargs="?", default="gpt2_124M_debug_state.bin", help="(gpt2_124M_debug_state.bin)")
    p.add_argument("-r", "--recompute", type=int, choices=(0, 1, 2), default=1, help="as in llmc.train (1)")
    add_device_flags(p.add_argument)
    return p


@command("llmc.test_gpt2")
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    header, debug = read_files(args.model, args.debug_state)

    from llmc import gpt2
    from llmc.model import Model

    ops, device, line = devices.pick_device(args.device, args.threads)
    stored = {3: "fp32", 5: "bf16"}[header["version"]]
    dtype = devices.check_dtype(args.dtype or (stored if device == "cuda" else None), device)
    config, (B, T) = gpt2.config_from_header(header), debug["x"].shape
    if device == "cuda":
        devices.prepare_kernels(config, devices.model_dtype(dtype), tensors=len(gpt2.parameter_specs(config)))
    model = Model(gpt2, ops, config, B, T, recompute=args.recompute, dtype=devices.model_dtype(dtype))
    exact = stored == dtype == "fp32"

    N = gpt2.num_parameters(config)
    print(f"{line}, {dtype}")
    print(f"{args.model}: {N:,} parameters, {stored} (version {header['version']})")
    print(f"{args.debug_state}: B = {B}, T = {T}, loss {debug['loss']:.6f}")
    loading.read_weights(model, args.model)
    all_ok = compare_passes(model, debug, exact)
    debug = {name: debug[name] for name in ("x", "y", "loss")}  # frees the rest, as large as the model

    of = PUBLISHED_FOR
    published = (N, B, T) == (of["num_parameters"], of["B"], of["T"]) and abs(debug["loss"] - of["loss"]) < 0.01
    for name, settings, expected, limit in RUNS:
        shown = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in settings.items())
        print(f"\n10 steps as {name}: learning rate {LEARNING_RATE:g}, {shown}")
        loading.read_weights(model, args.model)
        losses = train(model, debug, settings)
        if published:
            all_ok &= compare_losses(losses, expected, limit if exact else BF16_LOSS)
        else:
            all_ok &= compare_fall(losses)
    print(f"\noverall okay: {int(all_ok)}")
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
