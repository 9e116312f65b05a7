"""Start the command line and turn every error into one message and one exit code.

A command is a module here that defines `command`. It imports torch, timm and the library inside
the function, so that help answers at once, and it returns its exit code, or None for 0.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata

import click

from snnconv import __version__
from snnconv.errors import SnnconvError, UsageError, suggestion

from . import console
from .options import (
    CONTEXT_SETTINGS,
    ExampleGroup,
    check_settings,
    default_map,
    read_settings,
)

# Name of the command → its module in this folder and the line that `snnconv --help` shows.
COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("convert", "Turn a pretrained network into a verified spiking one."),
    "eval": ("eval", "Measure a spiking checkpoint: accuracy at every step, spikes."),
    "report": ("report", "Make a page of evaluations: figures, tables, comparison."),
    "reproduce": ("reproduce", "Run a report's command again and compare the numbers."),
    "finetune": ("finetune", "Tune a spiking checkpoint for the end of its T steps."),
    "inspect": ("inspect", "Show what a spiking checkpoint holds, layer by layer."),
    "check": ("check", "Say whether a network can become spiking, and why not."),
    "zoo": ("zoo", "List the networks that come with snnconv."),
    "env": ("env", "Show versions, processors and accelerators."),
}

# The packages snnconv needs, by the names they are imported under.
REQUIRED = frozenset(
    {"torch", "torchvision", "timm", "rich", "safetensors", "numpy", "PIL", "sklearn"}
)


class LazyGroup(ExampleGroup):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name every command in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        command: click.Command = module.command
        command.name = cmd_name
        if not {"-h", "--help"} & set(console.arguments()):
            settings = read_settings()
            check_settings(settings, COMMANDS)
            ctx.default_map = {cmd_name: default_map(settings, command)}
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the arguments; suggest near names for a misspelt one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            hint = suggestion(name, COMMANDS, "see snnconv --help")
            raise UsageError(f"there is no command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table alone, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    name="snnconv",
    example="snnconv convert resnet18.pt --data DIR\nsnnconv eval --timesteps 8",
    context_settings=CONTEXT_SETTINGS,
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="snnconv", message="%(prog)s %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Convert pretrained vision networks into spiking networks equal to their quantised ANN."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: Sequence[str]) -> int:
    """Run the command line and return its exit code; the only place that prints errors."""
    console.start(args)
    try:
        code = group.main(args=list(args), prog_name="snnconv", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", [], 130, prefix="")
    except SnnconvError as error:
        return _fail(error.message, error.problems, error.exit_code, error)
    except click.ClickException as error:
        return _fail(_click_message(error), [], error.exit_code)
    except Exception as error:
        message = explain(error)
        if message is None:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            message = f"internal error: {what} (-v shows where; please report it)"
            return _fail(message, [], 1, error, prefix="")
        return _fail(message, [], 1, error)


def explain(error: BaseException) -> str | None:
    """Say in one line what a foreign error means for the user; None if it is a defect of ours."""
    for cause in _chain(error):
        text = str(cause)
        if "torchvision::nms does not exist" in text or (
            "partially initialized module 'torchvision'" in text
        ):
            return (
                f"torchvision {_version('torchvision')} was not built for torch "
                f"{_version('torch')}, so timm cannot be imported; install both from the same "
                "place: pip install --force-reinstall torch torchvision (add the same "
                "--index-url to both if you use one)"
            )
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            package = cause.name.partition(".")[0]
            if package in REQUIRED:
                return (
                    f"the Python package {package} is not installed; install snnconv with its "
                    "requirements: pip install -e . (or make demo)"
                )
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return "out of memory; use another --device, and to retrain a smaller --batch-size"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Walk from an error to what caused it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _click_message(error: click.ClickException) -> str:
    """Put click's complaint on one line, with the command whose help explains it."""
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return f"{message.rstrip('.')} (see {context.command_path} --help)" if context else message


def _fail(
    message: str,
    problems: list[str],
    exit_code: int,
    error: BaseException | None = None,
    prefix: str = "error: ",
) -> int:
    """Print one error on stderr, with --json also as an object on stdout; return the exit code."""
    if error is not None and console.error_style("verbose"):
        click.echo("".join(traceback.format_exception(error)).rstrip(), err=True)
    click.echo("\n".join([prefix + message, *(f"  - {p}" for p in problems)]), err=True)
    if console.error_style("as_json") and not console.emitted():
        console.emit_json(
            {
                "schema": "snnconv.error/1",
                "error": message,
                "problems": problems,
                "exit_code": exit_code,
            }
        )
    return exit_code


if __name__ == "__main__":
    main()
