"""What a result was made by: versions of the software and digests of the code."""

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
"""Modules that cannot change a result; the config's values are params of their own."""
SAME_RESULTS = {
    # encode_shard: the same bytes for the same pixels, and for JPEGs without a colour profile;
    # crops are what they were; a bias of logits is only told; archives and URLs are new.
    "3532893ebc919805": "79d221a7dc04ce0c",
}
"""Digests of code whose results are those of an earlier release, to the digest of then: what users
have encoded is not encoded again. Whoever changes such code decides whether that is still so."""


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


@dataclass
class _Module:
    """The names that a module defines and imports, and what it does when it is imported."""

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
"""What stands for a reference in a text; code has none of it."""


class _Reference:
    """Where code refers to a definition of ours."""

    def __repr__(self) -> str:
        return _GAP


@dataclass
class _Text:
    """What a piece of code says, in pieces between its references, and these in order."""

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
    """Writes down the definitions that one of them leads to, each by its place in that order."""

    def __init__(self, module: str, name: str) -> None:
        self.places: dict[tuple[str, str], int] = {}
        self.texts: list[str] = []
        self._place(module, name)
        for of in sorted({module for module, _ in self.places}):
            self.texts += sorted(self._filled(effect) for effect in _effects(of))

    def _place(self, module: str, name: str) -> str:
        """Number a definition of ours, writing it down where it is new."""
        if (module, name) not in self.places:
            place = self.places[module, name] = len(self.places)
            self.texts.append("")
            self.texts[place] = self._filled(_definition(module, name))
        return f"#{self.places[module, name]}"

    def _filled(self, text: _Text) -> str:
        return text.filled([self._place(*target) for target in text.references])


class _Reader:
    """Reads code of a module, and which definitions of ours it refers to."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.references: list[tuple[str, str]] = []

    def _refer(self, module: str, name: str) -> _Reference:
        self.references.append((module, name))
        return _Reference()

    def _named(self, dotted: str) -> _Reference | str:
        """What a dotted name stands for: a definition of ours, or the name."""
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
        """A node without docstrings, functions' annotations, imports, layout and names of ours."""
        if isinstance(node, list):
            kept = (n for n in node if not isinstance(n, ast.Import | ast.ImportFrom))
            return [self.plain(n) for n in kept if not _is_docstring(n)]
        if not isinstance(node, ast.AST):
            return node
        if isinstance(node, ast.Name | ast.Attribute) and (name := self._resolve(node)):
            return name
        skipped = {"annotation", "returns", "type_comment", "kind", "type_params", "ctx"}
        if isinstance(node, ast.ClassDef):
            # What a dataclass or a pydantic model does depends on the annotations of its fields.
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            notes = [self.plain(n.annotation) for n in fields]
        else:
            notes = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # The name of a definition of ours says nothing; that of a method does.
            own = _read_module(self.module).definitions.get(node.name, ())
            skipped |= {"name"} if node in own else set()
        values = [
            (key, self.plain(value))
            for key, value in ast.iter_fields(node)
            if key not in skipped and value not in (None, [])
        ]
        return [type(node).__name__, *notes, *values]

    def _resolve(self, node: ast.expr) -> _Reference | str | None:
        """What a name or a chain of attributes stands for, where it is not a local one."""
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
    """Digest of what a function of this package does: its code, and all of ours that it leads to.

    Snakemake does not see code inside an imported package, so each rule passes this as a param:
    a change of behaviour re-runs the stage. Where code lies does not count: neither the names of
    modules, functions and classes of ours, nor imports, comments, docstrings, layout, annotations
    of functions, code that the function does not lead to, or NEUTRAL modules. Raises LookupError
    where there is no such function.
    """
    if name not in _read_module(module).definitions:
        raise LookupError(f"{module}: has no {name}")
    text = "\0".join(_Digest(module, name).texts)
    found = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return SAME_RESULTS.get(found, found)
