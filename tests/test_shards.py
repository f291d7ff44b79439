"""The shard file: llm.c's bytes, round trips, and files that are not shards."""

import os

import numpy as np
import pytest

from llmc.data.loader import DataLoader, EveryPair
from llmc.data.shards import check_apart, read_shard, read_shard_header, shard_paths, write_shard
from llmc.errors import UserError


def make_shards(folder, sizes, token=lambda shard, i: 1000 * shard + i):
    for shard, size in enumerate(sizes):
        write_shard(folder / f"shard_{shard}.bin", token(shard, np.arange(size)).astype(np.uint16))
    return str(folder / "shard_*.bin")


def test_shard_bytes_are_those_of_llmc(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([50256, 1, 2], np.uint16))
    raw = path.read_bytes()
    assert raw == np.array([20240520, 1, 3] + [0] * 253, "<i4").tobytes() + bytes([0x50, 0xC4, 1, 0, 2, 0])
    assert read_shard_header(path) == (3, np.uint16, 0)
    assert read_shard(path).tolist() == [50256, 1, 2]


def test_llama3_shard_round_trip(tmp_path):
    path = tmp_path / "a.bin"
    tokens = np.array([128000, 70000, 5], np.uint32)
    write_shard(path, tokens)
    raw = path.read_bytes()
    assert np.frombuffer(raw, "<i4", 3).tolist() == [20240801, 7, 3] and len(raw) == 1024 + 12
    assert np.array_equal(read_shard(path), tokens) and read_shard(path).dtype == np.uint32
    ((inputs, targets),) = DataLoader(str(path), 1, 2).batches(1)
    assert (inputs.tolist(), targets.tolist()) == ([[128000, 70000]], [[70000, 5]])


def test_the_stated_vocabulary_is_in_word_3_only(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(9, dtype=np.uint16))
    write_shard(tmp_path / "b.bin", np.arange(9, dtype=np.uint16), vocab_size=257)
    a, b = ((tmp_path / name).read_bytes() for name in ("a.bin", "b.bin"))
    assert read_shard_header(tmp_path / "b.bin").vocab_size == 257
    assert a[:12] + (257).to_bytes(4, "little") + a[16:] == b


def header(magic=20240520, version=1, num_tokens=20):
    return np.array([magic, version, num_tokens] + [0] * 253, "<i4").tobytes()


BAD_SHARDS = {
    "empty": (b"", "is empty"),
    "half a header": (header()[:500], "500 bytes.*1024"),
    "wrong magic": (header(magic=20240522) + bytes(40), "magic number 20240522, not 20240520"),
    "wrong version": (header(version=2) + bytes(40), "version 2, expected 1"),
    "wrong version of Llama": (header(magic=20240801) + bytes(80), "version 1, expected 7"),
    "no tokens": (header(num_tokens=0), "0 tokens"),
    "negative count": (header(num_tokens=-5), "-5 tokens"),
    "truncated": (header() + bytes(39), "truncated: 1063 bytes, expected 1064"),
    "over-long": (header() + bytes(41), "over-long: 1065 bytes, expected 1064"),
}


@pytest.mark.parametrize("content, message", BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_bad_shard_is_refused_with_one_line(content, message, tmp_path):
    path = tmp_path / "shard_0.bin"
    path.write_bytes(content)
    for call in (read_shard_header, read_shard, lambda path: DataLoader(str(path), 1, 2)):
        with pytest.raises(UserError, match=rf"shard_0.bin.*{message}.*HINT: ") as error:
            call(path)
        assert "\n" not in str(error.value)


def test_missing_shard_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.bin: No such file.*HINT"):
        read_shard_header(tmp_path / "none.bin")
    with pytest.raises(UserError, match=r"no file matches .*none_\*.bin.*HINT"):
        DataLoader(str(tmp_path / "none_*.bin"), 1, 2)
    with pytest.raises(UserError, match="Is a directory.*HINT"):
        DataLoader(str(tmp_path), 1, 2)


def test_one_bad_shard_of_many_is_found_at_start(tmp_path):
    pattern = make_shards(tmp_path, [40, 40, 40])
    with open(tmp_path / "shard_2.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="shard_2.bin is over-long"):
        DataLoader(pattern, 1, 4)


def test_empty_and_oversized_shards_are_not_written(tmp_path):
    with pytest.raises(UserError, match="not 0.*HINT"):
        write_shard(tmp_path / "a.bin", np.array([], np.uint16))
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), (2**31,), (0,))
    with pytest.raises(UserError, match="2147483648.*HINT"):
        write_shard(tmp_path / "a.bin", huge)
    assert not os.listdir(tmp_path)


