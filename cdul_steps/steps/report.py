"""Stage report: the results of a run on one page with figures."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cdul_steps import __version__
from cdul_steps.data.files import check_replaceable, replacing
from cdul_steps.data.outcomes import check_failures
from cdul_steps.progress import note
from cdul_steps.provenance import git_state
from cdul_steps.report import figures
from cdul_steps.report.costs import costs
from cdul_steps.report.page import PageSection, Picture, render
from cdul_steps.report.runs import RunFolder, find_runs, read_estimate, unique_levels
from cdul_steps.report.sections import (
    SECTIONS,
    estimate_section,
    failure_section,
    overview,
    software_section,
)

PAGE = "report.html"
REPORT = (PAGE, "*/*.svg", "*/*.jpg")
"""The files of a report."""


def make_report(*, folders: Sequence[Path], output: Path, estimates: Sequence[Path] = ()) -> None:
    """Write the folder `output`: `report.html`, which is self-contained, and its figures.

    `folders` are read as by `find_runs`; missing results are left out. `estimates` are files of
    `cdul check estimate --json`. Raises UserError if the folders contain no results, if `output` is
    a folder with other contents, and for a file that is not an estimate.
    """
    runs = find_runs(folders)
    checks = [read_estimate(path) for path in estimates]
    check_replaceable(output, REPORT)
    failures = _failures(runs)
    with replacing(output, REPORT) as part, figures.style():
        part.mkdir()
        sections = [overview(runs, failures)]
        for run, depth in unique_levels(runs):
            note(f"report: {' / '.join(run.names[:depth])}")
            section, drawn = SECTIONS[depth](run)
            folder = part.joinpath(*run.names[:depth])
            section.parts += [_write(figure, folder / name) for name, figure in drawn.items()]
            sections.append(section)
        for number, check in enumerate(checks, 1):
            section, drawn = estimate_section(check)
            folder = part / f"estimates/{number}"
            section.parts += [_write(figure, folder / name) for name, figure in drawn.items()]
            sections.append(section)
        sections += [
            failure_section(failures),
            PageSection("Time, speed and memory", parts=[costs(runs)]),
            software_section(runs),
        ]
        page = render(
            sections,
            title=", ".join(" / ".join(run.names) for run in runs),
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            version=__version__,
            git=git_state(),
        )
        (part / PAGE).write_text(page, encoding="utf-8")
    note(f"report: {output / PAGE}, {len(page) / 1e6:.1f} MB")


def _write(figure: Figure, path: Path) -> Picture:
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figure, path)
    return Picture(path)


def _failures(runs: Iterable[RunFolder]) -> list[list[Any]]:
    """Data set, encoder, split, image, status and error of each image without an embedding."""
    return [
        [*run.names[:2], split, *image.values()]
        for run, depth in unique_levels(runs)
        for split in run.splits
        if depth == 2 and (tables := run.encode_tables(split))
        for image in check_failures(run.images, split, tables, 1).to_pylist()
    ]
