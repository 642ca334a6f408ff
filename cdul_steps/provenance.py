"""The provenance of results: versions of the software and digests of the code."""

import ast
import hashlib
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cdul_steps import __version__

PACKAGE = Path(__file__).parent
NEUTRAL = {f"{PACKAGE.name}.{name}" for name in ("config", "errors", "progress", "provenance")}
"""Modules that cannot change a result; the config's values are separate params."""
SAME_RESULTS = {
    # encode_shard: the same bytes for the same pixels, and for JPEGs without a colour profile;
    "192fd1b4d9630260": "79d221a7dc04ce0c",
}
"""Maps digests of code with the same results as an earlier release to that release's digest, so
that nothing is encoded again. Whoever changes such code decides whether this still holds."""


def versions(*packages: str) -> dict[str, str]:
    """Version of this project, of Python, and of each named package."""
    return {
        "cdul": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def git_state() -> str | None:
    """Commit of the checkout that contains this code, "-dirty" if edited; None without one."""
    root = PACKAGE.parent
    # Ignore the checkout of another project in which the package is installed.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class _Module:
    """The names that a module defines and imports, and its side effects on import."""

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    effects: list[ast.stmt] = field(default_factory=list)


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE.name


@cache
def _module_file(name: str) -> Path | None:
    base = PACKAGE.parent / Path(*name.split("."))
    files = (base.with_suffix(".py"), base / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def _read_module(name: str) -> _Module:
    file = _module_file(name)
    if file is None:
        raise LookupError(f"{name}: no module of {PACKAGE.name}")
    tree, module = ast.parse(file.read_text(encoding="utf-8")), _Module()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds `a`, and `import a.b as c` binds `c`.
                bound = alias.name if alias.asname else alias.name.partition(".")[0]
                module.imports[alias.asname or bound] = bound
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom) or _is_docstring(statement):
            continue
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = {statement.name}
        else:
            stored = (n for n in ast.walk(statement) if isinstance(n, ast.Name))
            names = {n.id for n in stored if isinstance(n.ctx, ast.Store)}
        for defined in names:
            module.definitions.setdefault(defined, []).append(statement)
        if not names:
            module.effects.append(statement)
    return module


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


_GAP = "\0"
"""Placeholder for a reference in a text; it never occurs in code."""


class _Reference:
    """A reference in code to a definition of this package."""

    def __repr__(self) -> str:
        return _GAP


@dataclass
class _Text:
    """The text of a piece of code, split at its references, and the references in order."""

    pieces: list[str]
    references: list[tuple[str, str]]

    def filled(self, numbers: list[str]) -> str:
        """The text with a number for each reference."""
        first, *others = self.pieces
        return first + "".join(repr(n) + text for n, text in zip(numbers, others, strict=True))


def _text(module: str, code: ast.stmt | list[ast.stmt]) -> _Text:
    reader = _Reader(module)
    return _Text(repr(reader.plain(code)).split(_GAP), reader.references)


@cache
def _definition(module: str, name: str) -> _Text:
    return _text(module, _read_module(module).definitions[name])


@cache
def _effects(module: str) -> list[_Text]:
    return [_text(module, effect) for effect in _read_module(module).effects]


class _Digest:
    """Collects all definitions that one of them uses, each numbered in order of appearance."""

    def __init__(self, module: str, name: str) -> None:
        self.places: dict[tuple[str, str], int] = {}
        self.texts: list[str] = []
        self._place(module, name)
        for of in sorted({module for module, _ in self.places}):
            self.texts += sorted(self._filled(effect) for effect in _effects(of))

    def _place(self, module: str, name: str) -> str:
        """Number a definition of this package, and record it if it is new."""
        if (module, name) not in self.places:
            place = self.places[module, name] = len(self.places)
            self.texts.append("")
            self.texts[place] = self._filled(_definition(module, name))
        return f"#{self.places[module, name]}"

    def _filled(self, text: _Text) -> str:
        return text.filled([self._place(*target) for target in text.references])


class _Reader:
    """Reads code of a module, and finds the definitions of this package that it refers to."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.references: list[tuple[str, str]] = []

    def _refer(self, module: str, name: str) -> _Reference:
        self.references.append((module, name))
        return _Reference()

    def _named(self, dotted: str) -> _Reference | str:
        """The meaning of a dotted name: a definition of this package, or the name itself."""
        module, _, name = dotted.rpartition(".")
        if not _is_ours(dotted) or module in NEUTRAL or _module_file(module) is None:
            return name if module in NEUTRAL else dotted
        found = _read_module(module)
        if name in found.definitions:
            return self._refer(module, name)
        if name in found.imports:
            return self._named(found.imports[name])
        if _module_file(dotted) is None:
            raise LookupError(f"{module}: has no {name}")
        return dotted

    def plain(self, node: object) -> object:
        """A node without docstrings, function annotations, imports, layout and our own names."""
        if isinstance(node, list):
            kept = (n for n in node if not isinstance(n, ast.Import | ast.ImportFrom))
            return [self.plain(n) for n in kept if not _is_docstring(n)]
        if not isinstance(node, ast.AST):
            return node
        if isinstance(node, ast.Name | ast.Attribute) and (name := self._resolve(node)):
            return name
        skipped = {"annotation", "returns", "type_comment", "kind", "type_params", "ctx"}
        if isinstance(node, ast.ClassDef):
            # The behaviour of dataclasses and pydantic models depends on field annotations.
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            notes = [self.plain(n.annotation) for n in fields]
        else:
            notes = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # The name of our own definition does not matter; that of a method does.
            own = _read_module(self.module).definitions.get(node.name, ())
            skipped |= {"name"} if node in own else set()
        values = [
            (key, self.plain(value))
            for key, value in ast.iter_fields(node)
            if key not in skipped and value not in (None, [])
        ]
        return [type(node).__name__, *notes, *values]

    def _resolve(self, node: ast.expr) -> _Reference | str | None:
        """The meaning of a name or a chain of attributes, unless it is local."""
        attributes: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            attributes.insert(0, inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            return None
        found = _read_module(self.module)
        if inner.id in found.definitions:
            return None if attributes else self._refer(self.module, inner.id)
        if inner.id not in found.imports:
            return None
        dotted = ".".join([found.imports[inner.id], *attributes])
        if not attributes or _module_file(dotted.rpartition(".")[0]) is not None:
            return self._named(dotted)
        return None


@cache
def source_digest(module: str, name: str) -> str:
    """Digest of the behaviour of a function: its code, and all code of this package that it uses.

    Snakemake does not see code inside an imported package, so each rule passes this as a param:
    a change of behaviour re-runs the stage. The digest ignores where code is located and the names
    of our modules, functions and classes; also imports, comments, docstrings, layout, function
    annotations, unused code, and NEUTRAL modules. Raises LookupError if there is no such function.
    """
    if name not in _read_module(module).definitions:
        raise LookupError(f"{module}: has no {name}")
    text = "\0".join(_Digest(module, name).texts)
    found = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return SAME_RESULTS.get(found, found)