# ----------------------------------------------------------------------------
# the files that a pattern names


def test_brackets_and_stars_in_folder_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my [1] data", "my 1 data", "[x]/new*", "plain"):
        (tmp_path / folder).mkdir(parents=True)
        make_shards(tmp_path / folder, [9, 9])
    for folder in ("my [1] data", "[x]/new*", "plain", os.path.join(tmp_path, "my [1] data")):
        expected = [os.path.join(folder, f"shard_{i}.bin") for i in (0, 1)]
        assert shard_paths(os.path.join(folder, "shard_*.bin")) == expected
        assert shard_paths(expected[1]) == expected[1:]
        assert shard_paths(os.path.join(folder, "shard_[0].bin")) == expected[:1]
    assert len(shard_paths("*/*/shard_1.bin")) == 1 and len(shard_paths("*/shard_1.bin")) == 3
    assert shard_paths("my [0-9] data/*.bin") == [os.path.join("my 1 data", f"shard_{i}.bin") for i in (0, 1)]
    (tmp_path / "empty [2]").mkdir()
    with pytest.raises(UserError, match=r"no file matches empty \[2\]/\*.bin"):
        shard_paths("empty [2]/*.bin")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    make_shards(tmp_path / "home", [9, 9])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    expected = [str(tmp_path / "home" / f"shard_{i}.bin") for i in (0, 1)]
    assert shard_paths("~/shard_*.bin") == DataLoader("~/shard_*.bin", 1, 4).paths == expected
    assert shard_paths("~/shard_0.bin") == expected[:1]
    (tmp_path / "~").mkdir()
    make_shards(tmp_path / "~", [9])
    assert shard_paths("~/shard_0.bin") == ["~/shard_0.bin"], "what is called so is meant"


READERS = [read_shard_header, lambda path: DataLoader(path, 1, 2), lambda path: EveryPair(path, 1, 2)]


@pytest.mark.parametrize("call", READERS)
def test_pipes_and_devices_are_refused(call, tmp_path):
    """Not opened: opening a pipe waits for its writer."""
    os.mkfifo(tmp_path / "pipe.bin")
    for path, kind in (str(tmp_path / "pipe.bin"), "a named pipe"), ("/dev/zero", "a device"):
        with pytest.raises(UserError, match=f"cannot read {path}: it is {kind}, not a file. HINT"):
            call(path)


def test_a_shard_of_both_splits_is_named(tmp_path):
    pattern = make_shards(tmp_path, [9, 9])
    check_apart(str(tmp_path / "shard_0.bin"), str(tmp_path / "shard_1.bin"))
    (tmp_path / "link.bin").symlink_to(tmp_path / "shard_0.bin")
    os.link(tmp_path / "shard_0.bin", tmp_path / "hard.bin")
    for val in ("shard_0.bin", "shard_[0].bin", "link.bin", "hard.bin"):
        with pytest.raises(UserError, match=r"\.bin is trained on \(-i .*shard_\*.bin\) and validated on .*HINT"):
            check_apart(pattern, str(tmp_path / val))


def test_shards_of_an_incomplete_set_are_refused(tmp_path):
    for name in ("book_train_000000.bin", "book_val.bin", "other_train.bin", "train.bin"):
        write_shard(tmp_path / name, np.arange(9, dtype=np.uint16))
    (tmp_path / ".book_incomplete").touch()
    assert len(shard_paths(str(tmp_path / "other_*.bin"))) == len(shard_paths(str(tmp_path / "train.bin"))) == 1
    for name in ("book_train_*.bin", "book_val.bin", "*.bin"):
        with pytest.raises(UserError, match="book_.*is of a set that is not complete.*HINT"):
            shard_paths(str(tmp_path / name))
    (tmp_path / ".book_incomplete").rename(tmp_path / ".incomplete")
    assert len(shard_paths(str(tmp_path / "book_*.bin"))) == 2
    with pytest.raises(UserError, match="/train.bin is of a set that is not complete"):
        shard_paths(str(tmp_path / "train.bin"))
