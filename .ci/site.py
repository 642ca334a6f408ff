"""Hooks for mkdocs: pages outside docs/, and links that leave it."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "config/README.md": "config.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
"""Pages outside docs/, and their names on the site."""
FENCE = re.compile(r"^```(\w+) .*$", re.MULTILINE)
"""A block with a second word for the tests, which Markdown's extension does not recognise."""
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=within(text, (ROOT / source).parent)))
    return files


def on_page_markdown(markdown: str, page, **_: object) -> str:
    """Convert the links of a page in docs/ to those of the site."""
    if page.file.generated_by:
        return markdown
    return within(markdown, ROOT / "docs")


def within(text: str, folder: Path) -> str:
    """The text with links to pages of the site; links to other files become their names."""

    def link(match: re.Match) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        page = PAGES.get(path) or path.removeprefix("docs/")
        if path in PAGES or path.startswith("docs/"):
            return f"[{words}]({page}{anchor})"
        return words if path in words else f"{words} (`{path}`)"

    return LINK.sub(link, FENCE.sub(r"```\1", text))
