"""The two op sets hold together: one op is one name in llmc/cpu, llmc/cuda, kernels and tests, with one signature.

The comparison helpers that every op test relies on are tested here too: each must fail when it should.
"""

import importlib
import inspect
import re

import numpy as np
import pytest
import reference as ref
from conftest import ROOT

from llmc.cuda import ladder

NOT_OPS = {"__init__", "device", "module"}  # device: memory and timers of the set; module: loads the kernels
DEVICE = ("alloc", "describe", "download", "memory", "synchronize", "timer", "upload", "zero")
SIGNATURES = {
    "encoder_forward": "out, inp, wte, wpe",
    "encoder_backward": "dwte, dwpe, scratch, dout, inp, seed",
    "layernorm_forward": "out, mean, rstd, inp, weight, bias",
    "residual_forward": "out, inp1, inp2",
    "fused_residual_forward": "residual, normed, mean, rstd, inp1, inp2, weight, bias",
    "layernorm_backward": "dinp, dweight, dbias, scratch, dout, inp, weight, mean, rstd",
    "matmul_forward": "out, inp, weight, bias=None, pre_gelu=None",
    "matmul_backward": "dinp, dweight, dbias, scratch, dout, inp, weight, pre_gelu=None, accumulate=True, "
    "recompute=False",
    "attention_forward": "out, att, qkvr",
    "attention_backward": "dqkvr, scratch, dout, out, qkvr, att",
    "gelu_forward": "out, inp",
    "gelu_backward_inplace": "d_in_out, inp",
    "fused_classifier": "logits, losses, dloss, targets, V, write_dlogits=True",
    "adamw_update": "params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, "
                    "beta1, beta2, eps, grad_clip",
    "init_from_master": "params, master, ends, seeds",
    "global_norm_squared": "out, scratch, values",
    "encoder_scratch_size": "B, T, C, Vp",
    "layernorm_scratch_size": "B, T, C",
    "matmul_scratch_size": "B, T, C, OC",
    "attention_scratch_size": "B, T, C, NH",
    "global_norm_scratch_size": "N",
}  # fmt: skip


def names_in(folder, pattern):
    return {path.stem for path in (ROOT / folder).glob(pattern)}


@pytest.fixture(params=("cpu", "cuda"))
def either(request):
    """The package llmc.cpu or llmc.cuda, which both import without a GPU."""
    return importlib.import_module(f"llmc.{request.param}")


