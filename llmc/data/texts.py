"""Text as people have it: files, folders and standard input, packed or not, as documents, cut into pieces to encode.

    names -> find_texts -> paths -> documents -> pieces -> (tokenizer)

A file is one document, a .jsonl file one in each line. Everything is read as a stream, so that size does not matter.
"""

import bz2
import codecs
import gzip
import itertools
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from llmc.errors import UserError
from llmc.files import parse
from llmc.files.io import open_regular

CHUNK_BYTES = 1 << 20  # read at a time
HEAD_BYTES = 1 << 12  # looked at to find out what a file is
STDIN = "-"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".ndjson")  # taken from a folder whatever they hold
LINES_SUFFIXES = (".jsonl", ".ndjson")
UNPACKERS: dict[bytes, tuple[str, str]] = {  # first bytes -> what it is, its suffix
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\0": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
}
FORMATS = {  # first bytes -> what it is: things that hold text, and that nobody wants to be tokenised as they are
    b"PK\x03\x04": "a ZIP archive (as .zip, .docx, .epub)",
    b"%PDF-": "a PDF",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy array",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    (20240520).to_bytes(4, "little"): "a shard, tokens already",
    (20240801).to_bytes(4, "little"): "a shard, tokens already",
    (20240326).to_bytes(4, "little"): "a model of llm.c",
}
BOMS = (  # the longer ones first: UTF-32's begins as UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
LINE_END = r"(?:\r\n|\n|\r(?!\n))"
EOT_TEXT = "<|endoftext|>"
LINE_HINT = 'HINT: a line of a .jsonl file is an object, as {"text": "..."}'
Progress = Callable[[int], object]


class Split(NamedTuple):
    """Where a document ends: at what `ends` matches, which stays with it (`keep`) or is dropped."""

    ends: re.Pattern[str]
    keep: bool


SPLITS = {
    "files": None,
    "blank-lines": Split(re.compile(LINE_END + "{2}"), keep=True),
    "endoftext": Split(re.compile(re.escape(EOT_TEXT)), keep=False),
}

# ----------------------------------------------------------------------------
# names to files


def stem_of(name: str) -> str:
    """What a dataset is called after a file or folder: its name, without folders and suffixes of text and packing."""
    if name == STDIN:
        return "stdin"
    base = os.path.basename(os.path.abspath(name))
    return base if os.path.isdir(name) else os.path.splitext(_unpacked_name(base))[0]


def find_texts(names: list[str], leave_out: str) -> tuple[list[str], list[str]]:
    """(files to read in order, files of folders that are passed over because they hold no text).

    A folder stands for all files below it, sorted by path, without hidden ones and without those below `leave_out`.
    Errors: UserError for a folder that cannot be read or holds no text.
    """
    paths, passed_over = [], []
    if names.count(STDIN) > 1:
        raise UserError("- is named twice, and standard input can be read once. HINT: name it once")
    for name in names:
        if name == STDIN or not os.path.isdir(name):
            paths.append(name)
            continue
        below = [path for path in _files_below(name) if not _is_below(path, leave_out)]
        texts = [path for path in below if path.endswith(TEXT_SUFFIXES) or _looks_like_text(path)]
        if not texts:
            raise UserError(f"{name} is a folder without text files. HINT: name text files, or a folder of them")
        paths += texts
        passed_over += sorted(set(below) - set(texts))
    return paths, passed_over


def _files_below(folder: str) -> Iterator[str]:
    def failed(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}. HINT: check its permissions") from error

    for root, folders, files in os.walk(folder, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(root, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def _is_below(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def _looks_like_text(path: str) -> bool:
    """Whether a file of a folder, whose suffix does not tell, holds text or text that is packed."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. HINT: check its permissions") from error
    if head.startswith(tuple(UNPACKERS)):
        return True
    if encoding_of(head):
        return True
    if head.startswith(tuple(FORMATS)) or b"\0" in head:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head)


# ----------------------------------------------------------------------------
# files to documents


def encoding_of(head: bytes) -> str | None:
    """The name of the encoding if the first bytes of a file are UTF-16 or UTF-32, with a byte order mark or plainly so.

    Without a mark, UTF-16 of Latin letters has zeros in every other place, UTF-32 of any text in one of four.
    """
    for bom, name in BOMS:
        if head.startswith(bom):
            return name
    size = len(head) // 4 * 4
    if size < 8:
        return None
    zeros = [head[i:size:4].count(0) / (size // 4) for i in range(4)]
    for name, empty, full in (
        ("UTF-32LE", (2, 3), (0,)),
        ("UTF-32BE", (0, 1), (3,)),
        ("UTF-16LE", (1, 3), (0, 2)),
        ("UTF-16BE", (0, 2), (1, 3)),
    ):
        if min(zeros[i] for i in empty) > 0.7 and max(zeros[i] for i in full) < 0.1:
            return name
    return None


def documents(path: str, field: str | None, progress: Progress) -> Iterator[Iterator[str]]:
    """Yield the documents of a file, or of standard input ("-"), each as an iterator of pieces of its text.

    field: the field of a JSON line that is the text; None: "text" in a .jsonl file, and other files are not JSON lines.
    progress: called with the number of bytes that were read from the file, packed as they are.
    Errors: UserError for what cannot be read or is no text, with the byte offset or line where it is known.
    """
    name = "standard input" if path == STDIN else path
    lines = field is not None or os.path.splitext(_unpacked_name(path))[1].lower() in LINES_SUFFIXES
    try:
        with _open(path) as raw:
            chunks = decoded_chunks(name, _unpacked(name, _Counted(raw, progress)))
            if lines:
                yield from (iter([text]) for text in _json_texts(name, chunks, field or "text"))
            else:
                yield chunks
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}. HINT: check the file") from error


def _unpacked_name(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in [s for _, s in UNPACKERS.values()] else path


def _open(path: str) -> BinaryIO:
    if path != STDIN:
        return open_regular(path)
    if sys.stdin is None:
        raise UserError("standard input is closed. HINT: pipe a text into the command, or name a file")
    return open(sys.stdin.fileno(), "rb", closefd=False)


class _Counted:
    """The read() of a file that gives the number of bytes to `progress`; peek is what the file begins with."""

    def __init__(self, file: BinaryIO, progress: Progress):
        self.file, self.progress = file, progress
        self.peek = file.read(HEAD_BYTES)
        self._head = self.peek

    def read(self, size: int) -> bytes:
        data, self._head = self._head[:size], self._head[size:]
        data = data or self.file.read(size)
        self.progress(len(data))
        return data


def _unpacked(name: str, file: _Counted) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces, unpacked if it is gzip, bzip2, xz or zstd."""
    kind = next((kind for magic, (kind, _) in UNPACKERS.items() if file.peek.startswith(magic)), None)
    try:
        if kind == "zstd":
            yield from _unpacked_zstd(name, file)
            return
        source: Any = file
        if kind == "gzip":
            source = gzip.GzipFile(fileobj=source, mode="rb")
        elif kind == "bzip2":
            source = bz2.BZ2File(source)
        elif kind == "xz":
            source = lzma.LZMAFile(source)
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{name} is damaged or cut ({kind}: {error}). HINT: copy or download it again") from error


def _unpacked_zstd(name: str, file: _Counted) -> Iterator[bytes]:
    """Yield the bytes of one or more zstd frames. Few are given in at a time, as a frame can swell 30,000 fold."""
    try:
        from compression import zstd  # type: ignore[import-not-found]  # Python has it from 3.14 on.

        new, failure = zstd.ZstdDecompressor, zstd.ZstdError
    except ImportError:
        try:
            import zstandard
        except ImportError as error:
            how = f"pip install zstandard, or unpack it: zstd -d {name}"
            raise UserError(f"{name} is packed with zstd, which this Python cannot read. HINT: {how}") from error
        new, failure = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
    unpacker = new()
    try:
        while data := file.read(1 << 12):
            while data:
                if unpacker.eof:
                    unpacker = new()
                yield unpacker.decompress(data)
                data = unpacker.unused_data if unpacker.eof else b""
    except failure as error:
        raise UserError(f"{name} is damaged (zstd: {error}). HINT: copy or download it again") from error
    if not unpacker.eof:
        raise UserError(f"{name} is damaged or cut (zstd: it ends inside a frame). HINT: copy or download it again")


def decoded_chunks(name: str, chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield UTF-8 bytes as text, without a byte order mark.

    Errors: UserError for nothing at all, and with the byte offset of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, held, first = 0, 0, True
    try:
        for chunk in _look_at_head(name, chunks):
            held = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
            text = decoder.decode(chunk)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            yield text
            position += len(chunk)
        held = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte offset {position - held + error.start} "
            f"(byte 0x{error.object[error.start]:02x}). HINT: convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
    if position == 0:
        raise UserError(f"{name} is empty. HINT: name a file with text")


def _look_at_head(name: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks as they are; UserError if the first bytes are those of something else than UTF-8 text."""
    chunks = iter(chunks)
    first: list[bytes] = []
    while sum(map(len, first)) < HEAD_BYTES and (chunk := next(chunks, None)) is not None:
        first.append(chunk)
    head = b"".join(first)
    encoding = encoding_of(head)
    if encoding:
        raise UserError(f"{name} is {encoding}, not UTF-8. HINT: convert it with: iconv -f {encoding} -t UTF-8")
    found = next((what for magic, what in FORMATS.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        found = "a tar archive"
    if found:
        raise UserError(f"{name} is {found}, not text. HINT: give the text in it as UTF-8 files")
    return itertools.chain(first, chunks)


def _json_texts(name: str, chunks: Iterable[str], field: str) -> Iterator[str]:
    """Yield the text in each line of JSON lines. Errors: UserError for a line that is no object with a text there."""
    for number, line in enumerate(_lines(chunks), 1):
        if not line.strip():
            continue
        what = f"{name}, line {number}"
        value = parse.dictionary(parse.json_of(line, what, LINE_HINT), what, LINE_HINT)
        if not isinstance(value.get(field), str):
            fields = [shown for key, text in value.items() if isinstance(text, str) and len(shown := repr(key)) < 40]
            hint = f"HINT: --field {fields[0]} would be text" if fields else LINE_HINT
            raise UserError(f"{what} has no text in the field {field!r}. {hint}")
        yield value[field]


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yield lines without their ends. Only "\\n" and "\\r\\n" end one: what else Unicode takes for it JSON may hold."""
    parts: list[str] = []
    for chunk in chunks:
        *ended, rest = chunk.split("\n")
        for line in ended:
            yield "".join([*parts, line])
            parts = []
        parts.append(rest)
    yield "".join(parts)


# ----------------------------------------------------------------------------
# documents to pieces


def pieces(chunks: Iterable[str], split: Split | None) -> Iterator[tuple[bool, str]]:
    """Cut a streamed text into (starts a document, text) pieces that encode one by one as they would together.

    Without a split the text is one document. With one, a document ends at each match: a blank line belongs to the
    document that it ends; <|endoftext|> is dropped, as are the line ends behind it and documents without text.
    Pieces are cut only where a character that is not white space is followed by a space or newline. No token of GPT-2's
    pattern reaches over such a place, and what matches on its left does not depend on what follows: the pattern's only
    lookahead is after white space. Text without any such place is held in memory as a whole.
    """
    text, held, starts = "", "", True
    for chunk in chunks:
        searched, text, held = len(text), text + held + chunk, ""
        if split:
            if split.keep and text.endswith("\r"):  # whether a newline follows decides where the line ends
                text, held = text[:-1], "\r"
            *ended, text = _documents_in(text, split, starts)
            for document in ended:
                yield starts, document
                starts, searched = True, 0
        for i in range(len(text) - 1, max(searched, 1) - 1, -1):
            if text[i] in " \n" and not text[i - 1].isspace():
                yield starts, text[:i]
                starts, text = False, text[i:]
                break
    if text + held:
        yield starts, text + held


def _documents_in(text: str, split: Split, starts: bool) -> list[str]:
    """The documents that end in the text, and what is left of it. starts: the text begins with a new document."""
    found, at = [], 0
    for match in split.ends.finditer(text):
        found.append(text[at : match.end() if split.keep else match.start()])
        at = match.end()
    found.append(text[at:])
    if not split.keep:
        found = [document.lstrip("\r\n") if starts or i else document for i, document in enumerate(found)]
        found = [*filter(None, found[:-1]), found[-1]]
    return found
