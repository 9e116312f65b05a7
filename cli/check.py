"""`snnconv check`: say whether networks can become spiking, and why not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.choices import DEFAULT_TIMESTEPS

from . import console, options
from .source import NetworkOptions, network_options, source_argument

if TYPE_CHECKING:
    from snnconv.examination import Examination

NOT_CONVERTIBLE = 3
# Of many networks, so much of the first reason against one is shown.
REASON = 70


@options.command(
    "check",
    example="snnconv check resnet18\n"
    "snnconv check checkpoint.pth --arch resnet50 --json\n"
    "snnconv check 'regnet*'",
)
@source_argument
@network_options
@click.option(
    "-T",
    "--timesteps",
    type=options.TIMESTEPS,
    default=DEFAULT_TIMESTEPS,
    show_default=True,
    help="T that estimates are for.",
)
@options.replace_option
@options.strict_option
@options.json_option
@options.verbosity_options
def command(
    source: str,
    network: NetworkOptions,
    timesteps: int,
    replace_activations: str | None,
    strict: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> int:
    """Plan the conversion of a network, without converting anything.

    Every node of the network is a synapse, a neuron, exact on counts, folded, removed, analog (no
    sum of spikes, computed apart) or unsupported; -v lists them all. Of a timm name only the shapes
    are built, nothing is fetched. A name with wildcards stands for all architectures of timm that
    fit, a row each. Costs are estimates of a dense simulation. Exit code 3 if a network cannot be
    converted.
    """

    def examined(name: str) -> dict[str, Any]:
        from snnconv.examination import examine
        from snnconv.replace import replace_activations as replaced_by

        loaded = network.load(name, pretrained=False, shapes_only=True)
        model, replaced = loaded.model, dict[str, int]()
        if replace_activations is not None:
            model, replaced = replaced_by(model)
        size = loaded.preprocessing.input_size
        found = examine(model, size, timesteps=timesteps, strict=strict)
        return _contents(name, loaded.name, loaded.model_args, replaced, found)

    names = _architectures(source)
    if names is None:
        contents = examined(source)
        if as_json:
            console.emit_json(contents)
        else:
            _print(contents, verbose)
        return NOT_CONVERTIBLE if contents["problems"] else 0
    return _many(names, examined, as_json, quiet)


def _contents(
    source: str, name: str, args: dict[str, Any], replaced: dict[str, int], found: Examination
) -> dict[str, Any]:
    from snnconv import __version__

    return {
        "schema": "snnconv.check/1",
        "version": __version__,
        "source": source,
        "model": {"name": name, "args": args},
        "replaced_activations": replaced,
        **found.to_dict(),
    }


def _architectures(source: str) -> list[str] | None:
    """Return the architectures a name with wildcards stands for; None if it has none.

    Raises UsageError if there are none.
    """
    if not set("*?[") & set(source) or ":" in source or Path(source).exists():
        return None
    import timm

    from snnconv.errors import UsageError
    from snnconv.model_zoo import register

    register()
    names: list[str] = timm.list_models(source)
    if not names:
        raise UsageError(f"no architecture of timm is like {source!r}")
    return names


def _many(names: list[str], examined: Any, as_json: bool, quiet: bool) -> int:
    """Examine many architectures; one that cannot be built is a row, too."""
    from snnconv import __version__
    from snnconv.errors import SnnconvError, first_line

    rows: list[dict[str, Any]] = []
    with console.progress(quiet) as report:
        for done, name in enumerate(names):
            report("check", done, len(names), name)
            try:
                contents = examined(name)
                del contents["nodes"]
            except Exception as error:  # of a model's own: no row may cost the others
                text = error.message if isinstance(error, SnnconvError) else first_line(error)
                contents = {"source": name, "verdict": "not convertible", "problems": [text]}
            rows.append(contents)
        report("check", len(names), len(names))
    convertible = sum(not row["problems"] for row in rows)
    if as_json:
        console.emit_json(
            {
                "schema": "snnconv.checks/1",
                "version": __version__,
                "convertible": convertible,
                "models": rows,
            }
        )
    else:
        columns = ("network", "verdict", "spiking %", "neurons", "depth", "parameters", "reason")
        console.print_table(None, columns, [_row(row) for row in rows])
        console.note(f"{convertible} of {len(rows)} convertible", quiet)
    return 0 if convertible == len(rows) else NOT_CONVERTIBLE


def _row(contents: dict[str, Any]) -> tuple[str, ...]:
    problems = contents["problems"]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    reason = problems[0] if problems else ""
    if len(reason) > REASON:
        reason = reason[: REASON - 1] + "…"
    found = contents.get("neurons")
    return (
        contents["source"],
        "no" if problems else "yes",
        f"{contents['mac_share_percent']['spiking']:g}" if found and not problems else "",
        f"{contents['neurons']:,}" if found and not problems else "",
        f"{contents['depth']}" if found and not problems else "",
        f"{contents['parameters']:,}" if "parameters" in contents else "",
        reason + more,
    )


def _print(contents: dict[str, Any], verbose: bool) -> None:
    share, nodes = contents["mac_share_percent"], contents["nodes"]
    if verbose:
        rows = [(n["path"], n["operation"], n["role"], n["reason"]) for n in nodes]
        console.print_table(None, ["node", "operation", "becomes", "reason"], rows)
    summary = [
        ("verdict", contents["verdict"]),
        *options.replaced_row(contents["replaced_activations"]),
        ("network", f"{contents['parameters']:,} parameters"),
    ]
    if nodes and not contents["problems"]:
        estimate = contents["estimate"]
        steps = estimate["timesteps"]
        summary[-1] = (
            "network",
            f"{contents['parameters']:,} parameters, {contents['neurons']:,} neurons, depth "
            f"{contents['depth']}",
        )
        summary += [
            (
                "spiking",
                f"{share['spiking']:g} % of multiply-accumulates, {share['analog']:g} % analog",
            ),
            (
                "cost",
                f"T {steps}: {_large(estimate['macs'])} additions an image at most, "
                f"{estimate['times_ann']:.3g} times the ANN's {_large(contents['ann_macs'])} "
                "multiply-accumulates",
            ),
            (
                "memory",
                f"about {estimate['weights_mib']:.3g} MiB of weights and "
                f"{estimate['image_mib']:.3g} MiB an image",
            ),
        ]
    console.print_table(None, ["", contents["model"]["name"]], summary)
    known = [n for n in nodes if n["role"] != "unsupported"]
    if known:
        classes = [row[:-1] for row in _classes(known)]
        console.print_table(None, ["class", "operations", "where", "why"], classes)
    obstacles = [row[1:] for row in _classes([n for n in nodes if n["role"] == "unsupported"])]
    if obstacles:
        columns = ["in the way", "where", "why", "what to do"]
        console.print_table(None, columns, obstacles)
    elif contents["problems"]:
        console.print_table(None, ["in the way"], [[p] for p in contents["problems"]])


def _classes(nodes: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Put nodes that become the same for the same reason into a row.

    A row has the class, the operations, where they are, the reason, and the remedy.
    """
    from snnconv.plan import ROLES

    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for node in nodes:
        key = ROLES.index(node["role"]), node["reason"], node["remedy"]
        groups.setdefault(key, []).append(node)
    rows: list[tuple[str, ...]] = []
    for (role, reason, remedy), alike in sorted(groups.items(), key=lambda item: item[0][0]):
        counted = Counter(n["operation"] for n in alike).most_common()
        operations = ", ".join(f"{count} {name}" for name, count in counted)
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        rows.append((ROLES[role], operations, f"{alike[0]['path']}{more}", reason, remedy))
    return rows


def _large(number: int) -> str:
    """Spell a number as 1.82 G."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
