"""What ends a run early: Ctrl-C, and what schedulers, containers and closed terminals send. The step is finished first.

SIGTERM comes from kill, Slurm, Kubernetes and docker stop, SIGHUP from a terminal that goes away, SIGUSR1 from Slurm's
--signal. They all do what Ctrl-C does. The exit code tells which one it was: 128 + its number, as a shell has it.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from llmc.errors import UserError

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # not all systems have all of them
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Interrupted(UserError):
    """A signal has ended the run; code is the exit code that tells which one."""

    def __init__(self, signum: int, message: str):
        super().__init__(f"interrupted by {signal.Signals(signum).name} {message}")
        self.code = 128 + signum


class Signals:
    """Signals while a run lives: `with Signals(...) as signals`.

    Until `finishing` is set, a signal raises Interrupted wherever the program is. After that the first signal is kept
    in `seen`, which the loop looks at between steps. Another Ctrl-C then ends the program at once; any other signal has
    no further effect, as launchers and schedulers send theirs more than once. A signal that was ignored at the start
    stays ignored. Python has handlers only in the main thread, so in another thread all signals are left alone. At the
    end the handlers are what they were.
    """

    def __init__(self, patience: float = 0.0):
        """patience: for so many seconds after a signal, Ctrl-C counts as the same one, passed on by a launcher."""
        self.patience, self.at, self.finishing = patience, 0.0, False
        self.seen: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):  # None: not Python's
                    self.previous[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """What a signal does; see the class."""
        if not self.finishing:
            raise Interrupted(signum, "before the first step. HINT: the same command starts again.")
        if self.seen is None:
            self.seen, self.at = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.at >= self.patience:
            raise KeyboardInterrupt


def agreed(seen: int | None, communicator: Any) -> int | None:
    """The signal to stop for, the same on all ranks: the first of SIGNALS that any of them has seen, or None."""
    if communicator is None:
        return seen
    counts = communicator.sums([float(seen == signum) for signum in SIGNALS])
    return next((signum for signum, count in zip(SIGNALS, counts, strict=True) if count), None)
