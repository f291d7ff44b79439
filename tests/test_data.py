"""Shards, the loader against llm.c's published order, preparation, downloads, and what a user can get wrong."""

import hashlib
import io
import itertools
import os
import struct
import subprocess
import sys
import tracemalloc
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.data import prepare as data
from llmc.data.prepare import DataLoader, main, pieces, prepare, read_shard, read_shard_header, write_shard
from llmc.data.tokenizer import get
from llmc.errors import UserError
from llmc.files import checkpoint
from llmc.rand import MT19937


def batches(loader, count):
    """The first input token of each of the next batches; inputs and targets are checked against each other."""
    inputs, targets = np.empty((2, loader.B, loader.T), np.int32)
    first = []
    for _ in range(count):
        loader.next_batch(inputs, targets)
        assert np.array_equal(inputs.reshape(-1)[1:], targets.reshape(-1)[:-1])
        first.append(int(inputs[0, 0]))
    return first


def make_shards(folder, sizes, token=lambda shard, i: 1000 * shard + i):
    for shard, size in enumerate(sizes):
        write_shard(folder / f"shard_{shard}.bin", token(shard, np.arange(size)).astype(np.uint16))
    return str(folder / "shard_*.bin")


# ----------------------------------------------------------------------------
# the shard file


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
    assert batches(DataLoader(str(path), 1, 2), 1) == [128000]


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
# the loader's order


@pytest.mark.parametrize(
    "rank, expected",
    [
        (0, [2096, 2128, 2000, 2064, 2032, 1032, 1096, 1064, 1000, 64, 0, 96]),
        (1, [2080, 2144, 2112, 2048, 2016, 80, 48, 112, 16, 1080, 1016, 1048]),
    ],
)
def test_shuffled_order_is_that_of_llmc(rank, expected, tmp_path):
    """Unequal shards, two processes: first tokens recorded from the compiled C loader."""
    pattern = make_shards(tmp_path, [140, 140, 170])
    loader = DataLoader(pattern, 2, 8, rank, 2, should_shuffle=True)
    assert loader.num_tokens == 450
    assert batches(loader, 12) == expected


