"""What README.md says is what the repository does."""

import json
import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = {
    name: json.loads((ROOT / "results" / "reference" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("cnn_feature_extraction", "autoencoder", "siamese", "siamese.class_pairs")
}
ROWS = (  # how a row of the table begins, which file it is from, which scores
    ("CNN features, as pre-trained", "cnn_feature_extraction", "metrics_frozen"),
    ("[CNN features]", "cnn_feature_extraction", "metrics"),
    ("[Autoencoder]", "autoencoder", "metrics"),
    ("[Siamese network]", "siamese", "metrics"),
    ("Siamese network, class pairs only", "siamese.class_pairs", "metrics"),
    ("Raw pixels", "cnn_feature_extraction", "raw_pixels"),
    ("Chance", "cnn_feature_extraction", "chance"),
)


def row(start: str) -> list[str]:
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def shown(result: dict, part: str) -> list[str]:
    scores = result[part] if part in result else result["baselines"][part]
    names = ("precision@5", "accuracy@5", "map@100", "instance_hit_rate@1")
    measured = [f"{scores[name]['value']:.3f}" if name in scores else "" for name in names]
    if part != "metrics":
        return [*measured, "", ""]
    minutes = sum(epoch["seconds"] for epoch in result["history"]) / 60
    return [*measured, f"{minutes:.0f}" if minutes else "", f"{result['timing']['query_latency_ms']['p50']:.1f}"]


def test_the_table_is_the_reference_files():
    for start, name, part in ROWS:
        assert row(start) == shown(REFERENCE[name], part), start


def test_the_reference_runs_are_what_the_readme_says():
    for result in REFERENCE.values():
        assert (result["dataset"]["gallery"], result["dataset"]["queries"]) == (18_000, 2_000)
        assert result["config"]["split"] == "test"
        assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"])  # of a clean checkout


def test_the_speeds_are_those_of_the_benchmarks():
    text = " ".join(README.split())
    for benchmark, ratio, words in (("embedding", "plain_loop", "embeddings, {:.1f} times as fast"),):
        path = ROOT / "results" / "reference" / f"benchmark_{benchmark}.json"
        measured = json.loads(path.read_text(encoding="utf-8"))["ratios"][ratio]["median"]
        assert words.format(measured) in text


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
