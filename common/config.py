"""From a dataclass of hyperparameters to command-line flags, and from a user's mistake to one clear sentence."""

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable
from typing import Any, TypeVar

Config = TypeVar("Config")


RANGES = {  # of hyperparameters, which mean the same in every script
    "batch_size": (2, 65_536),
    "learning_rate": (1e-9, 10.0),
    "weight_decay": (0.0, 10.0),
    "embedding_dim": (1, 65_536),
    "width": (1, 1_024),
    "least_area": (0.01, 1.0),
    "temperature": (0.001, 10.0),
    "scale": (0.1, 1_000.0),
    "margin": (0.0, 2.0),
    "class_margin": (0.0, 2.0),
    "whitening": (0.0, 1.0),
    "pixel_weight": (0.0, 1e6),
    "feature_weight": (0.0, 1e6),
    "view_weight": (0.0, 1e6),
    "port": (1, 65_535),
    "max_megabytes": (1, 10_000),
}


class UserError(Exception):
    """Something that the user can put right: the message says what was wrong, with which file or value, what to do."""


def parse_config(config_class: type[Config], description: str, arguments: list[str] | None = None) -> Config:
    """An instance of `config_class` whose fields the command line may override: `--batch-size 32`.

    Every field needs a default; its type (int, float, str, bool or a Literal) checks the flag, and the comment behind
    it is the flag's help. A tuple[str, ...] takes what stands on the command line without a flag. `arguments` are those
    of the command line unless given. A flag that doesn't fit ends the process with exit code 2. Raises `UserError` for
    a value outside `RANGES`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    comments = _comments(config_class)
    for field in dataclasses.fields(config_class):
        meaning = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        if typing.get_origin(field.type) is tuple:  # what stands on the command line without a flag
            parser.add_argument(field.name, nargs="*", default=field.default, help=comments.get(field.name))
            continue
        flags = dict.fromkeys(("--" + field.name.replace("_", "-"), "--" + field.name))
        flags |= {"-" + field.name: None} if len(field.name) == 1 else {}
        parser.add_argument(*flags, default=field.default, help=meaning, **_parsing(field.type))
    config = config_class(**vars(parser.parse_intermixed_args(arguments)))
    for name, (low, high) in RANGES.items():
        value = getattr(config, name, low)
        if not low <= value <= high:  # NaN too
            raise UserError(f"{name} is {value}: give a value from {low:g} to {high:g}")
    return config


def demonstration(config: Config, values: dict[str, Any]) -> Config:
    """`config` with `values` in place of defaults, and a line that says so: what a run on drawn photos does, so that it
    ends within minutes on any machine. What is no longer the default was set by the user and stays."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    values = {name: value for name, value in values.items() if getattr(config, name) == defaults[name] != value}
    if values:
        told = ", ".join(f"{name} {value} (not {defaults[name]})" for name, value in values.items())
        print(f"A demonstration on drawn photos, with {told}; other values given as flags stay.\n", flush=True)
    return dataclasses.replace(config, **values)


def run(main: Callable[[Any], Any], config_class: type, description: str) -> None:
    """Runs `main(config)` as a program: exit code 2 and one sentence for a `UserError` or a file that
    can't be read or written, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a photo's name may hold what the terminal's encoding can't show
        stream.reconfigure(errors="backslashreplace")
    try:
        main(parse_config(config_class, description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:
            raise
        print("error: " + (f"{error.filename}: " if error.filename else "") + str(error.strerror), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "stopped: no result was written; what was embedded so far is kept for the next run, and --resume goes on "
            "after the last whole epoch",
            file=sys.stderr,
        )
        sys.exit(130)


def _parsing(kind: Any) -> dict[str, Any]:
    """What argparse needs to read a flag of type `kind`."""
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is int:
        return {"type": _whole_number, "metavar": "N"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def _whole_number(text: str) -> int:
    """Seeds, sizes and counts alike: none of the hyperparameters that are whole numbers is ever negative."""
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up, of at most 18 digits")
    return int(text)


def _comments(config_class: type) -> dict[str, str]:
    """The comment behind each field: {"seed": "of the split, ..."}; empty where the source is not to be had."""
    try:
        source = inspect.getsource(config_class)
    except OSError:
        return {}
    return dict(re.findall(r"^    (\w+):[^#\n]*# *(.*?)\s*$", source, re.MULTILINE))
