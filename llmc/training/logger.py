"""What a run writes down: main.log in llm.c's format, metrics.jsonl, and the live display.

Source: llm.c llmc/logger.h (main.log), train_gpt2.cu main (step line).
"""

import contextlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from llmc.command import say, silence
from llmc.errors import UserError
from llmc.files import parse
from llmc.files.io import atomic_write, open_regular


class Logger:
    """<output_dir>/main.log and metrics.jsonl, one line per event, each written with a single write() call.

    main.log is llm.c's: `s:%d trl:%.4f lr:%.6f norm:%.2f`, `s:%d tel:%.4f`, `s:%d eval:%.4f` with the 0-based step.
    metrics.jsonl has one strict JSON object a line with the key `step`; NaN and Inf are null.
    output_dir None: every call does nothing. Only rank 0 has a Logger with a folder.
    resume_step None: both files are new. Those of an earlier run are renamed to main.log.1 and metrics.jsonl.1, or to
    the next number that is free. A run that resumes at step s keeps the lines before s. It does step s again, with its
    validation, and logs it again, so the files end up as those of a run that was never killed.
    Errors: UserError where the files cannot be written.
    """

    def __init__(self, output_dir: str | None, resume_step: int | None = None) -> None:
        self.output_dir = output_dir
        if output_dir is None:
            return
        try:
            os.makedirs(output_dir, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create {output_dir}: {error.strerror}. HINT: give -o a folder to write to"
            ) from error
        if resume_step is None:
            set_aside([os.path.join(output_dir, name) for name in ("main.log", "metrics.jsonl")])
        for name, step_of in (("main.log", main_log_step), ("metrics.jsonl", metrics_step)):
            keep_lines_before(os.path.join(output_dir, name), step_of, resume_step or 0)

    def train(self, step: int, loss: float, lr: float, grad_norm: float, **metrics: Any) -> None:
        """Log a training step; metrics: dt_ms, tokens_per_second, ... for metrics.jsonl only."""
        self._append("main.log", f"s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{grad_norm:.2f}")
        self._append("metrics.jsonl", to_json(step=step, train_loss=loss, lr=lr, grad_norm=grad_norm, **metrics))

    def val(self, step: int, loss: float, **metrics: Any) -> None:
        """Log a validation loss."""
        self._append("main.log", f"s:{step} tel:{loss:.4f}")
        self._append("metrics.jsonl", to_json(step=step, val_loss=loss, **metrics))

    def eval(self, step: int, accuracy: float, **metrics: Any) -> None:
        """Log a HellaSwag accuracy."""
        self._append("main.log", f"s:{step} eval:{accuracy:.4f}")
        self._append("metrics.jsonl", to_json(step=step, eval_accuracy=accuracy, **metrics))

    def _append(self, name: str, line: str) -> None:
        if self.output_dir is None:
            return
        path = os.path.join(self.output_dir, name)
        try:
            with open(path, "ab", buffering=0) as file:
                file.write(line.encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}. HINT: free disk space or check -o") from error


def to_json(**values: Any) -> str:
    """One strict JSON object; NumPy scalars become numbers, NaN and Inf null."""
    values = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False)


def main_log_step(line: bytes) -> int | None:
    """Step of a main.log line, None where it is not one."""
    match = re.match(rb"s:(\d{1,18}) ", line)
    return int(match[1]) if match else None


def metrics_step(line: bytes) -> int | None:
    """Step of a metrics.jsonl line, None where it is not one."""
    try:
        return parse.integer(parse.dictionary(parse.json_of(line, "a line"), "a line").get("step"), "step")
    except UserError:
        return None


def set_aside(paths: list[str]) -> None:
    """Rename the files of an earlier run to NAME.N. N is the first number free for all of them; empty files stay."""
    N = next(n for n in itertools.count(1) if not any(os.path.lexists(f"{path}.{n}") for path in paths))
    for path in paths:
        try:
            if os.path.isfile(path) and os.path.getsize(path) > 0:
                os.rename(path, f"{path}.{N}")
        except OSError as error:
            raise UserError(f"cannot rename {path}: {error.strerror}. HINT: check -o") from error


