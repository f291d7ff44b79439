"""The one exception that a user is meant to see."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, value, limit, HINT.

    Every command turns it into that line on stderr and exit code 2, without a traceback.
    """
