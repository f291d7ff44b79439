"""The loaders: llm.c's published order, resuming, every pair once, and data that does not fit."""

import itertools
import json
import os
import random
import struct
import tracemalloc

import numpy as np
import pytest

from llmc.data.loader import DataLoader, EveryPair
from llmc.data.shards import Dataset, write_shard
from llmc.errors import UserError
from llmc.files import state_file
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


def header(magic=20240520, version=1, num_tokens=20):
    return np.array([magic, version, num_tokens] + [0] * 253, "<i4").tobytes()


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


NUMBERS = [-1, 0, 1, 7, 2**31, 2**62, 10**18, 1.5]
WRONG = [None, True, *NUMBERS, "", "7", "zz", "ab" * 2520, [], [0], [[0], 1], [2**40], {}, {"0": {}}]


def damaged(value, rng):
    """A copy of a state in which one value, at any depth, is another one, or is not there."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: damaged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damaged(value[at], rng), *value[at + 1 :]]
    return rng.choice(WRONG)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_damaged_state_is_refused_or_used(shuffle, count, tmp_path):
    """Whatever JSON a state holds, of a run of two ranks in turns, with streams that no rank has."""
    pattern, refused = make_shards(tmp_path, [140, 300, 65]), 0
    loaders = [DataLoader(pattern, 2, 8, rank, 2, shuffle, streams=3, rows=1) for rank in range(2)]
    for loader in loaders:
        list(loader.batches(5))
    states = json.loads(
        json.dumps(
            [loader.state() for loader in loaders],
            default=lambda v: v.tolist() if isinstance(v, np.ndarray) else v.hex(),
        )
    )
    for number in range(count):
        rng = random.Random(number)
        changed = [damaged(state, rng) if rank == number % 2 else state for rank, state in enumerate(states)]
        if not all(isinstance(state, dict) for state in changed):
            continue  # a state is one
        loader = DataLoader(pattern, 2, 8, shuffle and 1, 2, shuffle)
        try:
            loader.load_states(changed)
        except UserError as error:
            refused += 1
            assert "HINT: " in str(error) and len(str(error)) < 500, number
        else:
            assert len(list(loader.batches(40))) == 40
    assert count // 20 < refused < count, "a stream can be told by several states: not all that is damaged is used"


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
        state = state_file.TrainState(1, 1, 1, len(loaders), rank, loader.state())
        state_file.write_state(folder / "state.bin", state, np.zeros((2, 4), np.float32))
        states.append(state_file.read_state_header(folder / "state.bin", (4,)).loader_state)
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
# new arrays, and every pair once


def test_batches_are_those_of_next_batch_in_new_arrays(tmp_path):
    pattern = make_shards(tmp_path, [140, 170])
    served = list(DataLoader(Dataset(pattern, None, "bytes", 257), 2, 8, vocab_size=2000).batches(5))
    loader = DataLoader(pattern, 2, 8)
    inputs, targets = np.empty((2, 2, 8), np.int32)
    for x, y in served:
        loader.next_batch(inputs, targets)
        assert x.dtype == y.dtype == np.int32 and np.array_equal(x, inputs) and np.array_equal(y, targets)
    with pytest.raises(UserError, match="id 1000.*ends at 256"):
        list(DataLoader(Dataset(pattern, None, "bytes", 257), 2, 8).batches(20))


@pytest.mark.parametrize("P", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [[65], [66], [64], [2], [65, 65, 129], [140, 1, 33, 2, 200], [1000]])
def test_every_pair_is_served_once(sizes, P, tmp_path):
    """Exact multiples of B*T, one more, one less, several shards, shards of one token: no rank's share is lost."""
    B, T = 4, 8
    pattern = make_shards(tmp_path, sizes)
    seen = []
    for rank in range(P):
        pairs = EveryPair(pattern, B, T, rank, P)
        assert pairs.num_pairs == sum(size - 1 for size in sizes)
        for _ in range(2):  # an iteration starts anew
            here = list(pairs)
        for inputs, targets in here:
            assert inputs.dtype == targets.dtype == np.int32 and inputs.shape == targets.shape
            assert inputs.flags.c_contiguous and inputs.shape[0] <= B and inputs.shape[1] <= T
            assert np.array_equal(targets, inputs + 1)
            assert (np.diff(inputs) == 1).all(), "a row is a run of one shard"
            seen += inputs.reshape(-1).tolist()
        batches = pairs.num_batches
        assert len(here) == len(range(rank, batches, P))
    assert sorted(seen) == [1000 * shard + i for shard, size in enumerate(sizes) for i in range(size - 1)]


