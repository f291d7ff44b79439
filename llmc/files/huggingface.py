"""Hugging Face's GPT-2 in both directions: config.json and model.safetensors of a folder, without torch.

`find` turns a name into a folder: the name is one, or the hub's cache has it, or huggingface_hub downloads it. The
weights differ from llm.c's in three ways: Conv1D matrices are (in_features, out_features), the vocabulary is not
padded, and tensors have other names, with or without "transformer." before them. The classifier is wte in both.

A .safetensors file is u64 length, JSON {name: {dtype, shape, data_offsets}}, then the tensors, row-major. The package
safetensors checks a file, and refuses tensors that overlap, leave holes or are there twice. The values are then read
here, as NumPy has no bf16: such a tensor is read as uint16 from where the header says. Files are written here, a tensor
at a time, as the package would need the whole model in memory once more. The package opens a new file as a check before
the file gets its name.

Source: Hugging Face transformers' GPT2LMHeadModel; llm.c train_gpt2.py GPT.from_pretrained; dev/eval/export_hf.py.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llmc.buffers import carve
from llmc.errors import UserError
from llmc.files import io, parse
from llmc.files.model_file import MODEL_WORDS

BLOCK_NAMES = {  # of a layer: ours -> theirs, and whether it is a Conv1D, whose matrix is transposed
    "ln1w": ("ln_1.weight", False),
    "ln1b": ("ln_1.bias", False),
    "qkvw": ("attn.c_attn.weight", True),
    "qkvb": ("attn.c_attn.bias", False),
    "attprojw": ("attn.c_proj.weight", True),
    "attprojb": ("attn.c_proj.bias", False),
    "ln2w": ("ln_2.weight", False),
    "ln2b": ("ln_2.bias", False),
    "fcw": ("mlp.c_fc.weight", True),
    "fcb": ("mlp.c_fc.bias", False),
    "fcprojw": ("mlp.c_proj.weight", True),
    "fcprojb": ("mlp.c_proj.bias", False),
}
MODEL_NAMES = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
DTYPES: dict[str, Any] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}  # bf16 as its 16 bits
NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # as --dtype has them
LEGACY = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # these may be named without openai-community/
SAVE = "HINT: save the model with transformers: model.save_pretrained(DIR)"
WHOLE = "HINT: it is not a whole GPT-2; save the model with transformers: model.save_pretrained(DIR)"
COPY = "HINT: copy or download it again"


# ---------------------------------------------------------------------------------------------------------------------
# where a model is


def find(name: str) -> str:
    """The folder of a model: `name` itself, the hub's cache (its main branch), or a download. Errors: UserError."""
    if os.path.isdir(os.path.expanduser(name)):
        return os.path.expanduser(name)
    if os.path.exists(name) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"hf:{name} is not a folder. HINT: give a folder with config.json, or a name such as hf:gpt2")
    repository = f"openai-community/{name}" if name in LEGACY else name
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface"), "hub"
    )
    for candidate in dict.fromkeys((repository, name)):
        folder = os.path.join(hub, "models--" + candidate.replace("/", "--"))
        try:
            with io.open_regular(os.path.join(folder, "refs", "main")) as file:
                snapshot = os.path.join(folder, "snapshots", file.read(100).decode("ascii", "replace").strip())
        except OSError:
            continue
        if weight_files(snapshot) and os.path.exists(os.path.join(snapshot, "config.json")):
            return snapshot
    return download(repository)


