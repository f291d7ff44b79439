"""A trained model from a file: which file a name means, its sizes, and its weights.

What a user may name is in MODEL_HELP. Nothing heavy is imported before a function here runs, so that --help is fast.
"""

import os
import re
from typing import Any

from llmc.errors import UserError

MODEL_HELP = "a .bin file, the output folder of a run (its newest checkpoint), or Hugging Face's: hf:DIR or hf:NAME"


def names_a_file(model: str) -> bool:
    """Whether -e means a file or a folder, not the descriptor of a model with fresh weights (d12, tiny:d4)."""
    if model.startswith("hf:") or model.endswith(".bin"):
        return True
    return os.path.isdir(model) and not re.fullmatch(r"(gpt2:|gpt3:|tiny:)?[a-z]\d+", model)


def model_file(path: str) -> str:
    """What to load: path itself, the newest checkpoint of an output folder, or hf:FOLDER for what is Hugging Face's.

    Errors: UserError for a folder without a finished checkpoint, a damaged newest one, or an hf: name that is nowhere.
    A model of a checkpoint with checksums is read once more for it, to see that it has the bits that were written.
    """
    from llmc.files import checkpoints, huggingface

    if path.startswith("hf:"):
        return "hf:" + huggingface.find(path[3:])
    if not os.path.isdir(path):
        checkpoints.check_model(path)
        return path
    if os.path.exists(os.path.join(path, "config.json")) and not checkpoints.checkpoint_steps(path):
        return f"hf:{path}"
    step = checkpoints.latest_checkpoint(path, states=False)
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
