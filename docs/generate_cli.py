"""Write docs/cli.md from the help of every command; with --check only say whether it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from stored import write

from snnconv.cli.main import COMMANDS, group

TARGET = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Written by `make docs` from the help of each command; do not edit.
"""


def render() -> str:
    """Render the help of the group and of every command as Markdown."""
    root = click.Context(group, info_name="snnconv", **_settings(group))
    parts = [HEAD, _section("snnconv", group.get_help(root))]
    for name in COMMANDS:
        command = group.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, **_settings(command))
        parts.append(_section(f"snnconv {name}", command.get_help(context)))
    return "\n".join(parts)


def _settings(command: click.Command) -> dict:
    """Fix the width, so that the text does not depend on the terminal."""
    return {**command.context_settings, "terminal_width": 96}


def _section(title: str, text: str) -> str:
    body = "\n".join(line.rstrip() for line in text.splitlines())
    return f"## {title}\n\n```text\n{body}\n```\n"


def main(args: list[str]) -> int:
    """Write the file, or with --check compare it; return the exit code."""
    return write({TARGET: render()}, args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
