"""Eval sets: llm.c's bytes in both directions, and what the format cannot hold."""

import struct

import pytest

from llmc.data.eval_sets import read_eval_set, write_eval_set
from llmc.errors import UserError

EXAMPLES = [(2, [5, 6, 7], [[1], [2, 3], [4], [9, 9, 9]]), (0, [1], [[1], [2], [3], [65534]])]


def eval_set_by_hand(examples, count=None):
    """The documented layout, word by word, without our code."""
    body, longest = b"", 0
    for i, (label, context, completions) in enumerate(examples):
        words = [label, len(completions), len(context), *context]
        for completion in completions:
            words += [len(completion), *completion]
        nbytes = 2 * (3 + len(words))
        body += struct.pack(f"<{3 + len(words)}H", 65535, nbytes, i, *words)
        longest = max(longest, nbytes)
    return struct.pack("<4i", 20240522, 1, count or len(examples), longest).ljust(1024, b"\0") + body


def test_eval_set_is_llmc_s_byte_for_byte_in_both_directions(tmp_path):
    path = tmp_path / "set.bin"
    path.write_bytes(eval_set_by_hand(EXAMPLES))
    assert read_eval_set(path) == EXAMPLES
    write_eval_set(tmp_path / "again.bin", EXAMPLES)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


def test_a_damaged_eval_set_is_named(tmp_path):
    path, good = tmp_path / "set.bin", eval_set_by_hand(EXAMPLES)
    broken = [good[:-2], good + b"\0\0", good[:-1], eval_set_by_hand(EXAMPLES, 3), eval_set_by_hand(EXAMPLES, 1)]
    for word in (0, 1, 2, 3, 4, 5):  # of the second example: its start, bytes, index, label, completions, context
        at = 1024 + 2 * (20 + word)
        broken.append(good[:at] + b"\x07\x00" + good[at + 2 :])
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"set\.bin is damaged.*HINT"):
            read_eval_set(path)


@pytest.mark.parametrize(
    "example, problem",
    [
        ((4, [1], [[1]] * 4), "label 4"),
        ((0, [1], [[1]] * 3), "of 3 completions"),
        ((0, [], [[1]] * 4), "is empty"),
        ((0, [1], [[1], [1], [], [1]]), "is empty"),
        ((0, [65535], [[1]] * 4), "65535"),
        ((0, [1] * 40000, [[1]] * 4), "bytes"),
    ],
)
def test_what_an_eval_set_cannot_hold(tmp_path, example, problem):
    with pytest.raises(UserError, match=f"example 1: .*{problem}"):
        write_eval_set(tmp_path / "set.bin", [EXAMPLES[0], example])
    assert not list(tmp_path.iterdir())
