"""`snnconv zoo`: list the networks that come with the package."""

from __future__ import annotations

from dataclasses import asdict

from . import console, options


@options.command("zoo", example="snnconv zoo")
@options.json_option
@options.verbosity_options
def command(as_json: bool, verbose: bool, quiet: bool) -> None:
    """List networks, spiking checkpoints and recipes of the zoo, and where they come from.

    A network with weights in the package converts as `snnconv convert zoo:NAME`; the others are
    architectures, registered with timm, for your own checkpoint (`--arch NAME`). A spiking
    checkpoint is evaluated as `snnconv eval zoo:NAME`; a recipe is used as `--recipe NAME`.
    """
    from snnconv import recipe
    from snnconv.model_zoo import catalog

    entries = catalog.entries()
    checkpoints = list(catalog.checkpoints())
    recipes = [recipe.read_recipe(name) for name in recipe.names()]
    if as_json:
        console.emit_json(
            {
                "schema": "snnconv.zoo/1",
                "entries": [asdict(e) for e in entries],
                "checkpoints": checkpoints,
                "recipes": [asdict(r) for r in recipes],
            }
        )
        return
    rows = [(e.name, "yes" if e.weights else "no", e.description, e.reference) for e in entries]
    console.print_table(None, ["network", "weights", "description", "reference"], rows)
    if checkpoints:
        console.print_table(
            None, ["spiking checkpoint"], [(f"zoo:{name}",) for name in checkpoints]
        )
    described = [(r.name, r.arch or "any", r.description, r.reference) for r in recipes]
    console.print_table(None, ["recipe", "network", "description", "reference"], described)
