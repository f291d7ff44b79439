"""Softmax, cross-entropy and their gradient: kernels/fused_classifier.cu (llm.c: llmc/fused_classifier.cuh)."""

import numpy as np

from llmc.buffers import Array

from . import module

REGISTERS_BLOCK, SHARED_BLOCK = 768, 1024  # most threads of a block


def defines() -> tuple[str, ...]:
    """The -D options of kernels/fused_classifier.cu."""
    return f"REGISTERS_BLOCK={REGISTERS_BLOCK}", f"SHARED_BLOCK={SHARED_BLOCK}"


def fused_classifier(
    logits: Array, losses: Array, dloss: float, targets: Array, V: int, write_dlogits: bool = True
) -> None:
    """p = softmax(logits[..., :V]);  losses += -log p[target];  logits[..., :V] = (p - onehot(target)) * dloss.

    logits  (B, T, Vp) floatX; first V columns overwritten (=) if write_dlogits, else untouched; columns V..Vp are never
            read or written
    losses  (B, T) f32 accumulated (+=), nats      targets (B, T) i32, each < V (the loader has checked)
    dloss   float: 1/(B*T*micro-steps), times the loss scale in fp16
    Any V >= 1 and any Vp >= V. All arrays C-contiguous.
    Cost: 2*B*T*V*itemsize bytes, half of that without write_dlogits.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/fused_classifier.cuh fused_classifier.
    """
    fits = 90 <= module.capability() < 120 and row_bytes(logits, V) <= 226 * 1024  # GPUs with 228 KiB of shared memory
    in_memory = in_shared_memory if fits else in_registers
    in_memory(logits, losses, dloss, targets, V, write_dlogits)


def in_registers(
    logits: Array, losses: Array, dloss: float, targets: Array, V: int, write_dlogits: bool = True
) -> None:
    """fused_classifier with the row kept in registers: read once up to V = 55296 (fp32: 27648)."""
    args = (logits, losses, dloss, targets, V, write_dlogits)
    launch_rows("fused_classifier.cu", "fused_classifier_registers_kernel", REGISTERS_BLOCK, *args, options=defines())


def in_shared_memory(
    logits: Array, losses: Array, dloss: float, targets: Array, V: int, write_dlogits: bool = True
) -> None:
    """fused_classifier with the row kept in shared memory: two blocks take turns at loading and writing."""
    args, smem = (logits, losses, dloss, targets, V, write_dlogits), row_bytes(logits, V)
    launch_rows("fused_classifier.cu", "fused_classifier_shared_kernel", SHARED_BLOCK, *args, smem, defines())


def row_bytes(logits: Array, V: int) -> int:
    """Shared memory that a row takes."""
    return -(-V * logits.itemsize // 16) * 16


def launch_rows(
    file: str, name: str, max_block: int, logits: Array, losses: Array, dloss: float, targets: Array, V: int,
    write_dlogits: bool, smem: int = 0, options: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """A kernel with a block for each row: as many warps as the row has 16-byte packs for, up to max_block threads."""
    N, Vp = check(logits, losses, targets, V)
    block = max(32, min(max_block, -(-V * logits.itemsize // (16 * 32)) * 32))
    kernel = module.kernel(file, name, logits.dtype, options, smem)
    dims = (np.int32(N), np.int32(V), np.int32(Vp), np.int32(bool(write_dlogits)))
    kernel((N,), (block,), (logits, losses, targets, np.float32(dloss), *dims), shared_mem=smem)


def check(logits: Array, losses: Array, targets: Array, V: int) -> tuple[int, int]:
    """(N, Vp)"""
    B, T, Vp = logits.shape
    assert losses.shape == targets.shape == (B, T) and 0 < V <= Vp, (logits.shape, losses.shape, targets.shape, V)
    assert losses.dtype == np.float32 and targets.dtype == np.int32, (losses.dtype, targets.dtype)
    return B * T, Vp
