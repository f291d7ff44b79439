"""The loop of llm.c: validate -> sample -> checkpoint -> step (train_gpt2.cu main)."""

import contextlib
import math
import sys
import time

import numpy as np

from llmc import gpt2
from llmc.errors import UserError
from llmc.files import checkpoints
from llmc.generation import sample_text
from llmc.model import Model
from llmc.training import checkpointing, mfu
from llmc.training.logger import Display, Logger, step_line
from llmc.training.multiple_choice import score_line, score_over_ranks
from llmc.training.setup import Detectors, Run
from llmc.training.signals import Interrupted, Signals, agreed
from llmc.training.step import Speed, train_step
from llmc.training.validation import validate

MOST_SKIPPED = 100  # steps in a row that --on-nonfinite skip leaves out: what lasts as long does not end by itself


def due(every: int, step: int, last: bool) -> bool:
    """Whether it is time for what -n, -s or -v want every so many steps and at the end: 0 is off, step 0 too early."""
    return bool(every) and (last or (step > 0 and step % every == 0))


class Loop:
    """A run's steps. A step is 0-based: before it, what its number asks for is validated, sampled and saved."""

    def __init__(self, run: Run, model: Model, detectors: Detectors, start_time: float) -> None:
        """start_time: time.perf_counter() when the command began."""
        B, T = run.settings.batch_size, run.T
        self.run, self.model, self.detectors, self.start_time = run, model, detectors, start_time
        self.settings, self.first = run.settings, run.folder.resume_step or 0
        self.val_loss: float | None = None  # the last one
        self.inputs, self.targets = np.empty((2, run.micro_steps, B, T), np.int32)
        self.logger = Logger(run.folder.path if model.rank == 0 else None, run.folder.resume_step)
        self.display = Display(run.steps, sys.stdout.isatty(), self.first, run.folder.path)
        self.speed, self.skipped = Speed(run.total_batch), 0
        self.flops = gpt2.flops_per_token(run.config, T) * B * T * run.micro_steps

    def train(self, signals: Signals) -> Interrupted | None:
        """Do all steps, or those until a signal comes: then a checkpoint is written, and Interrupted returned.

        signals: a Signals, whose handlers are set. Errors: UserError where a step is not finite.
        """
        signals.finishing = True
        with contextlib.closing(self.display):
            for step in range(self.first, self.run.steps + 1):
                last = step == self.run.steps
                stop = agreed(signals.seen, self.run.machine.sums)
                if last or not stop:
                    self.evaluate(step, last)
                self.checkpoint(step, last, interrupted=stop is not None and step > self.first)
                if last:
                    break
                if stop:
                    folder = self.run.folder.path
                    again = f"-o {folder} -y 1 continues" if folder else "-o DIR would have kept its work"
                    done = f"after step {step} of {self.run.steps}"
                    return Interrupted(stop, f"{done}. HINT: the same command with {again}.")
                self.step(step)
        return None

    def evaluate(self, step: int, last: bool) -> None:
        """Validation loss, HellaSwag and a sample, each where it is due."""
        s, run = self.settings, self.run
        if s.val_loss_every and (step % s.val_loss_every == 0 or last):
            self.val_loss = loss = validate(self.model, run.all_val_pairs if s.default_job and last else run.val_pairs)
            self.display.write(f"val loss {loss:.6f}")
            self.logger.val(step, loss)
        if run.examples and (last or due(s.val_loss_every, step, last)):
            result = score_over_ranks(self.model, run.examples, run.machine.sums)
            self.display.write(score_line(result))
            self.logger.eval(step, result.correct / result.total)
        if self.model.rank == 0 and due(s.sample_every, step, last):
            text = sample_text(self.model, run.tokenizer, s.sample_length, s.temperature)
            self.display.write(f"generating:\n---\n{text}\n---")

    def checkpoint(self, step: int, last: bool, interrupted: bool) -> None:
        """A checkpoint of `step` completed updates, where one is due or the run is interrupted."""
        s, run, folder = self.settings, self.run, self.run.folder
        wanted = interrupted or due(s.checkpoint_every, step, last)
        if not (folder.path and wanted) or step == folder.resume_step:
            return
        share = run.machine.ranks.exchange if run.machine.ranks else checkpoints.alone
        checkpointing.save(folder.path, step, self.model, run.train_loader, self.detectors, share)
        if self.model.rank == 0:
            checkpointing.let_go(folder.path, step, s)
        self.display.write(f"wrote checkpoint of step {step} to {folder.path}")

    def step(self, step: int) -> None:
        """One update, its lines on the display and in the logs."""
        s, run, device = self.settings, self.run, self.run.machine.ops.device
        timer = device.timer()
        if s.overfit_single_batch:
            run.train_loader.reset()
        batch = (self.inputs, self.targets)
        result = train_step(
            self.model, run.train_loader, s, step, run.steps, *batch, self.detectors, run.folder.path
        )  # fmt: skip
        device.synchronize()
        ms = timer()
        shown, used = self.speed.update(ms), mfu.utilisation(self.flops, ms, run.peak)
        if step == self.first:
            seconds = time.perf_counter() - self.start_time
            self.display.write(f"first step done {seconds:.2f} s after the start")
        if result.notice:
            self.display.write(result.notice)
        loss, loss_z, grad_norm, norm_z, lr, _ = result
        line = step_line(step, run.steps, loss, loss_z, grad_norm, norm_z, lr, ms, used, shown)
        self.display.step(line, loss, lr, shown)
        if run.gpu_stats and (step + 1) % s.log_gpu_every == 0:
            self.display.write(run.gpu_stats.line())
        rate = run.total_batch / ms * 1e3
        self.logger.train(step, loss, lr, grad_norm, dt_ms=ms, tokens_per_second=rate, mfu=used)
        self.skipped = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else self.skipped + 1
        if self.skipped == MOST_SKIPPED:
            held = f"--on-nonfinite skip: {MOST_SKIPPED} steps in a row were not finite, up to step {step + 1}"
            raise UserError(f"{held}. HINT: lower -l, and go on from an earlier checkpoint.")
