"""Learning-rate schedules; s = step, W = warm-up steps, N = all steps, M = peak, f = final fraction.

warm-up, all but constant      s < W: lr = M (s + 1) / W
cosine                         d = (s - W) / (N - W),  lr = f M + 0.5 (1 + cos(pi d)) (M - f M)
linear                         d = (s - W) / (N - W),  lr = M - d (M - f M)
wsd (warm-up, stable, decay)   D = int(0.8 N); M until D, then d = (s - D) / (N - D), lr = f M + (1 - sqrt(d)) (M - f M)
constant                       lr = M, also in the first W steps

Source: llm.c llmc/schedulers.h get_learning_rate, which also computes in float32; wsd: Haegele et al. 2024,
arXiv:2405.18392.
"""

import math

import numpy as np

from llmc.errors import UserError

NAMES = ("cosine", "linear", "constant", "wsd")


def check(name: str) -> None:
    """Raise UserError unless `name` is a schedule."""
    if name not in NAMES:
        raise UserError(f"unknown learning-rate schedule {name!r} (-k). HINT: use one of {', '.join(NAMES)}")


def get_learning_rate(
    name: str,
    step: int,
    learning_rate: float,
    warmup_iterations: int,
    train_num_batches: int,
    final_learning_rate_frac: float,
) -> float:
    """Learning rate of the 0-based `step` as a float that float32 holds exactly.

    warmup_iterations, train_num_batches in steps; step < train_num_batches unless the schedule is constant.
    Errors: UserError for an unknown name.
    """
    check(name)
    f32 = np.float32
    peak = f32(learning_rate)
    floor = peak * f32(final_learning_rate_frac)
    if name == "constant":
        return float(peak)
    if step < warmup_iterations:
        return float(peak * f32(step + 1) / f32(warmup_iterations))
    start = int(f32(0.8) * f32(train_num_batches)) if name == "wsd" else warmup_iterations
    if step < start:
        return float(peak)
    d = f32(step - start) / f32(train_num_batches - start)
    assert 0 <= d <= 1, (name, step, start, train_num_batches)
    if name == "cosine":
        # math.cos, not np.cos: NumPy's float32 cosine differs between processors in the last bit
        return float(floor + f32(0.5) * (f32(1) + f32(math.cos(f32(math.pi * float(d))))) * (peak - floor))
    if name == "linear":
        return float(peak - d * (peak - floor))
    return float(floor + (f32(1) - np.sqrt(d)) * (peak - floor))
