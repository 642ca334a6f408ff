"""The README's rule graph; run as a program, it updates the graph in the README."""

import re
import tempfile
from pathlib import Path

from copies import ROOT, SMALL_TRAINING, Project, copy_project

BEGIN, END = "<!-- rulegraph -->\n", "<!-- /rulegraph -->"
PLACE = re.compile(f"{BEGIN}(.*?){END}", re.DOTALL)


def picture(project: Project) -> str:
    """Mermaid graph of the rules, from Snakemake's own graph; the manifest must exist.

    It leaves out `all` and arrows that are implied by longer paths.
    """
    text = project.snakemake("--rulegraph", "mermaid-js").stdout
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", text))
    follows: dict[str, set[str]] = {name: set() for name in names.values()}
    for before, after in re.findall(r"(id\d+) --> (id\d+)", text):
        if names[after] != "all":
            follows[names[before]].add(names[after])
    # Through the checkpoint's files, which Snakemake's graph does not contain.
    follows["manifest"].add("encode")

    def reached(rule: str) -> set[str]:
        return follows[rule].union(*map(reached, follows[rule]))

    arrows = [
        f"  {rule} --> {after}"
        for rule in sorted(follows)
        for after in sorted(follows[rule] - set().union(*map(reached, follows[rule])))
    ]
    return "\n".join(["```mermaid", "flowchart LR", *arrows, "```\n"])


def main() -> None:
    """Write the graph into the README."""
    with tempfile.TemporaryDirectory() as scratch:
        project = copy_project(Path(scratch) / "project")
        project.config = {
            "datasets": {"demo": {"scenes": {"train": 2, "test": 1, "size": 64}}},
            "run": {"labels": ["final"], "trainings": ["small"]},
            "trainings": {"small": SMALL_TRAINING},
        }
        project.snakemake("results/demo/manifest/images.parquet")
        new = picture(project)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(PLACE.sub(lambda _: BEGIN + new + END, text), encoding="utf-8")


if __name__ == "__main__":
    main()
