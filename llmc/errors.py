"""The one exception that a user is meant to see."""


def printable(text: str) -> str:
    """The text with control characters escaped: what stands in a file's name must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, value, limit, HINT.

    Every command turns it into that line on stderr and an exit code, 2 for most, without a traceback.
    """

    code = 2

    def __init__(self, message: str = ""):
        super().__init__(printable(message))
