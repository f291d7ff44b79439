"""llm.c's model, train-state and debug-state files, read and written byte for byte."""

import contextlib
import errno
import os

from llmc import UserError


def fsync_folder(folder):
    """Make renames and removals in `folder` survive a power cut."""
    fd = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file that becomes `path` when the block ends: readers see the old file or all of the new one.

    The bytes go to a temporary file in the same folder, are fsynced and renamed over `path`; then the folder is fsynced.
    After an exception the temporary file is gone and an old `path` is untouched. OSError (disk full, not writable, no
    such folder) becomes UserError. A kill can leave the temporary file behind: see prune_stray.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        fsync_folder(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. HINT: check that the folder exists, is writable and has "
            "free space; an earlier file of this name is unchanged"
        ) from error
