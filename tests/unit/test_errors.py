from pathlib import Path

import pytest

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
