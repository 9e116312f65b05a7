"""Imports point one way, and starting the command line stays lean."""

from __future__ import annotations

import ast
import configparser
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import from its own row and from the rows above it.
LAYERS = [
    {
        "errors",
        "files",
        "choices",
        "divergence",
        "schemas",
        "memory",
        "progress",
        "preprocess",
        "ops",
        "program",
        "launch",
        "distributed",
    },
    {"recipe", "analog", "energy", "schedule"},
    {"rewrite", "tracer"},
    {"graph", "load", "replace"},
    {"operations"},
    {"plan"},
    {"folding", "quant"},
    {"calibrate"},
    {"neuron", "network"},
    {"normalize", "workload"},
    {"checkpoint", "engine"},
    {"verify", "train", "finetune", "compensation"},
    {"reconstruction"},
    {"pipeline", "measure", "diagnosis"},
    {"report", "export", "examination"},
    {"cli"},
]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
# Beside the rows: all they may import. Names in LAZY only inside a function.
ASIDE = {"data": {"errors", "preprocess"}}
LAZY = {"data": {"model_zoo"}, "load": {"model_zoo"}, "recipe": {"model_zoo"}}
# What verify must not share with the code it judges.
APART = {"verify": {"engine", "ops", "operations", "folding", "normalize"}}
ZOO = {"timm", "torch", "numpy", "sklearn", "safetensors"}
ZOO_OWN = {"files", "load", "preprocess", "model_zoo"}


@dataclass(frozen=True)
class Import:
    """One imported module: its full name, its line, and whether it waits inside a function."""

    name: str
    line: int
    lazy: bool


def imports(source: str, package: str) -> list[Import]:
    """List the imports of a source file that lies in `package`, relative ones resolved."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parent = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parent, *([base] if base else [])])
                whole = base == "snnconv" or not child.module
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}" if whole else base, child.lineno, lazy)
            else:
                inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield from walk(child, lazy or inner)

    return list(walk(ast.parse(source), False))


def part(name: str) -> str | None:
    """Return the module of ours an import names (`engine` of `snnconv.engine.counts`).

    None for foreign packages and for plain names of snnconv, such as its version.
    """
    top, _, rest = name.partition(".")
    module = rest.partition(".")[0]
    placed = module in {*LEVEL, *ASIDE, "model_zoo"}
    file = ROOT / "snnconv" / module
    exists = bool(module) and (file.is_dir() or file.with_suffix(".py").is_file())
    return module if top == "snnconv" and (placed or exists) else None


def problems(module: str, source: str, package: str) -> list[str]:
    """Say what a module imports against the rules."""
    found = []
    for item in imports(source, package):
        where = f"{module}:{item.line} imports {item.name}"
        target = part(item.name)
        top = item.name.partition(".")[0]
        if module == "model_zoo":
            if target is not None and target not in ZOO_OWN:
                found.append(f"{where}; the zoo may use {sorted(ZOO_OWN)} of snnconv")
            elif target is None and top not in ZOO and top not in sys.stdlib_module_names:
                found.append(f"{where}; the zoo may use {sorted(ZOO)}")
            continue
        if module != "cli" and top in {"click", "rich"}:
            found.append(f"{where}; the library knows no terminal")
        if target is None or target == module or (module == "cli" and target == "model_zoo"):
            continue
        if target in LAZY.get(module, set()):
            if not item.lazy:
                found.append(f"{where}; only inside a function")
        elif module in ASIDE:
            if target not in ASIDE[module]:
                found.append(f"{where}; it may use {sorted(ASIDE[module])}")
        elif target in ASIDE:
            if module not in {"cli", "finetune", "measure", "train"}:
                found.append(f"{where}; only cli, finetune, measure and train read data")
        elif target in APART.get(module, set()):
            found.append(f"{where}; it must share no code with what it checks")
        elif target not in LEVEL:
            found.append(f"{where}, which has no place in LAYERS")
        elif LEVEL[target] > LEVEL[module]:
            found.append(f"{where}, which stands above it")
    return found


def test_the_package_is_whole() -> None:
    """Every folder with code is named in setup.cfg, or an installed package would lack it."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = set(settings["options"]["packages"].split())
    folders = (p.parent for p in (ROOT / "snnconv").rglob("__init__.py"))
    found = {".".join(f.relative_to(ROOT).parts) for f in folders}
    assert named == found | {"snnconv.cli", "snnconv.model_zoo"}


