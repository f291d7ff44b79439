"""What every command shares: streams that work, errors that are one line, the parser, flag values that are checked."""

import argparse
import difflib
import errno
import functools
import math
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from llmc.errors import UserError, printable

LARGEST = 2**31 - 1  # counts are 32 bits in llm.c's files
LARGEST_FLOAT = (2 - 2.0**-23) * 2.0**127  # of the 32 bits that kernels compute with
GONE = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF}  # a stream that cannot be written to any more

# ----------------------------------------------------------------------------------------------------------------------
# running a command


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a command's main(argv) -> exit code, so that it never ends in a traceback of its surroundings.

    A UserError is one line and its exit code, Ctrl-C one line and 130. Characters that the terminal's encoding does not
    have are replaced, streams that are closed lead nowhere. Where stdout can take no more, its reader gone or its disk
    full, the exit code is 1.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            prepare_streams()
            try:
                code = main(argv)
            except UserError as error:
                say(f"{name}: error: {error}")
                code = error.code
            except KeyboardInterrupt:
                say(f"{name}: interrupted")
                code = 130
            except SystemExit:  # of argparse
                flush(name)
                raise
            except OSError as error:
                if error.errno not in GONE or error.filename is not None:
                    raise
                return lost(name, error)
            return flush(name) or code

        return run

    return decorate


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever this process was given."""
    for fd, stream in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, stream) is None:  # closed, or Windows without a console: no later file may take its number
            try:
                os.fstat(fd)
            except OSError:
                null = os.open(os.devnull, os.O_RDWR)
                if null != fd:
                    os.dup2(null, fd)
                    os.close(null)
            setattr(sys, stream, open(os.devnull, "w" if fd else "r", encoding="utf-8", errors="replace"))
        elif fd and hasattr(getattr(sys, stream), "reconfigure"):
            getattr(sys, stream).reconfigure(errors="replace" if fd == 1 else "backslashreplace")


def say(line: str) -> None:
    """Print a line to stderr, if that can be done."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)


def flush(name: str) -> int:
    """Write out what stdout still holds; 0, or the exit code where that cannot be done."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        return lost(name, error)
    return 0


def lost(name: str, error: OSError | ValueError) -> int:
    """stdout can take no more; returns the exit code. That its reader went away, as `head` does, needs no words."""
    silence(sys.stdout)
    if getattr(error, "errno", None) != errno.EPIPE:
        say(f"{name}: error: stdout: {getattr(error, 'strerror', None) or error}. HINT: check where it leads.")
    return 1


def silence(stream: Any) -> None:
    """Let a stream that can take no more lead nowhere, so that later writes, and Python's own at the end, succeed."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# flags


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean X?" for a word that is like one that is known, else nothing."""
    close = difflib.get_close_matches(word, list(known), 1, 0.7)
    return f" Did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse without its usage dump on errors: one line that names the flag, the value and what is allowed.

    Flags may stand between positional arguments.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-3 for a flag
        self._intermixing = False

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []  # as llm.c, no value glued to its flag: -lr 3e-4 is an unknown flag -lr, not -l with the value r

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, but it takes a positional argument that follows a flag for one more of those before it."""
        positionals = self._get_positional_actions()
        if self._intermixing or not positionals or any(a.nargs == argparse.PARSER for a in positionals):
            return super().parse_known_args(args, namespace)
        self._intermixing = True  # argparse's parse_known_intermixed_args calls this function
        try:
            return super().parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False

    def error(self, message: str) -> NoReturn:
        match = re.match(r"unrecognized arguments: (--?[^\s=]+)", message)
        like = did_you_mean(match[1], self._option_string_actions) if match else ""
        hint = f"HINT: {self.prog.replace('.', ' ')} --help lists all flags."
        self.exit(2, f"{self.prog}: error: {printable(message)}.{like} {hint}\n")


def _parse(text: str, kind: Callable[[str], Any], what: str, allowed: Callable[[Any], bool], most: Any = None) -> Any:
    """The value of a flag; what: which values are allowed, most: the largest of them where `what` does not tell."""
    try:
        value = kind(text)
        good = text.isascii() and "_" not in text and math.isfinite(value) and allowed(value)
    except (ValueError, OverflowError):
        value, good = None, False
    if not good:
        raise argparse.ArgumentTypeError(f"{text or repr(text)} is not {what}")
    if most is not None and value > most:
        largest = most if isinstance(most, int) else f"{most:.4g}"
        raise argparse.ArgumentTypeError(f"{text} is not {what} and at most {largest}")
    return value


def _float32(value: float) -> float:
    """The number that the kernels compute with."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def named(text: str) -> str:
    """A file, folder, pattern or name; an empty one is a variable of a script that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("'' names nothing")
    return text


def positive(text: str) -> int:
    return _parse(text, int, "a whole number of at least 1", lambda v: v >= 1, LARGEST)


def natural(text: str) -> int:
    return _parse(text, int, "a whole number of at least 0", lambda v: v >= 0, LARGEST)


def seed(text: str) -> int:
    return _parse(text, int, f"a whole number from 0 to {2**32 - 1}", lambda v: 0 <= v < 2**32)


def random_state(text: str) -> int:
    return _parse(text, int, f"a whole number from 1 to {2**64 - 1}", lambda v: 1 <= v < 2**64)


def count(text: str) -> int:
    return _parse(text, int, "a whole number of at least 1, or -1 for all", lambda v: v >= 1 or v == -1, LARGEST)


def period(text: str) -> int:
    return max(0, _parse(text, int, "a whole number of at least 0, or -1 for off", lambda v: v >= -1, LARGEST))


def number(text: str) -> float:
    return _parse(text, float, "a number of at least 0", lambda v: v >= 0, LARGEST_FLOAT)


def fraction(text: str) -> float:
    return _parse(text, float, "a number from 0 to 1", lambda v: 0 <= v <= 1)


def above_zero(text: str) -> float:
    return _parse(text, float, "a number above 0 (1.2e-38)", lambda v: v >= 2.0**-126, LARGEST_FLOAT)


def thread_count(text: str) -> int:
    return _parse(text, int, "a whole number from 1 to 1024", lambda v: 1 <= v <= 1024)


def below_one(text: str) -> float:
    return _parse(text, float, "a number from 0 to below 1", lambda v: 0 <= v < 1 and _float32(v) < 1)


def memory_size(text: str) -> int:
    """Bytes of a size with its unit: 80GiB, 1.5 GB, 500MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text, re.I)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number with a unit, as 80GiB, 80GB or 500MiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2].upper())))


def add_device_flags(add: Callable[..., Any]) -> None:
    """--device, --dtype and --threads of the commands that only use a model; add: parser.add_argument."""
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it works, else cpu")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="of parameters and activations (bf16 on a GPU, else fp32)")
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: all)")
