"""Values of command-line flags, checked as they are parsed, and a parser whose errors are one line."""

import argparse
import math
import re


class Parser(argparse.ArgumentParser):
    """argparse without its usage dump on errors: one line that names the flag, the value and what is allowed."""

    def __init__(self, **options):
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-3 for a flag

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
