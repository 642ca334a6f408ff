"""The report's page: one self-contained HTML file."""

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cdul_steps.report.captions import CAPTIONS, TITLES

TYPES = {".svg": "image/svg+xml", ".jpg": "image/jpeg"}


@dataclass(frozen=True)
class Table:
    """A table with its caption; a None in a row is shown as a dash."""

    caption: str
    header: list[str]
    rows: list[list[Any]]

    @property
    def numbers(self) -> set[int]:
        """Columns that contain numbers and are right-aligned."""
        columns = enumerate(zip(*self.rows, strict=True))
        return {i for i, column in columns if not any(isinstance(v, str) for v in column)}


@dataclass(frozen=True)
class Picture:
    """A figure file; its name selects the entry of CAPTIONS."""

    path: Path

    @property
    def title(self) -> str:
        return TITLES[self.path.stem]

    @property
    def caption(self) -> str:
        return CAPTIONS[self.path.stem]

    @property
    def uri(self) -> str:
        """The file as a data URI, so that the page needs no other file."""
        content = base64.b64encode(self.path.read_bytes()).decode()
        return f"data:{TYPES[self.path.suffix]};base64,{content}"


@dataclass
class PageSection:
    """A heading and the content below it."""

    title: str
    facts: list[tuple[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Table | Picture] = field(default_factory=list)


def cell(value: Any) -> str:
    """A table value as text: floats have two decimals."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def render(sections: list[PageSection], **facts: Any) -> str:
    """The page's HTML. All text is escaped, because class and file names may contain anything."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["cell"] = cell
    return environment.get_template("page.html").render(sections=sections, **facts) + "\n"
