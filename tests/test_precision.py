"""-w, --dtype and --grad-dtype: what a resume at another precision starts from, what an update does without masters.

The tests run on the executor and on a GPU, as the CPU op set has fp32 alone. They need no pass over a batch, as their
states are random numbers.
"""

import numpy as np
import pytest
from reference import DTYPES, assert_bits

from llmc import gpt2
from llmc.errors import UserError
from llmc.files import checkpoints, model_file
from llmc.model import AdamW, Model, memory_plan
from llmc.training import checkpointing

CONFIG = gpt2.GPT2Config(8, 61, 128, 1, 2, 16)
SETS = pytest.mark.parametrize("ops", ("executor", pytest.param("gpu", marks=pytest.mark.gpu)), indirect=True)
RNG_STATE = 987654321
OPTIMIZER = AdamW(lr=1e-3, weight_decay=0.1)


class Loader:
    """As much of a DataLoader as a checkpoint wants, far into its epoch."""

    def __init__(self):
        self.at = dict(should_shuffle=False, current_shard_idx=1, current_sample_idx=23)

    def state(self):
        return self.at

    def load_states(self, states):
        self.at = dict(states[0])


def build(ops, dtype, masters=True, **options):
    return Model(gpt2, ops, CONFIG, 1, 8, dtype=DTYPES[dtype], use_master_weights=masters, **options)


def drawn(ops, dtype, masters=True):
    """A model after an update: parameters, as it rounded them from the masters, m and v."""
    model, rng = build(ops, dtype, masters), np.random.default_rng(3)
    N = model.params_flat.size
    model.load_parameters(rng.normal(0, 0.02, N).astype(np.float32))
    ops.device.upload(model.grads_flat, rng.normal(0, 1e-2, N).astype(DTYPES[dtype]))
    model.update(OPTIMIZER, 1)
    model.rng_state = RNG_STATE  # after the next backward passes
    return model


def saved(model):
    checkpointing.save("out", 5, model, Loader(), {})
    return model_file.read_model_header(checkpoints.model_path("out", 5))["version"]


def resumed(ops, dtype, masters=True):
    model, loader = build(ops, dtype, masters), Loader()
    loader.at = None
    checkpointing.load("out", 5, model, loader, {}, bool(masters))
    assert {k: loader.at[k] for k in Loader().at} == Loader().at
    assert (model.rng_state, model.rng_state_last_update) == (RNG_STATE, 13371337)
    return model


def bits(ops, model, *names):
    return {name: ops.device.download(getattr(model, name)) for name in names if getattr(model, name) is not None}


def assert_same(ops, got, expected, *names):
    expected = bits(ops, expected, *names)
    for name, array in bits(ops, got, *names).items():
        assert_bits("resumed", name, array, expected[name])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)


@SETS
@pytest.mark.parametrize("dtype, masters, version", [("bf16", 1, 5), ("bf16", 0, 5), ("fp16", 1, 3), ("fp16", 0, 3)])
def test_resume_at_the_same_precision(dtype, masters, version, ops):
    model = drawn(ops, dtype, masters)
    assert (model.master is not None) == bool(masters)
    assert saved(model) == version
    assert_same(ops, resumed(ops, dtype, masters), model, "params_flat", "m", "v", "master")


@SETS
def test_resume_at_another_precision(ops):
    """With -w 1 nothing of the fp32 weights is lost, whatever both runs compute in."""
    model = drawn(ops, "bf16")
    saved(model)
    fp32, fp16 = resumed(ops, "fp32"), resumed(ops, "fp16")
    master = ops.device.download(model.master)
    assert_bits("fp32", "params", ops.device.download(fp32.params_flat), master)
    assert_same(ops, fp16, model, "master", "m", "v")
    assert_bits("fp16", "params", ops.device.download(fp16.params_flat), master.astype(np.float16))

    assert saved(fp32) == 3  # an fp32 run has no other weights, and they are the masters of a bf16 run after it
    assert_same(ops, resumed(ops, "bf16"), model, "params_flat", "master", "m", "v")


