"""A trained model from a file: which file a name means, its sizes, its weights, and a model ready for forward passes.

What a user may name is in MODEL_HELP. Nothing heavy is imported before a function here runs, so that --help is fast.
"""

import os
from types import ModuleType
from typing import Any

from llmc.errors import UserError

MODEL_HELP = "a .bin file, the output folder of a run (its newest checkpoint), or Hugging Face's: hf:DIR or hf:NAME"


def model_file(path: str) -> str:
    """What to load: path itself, the newest checkpoint of an output folder, or hf:FOLDER for what is Hugging Face's.

    Errors: UserError for a folder without a finished checkpoint, a damaged newest one, or an hf: name that is nowhere.
    """
    from llmc.files import checkpoints, huggingface

    if path.startswith("hf:"):
        return "hf:" + huggingface.find(path[3:])
    if not os.path.isdir(path):
        return path
    if os.path.exists(os.path.join(path, "config.json")) and not checkpoints.checkpoint_steps(path):
        return f"hf:{path}"
    step = checkpoints.latest_checkpoint(path)
    if step is None:
        raise UserError(f"{path} holds no finished checkpoint (DONE_*). HINT: train with -o {path} -n STEPS.")
    return checkpoints.model_path(path, step)


def model_header(path: str) -> dict[str, int]:
    """The sizes of what model_file() found, under their names in MODEL_WORDS. Errors: UserError."""
    from llmc.files.huggingface import read_hf_header
    from llmc.files.model_file import read_model_header

    return read_hf_header(path[3:]) if path.startswith("hf:") else read_model_header(path)


def read_weights(model: Any, path: str) -> int | None:
    """The parameters of `model` written (=) from what model_file() found, rounded to nearest where it has fewer bits.

    Returns the version of a .bin file, None for Hugging Face's. Errors: UserError.
    """
    from llmc.files.huggingface import read_hf
    from llmc.files.model_file import read_model

    host = model.host_parameters()
    if path.startswith("hf:"):
        read_hf(path[3:], host)
        version = None
    else:
        version = read_model(path, host)["version"]
    model.load_parameters(host)
    return version


def open_model(
    path: str, device: str = "auto", dtype: str | None = None, threads: int | None = None, B: int = 1,
    T: int | None = None,
) -> tuple[Any, str]:  # fmt: skip
    """(model, a line about the device): what model_file() found, ready for forward passes over (B, T) tokens alone.

    device, dtype, threads: --device, --dtype and --threads. T: None takes the model's longest, at most 1024.
    Errors: UserError for a file that cannot be read, and where the device has no room.
    """
    from llmc import gpt2
    from llmc.devices import check_dtype, model_dtype, pick_device, prepare_kernels
    from llmc.model import Model

    config = gpt2.config_from_header(model_header(path))
    ops, name, line = pick_device(device, threads)
    precision = model_dtype(check_dtype(dtype, name))
    if name == "cuda":
        prepare_kernels(config, precision)
    T = T or min(config.max_seq_len, 1024)
    needed, budget = needed_bytes(config, ops, B, T, precision), ops.device.budget()
    try:
        if budget is not None and needed > budget:
            raise MemoryError
        model = Model(gpt2, ops, config, B, T, recompute=2, training=False, dtype=precision)
    except MemoryError as error:
        need = f"{B} x {T} tokens at once need {needed / 2**20:,.1f} MiB on {line}"
        raise UserError(f"{path}: {need}. HINT: lower -b or -t of llmc.evaluate, or take --device cpu.") from error
    read_weights(model, path)
    return model, line


def needed_bytes(config: Any, ops: ModuleType, B: int, T: int, dtype: Any) -> int:
    """Bytes that a model for forward passes over (B, T) tokens takes on the device, with the op set's own scratch."""
    from llmc import gpt2
    from llmc.model import memory_plan

    buffers = memory_plan(gpt2, ops, config, B, T, recompute=2, dtype=dtype, training=False)
    return sum(nbytes for *_, nbytes in buffers) + ops.device.scratch_bytes()
