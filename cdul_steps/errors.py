"""The one exception that means "the user can put this right", and words for its message."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input; its message says in one line what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


def first_line(error: BaseException) -> str:
    """What the system says of an error, or else the first line of its message, or its type."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """How a message about an unknown `word` ends: with the nearest known one, or all of them."""
    known = sorted(known)
    if not known:
        return ""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
