"""An OS lock on a file: the system lets go of it when its process ends, however that ends.

It holds between processes, on one machine or on a network file system that knows locks. Where the file system knows
none, nothing is locked: that is as far as it can be done.
"""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

WINDOWS_PLACE = 1 << 30  # the byte that is locked there: far behind the text, which others may then read


class Lock:
    """A lock on the file `path`, which is made where it is missing and holds the name of its holder, a line of text."""

    def __init__(self, path: str):
        self.path = path
        self._file: int | None = None

    def acquire(self) -> str | None:
        """Take the lock without waiting: None, or who has it, as "process 4711 on HOST". Errors: OSError."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                holder = None if _lock(file) else os.read(file, 200).decode(errors="replace").strip() or "a process"
                current = holder is None and _is_at(file, self.path)
            except BaseException:
                os.close(file)
                raise
            if current:
                break
            os.close(file)
            if holder:
                return holder
            # the holder before us removed the file between our opening and locking it: what we have locked is no more
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file = file
        return None

    def release(self, remove: bool = False) -> None:
        """Let go; remove: the file goes too. Without effect if the lock is not held."""
        if self._file is None:
            return
        if remove:  # while it is locked: nobody can have it but by opening it anew
            with contextlib.suppress(OSError):
                os.remove(self.path)
        os.close(self._file)
        self._file = None


@contextlib.contextmanager
def locked(path: str, what: str) -> Iterator[None]:
    """Hold the lock on `path` while the block runs, waiting for it as long as it takes; the file is gone afterwards.

    what: a description of the work, for the line on stderr that says what is waited for. Errors: OSError.
    """
    lock, said = Lock(path), False
    while holder := lock.acquire():
        if not said:
            print(f"waiting for {holder}: {what}", file=sys.stderr)
            said = True
        time.sleep(0.1)
    try:
        yield
    finally:
        lock.release(remove=True)


def _lock(file: int) -> bool:
    """Whether the lock was free, and now is ours; also where the file system knows no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(file, WINDOWS_PLACE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
    return True


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
