"""adamw: the update over flat arenas against torch.optim.AdamW, clipping, skipping, and stochastic rounding."""

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st

BETA1, BETA2, EPS, CLIP = 0.9, 0.95, 1e-8, 1.0
SIZES = [512, 64, 8, 8, 192, 24, 64, 8, 8, 8, 256, 32, 256, 8, 8, 8]  # elements of the 16 tensors, as in a tiny model
ODD = [1, 3, 7, 7, 1, 1, 65, 2, 5, 9, 33, 1, 11, 300, 1, 2]
ODD_AND_LARGE = [1, 3, 100000, 7, 1, 1, 65, 2, 5, 9, 33, 1, 11, 40001, 1, 2]
DECAYS = np.array([0.1, 0.1, 0, 0, 0.1, 0, 0.1, 0, 0, 0, 0.1, 0, 0.1, 0, 0, 0], np.float32)


class Arena:
    """Flat arenas of one model, and the update's arguments. kind: "master" (params are its rounding) or "params"."""

    def __init__(self, op, sizes=SIZES, with_master=True, seed=0):
        rng = np.random.default_rng(seed)
        self.op, self.ends = op, np.cumsum(sizes, dtype=np.int64)
        N = int(self.ends[-1])
        self.decays = np.resize(DECAYS, len(sizes))
        self.seeds = np.arange(len(sizes), dtype=np.uint32) + 100
        start = ref.normal(rng, N)
        self.params = start.astype(op.dtype)
        self.master = start if with_master else None
        self.m, self.v = np.zeros(N, np.float32), np.zeros(N, np.float32)

    def update(self, grads, step=1, lr=1e-2, clip=CLIP, norm_squared=None, losses=0.0, unscale=1.0):
        hyper = np.array([lr, 1 - BETA1**step, 1 - BETA2**step, unscale], np.float32)
        if norm_squared is None:
            norm_squared = np.sum(grads.astype(np.float64) ** 2)
        self.op(self.params, self.master, grads, self.m, self.v, self.ends, self.decays, self.seeds, hyper,
                np.array([norm_squared, losses], np.float32), BETA1, BETA2, EPS, clip)  # fmt: skip

    def state(self):
        arrays = {"params": self.params, "master": self.master, "m": self.m, "v": self.v}
        return {name: array.copy() for name, array in arrays.items() if array is not None}


