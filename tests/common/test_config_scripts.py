"""Help texts, quick runs on synthetic images, and running a script."""

import dataclasses
import io
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

import pytest

from common.config import (
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
from tests.common.test_config import RUNS, SCRIPTS, Config, config_of, parsed

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
        (KeyboardInterrupt(), 130, "stopped\n"),
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


def test_an_interrupted_run_can_be_resumed(monkeypatch, capsys):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit, match="130"):
        run_script(main, RunConfig, "")
    assert capsys.readouterr().err == "stopped: --resume continues after the last complete epoch\n"


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
