"""The rooms of the package: which may import which, no circles, nothing too long (docs/architecture.md).

Every import counts, those within functions too; only those under ``if TYPE_CHECKING`` are never run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "ncsn_fast"
# The package's folders by the names of their packages; that of a name within another comes first.
FOLDERS = {
    f"{PACKAGE}.kernels": ROOT / "kernels",
    f"{PACKAGE}.benchmarks": ROOT / "benchmarks",
    PACKAGE: ROOT / PACKAGE,
}

# From the bottom. A room may import from itself and from the floors below its own, not from its neighbours. Names in
# one string are one room; "package" is ncsn_fast itself, whose __version__ alone may be read from everywhere.
FLOORS = (
    ("checks files streams distributed progress embeddings threads memory",),
    ("ops kernels",),
    ("data", "info"),
    ("schedules",),
    ("losses", "sampling"),
    ("models",),
    ("training", "evaluation", "plots", "nn"),
    ("demos",),
    ("cli benchmarks",),
    ("package",),
    ("__main__",),
)
FLOOR = {name: i for i, floor in enumerate(FLOORS) for room in floor for name in room.split()}
ROOM = {name: room for floor in FLOORS for room in floor for name in room.split()}

MOST_FILES, MOST_LINES, MOST_CLASS, MOST_FUNCTION = 12, 400, 250, 80  # in ncsn_fast/; lines each
REASON = "Longer than 400 lines because"
HEAD = 40  # lines in which it must stand

Import = tuple[str, str, int]  # the module that imports, the one imported, the line


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from run_nodes(other)
        else:
            yield node
            yield from run_nodes(node)


def imports(name: str, source: str, is_package: bool) -> Iterator[Import]:
    """What a module imports of the package; a name that is no module counts for the module that it is taken from."""
    for node in run_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + is_package]
            origin = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            within = (f"{origin}.{alias.name}" for alias in node.names)
            # The version is read everywhere; it stands in the first lines of the package's own module.
            targets = [
                target if target in MODULES else origin
                for target in within
                if target != f"{PACKAGE}.__version__"
            ]
        else:
            continue
        yield from ((name, target, node.lineno) for target in targets if target in MODULES)


def all_imports() -> list[Import]:
    return [
        found
        for name, path in MODULES.items()
        for found in imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    ]


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "package"


def upward(found: list[Import]) -> list[str]:
    """Imports that the floors forbid."""
    return [
        f"{MODULES[name].relative_to(ROOT)}:{line} ({room(name)}) imports {target} ({room(target)})"
        for name, target, line in found
        if ROOM[room(name)] != ROOM[room(target)] and FLOOR[room(target)] >= FLOOR[room(name)]
    ]


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_no_import_goes_up():
    assert not upward(all_imports())


def test_no_circle_of_modules():
    graph: dict[str, set[str]] = {}
    for name, target, _ in all_imports():
        graph.setdefault(name, set()).add(target)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..models import ncsn", ["models.ncsn"]),
        ("def f():\n    from ncsn_fast.models.ncsn import NCSN", ["models.ncsn"]),
        ("from .dispatch import resolve\nimport torch", ["ops.dispatch"]),
        ("from .. import __version__", []),
        ("from .. import NCSN", [""]),
        (
            "if TYPE_CHECKING:\n    from ..models import ncsn\nelse:\n    import ncsn_fast.cli",
            ["cli"],
        ),
        ("if typing.TYPE_CHECKING:\n    from ..models import ncsn", []),
    ],
)
def test_how_imports_are_found(source, found):
    targets = [target for _, target, _ in imports(f"{PACKAGE}.ops.autograd", source, False)]
    assert targets == [f"{PACKAGE}.{name}".rstrip(".") for name in found]
    assert len(upward([(f"{PACKAGE}.ops.autograd", t, 1) for t in targets])) == sum(
        not name.startswith("ops") for name in found
    )


# --- sizes ----------------------------------------------------------------------------------------


def test_few_files_lie_beside_the_rooms():
    built = (".so", ".pyd", ".pyc")
    files = [p for p in (ROOT / PACKAGE).iterdir() if p.is_file() and p.suffix not in built]
    assert len(files) <= MOST_FILES, sorted(p.name for p in files)


def definitions() -> Iterator[tuple[str, ast.AST, int]]:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield where, node, node.end_lineno - first_line(node) + 1


def first_line(node: ast.AST) -> int:
    """Of what is counted: a whole class; of a function what it does, without its signature and docstring.

    The options of a command and the arguments of a public function take a line or two each.
    """
    if isinstance(node, ast.ClassDef):
        return node.lineno
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[0].lineno if body else node.end_lineno


def test_no_class_and_no_function_is_too_long():
    most = {ast.ClassDef: MOST_CLASS}
    assert not {
        where: lines
        for where, node, lines in definitions()
        if lines > most.get(type(node), MOST_FUNCTION)
    }


def test_no_file_is_too_long_without_a_reason_in_its_head():
    sources = [*MODULES.values(), *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    assert len(sources) > len(MODULES)
    too_long = {}
    for path in sources:
        lines = path.read_text(encoding="utf-8").splitlines()
        reason = any(re.match(rf"[\s/*#]*{REASON} \S", line) for line in lines[:HEAD])
        if len(lines) > MOST_LINES and not reason:
            too_long[path.relative_to(ROOT).as_posix()] = len(lines)
    assert not too_long


def test_heads_name_files_that_are_there():
    """``name.py`` in a head is a file beside the module, or given from the package's or the project's folder."""
    lost = {}
    for path in MODULES.values():
        head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        roots = (path.parent, ROOT / PACKAGE, ROOT, ROOT / "benchmarks")
        names = re.findall(r"``([\w./]+\.(?:py|h|cu|cpp|cuh))``", head)
        missing = [name for name in names if not any((root / name).is_file() for root in roots)]
        if missing:
            lost[path.relative_to(ROOT).as_posix()] = missing
    assert not lost


# --- the page -------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "architecture.md"


def test_the_page_names_every_room_in_the_order_of_the_floors():
    table = PAGE.read_text(encoding="utf-8").split("## The rooms")[1].split("\n## ")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")][2:]
    named = [name.rstrip("/") for cell in cells for name in re.findall(r"`([a-z_]+/?)`", cell)]
    rooms = [name for name in named if name not in ("csrc", PACKAGE)]
    below_package = [name for name in FLOOR if FLOOR[name] < FLOOR["package"]]
    assert sorted(rooms) == sorted(below_package)
    assert [FLOOR[name] for name in rooms] == sorted(FLOOR[name] for name in rooms)


def test_the_page_names_files_that_are_there():
    text = PAGE.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:ncsn_fast|csrc|kernels|tests|benchmarks)/[\w./]*)`", text)
    assert len(paths) > 15
    for path in paths:
        if "NAME" not in path:
            assert (ROOT / path).exists(), path
    samplers = (ROOT / PACKAGE / "sampling" / "samplers.py").read_text(encoding="utf-8")
    registry = (ROOT / PACKAGE / "models" / "registry.py").read_text(encoding="utf-8")
    assert "\nSAMPLERS" in samplers and "\nNETWORKS" in registry


def test_no_two_test_files_have_one_name():
    """Pytest would refuse to collect the second one of a run."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert names == sorted(set(names))