def test_the_first_batches_of_every_pair_are_those_of_the_loader(tmp_path):
    pattern = make_shards(tmp_path, [140])
    served = list(EveryPair(pattern, 2, 8, limit=5))
    for (x, y), (inputs, targets) in zip(served, DataLoader(pattern, 2, 8).batches(5), strict=True):
        assert np.array_equal(x, inputs) and np.array_equal(y, targets)
    assert [EveryPair(pattern, 2, 8, limit=limit).num_pairs for limit in (1, 5, 8, 9, 10, 99, None)] == [
        16, 80, 128, 136, 139, 139, 139,
    ]  # fmt: skip
    halves = [[int(x[0, 0]) for x, _ in EveryPair(pattern, 2, 8, rank, 2, limit=5)] for rank in (0, 1)]
    assert halves == [[0, 32, 64], [16, 48]]


def test_every_pair_of_nothing_and_of_other_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file matches.*HINT"):
        EveryPair(str(tmp_path / "*.bin"), 2, 8)
    pattern = make_shards(tmp_path, [1, 1])
    with pytest.raises(UserError, match="no shard has the 2 tokens.*HINT"):
        EveryPair(pattern, 2, 8)
    write_shard(tmp_path / "shard_1.bin", np.full(9, 300, np.uint16), vocab_size=400)
    with pytest.raises(UserError, match="vocabulary of 400 tokens, the model has 257.*HINT"):
        EveryPair(pattern, 2, 8, vocab_size=257)
    write_shard(tmp_path / "shard_1.bin", np.full(9, 300, np.uint16))
    pairs = EveryPair(pattern, 2, 8, vocab_size=257)
    with pytest.raises(UserError, match=r"shard_1.bin: token 0 has id 300.*ends at 256.*HINT"):
        list(pairs)
    os.truncate(tmp_path / "shard_1.bin", 1030)
    with pytest.raises(UserError, match="became shorter.*HINT"):
        list(pairs)


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
    write_shard(path, np.zeros(99, np.uint16), vocab_size=50257)
    DataLoader(str(path), 2, 8, vocab_size=50304)  # padded, of the same tokenizer
    for vocab_size in (257, 50256, 51201):
        with pytest.raises(UserError, match=f"50257 tokens, the model has {vocab_size}"):
            DataLoader(str(path), 2, 8, vocab_size=vocab_size)


def test_file_that_shrinks_while_training(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.zeros(99, np.uint16))
    loader = DataLoader(str(path), 2, 8)
    os.truncate(path, 1024 + 40)
    batches(loader, 1)
    with pytest.raises(UserError, match="became shorter.*HINT"):
        batches(loader, 1)


def test_ids_are_checked_before_training_where_that_is_quick(tmp_path):
    tokens = np.arange(3000, dtype=np.uint16) % 50
    tokens[2990] = 77  # after the last whole sample: no batch would ever read it
    write_shard(tmp_path / "a.bin", tokens)
    loader = DataLoader(str(tmp_path / "a.bin"), 2, 40, vocab_size=60)
    loader.check_all_ids(limit=2999)
    with pytest.raises(UserError, match=r"a\.bin: token 2990 has id 77, the model's vocabulary ends at 59\. HINT:"):
        loader.check_all_ids()
    DataLoader(str(tmp_path / "a.bin"), 2, 40, vocab_size=78).check_all_ids()
    DataLoader(str(tmp_path / "a.bin"), 2, 40).check_all_ids()
