"""Write the tables of the results pages from docs/tables/*.tsv.

    python experiments/tables.py [--check]

In each page of docs/, the text between `<!-- table: NAME -->` and `<!-- end -->` is replaced by
docs/tables/NAME.tsv as a Markdown table. The first row of a file is the header; the cells hold
Markdown. `--check` writes nothing, names each page that differs, and exits with 1 if there is one.
"""

import argparse
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(text: str) -> str:
    """A Markdown table of tab-separated rows; short rows are filled with empty cells."""
    header, *rows = [line.split("\t") for line in text.splitlines()]
    width = len(header)
    if longer := [row for row in rows if len(row) > width]:
        raise ValueError(f"{len(longer[0])} cells under a header of {width}: {longer[0]}")
    lines = [
        "|" + "".join(f" {cell} |" if cell else " |" for cell in row + [""] * (width - len(row)))
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "---|" * width)
    return "\n".join(lines) + "\n"


def fill(page: str, folder: Path) -> str:
    """The text of a page with the tables of the files in `folder`."""

    def table(match: re.Match) -> str:
        text = (folder / f"{match[2]}.tsv").read_text(encoding="utf-8")
        return f"{match[1]}\n{markdown(text)}\n{match[3]}"

    return TABLE.sub(table, page)


def main(docs: Path, check: bool) -> int:
    """Rewrite all pages, or name those that differ; return the exit status."""
    status = 0
    for page in sorted(docs.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = fill(before, docs / "tables")
        if before != after and check:
            print(f"{page.name} differs from docs/tables; run: python experiments/tables.py")
            status = 1
        elif before != after:
            page.write_text(after, encoding="utf-8")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1")
    sys.exit(main(DOCS, parser.parse_args().check))
