"""What a result was made by: versions of the software and digests of the code."""

import ast
import hashlib
import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path

from cdul_steps import __version__

PACKAGE = Path(__file__).parent
# They cannot change a result; the config's values are params of their own.
NEUTRAL = {f"{PACKAGE.name}.{name}" for name in ("config", "errors", "progress", "provenance")}


def versions(*packages: str) -> dict[str, str]:
    """Version of this project, of Python, and of each named package."""
    return {
        "cdul": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def git_state() -> str | None:
    """Commit of the checkout that this code is in, "-dirty" where edited; None outside of one."""
    root = PACKAGE.parent
    # Not of another project that the package is installed within.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _module_file(name: str) -> Path | None:
    base = PACKAGE.parent / Path(*name.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] == PACKAGE.name}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                s
                for s in node.body
                if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ] or [ast.Pass()]
    return tree


@cache
def _read_module(file: Path) -> tuple[str, set[str]]:
    """A module's code without comments, docstrings and layout, and what it imports of ours."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return ast.unparse(_without_docstrings(tree)), _imports(tree)


@cache
def source_digest(module: str) -> str:
    """Digest of a module's code and of all modules of this package that it imports.

    Snakemake does not see code inside an imported package, so each rule passes this as a param:
    a change of behaviour re-runs the stage. Comments, docstrings, layout and NEUTRAL modules do
    not count.
    """
    sources: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _module_file(name)
        if file is None or name in sources or name in NEUTRAL:
            continue
        sources[name], imports = _read_module(file)
        waiting.extend(imports)
    text = "\0".join(f"{name}\n{sources[name]}" for name in sorted(sources))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
