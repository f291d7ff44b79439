"""Hugging Face's GPT-2 in both directions, with NumPy alone: config.json and model.safetensors of a folder.

Where the folder is, `find` says: the name is one, or the hub's cache has it, or it is downloaded. Weights differ from
llm.c's in three ways: Conv1D matrices are (in_features, out_features), the vocabulary is not padded, and tensors have
other names, with or without "transformer." before them. The classifier is wte in both.

A .safetensors file is u64 length, JSON {name: {dtype, shape, data_offsets}}, then the tensors, row-major.

Source: Hugging Face transformers' GPT2LMHeadModel; llm.c train_gpt2.py GPT.from_pretrained; dev/eval/export_hf.py.
"""

import json
import os
import re

import numpy as np

from llmc.buffers import carve
from llmc.errors import UserError
from llmc.files.io import atomic_write, bf16_to_fp32, convert
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
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}  # bf16 as its 16 bits
LEGACY = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # their organisation, openai-community, may be left out
HUB = "https://huggingface.co"  # HF_ENDPOINT names another one
SAVE = "HINT: save the model with transformers: model.save_pretrained(DIR)"


# ---------------------------------------------------------------------------------------------------------------------
# where a model is


def find(name):
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
            with open(os.path.join(folder, "refs", "main")) as file:
                snapshot = os.path.join(folder, "snapshots", file.read().strip())
        except OSError:
            continue
        if weight_files(snapshot) and os.path.exists(os.path.join(snapshot, "config.json")):
            return snapshot
    return download(repository)


def weight_files(folder):
    """The .safetensors files of a folder: model.safetensors, or those that its index names; [] if one is missing."""
    index = os.path.join(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if not os.path.exists(os.path.join(folder, names[0])) and os.path.exists(index):
        weight_map = _json(index).get("weight_map")
        names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        names = names or ["model.safetensors"]
    paths = [os.path.join(folder, os.path.basename(name)) for name in names]
    return paths if all(map(os.path.exists, paths)) else []


def download(repository):
    """Download a model into the hub's cache with huggingface_hub, or without it into llmc's cache -> its folder."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return _download_plainly(repository)
    try:
        return snapshot_download(repository, allow_patterns=["config.json", "model*.safetensors", "model*.json"])
    except Exception as error:  # its errors have no common class, and its messages have many lines
        reason, hint = why_not(error)
        raise UserError(f"cannot download {repository}: {reason}. HINT: {hint}") from error


def why_not(error):
    """(what went wrong, a hint) for an error of a download; the HTTP status may be that of an error that caused it."""
    status, at = None, error
    while at is not None and status is None:
        status = getattr(at, "code", None) or getattr(getattr(at, "response", None), "status_code", None)
        at = at.__cause__ or at.__context__
    if status in (401, 403):  # the hub answers so for what does not exist, too, as it does not tell who may know
        hint = "check the name; a gated or private model wants HF_TOKEN to be set, of an account that was given access"
        return f"access denied (HTTP {status})", hint
    if status == 404:
        return "there is no such model, or it has no such file (HTTP 404)", "check the name, or give a folder: hf:DIR"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160].rstrip(".")
    return reason, "connect to the internet, or give a folder: hf:DIR"


def _download_plainly(repository):
    import http.client
    import shutil
    import urllib.request

    from llmc.data.cache import writable_cache_dir

    hub = os.environ.get("HF_ENDPOINT") or HUB
    folder = os.path.join(writable_cache_dir(), "hf", repository.replace("/", "--"))
    os.makedirs(folder, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        path, url = os.path.join(folder, name), f"{hub}/{repository}/resolve/main/{name}"
        if os.path.exists(path):
            continue
        try:
            with urllib.request.urlopen(url, timeout=20) as response, atomic_write(path) as file:
                shutil.copyfileobj(response, file, 1 << 20)
                expected = int(response.headers.get("Content-Length") or file.tell())
                if file.tell() != expected:
                    raise OSError(f"{file.tell()} of {expected} bytes came")
        except (OSError, UserError, http.client.HTTPException) as error:
            reason, hint = why_not(error)
            raise UserError(f"cannot download {url}: {reason}. HINT: {hint}, or pip install huggingface_hub") from error
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# reading


def _json(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {SAVE}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. HINT: copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object. HINT: copy or download it again")
    return content


def read_hf_header(folder):
    """The MODEL_WORDS of a folder's config.json, as model_file.read_model_header has them.

    Errors: UserError for another architecture, or GPT-2 with an activation, scale or size that llm.c's has not.
    """
    path = os.path.join(folder, "config.json")
    config = _json(path)
    if config.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}, expected 'gpt2'. HINT: give a GPT-2")
    try:
        V, C = int(config["vocab_size"]), int(config["n_embd"])
        maxT, L, NH = int(config["n_positions"]), int(config["n_layer"]), int(config["n_head"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no usable {error}. HINT: it is not the config.json of a GPT-2") from error
    if min(V, C, maxT, L, NH) < 1 or C % NH:
        raise UserError(f"{path}: impossible sizes: n_embd {C}, n_head {NH}, n_layer {L}. HINT: the file is damaged")
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
            raise UserError(f"{path}: {key} is {config[key]!r}, the kernels have {wanted}. HINT: use another model")
    return dict(zip(MODEL_WORDS, (maxT, V, L, NH, C, -(-V // 128) * 128), strict=True))


def read_hf(folder, params):
    """params (N,) float32, or bf16 as uint16, written (=) from a folder -> its header. Padded rows of wte are zero.

    fp32, fp16 and bf16 tensors are read, one at a time; to bf16 they are rounded to nearest even. Errors: UserError.
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


def open_tensors(folder):
    """{name: (dtype name, array of the file's values, memory-mapped)} of all .safetensors files of a folder."""
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} has no model.safetensors, or not all files of its index. {SAVE}")
    tensors = {}
    for path in files:
        tensors.update(read_safetensors(path))
    return tensors


