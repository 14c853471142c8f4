"""From a dataclass of hyperparameters to command-line flags, and from a user's mistake to one clear sentence."""

import argparse
import ast
import contextlib
import dataclasses
import gc
import inspect
import io
import re
import signal
import sys
import textwrap
import tokenize
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from common.process import Terminated, quiet_unless_first, terminated_like_ctrl_c

ConfigT = TypeVar("ConfigT")


class UserError(Exception):
    """Something that the user can fix: the message says what was wrong, with which file or value, and what to do."""


def printable(text: object) -> str:
    """A text as one line for a terminal: what would move the cursor, begin a line or turn the order of letters around,
    as names of files may, is escaped.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


class Range(NamedTuple):
    """The values that a hyperparameter may have, both ends included: `Annotated[float, Range(0, 1)]`."""

    low: float
    high: float


@dataclass
class EngineConfig:
    """Which photos are searched, how, and what computes their embeddings."""

    engine: Literal["exact", "hnsw", "milvus"] = (
        "exact"  # "hnsw": a graph, faster on large galleries, misses some neighbours; "milvus": a vector database
    )
    graph_code: Literal["float32", "float16", "int8"] = "float32"  # embeddings in hnsw's graph; smaller ones miss more
    graph_depth: Annotated[int, Range(1, 32_768)] = 64  # candidates that a search of a graph keeps; more miss less
    milvus: str = "data/milvus.db"  # a server's address, http://host:19530, or a file; MILVUS_TOKEN is the token
    collection: str = ""  # in Milvus; empty: named after the network and the folder of the photos
    inference: Literal["torch", "openvino", "int8"] = (
        "torch"  # "openvino": faster on many CPUs, an extra; "int8": 8-bit convolutions in it, faster still
    )
    exclude: tuple[str, ...] = ()  # files and folders to leave out, by path or name, with * and ?
    copy_threshold: Annotated[float, Range(0.5, 1)] = (
        0.95  # correlation of two photos' pixels from which they count as copies; 1: only if their files are the same
    )


@dataclass
class RunConfig(EngineConfig):
    """Hyperparameters of every run; those of the method stand in its script."""

    # Data
    data: str = (
        "auto"  # a folder of photos, "synthetic" (generated here), or "auto": data/ if it has any, else a download
    )
    queries: str = ""  # a folder of query photos; empty: 10 % of each class of data, at least one photo, is held out
    split: Literal["test", "validation", "unseen"] = (
        "test"  # "validation": queries from the gallery, to tune on; "unseen": half of the classes train, others test
    )
    also: tuple[str, ...] = ()  # more labelled folders to test on alone, each photo searching the others
    labelled: bool = True  # False: folders are no classes; train on views alone
    group_duplicates: bool = False  # keep near-copies on one side of the split; finding them takes a minute or two
    allow_unreadable: Annotated[float, Range(0, 1)] = 0.1  # of the photos, as a fraction; more stop the run
    seed: int = 0  # of the split, the initial weights, the order of the photos, their views and the distorted copies

    # Computing
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available
    precision: Literal["auto", "float32"] = "auto"  # "auto": 16 bits where the device has units for them
    embed_batch_size: Annotated[int, Range(0, 65_536)] = 0  # photos embedded at a time; 0: 8 on a CPU, 256 on a GPU
    compile: bool = False  # torch.compile the training step: a slow start, then faster on a GPU
    cache: str = "data/.cache"  # a folder that keeps decoded photos and embeddings for the next run, or "none"

    # Output
    results: str = "results"  # the folder for the result file, the list of neighbours, the pictures and the checkpoint
    resume: bool = False  # continue from the checkpoint in results, where an interrupted run left it


RENAMED = {  # flags of earlier versions -> what they are called now
    "class_margin": "positive_margin",
    "margin": "negative_margin",
    "mining": "reduction",
    "least_area": "min_crop_area",
    "turns": "repeats",
    "embedding_dim": "detail_dim",
    "semantic_dim": "detail_dim",
    "width": "decoder_width",
}


def parse_config(config_class: type[ConfigT], description: str, arguments: list[str] | None = None) -> ConfigT:
    """An instance of the dataclass `config_class` whose fields the command line may override: `--batch-size 32`.

    Every field needs a default. Its type (int, float, str, bool or a Literal) checks the flag, `Annotated[..., Range]`
    limits it, and the comment behind it is its help text. A tuple[str, ...] takes any number of values: in a
    `RunConfig`, or where it is inherited, those behind its flag, which may be repeated; else the positional arguments,
    with all that follows "--", and other such flags take one value at a time. The names of the flags that were given
    are kept for `apply_overrides`. `arguments` are those of the command line by default.

    Raises:
        UserError: a value out of its range, or a flag that is called differently now.
        SystemExit: with code 2, for a flag that is unknown or can't be parsed.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    comments = field_comments(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    positional = _positional(config_class)
    for name, field in fields.items():
        if name == positional:
            parser.add_argument(name, nargs="*", default=argparse.SUPPRESS, help=comments.get(name))
            continue
        flags = dict.fromkeys(("--" + name.replace("_", "-"), "--" + name, *(["-" + name] if len(name) == 1 else [])))
        meaning = f"{comments.get(name, '')} (default: {field.default!r})".replace("%", "%%")
        kind, _ = _type_and_range(config_class, name)
        parsing = _parsing(kind, one_at_a_time=bool(positional))
        parser.add_argument(*flags, default=argparse.SUPPRESS, help=meaning, **parsing)
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if positional and "--" in arguments else len(arguments)  # argparse forgets it
    _refuse_renamed(arguments[:end], fields.keys())
    given = vars(parser.parse_intermixed_args(arguments[:end]))
    if rest := arguments[end + 1 :]:
        given[positional] = [*given.get(positional, []), *rest]
    given = {name: _expand_home(value) for name, value in given.items()}
    config = config_class(**given)
    check_ranges(config)
    config._given = frozenset(given)  # type: ignore[attr-defined]  # not a hyperparameter
    return config


