import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cdul_steps
from cdul_steps.provenance import source_digest, versions

PACKAGE = Path(cdul_steps.__file__).parent
STEPS = {
    "label": ("steps.label", "make_labels"),
    "evaluate": ("steps.evaluate", "evaluate_labels"),
    "similarity": ("steps.similarity", "make_similarity"),
    "encode": ("steps.encode", "encode_shard"),
    "train": ("steps.train", "train_classifier"),
    "manifest": ("steps.manifest", "make_manifest"),
}
PROGRAM = f"""
from cdul_steps.provenance import source_digest
for step, (module, function) in {STEPS}.items():
    print(step, source_digest(f"cdul_steps.{{module}}", function))
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package for a test to change."""
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


def rename(package, old, new):
    """Rename a definition or a module wherever it occurs."""
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(rf"\b{old}\b", new, text), encoding="utf-8")


def changed_steps(package, change):
    before = digests(package)
    change()
    after = digests(package)
    return {step for step in STEPS if before[step] != after[step]}


def test_a_copy_has_the_same_digests(package):
    found = digests(package)
    assert found == {
        step: source_digest(f"cdul_steps.{module}", function)
        for step, (module, function) in STEPS.items()
    }
    assert len(set(found.values())) == len(STEPS)


def test_comments_docstrings_annotations_and_layout_do_not_count(package):
    path = package / "method" / "aggregation.py"

    def change():
        edit(path, '"""The whole image\'s scores', '"""Another text')
        edit(path, "    half = np.float32(0.5)", "    # a comment\n\n    half = (np.float32(0.5))")
        edit(path, '"""The global-local aggregator', '"""Something else')
        edit(path, "(local: np.ndarray, zeta: float) -> np.ndarray", "(local, zeta)")

    assert changed_steps(package, change) == set()


def test_a_module_that_moves_does_not_count(package):
    """Nor does another name for the module, its folder, or its definitions."""

    def change():
        (package / "elsewhere").mkdir()
        (package / "method/aggregation.py").rename(package / "elsewhere/joining.py")
        (package / "elsewhere/__init__.py").touch()
        rename(package, r"cdul_steps\.method\.aggregation", "cdul_steps.elsewhere.joining")
        rename(package, "build_labels", "construct_labels")
        rename(package, "ClassStatistics", "StatisticsOfClasses")

    assert changed_steps(package, change) == set()


def test_a_function_that_moves_does_not_count(package):
    """From one module to another, with its imports."""
    old, new = package / "data/files.py", package / "data/written.py"
    before = old.read_text(encoding="utf-8")
    start = before.index("def write_if_changed")
    function = before[start : before.index("\n\n\n", start)]

    def change():
        old.write_text(before.replace(function, "from cdul_steps.data.written import x"))
        new.write_text(
            "from pathlib import Path\n\nfrom cdul_steps.data import files\n\nx = 1\n\n\n"
            + function.replace("replacing(", "files.replacing(")
        )
        edit(
            package / "steps/manifest.py",
            "from cdul_steps.data.files import write_if_changed",
            "from cdul_steps.data.written import write_if_changed",
        )

    assert changed_steps(package, change) == set()


def test_code_that_a_step_does_not_lead_to_does_not_count(package):
    path = package / "data/files.py"
    steps = changed_steps(package, lambda: edit(path, "CLOCKS_DIFFER = 60", "CLOCKS_DIFFER = 61"))
    assert steps == set()


def test_code_counts_for_the_steps_that_lead_to_it(package):
    path = package / "method" / "aggregation.py"
    steps = changed_steps(package, lambda: edit(path, "np.float32(0.5)", "np.float32(0.4)"))
    assert steps == {"label", "evaluate"}


def test_code_counts_through_several_calls_and_tables_of_functions(package):
    def change():
        edit(package / "method/metrics.py", "hits / len(positive)", "hits / 2")

    assert changed_steps(package, change) == {"evaluate", "train"}


def test_what_a_module_does_on_import_counts(package):
    path = package / "data/images.py"
    text = path.read_text(encoding="utf-8")
    steps = changed_steps(package, lambda: path.write_text(f"{text}\nImage.init()\n"))
    assert steps == {"encode", "train", "manifest"}


def test_the_fields_of_a_dataclass_count(package):
    path = package / "models/classifier.py"
    steps = changed_steps(
        package,
        lambda: edit(
            path,
            "threshold: Annotated[float, Field(ge=0, le=1)",
            "threshold: Annotated[float, Field(ge=0, le=2)",
        ),
    )
    assert steps == {"train"}


def test_the_config_does_not_count(package):
    path = package / "config.py"
    assert changed_steps(package, lambda: edit(path, "2000, ge=1", "2001, ge=1")) == set()


def test_what_was_encoded_by_the_first_release_is_not_encoded_again():
    """A change of code that `encode` uses fails here: check whether the results stay the same.

    If they do, replace the digest in SAME_RESULTS by the new one. If not, remove that entry and
    this test, and say in the changelog that everything is encoded again.
    """
    assert source_digest("cdul_steps.steps.encode", "encode_shard") == "79d221a7dc04ce0c"


def test_no_such_function():
    with pytest.raises(LookupError, match=r"has no make_label$"):
        source_digest("cdul_steps.steps.label", "make_label")
    with pytest.raises(LookupError, match="no module"):
        source_digest("cdul_steps.steps.labels", "make_labels")


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
    edit(package / "errors.py", "The exception for", "One exception")
    assert git_state_of(package) == f"{state}-dirty"


def test_an_environment_in_another_projects_repository_has_no_commit(package, tmp_path):
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    inner = tmp_path / "site-packages"
    inner.mkdir()
    assert git_state_of(Path(shutil.move(package, inner))) == "None"