@SETS
def test_resume_without_masters(ops):
    """-w 0 takes the weights of the model file, and steps over the masters in the state; -w 1 has to find some."""
    model = drawn(ops, "bf16")
    saved(model)
    without = resumed(ops, "bf16", masters=False)
    assert_same(ops, without, model, "params_flat", "m", "v")
    fp32 = ops.device.download(resumed(ops, "fp32", masters=False).params_flat)
    assert_bits("fp32", "params", fp32, ops.device.download(model.params_flat).astype(np.float32))

    saved(without)
    with pytest.raises(UserError, match="state_00000005_00000.bin has no master weights. HINT: .*-w 0"):
        resumed(ops, "bf16")
    with pytest.raises(UserError, match="-w 1: .*state_00000005_00000.bin has no master weights. HINT: .*-w 0"):
        checkpointing.check_resume("out", 5, CONFIG, np.dtype(DTYPES["bf16"]), True)  # before anything is allocated
    for masters, dtype in ((False, "bf16"), (True, "fp32")):
        checkpointing.check_resume("out", 5, CONFIG, np.dtype(DTYPES[dtype]), masters)
    resumed(ops, "bf16", masters=False)


@SETS
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_updates_without_masters(dtype, ops):
    """The first update is that of a run with masters, which then hold what parameters hold; later ones are not."""
    models = []
    for masters in (True, False):
        model, rng = build(ops, dtype, masters), np.random.default_rng(4)
        N = model.params_flat.size
        model.load_parameters(rng.normal(0, 0.02, N).astype(np.float32))
        start = ops.device.download(model.params_flat)
        ops.device.upload(model.grads_flat, rng.normal(0, 1e-2, N).astype(DTYPES[dtype]))
        model.update(OPTIMIZER, 1)
        models.append(model)
    assert_same(ops, *models, "params_flat", "m", "v")
    assert (ops.device.download(models[1].params_flat) != start).mean() > 0.5
    for model in models:
        model.update(OPTIMIZER, 2)
    assert_same(ops, *models, "m", "v")
    assert (ops.device.download(models[0].params_flat) != ops.device.download(models[1].params_flat)).any()


@SETS
def test_memory_plan(ops):
    """Master weights are 4 bytes a parameter, fp32 gradients 2 more than bf16 ones; fp32 weights have no masters."""
    N = gpt2.num_parameters(CONFIG)

    def plan(dtype, **options):
        titles = memory_plan(gpt2, ops, CONFIG, 1, 8, dtype=DTYPES[dtype], **options)
        return {title: nbytes for title, _, _, nbytes in titles}

    bf16 = plan("bf16")
    assert (bf16["parameters"], bf16["gradients"], bf16["optimizer"]) == (2 * N, 2 * N, 12 * N)
    assert plan("bf16", use_master_weights=False) == {**bf16, "optimizer": 8 * N}
    assert plan("bf16", grad_dtype="float32") == {**bf16, "gradients": 4 * N}
    assert plan("fp32") == plan("fp32", use_master_weights=False) == plan("fp32", grad_dtype="float32")


@SETS
def test_gradients_in_fp32(ops):
    """Two micro-steps of a bf16 model sum to what their gradients one by one sum to, to the rounding of fp32 sums.
    Summed in bf16, as llm.c does, they are thousands of times further off."""
    config, rng = gpt2.GPT2Config(8, 61, 128, 1, 2, 32), np.random.default_rng(5)
    batches = rng.integers(0, config.vocab_size, (2, 2, 1, 8)).astype(np.int32)
    weights = rng.normal(0, 0.2, gpt2.num_parameters(config)).astype(np.float32)

    def gradients(batches, **options):
        model = Model(gpt2, ops, config, 1, 8, dtype=DTYPES["bf16"], **options)
        model.load_parameters(weights)
        for i, (inputs, targets) in enumerate(batches):
            model.forward(inputs)
            model.backward(inputs, targets, 2, i)
        return ops.device.download(model.grads_flat).astype(np.float64)

    each = np.array([gradients(batches[i : i + 1], grad_dtype="float32") for i in range(2)])
    tolerance = 2.0**-22 * (np.abs(each).sum(axis=0) + np.abs(each).max())
    error = np.abs(gradients(batches, grad_dtype="float32") - each.sum(axis=0))
    assert (error <= tolerance).all(), (error / tolerance).max()
    assert (np.abs(gradients(batches) - each.sum(axis=0)) / tolerance).max() > 1000
