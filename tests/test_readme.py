"""What README.md and the pages in docs/ say is what the repository does."""

import json
import operator
import re
import statistics
from importlib import import_module

import pytest
import torch
from torch.distributed.run import get_args_parser
from torchvision import models

from common.config import parse_config
from common.report.comparison import choose_seed, read_results
from common.report.result_file import SUMMARY, summary
from compare import spread, table
from tests.conftest import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
}
README, PERFORMANCE, LOG = PAGES["README.md"], PAGES["docs/performance.md"], PAGES["docs/log.md"]
NAMES = ("cnn_feature_extraction", "autoencoder", "siamese", "triplet")
REFERENCE = {
    name: json.loads((ROOT / "results" / "reference" / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES
}
SPEEDS = {  # how a row of the table begins: (benchmark, ratio)
    "exact search, 18,000 photos, 5 neighbours | faiss": ("exact_search", "faiss_18000_top5"),
    "exact search, 18,000 photos, 100 neighbours | faiss": ("exact_search", "faiss_18000_top100"),
    "exact search, 1,000,000 photos, 5 neighbours | faiss": ("exact_search", "faiss_1000000_top5"),
    "exact search, 18,000 photos, 5 neighbours | scikit-learn, Euclidean": ("exact_search", "scikit_learn_18000_top5"),
    "exact search, 18,000 photos, 5 neighbours | usearch": ("exact_search", "usearch_18000_top5"),
    "exact search, 18,000 photos, one query at a time | faiss": ("exact_search", "faiss_18000_one"),
    "exact search, 18,000 photos, one query at a time | usearch": ("exact_search", "usearch_18000_one"),
    "exact search, 100,000 photos, one query at a time | usearch": ("exact_search", "usearch_100000_one"),
    "exact search, 1,000,000 photos, one query at a time | faiss": ("exact_search", "faiss_1000000_one"),
    "exact search, 1,000,000 photos, one query at a time | usearch": ("exact_search", "usearch_1000000_one"),
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

SPEEDS_AMX = [  # (how a row begins, benchmark, ratio), on a Xeon
    ("exact search, 18,000 photos, 5 neighbours | faiss", "exact_search", "faiss_18000_top5"),
    ("exact search, 18,000 photos, 100 neighbours | faiss", "exact_search", "faiss_18000_top100"),
    ("exact search, 18,000 photos, one query at a time | faiss", "exact_search", "faiss_18000_one"),
    ("exact search, 18,000 photos, 5 neighbours | scikit-learn, Euclidean", "exact_search", "scikit_learn_18000_top5"),
    ("files to embeddings, squeezenet1_1 | ONNX Runtime", "embedding", "fastest_rival_squeezenet1_1_ours"),
    ("the same in float32 | ONNX Runtime", "embedding", "fastest_rival_squeezenet1_1_ours_float32"),
    (
        "the same, `--inference openvino`, in float32 | ONNX Runtime",
        "embedding",
        "fastest_rival_squeezenet1_1_ours_openvino",
    ),
    ("the same, `--inference int8` | ONNX Runtime", "embedding", "fastest_rival_squeezenet1_1_ours_int8"),
    ("photos of 12 megapixels, squeezenet1_1 | ONNX Runtime", "embedding", "fastest_rival_camera_ours"),
    ("the same, `--inference openvino`, in float32 | ONNX Runtime", "embedding", "fastest_rival_camera_ours_openvino"),
    ("the same, `--inference int8` | ONNX Runtime", "embedding", "fastest_rival_camera_ours_int8"),
    ("one query | limit: the sum of its parts alone", "query_latency", "limit"),
]


def measured(benchmark: str, folder: str = "reference") -> dict:
    return json.loads((ROOT / "results" / folder / f"benchmark_{benchmark}.json").read_text(encoding="utf-8"))


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_table_is_what_compare_makes_of_the_reference_files():
    results = read_results(sorted((ROOT / "results" / "reference").glob("*.json")))
    assert table(choose_seed(results)) + spread(results) in README


def test_the_claims_are_those_of_the_reference_runs():
    for result in REFERENCE.values():
        assert (result["dataset"]["gallery"], result["dataset"]["queries"]) == (18_000, 2_000)
        assert result["config"]["split"] == "test"
        assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"])  # of a clean checkout
    siamese = REFERENCE["siamese"]
    scores, before, dogs = siamese["metrics"], siamese["baselines"]["pretrained"], siamese["also"]["dogs"]
    scores = [
        (scores["precision@5"], before["precision@5"]),
        (scores["instance_hit_rate@1_crop"], before["instance_hit_rate@1_crop"]),
        (dogs["metrics"]["hit_rate@1"], dogs["baselines"]["pretrained"]["hit_rate@1"]),
    ]
    text = on_one_line(README)
    for own, frozen in scores:
        assert f"{own['value']:.1%} ({frozen['value']:.1%} before training)".replace("%", " %") in text
    assert f"{siamese['timing']['train_seconds'] / 60:.0f} minutes of training" in text


@pytest.mark.parametrize("script", ["cnn_feature_extraction", "autoencoder", "siamese", "triplet"])
def test_the_docstrings_are_those_of_the_reference_runs(script):
    text, result = on_one_line((ROOT / f"{script}.py").read_text(encoding="utf-8")), REFERENCE[script]
    scores, before = result["metrics"], result["baselines"]["pretrained"]
    dogs = result["also"]["dogs"]
    own = [scores["precision@5"], scores["instance_hit_rate@1_crop"], dogs["metrics"]["hit_rate@1"]]
    frozen = [before["precision@5"], before["instance_hit_rate@1_crop"], dogs["baselines"]["pretrained"]["hit_rate@1"]]
    for (first, second, third), claim in (
        (own, "precision@5 {}, instance_hit_rate@1_crop {}, recall@1 by dog breed {}"),
        (frozen, "the pre-trained network as it is has {}, {} and {}"),
    ):
        assert claim.format(*(f"{each['value']:.3f}" for each in (first, second, third))) in text
    assert f"{result['timing']['train_seconds'] / 60:.0f} minutes" in text
    assert result["config"]["seed"] == 0


def test_the_unseen_classes_are_those_of_the_reference_runs():
    folder = ROOT / "results" / "reference" / "unseen"
    results = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("siamese", "triplet")
    }
    rows = {f"[{name}]({name}.py)": result["metrics"] for name, result in results.items()}
    rows["squeezenet1_1 as pre-trained"] = results["siamese"]["baselines"]["pretrained"]
    for name, scores in rows.items():
        assert f"| {name} | {scores['hit_rate@1']['value']:.3f} | {scores['map@r']['value']:.3f} |" in README
    assert all(result["config"]["split"] == "unseen" for result in results.values())
    assert f"the {results['siamese']['dataset']['queries']} photos of the others" in README


def test_the_speeds_are_those_of_the_benchmarks():
    for start, (benchmark, ratio) in SPEEDS.items():
        values = measured(benchmark)["ratios"][ratio]
        assert f"| {start} | {values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f}) |" in PERFORMANCE
    for start, benchmark, ratio in SPEEDS_AMX:
        values = measured(benchmark, "reference/amx")["ratios"][ratio]
        assert f"| {start} | {values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f}) |" in PERFORMANCE
    amx = measured("query_latency", "reference/amx")
    beside, waited = amx["ratios"]["busy"], amx["milliseconds"]["whole"]
    times = f"{beside['median']:.2f} ({beside['low']:.2f} to {beside['high']:.2f})"
    faiss = measured("exact_search", "reference/amx")["ratios"]["faiss_18000_top5"]["median"]
    assert f"{faiss:.1f} times on an Intel Xeon" in on_one_line(README)
    assert f"p50 {waited['p50']:.1f} ms, p99 {waited['p99']:.1f} ms, and {times} times" in on_one_line(PERFORMANCE)
    names = "exact_search", "query_latency", "training"
    exact, latency, training = (measured(name, "reference/avx2") for name in names)
    ratios = [exact["ratios"][f"faiss_18000_{mode}"] for mode in ("top5", "top100", "one")]
    busy = [each["ratios"] for each in (training, measured("training"))]
    ratios += [each[f"busy_{script}"] for each in busy for script in ("siamese", "autoencoder")]
    ratios += [latency["ratios"]["busy"], measured("query_latency")["ratios"]["busy"]]
    for values in (*ratios, exact["ratios"]["scikit_learn_18000_top5"]):
        assert f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})" in on_one_line(PERFORMANCE)
    assert "takes {p50:.1f} ms there (p99 {p99:.1f} ms)".format(**latency["milliseconds"]["whole"]) in on_one_line(
        PERFORMANCE
    )
    latency = measured("query_latency")["milliseconds"]["whole"]
    text = on_one_line(PERFORMANCE)
    gallery = measured("query_latency")["dataset"]["gallery"]
    assert f"among {gallery:,}: p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms" in text
    for network in ("squeezenet1_1", "resnet18", "resnet50"):  # the fastest rival
        assert f"{measured('embedding')['ratios'][f'onnx_runtime_{network}']['median']:.2f} ({network})" in text
    page = measured("page", "reference/avx2")
    waited = page["milliseconds"]
    assert f"with {len(page['errors'])} errors: p50 {waited['p50']:.0f} ms, p95 {waited['p95']:.0f} ms" in text
    assert f"{page['ratios']['limit']['median']:.2f} of the searches per second of the engine itself" in text
    assert f"waits {page['milliseconds_alone']['p50']:.0f} ms for a search" in text
    assert f"takes {page['ratios']['limit_alone']['median']:.2f} of that" in text
    waits = [measured(f"page.{inference}", "reference/avx2")["milliseconds"] for inference in ("openvino", "int8")]
    openvino, rounded = (f"p50 {each['p50']:.0f} ms, p95 {each['p95']:.0f} ms" for each in waits)
    assert f"eight clients wait {openvino}, with `--inference int8` {rounded}" in text
    memory = [size["search_memory_bytes"] / 1e6 for size in measured("scaling")["sizes"].values()]
    assert f"{min(memory):.0f} to {max(memory):.0f} MB" in text
    faiss = measured("exact_search")["ratios"]["faiss_18000_top5"]["median"]
    assert f"{faiss:.1f} times as fast as faiss" in on_one_line(README)
    assert f"takes {latency['p50']:.1f} ms" in on_one_line(README)


