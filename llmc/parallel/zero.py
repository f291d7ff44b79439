"""ZeRO-1: AdamW's state is cut into shares, one for each rank.

Every layer of every tensor is cut into P equal parts; the share of rank r is the r-th part of each. The parts are in
the order of llm.c's shards: tensor by tensor as in the checkpoint, and layer by layer within a tensor. A rank has m, v
and master weights for its share alone. In a step

    gradients of a layer --reduce_scatter--> share.grads --AdamW--> share.params --all_gather--> parameters

partition() says which elements a rank's share has; the model, which is handed the result, owns all memory.

Source: llm.c llmc/zero.cuh, train_gpt2.cu gpt2_get_tensor_at_layer and gpt2_update; Rajbhandari et al. 2020,
arXiv:1910.02054.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llmc.buffers import Array, TensorSpec, Views

NOISE = 0xD2A80A3F, 198491317  # of the hash in kernels/common.cuh: noise(low + 2^32 high, seed) starts from
# (low + 198491317 high) * 0xD2A80A3F + seed. So a kernel that counts from another element needs only another seed.


class Row(NamedTuple):
    """The share of one layer of one tensor."""

    tensor: int
    layer: int  # -1 for a tensor that belongs to no layer
    size: int  # elements of the share
    at: int  # where it starts in the share
    start: int  # where the whole layer starts in the flat parameters


class Partition:
    """How all parameters are cut into P equal shares, and which share is this rank's. It holds no device memory."""

    def __init__(self, tensors: Sequence[TensorSpec], rank: int, P: int, parts: list[list[Row]]) -> None:
        self.tensors, self.rank, self.P, self.parts = tensors, rank, P, parts
        self.rows = [row for part in parts for row in part]
        self.size = sum(row.size for row in self.rows)  # elements of a share: N / P

    def specs(self, grad_dtype: str = "X") -> list[TensorSpec]:
        """The tensors beside the optimizer state: this share of parameters and gradients, AdamW's tables for each part.

        grad_dtype is a dtype letter, as in a TensorSpec.
        """
        table = (len(self.parts), len(self.tensors))
        return [
            TensorSpec("params", (self.size,)),
            TensorSpec("grads", (self.size,), grad_dtype),
            TensorSpec("ends", table, "i64"),
            TensorSpec("decays", table, "f32"),
            TensorSpec("seeds", table, "u32"),
        ]

    def of(self, flat: np.ndarray) -> np.ndarray:
        """The share of a flat host array (N,), a copy (N/P,)."""
        return np.concatenate([flat[row.start + self.rank * row.size :][: row.size] for row in self.rows])

    def pairs(self, flat: Array, share: Array, layer: int | None = None) -> tuple[list[Array], list[Array]]:
        """([whole rows], [their shares]) of a flat array (N,) and a share (N/P,).

        layer: only the rows of that layer, for -1 those of tensors that belong to no layer; None: all rows.
        """
        rows = [row for row in self.rows if layer is None or row.layer == layer]
        whole = [flat[row.start :][: row.size * self.P] for row in rows]
        return whole, [share[row.at :][: row.size] for row in rows]

    def ends(self) -> np.ndarray:
        """(parts, tensors) i64: where each row of a part ends in that part. Rows that a part lacks are empty."""
        table = np.zeros((len(self.parts), len(self.tensors)), np.int64)
        for ends, rows in zip(table, self.parts, strict=True):
            ends[:] = rows[-1].at + rows[-1].size - rows[0].at
            ends[: len(rows)] = [row.at + row.size - rows[0].at for row in rows]
        return table

    def decays(self, weight_decay: float) -> np.ndarray:
        """(parts, tensors) f32: the weight decay of each row."""
        table = np.zeros((len(self.parts), len(self.tensors)), np.float32)
        for decays, rows in zip(table, self.parts, strict=True):
            decays[: len(rows)] = [weight_decay if self.tensors[row.tensor].decay else 0.0 for row in rows]
        return table

    def seeds(self, seeds: np.ndarray) -> np.ndarray:
        """(parts, tensors) u32 from seeds (tensors,) u32: a row gets the noise of its place in the whole tensor."""
        table = np.zeros((len(self.parts), len(self.tensors)), np.uint32)
        for k, rows in enumerate(self.parts):
            for j, row in enumerate(rows):
                first = max(row.layer, 0) * row.size * self.P + self.rank * row.size
                first = (first & 0xFFFFFFFF) + NOISE[1] * (first >> 32)
                table[k, j] = (int(seeds[row.tensor]) + first * NOISE[0]) & 0xFFFFFFFF
        return table

    def calls(self, share: Views, *arenas: Array) -> Iterator[tuple[list[Array], tuple[Array, Array, Array]]]:
        """What AdamW is called with, part by part: (views of the arenas (N/P,), (ends, decays, seeds)).

        share: the views of a buffer of specs(). An arena that is None stays None.
        """
        for k, rows in enumerate(self.parts):
            a, b = rows[0].at, rows[-1].at + rows[-1].size
            views = [array if array is None else array[a:b] for array in arenas]
            yield views, (share.ends[k], share.decays[k], share.seeds[k])


def partition(specs: Sequence[TensorSpec], rank: int, P: int) -> Partition | None:
    """The Partition of the parameters `specs` for P ranks; None if P does not divide every layer of every tensor.

    Every layer has a multiple of C elements, so P has to divide C. One call of AdamW takes at most as many rows as
    there are tensors, and its arrays start at multiples of 8 elements. So the rows are grouped into parts, one for each
    call.
    """
    rows, at, start = [], 0, 0
    for i, spec in enumerate(specs):
        layers = max(1, spec.layers)
        if spec.size % (layers * P):
            return None
        for layer in range(layers):
            rows.append(Row(i, layer if spec.layers else -1, spec.size // layers // P, at, start))
            at, start = at + rows[-1].size, start + spec.size // layers
    parts = []
    while rows:
        take = min(len(specs), len(rows))
        while take and take < len(rows) and rows[take].at % 8:
            take -= 1
        if not take:
            return None
        parts.append(rows[:take])
        rows = rows[take:]
    return Partition(specs, rank, P, parts)
