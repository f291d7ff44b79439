"""llm.c's model file (magic 20240326), read and written byte for byte.

    h[1]  version: 3 for fp32, 5 for bf16      h[5]  num_heads
    h[2]  max_seq_len                          h[6]  channels
    h[3]  vocab_size                           h[7]  padded_vocab_size
    h[4]  num_layers                           then the parameter tensors, in the order of gpt2.parameter_specs

Source: llm.c train_gpt2.cu gpt2_write_to_checkpoint, gpt2_build_from_checkpoint.
"""

import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc import gpt2
from llmc.errors import UserError
from llmc.files import io
from llmc.files.io import HEADER_BYTES, MODEL_MAGIC

MODEL_WORDS = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "padded_vocab_size")  # h[2..7]
FILE_DTYPES: dict[int, Any] = {
    3: np.dtype(np.float32),
    5: np.dtype(np.uint16),
}  # version -> element type; bf16 as its 16 bits


def num_parameters(header: Mapping[str, int]) -> int:
    """Padded parameter count N of a model header: what the table of the model's tensors adds up to."""
    return gpt2.num_parameters(gpt2.config_from_header(header))


def as_file_dtype(array: np.ndarray) -> np.ndarray:
    """The same memory as float32 or, for bf16 (ml_dtypes or uint16), as uint16."""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    flat = array.ndim == 1 and array.flags.c_contiguous
    assert flat and array.dtype in FILE_DTYPES.values(), (array.shape, array.dtype)
    return array


def read_model_header(path: io.Path) -> dict[str, int]:
    """Check a model file (magic, version, dims, exact size) -> dict of MODEL_WORDS and version.

    Errors: UserError for a file that is missing, empty, of another kind or version, truncated or over-long.
    """
    with io.open_checked(path, MODEL_MAGIC, (3, 5)) as (_, words, size):
        header = {name: int(words[2 + i]) for i, name in enumerate(MODEL_WORDS)}
        header["version"] = int(words[1])
    if (
        min(header.values()) <= 0
        or header["vocab_size"] > header["padded_vocab_size"]
        or header["channels"] % header["num_heads"] != 0
    ):
        raise UserError(f"{path} has an impossible header: {header}. HINT: the file is damaged")
    expected = HEADER_BYTES + num_parameters(header) * FILE_DTYPES[header["version"]].itemsize
    io.check_size(path, size, expected, f"this model in {'fp32' if header['version'] == 3 else 'bf16'}")
    return header


def read_model(path: io.Path, params: np.ndarray) -> dict[str, int]:
    """Write (=) params (N,) float32, or bf16 as uint16 or ml_dtypes, from a model file -> its header.

    A bf16 file becomes fp32 exactly; an fp32 file becomes bf16 by rounding to nearest even. Errors: UserError as
    read_model_header, and when the file holds another number of parameters.
    """
    header = read_model_header(path)
    params = as_file_dtype(params)
    if num_parameters(header) != params.size:
        raise UserError(
            f"{path} holds {num_parameters(header)} parameters, the model has {params.size}. HINT: give the "
            "checkpoint of this model, or build the model from the checkpoint"
        )
    dtype = FILE_DTYPES[header["version"]]
    with io.open_checked(path, MODEL_MAGIC, (3, 5)) as (file, _, _):
        if dtype == params.dtype:
            io.read_into(file, params)
        else:
            buffer = np.empty(min(io.CHUNK, params.size), dtype)
            for i in range(0, params.size, io.CHUNK):
                part = buffer[: min(io.CHUNK, params.size - i)]
                io.read_into(file, part)
                params[i : i + io.CHUNK] = io.convert(part, params.dtype)
    return header


def write_model(path: io.Path, header: Mapping[str, int], params: np.ndarray, version: int = 3) -> int:
    """Write params (N,) float32 or bf16 (uint16 or ml_dtypes) as fp32 (version 3) or bf16 (version 5), atomically.

    header: dict of MODEL_WORDS. fp32 -> bf16 rounds to nearest even. llm.c has no version for fp16: such a model is
    written as fp32, which holds the same numbers and reads back exactly.
    Returns the CRC-32 of the file. Errors: UserError when the disk is full, and for a value that is not finite, or
    would not be once it is rounded to bf16: such a file would be of no use and is not written.
    """
    params, dtype = as_file_dtype(params), FILE_DTYPES[version]
    assert params.size == num_parameters(header), (params.size, header)
    words = np.zeros(256, np.int32)
    words[:8] = [MODEL_MAGIC, version] + [header[name] for name in MODEL_WORDS]
    with io.atomic_write(path) as file:
        out = io.Checksum(file)
        io.write_from(out, words)
        for i in range(0, params.size, io.CHUNK):
            part = io.convert(params[i : i + io.CHUNK], dtype)
            bad = io.first_not_finite(part)
            if bad is not None:
                raise not_finite(path, header, params, i + bad)
            io.write_from(out, part)
    return out.crc


def not_finite(path: io.Path, header: Mapping[str, int], params: np.ndarray, index: int) -> UserError:
    """The error for a parameter that would be written as NaN or Inf, which names its tensor and place in it."""
    value = float(io.convert(params[index : index + 1], np.float32)[0])
    where = f"{place_of(header, index)} is {value:g}"
    if np.isfinite(value):
        return UserError(f"{path} is not written: {where}, more than bf16 holds. HINT: write it in fp32")
    return UserError(f"{path} is not written: {where}. HINT: go on from an earlier checkpoint, with a lower -l")


def place_of(header: Mapping[str, int], index: int) -> str:
    """The name of a parameter by its index in a model file: h[3].qkvw[0, 17], or wte[5, 2]."""
    from llmc.gpt2 import config_from_header, parameter_specs

    for spec in parameter_specs(config_from_header(header)):
        if index < spec.size:
            layer, place = divmod(index, math.prod(spec.shape))
            name = f"h[{layer}].{spec.name}" if spec.layers else spec.name
            return f"{name}{list(map(int, np.unravel_index(place, spec.shape)))}"
        index -= spec.size
    raise IndexError(index)


def fingerprint(path: io.Path) -> list[int]:
    """[version, CRC-32 of 64 pages of the file]: the model files of two runs or steps differ in it."""
    crc, size = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        version = int(np.frombuffer(file.read(8), np.int32)[1])
        for i in range(64):
            file.seek(i * size // 64 // 4096 * 4096)
            crc = zlib.crc32(file.read(4096), crc)
    return [version, crc]
