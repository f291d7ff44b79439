"""ZeRO-1: AdamW's state in shares, one on each rank.

A rank's share is the r-th of P equal parts of every tensor of every layer, in the order of llm.c's shards: tensor by
tensor as in the checkpoint, layer by layer. m, v and master weights exist for the share alone. In a step

    gradients of a layer --reduce_scatter--> share.grads --AdamW--> share.params --all_gather--> parameters

Source: llm.c llmc/zero.cuh, train_gpt2.cu gpt2_get_tensor_at_layer and gpt2_update; Rajbhandari et al. 2020,
arXiv:1910.02054.
"""

from typing import NamedTuple

import numpy as np

from llmc.buffers import TensorSpec

TABLE = 16  # rows that one call of AdamW takes
NOISE = 0xD2A80A3F, 198491317  # the hash of kernels/common.cuh: noise(low + 2^32 high, seed) starts from
# (low + 198491317 high) * 0xD2A80A3F + seed, so that to count from another element is to have another seed


class Row(NamedTuple):
    """The share of one layer of one tensor."""

    tensor: int
    layer: int
    size: int  # elements of the share
    at: int  # its place in the share
    start: int  # place of the whole layer in the flat parameters


def share_rows(specs, P):
    """[[Row, ...], ...]: a rank's share, cut into parts of at most 16 rows that start at multiples of 8 elements.

    None where that cannot be: where P does not divide every layer of every tensor, that is C.
    """
    rows, at, start = [], 0, 0
    for i, spec in enumerate(specs):
        layers = max(1, spec.layers)
        if spec.size % (layers * P):
            return None
        for layer in range(layers):
            rows.append(Row(i, layer, spec.size // layers // P, at, start))
            at, start = at + rows[-1].size, start + spec.size // layers
    parts = []
    while rows:
        take = min(TABLE, len(rows))
        while take and take < len(rows) and rows[take].at % 8:
            take -= 1
        if not take:
            return None
        parts.append(rows[:take])
        rows = rows[take:]
    return parts


def share_specs(specs, P, grad_dtype="X"):
    """The buffer beside the optimizer state: share of parameters and of gradients, and AdamW's tables for each part."""
    N, parts = sum(spec.size for spec in specs), len(share_rows(specs, P))
    return [
        TensorSpec("params", (N // P,)),
        TensorSpec("grads", (N // P,), grad_dtype),
        TensorSpec("ends", (parts, TABLE), "i64"),
        TensorSpec("decays", (parts, TABLE), "f32"),
        TensorSpec("seeds", (parts, TABLE), "u32"),
    ]


class Share:
    """This rank's share: views are those of share_specs, flat params those of the model."""

    def __init__(self, specs, rank, P, views, device):
        self.rank, self.P, self.device = rank, P, device
        self.params, self.grads, self.tables = views.params, views.grads, (views.ends, views.decays, views.seeds)
        self.specs, self.parts = specs, share_rows(specs, P)
        ends = np.zeros(views.ends.shape, np.int64)
        for end, rows in zip(ends, self.parts, strict=True):
            end[:] = rows[-1].at + rows[-1].size - rows[0].at
            end[: len(rows)] = [row.at + row.size - rows[0].at for row in rows]
        device.upload(views.ends, ends)

    def of(self, flat):
        """The share of a flat host array (N,), a copy (N/P,)."""
        rows = [row for part in self.parts for row in part]
        own = [flat[row.start + self.rank * row.size :][: row.size] for row in rows]
        return np.concatenate(own)

    def pairs(self, flat, share, layer=None):
        """([whole rows], [their shares]) of a flat array and a share; layer: of that layer, -1: outside the layers."""
        rows = [row for part in self.parts for row in part]
        if layer is not None:
            rows = [row for row in rows if (row.layer if self.specs[row.tensor].layers else -1) == layer]
        whole = [flat[row.start :][: row.size * self.P] for row in rows]
        return whole, [share[row.at :][: row.size] for row in rows]

    def set_tables(self, seeds, weight_decay):
        """The tables of one update, from the 16 seeds: each row's noise is that of its place in the whole tensor."""
        _, decays, row_seeds = (np.zeros(table.shape, table.dtype) for table in self.tables)
        for k, rows in enumerate(self.parts):
            for j, row in enumerate(rows):
                spec = self.specs[row.tensor]
                first = row.layer * row.size * self.P + self.rank * row.size
                first = (first & 0xFFFFFFFF) + NOISE[1] * (first >> 32)
                decays[k, j] = weight_decay if spec.decay else 0.0
                row_seeds[k, j] = (int(seeds[row.tensor]) + first * NOISE[0]) & 0xFFFFFFFF
        self.device.upload(self.tables[1], decays)
        self.device.upload(self.tables[2], row_seeds)

    def calls(self, *arenas):
        """For each part its views of the arenas (N/P,), None staying None, and of the tables ends, decays, seeds."""
        for k, rows in enumerate(self.parts):
            a, b = rows[0].at, rows[-1].at + rows[-1].size
            yield [array if array is None else array[a:b] for array in arenas], [table[k] for table in self.tables]