class Torch:
    """The same in PyTorch: the tensors in two groups, with and without decay, clipped by the given limit."""

    def __init__(self, start, ends, decays, lr, dtype):
        parts = np.split(start.astype(np.float64), ends[:-1])
        self.tensors = [torch.tensor(part, dtype=dtype, requires_grad=True) for part in parts]
        groups = [{"params": [t], "weight_decay": float(d)} for t, d in zip(self.tensors, decays, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(BETA1, BETA2), eps=EPS)
        self.ends, self.dtype = ends, dtype

    def update(self, grads, clip, norm):
        grads = grads.astype(np.float64) * (clip / norm if 0 < clip < norm else 1)
        for tensor, part in zip(self.tensors, np.split(grads, self.ends[:-1]), strict=True):
            tensor.grad = torch.tensor(part, dtype=self.dtype)
        self.optimizer.step()

    def arena(self, name):
        state = [t if name == "params" else self.optimizer.state[t][name] for t in self.tensors]
        return ref.to_float64(torch.cat(state))


def check_against_torch(op, sizes, with_master, clip, grads_dtype, steps=6, lr=1e-2):
    """params (or master) and both moments after several steps. The starting point is what the op starts from."""
    arena = Arena(op, sizes, with_master)
    start = arena.master if with_master else arena.params
    torches = [Torch(start, arena.ends, arena.decays, lr, dtype) for dtype in (torch.float64, torch.float32)]
    rng = np.random.default_rng(1)
    for step in range(1, steps + 1):
        grads = ref.normal(rng, start.size, grads_dtype, scale=10.0 ** (step % 3 - 2))
        arena.update(grads, step, lr, clip)
        for t in torches:
            t.update(grads, clip, np.sqrt(np.sum(grads.astype(np.float64) ** 2)))
    state = arena.state()
    for got, name in (("master" if with_master else "params", "params"), ("m", "exp_avg"), ("v", "exp_avg_sq")):
        ref.assert_close(op, got, state[got], ref.Expected(*(t.arena(name) for t in torches)), ulps=2)
    return state


@pytest.mark.parametrize("clip", (0.0, 1.0), ids=("no_clip", "clip"))
@pytest.mark.parametrize("grads_fp32", (False, True), ids=("grads", "grads_fp32"))
@pytest.mark.op("adamw_update")
def test_adamw_with_master(op, clip, grads_fp32):
    state = check_against_torch(op, SIZES, True, clip, ref.FP32 if grads_fp32 else op.dtype)
    if op.dtype == ref.BF16:
        ref.assert_stochastically_rounded(op, "params", state["params"], state["master"].astype(np.float64), 0)
    else:  # a copy, or one rounding to nearest
        ref.assert_bits(op, "params", state["params"], state["master"].astype(op.dtype))


@pytest.mark.parametrize("clip", (0.0, 1.0), ids=("no_clip", "clip"))
@pytest.mark.op("adamw_update", dtypes=("fp32",))
def test_adamw_without_master(op, clip):
    check_against_torch(op, SIZES, False, clip, ref.FP32)


@pytest.mark.parametrize("with_master", (False, True), ids=("params", "master"))
@pytest.mark.op("adamw_update", dtypes=("fp32",))
def test_adamw_of_odd_sizes(op, with_master):
    check_against_torch(op, ODD, with_master, 1.0, ref.FP32)


@pytest.mark.parametrize("tensors", (1, 2, 9, 12, 17))
@pytest.mark.op("adamw_update", dtypes=("fp32",))
def test_adamw_of_any_number_of_tensors(op, tensors):
    """Every tensor is found, also where their number is no power of two: each has a decay of its own."""
    arena = Arena(op, [7, 8, 1, 300, 5][:tensors] + [3] * (tensors - 5))
    arena.decays[:] = np.linspace(0, 1, tensors, dtype=np.float32) if tensors > 1 else 0.5
    check = Torch(arena.master, arena.ends, arena.decays, 1e-2, torch.float64)
    grads = ref.normal(np.random.default_rng(1), arena.params.size, ref.FP32)
    arena.update(grads, clip=0.0)
    check.update(grads, 0.0, 1.0)
    ref.assert_close(op, "master", arena.master, ref.Expected(*[check.arena("params")] * 2))


@pytest.mark.op("adamw_update", sets=("cpu", "gpu"), dtypes=("fp32",))
def test_adamw_of_odd_and_large_sizes(op):
    check_against_torch(op, ODD_AND_LARGE, True, 1.0, ref.FP32)


@pytest.mark.op("adamw_update", dtypes=("fp16", "bf16"))
def test_adamw_without_master_in_low_precision(op):
    """One step from parameters that are the only copy: the exact new value, rounded."""
    arena = Arena(op, with_master=False)
    grads = ref.normal(np.random.default_rng(1), arena.params.size, op.dtype)
    truth = Torch(arena.params, arena.ends, arena.decays, 1e-2, torch.float64)
    truth.update(grads, 0.0, 0.0)
    arena.update(grads, clip=0.0)
    want = truth.arena("params")
    if op.dtype == ref.BF16:
        slack = 4 * ref.EPS[ref.FP32] * (np.abs(want) + 1e-2)
        ref.assert_stochastically_rounded(op, "params", arena.params, want, slack)
    else:
        ref.assert_close(op, "params", arena.params, ref.Expected(want, want))


@pytest.mark.op("adamw_update")
def test_adamw_decays_where_told(op):
    """No gradient, no moments: tensors with decay shrink by lr * decay, all others keep every bit."""
    arena = Arena(op)
    before = arena.state()
    arena.update(np.zeros_like(arena.params), lr=0.125)
    tensor = np.searchsorted(arena.ends, np.arange(arena.params.size), side="right")
    kept = DECAYS[tensor] == 0
    ref.assert_bits(op, "master without decay", arena.master[kept], before["master"][kept])
    want = before["master"].astype(np.float64) * (1 - 0.125 * DECAYS[tensor].astype(np.float64))
    ref.assert_close(op, "master", arena.master, ref.Expected(want, want))
    assert (arena.m == 0).all() and (arena.v == 0).all(), f"{op}: moments of no gradient"


@pytest.mark.parametrize("limit", (0.0, 3.0, 0.5))
@pytest.mark.op("adamw_update")
def test_adamw_clips_by_the_given_norm(op, limit):
    """The norm is an argument, here 2 whatever the gradients are: limits 0 (off) and 3 change nothing, 0.5 scales."""
    arena = Arena(op)
    grads = ref.normal(np.random.default_rng(1), arena.params.size, op.dtype)
    arena.update(grads, clip=limit, norm_squared=4.0)
    want = (1 - BETA1) * grads.astype(np.float64) / (4 if limit == 0.5 else 1)
    ref.assert_close(op, "m", arena.m, ref.Expected(want, want), ulps=2)
    want = (1 - BETA2) * (grads.astype(np.float64) / (4 if limit == 0.5 else 1)) ** 2
    ref.assert_close(op, "v", arena.v, ref.Expected(want, want), ulps=2)


@pytest.mark.parametrize("norm_squared, losses", ((np.inf, 1.0), (np.nan, 1.0), (1.0, np.inf), (1.0, np.nan)))
@pytest.mark.parametrize("clip", (0.0, 1.0), ids=("no_clip", "clip"))
@pytest.mark.op("adamw_update")
def test_adamw_skips_the_step_when_a_norm_is_not_finite(op, norm_squared, losses, clip):
    for with_master in (True, False):
        arena = Arena(op, with_master=with_master)
        arena.m[:], arena.v[:] = 0.5, 0.25
        grads = ref.normal(np.random.default_rng(1), arena.params.size, op.dtype)
        grads[3], grads[77] = np.inf, np.nan
        before = arena.state()
        arena.update(grads, norm_squared=norm_squared, losses=losses, clip=clip)
        for name, array in arena.state().items():
            ref.assert_bits(op, f"{name} with norms^2 {norm_squared}, {losses}", array, before[name])


@pytest.mark.parametrize("clip", (0.0, 3.0, 0.5))
@pytest.mark.op("adamw_update")
def test_adamw_undoes_the_loss_scale(op, clip):
    """Gradients times 2^10 and unscale 2^-10: every bit as without. The norm 2 is clipped by 0.5 alone."""
    grads = ref.normal(np.random.default_rng(1), int(np.sum(SIZES)), op.dtype)
    scaled, arenas = (grads.astype(np.float32) * 2**10).astype(op.dtype), []
    for g, norm_squared, unscale in ((grads, 4.0, 1.0), (scaled, 4.0 * 2**20, 2.0**-10)):
        arenas.append(Arena(op))
        arenas[-1].update(g, clip=clip, norm_squared=norm_squared, unscale=unscale)
    for name, array in arenas[1].state().items():
        ref.assert_bits(op, name, array, arenas[0].state()[name])


@pytest.mark.parametrize("size", (1e-15, 1e-20, 1e-30, 1e-40))
@pytest.mark.op("adamw_update", dtypes=("fp32",))
def test_adamw_with_tiny_gradients(op, size):
    """Moments that underflow: results are finite and right up to the smallest normal number, flushed to zero or not."""
    arena = Arena(op)
    start = arena.master.copy()
    grads = ref.normal(np.random.default_rng(1), start.size, op.dtype, size)
    truth = Torch(start, arena.ends, arena.decays, 1e-2, torch.float64)
    for step in (1, 2, 3):
        arena.update(grads, step)
        truth.update(grads, 0.0, 0.0)
    ref.assert_close(op, "master", arena.master, ref.Expected(*[truth.arena("params")] * 2))
    for got, want in ((arena.m, truth.arena("exp_avg")), (arena.v, truth.arena("exp_avg_sq"))):
        error = np.max(np.abs(got - want) - 8 * ref.EPS[ref.FP32] * np.abs(want))
        assert error <= 4 * np.finfo(np.float32).tiny, f"{op}: a moment is off by {error}"


@pytest.mark.op("adamw_update")
def test_adamw_without_gradient_changes_nothing(op):
    """Zero gradient and zero moments: 0/(0 + eps), not 0/0."""
    arena = Arena(op)
    arena.decays[:] = 0
    before = arena.state()
    arena.update(np.zeros_like(arena.params))
    for name in ("master", "m", "v"):
        ref.assert_bits(op, name, arena.state()[name], before[name])


@pytest.mark.op("init_from_master")
def test_init_from_master(op):
    arena = Arena(op)
    op(arena.params, arena.master, arena.ends, arena.seeds)
    if op.dtype == ref.BF16:
        ref.assert_stochastically_rounded(op, "params", arena.params, arena.master.astype(np.float64), 0)
    else:
        ref.assert_bits(op, "params", arena.params, arena.master.astype(op.dtype))


@pytest.mark.op("init_from_master", dtypes=("bf16",))
def test_init_from_master_rounds_with_this_noise(op):
    """Element by element: up in magnitude where the low 16 bits exceed those of the noise of the tensor's seed and the
    index in the tensor. Blocks of 2048 elements begin at the arena's first tensor and inside the second and third."""
    sizes = [7, 3000, 3001, *[8] * 13]
    arena = Arena(op, sizes)
    op(arena.params, arena.master, arena.ends, arena.seeds)
    want, bits = [], iter(arena.master.view(np.uint32).tolist())
    for size, seed in zip(sizes, arena.seeds.tolist(), strict=True):
        for index in range(size):
            value = next(bits)
            want.append((value >> 16) + ((value & 0xFFFF) > (ref.noise(index, seed) & 0xFFFF)))
    assert arena.params.view(np.uint16).tolist() == want


@pytest.mark.parametrize("sizes", (SIZES, [7, 3000, 3001, *[8] * 13]), ids=("tiny", "blocks"))
@pytest.mark.op("adamw_update", dtypes=("bf16",))
def test_adamw_rounds_as_init_from_master(op, sizes):
    """A step of learning rate 0 leaves the master alone: its rounding is that of init_from_master, bit for bit."""
    arena = Arena(op, sizes)
    arena.update(ref.normal(np.random.default_rng(1), arena.params.size, op.dtype), lr=0.0)
    params = np.empty_like(arena.params)
    op.sibling("init_from_master")(params, arena.master, arena.ends, arena.seeds)
    ref.assert_bits(op, "params", arena.params, params)


def rounding_of(op, value, sizes, seeds):
    """params = stochastic_round(master) for a constant master."""
    ends = np.cumsum(sizes, dtype=np.int64)
    params = np.empty(int(ends[-1]), op.dtype)
    op(params, np.full(params.shape, value, np.float32), ends, np.array(seeds, np.uint32))
    return params


@pytest.mark.parametrize("sign", (1.0, -1.0))
@pytest.mark.op("init_from_master", dtypes=("bf16",))
def test_stochastic_rounding_keeps_the_mean(op, sign):
    """1 + 3/16 of a step rounds up in 3 of 16 cases, in every tensor, with seeds of one bit as well."""
    step = 2.0**-7
    params = rounding_of(op, sign * (1 + step * 3 / 16), [4096] * 16, [2**i for i in range(16)])
    up = (np.abs(params.astype(np.float64)) - 1) / step
    assert set(np.unique(up)) == {0.0, 1.0}, f"{op}: {np.unique(up)}"
    spread = np.sqrt(3 / 16 * 13 / 16 / 4096)
    for tensor, share in enumerate(up.reshape(16, 4096).mean(axis=1)):
        assert abs(share - 3 / 16) < 5 * spread, f"{op}: tensor {tensor} rounds up {share:.4f} of the time, not 3/16"
    assert np.abs(np.corrcoef(up.reshape(16, 4096)) - np.eye(16)).max() < 0.1, f"{op}: tensors share their noise"
    assert abs(np.corrcoef(up[:-1], up[1:])[0, 1]) < 0.05, f"{op}: neighbours share their noise"


@pytest.mark.op("init_from_master", dtypes=("bf16",))
def test_stochastic_rounding_depends_on_seed_and_element_alone(op):
    """A tensor rounds alike wherever it lies in the arena, and in whatever company."""
    value = 1 + 2.0**-9
    one = rounding_of(op, value, [8, 504] + [8] * 14, range(16))
    two = rounding_of(op, value, [80, 504] + [16] * 14, [7, 1, *range(20, 34)])
    ref.assert_bits(op, "tensor 1", two[80:584], one[8:512])
    other = rounding_of(op, value, [8, 504] + [8] * 14, [0, 99, *range(2, 16)])
    assert (ref.bits(other[8:512]) != ref.bits(one[8:512])).any(), f"{op} ignores the seed"


@pytest.mark.op("init_from_master", dtypes=("bf16",))
def test_stochastic_rounding_of_special_numbers(op):
    """What bf16 can hold stays as it is, infinities and NaN included; the largest float32 may not wrap around."""
    for value in (0.0, -0.0, 1.0, -2.5, 2.0**-126, 2.0**127, np.inf, -np.inf):
        params = rounding_of(op, value, [8] * 16, range(16))
        ref.assert_bits(op, f"rounding of {value}", params, np.full(128, value, np.float32).astype(op.dtype))
    assert np.isnan(rounding_of(op, np.nan, [8] * 16, range(16)).astype(np.float32)).all(), f"{op}: NaN became a number"


@pytest.mark.op("adamw_update", dtypes=("fp32",), public=True)
@given(st.lists(st.integers(1, 60), min_size=16, max_size=16), st.booleans(), st.sampled_from((0.0, 0.1, 1.0)))
def test_adamw_any_sizes(op, sizes, with_master, clip):
    check_against_torch(op, [n * op.multiple for n in sizes], with_master, clip, ref.FP32, steps=2)
