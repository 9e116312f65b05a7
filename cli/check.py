"""`snnconv check`: say whether a network can become spiking, and why not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from . import console, options
from .source import NetworkOptions, network_options, source_argument

NOT_CONVERTIBLE = 3


@options.command(
    "check", example="snnconv check resnet18\nsnnconv check checkpoint.pth --arch resnet50 --json"
)
@source_argument
@network_options
@options.replace_option
@options.strict_option
@options.json_option
@options.verbosity_options
def command(
    source: str,
    network: NetworkOptions,
    replace_activations: str | None,
    strict: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> int:
    """Plan the conversion of a network, without converting anything.

    Every node of the network is a synapse, a neuron, exact on counts, folded, removed, analog (no
    sum of spikes, computed apart) or unsupported; -v lists them all. A timm name is built with
    random weights, nothing is fetched. Exit code 3 if the network cannot be converted.
    """
    from snnconv import __version__, replace
    from snnconv.errors import NotConvertibleError
    from snnconv.folding import fold
    from snnconv.graph import trace
    from snnconv.pipeline import check_fold
    from snnconv.plan import ConversionPlan, make_plan

    loaded = network.load(source, pretrained=False)
    model, replaced = loaded.model, dict[str, int]()
    if replace_activations is not None:
        model, replaced = replace.replace_activations(model)
    plan = ConversionPlan([], [], {})
    try:
        traced = trace(model, loaded.preprocessing.input_size)
        plan = make_plan(traced)
        check_fold(traced, fold(traced, plan))
        plan.require_convertible(strict=strict)
        problems = []
    except NotConvertibleError as error:
        problems = error.problems or [error.message]
    contents = {
        "schema": "snnconv.check/1",
        "version": __version__,
        "source": source,
        "model": {"name": loaded.name, "args": loaded.model_args},
        "replaced_activations": replaced,
        **plan.to_dict(),
        "verdict": "not convertible" if problems else "convertible",
        "problems": problems,
    }
    if as_json:
        console.emit_json(contents)
    else:
        _print(contents, verbose)
    return NOT_CONVERTIBLE if problems else 0


def _print(contents: dict[str, Any], verbose: bool) -> None:
    share, nodes = contents["mac_share_percent"], contents["nodes"]
    if verbose:
        rows = [(n["path"], n["operation"], n["role"], n["reason"]) for n in nodes]
        console.print_table(None, ["node", "operation", "becomes", "reason"], rows)
    roles = Counter(n["role"] for n in nodes)
    summary = [
        ("verdict", contents["verdict"]),
        *options.replaced_row(contents["replaced_activations"]),
        ("nodes", ", ".join(f"{count} {role}" for role, count in roles.most_common())),
        (
            "spiking",
            f"{share['spiking']:g} % of multiply-accumulates, {share['analog']:g} % analog"
            + console.tallied([n["operation"] for n in nodes if n["role"] == "analog"]),
        ),
    ]
    console.print_table(None, ["", contents["model"]["name"]], summary)
    rows = [
        (n["path"], n["operation"], n["reason"], n["remedy"])
        for n in nodes
        if n["role"] == "unsupported"
    ]
    if contents["problems"] and not rows:
        console.note("\n".join(contents["problems"]))
    elif rows:
        console.print_table(None, ["in the way", "operation", "reason", "what to do"], rows)
