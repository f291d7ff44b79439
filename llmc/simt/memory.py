"""The arrays of a launch, and what of them counts as never written."""

import ctypes
import mmap
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from .build import runtime

NEVER_WRITTEN = 0xFFFFFFFE
poisoned: dict[int, tuple[int, np.ndarray]] = {}  # address: (end, mask per 2 bytes, of what nothing has written)


def poison(array: np.ndarray) -> None:
    """From now on the array counts as never written: a kernel that reads an element before a kernel wrote it is at
    fault. Writes from Python are not seen: `unpoison` afterwards."""
    begin, end = np.lib.array_utils.byte_bounds(array)
    unpoison(array)
    poisoned[begin] = (end, np.ones((end - begin + 1) // 2, bool))
    weakref.finalize(owner(array), poisoned.pop, begin, None)


def unpoison(array: np.ndarray) -> None:
    """The array counts as written."""
    begin, end = np.lib.array_utils.byte_bounds(array)
    for at, (stop, mask) in list(poisoned.items()):
        if at < end and begin < stop:
            mask[max(0, begin - at) // 2 : max(0, end - at + 1) // 2] = False
            if not mask.any():
                del poisoned[at]


def poisoned_bytes(begin: int, end: int) -> np.ndarray:
    """Which bytes from `begin` to `end` nothing has written: an array of bool."""
    found = np.zeros(end - begin, bool)
    for at, (stop, mask) in poisoned.items():
        low, high = max(at, begin), min(stop, end)
        if low < high:
            found[low - begin : high - begin] = np.repeat(mask, 2)[low - at : high - at]
    return found


def unpoison_bytes(begin: int, written: np.ndarray) -> None:
    """The bytes from `begin` on that `written` marks, and with them their pairs, count as written."""
    for at, (stop, mask) in poisoned.items():
        low, high = max(at, begin), min(stop, begin + written.size)
        if low < high:
            pairs = np.zeros(2 * mask.size, bool)
            pairs[low - at : high - at] = written[low - begin : high - begin]
            mask &= ~pairs.reshape(-1, 2).any(axis=1)


def alloc(nbytes: int) -> np.ndarray:
    """Zeroed bytes at a multiple of 256, like device memory: what `install` gives llmc.cuda.device.alloc."""
    return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)[:nbytes]


def owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def memory_at(address: int, nbytes: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.frombuffer(memoryview((ctypes.c_char * nbytes).from_address(address)), dtype)


class Group:
    """Arrays of one launch that overlap. They are copied to one place in the runtime's memory, far from all others, so
    that a step past the end of a view is seen even if the next view begins there."""

    def __init__(self, begin: int, end: int, array: np.ndarray, read_only: bool):
        self.begin, self.end, self.read_only = begin, end, read_only
        self.arrays: list[tuple[int, str, np.ndarray, int, int]] = []  # (argument's number, name, array, begin, end)
        # Distance to a multiple of 256: of the address, or of the offset in the owner, which CuPy would align so.
        offsets = (begin % 256, (begin - owner(array).ctypes.data) % 256)
        self.alignment = max(offsets, key=lambda n: n & -n or 256)

    def place(self, cursor: int) -> int:
        """Chooses the copy's address at or after `cursor` -> the next cursor."""
        self.at = -(-cursor // 256) * 256 + self.alignment
        nbytes = self.end - self.begin
        self.host, self.device = memory_at(self.begin, nbytes), memory_at(self.at, nbytes)
        return self.at + nbytes + min(max(nbytes, 4096), 1 << 20)

    def shadow(self, begin: int, end: int) -> np.ndarray:
        """The writer records of host addresses [begin, end), one per 2 bytes."""
        offset = begin - self.begin + self.at - runtime().simt_memory()
        return memory_at(runtime().simt_writers() + offset // 2 * 4, (end - begin + 1) // 2 * 4, np.uint32)

    def poisoned_parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at, (stop, mask) in poisoned.items():
            begin, end = max(at, self.begin), min(stop, self.end)
            if begin < end:
                yield self.shadow(begin, end), mask[(begin - at) // 2 : (end - at + 1) // 2]

    def fill(self, again: bool) -> None:
        """Copies the arrays in, unless they cannot have changed since the last run; marks what nothing has written."""
        if not (again and self.read_only):
            self.device[:] = self.host
        for shadow, mask in self.poisoned_parts():
            shadow[mask] = NEVER_WRITTEN

    def written(self) -> None:
        """Takes over what the kernels wrote."""
        for shadow, mask in self.poisoned_parts():
            mask &= shadow == NEVER_WRITTEN
        if not self.read_only:
            self.host[:] = self.device


def group_arrays(arrays: list[tuple[int, str, np.ndarray, bool]]) -> list[Group]:
    """[(number, name, array, read_only)] -> groups of overlapping ones, placed."""
    spans = sorted((*np.lib.array_utils.byte_bounds(a), i, n, a, ro) for i, n, a, ro in arrays if a.size)
    groups: list[Group] = []
    for begin, end, number, name, array, read_only in sorted(spans, key=lambda s: (s[0], -s[1])):
        if not groups or begin >= groups[-1].end:
            groups.append(Group(begin, end, array, read_only))
        group = groups[-1]
        group.end = max(group.end, end)
        group.read_only &= read_only
        group.arrays.append((number, name, array, begin, end))
    cursor = runtime().simt_memory() + runtime().simt_arena_size() + (1 << 20)
    for group in groups:
        cursor = group.place(cursor)
    if cursor > runtime().simt_memory() + runtime().simt_memory_size():
        raise MemoryError(
            "the launch's arrays exceed the executor's memory. HINT: smaller shapes, or simt.mode(fast=True)"
        )
    return groups
