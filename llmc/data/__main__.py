"""The command `python -m llmc.data prepare ...`: flags in, calls of prepare.py and eval_sets.py out."""

import argparse
import os
import shlex
import sys

from llmc import command as flags
from llmc.command import command
from llmc.errors import UserError, printable


def parser() -> flags.Parser:
    p = flags.Parser(prog="llmc.data", description="Make token shards for llmc.train.", allow_abbrev=False)
    prepare = p.add_subparsers(dest="command", required=True).add_parser(
        "prepare",
        help="turn a known dataset or text into token shards",
        description="Turn a known dataset (tinyshakespeare) or text into token shards, or with hellaswag FILE.jsonl "
        "HellaSwag's examples into FILE.bin, the eval set of llmc.train -h 1 and llmc.evaluate. Text is UTF-8: files, "
        "folders with all text files below them, or - for standard input; .jsonl files, and what is packed with gzip, "
        "bzip2, xz or zstd, are read as they are.",
        allow_abbrev=False,
    )
    add = prepare.add_argument
    add("names", nargs="+", metavar="NAME|FILE.txt", help="tinyshakespeare, or text, or hellaswag FILE.jsonl")
    add("--tokenizer", default="gpt2", metavar="NAME", help="gpt2 or bytes (default gpt2)")
    add("--out", metavar="DIR", help="folder for the shards (default ./FILE-TOKENIZER; known data: the user's cache)")
    add("--val-fraction", type=flags.below_one, metavar="F", help="last part of all tokens, to validate (default 0.1)")
    add(
        "--split",
        choices=["files", "blank-lines", "endoftext"],
        default="files",
        help="what a document is, which an end-of-text token precedes: a file (of a .jsonl file: a line), or a part of "
        "it up to a blank line, or up to the text <|endoftext|> (default files)",
    )
    add("--field", metavar="NAME", help="the files hold JSON lines, and this field of each the text (.jsonl: text)")
    add("--shard-size", type=flags.positive, default=10**8, metavar="N", help="most tokens in a shard (default 1e8)")
    add("--overwrite", action="store_true", help="replace shards that have other content")
    return p


def prepare_eval_set(args: argparse.Namespace) -> None:
    """Make the eval set of `prepare hellaswag FILE.jsonl` and print what to do with it."""
    from llmc.data.eval_sets import prepare_hellaswag

    if len(args.names) != 2 or args.val_fraction is not None or args.split != "files" or args.field:
        raise UserError("hellaswag takes one jsonl file and has no splits. HINT: prepare hellaswag FILE.jsonl")
    path, examples = prepare_hellaswag(args.names[1], args.tokenizer, args.out, args.overwrite)
    print(printable(f"{path}: {len(examples)} examples, {os.path.getsize(path)} bytes"))
    print(printable(f"next: python -m llmc.evaluate MODEL --hellaswag {shlex.quote(path)}"))


def prepare_dataset(args: argparse.Namespace) -> None:
    """Make the shards of `prepare NAME|FILE ...` and print how to train on them."""
    from llmc.data.prepare import prepare

    train, val, files, notices = prepare(
        args.names, args.tokenizer, args.out, args.val_fraction, args.split, args.field, args.shard_size, args.overwrite
    )
    for file in files:
        done = "wrote" if file.written else "unchanged:"
        print(printable(f"{done} {file.path}: {file.num_tokens} tokens, {file.num_bytes} bytes"))
    for notice in notices:
        print(printable(notice))
    train_flags = ["-i", train]
    if val:
        train_flags += ["-j", val]
    if args.tokenizer != "gpt2":
        train_flags += ["--tokenizer", args.tokenizer]
    print(printable(f"next: python -m llmc.train {shlex.join(train_flags)}"))


@command("llmc.data")
def main(argv: list[str] | None = None) -> int:
    """python -m llmc.data prepare ...; returns the exit code."""
    args = parser().parse_args(argv)
    if args.names[0] == "hellaswag":
        prepare_eval_set(args)
    else:
        prepare_dataset(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
