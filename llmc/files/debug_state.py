"""llm.c's debug state (magic 20240327): one batch with its logits, loss and gradients, against which builds are tested.

    h[1]  version 2                       x, y    int32 (B, T)
    h[2]  B                               logits  fp32 (B, T, V)
    h[3]  T                               loss    fp32
                                          grads   fp32 (N), in the order of a model file

Source: llm.c train_gpt2.py write_state.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.files import io
from llmc.files.io import DEBUG_MAGIC, HEADER_BYTES
from llmc.files.model_file import num_parameters


def write_debug_state(
    path: io.Path, x: np.ndarray, y: np.ndarray, logits: np.ndarray, loss: float, grads: np.ndarray
) -> None:
    """Write x, y (B, T) int32, logits (B, T, V) float32, loss, grads (N,) float32. Errors: UserError."""
    words = np.zeros(256, np.int32)
    words[:4] = [DEBUG_MAGIC, 2, *x.shape]
    with io.atomic_write(path) as file:
        io.write_from(file, words)
        for tokens in (x, y):
            io.write_from(file, np.ascontiguousarray(tokens, np.int32).reshape(-1))
        for values in (logits, loss, grads):
            io.write_from(file, np.ascontiguousarray(values, np.float32).reshape(-1))


def read_debug_state(path: io.Path, header: Mapping[str, int]) -> dict[str, Any]:
    """dict(x, y (B, T) int32, logits (B, T, V) float32, loss float, grads (N,) float32) for the model of `header`.

    The file holds neither V nor N: they come from the model's header. Errors: UserError.
    """
    with io.open_checked(path, DEBUG_MAGIC, (2,)) as (file, words, size):
        B, T, V, N = int(words[2]), int(words[3]), header["vocab_size"], num_parameters(header)
        if B < 1 or T < 1:
            raise UserError(f"{path} has an impossible header: B = {B}, T = {T}. HINT: the file is damaged")
        expected = HEADER_BYTES + 4 * (2 * B * T + B * T * V + 1 + N)
        io.check_size(path, size, expected, f"a debug state with B = {B}, T = {T} of this model")
        flat = [np.empty(n, t) for n, t in ((B * T, "i4"), (B * T, "i4"), (B * T * V, "f4"), (1, "f4"), (N, "f4"))]
        for values in flat:
            io.read_into(file, values)
    x, y, logits, loss, grads = flat
    return dict(x=x.reshape(B, T), y=y.reshape(B, T), logits=logits.reshape(B, T, V), loss=float(loss[0]), grads=grads)
