import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from common.config import UserError, demonstration, parse_config, run


@dataclass
class Config:
    data: str = "auto"  # a folder, 100 % photos
    split: Literal["test", "validation"] = "test"  # which queries
    seed: int = 0  # of the split
    margin: float = 0.5  # distance in [0, 2]
    mirror: bool = True  # half the photos
    bare: str = ""


def parsed(*arguments):
    return parse_config(Config, "What it does.", list(arguments))


def test_defaults_are_those_of_the_dataclass():
    assert parsed() == Config()


def test_every_type_becomes_a_flag():
    given = parsed("--data", "x", "--split", "validation", "--seed", "3", "--margin", "1.5", "--no-mirror")
    assert given == Config("x", "validation", 3, 1.5, mirror=False)


def test_underscores_may_be_typed():
    @dataclass
    class Sizes:
        batch_size: int = 1

    assert parse_config(Sizes, "", ["--batch_size", "2"]) == parse_config(Sizes, "", ["--batch-size", "2"]) == Sizes(2)


def test_a_demonstration_changes_defaults_only_and_says_so(capsys):
    given = demonstration(Config(seed=3), {"margin": 0.2, "seed": 5, "data": "auto"})
    assert given == Config(seed=3, margin=0.2)
    assert "margin 0.2 (not 0.5);" in capsys.readouterr().out
    assert demonstration(given, {"margin": 0.1}) == given
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--seed", "-1"), "'-1' is not a whole number from 0 up"),
        (("--seed", "1.5"), "'1.5' is not a whole number"),
        (("--split", "train"), "'train'"),
        (("--margin", "wide"), "wide"),
        (("--sed", "1"), "--sed"),
    ],
)
def test_what_does_not_fit_ends_with_2_and_says_what(capsys, arguments, told):
    with pytest.raises(SystemExit) as stop:
        parsed(*arguments)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("value", ["2.5", "nan", "-1"])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(UserError, match=rf"margin is {float(value)}: give a value from 0 to 2"):
        parsed("--margin", value)


def test_help_has_the_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text
    assert "a folder, 100 % photos (default: 'auto')" in text
    assert "distance in [0, 2] (default: 0.5)" in text


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UserError("x.jpg is broken: remove it"), 2, "error: x.jpg is broken: remove it\n"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_run_turns_mistakes_into_one_line(monkeypatch, capsys, raised, code, told):
    def main(config):
        assert config == Config(seed=7)
        raise raised

    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "7"])
    with pytest.raises(SystemExit) as stop:
        run(main, Config, "")
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert error.startswith(told)
    assert error.count("\n") == 1


def test_a_file_that_cannot_be_written_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stop:
        run(lambda _: (tmp_path / "no" / "x").write_text(""), Config, "")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no' / 'x'}: No such file or directory\n"


def test_a_bug_stays_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(ZeroDivisionError):
        run(lambda _: 1 / 0, Config, "")


@dataclass
class Asking:
    """Some photos."""

    photos: tuple[str, ...] = field(default=())  # what to look for
    k: int = 5  # neighbours


def test_what_stands_without_a_flag_and_a_flag_of_one_letter():
    assert parse_config(Asking, "", ["a.jpg", "-k", "3", "b.jpg"]) == Asking(["a.jpg", "b.jpg"], 3)
    assert parse_config(Asking, "", ["--k", "3"]) == Asking((), 3)
