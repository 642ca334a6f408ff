"""pyproject.toml, requirements.lock and environment.yml agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = {
    canonicalize_name(requirement.name): requirement
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in [Requirement(text)]
}
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
CONDA = {entry.split("=")[0]: entry for entry in ENVIRONMENT if isinstance(entry, str)}
PYTHON = CONDA["python"].removeprefix("python=")
LINUX = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux"}


def version(requirement):
    """The version of a pin; only a single `==` is a pin."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return specifier.version


def pins(lines):
    """Versions by name, from the lines that apply to Linux and the environment's Python."""
    found = {}
    for line in lines:
        requirement = Requirement(re.sub(r"\s+(#|\\|--hash).*", "", line))
        if requirement.marker is None or requirement.marker.evaluate(LINUX):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice"
            found[name] = version(requirement)
    return found


LOCKED = pins(
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line.strip() and not line.startswith(("#", " ", "-"))
)
PIP = next(entry["pip"] for entry in ENVIRONMENT if isinstance(entry, dict))


@pytest.mark.parametrize("name", sorted(DIRECT))
def test_the_lock_pins_every_direct_dependency_as_the_project_allows(name):
    assert name in LOCKED
    assert LOCKED[name] in DIRECT[name].specifier


def test_the_environment_pins_the_direct_dependencies_as_the_lock_does():
    found = pins(entry for entry in PIP if not entry.startswith("-"))
    assert found == {name: LOCKED[name] for name in DIRECT}


def test_the_environment_takes_all_else_from_the_lock():
    options = [entry for entry in PIP if entry.startswith("-")]
    assert [option.split()[-1] for option in options] == ["requirements.lock"]


def test_conda_brings_python_and_pip_only():
    assert set(CONDA) == {"python", "pip"}
    assert PYTHON in SpecifierSet(PROJECT["requires-python"])
