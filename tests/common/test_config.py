import dataclasses
import gc
import math
import os
import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Literal

import pytest

from common.config import (
    RENAMED,
    Range,
    UserError,
    check_ranges,
    hyperparameters,
    parse_config,
    printable,
    run_script,
)

RUNS = ("siamese", "cnn_feature_extraction", "autoencoder")
SCRIPTS = (*RUNS, "search", "compare", "app")


def config_of(script: str) -> type:
    return import_module(script).Config


@dataclass
class Config:
    data: str = "auto"  # a folder, 100 % photos
    split: Literal["test", "validation"] = "test"  # which queries
    seed: int = 0  # of the split
    margin: Annotated[float, Range(0, 2)] = 0.5  # distance in [0, 2]
    mirror: bool = True  # half the photos
    bare: str = ""


def parsed(*arguments):
    return parse_config(Config, "What it does.", list(arguments))


# Flags


def test_defaults_are_those_of_the_dataclass():
    assert parsed() == Config()


def test_every_type_becomes_a_flag():
    given = parsed("--data", "x", "--split", "validation", "--seed", "3", "--margin", "1.5", "--no-mirror")
    assert given == Config("x", "validation", 3, 1.5, mirror=False)
    assert [type(value) for value in hyperparameters(given).values()] == [str, str, int, float, bool, str]


def test_underscores_may_be_typed():
    @dataclass
    class Sizes:
        batch_size: int = 1

    assert parse_config(Sizes, "", ["--batch_size", "2"]) == parse_config(Sizes, "", ["--batch-size", "2"]) == Sizes(2)


@dataclass
class Positional:
    """Some photos."""

    photos: tuple[str, ...] = field(default=())  # what to look for
    k: int = 5  # neighbours


