#!/usr/bin/env python3
"""Download llm.c's starter pack: `python scripts/download_starter_pack.py [DIR]` (default: this folder).

    gpt2_124M.bin gpt2_124M_bf16.bin       GPT-2 124M as OpenAI published it
    gpt2_124M_debug_state.bin              one batch with its logits, loss and gradients: python -m llmc.test_gpt2
    gpt2_tokenizer.bin                     its tokenizer, decode only
    dev/data/tinyshakespeare/*.bin         Tiny Shakespeare, tokenized
    dev/data/hellaswag/hellaswag_val.bin   HellaSwag's validation set: python -m llmc.train -h 1

1.3 GB in seven files, by huggingface_hub. What is there already is not downloaded again, and a download that was cut
goes on where it stopped. A file gets its name when it has its size and its header is right.

Source: llm.c dev/download_starter_pack.sh; the files are Hugging Face's dataset karpathy/llmc-starter-pack.
"""

import argparse
import os
import shutil
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))  # a checkout, not installed

from llmc.command import command  # noqa: E402
from llmc.errors import UserError

REPOSITORY = "karpathy/llmc-starter-pack"
FILES = {  # path: (size in bytes, None where llm.c does not fix it; the first two words, which are magic and version)
    "gpt2_124M.bin": (497_904_640, (20240326, 3)),
    "gpt2_124M_bf16.bin": (248_952_832, (20240326, 5)),
    "gpt2_124M_debug_state.bin": (549_369_860, (20240327, 2)),
    "gpt2_tokenizer.bin": (372_108, (20240328, 2)),
    "dev/data/tinyshakespeare/tiny_shakespeare_train.bin": (611_544, (20240520, 1)),
    "dev/data/tinyshakespeare/tiny_shakespeare_val.bin": (66_560, (20240520, 1)),
    "dev/data/hellaswag/hellaswag_val.bin": (None, (20240522, 1)),
}
PARTS = ".llmc-starter-pack"  # the folder in DIR where a download lies until it is whole and checked


def problem_of(path, size, words):
    """What is wrong with a file, or None."""
    found = os.path.getsize(path)
    if size is not None and found != size:
        return f"it has {found} bytes, expected {size}"
    with open(path, "rb") as file:
        start = file.read(8)
    expected = b"".join([word.to_bytes(4, "little") for word in words])
    return None if start == expected else f"it starts with {start.hex()}, expected {expected.hex()}"


def download(name, parts, target, size, words):
    """`target` from the file of that name at the hub, by way of the folder `parts`. Errors: UserError."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        hint = "HINT: pip install huggingface_hub"
        raise UserError(f"the starter pack is downloaded with huggingface_hub, which is not there. {hint}") from None
    from llmc.files.huggingface import why_not

    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        path = hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=parts)
    except Exception as error:  # its errors have no common class, and its messages have many lines
        reason, hint = why_not(error)
        again = "the same command goes on where it stopped"
        raise UserError(f"cannot download {name} to {target}: {reason}. HINT: {hint}; {again}") from error
    problem = problem_of(path, size, words)
    if problem:
        os.remove(path)
        raise UserError(f"{REPOSITORY}: {name} is not what it was: {problem}. HINT: try again later; it was not kept")
    os.replace(path, target)


@command("download_starter_pack")
def main(argv=None):
    parser = argparse.ArgumentParser(prog="download_starter_pack", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="where to (default: the current folder)")
    folder = parser.parse_args(argv).folder
    parts = os.path.join(folder, PARTS)
    for path, (size, words) in FILES.items():
        target = os.path.join(folder, *path.split("/"))
        if not os.path.exists(target):
            download(os.path.basename(path), parts, target, size, words)
            print(f"wrote {target}, {os.path.getsize(target)} bytes")
            continue
        problem = problem_of(target, size, words)
        if problem:
            raise UserError(f"{target} is not of the starter pack: {problem}. HINT: move it away")
        print(f"have  {target}")
    shutil.rmtree(parts, ignore_errors=True)  # what the hub notes there for itself
    return 0


if __name__ == "__main__":
    sys.exit(main())
