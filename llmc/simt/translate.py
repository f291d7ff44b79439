"""From a preprocessed .cu file to C++ that g++ compiles: `__shared__` variables become references into the block's
shared memory, `__global__` functions get an entry point that Python can call. Lines keep their numbers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ALIGNAS = re.compile(r"\balignas\s*(?=\()")
SHARED = re.compile(r"((?:\b(?:extern|static|alignas\s*\((?:[^()]|\([^()]*\))*\))\s*)*)\b__shared__\b([^;]*);")
DECLARATOR = re.compile(r"(.*?[\s*&>])?(\w+)\s*((?:\[[^\]]*\]\s*)*)", re.S)

UNCHECKED = '__attribute__((no_sanitize("thread", "undefined")))'
TRAMPOLINE = """
extern "C" {unchecked} void simt_entry_{name}(void** args) {{ simt::call({name}, args); }}
extern "C" {unchecked} void simt_describe_{name}(simt::Param* out) {{ simt::describe({name}, out); }}
extern "C" int simt_count_{name}() {{ return simt::count({name}); }}
extern "C" int simt_bound_{name}() {{ return {bound}; }}
"""


# Variables of one type, at the start of a statement, each with a plain initialiser at most.
VARIABLE = re.compile(r"(\w+)\s*((?:\[[^\];]+\]\s*)*)(=\s*(?:\{\s*\}|[^,;{}\[\]]+))?")
VARIABLES = re.compile(
    r"(?<=[;{}\n])(\s*)((?:const\s+)?(?:\w+::)*\w+(?:<[\w\s,:*]*>)?)\s+("
    rf"{VARIABLE.pattern}(?:\s*,\s*{VARIABLE.pattern})*)\s*;"
)
STATEMENTS = {"return", "else", "case", "goto", "delete", "new", "throw", "typedef", "using", "struct", "auto"}
MARKER = re.compile(r'^# \d+ "([^"]*)".*$', re.M)


class Translated(NamedTuple):
    """A kernel file as C++."""

    text: str
    kernels: dict[str, list[str]]  # the names of each kernel's parameters
    dynamic_align: int  # alignment of dynamic shared memory that the file asks for


def translate(text: str, folders: Sequence[Path]) -> Translated:
    """The C++ of a file that g++ -E has preprocessed; `folders`: where the kernels and their headers are.
    ValueError: a declaration that cannot be read."""
    text, dynamic_align = rewrite_shared(text)
    text = rewrite_arrays(text, folders)
    text, kernels = find_kernels(text)
    for name, (_, bound) in kernels.items():
        text += TRAMPOLINE.format(name=name, bound=bound or 1024, unchecked=UNCHECKED)
    return Translated(text, {name: names for name, (names, _) in kernels.items()}, dynamic_align)


def balanced(text: str, start: int, open_: str = "(", close: str = ")") -> int:
    """Index just past the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == open_) - (text[i] == close)
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced {open_} in {text[start : start + 80]!r}")


def split_commas(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]] if p.strip()]


def take_alignas(text: str) -> tuple[str, list[str]]:
    """(text without alignas(...), their arguments)."""
    found = []
    while match := ALIGNAS.search(text):
        end = balanced(text, match.end())
        found.append(text[match.end() + 1 : end - 1])
        text = text[: match.start()] + text[end:]
    return text, found


