"""The folder of a run, -o: only one run at a time uses it, and a command that is refused leaves no trace in it.

The run holds an OS lock on DIR/.lock, whose text names its process and machine. A process that dies lets go of the lock
by itself, on NFS too where the server has locks. Only rank 0 of a run looks at the folder before the first step.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmc.errors import UserError
from llmc.files import checkpoints
from llmc.files.lock import held, holder
from llmc.parallel.launch import on_rank0

DEFAULT = os.path.join("runs", "shakespeare-{:03d}")


@dataclass(frozen=True)
class Folder:
    """Where a run writes, and where it begins."""

    path: str | None  # None: nothing is written
    resume_step: int | None = None  # the step of the checkpoint that the run continues
    line: str | None = None  # a line to print about it

    @property
    def place(self) -> str:
        """The path, of a Folder that has one."""
        assert self.path is not None
        return self.path


NOWHERE = Folder(None)


@contextlib.contextmanager
def opened(path: str | None, resume: bool, default_job: bool, ranks: Any = None) -> Iterator[Folder]:
    """Yield the Folder of a run, locked until the block ends; all ranks call it, with the Ranks of the run or None.

    path None: the default job takes a new folder in runs/, any other run writes nothing. resume: continue from the
    newest checkpoint. No file in the folder is changed here. Folders made here that are empty at the end are removed.
    Errors: UserError for a folder that cannot be written to, that another run is in, or that holds an earlier run.
    """
    if path is None and resume:
        raise UserError("-y 1 resumes from -o, which is not given. HINT: give -o DIR.")
    with contextlib.ExitStack() as stack:

        def enter() -> tuple[str | None, int | None, str | None]:
            found = path if path or not default_job else stack.enter_context(new_folder(DEFAULT))
            if found is None:
                return None, None, None
            if path:
                stack.enter_context(made(found))
            locked = stack.enter_context(lock(found))
            step, line = begin(found, resume)
            return found, step, line or (None if locked else f"-o {found}: no locks there; keep other runs out of it")

        yield Folder(*on_rank0(ranks, enter))


def begin(folder: str, resume: bool) -> tuple[int | None, str | None]:
    """(step to resume from or None, a line where -y 1 finds nothing to continue). Errors: UserError."""
    steps = checkpoints.checkpoint_steps(folder)
    if not resume:
        if steps:
            held = f"holds checkpoints of an earlier run, up to step {steps[-1]}"
            raise UserError(f"-o {folder} {held}. HINT: -y 1 continues it; for a new run give another folder.")
        return None, None
    step = checkpoints.latest_checkpoint(folder)
    return step, f"-y 1: {folder} holds no checkpoint; this run starts at step 0" if step is None else None


@contextlib.contextmanager
def new_folder(pattern: str) -> Iterator[str]:
    """Make and yield the first folder of a numbered pattern that does not exist; no two processes get the same one."""
    for number in range(1, 10**6):
        folder = pattern.format(number)
        if not os.path.lexists(folder):
            with made(folder) as new:
                if folder in new:  # else another process was faster
                    yield folder
                    return
    raise UserError(f"{os.path.dirname(pattern)} is full. HINT: give -o DIR.")


@contextlib.contextmanager
def made(folder: str) -> Iterator[list[str]]:
    """Make a folder and those above it, and yield the ones that are new. At the end the empty ones of these go."""
    new: list[str] = []
    missing, above = [], folder
    while above and not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    try:
        try:
            for path in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path)
                    new.append(path)
            if not os.path.isdir(folder):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except OSError as error:
            raise UserError(f"-o {folder}: {error.strerror}. HINT: name a folder to write to.") from error
        yield new
    finally:
        for path in reversed(new):
            with contextlib.suppress(OSError):
                os.rmdir(path)


@contextlib.contextmanager
def lock(folder: str) -> Iterator[bool]:
    """Hold the lock of a folder; yields False where its file system has no locks.

    Errors: UserError that names the process which has the lock, or says why there can be no file in the folder.
    """
    path = os.path.join(folder, ".lock")
    with contextlib.ExitStack() as stack:
        try:
            locked = stack.enter_context(held(path))
        except BlockingIOError as error:
            busy = f"-o {folder} is in use by {holder(path)}"
            raise UserError(f"{busy}. HINT: wait until that run has ended, or give another folder.") from error
        except OSError as error:
            raise UserError(f"-o {folder}: {error.strerror}. HINT: name a folder to write to.") from error
        yield locked
