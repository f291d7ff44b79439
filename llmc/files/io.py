"""What every file format needs: files are written whole or not at all, checked before use, and moved in pieces.

llm.c's files are little-endian and start with 256 int32 words h[0..255], of which h[0] says what the file is and h[1]
its version; words without a meaning are 0. model_file.py, state_file.py and debug_state.py have the three that a run
writes, llmc/data those of tokens, eval sets and tokenizers.
"""

import contextlib
import errno
import os
import secrets
import stat
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedReader
from typing import Any, BinaryIO

import numpy as np

from llmc.errors import UserError

HEADER_BYTES = 1024
MODEL_MAGIC, DEBUG_MAGIC, STATE_MAGIC = 20240326, 20240327, 20240527
KINDS: dict[int | None, str] = {  # h[0] -> what such a file is
    MODEL_MAGIC: "a GPT-2 model",
    DEBUG_MAGIC: "a debug state",
    STATE_MAGIC: "a train state",
    20240328: "a tokenizer",
    20240520: "a GPT-2 token shard",
    20240522: "an eval set",
    20240801: "a Llama-3 token shard",
    20240803: "a Llama-3 model",
}
CHUNK = 4 << 20  # elements converted and moved at a time

Path = str | os.PathLike


# ---------------------------------------------------------------------------------------------------------------------
# whole files


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut, where the system opens folders: Windows does not."""
    try:
        fd = os.open(folder or ".", os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(fd)


def create(path: Path) -> BinaryIO:
    """Open a new file to write. It is an error if the name is taken, also by a link that somebody else made."""
    return open(path, "xb")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends: readers see the old file or all of the new one.

    The bytes go to a new temporary file in the same folder, are fsynced and renamed over `path`; then the folder is
    fsynced. After an exception the temporary file is gone and an old `path` is untouched. OSError (disk full, not
    writable, no such folder) becomes UserError. A kill leaves the temporary file to checkpoints.prune_stray.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        file = create(temporary)
        try:
            with file:
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
            "free space; nothing half-written is left behind"
        ) from error


def open_regular(path: Path) -> BufferedReader:
    """Open an ordinary file to read. Errors: OSError, also for a file of another type.

    Opening a named pipe would wait for somebody who writes, a device may never end, and both have no size to check.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # open() itself refuses a folder
        what = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(errno.EINVAL, f"it is {what}, not a file", os.fspath(path))
    return open(path, "rb")


@contextlib.contextmanager
def open_checked(path: Path, magic: int, versions: Sequence[int]) -> Iterator[tuple[BufferedReader, np.ndarray, int]]:
    """Yield (file, header (256,) int32, size in bytes) of a readable file with this magic and one of these versions.

    Errors: UserError for a file that cannot be read, is empty, of another kind or version, or shorter than a header.
    """
    path, kind = os.fspath(path), KINDS[magic]
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = np.frombuffer(file.read(HEADER_BYTES), np.uint8)
            if header.size == 0:
                raise UserError(f"{path} is empty. HINT: {kind} was expected; a copy or download may have failed")
            word = int(header[:4].view(np.int32)[0]) if header.size >= 4 else None
            if word != magic:
                found = KINDS.get(word, f"not a file of llm.c (first word {word})")
                raise UserError(f"{path} is {found}, expected {kind} (magic {magic}). HINT: check the path")
            if header.size < HEADER_BYTES:
                raise UserError(
                    f"{path} is truncated: {size} bytes, a header takes {HEADER_BYTES}. HINT: copy it again"
                )
            header = header.view(np.int32)
            if header[1] not in versions:
                old = "this is an old layout of llm.c, its current train_gpt2.py writes the new one"
                raise UserError(
                    f"{path} is {kind} of version {header[1]}, only {' and '.join(map(str, versions))} can be read. "
                    f"HINT: {old if header[1] == 1 else 'the file is damaged or of a newer program'}"
                )
            yield file, header, size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. HINT: {kind} was expected there") from error


def check_size(path: Path, size: int, expected: int, what: str) -> None:
    """UserError for a file of `size` bytes where `what` takes `expected` of them."""
    if size != expected:
        state = "empty" if size == 0 else "truncated" if size < expected else "over-long"
        raise UserError(f"{path} is {state}: {size} bytes, {what} takes {expected}. HINT: copy or write it again")


# ---------------------------------------------------------------------------------------------------------------------
# their content


class Checksum:
    """The write() of a binary file, which also keeps in `crc` the CRC-32 of everything written so far."""

    def __init__(self, file: BinaryIO):
        self.file, self.crc = file, 0

    def write(self, data: Any) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.file.write(data)


def read_into(file: BufferedReader, array: np.ndarray) -> None:
    """Fill a flat array (=) with the file's next bytes."""
    for i in range(0, array.size, CHUNK):
        part = array[i : i + CHUNK]
        if file.readinto(part.data.cast("B")) != part.nbytes:
            raise UserError(f"{file.name} ended early. HINT: it was cut while it was read")


def write_from(file: BinaryIO | Checksum, array: np.ndarray) -> None:
    """Write the bytes of a flat array."""
    for i in range(0, array.size, CHUNK):
        file.write(array[i : i + CHUNK].data.cast("B"))


def get_u64(header: np.ndarray, word: int) -> int:
    """The unsigned 64-bit number in words `word` and `word` + 1."""
    return int(header[word : word + 2].view(np.uint64)[0])


def put_u64(header: np.ndarray, word: int, value: int) -> None:
    """Write an unsigned 64-bit number into words `word` and `word` + 1."""
    header[word : word + 2].view(np.uint64)[0] = value


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """uint16 bf16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bf16 bits, round to nearest even; NaN stays NaN (quiet, same sign), overflow becomes Inf."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def convert(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Convert float32 to bf16 (as uint16) or back; values that already have `dtype` are returned as they are."""
    if values.dtype == dtype:
        return values
    return bf16_to_fp32(values) if dtype == np.float32 else fp32_to_bf16(values)


def first_not_finite(values: np.ndarray) -> int | None:
    """Index of the first NaN or Inf in a flat array of float32, float16, or bf16 as uint16; None without any."""
    for i in range(0, values.size, CHUNK):
        part = values[i : i + CHUNK]
        finite = (part & 0x7F80) != 0x7F80 if part.dtype == np.uint16 else np.isfinite(part)
        if not finite.all():
            return i + int(np.argmin(finite))
    return None
