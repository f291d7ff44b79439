"""Models for other programs: `python -m llmc.export MODEL OUT --format hf|bin`.

hf makes a folder that transformers' AutoModelForCausalLM and AutoTokenizer load: config.json, model.safetensors and the
tokenizer's files. bin makes llm.c's model file, version 3 (fp32) or 5 (bf16). No torch is needed.

transformers wants GPT-2's tokenizer as merges: pairs of tokens that make a longer one, in the order in which they are
tried. tiktoken's ranks are that order. To find the pair of a token, all merges before its own are applied to its bytes;
two parts are left, and they are the pair. Bytes appear as printable characters. The byte-level tokenizer is the same
without any merge.

Source: llm.c dev/eval/export_hf.py; Hugging Face transformers' GPT2Tokenizer (bytes_to_unicode).
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmc import loading
from llmc.command import Parser, command
from llmc.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from llmc.data.tokenizer import Tokenizer

KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # --dtype -> its name in a .safetensors file


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers


def byte_characters() -> dict[int, str]:
    """The printable character for each byte: a printable byte is itself, the others take characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def merges(pieces: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """[(left, right)]: the merge that makes each piece longer than a byte, in the order of the pieces."""
    ranks, pairs = {piece: rank for rank, piece in enumerate(pieces)}, []
    for rank, piece in enumerate(pieces):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            assert ranks.get(parts[i] + parts[i + 1], rank) < rank, piece  # else no merge could have made it
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def tokenizer_files(tokenizer: "Tokenizer", max_seq_len: int) -> dict[str, bytes]:
    """{file name: bytes} from which transformers makes a tokenizer that gives the same ids."""
    characters = byte_characters()

    def text(piece: bytes) -> str:
        return "".join([characters[b] for b in piece])

    eot = tokenizer.pieces[tokenizer.eot].decode()
    pieces = [piece for i, piece in enumerate(tokenizer.pieces) if i != tokenizer.eot]
    vocab = {eot if i == tokenizer.eot else text(piece): i for i, piece in enumerate(tokenizer.pieces)}
    pairs = [f"{text(left)} {text(right)}" for left, right in merges(pieces)]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    special = dict(content=eot, single_word=False, lstrip=False, rstrip=False, normalized=True)
    fast = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[dict(id=tokenizer.eot, **special, special=True)],
        normalizer=None,
        pre_tokenizer=byte_level,
        post_processor=byte_level | dict(trim_offsets=False),
        decoder=byte_level,
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
            byte_fallback=False,
            vocab=vocab,
            merges=pairs,
        ),
    )
    names = dict(bos_token=eot, eos_token=eot, unk_token=eot)
    about = dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=False, model_max_length=max_seq_len, **names)
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *pairs, ""]).encode(),
        "tokenizer.json": json.dumps(fast, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(about, indent=2).encode(),
        "special_tokens_map.json": json.dumps(names, indent=2).encode(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# models


def read_model(path: str, dtype: str) -> "tuple[dict[str, int], np.ndarray]":
    """(header, params (N,)) of a path from loading.model_file(). params is float32, or uint16 for "bf16"."""
    import numpy as np

    from llmc.files import huggingface, model_file

    header = loading.model_header(path)
    N = model_file.num_parameters(header)
    try:
        params = np.empty(N, np.uint16 if dtype == "bf16" else np.float32)
    except MemoryError as error:
        raise UserError(
            f"{path}: no memory for its {N:,} parameters. HINT: --dtype bf16, or a larger machine"
        ) from error
    if path.startswith("hf:"):
        huggingface.read_hf(path[3:], params)
    else:
        model_file.read_model(path, params)
    return header, params


def file_dtype(path: str) -> str:
    """The precision of the weights at a path from loading.model_file(): "fp32", "fp16" or "bf16"."""
    from llmc.files import huggingface

    if path.startswith("hf:"):
        kinds = {kind: name for name, kind in KINDS.items()}
        found = [kind for kind, _ in huggingface.open_tensors(path[3:]).values() if kind in kinds]
        return kinds[found[0]] if found else "fp32"
    return "bf16" if loading.model_header(path)["version"] == 5 else "fp32"


def export_hf(path: str, out: str, dtype: str, tokenizer: "Tokenizer | None") -> None:
    """Write the folder `out`. config.json comes last: a folder without it counts as no model. Errors: UserError."""
    from llmc.files import huggingface
    from llmc.files.io import atomic_write

    header, params = read_model(path, dtype)
    there = os.path.isdir(out)
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}. HINT: choose another one") from error
    tensors = huggingface.hf_tensors(header, params)
    try:
        huggingface.write_safetensors(os.path.join(out, "model.safetensors"), tensors, KINDS[dtype])
    except UserError:
        if not there:
            with contextlib.suppress(OSError):
                os.rmdir(out)
        raise
    eot = tokenizer.eot if tokenizer else None
    files = tokenizer_files(tokenizer, header["max_seq_len"]) if tokenizer else {}
    files["generation_config.json"] = json.dumps(dict(bos_token_id=eot, eos_token_id=eot), indent=2).encode()
    files["config.json"] = json.dumps(huggingface.hf_config(header, KINDS[dtype], eot), indent=2).encode()
    for name, content in files.items():
        with atomic_write(os.path.join(out, name)) as file:
            file.write(content)


def export_bin(path: str, out: str, dtype: str) -> None:
    """Write llm.c's model file."""
    from llmc.files import model_file

    header, params = read_model(path, dtype)
    model_file.write_model(out, header, params, 5 if dtype == "bf16" else 3)


def pick_tokenizer(config: Any, name: str | None) -> "tuple[Tokenizer | None, str | None]":
    """(Tokenizer or None, a line about a missing one or None). name: None for that of the vocabulary's size."""
    from llmc.data.tokenizer import tokenizer_for, tokenizer_name

    if name == "none":
        return None, None
    if name is None and tokenizer_name(config.vocab_size) is None:
        return None, f"no tokenizer files: no tokenizer of llmc has {config.vocab_size} tokens, as this model"
    return tokenizer_for(config.vocab_size, name), None


def parser() -> Parser:
    p = Parser(prog="llmc.export", description="Write a model for other programs.", allow_abbrev=False)
    p.add_argument("model", metavar="MODEL", help=loading.MODEL_HELP)
    p.add_argument("out", metavar="OUT", nargs="?", help="folder, or .bin file, to write (default: beside MODEL)")
    text = "Hugging Face's folder, or llm.c's file (hf, but bin for an OUT that ends in .bin)"
    p.add_argument("--format", choices=("hf", "bin"), help=text)
    p.add_argument("--dtype", choices=tuple(KINDS), help="of the weights (default: as they are; fp16 for hf only)")
    p.add_argument("--tokenizer", choices=("gpt2", "bytes", "none"), help="default: by the size of the vocabulary")
    p.add_argument("--overwrite", action="store_true", help="replace an OUT that is there")
    return p


@command("llmc.export")
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from llmc.gpt2 import config_from_header

    path = loading.model_file(args.model)
    config = config_from_header(loading.model_header(path))
    dtype = args.dtype or file_dtype(path)
    named = (args.out or "").endswith(".bin")
    kind = args.format or ("bin" if named else "hf")
    if kind == "hf" and named:
        raise UserError(
            f"{args.out} with --format hf: that is a folder. HINT: leave --format out for llm.c's .bin file."
        )
    if kind == "bin" and dtype == "fp16":
        raise UserError("--dtype fp16: llm.c's model files are fp32 or bf16. HINT: --dtype fp32 loses nothing.")
    base = args.model.removeprefix("hf:").rstrip("/").removesuffix(".bin")
    base = base if os.path.exists(args.model.removeprefix("hf:")) else os.path.basename(base)  # a name at the hub
    out = args.out or base + ("-hf" if kind == "hf" else f"-{dtype}.bin")
    there = os.path.join(out, "config.json") if kind == "hf" else out
    if os.path.exists(there) and not args.overwrite:
        raise UserError(f"{there} exists. HINT: give another OUT, or --overwrite.")
    if kind == "bin":
        export_bin(path, out, dtype)
        print(f"wrote {out}: llm.c's model file, {dtype}")
        return 0
    tokenizer, notice = pick_tokenizer(config, args.tokenizer)
    export_hf(path, out, dtype, tokenizer)
    if notice:
        print(notice)
    print(f"wrote {out}: config.json, model.safetensors ({dtype})" + (" and the tokenizer" if tokenizer else ""))
    print(f'next: transformers.AutoModelForCausalLM.from_pretrained("{out}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
