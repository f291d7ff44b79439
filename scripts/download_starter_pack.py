#!/usr/bin/env python3
"""Download llm.c's starter pack: `python scripts/download_starter_pack.py [DIR]` (default: this folder).

    gpt2_124M.bin gpt2_124M_bf16.bin       GPT-2 124M as OpenAI published it
    gpt2_124M_debug_state.bin              one batch with its logits, loss and gradients: python -m llmc.test_gpt2
    gpt2_tokenizer.bin                     its tokenizer, decode only
    dev/data/tinyshakespeare/*.bin         Tiny Shakespeare, tokenized
    dev/data/hellaswag/hellaswag_val.bin   HellaSwag's validation set: python -m llmc.train -h 1

1.3 GB in seven files. What is there already is not downloaded again, and a download that was cut goes on where it
stopped (FILE.part). A file gets its name when it has its size and its header is right.

Source: llm.c dev/download_starter_pack.sh; the files are Hugging Face's dataset karpathy/llmc-starter-pack.
"""

import argparse
import http.client
import os
import sys
import time
import urllib.error
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))  # a checkout, not installed

from llmc.command import command  # noqa: E402
from llmc.errors import UserError

URL = "https://huggingface.co/datasets/karpathy/llmc-starter-pack/resolve/main"
FILES = {  # path: (size in bytes, None where llm.c does not fix it; the first two words, which are magic and version)
    "gpt2_124M.bin": (497_904_640, (20240326, 3)),
    "gpt2_124M_bf16.bin": (248_952_832, (20240326, 5)),
    "gpt2_124M_debug_state.bin": (549_369_860, (20240327, 2)),
    "gpt2_tokenizer.bin": (372_108, (20240328, 2)),
    "dev/data/tinyshakespeare/tiny_shakespeare_train.bin": (611_544, (20240520, 1)),
    "dev/data/tinyshakespeare/tiny_shakespeare_val.bin": (66_560, (20240520, 1)),
    "dev/data/hellaswag/hellaswag_val.bin": (None, (20240522, 1)),
}
ATTEMPTS, PAUSE = 5, 1.0  # tries in a row that bring nothing, seconds between two
BLOCK = 1 << 20


def problem_of(path, size, words):
    """What is wrong with a file, or None."""
    found = os.path.getsize(path)
    if size is not None and found != size:
        return f"it has {found} bytes, expected {size}"
    with open(path, "rb") as file:
        start = file.read(8)
    expected = b"".join([word.to_bytes(4, "little") for word in words])
    return None if start == expected else f"it starts with {start.hex()}, expected {expected.hex()}"


def fetch(url, part, size, progress):
    """Append to the file `part` what is missing of `url`; its size as the server tells. Errors: OSError.

    size: the expected one or None. progress(bytes there, bytes in all) is called after each block.
    """
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        total = int(error.headers.get("Content-Range", "*/-1").rpartition("/")[2])
        if have == total:
            return total
        os.remove(part)  # it is longer than the file: of another version
        raise OSError("the part that was there did not fit") from error
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        start = file.tell()  # 0 if the server sends all of it again
        total = start + int(response.headers["Content-Length"])
        if size is not None and total != size:
            raise UserError(f"{url} has {total} bytes, expected {size}. HINT: it is another version of the file")
        while block := response.read(BLOCK):
            file.write(block)
            progress(file.tell(), total)
        file.flush()
        os.fsync(file.fileno())
        if file.tell() != total:
            raise OSError(f"{file.tell()} of {total} bytes came")
    return total


def download(url, target, size, words, progress=lambda done, total: None):
    """`target` from `url`: resumed, checked, then renamed. Errors: UserError."""
    part, failures = target + ".part", 0
    while True:
        before = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
            total = fetch(url, part, size, progress)
            break
        except (OSError, http.client.HTTPException) as error:
            after = os.path.getsize(part) if os.path.exists(part) else 0
            failures = 0 if after > before else failures + 1
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or failures == ATTEMPTS:
                reason = " ".join(str(error).split())[:160]
                kept = f"the same command goes on from byte {after}" if after else "is there a network?"
                raise UserError(f"cannot download {url} to {target}: {reason}. HINT: {kept}") from error
            time.sleep(PAUSE)
    problem = problem_of(part, total, words)
    if problem:
        os.remove(part)
        raise UserError(f"{url} is not what it was: {problem}. HINT: try again later; nothing was kept")
    os.replace(part, target)


@command("download_starter_pack")
def main(argv=None):
    parser = argparse.ArgumentParser(prog="download_starter_pack", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="where to (default: the current folder)")
    parser.add_argument("--url", default=URL, help="where from")
    args = parser.parse_args(argv)
    from tqdm import tqdm

    for name, (size, words) in FILES.items():
        target = os.path.join(args.folder, *name.split("/"))
        if os.path.exists(target):
            problem = problem_of(target, size, words)
            if problem:
                raise UserError(f"{target} is not of the starter pack: {problem}. HINT: move it away")
            print(f"have  {target}")
            continue
        with tqdm(total=size, desc=os.path.basename(name), unit="B", unit_scale=True, leave=False, disable=None) as bar:

            def progress(done, total, bar=bar):
                bar.total = total
                bar.update(done - bar.n)

            download(f"{args.url}/{os.path.basename(name)}", target, size, words, progress)
        print(f"wrote {target}, {os.path.getsize(target)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
