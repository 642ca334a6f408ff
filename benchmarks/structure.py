"""Measures of the package's structure: sizes and parameters of functions, and imports.

    python benchmarks/structure.py [FOLDER OF THE PACKAGE]

`cli.py` has one parameter per option, so its functions are not included in the parameter counts.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

FLOORS = (
    ("cli",),
    ("steps", "tools"),
    ("report", "training", "gallery", "demo"),
    ("models",),
    ("data",),
    ("config", "variants"),
    ("method",),
    ("results", "limits", "errors", "progress", "provenance"),
)
"""Layers from top to bottom: imports go downwards, or stay within a layer."""
PARAMETERS, LINES = 8, 80


def functions(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Name, number of parameters and number of lines of each function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            of = node.args
            count = len(of.posonlyargs) + len(of.args) + len(of.kwonlyargs)
            yield node.name, count, node.end_lineno - node.lineno + 1


def imports(tree: ast.Module, package: str) -> set[str]:
    """Modules of the package that a module imports, without the package's name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}."):
            module = node.module.removeprefix(package).removeprefix(".")
            found |= {module} if module else {alias.name for alias in node.names}
    return found


def measure(folder: Path) -> dict[str, object]:
    """All measures of the package in `folder`."""
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    sizes, upwards, between = {}, [], []
    for file in sorted(folder.rglob("*.py")):
        module = ".".join(file.relative_to(folder).with_suffix("").parts)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        sizes |= {f"{module}.{name}": size for name, *size in functions(tree)}
        room = module.partition(".")[0]
        for other in sorted(imports(tree, folder.name)):
            target = other.partition(".")[0]
            if room == target == "steps":
                between.append(f"{module} -> {other}")
            elif floors.get(target, len(FLOORS)) < floors.get(room, -1):
                upwards.append(f"{module} -> {other}")
    many = {
        name: count
        for name, (count, _) in sizes.items()
        if count > PARAMETERS and not name.startswith("cli.")
    }
    longest = max(sizes, key=lambda name: sizes[name][1])
    return {
        "functions": len(sizes),
        f"more than {PARAMETERS} parameters": many,
        f"more than {LINES} lines": {n: lines for n, (_, lines) in sizes.items() if lines > LINES},
        "longest": {longest: sizes[longest][1]},
        "imports upwards": upwards,
        "steps that import steps": between,
    }


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "cdul_steps"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    print(json.dumps(measure(folder.resolve()), indent=2))
