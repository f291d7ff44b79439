"""Tokenizers: GPT-2 BPE (through tiktoken), bytes, and llm.c's decode-only gpt2_tokenizer.bin.

A tokenizer is a table of byte strings, one per token id, plus a function that encodes. `encode` never makes special
tokens out of text; the end-of-text token `eot` is put before each document by whoever writes a dataset.

Source: llm.c llmc/tokenizer.h (tokenizer_init, tokenizer_decode), train_gpt2.py write_tokenizer.
"""

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmc.data.cache import writable_cache_dir
from llmc.data.shards import Path
from llmc.errors import UserError
from llmc.files.io import atomic_write, open_regular

MAGIC, VERSION = 20240328, 2  # gpt2_tokenizer.bin
HEADER_BYTES = 1024
GPT2_VOCAB, GPT2_EOT = 50257, 50256
BYTES_VOCAB, BYTES_EOT = 257, 256
NAMES = {"gpt2": GPT2_VOCAB, "bytes": BYTES_VOCAB}
LARGEST_GPT2_VOCAB = 51200  # GPT-2's, padded to a multiple of 1024: a model with more ids has another tokenizer
EOT_PIECE = b"<|endoftext|>"
# The white space of GPT-2's pattern. A run of some 100,000 kills tiktoken, so that a long one is encoded as what the
# pattern makes of it: one piece, without its last character if a word follows.
BLANK = "[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]"
LONG = 1 << 16
LONG_BLANK = re.compile(f"(?<!{BLANK}){BLANK}{{{LONG},}}")

Ids = NDArray[np.uint16]


class Tokenizer:
    """name, n_vocab, eot (the id of the end-of-text token) and pieces: the bytes of each token id."""

    def __init__(
        self, name: str, pieces: list[bytes], eot: int, encode_batch: Callable[[Sequence[str]], list[Ids]] | None = None
    ):
        self.name, self.pieces, self.eot = name, pieces, eot
        self.n_vocab = len(pieces)
        self._encode_batch = encode_batch

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """One uint16 array of token ids per text. GPT-2 uses all cores."""
        if self._encode_batch is None:
            raise UserError(f"the tokenizer {self.name} can only decode. HINT: encode with one of {', '.join(NAMES)}")
        return self._encode_batch(texts)

    def encode(self, text: str) -> Ids:
        """The token ids of a text, as a uint16 array."""
        return self.encode_batch([text])[0]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens, concatenated; UserError for an id that is not in the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise UserError(
                    f"token id {i} is outside the vocabulary 0..{self.n_vocab - 1} of the tokenizer {self.name}. "
                    "HINT: use the tokenizer the model was trained with"
                )
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text, token by token, from an iterator of ids; a character cut between tokens comes when complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.decode_bytes([i]))
        yield decoder.decode(b"", final=True)


def get(name: str) -> Tokenizer:
    """The tokenizer called 'gpt2' or 'bytes'. Errors: UserError for other names, or where GPT-2's cannot be had."""
    if name == "gpt2":
        return _gpt2()
    if name == "bytes":
        return _bytes()
    raise UserError(f"unknown tokenizer {name!r}. HINT: known tokenizers: {', '.join(NAMES)}")


def vocabulary(name: str) -> int:
    """Tokens in the vocabulary of 'gpt2' or 'bytes', without loading it. Errors: UserError for another name."""
    return NAMES[name] if name in NAMES else get(name).n_vocab


def tokenizer_name(vocab_size: int) -> str | None:
    """The name of the tokenizer whose ids a model with this vocabulary has, or None where that cannot be told.

    A GPT-2 can have more ids than the tokenizer: tokens that were added for fine-tuning, or a vocabulary that was
    padded to a round number. Text has none of them, and sampling does not draw them (sampler.sample_softmax).
    """
    if vocab_size == BYTES_VOCAB:
        return "bytes"
    return "gpt2" if GPT2_VOCAB <= vocab_size <= LARGEST_GPT2_VOCAB else None


def tokenizer_for(vocab_size: int, name: str | None = None) -> Tokenizer:
    """The tokenizer of a model with this vocabulary: the one named, else the one that tokenizer_name finds.

    Errors: UserError where there is none, and for a name whose ids cannot be those of the model.
    """
    fitting = tokenizer_name(vocab_size) or ("gpt2" if vocab_size >= GPT2_VOCAB else None)
    if name in NAMES and name != fitting:
        wrong = f"--tokenizer {name}: the tokenizer {name} has {NAMES[name]} tokens, the model {vocab_size}"
    elif name is None and tokenizer_name(vocab_size) is None:
        wrong = f"no tokenizer has {vocab_size} tokens, as this model"
    else:
        return get(name or str(fitting))
    known = ", ".join(f"{known} {size}" for known, size in NAMES.items())
    raise UserError(f"{wrong}. HINT: {f'give --tokenizer {fitting}' if fitting else f'llmc has {known}'}.")


