"""Hooks of mkdocs: pages that do not lie in docs/, and links that leave it."""

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
"""Pages outside docs/, by what the site calls them."""
FENCE = re.compile(r"^```(\w+) .*$", re.MULTILINE)
"""A block whose second word says that a test runs it; to Markdown's extension it is no block."""
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=within(text, (ROOT / source).parent)))
    return files


def on_page_markdown(markdown: str, page, **_: object) -> str:
    """Turn the links of a page of docs/ into those of the site."""
    if page.file.generated_by:
        return markdown
    return within(markdown, ROOT / "docs")


def within(text: str, folder: Path) -> str:
    """A text whose links lead to pages of the site; files that are none become their names."""

    def link(match: re.Match) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        page = PAGES.get(path) or path.removeprefix("docs/")
        if path in PAGES or path.startswith("docs/"):
            return f"[{words}]({page}{anchor})"
        return words if path in words else f"{words} (`{path}`)"

    return LINK.sub(link, FENCE.sub(r"```\1", text))
