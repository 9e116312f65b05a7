"""`snnconv zoo`: list the networks that come with the package."""

from __future__ import annotations

from dataclasses import asdict

from . import console, options


@options.command("zoo", example="snnconv zoo")
@options.json_option
@options.verbosity_options
def command(as_json: bool, verbose: bool, quiet: bool) -> None:
    """List the networks of the zoo and where they come from.

    A network with weights in the package converts as `snnconv convert zoo:NAME`; the others are
    architectures, registered with timm, for your own checkpoint (`--arch NAME`).
    """
    from snnconv.model_zoo import catalog

    entries = catalog.entries()
    if as_json:
        console.emit_json({"schema": "snnconv.zoo/1", "entries": [asdict(e) for e in entries]})
        return
    rows = [(e.name, "yes" if e.weights else "no", e.description, e.reference) for e in entries]
    console.print_table(None, ["name", "weights", "description", "reference"], rows)