def replay(sizes, rank, P, sample_tokens, epochs):
    """(shard, sample) pairs in the documented order; shards are permuted on top of the previous epoch's order."""
    mt, order = MT19937(42 + rank), list(range(len(sizes)))

    def shuffle(values):
        for i in range(len(values) - 1, 0, -1):
            j = mt.random_u32() % (i + 1)
            values[i], values[j] = values[j], values[i]
        return values

    for _ in range(epochs):
        for shard in shuffle(order):
            for sample in shuffle(list(range((sizes[shard] - 1) // (P * sample_tokens)))):
                yield shard, sample


@pytest.mark.parametrize("rank", range(3))
def test_shuffled_order_over_epochs(rank, tmp_path):
    sizes = [140, 999, 170, 65, 300]
    loader = DataLoader(make_shards(tmp_path, sizes), 2, 8, rank, 3, should_shuffle=True)
    expected = [1000 * shard + sample * 48 + rank * 16 for shard, sample in replay(sizes, rank, 3, 16, epochs=4)]
    assert batches(loader, len(expected)) == expected


@pytest.mark.parametrize("P", [1, 2])
def test_unshuffled_order(P, tmp_path):
    """llm.c's dev/test: 4 shards of 140 consecutive integers; the rest of a shard is dropped; epochs repeat."""
    B, T = 4, 8
    pattern = make_shards(tmp_path, [140] * 4, lambda shard, i: shard * 140 + i)
    inputs, targets = np.empty((2, B, T), np.int32)
    for rank in range(P):
        loader = DataLoader(pattern, B, T, rank, P)
        for _, shard, sample in itertools.product(range(3), range(4), range(139 // (P * B * T))):
            loader.next_batch(inputs, targets)
            start = shard * 140 + sample * P * B * T + rank * B * T
            assert np.array_equal(inputs.reshape(-1), np.arange(start, start + B * T))
            assert np.array_equal(targets.reshape(-1), np.arange(start + 1, start + B * T + 1))


@pytest.mark.parametrize("P", [1, 2, 3])
def test_shuffled_epoch_shows_every_usable_token_once(P, tmp_path):
    """Over all ranks; llm.c's test leaves the shuffled case with several processes out."""
    B, T, shards, size = 4, 8, 4, 140
    pattern = make_shards(tmp_path, [size] * shards, lambda shard, i: shard * size + i)
    loaders = [DataLoader(pattern, B, T, rank, P, should_shuffle=True) for rank in range(P)]
    inputs, targets = np.empty((2, B, T), np.int32)
    samples = (size - 1) // (P * B * T)
    usable = np.concatenate([s * size + np.arange(samples * P * B * T) for s in range(shards)])
    orders = []
    for _ in range(3):
        seen = np.zeros(shards * size, int)
        order = []
        for _ in range(shards * samples):
            for loader in loaders:
                loader.next_batch(inputs, targets)
                np.add.at(seen, inputs, 1)
                order.append(int(inputs[0, 0]))
                assert np.array_equal(targets, inputs + 1)
        assert (seen[usable] == 1).all() and seen.sum() == usable.size
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_shards_are_sorted_by_name_and_a_plain_path_is_one_shard(tmp_path):
    for name in ("b_10.bin", "b_2.bin", "a[1].bin"):
        write_shard(tmp_path / name, np.full(9, len(name), np.uint16))
    assert [os.path.basename(path) for path in DataLoader(str(tmp_path / "b_*.bin"), 1, 4).paths] == [
        "b_10.bin",
        "b_2.bin",
    ]
    assert len(DataLoader(str(tmp_path / "a[1].bin"), 1, 4).paths) == 1


def test_reset_starts_over(tmp_path):
    loader = DataLoader(make_shards(tmp_path, [50, 60]), 2, 4)
    first = batches(loader, 3)
    loader.reset()
    assert batches(loader, 3) == first


def test_a_batch_allocates_nothing_of_its_size(tmp_path):
    B, T = 64, 1024
    pattern = make_shards(tmp_path, [B * T * 2 + 1], lambda shard, i: i % 256)
    loader = DataLoader(pattern, B, T, should_shuffle=True, vocab_size=257)
    inputs, targets = np.empty((2, B, T), np.int32)
    loader.next_batch(inputs, targets)
    tracemalloc.start()
    loader.next_batch(inputs, targets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < inputs.nbytes / 10


def test_shard_beyond_2_gib(tmp_path):
    """llm.c seeks with an int. The file is sparse: only its header and its end are written."""
    count, T = 1_200_000_000, 1024
    path = tmp_path / "huge.bin"
    with open(path, "wb") as file:
        file.write(header(num_tokens=count))
        file.truncate(1024 + 2 * count)
        samples = (count - 1) // T
        file.seek(1024 + 2 * (samples - 1) * T)
        file.write(np.arange(7, 7 + T + 1, dtype="<u2").tobytes())
    loader = DataLoader(str(path), 1, T)
    loader.load_state(loader.state() | {"current_sample_idx": samples - 1})
    assert batches(loader, 2) == [7, 0]


# ----------------------------------------------------------------------------
# resume


@pytest.mark.parametrize("should_shuffle", [False, True])
@pytest.mark.parametrize("rank, P", [(0, 1), (1, 2)])
def test_resume_at_every_position_of_two_epochs(rank, P, should_shuffle, tmp_path):
    """Shards of different sizes, which llm.c cannot resume inside of."""
    pattern = make_shards(tmp_path, [140, 300, 65, 170])
    args = (pattern, 2, 8, rank, P, should_shuffle)
    loader = DataLoader(*args)
    total = 2 * sum((size - 1) // (16 * P) for size in (140, 300, 65, 170)) + 3
    states, expected = [], []
    for _ in range(total):
        states.append(loader.state())
        expected += batches(loader, 1)
    for position, state in enumerate(states):
        resumed = DataLoader(*args)
        resumed.load_state(state)
        assert batches(resumed, total - position) == expected[position:], position
        again = DataLoader(*args)
        again.load_state(state)
        for key, value in again.state().items():
            assert np.array_equal(value, state[key]), key


def test_state_has_what_llmc_saves(tmp_path):
    loader = DataLoader(make_shards(tmp_path, [140, 170]), 2, 8, should_shuffle=True)
    batches(loader, 2)
    state = loader.state()
    samples = (DataLoader(loader.path, 2, 8).num_tokens - 1) // 16
    assert state["should_shuffle"] is True
    assert (state["num_shards"], state["current_shard_idx"], state["current_sample_idx"]) == (2, 0, 2)
    assert state["shard_indices"].dtype == state["intra_shard_indices"].dtype == np.int32
    assert state["shard_num_samples"] == len(state["intra_shard_indices"]) == samples
    assert len(state["mt19937"]) == 2520
    plain = DataLoader(str(tmp_path / "shard_0.bin"), 2, 8).state()
    streams = dict(count=1, rows=2, T=8, next=0, row=0, others={})
    assert plain == dict(should_shuffle=False, num_shards=1, current_shard_idx=0, current_sample_idx=0, streams=streams)


def test_state_of_other_data_is_refused(tmp_path):
    pattern = make_shards(tmp_path, [140, 170])
    state = DataLoader(pattern, 2, 8, should_shuffle=True).state()
    of_llmc = {key: value for key, value in state.items() if key != "streams"}
    plain = DataLoader(pattern, 2, 8)
    for loader, changed, message in (
        (plain, state, "saved with shuffling, this run is without"),
        (DataLoader(pattern, 2, 8, should_shuffle=True), plain.state(), "saved without shuffling, this run is with"),
        (DataLoader(str(tmp_path / "shard_0.bin"), 2, 8, should_shuffle=True), state, "2 shards, not 1"),
        (DataLoader(pattern, 2, 4, should_shuffle=True), of_llmc, "10 samples in this shard, not 21"),
        (DataLoader(pattern, 2, 4, should_shuffle=True), state, "saved with -t 8, not 4"),
        (
            DataLoader(pattern, 2, 8, should_shuffle=True),
            state | {"shard_indices": np.array([0, 0])},
            "2 shards, not 2",
        ),
        (plain, plain.state() | {"current_shard_idx": 2}, "shard 2 of 2"),
        (plain, plain.state() | {"current_sample_idx": 9}, "sample 9 of 8"),
    ):
        with pytest.raises(UserError, match=f"{message}.*HINT"):
            loader.load_state(changed)


# ----------------------------------------------------------------------------
# resume on another number of ranks, or with another B


def rows_of(loaders, count):
    """The first tokens of the next `count` rows in the order in which the ranks of a run take them."""
    rows = []
    while len(rows) < count:
        for loader in loaders:
            inputs, targets = np.empty((2, loader.B, loader.T), np.int32)
            loader.next_batch(inputs, targets)
            assert np.array_equal(inputs[:, 1:], targets[:, :-1]) and (targets[:, -1] == inputs[:, -1] + 1).all()
            rows += inputs[:, 0].tolist()
    return rows


def ranks(pattern, P, B, T=8, shuffle=True, **streams):
    return [DataLoader(pattern, B, T, rank, P, shuffle, **streams) for rank in range(P)]


def through_files(loaders, folder):
    """The loaders' states after a round through the state files of all ranks."""
    states = []
    for rank, loader in enumerate(loaders):
        where = dict(num_processes=len(loaders), rank=rank, step=1, rng_state=1, rng_state_last_update=1)
        checkpoint.write_state(
            folder / "state.bin", **where, m=np.zeros(4, "f"), v=np.zeros(4, "f"), loader_state=loader.state()
        )
        states.append(checkpoint.read_state_header(folder / "state.bin", (4,))["loader_state"])
    return states


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("P0, B0", [(1, 4), (2, 2), (4, 1), (4, 4)])
def test_other_ranks_continue_row_by_row(P0, B0, shuffle, tmp_path):
    """The ranks that began go on; others take over at the same place, twice: the same rows in the same order, for over
    an epoch. In the first epoch every usable row is read once."""
    sizes = [340, 700, 165, 270]
    pattern = make_shards(tmp_path, sizes, lambda shard, i: i + 2000 * shard)
    total = 64 * 6
    expected = rows_of(ranks(pattern, P0, B0, shuffle=shuffle), total)
    epoch = sum((n - 1) // (P0 * B0 * 8) for n in sizes) * P0 * B0
    assert len(set(expected[:epoch])) == epoch < total // 2
    for P, B in ((1, 4), (2, 2), (4, 1), (2, 1), (1, 3), (3, 2)):
        loaders = ranks(pattern, P0, B0, shuffle=shuffle)
        rows = rows_of(loaders, 3 * P0 * B0)
        for p, b, count in ((P, B, 5 * P * B), (P0, B0, 1), (P, B, epoch)):  # the last with rows left of a sample
            states = through_files(loaders, tmp_path)
            loaders = ranks(pattern, p, b, shuffle=shuffle)
            for loader in loaders:
                loader.load_states(states)
            rows += rows_of(loaders, count)
        assert rows == expected[: len(rows)], (P, B)
        assert len(rows) > epoch


def test_states_of_llmc_s_ranks_continue_on_another_number(tmp_path):
    """No word of ours in the states: as many streams as ranks, and B as it is."""
    pattern = make_shards(tmp_path, [340, 700, 165, 270])
    loaders = ranks(pattern, 4, 2)
    rows_of(loaders, 24)
    states = [{k: v for k, v in loader.state().items() if k != "streams"} for loader in loaders]
    expected = rows_of(loaders, 80)
    others = ranks(pattern, 2, 2)
    for loader in others:
        loader.load_states(states)
    assert rows_of(others, 80) == expected


def test_one_stream_gives_the_same_rows_to_any_number_of_ranks(tmp_path):
    pattern = make_shards(tmp_path, [340, 700, 165, 270])
    expected = rows_of(ranks(pattern, 1, 2), 240)
    for P in (2, 3, 4):
        assert rows_of(ranks(pattern, P, 2, streams=1, rows=2), 240)[:240] == expected
    assert rows_of(ranks(pattern, 2, 1, streams=1, rows=2), 240) == expected


def test_llama3_shards_are_served_where_the_vocabulary_fits(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(
        struct.pack("<3i", 20240801, 7, 40).ljust(1024, b"\0") + struct.pack("<40I", *range(128000, 127960, -1))
    )
    inputs, targets = np.empty((2, 2, 8), np.int32)
    DataLoader(str(path), 2, 8, vocab_size=128256).next_batch(inputs, targets)
    assert inputs.reshape(-1).tolist() == list(range(128000, 127984, -1)) and targets[1, 7] == 127984
    with pytest.raises(UserError, match="token 0 has id 128000.*ends at 50256"):
        DataLoader(str(path), 2, 8, vocab_size=50257).next_batch(inputs, targets)


# ----------------------------------------------------------------------------
# data that does not fit


def test_shard_too_short_for_a_batch(tmp_path):
    pattern = make_shards(tmp_path, [140, 128])
    with pytest.raises(UserError, match="shard_1.bin has 128 tokens.*-b 4 x -t 16 on 2 processes needs 129.*HINT"):
        DataLoader(pattern, 4, 16, 0, 2)
    make_shards(tmp_path, [140, 129])
    assert DataLoader(pattern, 4, 16, 0, 2).shard_num_samples == 1


def test_token_id_beyond_the_vocabulary(tmp_path):
    path = tmp_path / "a.bin"
    tokens = np.arange(65, dtype=np.uint16)
    tokens[40] = 300
    write_shard(path, tokens)
    loader = DataLoader(str(path), 2, 8, vocab_size=300)
    batches(loader, 2)
    with pytest.raises(UserError, match=r"a.bin: token 40 has id 300.*ends at 299.*HINT"):
        batches(loader, 1)
    assert batches(DataLoader(str(path), 2, 8, vocab_size=301), 3) == [0, 16, 32]


def test_data_of_another_vocabulary_is_refused_at_start(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.zeros(99, np.uint16), vocab_size=257)
    with pytest.raises(UserError, match="257 tokens, the model has 50257.*HINT.*--tokenizer"):
        DataLoader(str(path), 2, 8, vocab_size=50257)
    DataLoader(str(path), 2, 8, vocab_size=257)


def test_file_that_shrinks_while_training(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.zeros(99, np.uint16))
    loader = DataLoader(str(path), 2, 8)
    os.truncate(path, 1024 + 40)
    batches(loader, 1)
    with pytest.raises(UserError, match="became shorter.*HINT"):
        batches(loader, 1)


# ----------------------------------------------------------------------------
# streaming: pieces encode as the whole


@pytest.fixture(scope="module")
def gpt2():
    return get("gpt2")


def cut_at(text, cuts):
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


WORDS = ["a", "'s", "'ll", "'", "don't", "Zoë", "東京", "🎭", "e\u0301", "12", "3", "...", "!?", "<|endoftext|>"]
SPACES = [" ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "\xa0", "\u3000", "\x1c", "\x85", "\u2028", "   \n"]
TEXTS = st.lists(st.sampled_from(WORDS + 2 * SPACES) | st.text(max_size=3), max_size=30).map("".join)
CUTS = st.lists(st.integers(0, 60), max_size=8)


@settings(max_examples=400)
@given(text=TEXTS, cuts=CUTS)
@example(text="a  b", cuts=[2])
@example(text="a \n b", cuts=[3])
@example(text="x\n\n\ny", cuts=[2, 3, 4])
def test_streamed_pieces_encode_as_the_whole(gpt2, text, cuts):
    parts = list(pieces(cut_at(text, cuts), blank_lines=False))
    assert "".join(piece for _, piece in parts) == text
    assert [starts for starts, _ in parts] == [True] * bool(parts) + [False] * (len(parts) - 1)
    expected = gpt2.encode(text).tolist()
    assert [i for _, piece in parts for i in gpt2.encode(piece).tolist()] == expected


@settings(max_examples=400)
@given(text=TEXTS, cuts=CUTS)
@example(text="a\n\n\n\n\nb\n\n", cuts=[2, 3, 4, 5])
def test_streamed_blank_line_documents_are_those_of_the_whole(gpt2, text, cuts):
    documents = text.split("\n\n")
    documents = [document + "\n\n" for document in documents[:-1]] + [d for d in documents[-1:] if d]
    streamed = []
    for starts, piece in pieces(cut_at(text, cuts), blank_lines=True):
        if starts:
            streamed.append([])
        streamed[-1].append(piece)
    assert ["".join(parts) for parts in streamed] == documents
    for parts, document in zip(streamed, documents, strict=True):
        assert [i for part in parts for i in gpt2.encode(part).tolist()] == gpt2.encode(document).tolist()


def test_streaming_does_cut():
    """The property would also hold if nothing were ever cut."""
    chunks = ["some words and ", "others and\nmore ", "words"]
    assert [len(piece) for _, piece in pieces(chunks, blank_lines=False)] == [14, 16, 6]


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_file_streamed_in_small_chunks(tokenizer, tmp_path, monkeypatch):
    text = "“Ça va,” said 東京 🎭.\r\n\r\n  And  \n\n so\t on\u2028… " * 200
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(data, "CHUNK_BYTES", 37)
    monkeypatch.setattr(data, "BATCH_CHARS", 300)
    encoder = get(tokenizer)
    ids = np.concatenate(list(data.tokenize([str(path)], encoder, blank_lines=False)))
    assert ids[0] == encoder.eot
    assert np.array_equal(ids[1:], encoder.encode(text))


def test_streaming_memory_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(b"To be, or not to be: that is the question.\n" * 700_000)
    monkeypatch.setattr(data, "BATCH_CHARS", 1 << 20)
    tracemalloc.start()
    prepared = prepare([str(path)], "bytes", out=str(tmp_path / "out"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(file.num_tokens for file in prepared.files) == path.stat().st_size + 1
    assert peak < path.stat().st_size / 2


# ----------------------------------------------------------------------------
# prepare


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own; the text comes from LLMC_DATA_DIR, or once from the network."""
    source = os.environ.get("LLMC_DATA_DIR") or data.cache_dir()
    monkeypatch.setenv("LLMC_DATA_DIR", source)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmc"


@pytest.fixture(scope="session", autouse=True)
def shakespeare():
    """The bytes of the text. It and GPT-2's vocabulary are there before tests forbid the network and move the cache."""
    get("gpt2")
    with open(data.tinyshakespeare_text(), "rb") as file:
        return file.read()


@pytest.fixture
def offline(monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("LLMC_DATA_DIR", "")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_tinyshakespeare_gpt2_is_that_of_llmc(cache, gpt2, shakespeare, capsys):
    assert main(["prepare", "tinyshakespeare"]) == 0
    folder = cache / "tinyshakespeare-gpt2"
    train, val = folder / "tiny_shakespeare_train.bin", folder / "tiny_shakespeare_val.bin"
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {val}: 32768 tokens, 66560 bytes",
        f"wrote {train}: 305260 tokens, 611544 bytes",
        f"next: python -m llmc.train -i {train} -j {val}",
    ]
    tokens = np.concatenate([read_shard(val), read_shard(train)])
    sections = shakespeare.decode().split("\n\n")
    expected = [i for s in sections[:-1] for i in [50256, *gpt2.encode(s + "\n\n").tolist()]]
    assert tokens.tolist() == expected + [50256, *gpt2.encode(sections[-1]).tolist()]
    assert not any(train.read_bytes()[12:1024]), "the header is llm.c's"
    assert main(["prepare", "tinyshakespeare"]) == 0
    assert capsys.readouterr().out.count("unchanged: ") == 2


def test_tinyshakespeare_bytes(cache, shakespeare, capsys):
    assert main(["prepare", "tinyshakespeare", "--tokenizer", "bytes"]) == 0
    out = capsys.readouterr().out
    train = read_shard(cache / "tinyshakespeare-bytes" / "tiny_shakespeare_train.bin")
    val = read_shard(cache / "tinyshakespeare-bytes" / "tiny_shakespeare_val.bin")
    assert (train.size, val.size) == (1003854, 111540)
    assert train.astype(np.uint8).tobytes() + val.astype(np.uint8).tobytes() == shakespeare
    assert read_shard_header(cache / "tinyshakespeare-bytes" / "tiny_shakespeare_val.bin").vocab_size == 257
    assert out.endswith("tiny_shakespeare_val.bin --tokenizer bytes\n")


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_known_hashes_of_finished_shards(tokenizer, tmp_path):
    prepared = prepare(["tinyshakespeare"], tokenizer, out=str(tmp_path))
    for path, expected in zip(prepared[:2], data.TINYSHAKESPEARE_SHARDS[tokenizer], strict=True):
        with open(path, "rb") as file:
            assert hashlib.sha256(file.read()).hexdigest() == expected


def test_user_files(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text.txt").write_text("abcd\n\nefgh", encoding="utf-8")
    (tmp_path / "b.txt").write_text("ij", encoding="utf-8")
    command = ["prepare", "my text.txt", "b.txt", "--tokenizer", "bytes"]
    assert main([*command, "--val-fraction", "0.25"]) == 0
    out, err = capfd.readouterr()
    assert err == "", "no progress bar where stderr is no terminal"
    expected = [256, *b"abcd\n\nefgh", 256, *b"ij"]
    assert read_shard("my text-bytes/my text_train.bin").tolist() == expected[:10]
    assert read_shard("my text-bytes/my text_val.bin").tolist() == expected[10:]
    assert "-i 'my text-bytes/my text_train.bin' -j 'my text-bytes/my text_val.bin' --tokenizer bytes" in out

    assert main([*command, "--val-fraction", "0", "--split", "blank-lines", "--out", "all"]) == 0
    assert os.listdir("all") == ["my text_train.bin"]
    assert read_shard("all/my text_train.bin").tolist() == [256, *b"abcd\n\n", 256, *b"efgh", 256, *b"ij"]
    assert " -j " not in capfd.readouterr().out


def test_many_shards_of_equal_size(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(bytes(range(32, 127)) * 10)  # 951 tokens with the EOT
    prepared = prepare([str(path)], "bytes", out=str(tmp_path), shard_size=200)
    train = [read_shard(tmp_path / f"x_train_{i:06d}.bin") for i in range(5)]
    assert [shard.size for shard in train] == [171] * 5
    assert read_shard(tmp_path / "x_val.bin").size == 96
    loader = DataLoader(prepared.train, 1, 8)
    assert loader.num_tokens == 855 and prepared.val == str(tmp_path / "x_val.bin")
    assert np.concatenate(train).tolist() == [256, *(bytes(range(32, 127)) * 9)[:854]]


def test_other_content_is_not_overwritten_silently(tmp_path, capsys):
    path, out = tmp_path / "x.txt", tmp_path / "out"
    command = ["prepare", str(path), "--tokenizer", "bytes", "--out", str(out)]
    path.write_bytes(b"one text" * 10)
    assert main([*command, "--shard-size", "30"]) == 0
    before = {name: (out / name).read_bytes() for name in sorted(os.listdir(out))}
    assert len(before) == 4
    path.write_bytes(b"another text" * 10)
    assert main(command) == 2
    assert "exists with other content. HINT" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in sorted(os.listdir(out))} == before
    assert main([*command, "--overwrite"]) == 0
    assert sorted(os.listdir(out)) == ["x_train.bin", "x_val.bin"], "no shard of the old text may stay"
    (out / "x_val.bin").write_bytes(b"damaged")
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0


BAD_COMMANDS = {
    "no such file": (["none.txt"], "none.txt is neither a file nor a known dataset. HINT"),
    "a folder": (["."], "cannot read .: Is a directory. HINT"),
    "empty file": (["empty.txt"], "empty.txt is empty. HINT"),
    "not UTF-8": (["latin1.txt"], "latin1.txt is not UTF-8 at byte offset 5 (byte 0xe9). HINT"),
    "cut UTF-8": (["cut.txt"], "cut.txt is not UTF-8 at byte offset 3 (byte 0xe2). HINT"),
    "too short": (["one.txt", "--val-fraction", "0.9"], "2 tokens are too few to split. HINT"),
    "unknown tokenizer": (["one.txt", "--tokenizer", "words"], "unknown tokenizer 'words'. HINT"),
    "val fraction": (
        ["one.txt", "--val-fraction", "1.5"],
        "--val-fraction: 1.5 is not a number from 0 to below 1. HINT",
    ),
    "shard size": (["one.txt", "--shard-size", "-1"], "--shard-size: -1 is not a whole number of at least 1. HINT"),
    "out is a file": (["one.txt", "--out", "one.txt"], "cannot write to one.txt: File exists. HINT"),
    "out cannot be made": (["one.txt", "--out", "one.txt/x"], "cannot write to one.txt/x: Not a directory. HINT"),
    "not a number": (["one.txt", "--val-fraction", "x"], "--val-fraction: x is not a number from 0 to below 1. HINT"),
    "unknown split": (["one.txt", "--split", "words"], "invalid choice: 'words'"),
    "no name": ([], "the following arguments are required: NAME|FILE.txt. HINT"),
    "mixed": (["one.txt", "tinyshakespeare"], "a known dataset and files cannot be mixed. HINT"),
    "fixed split": (["tinyshakespeare", "--val-fraction", "0.5"], "tinyshakespeare has a fixed split. HINT"),
    "known, out is a file": (["tinyshakespeare", "--out", "one.txt"], "cannot write to one.txt: File exists. HINT"),
}


@pytest.mark.parametrize("args, message", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_bad_command_ends_with_one_line_and_code_2(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CHUNK_BYTES", 4)  # the error may be in any chunk, and a character in two
    for name, content in {
        "empty": b"",
        "latin1": "cafés é".encode("latin-1")[:3] + b"e \xe9t\xe9",
        "cut": b"abc\xe2\x82",
    }.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "one.txt").write_bytes(b"a")
    tokenizer = [] if "--tokenizer" in args else ["--tokenizer", "bytes"]
    try:
        code = main(["prepare", *args, *tokenizer])
    except SystemExit as error:  # by argparse, before main has begun
        code = error.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llmc.data") and " error: " in err and message in err and err.count("\n") == 1
    assert not [name for name in sorted(os.listdir(tmp_path)) if name.endswith(".bin")]


def test_command_as_a_process(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "llmc.data", "prepare", "none.txt"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(data.__file__)))},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("llmc.data: error: none.txt") and run.stderr.count("\n") == 1


def test_disk_full_leaves_no_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.txt"
    path.write_bytes(b"some text" * 10)

    class Full(io.BytesIO):
        def write(self, chunk):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    assert main(["prepare", str(path), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device. HINT" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "out")


def test_import_is_cheap():
    program = "import sys, llmc.data.prepare, llmc.data.tokenizer; print([m for m in LAZY if m in sys.modules])"
    lazy = ["torch", "tiktoken", "tqdm", "urllib.request", "requests", "cupy"]
    run = subprocess.run([sys.executable, "-c", program.replace("LAZY", repr(lazy))], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


# ----------------------------------------------------------------------------
# downloads and the default data


def serve(monkeypatch, content):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setenv("LLMC_DATA_DIR", "")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def files_below(folder):
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def test_download_once(cache, shakespeare, monkeypatch):
    asked = serve(monkeypatch, shakespeare)
    path = data.tinyshakespeare_text()
    assert path == str(cache / "tinyshakespeare" / "input.txt") and asked == [data.TINYSHAKESPEARE_URL]
    assert data.tinyshakespeare_text() == path and len(asked) == 1
    with open(path, "r+b") as file:
        file.write(b"x")
    assert data.tinyshakespeare_text() == path and len(asked) == 2, "a damaged copy in the cache is replaced"
    with open(path, "rb") as file:
        assert file.read() == shakespeare


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"x" + b[1:], lambda b: b"<html>"])
def test_wrong_download_is_not_kept(cache, shakespeare, monkeypatch, change):
    serve(monkeypatch, change(shakespeare))
    with pytest.raises(UserError, match="expected 1115394 bytes with 86c4e6aa.*HINT") as error:
        data.tinyshakespeare_text()
    assert "\n" not in str(error.value) and not files_below(cache)


def test_wrong_file_in_the_data_folder_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tinyshakespeare" / "input.txt"
    path.parent.mkdir()
    path.write_bytes(b"something else")
    monkeypatch.setenv("LLMC_DATA_DIR", str(tmp_path))
    assert main(["prepare", "tinyshakespeare"]) == 2
    err = capsys.readouterr().err
    assert f"{path} is not Tiny Shakespeare: 14 bytes" in err and "HINT" in err
    with pytest.raises(UserError, match="is not Tiny Shakespeare"):
        data.prepare_default("bytes")


def test_named_dataset_offline_is_an_error(offline, cache, capsys):
    assert main(["prepare", "tinyshakespeare", "--tokenizer", "bytes"]) == 2
    err = capsys.readouterr().err
    assert "cannot download https://" in err and "HINT" in err and err.count("\n") == 1
    assert not files_below(cache)
    with pytest.raises(UserError, match="cannot download"):
        data.prepare_default("bytes", allow_fallback=False)


def test_default_data_is_reused_without_its_source(cache, monkeypatch):
    train, val, what = data.prepare_default("bytes")
    assert what == f"Tiny Shakespeare in {cache}/tinyshakespeare-bytes"
    assert DataLoader(train, 4, 64, vocab_size=257).num_tokens == 1003854
    assert read_shard_header(val).num_tokens == 111540
    monkeypatch.setattr(data, "tinyshakespeare_text", lambda: pytest.fail("finished shards are there"))
    assert data.prepare_default("bytes") == (train, val, what)


def test_damaged_default_data_is_made_again(cache):
    train, val, _ = data.prepare_default("bytes")
    good = open(val, "rb").read()
    with open(val, "r+b") as file:
        file.seek(2000)
        file.write(b"\xff\xff")
    assert data.prepare_default("bytes")[:2] == (train, val)
    assert open(val, "rb").read() == good


def test_default_data_offline_is_python_documentation(offline, cache):
    train, val, what = data.prepare_default("bytes")
    assert "Python's own documentation" in what and "cannot be had" in what and str(cache) in what and "\n" not in what
    tokens = np.concatenate([read_shard(train), read_shard(val)])
    text = data.builtin_text()
    assert tokens[0] == 256 and tokens[1:].astype(np.uint8).tobytes().decode() == text
    assert 400_000 < len(text) < 600_000
    assert read_shard_header(val).num_tokens == -(-tokens.size // 10)
    assert data.prepare_default("bytes") == (train, val, what)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train, _, what = data.prepare_default("bytes")
    assert os.path.dirname(train).startswith(str(tmp_path / "llmc-")) and read_shard_header(train)
    assert what.endswith(f"({tmp_path}/file/llmc is not writable)")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to .*HINT"):
        data.prepare_default("bytes")


def test_cache_folder_of_each_platform(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert data.cache_dir() == "/xdg/llmc"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert data.cache_dir() == "/home/me/.cache/llmc"
    monkeypatch.setattr("sys.platform", "darwin")
    assert data.cache_dir() == "/home/me/Library/Caches/llmc"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/appdata")
    assert data.cache_dir() == "/appdata/llmc/cache"


def test_ids_are_checked_before_training_where_that_is_quick(tmp_path):
    tokens = np.arange(3000, dtype=np.uint16) % 50
    tokens[2990] = 77  # after the last whole sample: no batch would ever read it
    data.write_shard(tmp_path / "a.bin", tokens)
    loader = data.DataLoader(str(tmp_path / "a.bin"), 2, 40, vocab_size=60)
    loader.check_all_ids(limit=2999)
    with pytest.raises(UserError, match=r"a\.bin: token 2990 has id 77, the model's vocabulary ends at 59\. HINT:"):
        loader.check_all_ids()
    data.DataLoader(str(tmp_path / "a.bin"), 2, 40, vocab_size=78).check_all_ids()
    data.DataLoader(str(tmp_path / "a.bin"), 2, 40).check_all_ids()


# ----------------------------------------------------------------------------
# eval sets

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
    assert data.read_eval_set(path) == EXAMPLES
    data.write_eval_set(tmp_path / "again.bin", EXAMPLES)
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
            data.read_eval_set(path)


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
        data.write_eval_set(tmp_path / "set.bin", [EXAMPLES[0], example])
    assert not list(tmp_path.iterdir())
