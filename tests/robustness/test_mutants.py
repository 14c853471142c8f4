"""Do the tests see faults?  pytest --full tests/robustness/test_mutants.py -n 0 -s

Single changes are made to metrics, search, split and losses, one at a time: a comparison that includes its limit or
doesn't, a sign, a number, a minimum for a maximum. A mutant that passes the tests of its module survives.
"""

import ast
import os
import re
import shutil
import signal
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
    "common/retrieval/rough.py": ((), "tests/common/retrieval/test_rough.py tests/common/retrieval/test_exact.py", 15),
    "common/data/split.py": ((), "tests/common/data/test_split.py tests/common/data/test_unseen.py", 20),
    "siamese.py": (("contrastive_loss",), "tests/test_siamese.py -k contrastive", 10),
    "triplet.py": (("triplet_loss", "masked_mean"), "tests/test_triplet.py -k loss", 15),
    "common/models/losses.py": ((), "tests/common/models/test_losses.py", 10),
}
MAX_SECONDS = 120
ONLY_SPEED = "changes how much is compared at a time, or how many candidates are compared exactly"
NEVER = "of a zip whose arguments always have the same length"
IN_MEMORY, LARGER_BLOCK = "isinstance(self.gallery, np.ndarray)", "size *= max(1, FEW_QUERIES // len(queries))"
EQUIVALENT = {  # mutants that change no result: why
    "exact.py: FEW_QUERIES // len(queries) -> FEW_QUERIES * len(queries)": ONLY_SPEED,
    "exact.py: len(queries) < MANY_QUERIES -> len(queries) <= MANY_QUERIES": ONLY_SPEED,
    "exact.py: 2 * (queries.shape[1] / 4 + 4) * FLOAT32_EPSILON -> 2 * (queries.shape[1] / 4 + 4) / FLOAT32_EPSILON": (
        ONLY_SPEED
    ),
    "exact.py: scores >= scores[:, k - 1:k] - tolerance -> scores > scores[:, k - 1:k] - tolerance": (
        "differs where a score is at the bound to the last bit, and the bound has room"
    ),
    f"exact.py: if {IN_MEMORY}:\n    {LARGER_BLOCK} -> if not {IN_MEMORY}:\n    {LARGER_BLOCK}": ONLY_SPEED,
    "exact.py: errors.max -> errors.min": "rounding scores and thresholds to bfloat16 has room for the difference",
    "exact.py: 4 -> 5": "of the lanes that a bound on an error counts with, which has room",
    "exact.py: scores[:, :-1] <= scores[:, 1:] + tolerance -> scores[:, :-1] < scores[:, 1:] + tolerance": (
        "differs where two scores are a tolerance apart to the last bit, and the tolerance has room"
    ),
    "exact.py: 512 -> 513": ONLY_SPEED,
    "exact.py: 0 -> 1": "of an empty matrix that is made for a warning alone",
    "exact.py: False -> True": "torch checks what is right",
    "metrics.py: True -> False": NEVER,
    "rough.py: 1024 -> 1025": ONLY_SPEED,
    "rough.py: 16 -> 17": ONLY_SPEED,
    "rough.py: 1 -> 2": "of a group's size, only speed; of a score's limit, counts where rounding gives more than 1",
    "rough.py: queries >= MANY_QUERIES -> queries > MANY_QUERIES": ONLY_SPEED,
    "rough.py: k <= num_groups -> k < num_groups": ONLY_SPEED,
    "rough.py: keys >= lowest.astype(keys.dtype) -> keys > lowest.astype(keys.dtype)": (
        "differs where a score is at the bound to the last bit, and the bound has room"
    ),
    "rough.py: threshold > 0 -> threshold >= 0": "differs for a bound of exactly 0, for which both hold",
    "split.py: True -> False": NEVER,
    "split.py: len(copies) > 1 -> len(copies) >= 1": "a class of one content is decided on before",
    "triplet.py: True -> False": "a positive has as many negatives as its anchor",
    "triplet.py: 0 -> 1": "of sums that no negative reads: behind the last finite one",
}
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
            found[f"{place} {before} -> {ast.unparse(node)}"] = ast.unparse(tree)
            setattr(node, name, original)
    return sorted(found.items())


class Runner:
    """Runs tests in copies of the repository, two at a time."""

    def __init__(self, forks: Forks, copies: list[Path]) -> None:
        self.forks, self.copies, self.lock = forks, copies, Lock()

    def passes(self, copy: Path, tests: str) -> bool:
        """Whether the tests pass in a copy; those that take longer than `MAX_SECONDS` don't."""
        log = copy.with_suffix(".log")
        with self.lock:
            process = self.forks.start(["-c", CODE.format(tests=tests)], copy, log, log)
        until = time.monotonic() + MAX_SECONDS
        while time.monotonic() < until:
            with self.lock:
                if self.forks.has_ended(process):
                    return self.forks.wait(process) == 0
            time.sleep(0.05)
        os.kill(process, signal.SIGKILL)
        return False

    def survivors(self, chosen: list[tuple[str, str, str, str]]) -> list[str]:
        """The mutants that pass: (module, tests, description, source)."""

        def of_half(half: int) -> list[str]:
            passed = []
            for name, tests, description, source in chosen[half::2]:
                target = self.copies[half] / name
                original = target.read_text()
                target.write_text(source)
                if self.passes(self.copies[half], tests):
                    passed.append(description)
                target.write_text(original)
            return passed

        with ThreadPoolExecutor(2) as pool:
            return sorted(each for half in pool.map(of_half, range(2)) for each in half)


@pytest.mark.full
def test_most_mutants_are_killed(tmp_path):
    chosen = []
    for name, (functions, tests, count) in TARGETS.items():
        possible = mutants(ROOT / name, functions)
        places = np.random.default_rng(0).permutation(len(possible))[:count]
        chosen += [(name, tests, *possible[place]) for place in places]
    copies = [tmp_path / str(number) for number in range(2)]
    for copy in copies:
        for part in ("common", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (*ROOT.glob("*.py"), *ROOT.glob("*.toml")):
            shutil.copy(path, copy)
    with Forks(IMPORTED) as forks:
        runner = Runner(forks, copies)
        for tests in {tests for _, tests, *_ in chosen}:
            assert runner.passes(copies[0], tests), copies[0].with_suffix(".log").read_text()
        survivors = runner.survivors(chosen)
    print(f"{len(chosen)} mutants, {len(survivors)} survive:", *survivors, sep="\n")
    assert len(chosen) >= 60
    unexplained = [each for each in survivors if re.sub(r":\d+:\d+ ", ": ", each) not in EQUIVALENT]
    assert len(unexplained) <= 0.1 * len(chosen)