def sources() -> list[tuple[str, Path, str]]:
    """List every file of the package as (module, path, package it lies in)."""
    found = []
    for path in sorted((ROOT / "snnconv").rglob("*.py")):
        inside = path.relative_to(ROOT / "snnconv")
        if str(inside) == "__init__.py":
            continue
        package = ".".join(["snnconv", *inside.parts[:-1]])
        found.append((inside.parts[0].removesuffix(".py"), path, package))
    for folder in ("cli", "model_zoo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parent.name == "results":
                continue  # scripts that use the package, no part of it
            found.append((folder, path, f"snnconv.{folder}"))
    return found


FILES = [pytest.param(*row, id=str(row[1].relative_to(ROOT))) for row in sources()]


@pytest.mark.parametrize(("module", "path", "package"), FILES)
def test_imports_point_one_way(module: str, path: Path, package: str) -> None:
    assert module in LEVEL or module in ASIDE or module == "model_zoo", (
        f"{module} has no place in LAYERS"
    )
    assert problems(module, path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(("module", "path", "package"), FILES)
def test_library_does_not_print(module: str, path: Path, package: str) -> None:
    if module in {"cli", "model_zoo"}:
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert calls == [], f"{path} prints in lines {calls}"


def test_modules_of_one_row_import_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path, package in sources():
        found = imports(path.read_text(encoding="utf-8"), package)
        targets = {part(item.name) for item in found if not item.lazy}
        graph.setdefault(module, set()).update(t for t in targets if t and t != module)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("graph", "from snnconv.plan import ConversionPlan", "above"),
        ("graph", "def f():\n    import snnconv.engine.counts", "above"),
        ("graph", "from . import plan", "above"),
        ("quant", "import rich.table", "terminal"),
        ("verify", "from snnconv.ops import Pool", "share no code"),
        ("verify", "from snnconv import folding", "share no code"),
        ("data", "from snnconv.graph import trace", "may use"),
        ("data", "from snnconv.model_zoo import catalog", "only inside"),
        ("plan", "from snnconv.data import open_data", "only cli"),
        ("model_zoo", "import click", "zoo may use"),
        ("model_zoo", "from snnconv.quant import quantize", "zoo may use"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, word: str) -> None:
    found = problems(module, source, "snnconv")
    assert len(found) == 1
    assert word in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from snnconv.graph import trace\nfrom snnconv.errors import UsageError"),
        ("data", "def f():\n    from snnconv.model_zoo import digits"),
        ("model_zoo", "import timm, json\nfrom .digits import images"),
        ("cli", "import click\nfrom snnconv import __version__\nfrom . import console"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    package = f"snnconv.{module}" if module in {"cli", "model_zoo"} else "snnconv"
    assert problems(module, source, package) == []


@pytest.mark.parametrize(
    "code",
    [
        "import snnconv; dir(snnconv)",
        "import snnconv.energy",
        "import snnconv.cli.main, snnconv.cli.options, snnconv.cli.console",
        "import snnconv.report, snnconv.report.html, snnconv.report.markdown",
        "import snnconv.report.reading, snnconv.report.figures, snnconv.cli.report",
        "import snnconv.cli.reproduce",
    ],
)
def test_import_is_lean(code: str) -> None:
    code += "; import sys; print(sorted({'torch', 'timm', 'numpy', 'rich'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
