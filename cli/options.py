"""The options that commands share, and what their values mean.

Every decorator adds one parameter: `json_option` → `as_json`, `verbosity_options` → `verbose` and
`quiet`, the others their own name. What a flag leaves open comes from the environment, then from
snnconv.toml in the current folder, then from the default.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from snnconv.choices import MAX_TIMESTEPS, MIN_TIMESTEPS
from snnconv.errors import UsageError, refuse_unknown, suggestion
from snnconv.files import SUFFIX

from . import console

if TYPE_CHECKING:
    from snnconv.data import ImageData

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
SETTINGS_FILE = "snnconv.toml"
# In the environment of a command that is run again: what it took from elsewhere is spelled out.
WITHOUT_SETTINGS = "SNNCONV_WITHOUT_SETTINGS"
DATA_VARIABLE = "SNNCONV_DATA"
CHECKPOINT_PATTERN = f"*{SUFFIX}"
TIMESTEPS = click.IntRange(MIN_TIMESTEPS, MAX_TIMESTEPS)
SHARED_SETTINGS = ("data", "device", "seed")
NAMED = 5


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
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=_told_to_console,
        help="Print one JSON object on stdout and nothing else.",
    )(function)


def _told_to_console(context: click.Context, option: click.Parameter, value: bool) -> bool:
    """Let errors be printed as asked for, even if that is asked in snnconv.toml."""
    console.set_error_style(**{str(option.name): value})
    return value


def verbosity_options(function: F) -> F:
    """Add -v as `verbose: bool` and -q as `quiet: bool`."""
    function = click.option("-q", "--quiet", is_flag=True, help="Show no progress and no notes.")(
        function
    )
    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        is_eager=True,
        callback=_told_to_console,
        help="Show details, and where an error arose.",
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
    """Add --data as `data: str | None`; hand it to `require_data` where there must be one."""
    return click.option(
        "--data",
        metavar="DIR",
        envvar=DATA_VARIABLE,
        type=click.Path(),
        help="Images: a folder, an .npz file, zoo:digits, or a timm name like torch/cifar100@DIR. "
        f"Else {DATA_VARIABLE}, else `data` in {SETTINGS_FILE}.",
    )(function)


def complete_checkpoint(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer files, and the spiking checkpoints of the zoo."""
    from snnconv.model_zoo import catalog

    zoo = [f"zoo:{name}" for name in catalog.checkpoints()]
    found = [CompletionItem(name) for name in zoo if name.startswith(incomplete)]
    return (found if incomplete else []) or [CompletionItem(incomplete, type="file")]


def checkpoint_argument(function: F) -> F:
    """Add the spiking checkpoint, a file or zoo:NAME; see `spiking_checkpoint`."""
    return click.argument(
        "checkpoint",
        required=False,
        metavar="[CHECKPOINT|zoo:NAME]",
        shell_complete=complete_checkpoint,
    )(function)


def checkpoints_argument(function: F) -> F:
    """Add any number of spiking checkpoints as `checkpoints: tuple[str, ...]`."""
    return click.argument(
        "checkpoints",
        nargs=-1,
        metavar="[CHECKPOINT|zoo:NAME]...",
        shell_complete=complete_checkpoint,
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
    if WITHOUT_SETTINGS in os.environ:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def default_map(settings: dict[str, Any], command: click.Command) -> dict[str, Any]:
    """Return what snnconv.toml says about the options of one command, by parameter name.

    `data`, `device` and `seed` stand at the top and hold for every command; a table of a command's
    name holds its own defaults, named like the options. Raises UsageError for unknown keys.
    """
    named = {
        opt.removeprefix("--"): p for p in command.params for opt in p.opts if opt.startswith("--")
    }
    values = {k: v for k, v in settings.items() if k in SHARED_SETTINGS and k in named}
    own = settings.get(command.name or "", {})
    if not isinstance(own, dict):
        raise UsageError(f"{SETTINGS_FILE}: [{command.name}] must be a table")
    values |= {k.replace("_", "-"): v for k, v in own.items()}
    refuse_unknown(f"{SETTINGS_FILE}: [{command.name}]", values, named)
    for key, value in values.items():
        require_suitable(f"{SETTINGS_FILE}: {key}", named[key], value)
    if "data" in values and (not isinstance(values["data"], str) or not values["data"]):
        raise UsageError(f'`data` in {SETTINGS_FILE} must be a text like data = "DIR"')
    return {str(named[k].name): v for k, v in values.items()}


def arguments(checkpoint: Path | None = None) -> list[str]:
    """Return the command line, with what came from elsewhere spelled out.

    That are the environment, snnconv.toml and, as the `checkpoint`, the newest one there was: all
    may be others when a report's command is run again.
    """
    context = click.get_current_context()
    given = console.arguments()
    tables = (context.parent and context.parent.default_map) or {}
    from_file = tables.get(str(context.info_name), {})
    added: list[str] = []
    for option in context.command.params:
        name = str(option.name)
        source = context.get_parameter_source(name)
        if source is ParameterSource.ENVIRONMENT:
            added += _spelled(option, option.resolve_envvar_value(context))
        elif source is ParameterSource.DEFAULT_MAP and name in from_file:
            added += _spelled(option, from_file[name])
    return [*given[:1], *added, *given[1:], *([] if checkpoint is None else [str(checkpoint)])]


def _spelled(option: click.Parameter, value: Any) -> list[str]:
    """Return a value as the command line takes it."""
    if isinstance(value, bool):
        names = option.opts if value else option.secondary_opts
        return [n for n in names if n.startswith("--")][:1]
    name = next(n for n in option.opts if n.startswith("--"))
    values = value if isinstance(value, list) else [value]
    return [part for v in values for part in (name, str(v))]


def given(*names: str) -> list[str]:
    """Return those of some options that the command line has, not a recipe or snnconv.toml."""
    context = click.get_current_context()
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]