def test_inference_is_as_measured():
    embedding = measured("embedding", "reference/avx2")
    kinds = "ours", "ours_openvino", "ours_int8"
    for network in ("squeezenet1_1", "resnet18", "resnet50", "camera"):
        ratios = [embedding["ratios"][f"fastest_rival_{network}_{kind}"] for kind in kinds]
        cells = [f"{each['median']:.2f} ({each['low']:.2f} to {each['high']:.2f})" for each in ratios]
        name = "squeezenet1_1, photos of 12 megapixels" if network == "camera" else network
        assert f"| {name} | {' | '.join(cells)} |" in PERFORMANCE
    gains = []
    for network in ("squeezenet1_1", "resnet18", "resnet50"):
        rounds = embedding["seconds"][network]
        gains.append(statistics.median(map(operator.truediv, rounds["ours"], rounds["ours_int8"])))
    assert f"{min(gains):.1f} to {max(gains):.1f} times as many photos/s" in on_one_line(README)

    path = ROOT / "results" / "reference" / "avx2" / "cnn_feature_extraction.int8.json"
    quantized, siamese = json.loads(path.read_text(encoding="utf-8")), REFERENCE["siamese"]
    assert quantized["config"]["inference"] == quantized["environment"]["precision"] == "int8"
    for name, result, of in (("torch", siamese, "pretrained"), ("OpenVINO, 8 bits", quantized, None)):
        scores = [result, result["also"]["dogs"], result["also"]["cats"]]
        own, dogs, cats = (each["baselines"][of] if of else each["metrics"] for each in scores)
        own = [own[each] for each in ("precision@5", "instance_hit_rate@1", "instance_hit_rate@1_crop")]
        cells = [f"{each['value']:.3f}" for each in (*own, dogs["hit_rate@1"], cats["hit_rate@1"])]
        assert f"| {name} | {' | '.join(cells)} |" in PERFORMANCE


