"""The one way in which matching a text and its tokens can fail."""

from pear.io import DataError


class Unaligned(DataError):
    """A row's tokens cannot be placed in its text without guessing. `reason` is one sentence, without file or line."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
