"""Damaged models, states, markers, Hugging Face's folders, replays and logs: the commands report each in one line.

A checkpoint that llmc writes has checksums, which find every change (test_files.py). Here the checkpoint's
marker is empty, as llm.c's is, so that damage reaches the code that reads the files.
"""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from mutations import assert_one_line, mutations

from llmc import evaluate, export, generate, plot, test_gpt2, train
from llmc.data.shards import write_shard
from llmc.errors import UserError
from llmc.files import debug_state, model_file

COUNTS = [pytest.param(1, 50, id="some"), pytest.param(2, 2000, id="many", marks=pytest.mark.full)]
CPU = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with shards of letters, a run of two steps, and its model as Hugging Face's folder."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("letters.bin", "others.bin")):
        steps = np.random.default_rng(seed).integers(-2, 4, 2000)
        write_shard(folder / name, (97 + np.cumsum(steps) % 26).astype(np.uint16), 257)
    assert train.main([*train_flags(folder, folder / "run"), "-n", "2", "-x", "2"]) == 0
    (folder / "run" / "DONE_00000002").write_bytes(b"")
    assert export.main([str(folder / "run"), str(folder / "hf")]) == 0
    return folder


def train_flags(folder, run):
    where = ["-i", str(folder / "letters.bin"), "-j", str(folder / "others.bin"), "-o", str(run), *CPU]
    return [*where, "-e", "tiny:d1", "-b", "2", "-t", "32", "-v", "0", "-s", "0"]


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A folder of the test's own, where its files may be damaged."""
    for name in ("run", "hf"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusals(good, seed, count, path, main, argv, capfd, whole=lambda raw: raw):
    """How many of `count` changes of `good` a command refuses. whole: the file that has such bytes in it."""
    path.write_bytes(whole(good))
    assert assert_one_line(main, argv, capfd, "the good file") == 0
    refused = 0
    for case, raw in mutations(good, seed, count):
        path.write_bytes(whole(raw))
        refused += assert_one_line(main, argv, capfd, case) == 2
    return refused


@pytest.mark.parametrize("seed, count", COUNTS)
def test_models(seed, count, folder, capfd):
    path = folder / "model.bin"
    good = (folder / "run" / "model_00000002.bin").read_bytes()
    assert refusals(good, seed, count, path, generate.main, ["model.bin", "-g", "2", *CPU], capfd) > count // 3


def state_parts(folder):
    """(header, m and v and the loader's block, extra) of the run's state."""
    good = (folder / "run" / "state_00000002_00000.bin").read_bytes()
    length = struct.unpack_from("<i", good, 4 * 66)[0]
    return good[:1024], good[1024:-length], good[-length:]


def resume(made, folder):
    """A command that continues the run: of a state, logs and model as they are then."""

    def main(argv):
        shutil.rmtree("again", ignore_errors=True)
        shutil.copytree(folder / "run", "again")
        return train.main(argv)

    return main, [*train_flags(made, "again"), "-y", "1", "-x", "3", "-n", "0"]


@pytest.mark.parametrize("seed, count", COUNTS)
def test_headers_of_states(seed, count, made, folder, capfd):
    header, arrays, extra = state_parts(folder)
    path, (main, argv) = folder / "run" / "state_00000002_00000.bin", resume(made, folder)
    assert refusals(header, seed, count, path, main, argv, capfd, lambda raw: raw + arrays + extra) > count // 3


@pytest.mark.parametrize("seed, count", COUNTS)
def test_the_json_of_states(seed, count, made, folder, capfd):
    """With the length in the header that it has: detectors, the loader's streams, the model's fingerprint."""
    header, arrays, extra = state_parts(folder)
    path, (main, argv) = folder / "run" / "state_00000002_00000.bin", resume(made, folder)

    def whole(raw):
        changed = bytearray(header)
        struct.pack_into("<i", changed, 4 * 66, len(raw))
        return bytes(changed) + arrays + raw

    assert refusals(extra, seed, count, path, main, argv, capfd, whole) > count // 3


VALUES = [None, True, -1, 2**31, 2**63, 1e300, "x", "", [], {}, [[]], [1, "a"], {"a": 1}, [0.5] * 200]


def test_every_value_of_the_json_of_states(made, folder, capfd):
    """Each of them replaced by values of every type: what is not read may be anything, what is must be right."""
    header, arrays, extra = state_parts(folder)
    path, (main, argv) = folder / "run" / "state_00000002_00000.bin", resume(made, folder)
    paths = []

    def visit(value, at):
        paths.append(at)
        if isinstance(value, dict):
            for key in value:
                visit(value[key], (*at, key))
        elif isinstance(value, list) and value:
            visit(value[0], (*at, 0))

    visit(json.loads(extra), ())
    assert len(paths) > 15
    refused = 0
    for number, at in enumerate(paths):
        for value in VALUES[number % 3 :: 3]:
            changed = json.loads(extra)
            if at:
                inner = changed
                for key in at[:-1]:
                    inner = inner[key]
                inner[at[-1]] = value
            else:
                changed = value
            raw, words = json.dumps(changed).encode(), bytearray(header)
            struct.pack_into("<i", words, 4 * 66, len(raw))
            path.write_bytes(bytes(words) + arrays + raw)
            refused += assert_one_line(main, argv, capfd, f"{at} = {value!r}"[:200]) == 2
    assert refused > len(paths)


@pytest.mark.parametrize("seed, count", COUNTS)
def test_markers(seed, count, made, folder, capfd):
    """Every change is found, but for one that leaves an empty marker, as llm.c's."""
    assert train.main([*train_flags(made, "own"), "-n", "1", "-x", "1"]) == 0
    path = folder / "own" / "DONE_00000001"
    good = path.read_bytes()
    for case, raw in mutations(good, seed, count):
        path.write_bytes(raw)
        code = assert_one_line(evaluate.main, ["--verify", "own"], capfd, case)
        assert code == (0 if raw in (good, b"") else 2), case


@pytest.mark.parametrize("seed, count", COUNTS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_hugging_face_s_folders(name, seed, count, folder, capfd):
    path = folder / "hf" / name
    if name.endswith("index.json"):
        os.rename(folder / "hf" / "model.safetensors", folder / "hf" / "part.safetensors")
        names = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"]
        path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    argv = ["hf:hf", "-g", "2", *CPU]
    assert refusals(path.read_bytes(), seed, count, path, generate.main, argv, capfd) > count // 5


@pytest.mark.parametrize("seed, count", COUNTS)
def test_debug_states(seed, count, folder, capfd):
    header = model_file.read_model_header("run/model_00000002.bin")
    B, T, V, N = 1, 4, header["vocab_size"], model_file.num_parameters(header)
    x = np.zeros((B, T), np.int32)
    debug_state.write_debug_state("debug.bin", x, x, np.zeros((B, T, V)), 5.5, np.zeros(N))

    def main(argv):  # 1: the numbers are others, as these are no model's
        return test_gpt2.main(argv) // 2 * 2

    argv = ["run/model_00000002.bin", "debug.bin", *CPU]
    good = (folder / "debug.bin").read_bytes()
    small = good[: 1024 + 16 + 64]  # most of the rest are gradients, which may be any numbers
    whole = lambda raw: raw + good[len(small) :]  # noqa: E731
    assert refusals(small, seed, min(count, 400), folder / "debug.bin", main, argv, capfd, whole) > count // 20


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    """The nonfinite_*.npz of a run whose learning rate is far too high."""
    run = tmp_path_factory.mktemp("saved") / "run"
    assert train.main([*train_flags(made, run), "-x", "9", "-l", "1e30"]) == 2
    return next(run.glob("nonfinite_*.npz"))


def replay(argv):
    return train.main(argv) // 2 * 2  # 1: it is still not finite


@pytest.mark.parametrize("seed, count", COUNTS)
def test_replays(seed, count, saved, folder, capfd):
    argv, path = ["--replay", "step.npz", *CPU], folder / "step.npz"
    assert refusals(saved.read_bytes(), seed, count, path, replay, argv, capfd) > count // 3


@pytest.mark.parametrize("seed, count", COUNTS)
def test_the_json_of_replays(seed, count, saved, folder, capfd):
    with np.load(saved) as file:
        arrays = {name: file[name] for name in file.files}
    text = str(arrays["about"])
    for case, raw in mutations(text.encode(), seed, count):
        np.savez("step.npz", **arrays | dict(about=raw.decode("utf-8", "replace")))
        assert_one_line(replay, ["--replay", "step.npz", *CPU], capfd, case)


@pytest.mark.parametrize("seed, count", COUNTS)
def test_logs(seed, count, folder, capfd):
    """What plot reads; and resuming goes on from any log."""
    good, path, refused = (folder / "run" / "main.log").read_bytes(), folder / "main.log", 0
    assert plot.parse_log(folder / "run" / "main.log")["trl"].keys() == {0, 1}
    for case, raw in mutations(good, seed, count):
        path.write_bytes(raw)
        try:
            streams = plot.parse_log("main.log")
            assert not np.isinf([value for stream in streams.values() for value in stream.values()]).any(), case
        except UserError as error:
            assert "HINT: " in str(error) and str(error).isprintable(), case
            refused += 1
    assert refused > count // 10


@pytest.mark.parametrize("seed, count", [(1, 10), pytest.param(2, 500, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["main.log", "metrics.jsonl"])
def test_resuming_with_any_log(name, seed, count, made, folder, capfd):
    main, argv = resume(made, folder)
    path = folder / "run" / name
    assert refusals(path.read_bytes(), seed, count, path, main, argv, capfd) == 0


def test_what_is_no_file(made, folder, capfd):
    """Named pipes, devices and folders are refused before they are opened, which would wait or never end."""
    os.mkfifo("pipe")
    names = ["pipe", ".", "/dev/zero", "/dev/null"]
    for name in names:
        for main, argv in (
            (generate.main, [name, *CPU]),
            (train.main, ["-e", "x.bin", "-i", name, "-j", name, *CPU]),
            (train.main, ["--replay", name, *CPU]),
            (plot.main, [name, "-o", "x.png"]),
            (test_gpt2.main, ["run/model_00000002.bin", name, *CPU]),
            (evaluate.main, ["run", "--hellaswag", name, *CPU]),
            (evaluate.main, ["run", "-j", name, *CPU]),
        ):
            assert assert_one_line(main, argv, capfd, f"{main.__module__} {argv}") == 2
    files = ("DONE_00000002", "state_00000002_00000.bin", "model_00000002.bin", "main.log", "metrics.jsonl")
    for path in ("hf/config.json", "hf/model.safetensors", *(f"run/{name}" for name in files)):
        good = (folder / path).read_bytes()
        os.remove(path)
        os.mkfifo(path)
        main, argv = (generate.main, ["hf:hf", *CPU]) if "hf" in path else resume_here(made)
        assert assert_one_line(main, argv, capfd, path) == 2
        os.remove(path)
        (folder / path).write_bytes(good)


def resume_here(made):
    return train.main, [*train_flags(made, "run"), "-y", "1", "-x", "3"]