def test_the_search_for_copies_is_as_measured():
    found = measured("duplicates")
    methods = [found["quality"][method] for method in ("ours", "imagededup_cnn", "imagededup_phash")]
    for kind in methods[0]:
        each = [method[kind] for method in methods]
        cells = [f"{one['precision_at_recall_0.95']:.3f} ({one['precision']:.3f}, {one['recall']:.3f})" for one in each]
        assert f"| {' | '.join(cells)} |" in PERFORMANCE
    text = on_one_line(PERFORMANCE)
    for ratio in found["ratios"].values():
        assert f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) times as" in text
    seconds = found["seconds"]["indexed"]["ours"]
    taken = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
    assert f"{found['config']['indexed']:,} of them take {taken}" in text


def test_the_validation_runs_are_what_the_log_says():
    for name in ("cnn_feature_extraction.json", "cnn_feature_extraction.average.json"):
        result = json.loads((ROOT / "results" / "reference" / "validation" / name).read_text(encoding="utf-8"))
        assert result["config"]["split"] == "validation"
        for metric in ("precision@5", "instance_hit_rate@1"):
            assert f"{result['metrics'][metric]['value']:.3f}" in LOG


def test_the_output_shown_is_of_the_program():
    online, offline = (
        re.search(rf"<!-- {name} -->\n```\n(.*?)\n```\n", README, re.DOTALL)[1] for name in ("online", "offline")
    )
    expected = summary(REFERENCE["cnn_feature_extraction"] | {"also": {}}).strip("\n").splitlines()
    assert online.splitlines() == [line.rstrip() for line in expected]
    assert re.findall(r"^(\w+(?:@\w+)?) +\d\.\d{3,4}  \d", offline, re.MULTILINE) == list(SUMMARY)


