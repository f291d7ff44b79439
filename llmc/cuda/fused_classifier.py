"""Softmax, cross-entropy and their gradient: kernels/fused_classifier.cu (llm.c: llmc/fused_classifier.cuh)."""

import numpy as np

from . import module


def check(logits, losses, targets, V):
    B, T, Vp = logits.shape
    assert losses.shape == targets.shape == (B, T) and 0 < V <= Vp, (logits.shape, losses.shape, targets.shape, V)
    assert losses.dtype == np.float32 and targets.dtype == np.int32, (losses.dtype, targets.dtype)
    return B * T, Vp


def block_per_row(number, max_block, logits, losses, dloss, targets, V, write_dlogits, smem=0):
    """Kernel `number`, with as many warps in a block as the row has packs for."""
    N, Vp = check(logits, losses, targets, V)
    block = max(32, min(max_block, -(-V * logits.itemsize // (16 * 32)) * 32))
    kernel = module.kernel("fused_classifier.cu", f"fused_classifier_kernel{number}", logits.dtype, smem=smem)
    dims = (np.int32(N), np.int32(V), np.int32(Vp), np.int32(bool(write_dlogits)))
    kernel((N,), (block,), (logits, losses, targets, np.float32(dloss), *dims), shared_mem=smem)


def fused_classifier1(logits, losses, dloss, targets, V, write_dlogits=True):
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
    N, Vp = check(logits, losses, targets, V)
    kernel = module.kernel("fused_classifier.cu", "fused_classifier_kernel1", logits.dtype)
    dims = (np.int32(N), np.int32(V), np.int32(Vp), np.int32(bool(write_dlogits)))
    kernel((-(-N // 32),), (32,), (logits, losses, targets, np.float32(dloss), *dims))


def fused_classifier2(logits, losses, dloss, targets, V, write_dlogits=True):
    """fused_classifier1 with a block per row."""
    block_per_row(2, 1024, logits, losses, dloss, targets, V, write_dlogits)


def fused_classifier3(logits, losses, dloss, targets, V, write_dlogits=True):
    """fused_classifier1 in two sweeps of 16-byte accesses."""
    block_per_row(3, 1024, logits, losses, dloss, targets, V, write_dlogits)


def fused_classifier4(logits, losses, dloss, targets, V, write_dlogits=True):
    """fused_classifier1 with the row kept in registers: read once up to V = 55296 (fp32: 27648)."""
    block_per_row(4, 768, logits, losses, dloss, targets, V, write_dlogits)


def row_bytes(logits, V):
    """Shared memory that fused_classifier5 takes for a row."""
    return -(-V * logits.itemsize // 16) * 16


def fused_classifier5(logits, losses, dloss, targets, V, write_dlogits=True):
    """fused_classifier1 with the row kept in shared memory: two blocks take turns at loading and writing."""
    block_per_row(5, 1024, logits, losses, dloss, targets, V, write_dlogits, smem=row_bytes(logits, V))


def fused_classifier(logits, losses, dloss, targets, V, write_dlogits=True):
    """fused_classifier5 on GPUs with 228 KiB of shared memory, where a row fits; else fused_classifier4."""
    fits = 90 <= module.capability() < 120 and row_bytes(logits, V) <= 226 * 1024
    rung = fused_classifier5 if fits else fused_classifier4
    rung(logits, losses, dloss, targets, V, write_dlogits)