def test_positional_arguments_and_a_flag_of_one_letter():
    assert parse_config(Positional, "", ["a.jpg", "-k", "3", "b.jpg"]) == Positional(("a.jpg", "b.jpg"), 3)
    assert parse_config(Positional, "", ["--k", "3"]) == Positional((), 3)
    assert parse_config(Positional, "", ["--", "-dash.jpg", "--k"]) == Positional(("-dash.jpg", "--k"))
    assert parse_config(Positional, "", ["a.jpg", "-k", "3", "--", "-b.jpg"]) == Positional(("a.jpg", "-b.jpg"), 3)
    assert parse_config(Positional, "", ["a.jpg", "--"]) == Positional(("a.jpg",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "-1"), "'-1' is not a whole number"),
        (("--seed", "1.5"), "'1.5' is not a whole number"),
        (("--seed", "1234567890123456789"), "'1234567890123456789' is not a whole number"),
        (("--split", "train"), "'train'"),
        (("--margin", "wide"), "wide"),
        (("--sed", "1"), "--sed"),
        (("--se", "1"), "--se"),  # no abbreviations: a new flag could change what one means
    ],
)
def test_what_does_not_fit_ends_with_2_and_says_what(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        parsed(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_start_with_their_defaults(script):
    assert parse_config(config_of(script), "", []) == config_of(script)()


@pytest.mark.parametrize(
    ("script", "old", "new"),
    [
        ("siamese", "--class-margin", "--positive-margin"),
        ("siamese", "--class_margin", "--positive-margin"),
        ("siamese", "--margin", "--negative-margin"),
        ("siamese", "--mining", "--reduction"),
        *((script, "--least-area", "--min-crop-area") for script in RUNS),
    ],
)
def test_a_flag_that_was_renamed_gives_its_new_name(script, old, new):
    shown = old.replace("_", "-")
    for arguments in ([old, "1"], [f"{old}=1"]):
        with pytest.raises(UserError, match=rf"^{shown} is called {new} now$"):
            parse_config(config_of(script), "", ["--seed", "1", *arguments])


def test_a_name_is_renamed_only_where_the_new_one_exists_and_the_old_one_does_not(capsys):
    assert RENAMED["margin"] == "negative_margin"
    assert parsed("--margin", "1").margin == 1.0  # its own field
    with pytest.raises(SystemExit):
        parsed("--least-area", "1")
    assert "unrecognized arguments: --least-area 1" in capsys.readouterr().err


# Ranges


@pytest.mark.parametrize("value", ["2.5", "nan", "-1", "inf"])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(UserError, match=rf"^margin is {float(value)}: give a value from 0 to 2$"):
        parsed("--margin", value)


@pytest.mark.parametrize("value", ["0", "2"])
def test_the_ends_of_a_range_belong_to_it(value):
    assert parsed("--margin", value).margin == float(value)


def ranges(script: str) -> dict[str, Range]:
    """The fields with a range, read from the annotations."""
    notes = {each.name: getattr(each.type, "__metadata__", ()) for each in dataclasses.fields(config_of(script))}
    return {name: note for name, found in notes.items() for note in found if isinstance(note, Range)}


RANGES = [(script, name, limits) for script in SCRIPTS for name, limits in ranges(script).items()]


@pytest.mark.parametrize(("script", "name", "limits"), RANGES, ids=[f"{script}-{name}" for script, name, _ in RANGES])
def test_the_range_of_every_hyperparameter_is_checked(script, name, limits):
    config = config_of(script)()
    for value in (limits.low, limits.high, getattr(config, name)):
        setattr(config, name, value)
        check_ranges(config)
    for value in (limits.low - 1, math.nextafter(limits.low, -math.inf), limits.high * 1.01, math.inf, math.nan):
        setattr(config, name, value)
        with pytest.raises(UserError, match=rf"^{name} is {re.escape(str(value))}: give a value from "):
            check_ranges(config)
    above = str(int(limits.high) + 1)
    with pytest.raises(UserError, match=name):
        parse_config(config_of(script), "", [f"--{name}", above])


def test_which_hyperparameters_have_a_range():
    assert {name: tuple(limits) for name, limits in ranges("siamese").items()} == {
        "graph_depth": (1, 32_768),
        "copy_threshold": (0.5, 1),
        "allow_unreadable": (0, 1),
        "embed_batch_size": (0, 65_536),
        "image_size": (0, 4096),
        "pooling": (1, 6),
        "class_dim": (1, 65_536),
        "kind_dim": (1, 65_536),
        "kind_weight": (0, 1000),
        "detail_dim": (1, 65_536),
        "detail_weight": (0, 1000),
        "appearance_dim": (1, 3072),
        "appearance_weight": (0, 100),
        "view_size": (0, 4096),
        "epochs": (0, 100_000),
        "negative_margin": (0, 2),
        "positive_margin": (0, 2),
        "view_weight": (0, 1e6),
        "temperature": (0.001, 10),
        "feature_weight": (0, 1e6),
        "whitening": (0, 1),
        "min_crop_area": (0.01, 1),
        "batch_size": (2, 65_536),
        "learning_rate": (1e-9, 10),
        "weight_decay": (0, 10),
    }
    assert {name: tuple(limits) for name, limits in ranges("app").items()} == {
        "graph_depth": (1, 32_768),
        "copy_threshold": (0.5, 1),
        "port": (1, 65_535),
        "max_megabytes": (1, 10_000),
    }


def test_a_home_folder_is_expanded_behind_the_equals_sign_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = parse_config(config_of("search"), "", ["~/a.jpg", "b~.jpg", "--index=~/Pictures", "--exclude=~snapshot"])
    assert config.photos == (str(tmp_path / "a.jpg"), "b~.jpg")
    assert (config.index, config.exclude) == (str(tmp_path / "Pictures"), ("~snapshot",))


def test_patterns_to_exclude_may_be_repeated_and_leave_the_photos_alone():
    searched = parse_config(config_of("search"), "", ["--exclude", "*.gif", "a.jpg", "--exclude", "raw/", "b.jpg"])
    assert (searched.exclude, searched.photos) == (("*.gif", "raw/"), ("a.jpg", "b.jpg"))
    trained = parse_config(config_of("siamese"), "", ["--exclude", "*.gif", "raw/", "--exclude", "old"])
    assert trained.exclude == ("*.gif", "raw/", "old")


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("Zoë's 写真 01.jpg") == "Zoë's 写真 01.jpg"
    assert printable("a\nb\x1b[2J\u202e\x07") == r"a\nb\x1b[2J\u202e\x07"
    assert printable(os.fsdecode(b"\xff.jpg")) == r"\udcff.jpg"


def test_what_was_imported_is_no_garbage(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--seed", "7"])
    seen = []
    try:
        run_script(lambda config: seen.append((config.seed, gc.get_freeze_count())), Config, "What it does.")
    finally:
        gc.unfreeze()
    [(seed, frozen)] = seen
    assert seed == 7
    assert frozen > 10_000
