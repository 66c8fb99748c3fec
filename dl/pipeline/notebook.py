"""What a notebook is to its stage: cells, parameters, and the modules of ``dl`` that its code imports."""
from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import dl


class StageError(RuntimeError):
    """A stage cannot run or failed; the message says what to do next."""


def read_notebook(path: Path) -> list[dict]:
    """The cells of a notebook with their ``source`` as one string.

    Raises:
        StageError: the file is no notebook.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"notebooks/{path.name} is not a notebook ({type(error).__name__}): git checkout -- notebooks") from None


def parameter_names(path: Path) -> list[str]:
    """Names assigned in the cell tagged ``parameters``.

    Raises:
        StageError: no such cell, or it does not set ``profile`` (papermill itself would only warn).
    """
    tagged = [cell for cell in read_notebook(path) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise StageError(f"notebooks/{path.name} has {len(tagged)} cells tagged 'parameters': it needs exactly one")
    body = ast.parse(tagged[0]["source"]).body
    names = [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)]
    if "profile" not in names:
        raise StageError(f"notebooks/{path.name}: the cell tagged 'parameters' does not set 'profile'")
    return names


def imported_modules(source: str, package: Path, inside: str = "") -> set[Path]:
    """Files of the package that Python ``source`` imports, and those they import in turn.

    ``from dl import ClapEncoder`` leads to the module that defines it, ``import dl`` to all, ``from dl.peers import build`` to the
    whole sub-package (a registry imports by name). ``dl/__init__.py``, which only points to the others, is left out.

    Args:
        source: of a notebook or module; lines that begin with % or ! are skipped, and what is not Python leads to all modules.
        package: the folder ``dl``.
        inside: dotted name of the package that ``source`` belongs to, for relative imports.
    """
    every = {path for path in package.rglob("*.py") if path != package / "__init__.py"}
    try:
        tree = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE))
    except SyntaxError:
        return every
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside.split(".")[: len(inside.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                name = f"{origin}.{dl.EXPORTS.get(alias.name, alias.name) if origin == 'dl' else alias.name}"
                names.add(name if origin == "dl" or place(name, package).with_suffix(".py") in every else origin)
    if "dl" in names or "dl.*" in names:
        return every
    found = {place(name, package) for name in names if name.startswith("dl.")}
    return {path for path in every if path.with_suffix("") in found or found & set(path.parents)}


def place(name: str, package: Path) -> Path:
    """Where ``dl.a.b`` stands below the folder of ``dl``, without a suffix: a module's file or a package's folder."""
    return package.joinpath(*name.split(".")[1:])


def module_closure(source: str, package: Path) -> list[Path]:
    """``imported_modules`` repeated until nothing new is found; sorted."""
    found: set[Path] = set()
    queue = imported_modules(source, package)
    while queue:
        path = queue.pop()
        found.add(path)
        inside = ".".join(path.relative_to(package.parent).parent.parts)
        queue |= imported_modules(path.read_text(encoding="utf-8"), package, inside) - found
    return sorted(found)
