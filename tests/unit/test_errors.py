import signal
from pathlib import Path

import pytest

from cdul_steps.cli import _stop
from cdul_steps.errors import first_line, nearest


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(" \n"), "ValueError"),
        (KeyError(), "KeyError"),
        (OSError(28, "No space left on device", "file"), "No space left on device"),
        (OSError("of a library\nsecond line"), "of a library"),
    ],
)
def test_first_line(error, line):
    assert first_line(error) == line


def test_first_line_leaves_the_path_to_the_message():
    with pytest.raises(OSError) as caught:
        Path("nowhere").read_bytes()
    assert first_line(caught.value) == "No such file or directory"


def test_nearest():
    assert nearest("clowds", ["sky", "clouds"]) == "; did you mean 'clouds'?"
    assert nearest("zzz", ["sky", "clouds"]) == "; known: clouds, sky"
    assert nearest("zzz", []) == ""


def test_signals_keep_a_handler_when_a_command_is_told_to_stop():
    """Python prints a traceback for a signal that has arrived if its handler is the default."""
    numbers = (signal.SIGTERM, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    try:
        with pytest.raises(SystemExit):
            _stop()
        assert all(callable(signal.getsignal(number)) for number in numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
