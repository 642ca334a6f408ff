"""The one exception that means "the user can put this right"."""


class UserError(Exception):
    """A mistake in the input; its message says in one line what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