def has_long_blank(text: str) -> bool:
    """Whether a run of LONG white space may be in a text: then a whole block of half its length is blank."""
    block = LONG // 2
    return any(text[i : i + block].isspace() for i in range(0, len(text), block))


def _gpt2() -> Tokenizer:
    from concurrent.futures import ThreadPoolExecutor

    try:
        import tiktoken
    except ImportError as error:
        raise UserError(
            f"the GPT-2 tokenizer needs tiktoken ({error}). HINT: pip install tiktoken, or use --tokenizer bytes"
        ) from error
    # tiktoken's default cache is in the folder for temporary files: keep the vocabulary where it survives a reboot
    if not os.environ.get("TIKTOKEN_CACHE_DIR") and not os.environ.get("DATA_GYM_CACHE_DIR"):
        os.environ["TIKTOKEN_CACHE_DIR"] = os.path.join(writable_cache_dir(), "tiktoken")
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, cache folder not writable; or a hash that does not match
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot get the GPT-2 vocabulary: {type(error).__name__}: {reason}. HINT: connect to the internet once, "
            "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bytes"
        ) from error
    pieces = [bpe.decode_single_token_bytes(i) for i in range(GPT2_EOT)] + [EOT_PIECE]

    def encode_long(text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for run in LONG_BLANK.finditer(text):
            end = run.end() - (run.end() < len(text))  # the last character goes with the word behind it
            ids += bpe.encode_ordinary(text[start : run.start()])
            ids += bpe._encode_single_piece(text[run.start() : end])
            start = end
        return ids + bpe.encode_ordinary(text[start:])

    def encode_group(texts: Sequence[str]) -> list[Ids]:
        return [
            np.array(encode_long(text) if has_long_blank(text) else bpe.encode_ordinary(text), np.uint16)
            for text in texts
        ]

    def encode_batch(texts: Sequence[str]) -> list[Ids]:
        step = -(-len(texts) // (os.cpu_count() or 1)) or 1
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken releases the interpreter's lock
            groups = pool.map(encode_group, [texts[i : i + step] for i in range(0, len(texts), step)])
            return [ids for group in groups for ids in group]

    return Tokenizer("gpt2", pieces, GPT2_EOT, encode_batch)


def _bytes() -> Tokenizer:
    def encode_batch(texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.uint16) for text in texts]

    return Tokenizer("bytes", [bytes([i]) for i in range(BYTES_EOT)] + [EOT_PIECE], BYTES_EOT, encode_batch)


# ----------------------------------------------------------------------------
# gpt2_tokenizer.bin: 256 words of header (magic, version, vocabulary size, EOT id), then per token a length byte, bytes


def read_tokenizer_bin(path: Path) -> Tokenizer:
    """The decode-only tokenizer in a file of llm.c, version 2, or version 1 (GPT-2's vocabulary, no EOT id stored)."""
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. HINT: check the path") from error
    if len(data) < HEADER_BYTES:
        raise UserError(f"{path} has {len(data)} bytes, fewer than a header of {HEADER_BYTES}. HINT: truncated file?")
    magic, version, n_vocab, eot = np.frombuffer(data, "<u4", 4).tolist()
    if magic != MAGIC:
        raise UserError(f"{path} has magic number {magic}, expected {MAGIC}. HINT: is this a tokenizer file of llm.c?")
    if version not in (1, VERSION):
        raise UserError(f"{path} has version {version}, known are 1 and 2. HINT: make it anew with train_gpt2.py")
    if version == 1:
        eot = GPT2_EOT
        if n_vocab != GPT2_VOCAB:
            raise UserError(f"{path} (version 1) has {n_vocab} tokens, expected {GPT2_VOCAB}. HINT: use version 2")
    if not eot < n_vocab:
        raise UserError(f"{path} has end-of-text id {eot}, vocabulary size {n_vocab}. HINT: damaged file?")
    pieces: list[bytes] = []
    position = HEADER_BYTES
    while len(pieces) < n_vocab and position < len(data):
        length = data[position]
        pieces.append(data[position + 1 : position + 1 + length])
        position += 1 + length
    if len(pieces) != n_vocab or position != len(data):
        raise UserError(
            f"{path} does not hold exactly the {n_vocab} tokens that its header promises ({len(data)} bytes). "
            "HINT: truncated or over-long file?"
        )
    return Tokenizer(os.path.basename(path), pieces, eot)


def write_tokenizer_bin(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer as llm.c's version 2 file (atomically)."""
    header = np.zeros(HEADER_BYTES // 4, "<u4")
    header[:4] = MAGIC, VERSION, tokenizer.n_vocab, tokenizer.eot
    body = b"".join([bytes([len(piece)]) + piece for piece in tokenizer.pieces])
    with atomic_write(path) as file:
        file.write(header.tobytes() + body)
