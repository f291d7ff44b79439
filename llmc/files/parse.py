"""JSON and numbers from files: whatever a file holds, the result is a value of the wanted kind or a UserError.

Files are damaged, cut, edited by hand, and written by strangers. First the text is checked: it must be JSON without
NaN and Infinity, without a number that a double cannot hold or an integer of more than 64 bits, and not nested too
deep. Then each value that is used is checked for its type and range.
"""

import json
import math
from typing import Any

from llmc.errors import UserError
from llmc.files import io

COPY = "HINT: copy or download it again"
LONGEST = 64 << 20  # bytes of JSON that are read
DEEPEST = 32  # arrays and objects within each other


def shown(value: Any) -> str:
    """A value for a message: its repr, cut to what fits into a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: io.Path, hint: str = COPY) -> dict[str, Any]:
    """The object that a JSON file holds. hint: ends the message if it cannot be read. Errors: UserError."""
    try:
        with io.open_regular(path) as file:
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {hint}") from error
    return dictionary(json_of(text, str(path)), str(path))


def json_of(text: bytes | str, what: str, hint: str = COPY, longest: int = LONGEST) -> Any:
    """The value of a JSON text. what: where it is from, which starts the message. Errors: UserError with the hint."""
    if len(text) > longest:
        raise UserError(f"{what} has more than {longest >> 20} MiB of JSON. {hint}")
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_constant)
        _check_depth(value)
    except RecursionError:
        raise UserError(f"{what}: JSON within JSON, deeper than {DEEPEST} levels. {hint}") from None
    except ValueError as error:
        raise UserError(f"{what} is not JSON: {error}. {hint}") from error
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{text[:20]}{'...' * (len(text) > 20)} is an integer of more than 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]}{'...' * (len(text) > 20)} is more than a double holds")
    return value


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _check_depth(value: Any) -> None:
    """RecursionError for a value that is nested deeper than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return
    raise RecursionError


def dictionary(value: Any, what: str, hint: str = COPY) -> dict[str, Any]:
    """The value, if it is a JSON object. Errors: UserError that starts with `what`; so too in the functions below."""
    if not isinstance(value, dict):
        raise UserError(f"{what} is {shown(value)}, not a JSON object. {hint}")
    return value


def array(value: Any, what: str, most: int = 1 << 20) -> list[Any]:
    """The value, if it is a JSON array of at most `most` elements."""
    if not isinstance(value, list) or len(value) > most:
        raise UserError(f"{what} is {shown(value)}, not a JSON array of at most {most}. {COPY}")
    return value


def string(value: Any, what: str, longest: int = 4096) -> str:
    """The value, if it is a text of at most `longest` characters."""
    if not isinstance(value, str) or len(value) > longest:
        raise UserError(f"{what} is {shown(value)}, not a text of at most {longest} characters. {COPY}")
    return value


def integer(value: Any, what: str, least: int = 0, most: int = 2**64 - 1) -> int:
    """The value, if it is a whole number from `least` to `most`; true and 1.0 are none."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{what} is {shown(value)}, not a whole number from {least} to {most}. {COPY}")
    return value


def number(value: Any, what: str, least: float = -math.inf, most: float = math.inf) -> float:
    """The value, if it is a finite number from `least` to `most`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not least <= value <= most:
        limits = "" if least == -math.inf and most == math.inf else f" from {least:g} to {most:g}"
        raise UserError(f"{what} is {shown(value)}, not a number{limits}. {COPY}")
    return float(value)


def decimal(text: str, what: str, hint: str = COPY) -> float:
    """The finite number that a text says, as in 3.1 or 6e-4. Errors: UserError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{what} is {shown(text)}, not a number. {hint}")
    return value
