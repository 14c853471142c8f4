import dataclasses
import io
import math
import re
import sys
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Literal

import pytest

from common.config import (
    RENAMED,
    Range,
    RunConfig,
    UserError,
    apply_overrides,
    check_ranges,
    field_comments,
    hyperparameters,
    parse_config,
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
        "embed_batch_size": (0, 65_536),
        "image_size": (0, 4096),
        "pooling": (1, 6),
        "embedding_dim": (1, 65_536),
        "view_size": (0, 4096),
        "epochs": (0, 100_000),
        "negative_margin": (0, 2),
        "positive_margin": (0, 2),
        "view_weight": (0, 1e6),
        "temperature": (0.001, 10),
        "min_crop_area": (0.01, 1),
        "batch_size": (2, 65_536),
        "learning_rate": (1e-9, 10),
        "weight_decay": (0, 10),
    }
    assert {name: tuple(limits) for name, limits in ranges("app").items()} == {
        "port": (1, 65_535),
        "max_megabytes": (1, 10_000),
    }


# Help


def test_help_has_the_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text
    assert "a folder, 100 % photos (default: 'auto')" in text
    assert "distance in [0, 2] (default: 0.5)" in text


@dataclass
class Wrapped(Config):
    """A comment may stand on any line of a statement; this one: # belongs to none."""

    # Neither does this one
    first: Literal[  # on the first line
        "a", "b", "c"
    ] = "a"
    last: Literal[
        "a",
        "b",
    ] = "a"  # on the last line
    several: Annotated[
        float,  # in units of the margin,
        Range(0, 1),  # as a fraction
    ] = 0.5
    text: str = "# not this"  # but this: 5 # of them
    seed: int = 1  # of something else


def test_comments_of_wrapped_fields_and_of_base_classes():
    assert field_comments(Wrapped) == {
        "data": "a folder, 100 % photos",
        "split": "which queries",
        "seed": "of something else",
        "margin": "distance in [0, 2]",
        "mirror": "half the photos",
        "bare": "",
        "first": "on the first line",
        "last": "on the last line",
        "several": "in units of the margin, as a fraction",
        "text": "but this: 5 # of them",
    }


def test_without_source_there_are_no_comments():
    made = dataclasses.make_dataclass("Made", [("seed", int, 0)])
    assert field_comments(made).get("seed", "") == ""
    assert parse_config(made, "", ["--seed", "3"]).seed == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_of_every_script_has_a_help_text(script, capsys):
    comments = field_comments(config_of(script))
    assert comments.keys() == {each.name for each in dataclasses.fields(config_of(script))}
    assert [name for name, comment in comments.items() if not comment] == []
    with pytest.raises(SystemExit):
        parse_config(config_of(script), "", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [name for name, comment in comments.items() if " ".join(comment.split()) not in text] == []


@pytest.mark.parametrize("script", RUNS)
def test_every_run_has_the_common_hyperparameters(script):
    common = {each.name: each.default for each in dataclasses.fields(RunConfig)}
    config = config_of(script)()
    assert {name: getattr(config, name) for name in common} == common
    assert field_comments(config_of(script)).items() >= field_comments(RunConfig).items()


# Quick runs on synthetic images

OVERRIDES = {"margin": (0.5, 0.2), "seed": (0, 5)}


def test_overrides_replace_defaults_and_say_so(capsys):
    assert apply_overrides(parsed(), OVERRIDES) == Config(margin=0.2, seed=5)
    out = capsys.readouterr().out
    assert "Quick run on synthetic images: margin 0.2 (default: 0.5), seed 5 (default: 0)." in out


def test_a_flag_is_kept_even_where_it_gives_the_default(capsys):
    assert apply_overrides(parsed("--margin", "0.5"), OVERRIDES) == Config(margin=0.5, seed=5)
    assert "margin" not in capsys.readouterr().out
    assert apply_overrides(parsed("--margin=0.5", "--seed", "0"), OVERRIDES) == Config()
    assert apply_overrides(parsed("--seed", "7"), OVERRIDES) == Config(margin=0.2, seed=7)


def test_a_value_edited_in_the_class_is_kept(capsys):
    @dataclass
    class Edited(Config):
        margin: Annotated[float, Range(0, 2)] = 0.9

    assert apply_overrides(parse_config(Edited, "", []), OVERRIDES) == Edited(margin=0.9, seed=5)
    assert apply_overrides(Edited(seed=1), OVERRIDES) == Edited(seed=1)
    assert capsys.readouterr().out.count("Quick run") == 1  # not where nothing changes


@pytest.mark.parametrize("script", RUNS)
def test_the_recorded_defaults_are_those_of_the_script(script):
    overrides = import_module(script).SYNTHETIC_OVERRIDES
    defaults = hyperparameters(config_of(script)())
    assert {name: default for name, (default, _) in overrides.items()} == {name: defaults[name] for name in overrides}
    changed = hyperparameters(apply_overrides(config_of(script)(), overrides))
    assert {name for name, value in changed.items() if value != defaults[name]} == set(overrides)
    check_ranges(apply_overrides(config_of(script)(), overrides))


# Running a script


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("x.jpg is broken: remove it"), 2, "error: x.jpg is broken: remove it\n"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_a_user_can_fix_becomes_one_line(monkeypatch, capsys, raised, code, message):
    def main(config):
        assert config == Config(seed=7)
        raise raised

    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "7"])
    with pytest.raises(SystemExit) as stop:
        run_script(main, Config, "")
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_a_value_out_of_range_becomes_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--margin", "3"])
    with pytest.raises(SystemExit) as stop:
        run_script(lambda _: None, Config, None)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: margin is 3.0: give a value from 0 to 2\n"


def test_a_file_that_cannot_be_written_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(lambda _: (tmp_path / "no" / "x").write_text(""), Config, "")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no' / 'x'}: No such file or directory\n"


def test_a_bug_stays_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(lambda _: 1 / 0, Config, "")
    with pytest.raises(OSError, match="without a number"):
        run_script(lambda _: (_ for _ in ()).throw(OSError("without a number")), Config, "")


def test_a_script_runs_where_the_output_is_no_terminal(monkeypatch):
    out, err = io.StringIO(), io.StringIO()  # they have no reconfigure()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "3"])
    run_script(lambda config: print(f"seed {config.seed}"), Config, "")
    assert (out.getvalue(), err.getvalue()) == ("seed 3\n", "")


def test_a_name_that_the_terminal_cannot_show_does_not_stop_a_script(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["x.py"])
    run_script(lambda _: print("größe.jpg", flush=True), Config, "")
    assert buffer.getvalue() == b"gr\\xf6\\xdfe.jpg\n"
