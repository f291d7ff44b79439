"""llmc: GPT-2 training in plain Python over hand-written kernels (a port of llm.c)."""

import functools
import os
import sys

__version__ = "0.1.0"


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, value, limit, HINT.

    Every command turns it into that line on stderr and exit code 2, without a traceback.
    """


def command(name):
    """Decorate a command's main(argv) -> exit code: a UserError or Ctrl-C ends it with one line, not a traceback."""

    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            try:
                return main(argv)
            except UserError as error:
                print(f"{name}: error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"{name}: interrupted", file=sys.stderr)
                return 2
            except BrokenPipeError:  # the reader of our output went away, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1

        return run

    return decorate
