"""The one exception that means "the user can put this right", and what to tell of any other."""

import difflib
import sys
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


def explain(error: Exception) -> str | None:
    """What to tell the user of an error; None for one that is a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    # Of a process of a DataLoader that is gone, torch tells in several ways.
    told = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    cut_off = isinstance(error, FileNotFoundError) and not error.filename
    if told or cut_off or isinstance(error, ConnectionError | EOFError):
        return (
            "a process that decodes images was killed, as it is when memory runs out; run again, "
            "with fewer workers or a smaller max_pixels if it happens again"
        )
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or first_line(error)}{where}"
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; use a smaller batch_size or image_size, or --device cpu"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; use fewer workers, or a smaller batch_size or max_pixels"
    return None