def keep_lines_before(path: str, step_of: Callable[[bytes], int | None], step: int) -> None:
    """Rewrite a log atomically with only the lines of steps before `step`. All others go, as does a torn last line."""
    kept = []
    if step > 0 and os.path.exists(path):
        try:
            with open_regular(path) as file:
                lines = file.read().split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}. HINT: check -o") from error
        kept = [line + b"\n" for line in lines if (s := step_of(line)) is not None and s < step]
    with atomic_write(path) as file:
        file.writelines(kept)


def step_line(
    step: int,
    total_steps: int,
    loss: float,
    loss_z: float,
    grad_norm: float,
    norm_z: float,
    lr: float,
    dt_ms: float,
    mfu: float | None,
    tokens_per_second: float,
) -> str:
    """llm.c's console line of the 0-based `step` (printed from 1). z-scores may be NaN; mfu is a fraction or None."""
    used = "n/a" if mfu is None else f"{100 * mfu:.1f}%"
    return (
        f"step {step + 1:4d}/{total_steps} | loss {loss:7.6f} ({loss_z:+.2f}z)| norm {grad_norm:6.4f} "
        f"({norm_z:+.2f}z)| lr {lr:.2e} | {dt_ms:.2f} ms | {used} bf16 MFU | {tokens_per_second:.0f} tok/s"
    )


class Display:
    """Progress of a run on stdout: a calm bar with ETA on a terminal (live), plain lines where stdout is piped.

    live: sys.stdout.isatty(). If it is set, step() moves the bar and write() prints above it. Otherwise step() prints
    its line, and no escape code is ever written. first_step: steps done before this run (resume).
    folder: where the run has its files, or None. stdout may fail: its reader or terminal is gone, or its disk is full.
    A run with a folder says so once on stderr and goes on. For a run without one the first such write raises OSError.
    """

    def __init__(self, total_steps: int, live: bool, first_step: int = 0, folder: str | None = None) -> None:
        self.bar, self.folder = None, folder
        if live:
            from tqdm import tqdm  # only here: its import takes longer than the rest of the start

            try:  # as tqdm asks the terminal itself; $COLUMNS may say something else
                columns = os.get_terminal_size(sys.stdout.fileno()).columns
            except (OSError, ValueError):
                columns = 0  # a terminal that does not know its width
            self.bar = tqdm(
                total=total_steps,
                initial=first_step,
                mininterval=0.25,
                miniters=1,
                dynamic_ncols=columns > 0,
                ncols=None if columns > 0 else 80,
                file=sys.stdout,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def step(self, line: str, loss: float, lr: float, tokens_per_second: float) -> None:
        """One training step is done. line: step_line()'s, printed where there is no bar."""
        with self.going_on():
            if self.bar is None:
                print(line, flush=True)
            else:
                shown = f"loss {loss:.4f} | lr {lr:.2e} | {tokens_per_second:.0f} tok/s"
                self.bar.set_postfix_str(shown, refresh=False)
                self.bar.update()

    def write(self, text: str) -> None:
        """Print lines that stay: validation loss, samples, checkpoints."""
        with self.going_on():
            if self.bar is None:
                print(text, flush=True)
            else:
                self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        with self.going_on():
            if self.bar is not None:
                self.bar.close()

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Around a write to stdout: what happens if it fails, as the class describes."""
        try:
            yield
        except OSError as error:
            if self.folder is None:
                raise
            silence(sys.stdout)
            self.bar = None
            gone = f"stdout: {error.strerror or error}; the run goes on, its lines are in {self.folder}"
            say(f"llmc.train: {gone}. HINT: Ctrl-C or kill end it after a checkpoint.")
