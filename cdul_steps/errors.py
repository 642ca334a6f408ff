"""The exception for errors that the user can fix, and messages for other exceptions."""

import difflib
import sys
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input; its message states in one line what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


def first_line(error: BaseException) -> str:
    """The system's description of an error, or the first line of its message, or its type."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `word`: the closest known word, or all of them."""
    known = sorted(known)
    if not known:
        return ""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def explain(error: Exception) -> str | None:
    """The message for the user about an error; None for a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    # Torch reports a DataLoader process that has ended in several ways.
    told = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    cut_off = isinstance(error, FileNotFoundError) and not error.filename
    if told or cut_off or isinstance(error, ConnectionError | EOFError):
        return (
            "a process that decodes images was killed, as happens when memory runs out; run again, "
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
