"""The model: its sizes, its fresh weights, and its three passes against PyTorch.

The truth is reference.py's GPT-2 in float64; the tolerance follows from what the same code gives in float32 (see the
top of that file). No test here knows the ops: a wrong order, a wrong buffer or a missing += shows as a wrong gradient.
"""

import math
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    GPT2_TENSORS,
    Expected,
    assert_bits,
    assert_close,
    cross_entropy,
    gpt2_logits,
    gpt2_shapes,
    normal,
    to_float64,
    to_torch,
)

import llmc.model
from llmc import cpu as ops
from llmc import gpt2, rand
from llmc.errors import UserError
from llmc.files import model_file
from llmc.gpt2 import GPT2Config, config_from_descriptor
from llmc.model import AdamW, Model, format_plan, memory_plan

DECAYED = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")
LLMC = AdamW(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Shapes here are tiny: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------------------
# sizes

# llm.c's table: L, C, NH, head size, padded parameter count
GPT2_SIZES = {
    "d6": (6, 384, 6, 64, 30_357_504),
    "d12": (12, 768, 12, 64, 124_475_904),
    "d24": (24, 1024, 16, 64, 354_871_296),
    "d36": (36, 1280, 20, 64, 774_090_240),
    "d48": (48, 1600, 25, 64, 1_557_686_400),
    "d60": (60, 1920, 30, 64, 2_754_259_200),
    "d72": (72, 2880, 30, 96, 7_316_887_680),
    "d84": (84, 3456, 36, 96, 12_220_657_920),
}
GPT3_SIZES = {
    "gpt3:c384": (6, 384, 6, 64, 30_750_720),
    "gpt3:c768": (12, 768, 12, 64, 125_262_336),
    "gpt3:c1024": (24, 1024, 16, 64, 355_919_872),
    "gpt3:c1536": (24, 1536, 16, 96, 760_372_224),
    "gpt3:c2048": (24, 2048, 16, 128, 1_315_819_520),
    "gpt3:c2560": (32, 2560, 32, 80, 2_651_673_600),
    "gpt3:c4096": (32, 4096, 32, 128, 6_658_596_864),
    "gpt3:c12288": (96, 12288, 96, 128, 174_604_836_864),
}
SIZES = [(name, 1024, *size) for name, size in GPT2_SIZES.items()]
SIZES += [(f"gpt2:{name}", 1024, *size) for name, size in GPT2_SIZES.items()]
SIZES += [(name, 2048, *size) for name, size in GPT3_SIZES.items()]
TINY_SIZES = {1: (64, 4), 2: (64, 4), 3: (128, 4), 4: (128, 4), 6: (192, 6), 8: (256, 8)}


@pytest.mark.parametrize("descriptor, maxT, L, C, NH, HS, N", SIZES)
def test_descriptor(descriptor, maxT, L, C, NH, HS, N):
    config = config_from_descriptor(descriptor)
    assert config == GPT2Config(maxT, 50257, 50304, L, NH, C)
    assert C % NH == 0 and C // NH == HS
    assert gpt2.num_parameters(config) == N
    assert model_file.num_parameters(vars(config)) == N
    assert config_from_descriptor(descriptor, tiny_seq_len=64) == config  # for tiny models only


@pytest.mark.parametrize("depth", TINY_SIZES)
def test_tiny_descriptor(depth):
    C, NH = TINY_SIZES[depth]
    assert config_from_descriptor(f"tiny:d{depth}") == GPT2Config(256, 50257, 50304, depth, NH, C)
    assert config_from_descriptor(f"tiny:d{depth}", 257, 96) == GPT2Config(96, 257, 384, depth, NH, C)


@pytest.mark.parametrize("vocab_size, padded", [(1, 128), (127, 128), (128, 128), (129, 256), (257, 384), (512, 512)])
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    config = config_from_descriptor("d12", vocab_size)
    assert (config.vocab_size, config.padded_vocab_size) == (vocab_size, padded)


WRONG = ["", "d", "12", "d0", "d7", "d11", "d-12", "d12x", "xd12", "D12", " d12", "d12\n", "d1.2", "d12 d24", "c768"]
WRONG += ["gpt2:", "gpt2:12", "gpt2:c768", "gpt2:d7", "gpt2:gpt2:d12", "gpt2d12", "gpt4:d12", "124M", "gpt2"]
WRONG += ["gpt3:", "gpt3:d12", "gpt3:c769", "gpt3:c5140", "gpt3:c", "tiny:", "tiny:d5", "tiny:d12", "tiny:c64", "tiny"]
WRONG += ["d" + "1" * 9999]  # more digits than int() takes


@pytest.mark.parametrize("descriptor", WRONG)
def test_wrong_descriptor(descriptor):
    with pytest.raises(UserError) as error:
        config_from_descriptor(descriptor)
    shown = descriptor.replace("\n", "\\n")  # an error is one line
    assert str(error.value).startswith(f"-e {shown}: ") and "HINT: " in str(error.value)
    assert descriptor.endswith("\n") or "\n" not in str(error.value)


def test_every_known_descriptor_is_in_the_hint():
    with pytest.raises(UserError) as error:
        config_from_descriptor("no such model")
    groups = str(error.value).split("(N = ")[1:]
    known = [[int(n) for n in group.split(")")[0].split(",")] for group in groups]
    names = [[int(name.split("d")[1]) for name in GPT2_SIZES], [int(name.split("c")[1]) for name in GPT3_SIZES]]
    assert known == [*names, list(TINY_SIZES)]


def test_config():
    assert GPT2Config() == config_from_descriptor("d12")
    with pytest.raises(UserError, match="channels 50 .* num_heads 12.*HINT"):
        GPT2Config(channels=50)
    header = dict(zip(model_file.MODEL_WORDS, (8, 5, 2, 2, 4, 8), strict=True), version=3)
    assert gpt2.config_from_header(header) == GPT2Config(8, 5, 8, 2, 2, 4)


def test_parameter_table_is_the_checkpoint():
    config = GPT2Config(9, 11, 13, 3, 2, 4)
    specs = gpt2.parameter_specs(config)
    shapes = {spec.name: ((spec.layers,) if spec.layers else ()) + spec.shape for spec in specs}
    assert list(shapes) == list(GPT2_TENSORS)
    assert shapes == gpt2_shapes(3, 4, 13, 9)
    C, L = 4, 3
    assert gpt2.num_parameters(config) == 13 * C + 9 * C + L * (12 * C * C + 13 * C) + 2 * C  # llm.c's formula
    assert tuple(spec.name for spec in specs if spec.decay) == DECAYED
    assert {spec.dtype for spec in specs} == {"X"}

    model = Model(gpt2, ops, config, 1, 1)
    model.params_flat[:] = np.arange(model.params_flat.size)
    start = 0
    for i, (name, shape) in enumerate(shapes.items()):
        tensor = getattr(model.params, name)
        assert tensor.shape == shape and np.array_equal(tensor.reshape(-1), np.arange(start, start + tensor.size)), name
        for layer in range(L if specs[i].layers else 0):
            assert np.shares_memory(getattr(model.params.h[layer], name), tensor[layer])
            assert np.array_equal(getattr(model.params.h[layer], name), tensor[layer])
        start += tensor.size
        assert model.scratch.ends[i] == start
    assert start == model.params_flat.size == model.grads_flat.size == model.m.size == model.v.size
    assert model.params_flat.nbytes == model.grads_flat.nbytes == 4 * start


def test_flops_per_token():
    assert gpt2.flops_per_token(config_from_descriptor("d12"), 1024) == 803_478_528


# ----------------------------------------------------------------------------------------------------------------------
# memory


def test_memory_plan_is_what_is_allocated(monkeypatch):
    sizes, alloc = [], ops.device.alloc

    def recorded(nbytes):
        if threading.current_thread() is threading.main_thread():  # the workers have scratch of their own
            sizes.append(nbytes)
        return alloc(nbytes)

    monkeypatch.setattr(ops.device, "alloc", recorded)
    config = GPT2Config(16, 61, 128, 3, 2, 12)
    titles = ["parameters", "gradients", "optimizer", "activations", "scratch"]
    for recompute, training in ((0, True), (1, True), (2, True), (2, False)):
        planned = memory_plan(gpt2, ops, config, 3, 7, recompute=recompute, training=training)
        sizes.clear()
        model = Model(gpt2, ops, config, 3, 7, recompute=recompute, training=training)
        assert [nbytes for *_, nbytes in planned] == sizes
        wanted = titles if training else [titles[0], *titles[3:]]
        assert [title for title, *_ in planned] == wanted
        bytes_of = {title: nbytes for title, *_, nbytes in planned}
        assert bytes_of["parameters"] == model.params_flat.nbytes == 4 * gpt2.num_parameters(config)
        assert bytes_of["activations"] == model.acts_flat.nbytes
        if training:
            assert bytes_of["gradients"] == model.grads_flat.nbytes
            assert bytes_of["optimizer"] == model.m.nbytes + model.v.nbytes
        else:
            assert not hasattr(model, "grads_flat") and not hasattr(model, "m")

        text = format_plan(planned)
        total = sum(sizes)
        assert text.splitlines()[0] == "memory plan" and f"{total:,} bytes = {total / 2**20:,.1f} MiB" in text
        for title, *_, nbytes in planned:
            assert any(line.split()[0] == title and f" {nbytes:,} bytes" in line for line in text.splitlines())


def test_recomputation_saves_the_stated_activations():
    config, B, T = GPT2Config(64, 61, 128, 5, 2, 64), 2, 64
    BTC, L = B * T * 64 * 4, 5  # bytes of a (B, T, C) activation; all rows here are multiples of the alignment
    r0, r1, r2 = (memory_plan(gpt2, ops, config, B, T, recompute=r)[3].nbytes for r in (0, 1, 2))
    assert r0 - r1 == (L - 1) * 4 * BTC  # fch_gelu, one instead of L
    assert r1 - r2 == (L - 1) * 2 * BTC  # ln1 and ln2


def test_a_training_step_allocates_nothing_of_the_size_of_an_activation():
    config, B, T = GPT2Config(128, 300, 384, 2, 4, 64), 32, 128
    model = Model(gpt2, ops, config, B, T, recompute=2)
    model.init_weights()
    (x, y), *_ = batches(config, B, T, 1)
    step(model, [(x, y)], 1, LLMC)
    tracemalloc.start()
    try:
        step(model, [(x, y)], 2, LLMC)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < B * T * config.channels * 4


@pytest.mark.parametrize("T", [0, -1, 17, 1024])
def test_length_is_limited_by_the_positions(T):
    with pytest.raises(UserError, match=rf"-t {T}: .* 1 to 16 .*HINT"):
        Model(gpt2, ops, GPT2Config(16, 61, 128, 1, 2, 12), 1, T)


# ----------------------------------------------------------------------------------------------------------------------
# fresh weights


def drawn_by_hand(config, seed, draw):
    """The parameters by name; draw(count, std) gives the next normal numbers. llm.c's order, written out."""
    L, C, V, maxT = config.num_layers, config.channels, config.vocab_size, config.max_seq_len
    shapes = gpt2_shapes(L, C, config.padded_vocab_size, maxT)
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    std = np.float32(0.02)
    residual_std = std * (np.float32(1.0) / np.sqrt(np.float32(2.0 * L)))  # each operation rounds, as in C
    params["wte"][:V] = draw(V * C, std).reshape(V, C)
    params["wpe"][:] = draw(maxT * C, std).reshape(maxT, C)
    for l in range(L):  # noqa: E741
        params["qkvw"][l] = draw(3 * C * C, std).reshape(3 * C, C)
        params["attprojw"][l] = draw(C * C, residual_std).reshape(C, C)
        params["fcw"][l] = draw(4 * C * C, std).reshape(4 * C, C)
        params["fcprojw"][l] = draw(4 * C * C, residual_std).reshape(C, 4 * C)
    for name in ("ln1w", "ln2w", "lnfw"):
        params[name][...] = 1
    return params


def fresh(config, seed):
    model = Model(gpt2, ops, config, 1, 1)
    model.params_flat[:] = np.nan  # init must write every element
    model.init_weights(seed)
    return model


# counts that are and are not multiples of 16, or below it; at L = 6 the residual std is not what float64 would give
INIT_CONFIGS = [GPT2Config(8, 61, 128, 6, 2, 12), GPT2Config(7, 13, 16, 2, 1, 2), GPT2Config(16, 100, 128, 1, 4, 32)]


@pytest.mark.parametrize("seed", [42, 0, 1337])
@pytest.mark.parametrize("config", INIT_CONFIGS)
def test_fresh_weights_are_drawn_as_in_llmc(config, seed):
    mt = rand.MT19937(seed)

    def draw(count, std):
        values = np.empty(count, np.float32)
        rand.normal_(values, 0.0, std, mt)
        return values

    model = fresh(config, seed)
    for name, expected in drawn_by_hand(config, seed, draw).items():
        assert_bits("init_weights", name, getattr(model.params, name), expected)


@pytest.mark.parametrize("config", INIT_CONFIGS)
def test_fresh_weights_are_torchs(config):
    """torch.Generator has the same draws; its log, cos and sin differ in the last bits."""
    generator = torch.Generator().manual_seed(42)
    model = fresh(config, 42)
    by_hand = drawn_by_hand(
        config, 42, lambda count, std: torch.empty(count).normal_(0.0, float(std), generator=generator).numpy()
    )
    for name, expected in by_hand.items():
        np.testing.assert_allclose(getattr(model.params, name), expected, rtol=0, atol=3e-6 * 0.02, err_msg=name)


def test_fresh_weights_of_every_descriptor_start_alike():
    model = fresh(GPT2Config(4, 50, 128, 1, 2, 32), 42)
    published = [0.0385382995, 0.0297456831, 0.0180143435, -0.0421104282]
    assert model.params.wte[0, :4].tolist() == np.array(published, np.float32).tolist()
    assert not model.params.wte[50:].any()
    assert not np.array_equal(model.params_flat, fresh(GPT2Config(4, 50, 128, 1, 2, 32), 43).params_flat)


# ----------------------------------------------------------------------------------------------------------------------
# against PyTorch


def weights(config, seed=0):
    """Parameters by name with nothing at a special value, except the padded rows of wte."""
    rng, C = np.random.default_rng(seed), config.channels
    shapes = gpt2_shapes(config.num_layers, C, config.padded_vocab_size, config.max_seq_len)
    params = {}
    for name, shape in shapes.items():
        if name in DECAYED:
            params[name] = normal(rng, shape, scale=1.0 / math.sqrt(shape[-1]))
        else:
            params[name] = normal(rng, shape, scale=0.3, mean=1.0 if name in ("ln1w", "ln2w", "lnfw") else 0.0)
    params["wte"][config.vocab_size :] = 0
    return params


def batches(config, B, T, count, seed=1):
    """count pairs of token ids (B, T) i32: inputs and targets, with repetitions and both ends of the vocabulary."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, config.vocab_size, (count, 2, B, T), dtype=np.int32)
    pairs[:, :, 0, 0] = config.vocab_size - 1
    pairs[:, :, -1, -1] = 0
    pairs[:, :, -1, T // 2] = pairs[:, :, -1, 0]
    return [(np.ascontiguousarray(x), np.ascontiguousarray(y)) for x, y in pairs]


def build(config, B, T, recompute=1, params=None, graphs=False):
    model = Model(gpt2, ops, config, B, T, recompute=recompute, graphs=graphs)
    model.grads_flat[:] = np.nan  # a gradient that is not written shows
    model.acts_flat[:] = 0xFF  # NaN, and -1 as an integer
    for name, values in (params or weights(config)).items():
        getattr(model.params, name)[...] = values
    return model


def step(model, micro_batches, t, adamw):
    """One update as train.py does it. Returns (mean loss, gradient norm)."""
    for i, (x, y) in enumerate(micro_batches):
        model.forward(x)
        model.backward(x, y, len(micro_batches), i)
    model.update(adamw, t)
    return model.mean_loss(len(micro_batches)), model.grad_norm()


def torch_passes(config, params, x, y, logits_of=gpt2_logits):
    """{"logits", "loss", "dwte", ...: Expected} of one forward and backward pass."""
    results = []
    for dtype in (torch.float64, torch.float32):
        tensors = {name: to_torch(values, dtype).requires_grad_() for name, values in params.items()}
        logits = logits_of(tensors, to_torch(x), config.num_heads, config.vocab_size)
        loss = cross_entropy(logits, to_torch(y)).mean()
        loss.backward()
        grads = {f"d{name}": tensor.grad for name, tensor in tensors.items()}
        results.append({"logits": logits, "loss": loss, **grads})
    truth, own = results
    return {name: Expected(to_float64(truth[name]), to_float64(own[name])) for name in truth}


def assert_passes(what, model, x, y, expected, micro_batches=None):
    """Forward and backward of `model` give the expected logits, loss and 16 gradients."""
    V = model.config.vocab_size
    if micro_batches is None:
        logits = model.forward(x).output.copy()
        assert_close(what, "logits", logits[..., :V], expected["logits"])
        assert_bits(what, "padded logits", logits[..., V:], np.zeros_like(logits[..., V:]))
        micro_batches = [(x, y)]
    for i, (xi, yi) in enumerate(micro_batches):
        model.forward(xi)
        model.backward(xi, yi, len(micro_batches), i)
    assert_close(what, "loss", np.array(model.mean_loss(len(micro_batches)), np.float32), expected["loss"])
    for name in GPT2_TENSORS:
        assert_close(what, f"d{name}", getattr(model.grads, name), expected[f"d{name}"])


#         maxT, V, Vp, L, NH, C    B, T
CASES = [
    ((1, 1, 1, 1, 1, 1), (1, 1)),  # the smallest there is
    ((8, 61, 128, 1, 1, 8), (1, 1)),
    ((16, 200, 256, 2, 3, 24), (3, 7)),  # odd B, T < maxT, three heads
    ((32, 257, 384, 3, 4, 36), (2, 31)),  # odd T
    ((19, 128, 128, 2, 5, 40), (5, 19)),  # T = maxT, no padding
    ((150, 50, 64, 1, 2, 16), (2, 149)),  # T beyond a tile of attention
    ((4, 1031, 1152, 2, 2, 6), (1, 3)),  # more vocabulary than anything else
]


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("numbers, BT", CASES)
def test_passes_equal_pytorch(numbers, BT, recompute):
    config, (B, T) = GPT2Config(*numbers), BT
    params = weights(config)
    ((x, y),) = batches(config, B, T, 1)
    model = build(config, B, T, recompute, params)
    assert_passes(f"{numbers} {BT} -r {recompute}", model, x, y, torch_passes(config, params, x, y))
    assert not model.grads.wpe[T:].any()  # positions that were not seen
    assert not model.grads.wte[config.vocab_size :].any()
    for name, values in params.items():
        assert_bits("forward and backward changed a weight", name, getattr(model.params, name), values)


def transformers_logits(params, x, NH, V):
    """GPT2LMHeadModel with these weights, whose gradients reach the tensors in params."""
    from transformers import GPT2Config as HFConfig
    from transformers import GPT2LMHeadModel

    maxT, C = params["wpe"].shape
    config = HFConfig(
        vocab_size=V,
        n_positions=maxT,
        n_embd=C,
        n_layer=params["ln1w"].shape[0],
        n_head=NH,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(params["wte"].dtype)
    ours = {"ln_1": "ln1", "attn.c_attn": "qkv", "attn.c_proj": "attproj"}
    ours |= {"ln_2": "ln2", "mlp.c_fc": "fc", "mlp.c_proj": "fcproj"}
    state = {"transformer.wte.weight": params["wte"][:V]}  # the output layer is tied to it
    state["transformer.wpe.weight"] = params["wpe"]
    state["transformer.ln_f.weight"], state["transformer.ln_f.bias"] = params["lnfw"], params["lnfb"]
    for l in range(config.n_layer):  # noqa: E741
        for theirs, name in ours.items():
            weight = params[f"{name}w"][l]
            if not name.startswith("ln"):
                weight = weight.T  # Conv1D holds (in, out)
            state[f"transformer.h.{l}.{theirs}.weight"] = weight
            state[f"transformer.h.{l}.{theirs}.bias"] = params[f"{name}b"][l]
    assert set(state) == {name for name, _ in model.named_parameters()}
    return torch.func.functional_call(model, state, (x.long(),)).logits


@pytest.mark.parametrize("numbers, BT", [CASES[2], CASES[3]])
def test_passes_equal_transformers(numbers, BT):
    config, (B, T) = GPT2Config(*numbers), BT
    params = weights(config, seed=5)
    ((x, y),) = batches(config, B, T, 1, seed=6)
    expected = torch_passes(config, params, x, y, transformers_logits)
    assert_passes(f"{numbers} {BT}, transformers", build(config, B, T, 1, params), x, y, expected)
    for name, (truth, _) in torch_passes(config, params, x, y).items():  # and the two references are one function
        np.testing.assert_allclose(expected[name].truth, truth, rtol=1e-9, atol=1e-12, err_msg=name)


def test_gradients_equal_finite_differences():
    """No framework: the loss falls by h |g| where all parameters of a tensor move by h against their gradient g."""
    config, B, T = GPT2Config(12, 50, 64, 2, 2, 16), 3, 9
    model = build(config, B, T)
    ((x, y),) = batches(config, B, T, 1)
    model.forward(x)
    model.backward(x, y)
    rng = np.random.default_rng(7)
    for name in GPT2_TENSORS:
        w, g = getattr(model.params, name), getattr(model.grads, name).astype(np.float64)
        saved, norm = w.copy(), math.sqrt((g**2).sum())
        noise = rng.standard_normal(g.shape)
        noise *= norm / math.sqrt((noise**2).sum())
        for direction in (g, g + noise):  # the second sees elements whose gradient should be zero, and is not
            unit = direction / math.sqrt((direction**2).sum())
            h = 0.01

            def loss_at(h):
                w[...] = saved + h * unit  # noqa: B023
                loss = model.validate(x, y)
                w[...] = saved  # noqa: B023
                return loss

            slope = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)  # error h^4
            assert slope == pytest.approx((g * unit).sum(), rel=2e-3, abs=2e-5), name


# ----------------------------------------------------------------------------------------------------------------------
# training


def torch_training(config, params, steps, dtype, adamw):
    """(losses, parameters by name, number of clipped steps) of torch's AdamW: one step on each pair (x, y) of steps."""
    tensors = {name: to_torch(values, dtype).requires_grad_() for name, values in params.items()}
    groups = [
        dict(params=[tensors[name] for name in DECAYED], weight_decay=adamw.weight_decay),
        dict(params=[tensor for name, tensor in tensors.items() if name not in DECAYED], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=adamw.lr, betas=(adamw.beta1, adamw.beta2), eps=adamw.eps)
    losses, clipped = [], 0
    for x, y in steps:
        optimizer.zero_grad()
        logits = gpt2_logits(tensors, to_torch(x), config.num_heads, config.vocab_size)
        loss = cross_entropy(logits, to_torch(y)).mean()
        loss.backward()
        norm = math.sqrt(sum(float((t.grad.double() ** 2).sum()) for t in tensors.values()))
        if 0 < adamw.grad_clip < norm:
            clipped += 1
            for tensor in tensors.values():
                tensor.grad *= adamw.grad_clip / norm
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: to_float64(tensor) for name, tensor in tensors.items()}, clipped


SETTINGS = {
    "main": (LLMC, 10),  # llm.c's trainer with weight decay; every step is clipped
    "some clipped": (replace(LLMC, weight_decay=3.0, grad_clip=2.4), 6),
    "test_gpt2.c": (replace(LLMC, beta2=0.999, weight_decay=0.01, grad_clip=0.0, lr=1e-4), 0),
    "large eps": (replace(LLMC, eps=1e-2, beta1=0.8), 10),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_steps_equal_torch_adamw(name):
    settings, expected_clipped = SETTINGS[name]
    config, B, T = GPT2Config(16, 200, 256, 2, 3, 24), 3, 11
    params, steps = weights(config), batches(config, B, T, 10)
    model = build(config, B, T, params=params)
    losses = [step(model, [pair], t, settings)[0] for t, pair in enumerate(steps, 1)]
    *truth, clipped = torch_training(config, params, steps, torch.float64, settings)
    own_losses, own = torch_training(config, params, steps, torch.float32, settings)[:2]
    assert clipped == expected_clipped
    assert_close(name, "losses", np.array(losses, np.float32), Expected(np.array(truth[0]), np.array(own_losses)))
    for tensor in GPT2_TENSORS:
        got, expected = getattr(model.params, tensor), Expected(truth[1][tensor], own[tensor])
        if tensor == "qkvb":
            # Softmax does not see the bias of k: its gradient is rounding noise, which AdamW scales up to full steps.
            q, k, v = np.split(got, 3, axis=1)
            assert np.abs(k - np.split(params["qkvb"], 3, axis=1)[1]).max() <= 10 * settings.lr
            got = np.concatenate([q, v], axis=1)
            expected = Expected(*(np.concatenate(np.split(e, 3, axis=1)[::2], axis=1) for e in expected))
        assert_close(name, tensor, got, expected)


def run(config, B, T, steps, recompute=1, seed=3, graphs=False):
    """Losses, then the bits of logits, gradients, parameters and moments, after a few steps."""
    model = build(config, B, T, recompute, weights(config, seed), graphs)
    losses = [step(model, micro_batches, t, LLMC) for t, micro_batches in enumerate(steps, 1)]  # and gradient norms
    logits = model.forward(steps[0][0][0]).output
    arrays = dict(logits=logits, grads=model.grads_flat, params=model.params_flat, m=model.m, v=model.v)
    return losses, {name: array.copy() for name, array in arrays.items()}


def assert_same_run(what, one, other):
    assert one[0] == other[0], what
    for name in one[1]:
        assert_bits(what, name, other[1][name], one[1][name])


def micro_steps(config, B, T, steps, G):
    pairs = batches(config, B, T, steps * G)
    return [pairs[i * G : (i + 1) * G] for i in range(steps)]


def test_recomputation_changes_no_bit():
    config, B, T = GPT2Config(40, 131, 256, 3, 3, 36), 3, 37
    steps = micro_steps(config, B, T, 3, 2)
    kept = run(config, B, T, steps, recompute=0)
    for recompute in (1, 2):
        assert_same_run(f"-r {recompute}", kept, run(config, B, T, steps, recompute))


def test_a_run_repeats_bit_for_bit():
    config, B, T = GPT2Config(40, 131, 256, 2, 2, 32), 5, 37
    steps = micro_steps(config, B, T, 4, 1)
    once = run(config, B, T, steps)
    for _ in range(3):
        assert_same_run("second run", once, run(config, B, T, steps))
    assert once[0] != run(config, B, T, micro_steps(config, B, T, 8, 1)[4:])[0]  # the comparison can fail


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    """Of the same blocks: some BLAS kernels round differently in blocks of other sizes."""
    config, B, T = GPT2Config(64, 257, 384, 2, 4, 128), 4, 64  # several blocks to share in every op
    monkeypatch.setattr(ops.device, "shares", lambda: 6)
    steps, before = micro_steps(config, B, T, 2, 2), ops.device.threads()
    try:
        ops.device.threads(1)
        alone = run(config, B, T, steps)
        for threads in (2, 3):
            ops.device.threads(threads)
            assert_same_run(f"{threads} threads", alone, run(config, B, T, steps))
    finally:
        ops.device.threads(before)


@pytest.mark.parametrize("B, G", [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_gradient_accumulation_equals_one_large_batch(B, G):
    config, T = GPT2Config(16, 200, 256, 2, 3, 24), 11
    params = weights(config)
    ((x, y),) = batches(config, 6, T, 1)
    pieces = list(zip(np.split(x, G), np.split(y, G), strict=True))
    expected = torch_passes(config, params, x, y)
    model = build(config, B, T, params=params)
    assert_passes(f"{G} micro-steps", model, x, y, expected, pieces)
    # the next update starts from zero, whatever the last one left
    assert_passes(f"{G} micro-steps again", model, x, y, expected, pieces)


def test_replayed_passes_give_the_same_bits(monkeypatch):
    """graphs=True with a capture that, like CUDA's, runs nothing by itself; here replaying is calling."""
    captured = []
    monkeypatch.setattr(ops.device, "capture", lambda passes: captured.append(passes) or passes, raising=False)
    config, B, T = GPT2Config(16, 131, 256, 2, 2, 16), 3, 9
    steps = micro_steps(config, B, T, 4, 3)
    steps[2] = steps[2][:2]  # another number of micro-steps: another dloss
    assert_same_run("graphs", run(config, B, T, steps), run(config, B, T, steps, graphs=True))
    # forward; backward: first and later micro-steps of 3 (those of 2 come but once); update
    assert len(captured) == 4

    model, plain = (build(config, B, T, graphs=graphs) for graphs in (True, False))
    for b, t in ((3, 9), (2, 9), (3, 4), (3, 9), (1, 1), (3, 9), (2, 9), (3, 4), (1, 1)):
        ((x, y),) = batches(config, b, t, 1, seed=b * t)
        assert model.validate(x, y) == plain.validate(x, y), (b, t)
    assert len(captured) == 4 + 1  # forward over a full batch; smaller ones are launched


def test_the_gradient_norm():
    config, B, T = GPT2Config(16, 200, 256, 2, 3, 24), 3, 11
    ((x, y),) = batches(config, B, T, 1)
    expected = torch_passes(config, weights(config), x, y)
    norms = [math.sqrt(sum((expected[f"d{name}"][i] ** 2).sum() for name in GPT2_TENSORS)) for i in (0, 1)]
    for grad_clip in (0.0, 0.5):  # before clipping
        model = build(config, B, T)
        norm = step(model, [(x, y)], 1, replace(LLMC, grad_clip=grad_clip))[1]
        assert_close("grad_norm", "norm", np.array(norm, np.float32), Expected(*map(np.array, norms)))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])  # the square of the last one overflows
def test_a_norm_that_is_not_finite_updates_nothing(value):
    config = GPT2Config(8, 61, 128, 1, 1, 8)
    model = build(config, 1, 4)
    (first, second) = micro_steps(config, 1, 4, 2, 1)
    step(model, first, 1, LLMC)
    ((x, y),) = second
    model.forward(x)
    model.backward(x, y)
    model.grads.h[0].fcw[3, 2] = value
    arrays = dict(params=model.params_flat, m=model.m, v=model.v)
    before = {name: array.copy() for name, array in arrays.items()}
    model.update(LLMC, 2)
    assert not math.isfinite(model.grad_norm())
    for name, array in arrays.items():
        assert_bits(f"gradient {value}", name, array, before[name])


def test_padded_vocabulary_stays_zero():
    config, B, T = GPT2Config(16, 61, 128, 2, 2, 12), 2, 16
    model = build(config, B, T)
    for t, micro_batches in enumerate(micro_steps(config, B, T, 12, 2), 1):
        step(model, micro_batches, t, LLMC)
    padded = config.vocab_size * config.channels, config.padded_vocab_size * config.channels
    for name in ("params_flat", "grads_flat", "m", "v"):
        rows = getattr(model, name)[slice(*padded)]
        assert_bits("12 steps", name, rows, np.zeros_like(rows))
        assert getattr(model, name)[: padded[0]].all(), name  # the rows before have been trained
    logits = model.forward(micro_batches[0][0]).output[..., config.vocab_size :]
    assert_bits("12 steps", "padded logits", logits, np.zeros_like(logits))


def test_seeds_are_drawn_as_in_llmc():
    """One draw of xorshift64* for each micro-step (encoder), 16 for each update (one for each tensor)."""
    config = GPT2Config(8, 61, 128, 1, 1, 8)
    model, drawn = build(config, 1, 4), []

    def draw(state):
        state ^= state >> 12
        state = (state ^ (state << 25)) % 2**64
        state ^= state >> 27
        drawn.append(state * 0x2545F4914F6CDD1D % 2**64 >> 32)
        return state

    state = 13371337
    assert model.rng_state == state
    for t, micro_batches in enumerate(micro_steps(config, 1, 4, 2, 3), 1):
        step(model, micro_batches, t, LLMC)
        for _ in range(3):
            state = draw(state)
        assert model.scratch.encoder_seed.tolist() == drawn[-1:]
        assert model.rng_state_last_update == state
        for _ in range(16):
            state = draw(state)
        assert model.scratch.seeds.tolist() == drawn[-16:]
        assert model.rng_state == state
    assert drawn[:3] == [740755583, 337499614, 90980514]  # llm.c's


# ----------------------------------------------------------------------------------------------------------------------
# validation, sampling, loading


def test_validate_writes_neither_gradients_nor_dlogits():
    config, B, T = GPT2Config(16, 200, 256, 2, 3, 24), 3, 11
    model = build(config, B, T)
    (x, y), (x2, y2) = batches(config, B, T, 2)
    step(model, [(x, y)], 1, LLMC)
    arrays = dict(params=model.params_flat, grads=model.grads_flat, m=model.m, v=model.v)
    before = {name: array.copy() for name, array in arrays.items()}
    rng_state = model.rng_state
    logits = model.forward(x2).output.copy()
    loss = model.validate(x2, y2)
    assert_bits("validate", "logits", model.acts.output, logits)
    for name, array in arrays.items():
        assert_bits("validate", name, array, before[name])
    assert model.rng_state == rng_state
    assert model.validate(x2, y2) == loss  # nothing is carried over
    params = {name: getattr(model.params, name) for name in GPT2_TENSORS}
    assert_close("validate", "loss", np.array(loss, np.float32), torch_passes(config, params, x2, y2)["loss"])

    # and training goes on as if there had been no validation
    other = build(config, B, T)
    step(other, [(x, y)], 1, LLMC)
    assert step(other, [(x2, y2)], 2, LLMC) == step(model, [(x2, y2)], 2, LLMC)
    assert_bits("validate", "params after the next step", model.params_flat, other.params_flat)


def test_smaller_batches_live_in_the_same_memory():
    config, B, T = GPT2Config(16, 200, 256, 2, 3, 24), 4, 13
    params = weights(config)
    model = build(config, B, T, params=params)
    training = step(model, batches(config, B, T, 1), 1, replace(LLMC, lr=0.0, weight_decay=0.0))
    logits = {}
    for b, t in ((1, 1), (1, 13), (4, 1), (3, 7), (4, 13), (2, 12)):
        ((x, y),) = batches(config, b, t, 1, seed=10 * b + t)
        exact = build(config, b, t, params=params)
        assert model.validate(x, y) == exact.validate(x, y), (b, t)
        acts = model.forward(x)
        assert acts.output.shape == (b, t, 256) and np.shares_memory(acts.output, model.acts_flat)
        assert_bits(f"b = {b}, t = {t}", "logits", acts.output, exact.forward(x).output)
        logits[b, t] = acts.output.copy()
        torch_logits = torch_passes(config, params, x, y)["logits"]
        assert_close(f"b = {b}, t = {t}", "logits", logits[b, t][..., : config.vocab_size], torch_logits)
    # the full size is what it was
    again = step(model, batches(config, B, T, 1), 2, replace(LLMC, lr=0.0, weight_decay=0.0))
    assert again == training


def test_logits_in_pieces_change_nothing_else(monkeypatch):
    """Two micro-steps whose logits are never all in memory: the same losses and gradients but for the order of sums."""
    config, B, T = GPT2Config(16, 200, 256, 2, 3, 24), 3, 13
    params, pairs, ((x, y),) = weights(config), batches(config, B, T, 2), batches(config, B, T, 1, seed=5)
    whole, results = build(config, B, T, params=params), []
    monkeypatch.setattr(llmc.model, "HEAD_ROWS", 16)  # of 39
    parts = build(config, B, T, params=params)
    for rows, model in ((B * T, whole), (16, parts)):
        monkeypatch.setattr(llmc.model, "HEAD_ROWS", rows)
        losses = model.token_losses(x, y).copy()
        loss, norm = step(model, pairs, 1, LLMC)
        results.append((losses, loss, norm, model.grads_flat.copy()))
    for name, one, other in zip(("validation", "loss", "norm", "gradients"), *results, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=1e-7, err_msg=name)
    assert whole.acts_flat.nbytes - parts.acts_flat.nbytes == (B * T - 16) * 256 * 4
    assert parts.forward(x[:1]).output.shape == (1, T, 256)  # few enough: all at once


def test_later_tokens_do_not_reach_earlier_logits():
    config = GPT2Config(16, 200, 256, 2, 3, 24)
    model = build(config, 2, 16)
    ((x, _),) = batches(config, 2, 16, 1)
    logits = model.forward(x).output.copy()
    x[:, 9:] = 17
    changed = model.forward(x).output
    assert_bits("causality", "logits before the change", changed[:, :9], logits[:, :9])
    assert (changed[:, 9:, : config.vocab_size] != logits[:, 9:, : config.vocab_size]).all(axis=2).all()


@pytest.mark.parametrize("recompute", (0, 2))
def test_a_model_without_gradients_has_the_same_logits(recompute):
    """With the activations of one layer alone."""
    config = GPT2Config(16, 200, 256, 3, 3, 24)
    ((x, y),) = batches(config, 3, 11, 1)
    trainable, inference = build(config, 3, 11), Model(gpt2, ops, config, 3, 11, recompute=recompute, training=False)
    assert inference.acts.residual3.shape == (1, 3, 11, 24) and trainable.acts.residual3.shape == (3, 3, 11, 24)
    inference.params_flat[:] = trainable.params_flat
    assert_bits("training=False", "logits", inference.forward(x).output, trainable.forward(x).output)
    assert inference.validate(x, y) == trainable.validate(x, y)


def test_parameters_from_the_host():
    model = build(GPT2Config(8, 61, 128, 1, 1, 8), 1, 1)
    host = model.host_parameters()
    assert host.shape == model.params_flat.shape and host.dtype == np.float32
    values = np.random.default_rng(0).standard_normal(host.size, np.float32)
    model.load_parameters(values)
    assert_bits("load_parameters", "params", model.params_flat, values)
    host = model.host_parameters()
    host[:] = 2 * values
    model.load_parameters(host)
    assert_bits("load_parameters of host_parameters", "params", model.params_flat, 2 * values)