def rewrite_shared(text: str) -> tuple[str, int]:
    """(text, alignment of dynamic shared memory): `__shared__ T name[N];` becomes a reference into the block's shared
    memory, `extern __shared__ T name[];` a pointer to its dynamic part. The number of lines stays."""
    dynamic_align = 16
    for match in SHARED.finditer(text):
        if "extern" in match[1]:
            dynamic_align = max([dynamic_align, *map(int, re.findall(r"alignas\s*\(\s*(\d+)\s*\)", match[0]))])

    def replace(match: re.Match) -> str:
        before, aligns = take_alignas(match[1])
        after, more = take_alignas(match[2])
        type_, out = None, ""
        for part in split_commas(after):
            declarator = DECLARATOR.fullmatch(part)
            if declarator is None:
                raise ValueError(
                    f"cannot read the declaration {match[0]!r}: one `type name[sizes]` or a list of them, please"
                )
            type_ = declarator[1] if type_ is None else type_
            name, dims = declarator[2], declarator[3]
            if "extern" in before:
                call = f'simt::simt_dynamic_shared({dynamic_align}, "{name}", sizeof({type_}))'
                out += f"{type_}* const {name} = ({type_}*){call};"
            else:
                align = " , ".join([f"alignof(simt_type_{name})", *aligns, *more])
                out += (
                    f"static unsigned long long simt_key_{name}; typedef {type_} simt_type_{name}{dims};"
                    f"simt_type_{name}& {name} = *(simt_type_{name}*)simt::simt_shared("
                    f"&simt_key_{name}, sizeof(simt_type_{name}), simt::largest({align}), "
                    f'simt::Element<simt_type_{name}>::size, "{name}", __builtin_FILE(), __builtin_LINE());'
                )
        return out.replace("\n", " ") + "\n" * match[0].count("\n")

    return SHARED.sub(replace, text), dynamic_align


def rewrite_arrays(text: str, folders: Sequence[Path]) -> str:
    """`T name[N];` becomes `simt::Checked<T[N]>::type name;`, which checks the index also where T is a class: g++'s
    own check lets a reference to one past the end through. Only in files of these folders; lines keep their numbers."""
    parts, start, own = [], 0, False
    for marker in [*MARKER.finditer(text), None]:
        part = text[start : marker.start() if marker else len(text)]
        parts.append(rewrite_arrays_of_part(part) if own else part)
        if marker:
            start, own = marker.start(), Path(marker[1]).parent in folders
    return "".join(parts)


def rewrite_arrays_of_part(text: str) -> str:
    def replace(match: re.Match) -> str:
        blank, type_, variables = match[1], match[2], match[3]
        if type_ in STATEMENTS or "[" not in variables:
            return match[0]
        declared = ""
        for variable in VARIABLE.finditer(variables):
            name, dims, value = variable[1], variable[2], variable[3] or ""
            checked = f"typename simt::Checked<{type_}{dims}>::type" if dims else type_
            declared += f"{checked} {name} {value};"
        return blank + declared + "\n" * (match[0].count("\n") - (blank + declared).count("\n"))

    return VARIABLES.sub(replace, text)


def find_kernels(text: str) -> tuple[str, dict[str, tuple[list[str], str | None]]]:
    """(text without CUDA's function attributes, {kernel: (parameter names, launch bound expression)})."""
    found = {}
    while match := re.search(r"\b__global__\b", text):
        end = text.index("(", match.end())
        bound = None
        head = text[match.end() : end]
        if "__launch_bounds__" in head:
            close = balanced(text, end)
            bound = split_commas(text[end + 1 : close - 1])[0]
            start = text.index("__launch_bounds__", match.end())
            text = text[:start] + re.sub(r"[^\n]", " ", text[start:close]) + text[close:]
            end = text.index("(", close)
        name = last_word(text[match.end() : end])
        parameters = split_commas(text[end + 1 : balanced(text, end) - 1])
        found[name] = ([last_word(re.sub(r"\[[^\]]*\]\s*$", "", p)) for p in parameters if p != "void"], bound)
        text = text[: match.start()] + " " * len("__global__") + text[match.end() :]
    return re.sub(r"\b__launch_bounds__\s*\([^)]*\)", "", text), found


def last_word(text: str) -> str:
    """The name that a declaration ends in."""
    match = re.search(r"(\w+)\s*$", text)
    if match is None:
        raise ValueError(f"no name at the end of {text!r}")
    return match[1]