def gathered(
    name: str, kind: type[Any], added: Iterable[Callable[..., Any]]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds options; they arrive as `name`, a dataclass of a kind."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(*args: Any, **values: Any) -> Any:
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            return function(*args, **values)

        for option in reversed(list(added)):
            command = option(command)
        return command

    return decorate


def require_suitable(where: str, option: click.Parameter, value: Any) -> None:
    """Raise UsageError for a value out of a TOML file that is of no type the option takes."""
    if getattr(option, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{where} must be true or false, not {value!r}")
        return
    several = option.multiple and isinstance(value, list)
    for one in value if several else [value]:
        whole = isinstance(option.type, click.types.IntParamType)
        if isinstance(one, bool) or not isinstance(one, str | int if whole else str | int | float):
            kind = "a whole number" if whole else "a number or a text"
            raise UsageError(f"{where} must be {kind}, not {one!r}")


def check_settings(settings: dict[str, Any], commands: Iterable[str]) -> None:
    """Raise UsageError for keys at the top of snnconv.toml that mean nothing."""
    refuse_unknown(SETTINGS_FILE, settings, [*SHARED_SETTINGS, *commands])


replace_option = click.option(
    "--replace-activations",
    type=click.Choice(["relu"]),
    help="Put ReLU in place of SiLU, GELU, LeakyReLU and the like; the network needs retraining.",
)
strict_option = click.option(
    "--strict",
    is_flag=True,
    help="Refuse networks with functions that are no sums of spikes (gates, SiLU and the like).",
)


def open_for(network: Any, where: str, split: str, quiet: bool) -> ImageData:
    """Open a split for a spiking network, without what calibrated it; say how it was divided."""
    from snnconv.data import open_held_out

    calibrated_on = network.provenance.get("calibration", {}).get("on")
    images = open_held_out(where, split, calibrated_on)
    if images.note:
        console.note(images.note, quiet)
    return images


def replaced_row(replaced: dict[str, int]) -> list[tuple[str, str]]:
    """Return a row of a table that says what has become ReLU, if anything has."""
    if not replaced:
        return []
    return [("now ReLU", ", ".join(f"{count} {name}" for name, count in replaced.items()))]


def parse_drain(text: str) -> int | None:
    """Turn --drain into a number of steps, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--drain must be 'auto' or a number of steps, not {text!r}")
    return int(text)


def require_data(data: str | None) -> str:
    """Return the data given in whatever way; without any, raise UsageError with the three ways."""
    if data is None:
        raise UsageError(
            "no data given; there are three ways to give it",
            [
                "the option --data DIR",
                f"the environment variable {DATA_VARIABLE}=DIR",
                f'a line data = "DIR" in {SETTINGS_FILE} in the current folder',
            ],
        )
    return data


def require_free(state: Path, what: str, resume: bool, force: bool, quiet: bool) -> None:
    """Raise UsageError if interrupted work would be lost, or there is none to resume."""
    if resume and not state.is_file():
        raise UsageError(f"--resume: there is no {state}, no interrupted {what}")
    if state.exists() and not resume and not force:
        raise UsageError(
            f"{state} is an interrupted {what}; give --resume to go on with it, or --force to "
            "begin anew"
        )
    if state.exists() and not resume:
        console.note(f"--force begins anew; the interrupted {what} {state} is given up", quiet)


def note_unreadable(names: list[str], quiet: bool) -> None:
    """Say which images were left out because they cannot be read."""
    if names:
        shown = "; ".join(names[:NAMED]) + ("; ..." if len(names) > NAMED else "")
        console.note(f"left out, cannot be read: {len(names)} images: {shown}", quiet)


def spiking_checkpoint(name: str | None, quiet: bool) -> tuple[Path, Path]:
    """Find the spiking checkpoint a command is about, and the path its reports are named after.

    None is the newest one in the current folder, `zoo:NAME` one of the package, whose reports
    belong into the current folder.
    """
    if name is None:
        path = newest_checkpoint()
        console.note(f"using {path}", quiet)
    elif name.startswith("zoo:"):
        from snnconv.model_zoo import catalog

        known = catalog.checkpoints()
        wanted = name.removeprefix("zoo:")
        if wanted not in known:
            hint = suggestion(wanted, known, f"it has {', '.join(known) or 'none'}")
            raise UsageError(f"the zoo has no spiking checkpoint {wanted!r}{hint}")
        return known[wanted], Path(known[wanted].name)
    else:
        path = Path(name)
    return path, path


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
    """Turn --device into "cpu" or "cuda"; refuse what this machine has not got.

    MPS is refused: it has no float64, in which long sums of integers are exact.
    """
    if option == "cpu":
        return "cpu"
    if option == "mps":
        raise UsageError(
            "--device mps: MPS has no float64, so not every layer would be exact; take --device cpu"
        )
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if option == "auto":
        return "cpu"
    raise UsageError(
        f"--device {option}: torch finds no such device here; take --device cpu, or see snnconv env"
    )
