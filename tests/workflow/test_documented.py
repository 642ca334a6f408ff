"""docs/data.md and the README's rule graph, compared with a real run."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import launcher
import pyarrow.parquet as pq
import pytest
from copies import ROOT, Project
from rulegraph import PLACE, picture

TEXT = (ROOT / "docs/data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `(\S+)`\n(.*?)(?=^### |\Z)", TEXT, re.MULTILINE | re.DOTALL))
TYPES = {"list<element: int32>": "list of int32", "list<element: string>": "list of string"}
TYPES |= {"list<element: float>": "list of float", "large_string": "string"}


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    """A copy of the demo run, with a sweep and an ablation."""
    folder = tmp_path_factory.mktemp("whole") / "project"
    shutil.copytree(demo.folder, folder)
    (folder / "variants.csv").write_text("variant\nfixed\n")
    ablation = {"training": "small", "table": "variants.csv", "seeds": [0]}
    sweep = {"tau": [1], "zeta": [0.3], "lambda": [0]}
    project = Project(folder, {**demo.config, "ablation": ablation, "sweep": sweep})
    project.snakemake("sweep", "ablation")
    return project


def rows(section: str, first: str) -> dict[str, list[str]]:
    """A section's table with this first column heading: names to the other cells."""
    found = {}
    for head, body in re.findall(r"^\| (\w+) \|.*\n\|[-|]+\n((?:\|.*\n)+)", section, re.MULTILINE):
        for line in body.splitlines() if head == first else ():
            names, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            for name in re.findall(r"`([^`]+)`", names) or [names]:
                found[name] = cells
    return found


def files(results: Path, pattern: str) -> list[Path]:
    return sorted(results.glob(re.sub(r"\{\w+\}", "*", pattern)))


def split_optional(documented: dict[str, list[str]]) -> tuple[set[str], set[str]]:
    """The names that a file always has, and those that it sometimes has."""
    sometimes = {name for name, cells in documented.items() if cells[-1].startswith("only")}
    return set(documented) - sometimes, sometimes


def check_names(found: set[str], documented: dict[str, list[str]]) -> None:
    always, sometimes = split_optional(documented)
    assert found - sometimes == always


@pytest.mark.parametrize("pattern", SECTIONS)
def test_documented_files_are_as_they_are_documented(whole, pattern):
    section, found = SECTIONS[pattern], files(whole.results, pattern)
    assert found, "no such file"
    for path in found:
        if path.suffix == ".parquet":
            schema = pq.read_schema(path)
            facts = json.loads(schema.metadata[b"cdul"])
            columns = rows(section, "column")
            of_classes = set(facts["classes"]) if "each class" in columns else set()
            names = {"each class" if name in of_classes else name for name in schema.names}
            check_names(names, columns)
            for name in schema.names:
                kind = str(schema.field(name).type)
                documented = columns["each class" if name in of_classes else name][0]
                assert TYPES.get(kind, kind) == documented, name
            check_names(set(facts) - {"kind", "schema_version"}, rows(section, "fact"))
        elif path.suffix == ".zarr":
            store = json.loads((path / "zarr.json").read_text())
            check_names(set(store["attributes"]), rows(section, "attribute"))
            assert store["data_type"] in section
        elif path.suffix == ".json":
            check_names(set(json.loads(path.read_text())), rows(section, "key"))


def test_no_file_is_left_out(demo):
    documented = {path for pattern in SECTIONS for path in files(demo.results, pattern)}
    for path in demo.results.rglob("*"):
        known = path in documented or documented & set(path.parents)
        elsewhere = path.relative_to(demo.results).parts[0] in ("logs", "benchmarks")
        scenes = "scenes" in path.relative_to(demo.results).parts
        own = path.name == ".snakemake_timestamp"
        assert known or elsewhere or scenes or own or path.is_dir(), path


def test_the_picture_of_the_rules_is_true(demo):
    (drawn,) = PLACE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert drawn == picture(demo), "run make rulegraph"


# The reduced demo has other names than the full one.
SMALL = {"calibrated/aligned": "final/small", "/calibrated/": "/final/"}
RUN = [
    line
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    for block in re.findall(r"^```sh run\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_commands_marked_to_be_run_run(demo):
    assert len(RUN) > 4
    script = "\n".join(RUN)
    for whole, small in SMALL.items():
        script = script.replace(whole, small)
    path = f"{launcher.commands()}:{demo.environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euxc", script],
        cwd=demo.folder,
        env={**demo.environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problem" not in done.stdout
    for made in ("labels.csv", "review/review.csv", "gallery/index.html", "exported/model.onnx"):
        assert (demo.folder / made).is_file(), made
