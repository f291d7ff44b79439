"""One update: the micro-batches forward and backward, the norms, AdamW, and what happens if a number is out of line.

Source: llm.c train_gpt2.cu main.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llmc.model import AdamW, Model
from llmc.training.schedulers import get_learning_rate
from llmc.training.settings import Settings


class StepResult(NamedTuple):
    """What one step found."""

    loss: float  # mean in nats over the tokens of the update, on all ranks
    loss_z: float  # its z-score among the last 128, NaN before there are as many
    grad_norm: float  # L2 norm of the gradients before they are clipped
    norm_z: float  # its z-score
    lr: float  # learning rate of the update
    notice: str | None  # a line about what was out of line, or None


def train_step(
    model: Model,
    loader: Any,
    settings: Settings,
    step: int,
    steps: int,
    inputs: np.ndarray,
    targets: np.ndarray,
    detectors: Mapping[str, Any],
    output_dir: str | None = None,
) -> StepResult:
    """One update over micro-batches that are loaded into inputs, targets (M, B, T) i32; returns a StepResult.

    step: 0-based; steps: those of the whole run, on which the learning rate depends; output_dir: where a step that is
    not finite is saved. In fp16 a step whose gradients overflow is done again with a smaller loss scale, on the same
    batch.
    Errors: UserError of --on-nonfinite stop.
    """
    adamw = adamw_of(settings, step, steps)
    may_skip = settings.skip_update_loss_z or settings.skip_update_grad_z
    rng_state, last_update = model.rng_state, model.rng_state_last_update
    scaler, loaded, notice = detectors.get("loss_scale"), False, None
    while True:
        if scaler:
            model.loss_scale = scaler.scale
        for micro_step, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            if not loaded:
                loader.next_batch(x, y)
            model.forward(x)
            model.backward(x, y, len(inputs), micro_step)
        if may_skip:
            model.measure_norm()
        else:
            model.update(adamw, step + 1)  # queued before the host waits for the loss, so that a GPU has work
        loss, grad_norm = model.mean_loss(len(inputs)), model.grad_norm()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite or not (scaler and math.isfinite(loss) and scaler.overflow()):
            break
        notice = f"step {step + 1}: the gradients overflowed in fp16, again with loss scale {scaler.scale:g}"
        loaded, model.rng_state = True, rng_state
    if not finite:
        from llmc.training.nonfinite import step_failed

        model.rng_state_last_update = last_update
        notice = step_failed(
            model, inputs, targets, step=step, rng_state=rng_state, loss=loss, grad_norm=grad_norm,
            update=vars(adamw) | dict(t=step + 1), output_dir=output_dir, on_nonfinite=settings.on_nonfinite,
        )  # fmt: skip
        return StepResult(loss, math.nan, grad_norm, math.nan, adamw.lr, notice)
    if scaler:
        scaler.good_step()
    loss_z, norm_z = detectors["loss"].update(loss), detectors["grad_norm"].update(grad_norm)
    skip = skip_notice(settings, loss_z, norm_z)
    if may_skip and not skip:
        model.update(adamw, step + 1)
    return StepResult(loss, loss_z, grad_norm, norm_z, adamw.lr, skip or notice)


def adamw_of(settings: Settings, step: int, steps: int) -> AdamW:
    """The numbers of AdamW in the 0-based step."""
    s = settings
    schedule = (s.learning_rate, s.warmup_iterations, steps, s.final_learning_rate_frac)
    lr = get_learning_rate(s.lr_scheduler, step, *schedule)
    return AdamW(lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.grad_clip)


def skip_notice(settings: Settings, loss_z: float, norm_z: float) -> str | None:
    """llm.c's line when -sl or -sg skips an update, else None. For 128 steps z-scores are NaN and skip nothing."""
    if settings.skip_update_loss_z and loss_z > settings.skip_update_loss_z:
        return f"skipping update due to loss z-score of {loss_z:f}"
    if settings.skip_update_grad_z and norm_z > settings.skip_update_grad_z:
        return f"skipping update due to grad z-score of {norm_z:f}"
    return None


class Speed:
    """Milliseconds and tokens/s of the steps so far, as llm.c averages them: the first step of a run does not count."""

    def __init__(self, total_batch: int) -> None:
        self.total_batch, self.steps, self.total_ms, self.smoothed = total_batch, 0, 0.0, 0.0

    def update(self, ms: float) -> float:
        """Tokens/s to show after a step of ms: its own at first, then an exponential average."""
        rate = self.total_batch / ms * 1e3
        self.steps += 1
        if self.steps == 1:
            return rate
        self.total_ms += ms
        self.smoothed = 0.95 * self.smoothed + 0.05 * rate
        return self.smoothed / (1.0 - 0.95 ** (self.steps - 1))

    def average_ms(self) -> float | None:
        """Mean ms of the steps that count, None where there are none."""
        return self.total_ms / (self.steps - 1) if self.steps > 1 else None
