"""Ctrl-C in the training loop: the step is finished, and then the run stops."""

import signal


class Interrupt:
    """Ctrl-C sets a flag that the loop looks at between steps; a second one ends the program at once."""

    def __init__(self):
        self.seen = False
        self.previous = signal.signal(signal.SIGINT, self.handle)

    def handle(self, signum, frame):
        self.seen = True
        self.close()

    def close(self):
        signal.signal(signal.SIGINT, self.previous)