def test_every_module_is_named_in_the_architecture():
    text = PAGES["docs/architecture.md"]
    modules = [path for path in (ROOT / "common").rglob("*.py") if path.stem != "__init__"]
    assert len(modules) > 40
    assert not [path for path in modules if f"`{path.stem}`" not in text]


def test_files_and_flags_that_are_named_exist(capsys, pytestconfig):
    for page, text in PAGES.items():
        for name in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(name).exists(), (page, name)
    approaches = ("cnn_feature_extraction", "autoencoder", "siamese", "triplet")
    for script in (*approaches, "compare", "search", "app", "common.cache"):
        with pytest.raises(SystemExit):
            parse_config(import_module(script).Config, "", ["--help"])
    printed = capsys.readouterr().out + get_args_parser().format_help()
    flags = set(re.findall(r"--[a-z][a-z-]+", README))
    assert len(flags) > 8
    of_pytest = {f"--{name}" for name in vars(pytestconfig.option)}
    assert all(flag in printed or flag in of_pytest for flag in flags)


def test_the_python_example_runs(tmp_path, monkeypatch, capsys, synthetic_photos):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    statements = [line for line in example.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(statements) == 8
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(synthetic_photos)
    (tmp_path / "query.jpg").write_bytes((synthetic_photos / "cat" / "cat.0003.jpg").read_bytes())
    torch.save(models.resnet18(weights=None).state_dict(), "resnet18.pth")
    exec(compile(example.replace('"DEFAULT"', '"resnet18.pth"'), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("1.000  ")
    assert lines[0].endswith("cat.0003.jpg")


def test_requirements_are_the_six():
    names = re.findall(r"^([a-z-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert names == ["torch", "torchvision", "scikit-learn", "numpy", "pillow", "tqdm"]
