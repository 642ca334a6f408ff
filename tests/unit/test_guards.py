"""The benchmark that takes guards out finds each where it is."""

from collections import Counter
from pathlib import Path

import pytest
from mutate_guards import GUARDS, Guard, take_out

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.against)
def test_a_guard_and_its_test_are_there(guard):
    assert (ROOT / guard.file).read_text(encoding="utf-8").count(guard.old) == 1
    file, _, name = guard.test.partition("::")
    tests = (ROOT / "tests/unit" / file).read_text(encoding="utf-8")
    assert f"def {name.partition('[')[0]}(" in tests


def test_every_family_has_a_guard():
    families = Counter(guard.family for guard in GUARDS)
    assert set(families) == {"images", "data", "models", "faults", "security", "fuzz"}


def test_a_guard_that_no_test_misses_is_noticed(tmp_path):
    (tmp_path / "tests/unit").mkdir(parents=True)
    (tmp_path / "tests/unit/test_it.py").write_text(
        "def test_one(): pass\ndef test_two(): assert 'True' in open('it.py').read()\n"
    )
    (tmp_path / "it.py").write_text("guarded = True\n")
    for test, found in (("test_one", "passes"), ("test_two", "fails")):
        guard = Guard("images", "", "it.py", "True", "False", f"test_it.py::{test}")
        assert take_out(tmp_path, guard, 600) == found
    assert (tmp_path / "it.py").read_text() == "guarded = True\n"