def weight_files(folder: io.Path) -> list[str]:
    """The .safetensors files of a folder: model.safetensors, or those that its index names; [] if one is missing."""
    index = os.path.join(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if not os.path.exists(os.path.join(folder, names[0])) and os.path.exists(index):
        weight_map = parse.dictionary(parse.read_json(index).get("weight_map"), f"{index}: weight_map")
        names = sorted({parse.string(name, f"{index}: a file of weight_map") for name in weight_map.values()}) or names
    paths = [os.path.join(folder, os.path.basename(name)) for name in names]
    return paths if all(map(os.path.exists, paths)) else []


def download(repository: str) -> str:
    """Download a model into the hub's cache with huggingface_hub -> its folder. Errors: UserError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = "HINT: pip install huggingface_hub, or give a folder: hf:DIR"
        raise UserError(f"cannot download {repository}: huggingface_hub is not there. {hint}") from None
    try:
        return snapshot_download(repository, allow_patterns=["config.json", "model*.safetensors", "model*.json"])
    except Exception as error:  # its errors have no common class, and its messages have many lines
        reason, hint = why_not(error)
        raise UserError(f"cannot download {repository}: {reason}. HINT: {hint}, or give a folder: hf:DIR") from error


def why_not(error: BaseException) -> tuple[str, str]:
    """(what went wrong, a hint) for an error of a download; the HTTP status may be that of an error that caused it."""
    status: int | None = None
    at: BaseException | None = error
    while at is not None and status is None:
        status = getattr(at, "code", None) or getattr(getattr(at, "response", None), "status_code", None)
        at = at.__cause__ or at.__context__
    if status in (401, 403):  # also the answer for a name that does not exist: the hub hides what is private
        hint = "check the name; what is gated or private wants HF_TOKEN to be set, of an account that was given access"
        return f"access denied (HTTP {status})", hint
    if status == 404:
        return "the hub does not have it (HTTP 404)", "check the name"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160].rstrip(".")
    return reason, "connect to the internet"


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_hf_header(folder: io.Path) -> dict[str, int]:
    """The MODEL_WORDS of a folder's config.json, as model_file.read_model_header has them.

    Errors: UserError for another architecture, for a GPT-2 with an activation, scale or size that llm.c's lacks, and
    for weights of other sizes. So the caller can trust the sizes when it allocates the model.
    """
    path = os.path.join(folder, "config.json")
    config = parse.read_json(path, SAVE)
    if config.get("model_type") != "gpt2":
        found = parse.shown(config.get("model_type"))
        raise UserError(f"{path}: model_type is {found}, expected 'gpt2'. HINT: give a GPT-2")
    V, C, maxT, L, NH = (
        parse.integer(config.get(name), f"{path}: {name}", 1, most)
        for name, most in (
            ("vocab_size", 1 << 24), ("n_embd", 1 << 20), ("n_positions", 1 << 24), ("n_layer", 1 << 16),
            ("n_head", 1 << 20),
        )
    )  # fmt: skip
    if C % NH:
        raise UserError(f"{path}: n_embd {C} is not a multiple of n_head {NH}. HINT: the file is damaged")
    for key, allowed in (
        ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),  # the same formula
        ("n_inner", (None, 4 * C)),
        ("layer_norm_epsilon", (1e-5,)),
        ("scale_attn_weights", (True,)),
        ("scale_attn_by_inverse_layer_idx", (False,)),
        ("add_cross_attention", (False,)),
        ("tie_word_embeddings", (True,)),
    ):
        if config.get(key, allowed[0]) not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            found = parse.shown(config[key])
            raise UserError(f"{path}: {key} is {found}, the kernels have {wanted}. HINT: use another model")
    shapes = dict(wte=(V, C), wpe=(maxT, C))
    tensors = {name.removeprefix("transformer."): t for name, t in open_tensors(folder).items()}
    for name, shape in shapes.items():
        _check(tensors, MODEL_NAMES[name], shape, folder)
    for layer in range(L):
        for theirs, _ in BLOCK_NAMES.values():
            if f"h.{layer}.{theirs}" not in tensors:
                raise UserError(f"{folder}: the weights lack h.{layer}.{theirs}. {WHOLE}")
    return dict(zip(MODEL_WORDS, (maxT, V, L, NH, C, -(-V // 128) * 128), strict=True))


def read_hf(folder: io.Path, params: np.ndarray) -> dict[str, int]:
    """Write (=) params (N,) float32, or bf16 as uint16, from a folder -> its header. Padded rows of wte are zero.

    Tensors are fp32, fp16 or bf16, and are read one at a time. Rounding to bf16 is to nearest even. Errors: UserError.
    """
    from llmc.gpt2 import config_from_header, num_parameters, parameter_specs

    header = read_hf_header(folder)
    config = config_from_header(header)
    if params.size != num_parameters(config):
        raise UserError(
            f"{folder} has {num_parameters(config)} parameters, the model {params.size}. HINT: build the model from it"
        )
    tensors = {name.removeprefix("transformer."): t for name, t in open_tensors(folder).items()}
    views = carve(params.view(np.uint8), parameter_specs(config), config.num_layers, params.dtype)
    wte = config.vocab_size
    for name, theirs in MODEL_NAMES.items():
        view = getattr(views, name)
        _fill(view[:wte] if name == "wte" else view, tensors, theirs, False, folder)
    views.wte[wte:] = 0
    for layer, block in enumerate(views.h):
        for name, (theirs, transposed) in BLOCK_NAMES.items():
            _fill(getattr(block, name), tensors, f"h.{layer}.{theirs}", transposed, folder)
    if "lm_head.weight" in tensors:
        head = np.empty((wte, config.channels), params.dtype)
        _fill(head, tensors, "lm_head.weight", False, folder)
        if not np.array_equal(head, views.wte[:wte]):
            raise UserError(f"{folder}: lm_head.weight is not wte.weight, here they are one. HINT: use another model")
    return header


Tensors = dict[str, tuple[str, np.ndarray | None]]  # name -> dtype name, and the values where NumPy has the type


def open_tensors(folder: io.Path) -> Tensors:
    """The tensors of all .safetensors files of a folder, memory-mapped."""
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} has no model.safetensors, or not all files of its index. {SAVE}")
    tensors = {}
    for path in files:
        tensors.update(read_safetensors(path))
    return tensors


def read_safetensors(path: io.Path) -> Tensors:
    """The tensors of a file, memory-mapped; bf16 as uint16. Tensors of other types have no array. Errors: UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with io.open_regular(path) as file:
            with safe_open(path, framework="numpy") as checked:
                names = list(checked.keys())
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))  # the package has checked it
            if not names:
                return {}
            data = np.memmap(file, np.uint8, "r", offset=8 + length) if file.seek(0, 2) > 8 + length else np.empty(0)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. {SAVE}") from error
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:120].rstrip(".")
        raise UserError(f"{path} is not a whole .safetensors file: {reason}. {COPY}") from error
    tensors: Tensors = {}
    for name in names:
        kind, shape, (start, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
        if len(shape) > 8:  # no tensor of a model has so many, and NumPy fails above 64
            kind += f" of {len(shape)} dimensions"
        tensors[name] = kind, data[start:end].view(DTYPES[kind]).reshape(shape) if kind in DTYPES else None
    return tensors


def _check(tensors: Tensors, name: str, shape: tuple[int, ...], folder: io.Path) -> tuple[str, np.ndarray]:
    """(dtype name, values) of a tensor, which must have this shape. Errors: UserError."""
    if name not in tensors:
        raise UserError(f"{folder}: the weights lack {name}. {WHOLE}")
    kind, array = tensors[name]
    if array is None:
        raise UserError(
            f"{folder}: {name} is of type {kind}, known are {', '.join(DTYPES)}. HINT: save it in one of them"
        )
    if array.shape != shape:
        raise UserError(f"{folder}: {name} is {array.shape}, config.json asks for {shape}. HINT: they do not match")
    return kind, array


def _fill(view: np.ndarray, tensors: Tensors, name: str, transposed: bool, folder: io.Path) -> None:
    """view = the tensor, in the view's dtype."""
    kind, array = _check(tensors, name, view.shape[::-1] if transposed else view.shape, folder)
    array = array.T if transposed else array
    if not (kind == "BF16" and view.dtype == np.uint16):
        array = io.bf16_to_fp32(array) if kind == "BF16" else array.astype(np.float32, copy=False)
        array = io.convert(array, view.dtype)
    view[...] = array


# ---------------------------------------------------------------------------------------------------------------------
# writing


def hf_tensors(header: Mapping[str, int], params: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """[(name, array)] of a GPT2LMHeadModel: views into params (N,), the matrices transposed, wte without padding."""
    from llmc.gpt2 import config_from_header, parameter_specs

    config = config_from_header(header)
    views = carve(params.view(np.uint8), parameter_specs(config), config.num_layers, params.dtype)
    tensors = [("wte.weight", views.wte[: config.vocab_size]), ("wpe.weight", views.wpe)]
    for layer, block in enumerate(views.h):
        for name, (theirs, transposed) in BLOCK_NAMES.items():
            array = getattr(block, name)
            tensors.append((f"h.{layer}.{theirs}", array.T if transposed else array))
    tensors += [("ln_f.weight", views.lnfw), ("ln_f.bias", views.lnfb)]
    return [(f"transformer.{name}", array) for name, array in tensors]


def write_safetensors(path: io.Path, tensors: Iterable[tuple[str, np.ndarray]], kind: str) -> None:
    """Write [(name, array)] of float32, or bf16 as uint16, as F32, F16 or BF16, one tensor at a time, atomically.

    Errors: UserError for a value that is not finite, or is not in `kind`, and when the disk is full.
    """
    from safetensors import safe_open

    tensors, dtype, at = list(tensors), DTYPES[kind], 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, array in tensors:
        end = at + array.size * dtype.itemsize
        entries[name] = dict(dtype=kind, shape=list(array.shape), data_offsets=[at, end])
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with io.atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors:
            file.write(_finite(name, np.ascontiguousarray(array), kind).data)
        file.flush()
        with safe_open(file.name, framework="numpy"):  # a check: other programs will open it like this
            pass


def _finite(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    """The array as `kind`. Errors: UserError for a value that would be written as Inf or NaN."""
    if kind == "F16":
        values = io.bf16_to_fp32(array) if array.dtype == np.uint16 else array
        with np.errstate(over="ignore"):
            out = values.astype(DTYPES[kind])
    else:
        out = io.convert(array, DTYPES[kind])
    bad = io.first_not_finite(out.reshape(-1))
    if bad is not None:
        was = array.reshape(-1)[bad : bad + 1]
        value = float(io.convert(was, np.float32)[0])
        where = f"{name}{list(map(int, np.unravel_index(bad, array.shape)))} is {value:g}"
        if np.isfinite(value):
            raise UserError(f"{where}, more than {NAMES[kind]} holds. HINT: --dtype fp32")
        raise UserError(f"{where}. HINT: export an earlier checkpoint, or with --dtype fp32 if that one is finite")
    return out


def hf_config(header: Mapping[str, int], kind: str, eot: int | None) -> dict[str, Any]:
    """config.json of a GPT2LMHeadModel. eot: the id of the end-of-text token, None where there is none."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return dict(
        architectures=["GPT2LMHeadModel"],
        model_type="gpt2",
        vocab_size=header["vocab_size"],
        n_positions=header["max_seq_len"],
        n_ctx=header["max_seq_len"],
        n_embd=header["channels"],
        n_layer=header["num_layers"],
        n_head=header["num_heads"],
        n_inner=None,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        resid_pdrop=0.0,  # it was trained without dropout
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eot,
        eos_token_id=eot,
        tie_word_embeddings=True,
        use_cache=True,
        torch_dtype=names[kind],
    )
