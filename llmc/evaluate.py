"""How good a model is: `python -m llmc.evaluate MODEL_OR_RUN --hellaswag FILE`, or its loss on validation shards."""

import sys

from llmc import loading
from llmc.command import Parser, add_device_flags, command, count, named, positive
from llmc.errors import UserError


def parser() -> Parser:
    p = Parser(
        prog="llmc.evaluate",
        description="Validation loss and multiple-choice accuracy of a model.",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("model", type=named, help=loading.MODEL_HELP)
    add(
        "--verify",
        action="store_true",
        help="only read all checkpoints of a run, and tell whether their bits are right",
    )
    add(
        "--hellaswag",
        type=named,
        metavar="FILE",
        help="a multiple-choice set: llm.c's .bin, or of llmc.data prepare hellaswag",
    )
    add("-j", "--input-val-bin", type=named, metavar="GLOB", help="validation shards")
    add("-m", "--val-max-steps", type=count, default=-1, metavar="N", help="batches of them (-1 = all)")
    add("-b", "--batch-size", type=positive, default=4, metavar="B", help="rows of a batch (4)")
    add("-t", "--sequence-length", type=positive, metavar="T", help="tokens in a row (1024, or what the model allows)")
    add_device_flags(add)
    return p


@command("llmc.evaluate")
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.verify:
        from llmc.files.checkpoints import verify

        for line in verify(args.model):
            print(line)
        return 0
    if not (args.hellaswag or args.input_val_bin):
        raise UserError("nothing to evaluate on. HINT: give --hellaswag FILE, -j SHARDS, or both.")
    from tqdm import tqdm

    import llmc
    from llmc.data.loader import EveryPair
    from llmc.devices import pick_device
    from llmc.training.multiple_choice import load_examples, score, score_line
    from llmc.training.validation import validate

    path = loading.model_file(args.model)
    header = loading.model_header(path)
    B, T = args.batch_size, args.sequence_length or min(header["max_seq_len"], 1024)
    pairs, limit = None, None if args.val_max_steps == -1 else args.val_max_steps
    if args.input_val_bin:
        pairs = EveryPair(args.input_val_bin, B, T, vocab_size=header["vocab_size"], limit=limit)
    examples, notice = load_examples(args.hellaswag, header["vocab_size"], T) if args.hellaswag else ([], None)
    ops, _, device = pick_device(args.device, args.threads)
    model = llmc.load(path, ops, B, T, dtype=args.dtype)
    print(f"{path} on {device}")
    if pairs:
        print(f"val loss {validate(model, pairs):f}")
    if args.hellaswag:
        if notice:
            print(notice)
        with tqdm(total=4 * len(examples), desc="HellaSwag", unit="rows", leave=False, disable=None) as bar:
            result = score(model, examples, bar.update)
        print(score_line(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
