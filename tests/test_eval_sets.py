"""Eval sets: llm.c's bytes in both directions, and what the format cannot hold."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.data import eval_sets
from llmc.data.eval_sets import prepare_hellaswag, read_eval_set, write_eval_set
from llmc.errors import UserError
from llmc.files.lock import held

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


def test_two_processes_into_one_file_leave_one_of_them(tmp_path):
    """Of different lines: one process writes, the other one is told that its place is taken."""
    for name, label in ("a", 0), ("b", 3):
        (tmp_path / name).mkdir()
        line = {"ctx": f"text {name}", "label": label, "endings": ["one", "two", "three", "four"]}
        (tmp_path / name / "set.jsonl").write_text((json.dumps(line) + "\n") * 500)
    command = [sys.executable, "-m", "llmc.data", "prepare", "--tokenizer", "bytes"]
    command += ["--out", str(tmp_path / "out"), "hellaswag"]
    environment = os.environ | {"PYTHONPATH": str(Path(eval_sets.__file__).parents[2])}
    running = [subprocess.Popen([*command, str(tmp_path / name / "set.jsonl")], env=environment) for name in "ab"]
    assert sorted(process.wait() for process in running) == [0, 2]
    assert os.listdir(tmp_path / "out") == ["set.bin"] and len(read_eval_set(tmp_path / "out" / "set.bin")) == 500


def test_the_place_of_a_set_is_looked_at_under_the_lock(tmp_path, monkeypatch, capsys):
    """Another process has the lock, and writes other content before it lets go."""
    (tmp_path / "set.jsonl").write_text('{"ctx": "a", "label": 0, "endings": ["b", "c", "d", "e"]}\n')
    other = held(str(tmp_path / ".prepare.lock"))
    other.__enter__()

    def sleep(seconds):
        write_eval_set(tmp_path / "set.bin", EXAMPLES)
        other.__exit__(None, None, None)

    monkeypatch.setattr("llmc.files.lock.time.sleep", sleep)
    with pytest.raises(UserError, match="set.bin exists with other content"):
        prepare_hellaswag(str(tmp_path / "set.jsonl"), "bytes")
    assert "it prepares data in" in capsys.readouterr().err and read_eval_set(tmp_path / "set.bin") == EXAMPLES
