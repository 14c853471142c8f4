"""Do the tests see faults?  pytest --full tests/robustness/test_mutants.py -n 0 -s

Single changes are made to metrics, search, split and losses, one at a time: a comparison that includes its limit or
doesn't, a sign, a number, a minimum for a maximum. A mutant that passes the tests of its module survives.
"""

import ast
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import pytest

from tests.forks import ROOT, Forks

TARGETS = {  # module: (functions that are changed, none: all; what tests it; mutants)
    "common/retrieval/metrics.py": ((), "tests/common/retrieval/test_metrics.py", 25),
    "common/retrieval/exact.py": ((), "tests/common/retrieval/test_exact.py", 20),
    "common/retrieval/rough.py": ((), "tests/common/retrieval/test_exact.py", 15),
    "common/data/split.py": ((), "tests/common/data/test_split.py tests/common/data/test_unseen.py", 20),
    "siamese.py": (("contrastive_loss",), "tests/test_siamese.py -k contrastive", 10),
    "triplet.py": (("triplet_loss", "_mean_over", "semi_hard"), "tests/test_triplet.py -k loss", 10),
    "common/models/losses.py": ((), "tests/common/models/test_losses.py", 10),
}
EQUIVALENT = {}  # mutants that change nothing that counts: why
IMPORTED = ("torch", "torchvision", "sklearn.metrics", "torchmetrics", "pytorch_metric_learning", "hypothesis", "faiss")
COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
COMPUTED |= {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "mean": "sum", "argmax": "argmin"}
CALLED |= {"minimum": "maximum", "argsort": "argmax", "ceil": "floor", "relu": "abs", "cumsum": "cumprod"}
CODE = """
import sys
sys.modules = {{name: module for name, module in sys.modules.items() if name.split(".")[0] not in ("tests", "common")}}
sys.path.insert(0, ".")
import pytest
sys.exit(pytest.main("-x -q -n 0 -p no:cacheprovider {tests}".split()))
"""


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """The attributes of a node that can be changed, and to what."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        yield "ops", [COMPARED[type(node.ops[0])](), *node.ops[1:]]
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in COMPUTED:
        yield "op", COMPUTED[type(node.op)]()
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "op", ast.UAdd()
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "value", node.value + 1
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    if isinstance(node, ast.Attribute) and node.attr in CALLED:
        yield "attr", CALLED[node.attr]
    if isinstance(node, ast.Name) and node.id in CALLED:
        yield "id", CALLED[node.id]
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "test", ast.UnaryOp(ast.Not(), node.test)


def mutants(path: Path, functions: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every single change of a module: where it is, and the changed source."""
    tree = ast.parse(path.read_text())
    roots = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    roots = [node for node in roots if not functions or node.name in functions]
    found = {}
    for node in (each for root in roots for statement in root.body for each in ast.walk(statement)):
        for name, value in changes(node):
            before, original = ast.unparse(node), getattr(node, name)
            setattr(node, name, value)
            place = f"{path.name}:{node.lineno}:{node.col_offset}"
            found[f"{place} {before[:60]} -> {ast.unparse(node)[:60]}"] = ast.unparse(tree)
            setattr(node, name, original)
    return sorted(found.items())


def test_most_mutants_are_killed(full, tmp_path):
    if not full:
        pytest.skip("with --full")
    chosen = []
    for name, (functions, tests, count) in TARGETS.items():
        possible = mutants(ROOT / name, functions)
        places = np.random.default_rng(0).permutation(len(possible))[:count]
        chosen += [(name, tests, *possible[place]) for place in places]
    copies = [tmp_path / str(number) for number in range(2)]
    for copy in copies:
        ignored = shutil.ignore_patterns(".git", "data", "results", "docs", "__pycache__", ".*cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
    lock, survivors = Lock(), []

    with Forks(IMPORTED) as forks:

        def run(folder: Path, tests: str) -> int:
            arguments = ["-c", CODE.format(tests=tests)]
            with lock:
                log = folder.with_suffix(".log")
                process = forks.start(arguments, folder, log, log)
            while True:
                with lock:
                    if forks.has_ended(process):
                        return forks.wait(process)
                time.sleep(0.05)

        def try_half(half: int) -> None:
            for name, tests, description, source in chosen[half::2]:
                target = copies[half] / name
                original = target.read_text()
                target.write_text(source)
                if run(copies[half], tests) == 0:
                    survivors.append(description)
                target.write_text(original)

        for tests in {tests for _, tests, *_ in chosen}:
            assert run(copies[0], tests) == 0, copies[0].with_suffix(".log").read_text()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(try_half, range(2)))
    print(f"{len(chosen)} mutants, {len(survivors)} survive:", *sorted(survivors), sep="\n")
    assert len(chosen) >= 60
    assert len(set(survivors) - EQUIVALENT.keys()) <= 0.1 * len(chosen)
