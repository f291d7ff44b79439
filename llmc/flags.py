"""Values of command-line flags, checked as they are parsed, and a parser whose errors are one line."""

import argparse
import math


class Parser(argparse.ArgumentParser):
    """argparse without its usage dump on errors: one line that names the flag, the value and what is allowed."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}. HINT: {self.prog.replace('.', ' ')} --help lists all flags.\n")


def _parse(text, kind, what, allowed):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not math.isfinite(value) or not allowed(value):
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


def below_one(text):
    return _parse(text, float, "a number from 0 to below 1", lambda v: 0 <= v < 1)
