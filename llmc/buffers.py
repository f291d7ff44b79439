"""Named tensors in flat buffers: declared once as a table, allocated in one piece, used as views.

A table of TensorSpec is the single source for four things: the memory plan printed before anything is allocated, the
allocation itself, the views the model works on (``t.wte``, ``t.h[l].qkvw``), and, for parameters, init and decay.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

Array: TypeAlias = Any  # an array of NumPy or of CuPy, whichever the op set uses; docstrings state shapes and dtypes
Views: TypeAlias = SimpleNamespace  # what carve() makes: an array for each row of a table, by name


class TensorSpec(NamedTuple):
    """One row of a buffer. Its array has shape (layers, *shape), or shape alone where layers is 0.

    ``dtype`` is "X" (the model's precision), "f32", "i32", "u32" or "i64". ``layers`` is 0 for a tensor of the whole
    model, the number of layers for one that each layer has, and 1 for one that all layers share (recomputation saves
    memory in this way: one number in the table). ``init`` ("normal", "residual", "zeros", "ones") and ``decay`` are for
    parameters, and so is ``accumulated``: the ops only ever add to such a gradient (+=), so that a step has to start
    it from zero, while they write the others (=).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "X"
    layers: int = 0
    init: str = "zeros"
    decay: bool = False
    accumulated: bool = False

    @property
    def size(self) -> int:
        """The number of elements, those of all layers together."""
        size = max(self.layers, 1)
        for s in self.shape:
            size *= s
        return size


def dtypes(model_dtype: DTypeLike) -> dict[str, np.dtype]:
    """The NumPy dtype of each dtype letter of a table; model_dtype is the one "X" stands for."""
    letters = {"X": model_dtype, "f32": np.float32, "i32": np.int32, "u32": np.uint32, "i64": np.int64}
    return {letter: np.dtype(kind) for letter, kind in letters.items()}


def offsets(specs: Sequence[TensorSpec], model_dtype: DTypeLike, align: int = 1) -> tuple[list[int], int]:
    """Byte offset of each row, and the total number of bytes; rows start at multiples of align."""
    starts, at, kinds = [], 0, dtypes(model_dtype)
    for spec in specs:
        at = -(-at // align) * align
        starts.append(at)
        at += spec.size * kinds[spec.dtype].itemsize
    return starts, -(-at // align) * align


def carve(
    flat: Array, specs: Sequence[TensorSpec], num_layers: int, model_dtype: DTypeLike, align: int = 1
) -> Views:  # fmt: skip
    """Views into flat (uint8): a namespace with .<name> for each row, and .h[l].<name> for those that have layers.

    The rows may describe less than the buffer was allocated for: a smaller batch lives in the same memory.
    """
    starts, total = offsets(specs, model_dtype, align)
    assert total <= flat.size, (total, flat.size)
    kinds = dtypes(model_dtype)
    views = SimpleNamespace(h=[SimpleNamespace() for _ in range(num_layers)])
    for spec, start in zip(specs, starts, strict=True):
        nbytes = spec.size * kinds[spec.dtype].itemsize
        shape = (spec.layers, *spec.shape) if spec.layers else spec.shape
        array = flat[start : start + nbytes].view(kinds[spec.dtype]).reshape(shape)
        setattr(views, spec.name, array)
        if spec.layers:
            for layer in range(num_layers):
                setattr(views.h[layer], spec.name, array[layer if spec.layers > 1 else 0])
    return views


def plan(title: str, specs: Sequence[TensorSpec], model_dtype: DTypeLike, align: int = 1) -> list[str]:
    """Lines of the memory plan for one buffer: each row's shape, dtype and bytes, then the total."""
    kinds = dtypes(model_dtype)
    lines = []
    for spec in specs:
        nbytes = spec.size * kinds[spec.dtype].itemsize
        shape = " x ".join(str(s) for s in ((spec.layers, *spec.shape) if spec.layers else spec.shape))
        lines.append(f"  {spec.name:<14}{shape:<26}{kinds[spec.dtype].name:<10}{nbytes:>16,} bytes")
    return [*lines, f"  {title:<50}{offsets(specs, model_dtype, align)[1]:>16,} bytes"]