def check_ranges(config: object) -> None:
    """Raises `UserError` for a field outside its `Range`; NaN is outside every one."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        _, limits = _type_and_range(type(config), field.name)
        value = getattr(config, field.name)
        if limits and not limits.low <= value <= limits.high:
            raise UserError(f"{field.name} is {value}: give a value from {limits.low:g} to {limits.high:g}")


def hyperparameters(config: object) -> dict[str, Any]:
    """The fields of a config as a dictionary, for a file."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]


def apply_overrides(config: ConfigT, overrides: Mapping[str, tuple[Any, Any]]) -> ConfigT:
    """`config` with {field: (default, override)} applied, and a line that says so: for quick runs on synthetic images.

    A field that was given as a flag, or that is no longer the default since the user edited the script, stays.
    """
    given: frozenset[str] = getattr(config, "_given", frozenset())
    values = {
        name: override
        for name, (default, override) in overrides.items()
        if name not in given and getattr(config, name) == default
    }
    if values:
        changes = ", ".join(f"{name} {value} (default: {overrides[name][0]})" for name, value in values.items())
        print(f"Quick run on synthetic images: {changes}. Flags and edited values are kept.\n", flush=True)
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def run_script(main: Callable[[Any], Any], config_class: type, description: str | None) -> None:
    """Runs `main(config)` as a program.

    Exit code 2 and one sentence for a `UserError` or a file that can't be read or written; 130 for Ctrl-C, 143 for
    SIGTERM and 129 for SIGHUP, which a closed terminal sends.
    """
    for stream in (sys.stdout, sys.stderr):  # a photo's name may contain what the terminal's encoding can't show
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            stream.reconfigure(errors="backslashreplace")
    gc.freeze()  # the garbage collector needn't look through all that was imported, not even when the program ends
    try:
        with quiet_unless_first(), terminated_like_ctrl_c():
            main(parse_config(config_class, description or ""))
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{printable(error.filename)}: " if error.filename else ""
        print(f"error: {place}{error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Terminated) else signal.SIGINT
        hint = ": --resume continues after the last complete epoch" if issubclass(config_class, RunConfig) else ""
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"stopped{hint}", file=sys.stderr)
        sys.exit(128 + number)


def field_comments(config_class: type) -> dict[str, str]:
    """The comment behind each field, base classes included: {"seed": "of the split, ..."}.

    A comment may stand on any line of a wrapped field. Empty where the source is not available.
    """
    comments: dict[str, str] = {}
    for owner in reversed(config_class.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):
            continue
        by_line = {
            token.start[0]: token.string.lstrip("# ").rstrip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                comments[node.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
    return comments


def _refuse_renamed(arguments: list[str], names: typing.Collection[str]) -> None:
    for argument in arguments:
        old = argument.split("=")[0].lstrip("-").replace("-", "_")
        if argument.startswith("--") and old not in names and RENAMED.get(old) in names:
            raise UserError(f"--{old.replace('_', '-')} is called --{RENAMED[old].replace('_', '-')} now")


def _expand_home(value: Any) -> Any:
    """A value with ~ at its start expanded, as a shell does not behind "=", and a list of values as a tuple."""
    if isinstance(value, list):
        return tuple(_expand_home(each) for each in value)
    return str(Path(value).expanduser()) if isinstance(value, str) and re.match(r"~([/\\]|$)", value) else value


def _positional(config_class: type) -> str:
    """The field that takes the arguments without a flag, or ""."""
    if issubclass(config_class, RunConfig):
        return ""
    kinds = {name: _type_and_range(config_class, name)[0] for name in config_class.__annotations__}
    return next((name for name, kind in kinds.items() if typing.get_origin(kind) is tuple), "")


def _type_and_range(config_class: type, name: str) -> tuple[Any, Range | None]:
    """The type of a field and the `Range` in its annotation, if any."""
    kind = typing.get_type_hints(config_class, include_extras=True)[name]
    if typing.get_origin(kind) is not Annotated:
        return kind, None
    kind, *notes = typing.get_args(kind)
    return kind, next((note for note in notes if isinstance(note, Range)), None)


def _parsing(kind: Any, one_at_a_time: bool) -> dict[str, Any]:
    """What argparse needs to read a flag of type `kind`; of tuples, whether all values stand behind one flag."""
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {"metavar": "NAME", **({"action": "append"} if one_at_a_time else {"nargs": "+", "action": "extend"})}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is int:
        return {"type": _whole_number, "metavar": "N"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def _whole_number(text: str) -> int:
    """Seeds, sizes and counts alike: none of the hyperparameters that are whole numbers is ever negative."""
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (0 or more, at most 18 digits)")
    return int(text)
