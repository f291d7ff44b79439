"""Eval sets, multiple choice with four completions: the format of llm.c's hellaswag_val.bin, and HellaSwag's jsonl.

Source: llm.c dev/data/hellaswag.py, data_common.py, llmc/dataloader.h (EvalLoader).
"""

import contextlib
import os

import numpy as np

from llmc.data import tokenizer as tokenizers
from llmc.data.cache import read_bytes
from llmc.data.shards import HEADER_BYTES, Path
from llmc.errors import UserError
from llmc.files import parse
from llmc.files.io import atomic_write, open_checked
from llmc.files.lock import waited_for

EVAL_MAGIC, EVAL_VERSION = 20240522, 1
EVAL_START = 2**16 - 1  # the word before each example
COMPLETIONS = 4
LINE_HINT = 'HINT: a line of HellaSwag\'s jsonl is {"ctx": "...", "label": 0, "endings": ["...", "...", "...", "..."]}'

Example = tuple[int, list[int], list[list[int]]]  # label, context, completions: token ids


def write_eval_set(path: Path, examples: list[Example]) -> None:
    """Write (label, context, completions) examples as llm.c's eval set, atomically.

    label: 0..3, the completion that is right; context: a list of token ids; completions: four such lists.
    An example is a run of uint16 words: 65535, its bytes (these words too), its index, label, 4, then each list behind
    its length. The header has the number of examples in h[2] and the bytes of the longest one in h[3].
    Errors: UserError for what the format cannot hold. Source: llm.c dev/data/hellaswag.py, data_common.py.
    """
    stream: list[np.ndarray] = []
    longest = 0
    if not 1 <= len(examples) < 2**16:
        raise UserError(f"{path}: an eval set holds 1 to 65535 examples, not {len(examples)}. HINT: split the file")
    for i, (label, context, completions) in enumerate(examples):
        words = [EVAL_START, 0, i, label, len(completions)]
        for tokens in (context, *completions):
            words += [len(tokens), *map(int, tokens)]
        words[1] = 2 * len(words)
        problem = None
        if len(completions) != COMPLETIONS or not 0 <= label < COMPLETIONS:
            problem = f"label {label} of {len(completions)} completions, expected 0..3 of 4"
        elif not all(map(len, (context, *completions))):
            problem = "the context or a completion is empty"
        elif words[1] >= 2**16:
            problem = f"{words[1]} bytes, at most 65534 fit"
        elif max(words[5:]) >= EVAL_START or min(words) < 0:
            problem = f"a token id outside 0..65534 ({max(words[5:])})"
        if problem:
            raise UserError(f"{path}: example {i}: {problem}. HINT: remove or shorten it")
        longest = max(longest, words[1])
        stream.append(np.array(words, "<u2"))
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = EVAL_MAGIC, EVAL_VERSION, len(examples), longest
    with atomic_write(path) as file:
        file.write(header.tobytes())
        for example in stream:
            file.write(example.data)


def read_eval_set(path: Path) -> list[Example]:
    """The (label, context, completions) examples of an eval set, token ids as lists of int. Errors: UserError."""
    with open_checked(path, EVAL_MAGIC, (EVAL_VERSION,)) as (file, header, size):
        count, longest = int(header[2]), int(header[3])
        data = file.read()
    damaged = f"{path} is damaged, over-long or truncated ({size} bytes, {count} examples)"
    hint = "HINT: copy it again, or make it with: python -m llmc.data prepare hellaswag FILE.jsonl"
    if len(data) % 2 or count < 1:
        raise UserError(f"{damaged}. {hint}")
    words, examples, at = np.frombuffer(data, "<u2"), [], 0
    for i in range(count):
        example = words[at : at + words[at + 1] // 2].tolist() if at + 1 < words.size else []
        lists: list[list[int]] = []
        place = 5
        while place < len(example) and len(lists) <= COMPLETIONS:
            lists.append(example[place + 1 : place + 1 + example[place]])
            place += 1 + example[place]
        fits = place == len(example) == words[at + 1] // 2 and 2 * place <= longest if example else False
        if not (fits and example[:1] == [EVAL_START] and example[2] == i and example[3] < example[4] == COMPLETIONS):
            raise UserError(f"{damaged}: example {i} is not one. {hint}")
        if len(lists) != 1 + COMPLETIONS or not all(lists):
            raise UserError(f"{damaged}: example {i} lacks tokens. {hint}")
        examples.append((example[3], lists[0], lists[1:]))
        at += place
    if at != words.size:
        raise UserError(f"{damaged}: there is more behind the last example. {hint}")
    return examples


def prepare_hellaswag(
    path: str, tokenizer: str = "gpt2", out: str | None = None, overwrite: bool = False
) -> tuple[str, list[Example]]:
    """Make FILE.bin, an eval set, of HellaSwag's FILE.jsonl, in its folder or in `out`; returns (path, examples).

    A line is a JSON object: ctx, the context; endings, four completions; label, the number of the right one.
    Completions are encoded apart from the context, with a space in front. Source: llm.c dev/data/hellaswag.py.
    Errors: UserError for a line that is not one, or a file with other content that is there and not to be overwritten.
    """
    lines = [_hellaswag_line(path, number, line) for number, line in enumerate(read_bytes(path).splitlines(), 1)]
    texts = [text for _, context, endings in lines for text in (context, *(" " + ending for ending in endings))]
    ids = [tokens.tolist() for tokens in tokenizers.get(tokenizer).encode_batch(texts)]
    examples = [(label, ids[5 * i], ids[5 * i + 1 : 5 * i + 5]) for i, (label, _, _) in enumerate(lines)]
    stem, folder = os.path.splitext(os.path.basename(path))[0], out or os.path.dirname(path)
    target = os.path.join(folder, f"{stem}.bin")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with waited_for(os.path.join(folder, ".prepare.lock"), f"it prepares data in {folder or '.'}"):
            if os.path.exists(target) and not overwrite:
                with contextlib.suppress(UserError):
                    if read_eval_set(target) == examples:
                        return target, examples
                raise UserError(f"{target} exists with other content. HINT: choose another --out, or add --overwrite")
            write_eval_set(target, examples)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. HINT: choose another --out") from error
    return target, examples


def _hellaswag_line(path: str, number: int, line: bytes) -> tuple[int, str, list[str]]:
    """(label, context, endings) of a line of HellaSwag's jsonl; UserError for anything else."""
    what = f"{path}, line {number}"
    example = parse.dictionary(parse.json_of(line, what, LINE_HINT), what, LINE_HINT)
    missing = [name for name in ("ctx", "label", "endings") if name not in example]
    if missing:
        raise UserError(f"{what}: no {missing[0]!r}. {LINE_HINT}")
    context, label, endings = example["ctx"], example["label"], example["endings"]
    if not (isinstance(context, str) and isinstance(endings, list) and all(isinstance(e, str) for e in endings)):
        raise UserError(f"{what}: ctx is text, endings a list of texts. {LINE_HINT}")
    if isinstance(label, str) and len(label) == 1 and label.isdecimal():
        label = int(label)
    if len(endings) != COMPLETIONS or type(label) is not int or not 0 <= label < COMPLETIONS:
        found = f"label {parse.shown(label)} of {len(endings)} endings"
        raise UserError(f"{what}: {found}, expected 0..3 of 4. {LINE_HINT}")
    return label, context, endings