def read_safetensors(path):
    """{name: (dtype name, memory-mapped array)} of a file; bf16 as uint16. Tensors of other types have no array."""
    damaged = f"{path} is not a whole .safetensors file"
    hint = "HINT: copy or download it again"
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100 << 20):
                raise UserError(f"{damaged}: {size} bytes, of which {length} should be its header. {hint}")
            header = json.loads(file.read(length))
        data, tensors = np.memmap(path, np.uint8, "r") if size > 8 + length else np.zeros(size, np.uint8), {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            dtype = DTYPES.get(kind)
            if not 0 <= start <= end <= size - 8 - length:
                raise UserError(f"{damaged}: {name} ends at byte {8 + length + end} of {size}. {hint}")
            array = None
            if dtype is not None:
                array = data[8 + length + start : 8 + length + end].view(dtype).reshape(shape)
            tensors[name] = kind, array
        return tensors
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. {SAVE}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{damaged}: {' '.join(str(error).split())[:100]}. {hint}") from error


def _fill(view, tensors, name, transposed, folder):
    """view = the tensor, in the view's dtype."""
    if name not in tensors:
        raise UserError(f"{folder}: the weights lack {name}. HINT: it is not a whole GPT-2; {SAVE[6:]}")
    kind, array = tensors[name]
    if array is None:
        raise UserError(
            f"{folder}: {name} is of type {kind}, known are {', '.join(DTYPES)}. HINT: save it in one of them"
        )
    shape = view.shape[::-1] if transposed else view.shape
    if array.shape != shape:
        raise UserError(f"{folder}: {name} is {array.shape}, config.json asks for {shape}. HINT: they do not match")
    array = array.T if transposed else array
    if not (kind == "BF16" and view.dtype == np.uint16):
        array = bf16_to_fp32(array) if kind == "BF16" else array.astype(np.float32, copy=False)
        array = convert(array, view.dtype)
    view[...] = array


# ---------------------------------------------------------------------------------------------------------------------
# writing


def hf_tensors(header, params):
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


def write_safetensors(path, tensors, kind):
    """Write [(name, array)] of float32, or bf16 as uint16, as F32, F16 or BF16, one tensor at a time, atomically."""
    dtype, at, entries = DTYPES[kind], 0, {"__metadata__": {"format": "pt"}}
    for name, array in tensors:
        end = at + array.size * dtype.itemsize
        entries[name] = dict(dtype=kind, shape=list(array.shape), data_offsets=[at, end])
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors:
            array = np.ascontiguousarray(array)
            if kind == "F16":
                array = (bf16_to_fp32(array) if array.dtype == np.uint16 else array).astype(dtype)
            else:
                array = convert(array, dtype)
            file.write(array)


def hf_config(header, kind, eot):
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
