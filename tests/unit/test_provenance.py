import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cdul_steps
from cdul_steps.provenance import source_digest, versions

PACKAGE = Path(cdul_steps.__file__).parent
STEPS = ("label", "evaluate", "similarity", "encode", "train", "manifest")
PROGRAM = f"""
from cdul_steps.provenance import source_digest
for step in {STEPS}:
    print(step, source_digest("cdul_steps.steps." + step))
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package that a test may change."""
    ignore = shutil.ignore_patterns("tiny-clip", "__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignore))


def digests(package):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split() for line in done.stdout.splitlines())


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def changed_steps(package, change):
    before = digests(package)
    change()
    after = digests(package)
    return {step for step in STEPS if before[step] != after[step]}


def test_a_copy_has_the_same_digests(package):
    found = digests(package)
    assert found == {step: source_digest(f"cdul_steps.steps.{step}") for step in STEPS}
    assert len(set(found.values())) == len(STEPS)


def test_comments_docstrings_and_layout_do_not_count(package):
    path = package / "method" / "aggregation.py"

    def change():
        edit(path, '"""The whole image\'s scores', '"""Another text')
        edit(path, "    half = np.float32(0.5)", "    # a comment\n\n    half = (np.float32(0.5))")
        edit(path, '"""From CLIP\'s scores to pseudo-labels', '"""Something else')

    assert changed_steps(package, change) == set()


def test_code_counts_for_the_steps_that_import_it(package):
    path = package / "method" / "aggregation.py"
    steps = changed_steps(package, lambda: edit(path, "np.float32(0.5)", "np.float32(0.4)"))
    assert {"label", "evaluate"} <= steps
    assert not {"encode", "similarity", "manifest"} & steps


def test_code_counts_through_several_imports(package):
    path = package / "data" / "files.py"
    edits = changed_steps(package, lambda: edit(path, "digest_size=16", "digest_size=8"))
    assert {"label", "evaluate", "similarity", "manifest"} <= edits


def test_the_config_does_not_count(package):
    path = package / "config.py"
    assert changed_steps(package, lambda: edit(path, "2000, ge=1", "2001, ge=1")) == set()


def test_versions():
    found = versions("numpy")
    assert list(found) == ["cdul", "python", "numpy"]
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert found["cdul"] == cdul_steps.__version__ == importlib.metadata.version("cdul-steps")


def git_state_of(package):
    program = "from cdul_steps.provenance import git_state; print(git_state())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_itself(package):
    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x"]
        command = ["git", "-C", str(package.parent), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert git_state_of(package) == "None"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    state = git_state_of(package)
    assert len(state) == 12 and commit.startswith(state)
    edit(package / "errors.py", "The one exception", "One exception")
    assert git_state_of(package) == f"{state}-dirty"


def test_an_environment_in_another_projects_repository_has_no_commit(package, tmp_path):
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    inner = tmp_path / "site-packages"
    inner.mkdir()
    assert git_state_of(Path(shutil.move(package, inner))) == "None"
