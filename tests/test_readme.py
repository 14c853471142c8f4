"""What README.md says is what the repository does."""

import json
import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = json.loads((ROOT / "results" / "reference" / "cnn_feature_extraction.json").read_text(encoding="utf-8"))


def row(start: str) -> list[str]:
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def shown(scores: dict) -> list[str]:
    names = ("precision@5", "accuracy@5", "map@100", "instance_hit_rate@1")
    return [f"{scores[name]['value']:.3f}" if name in scores else "" for name in names]


def test_the_table_is_the_reference_file():
    latency = f"{REFERENCE['timing']['query_latency_ms']['p50']:.1f}"
    assert row("[`cnn_feature_extraction.py`]") == [*shown(REFERENCE["metrics"]), latency]
    assert row("raw pixels") == [*shown(REFERENCE["baselines"]["raw_pixels"]), ""]
    assert row("chance") == [*shown(REFERENCE["baselines"]["chance"]), ""]


def test_the_reference_run_is_what_the_readme_says():
    assert (REFERENCE["dataset"]["gallery"], REFERENCE["dataset"]["queries"]) == (18_000, 2_000)
    assert REFERENCE["config"]["split"] == "test"
    assert re.fullmatch(r"[0-9a-f]{40}", REFERENCE["environment"]["commit"])  # of a clean checkout
    benchmark = json.loads((ROOT / "results" / "reference" / "benchmark_embedding.json").read_text(encoding="utf-8"))
    assert f"embeddings, {benchmark['ratios']['plain_loop']['median']:.1f} times as fast" in README


def test_the_validation_runs_are_what_the_readme_says():
    for name, sentence in (
        ("cnn_feature_extraction.json", "precision@5 of {} and an instance_hit_rate@1 of {};"),
        ("cnn_feature_extraction.average.json", "had {} and {}."),
    ):
        result = json.loads((ROOT / "results" / "reference" / "validation" / name).read_text(encoding="utf-8"))
        assert result["config"]["split"] == "validation"
        scores = (f"{result['metrics'][metric]['value']:.3f}" for metric in ("precision@5", "instance_hit_rate@1"))
        assert sentence.format(*scores) in " ".join(README.split())


def test_files_and_flags_that_are_named_exist(run_script):
    assert all((ROOT / name).exists() for name in re.findall(r"\]\(([^)#:]+)\)", README))
    scripts = ("cnn_feature_extraction.py", "autoencoder.py", "siamese.py")
    told = "".join(run_script(script, "--help").stdout for script in scripts)
    flags = set(re.findall(r"--[a-z][a-z-]+", README))
    assert len(flags) > 8
    assert all(flag in told for flag in flags)


def test_requirements_are_the_six():
    names = re.findall(r"^([a-z-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert names == ["torch", "torchvision", "scikit-learn", "numpy", "pillow", "tqdm"]
