"""What README.md says is what the repository does."""

import json
import re

from compare import Config, read_results, table
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = {
    name: json.loads((ROOT / "results" / "reference" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("cnn_feature_extraction", "autoencoder", "siamese", "siamese.class_pairs")
}
SPEEDS = {  # how a row of the table begins: (benchmark, ratio)
    "exact search, 18,000 photos, 5 neighbours | faiss": ("exact_search", "faiss_18000_top5"),
    "exact search, 18,000 photos, 100 neighbours | faiss": ("exact_search", "faiss_18000_top100"),
    "exact search, 1,000,000 photos, 5 neighbours | faiss": ("exact_search", "faiss_1000000_top5"),
    "exact search, 18,000 photos, 5 neighbours | scikit-learn": ("exact_search", "scikit_learn_18000_top5"),
    "exact search, 18,000 photos, 5 neighbours | usearch": ("exact_search", "usearch_18000_top5"),
    "files to embeddings, squeezenet1_1 | plain PyTorch loop": ("embedding", "plain_loop_squeezenet1_1"),
    "files to embeddings, squeezenet1_1 | ONNX Runtime": ("embedding", "onnx_runtime_squeezenet1_1"),
    "files to embeddings, resnet18 | plain PyTorch loop": ("embedding", "plain_loop_resnet18"),
    "files to embeddings, resnet50 | plain PyTorch loop": ("embedding", "plain_loop_resnet50"),
    "files to embeddings, squeezenet1_1 | limit: decoding, then the network": ("embedding", "limit_squeezenet1_1"),
    "training, siamese.py | plain PyTorch loop": ("training", "plain_loop_siamese"),
    "training, autoencoder.py | plain PyTorch loop": ("training", "plain_loop_autoencoder"),
    "training, siamese.py | limit: ready random pixels": ("training", "limit_siamese"),
    "training, autoencoder.py | limit: ready random pixels": ("training", "limit_autoencoder"),
    "one query | limit: the sum of its parts alone": ("query_latency", "limit"),
}


def measured(benchmark: str) -> dict:
    return json.loads((ROOT / "results" / "reference" / f"benchmark_{benchmark}.json").read_text(encoding="utf-8"))


def test_the_table_is_what_compare_makes_of_the_reference_files():
    files = sorted(str(path) for path in (ROOT / "results" / "reference").glob("*.json"))
    assert table(read_results(Config(files=tuple(files)))) in README


def test_the_reference_runs_are_what_the_readme_says():
    for result in REFERENCE.values():
        assert (result["dataset"]["gallery"], result["dataset"]["queries"]) == (18_000, 2_000)
        assert result["config"]["split"] == "test"
        assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"])  # of a clean checkout


def test_the_speeds_are_those_of_the_benchmarks():
    for start, (benchmark, ratio) in SPEEDS.items():
        values = measured(benchmark)["ratios"][ratio]
        assert f"| {start} | {values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f}) |" in README
    latency = measured("query_latency")["milliseconds"]["whole"]
    text = " ".join(README.split())
    assert f"p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms" in text
    page = measured("page")
    assert f"{len(page['errors'])} errors, p95 {page['milliseconds']['p95']:.0f} ms" in text
    memory = [size["search_memory_bytes"] / 1e6 for size in measured("scaling")["sizes"].values()]
    assert f"{min(memory):.0f} to {max(memory):.0f} MB" in text


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
    scripts = ("cnn_feature_extraction.py", "autoencoder.py", "siamese.py", "compare.py", "search.py", "app.py")
    told = "".join(run_script(script, "--help").stdout for script in scripts)
    flags = set(re.findall(r"--[a-z][a-z-]+", README))
    assert len(flags) > 8
    assert all(flag in told for flag in flags)


def test_requirements_are_the_six():
    names = re.findall(r"^([a-z-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert names == ["torch", "torchvision", "scikit-learn", "numpy", "pillow", "tqdm"]
