"""Text from a checkpoint: `python -m llmc.generate runs/shakespeare-001 --prompt "ROMEO:"`."""

import sys

from llmc import loading
from llmc.command import Parser, add_device_flags, command, named, natural, number, positive, random_state


def parser() -> Parser:
    p = Parser(prog="llmc.generate", description="Continue a text with a trained model.", allow_abbrev=False)
    p.add_argument("model", type=named, help=loading.MODEL_HELP)
    p.add_argument("-p", "--prompt", default="", help="text to continue (default: none, a fresh start)")
    p.add_argument("-g", "--tokens", type=positive, default=256, help="tokens to generate (256)")
    p.add_argument("--temperature", type=number, default=0.8, help="0 is greedy, 1 the model's own distribution (0.8)")
    p.add_argument("--top-k", type=natural, default=0, help="draw from the k most likely tokens only (0 = off)")
    p.add_argument("--seed", type=random_state, default=1337, help="the same seed gives the same text (1337)")
    p.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="default: by the size of the model's vocabulary")
    add_device_flags(p.add_argument)
    return p


@command("llmc.generate")
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    import llmc

    model = llmc.load(args.model, llmc.device(args.device, args.threads), dtype=args.dtype)
    drawn = model.stream(args.prompt, args.tokens, args.temperature, args.top_k, args.seed, args.tokenizer)
    sys.stdout.write(args.prompt)
    for text in drawn:
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