def parameters_of(function):
    """ "out, inp, bias=None": a function's parameters without their types."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))[1:-1]


def test_signatures(either):
    for name, parameters in SIGNATURES.items():
        function = getattr(either, name)
        assert parameters_of(function) == parameters, f"{either.__name__}.{name}"
        file = either.__name__ + "." + (re.sub("_scratch_size$", "", name) if "scratch" in name else ref.file_of(name))
        assert getattr(importlib.import_module(file), name) is function, f"{name} is not the one of {file}"


def test_no_other_ops(either):
    """What the package exports is the op list, the scratch sizes and the device, nothing else."""
    exported = {n for n in dir(either) if not n.startswith("_") and inspect.isfunction(getattr(either, n))}
    assert exported == set(SIGNATURES), f"{either.__name__}: {sorted(exported ^ set(SIGNATURES))}"


def test_op_files(either):
    folder = either.__name__.replace(".", "/")
    assert names_in(folder, "*.py") - NOT_OPS == set(ref.OPS), f"{folder} holds other files than the ops"


def test_every_op_has_its_test():
    assert set(ref.OPS) <= {name.removeprefix("test_") for name in names_in("tests", "test_*.py")}


def test_every_op_has_its_kernels():
    """An op's kernels for Hopper's own instructions may have a file of their own, such as matmul_sm90.cu."""
    assert names_in("kernels", "*.cu") - {f"{op}_sm90" for op in ref.OPS} == set(ref.OPS)


def test_every_rung_is_a_whole_op():
    """A rung has the parameters of the public function, a number of its own, and says what it is. Every public function
    of llmc.cuda has rungs, production is among them, and every file of the ladder belongs to an op."""
    cuda = importlib.import_module("llmc.cuda")
    numbers = [(rung.op, rung.number) for rung in ladder.RUNGS]
    assert len(set(numbers)) == len(numbers), "two rungs of an op have one number"
    assert {rung.op for rung in ladder.RUNGS} == {name for names in ref.OPS.values() for name in names}
    for rung in ladder.RUNGS:
        assert parameters_of(rung.call) == SIGNATURES[rung.op], rung
        assert set(rung.dtypes) <= set(ref.DTYPES), rung
        assert hasattr(cuda, rung.op)
    for op in {rung.op for rung in ladder.RUNGS}:
        assert any(rung.production for rung in ladder.of(op)), op
    for name in names_in("kernels/ladder", "*.cu"):
        assert re.fullmatch(rf"({'|'.join(ref.OPS)})(_sm90)?_\d\d_[a-z_]+", name), name


def test_docstrings_state_shapes_and_source(either):
    """Shapes such as (B, T, C) or (N,) and the source in llm.c."""
    for file, names in ref.OPS.items():
        module = importlib.import_module(f"{either.__name__}.{file}")
        for name in names:
            text = inspect.getdoc(getattr(module, name)) or ""
            assert re.search(r"\([A-Z0-9][\w*]*,", text) or "shape" in text, (
                f"{module.__name__}.{name} states no shapes"
            )
            assert "llm.c" in text or name == "init_from_master", f"{module.__name__}.{name} names no source"


def test_devices_have_the_same_functions(either):
    for name in DEVICE:
        function = getattr(either.device, name)
        other = getattr(importlib.import_module("llmc.cpu.device"), name)
        assert parameters_of(function) == parameters_of(other), f"{either.__name__}.device.{name}"


def test_cpu_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    """Same bits on 1, 2 and 3 threads, of the same blocks: some BLAS kernels round differently in others."""
    ops = importlib.import_module("llmc.cpu")
    monkeypatch.setattr(ops.device, "shares", lambda: 6)
    rng = np.random.default_rng(0)
    B, T, C, NH = 2, 130, 96, 4
    x, dout = ref.normal(rng, (B, T, C)), ref.normal(rng, (B, T, 3 * C))
    weight, bias = ref.normal(rng, (3 * C, C)), ref.normal(rng, 3 * C)
    at_first = ops.device.threads()
    results = []
    try:
        for threads in (1, 2, 3):
            ops.device.threads(threads)
            qkvr, out, att = np.empty((B, T, 3 * C), np.float32), np.empty_like(x), np.empty((B, NH, T), np.float32)
            dinp, dweight, dbias = np.empty_like(x), np.zeros_like(weight), np.zeros_like(bias)
            dgamma, dbeta, norm = np.zeros(C, np.float32), np.zeros(C, np.float32), np.empty(1, np.float32)
            scratch = np.empty(
                ops.matmul_scratch_size(B, T, C, 3 * C) + ops.layernorm_scratch_size(B, T, C), np.float32
            )
            ops.matmul_forward(qkvr, x, weight, bias)
            ops.attention_forward(out, att, qkvr)
            ops.matmul_backward(dinp, dweight, dbias, scratch, dout, x, weight)
            mean, rstd = np.zeros((B, T), np.float32), np.ones((B, T), np.float32)
            ops.layernorm_backward(dinp, dgamma, dbeta, scratch, out, x, bias[:C], mean, rstd)
            ops.global_norm_squared(norm, scratch, dweight.reshape(-1))
            results.append((qkvr, out, att, dinp, dweight, dbias, dgamma, dbeta, norm))
    finally:
        ops.device.threads(at_first)
    for other in results[1:]:
        for i, (got, expected) in enumerate(zip(other, results[0], strict=True)):
            ref.assert_bits("cpu op set with more threads", f"result {i}", got, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The helpers


def expected(values):
    return ref.Expected(np.array(values, np.float64), np.array(values, np.float64))


@pytest.mark.parametrize("dtype", ref.DTYPES.values(), ids=ref.DTYPES)
def test_assert_close_notices(dtype):
    values = [1.0, -2.0, 0.5]
    got = np.array(values, np.float32).astype(dtype)
    ref.assert_close("op", "out", got, expected(values))
    for wrong in (-2 * (1 + 16 * ref.EPS[dtype]), np.nan, np.inf, 2.0):
        got[1] = wrong
        with pytest.raises(
            AssertionError, match=r"op: out is off by .* at \(1,\): got .*, expected -2.0; shape \(3,\)"
        ):
            ref.assert_close("op", "out", got, expected(values))
    with pytest.raises(AssertionError, match="shape"):
        ref.assert_close("op", "out", got[:2], expected(values))


def test_assert_bits_notices():
    got = np.array([[0.0, np.nan], [1.0, 2.0]], np.float32)
    ref.assert_bits("op", "out", got, got.copy())
    other = got.copy()
    other[0, 0] = -0.0
    with pytest.raises(AssertionError, match=r"differs in 1 of 4 elements, first at \(0, 0\)"):
        ref.assert_bits("op", "out", other, got)
    with pytest.raises(AssertionError, match="float64"):
        ref.assert_bits("op", "out", got.astype(np.float64), got)


def test_neighbours_of_bf16():
    step = 2.0**-7
    values = np.array([1.0, 1 + step / 3, -1 - step / 3, 0.0, 2 - 2.0**-40, 1e-3])
    low, high = ref.neighbours(values)
    assert (low <= values).all() and (values <= high).all()
    assert (low[:5] == [1, 1, -1 - step, 0, 2 - step]).all() and (high[:5] == [1, 1 + step, -1, 0, 2]).all()
    for side in (low, high):
        assert (side.astype(np.float32).astype(ref.BF16).astype(np.float64) == side).all()
    got = np.array([1, 1, -1, 0, 2, 1e-3], np.float32).astype(ref.BF16)
    ref.assert_stochastically_rounded("op", "out", got, values, 0)
    got[1] = 1 + 2 * step
    with pytest.raises(AssertionError, match=r"out at \(1,\)"):
        ref.assert_stochastically_rounded("op", "out", got, values, 0)
