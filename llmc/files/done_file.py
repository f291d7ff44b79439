"""DONE_<step>, the marker of a finished checkpoint, with the CRC-32 and the size of each of its files.

    5f2a9c01 497904640 model_00000020.bin
    0d1e77aa 995809280 state_00000020_00000.bin
    9b3c0f12 DONE                                      CRC-32 of the lines above

llm.c looks only at whether the file exists, and writes an empty one. A checkpoint with an empty marker is complete, but
nothing tells whether its bits are still those that were written. A CRC-32 finds every flipped bit and every run of up
to 32 damaged ones. It does not protect against somebody who means to deceive.
"""

import os
import re
import zlib
from collections.abc import Mapping

from llmc.errors import UserError
from llmc.files import io

LINE = re.compile(rb"([0-9a-f]{8}) (0|[1-9]\d{0,18}) (model_\d{8,}\.bin|state_\d{8,}_\d{5,}\.bin)")
LAST = re.compile(rb"([0-9a-f]{8}) DONE")
LONGEST = 1 << 20  # bytes of a marker that are read, enough for some 20,000 ranks
HINT = "HINT: copy the checkpoint again, or resume from an older one"


def write_done(path: io.Path, sums: Mapping[str, tuple[int, int]]) -> None:
    """Write a marker, atomically. sums: name of a file -> (CRC-32, bytes). Errors: UserError."""
    text = "".join(f"{crc:08x} {size} {name}\n" for name, (crc, size) in sums.items()).encode()
    with io.atomic_write(path) as file:
        file.write(text + f"{zlib.crc32(text):08x} DONE\n".encode())


def read_done(path: io.Path) -> dict[str, tuple[int, int]] | None:
    """The sums that a marker holds, None where it is empty. Errors: UserError for one that is damaged."""
    try:
        with io.open_regular(path) as file:
            text = file.read(LONGEST)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {HINT}") from error
    if not text:
        return None
    *lines, last = text.removesuffix(b"\n").split(b"\n")
    rows, sealed = [LINE.fullmatch(line) for line in lines], LAST.fullmatch(last)
    whole = text.endswith(b"\n") and sealed and zlib.crc32(text[: text.rindex(last)]) == int(sealed[1], 16)
    if not whole or not all(rows):
        raise UserError(f"{path} is damaged: it is not the marker that was written. {HINT}")
    return {row[3].decode(): (int(row[1], 16), int(row[2])) for row in rows if row}


def check_file(path: io.Path, crc: int, size: int) -> None:
    """Read a file, which must have this CRC-32 and size. Errors: UserError that names it."""
    try:
        with io.open_regular(path) as file:
            found, actual = 0, os.fstat(file.fileno()).st_size
            while part := file.read(io.CHUNK) if actual == size else b"":
                found = zlib.crc32(part, found)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {HINT}") from error
    if actual != size:
        io.check_size(path, actual, size, "what its checkpoint wrote")
    if found != crc:
        raise UserError(f"{path} is not what was written: its CRC-32 is {found:08x}, not {crc:08x}. {HINT}")
