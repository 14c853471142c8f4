"""The rooms of common/ and the direction between them, and how long files and functions may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("", "data", "models", "retrieval", "report")  # each imports from those before it; "": directly in common/
MAX_FILE, MAX_FUNCTION, MAX_FUNCTION_IN_COMMON = 300, 60, 45  # lines
MAX_SCRIPT = {"siamese.py": 200, "cnn_feature_extraction.py": 200, "autoencoder.py": 230}  # lines


def module_name(path: Path) -> str:
    """common/data/photos.py -> common.data.photos, common/data/__init__.py -> common.data"""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


FILES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "common/**/*.py", "benchmarks/**/*.py", "tests/**/*.py")
    for path in ROOT.glob(pattern)
)
MODULES = {module_name(path): path for path in FILES}
TREES = {name: ast.parse((ROOT / path).read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(tree: ast.AST, package: str) -> set[str]:
    """What a module of that package imports, also within functions, and by a literal name at run time.

    `from a import b` gives both a and a.b, as b may be a module.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0] if node.args else node.keywords[0].value
            found |= {name.value} if isinstance(name, ast.Constant) else set()
    return found


def imported_modules(name: str) -> set[str]:
    """The modules of this repository that the module imports."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = imports(TREES[name], package) & MODULES.keys()
    # `from common.data import photos` needs common.data only to find photos in it
    return {one for one in found if not any(other.startswith(f"{one}.") for other in found)}


GRAPH = {name: imported_modules(name) for name in MODULES}
IN_COMMON = sorted(name for name in MODULES if name.split(".")[0] == "common")


def room_of(module: str) -> str:
    path = MODULES[module].parts
    return path[1] if len(path) > 2 else ""


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a cycle, the first one also at the end; [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_way_to_import_is_seen():
    source = """
import a.b
from c import d as e
from . import f
from ..g import h
def late():
    import i
    importlib.import_module("j.k")
    import_module(name="l")
    import_module(dynamic)
    __import__("m")
"""
    expected = {"a.b", "c", "c.d", "top.inner", "top.inner.f", "top.g", "top.g.h", "i", "j.k", "l", "m"}
    assert imports(ast.parse(source), "top.inner") == expected


def test_a_cycle_is_found():
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_graph_is_of_this_repository():
    assert {room_of(module) for module in IN_COMMON} == set(ROOMS)
    assert "common.models.training" in GRAPH["siamese"]
    assert "common.data.synthetic" in GRAPH["common.data.sources"]  # from common.data import download, synthetic
    assert "common.data" not in GRAPH["common.data.sources"]
    assert {"siamese", "search", "app", "benchmarks.measure", "tests.conftest"} <= GRAPH.keys()


@pytest.mark.parametrize("module", IN_COMMON)
def test_a_room_imports_from_itself_and_the_rooms_before_it(module):
    allowed = ROOMS[: ROOMS.index(room_of(module)) + 1]
    inside = {one for one in GRAPH[module] if one.split(".")[0] == "common"}
    assert {one for one in inside if room_of(one) not in allowed} == set()


@pytest.mark.parametrize("module", IN_COMMON)
def test_nothing_in_common_imports_a_script(module):
    assert {one for one in GRAPH[module] if one.split(".")[0] != "common"} == set()


def test_no_modules_import_each_other_in_a_circle():
    assert find_cycle(GRAPH) == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short(path):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_SCRIPT.get(str(path), MAX_FILE)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_are_short(module):
    limit = MAX_FUNCTION_IN_COMMON if module in IN_COMMON else MAX_FUNCTION
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > limit] == []


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_common_is_imported_before_torch(script):
    """As it says how torch's threads wait. Only torch and what needs it load torch."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    lines = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [line.split()[1].split(".")[0] for line in lines]
    assert names.index("common") < next((place for place, name in enumerate(names) if name.startswith("torch")), 99)
