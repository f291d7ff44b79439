"""An OS lock on a file: the system releases it when its process ends, however that ends.

It excludes the processes of one machine from each other, and those of several machines on a network file system whose
server has locks. The text of the file names the process and machine. The file is removed when the lock is released.
"""

import contextlib
import errno
import os
import platform
import sys
import time
from collections.abc import Iterator

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # the file system cannot do it


@contextlib.contextmanager
def held(path: str) -> Iterator[bool]:
    """Hold the lock on a file until the block ends; yields False where its file system has no locks.

    Errors: BlockingIOError where another process has it, see holder(); OSError where there can be no such file.
    """
    fd, locked = take(path)
    try:
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()} {platform.node()}\n".encode())
        yield locked
    finally:
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(fd)
        with contextlib.suppress(OSError):
            os.remove(path)  # while it is locked; take() of another process, which has opened it, sees that it is gone
        if sys.platform != "win32":
            os.close(fd)


@contextlib.contextmanager
def waited_for(path: str, what: str) -> Iterator[bool]:
    """held(), but wait for the lock as long as it takes. what: the work of whoever has it, for a line on stderr."""
    with contextlib.ExitStack() as stack:
        said = False
        while True:
            try:
                locked = stack.enter_context(held(path))
                break
            except BlockingIOError:
                if not said:
                    print(f"waiting for {holder(path)}: {what}", file=sys.stderr)
                    said = True
                time.sleep(0.1)
        yield locked


def take(path: str) -> tuple[int, bool]:
    """(descriptor of the lock file, whether it is locked). Errors: BlockingIOError where it is taken, OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            locked = lock_descriptor(fd)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):  # else its owner has just removed it
                    return fd, locked
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def lock_descriptor(fd: int) -> bool:
    """Lock an open file for this process, False where the file system cannot. Errors: BlockingIOError; OSError."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(fd, 1 << 30, os.SEEK_SET)  # far behind the text, which others may read
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # belongs to the open file, so it also excludes threads
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError(error.errno, error.strerror) from error
        raise
    return True


def holder(path: str) -> str:
    """The process that holds a lock, as the text of the lock file names it."""
    for _ in range(20):  # the process may not have written the text yet
        with contextlib.suppress(OSError):
            with open(path, encoding="utf-8", errors="replace") as file:
                pid, _, host = file.read(300).strip().partition(" ")
            if pid.isdecimal() and host.isprintable():
                return f"process {pid} on {host}"
        time.sleep(0.05)
    return "another process"
