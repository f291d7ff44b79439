"""Text as it comes in files, decoded, and cut into pieces that encode one by one as they would together."""

import codecs
from collections.abc import Callable, Iterable, Iterator

from llmc.errors import UserError

CHUNK_BYTES = 1 << 20  # read at a time


def decoded_chunks(path: str, progress: Callable[[int], object]) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces; UserError with the byte offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    try:
        with open(path, "rb") as file:
            while True:
                chunk = file.read(CHUNK_BYTES)
                held = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
                yield decoder.decode(chunk, final=not chunk)
                if not chunk:
                    break
                position += len(chunk)
                progress(len(chunk))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. HINT: check the path") from error
    except UnicodeDecodeError as error:
        offset = position - held + error.start
        raise UserError(
            f"{path} is not UTF-8 at byte offset {offset} (byte 0x{error.object[error.start]:02x}). "
            "HINT: convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
    if position == 0:
        raise UserError(f"{path} is empty. HINT: name a file with text")


def pieces(chunks: Iterable[str], blank_lines: bool) -> Iterator[tuple[bool, str]]:
    """Cut a streamed text into (starts a document, text) pieces that encode one by one as they would together.

    Without blank_lines the text is one document. With it, a document ends after each blank line ("\\n\\n").
    Pieces are cut only where a character that is not white space is followed by a space or newline. No token of GPT-2's
    pattern reaches over such a place, and what matches on its left does not depend on what follows: the pattern's only
    lookahead is after white space. Text without any such place is held in memory as a whole.
    """
    text, starts = "", True
    for chunk in chunks:
        searched = len(text)
        text += chunk
        if blank_lines:
            *documents, text = text.split("\n\n")
            for document in documents:
                yield starts, document + "\n\n"
                starts = True
        for i in range(len(text) - 1, max(searched, 1) - 1, -1):
            if text[i] in " \n" and not text[i - 1].isspace():
                yield starts, text[:i]
                starts, text = False, text[i:]
                break
    if text:
        yield starts, text
