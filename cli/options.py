"""The options that commands share, and what their values mean.

Every decorator adds one parameter: `json_option` → `as_json`, `verbosity_options` → `verbose` and
`quiet`, the others their own name. What a flag leaves open comes from the environment, then from
snnconv.toml in the current folder, then from the default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from snnconv.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
SETTINGS_FILE = "snnconv.toml"
DATA_VARIABLE = "SNNCONV_DATA"
CHECKPOINT_PATTERN = "*.snn.safetensors"


class _Example(click.Command):
    """A command whose help begins with an example."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        """Keep the example, one command line per line."""
        super().__init__(*args, **kwargs)
        self.example = example

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example, then what click writes."""
        lines = self.example.splitlines()
        formatter.write("".join([f"Example: {lines[0]}\n", *(f"{'':9}{x}\n" for x in lines[1:])]))
        formatter.write_paragraph()
        super().format_help(ctx, formatter)


class ExampleCommand(_Example):
    """A single command with an example."""


class ExampleGroup(_Example, click.Group):
    """A group of commands with an example."""


def command(name: str, example: str) -> Callable[[Callable[..., Any]], ExampleCommand]:
    """Declare a command; its help starts with `example`, one command line per line."""
    return click.command(
        name, cls=ExampleCommand, example=example, context_settings=CONTEXT_SETTINGS
    )


def json_option(function: F) -> F:
    """Add --json as `as_json: bool`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."
    )(function)


def verbosity_options(function: F) -> F:
    """Add -v as `verbose: bool` and -q as `quiet: bool`."""
    function = click.option("-q", "--quiet", is_flag=True, help="Show no progress and no notes.")(
        function
    )
    return click.option(
        "-v", "--verbose", is_flag=True, help="Show details, and where an error arose."
    )(function)


def device_option(function: F) -> F:
    """Add --device as `device: str`; hand it to `resolve_device`."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda", "mps"]),
        default="auto",
        show_default=True,
        help="Where to compute; auto takes CUDA if there is any, else the CPU.",
    )(function)


def seed_option(function: F) -> F:
    """Add --seed as `seed: int`."""
    return click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Seed of everything random.",
    )(function)


def data_option(function: F) -> F:
    """Add --data as `data: str | None`; hand it to `resolve_data` or `require_data`."""
    return click.option(
        "--data",
        metavar="DIR",
        help=f"Images: a folder, or a zoo set like zoo:digits. Else {DATA_VARIABLE}, "
        f"else `data` in {SETTINGS_FILE}.",
    )(function)


def output_option(help: str) -> Callable[[F], F]:
    """Add -o/--output as `output: Path | None`, with its help."""

    def add(function: F) -> F:
        return click.option(
            "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help=help
        )(function)

    return add


def force_option(function: F) -> F:
    """Add --force as `force: bool`."""
    return click.option("--force", is_flag=True, help="Overwrite an existing output.")(function)


def limit_option(function: F) -> F:
    """Add --limit as `limit: int | None`."""
    return click.option(
        "--limit", type=click.IntRange(min=1), metavar="N", help="Use only N images."
    )(function)


def read_settings(folder: Path | None = None) -> dict[str, Any]:
    """Read snnconv.toml in the current folder (or `folder`); without one, return an empty table."""
    path = (folder or Path()) / SETTINGS_FILE
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def resolve_data(option: str | None) -> str | None:
    """Choose the data: --data, else SNNCONV_DATA, else `data` in snnconv.toml, else None."""
    chosen = option or os.environ.get(DATA_VARIABLE)
    if chosen:
        return chosen
    value = read_settings().get("data")
    if value is not None and (not isinstance(value, str) or not value):
        raise UsageError(f'`data` in {SETTINGS_FILE} must be a text like data = "DIR"')
    return value


def require_data(option: str | None) -> str:
    """Choose the data as `resolve_data` does; without any, raise UsageError with the three ways."""
    chosen = resolve_data(option)
    if chosen is None:
        raise UsageError(
            "no data given; there are three ways to give it",
            [
                "the option --data DIR",
                f"the environment variable {DATA_VARIABLE}=DIR",
                f'a line data = "DIR" in {SETTINGS_FILE} in the current folder',
            ],
        )
    return chosen


def newest_checkpoint(folder: Path | None = None) -> Path:
    """Find the newest spiking checkpoint of the current folder (or `folder`).

    Checkpoints of the same age are taken in the order of their names, the last one first.
    """
    found = [p for p in (folder or Path()).glob(CHECKPOINT_PATTERN) if p.is_file()]
    if not found:
        raise UsageError(
            f"no checkpoint given, and there is no {CHECKPOINT_PATTERN} in the current folder; "
            "name one, or make one with snnconv convert"
        )
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name))


def resolve_device(option: str) -> str:
    """Turn --device into "cpu", "cuda" or "mps"; refuse what this machine has not got.

    `auto` never takes MPS, which has no float64.
    """
    if option == "cpu":
        return "cpu"
    import torch

    cuda = torch.cuda.is_available()
    if option == "auto":
        return "cuda" if cuda else "cpu"
    if not (cuda if option == "cuda" else torch.backends.mps.is_available()):
        raise UsageError(
            f"--device {option}: torch finds no such device here; take --device cpu, or see "
            "snnconv env"
        )
    return option
