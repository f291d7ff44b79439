"""What every command shares: errors that are one line, the parser, and flag values checked as they are parsed."""

import argparse
import functools
import math
import os
import re
import sys

from llmc.errors import UserError


def command(name):
    """Decorate a command's main(argv) -> exit code: a UserError or Ctrl-C ends it with one line, not a traceback."""

    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            try:
                return main(argv)
            except UserError as error:
                print(f"{name}: error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"{name}: interrupted", file=sys.stderr)
                return 2
            except BrokenPipeError:  # the reader of our output went away, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1

        return run

    return decorate


class Parser(argparse.ArgumentParser):
    """argparse without its usage dump on errors: one line that names the flag, the value and what is allowed."""

    def __init__(self, **options):
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-3 for a flag

    def _get_option_tuples(self, option_string):
        return []  # as llm.c, no value glued to its flag: -lr 3e-4 is an unknown flag -lr, not -l with the value r

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}. HINT: {self.prog.replace('.', ' ')} --help lists all flags.\n")


def _parse(text, kind, what, allowed):
    try:
        value = kind(text)
        good = math.isfinite(value) and allowed(value)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


def positive(text):
    return _parse(text, int, "a whole number of at least 1", lambda v: v >= 1)


def natural(text):
    return _parse(text, int, "a whole number of at least 0", lambda v: v >= 0)


def count(text):
    return _parse(text, int, "a whole number of at least 1, or -1 for all", lambda v: v >= 1 or v == -1)


def period(text):
    return max(0, _parse(text, int, "a whole number of at least 0, or -1 for off", lambda v: v >= -1))


def number(text):
    return _parse(text, float, "a number of at least 0", lambda v: v >= 0)


def fraction(text):
    return _parse(text, float, "a number from 0 to 1", lambda v: 0 <= v <= 1)


def above_zero(text):
    return _parse(text, float, "a number above 0", lambda v: v > 0)


def thread_count(text):
    return _parse(text, int, "a whole number from 1 to 1024", lambda v: 1 <= v <= 1024)


def below_one(text):
    return _parse(text, float, "a number from 0 to below 1", lambda v: 0 <= v < 1)


def memory_size(text):
    """Bytes of a size with its unit: 80GiB, 1.5 GB, 500MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text, re.I)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number with a unit, as 80GiB, 80GB or 500MiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2].upper())))


def add_device_flags(add):
    """--device, --dtype and --threads of the commands that only use a model; add: parser.add_argument."""
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it works, else cpu")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="of parameters and activations (bf16 on a GPU, else fp32)")
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: all)")
