"""The rooms of common/ and the direction of their imports; lengths that keep files and functions readable."""

import ast
import graphlib

import pytest

from tests.conftest import ROOT

ROOMS = ("data", "models", "retrieval", "report")
SCRIPTS = tuple(path.stem for path in ROOT.glob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("common", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
} | {name: ROOT / f"{name}.py" for name in SCRIPTS}
FILES = sorted({*MODULES.values(), *(ROOT / "tests").rglob("*.py")})


def imports_of(path) -> set[str]:
    """The modules of this repository that a file imports, also inside functions and by a literal name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found & MODULES.keys()


def room_of(module: str) -> int:
    """0 for the files directly in common/, which every room may import."""
    parts = module.split(".")
    return 1 + ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else 0


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("common")])
def test_a_room_imports_only_from_rooms_before_it(module):
    for imported in imports_of(MODULES[module]):
        assert imported.startswith("common"), f"{module} imports {imported}"
        assert room_of(imported) <= room_of(module), f"{module} imports {imported}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imports_of(path) - {name} for name, path in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_files_and_functions_are_short(path):
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    limit = {"siamese.py": 200, "cnn_feature_extraction.py": 200, "autoencoder.py": 230}.get(name, 300)
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (45 if name.startswith("common/") else 60), node.name
