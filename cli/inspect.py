"""`snnconv inspect`: show what a spiking checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import console, options

if TYPE_CHECKING:
    from snnconv.network import SpikingNetwork


@options.command("inspect", example="snnconv inspect resnet20.snn.safetensors")
@options.checkpoint_argument
@options.json_option
@options.verbosity_options
def command(checkpoint: str | None, as_json: bool, verbose: bool, quiet: bool) -> None:
    """Show a spiking checkpoint, by default the newest here: settings, layers, number types.

    For every layer: its neurons, what it listens to, its thresholds in row units, the type of its
    counts, and the bits its membrane needs at the checkpoint's T.
    """
    path, _ = options.spiking_checkpoint(checkpoint, quiet)
    from snnconv import __version__
    from snnconv.checkpoint import load_network

    network = load_network(path)
    timetable = network.timetable()
    contents = {
        "schema": "snnconv.inspection/1",
        "version": __version__,
        "checkpoint": path.name,
        "model": network.model,
        "timesteps": network.timesteps,
        "schedule": network.schedule,
        "drain": network.drain,
        "latency_steps_before_drain": timetable.steps_before_drain,
        "neuron": network.neuron,
        "initial_membrane": network.initial_membrane,
        "weight_bits": network.weight_bits,
        "preprocessing": network.preprocessing.to_dict(),
        "neurons": network.neurons,
        "depth": network.depth,
        "readouts": [{"name": r.name, "shape": list(r.shape)} for r in network.readouts],
        "layers": _layers(network),
        "provenance": network.provenance,
    }
    if as_json:
        console.emit_json(contents)
    else:
        _print(contents)


def _layers(network: SpikingNetwork) -> list[dict[str, Any]]:
    import torch

    from snnconv.network import Population, Readout, count_dtype, membrane_bound

    limits = network.count_limits(network.timesteps)
    rows = []
    for node in network.nodes:
        if not isinstance(node, (Population, Readout)):
            continue
        bound = membrane_bound(node, limits, network.timesteps)
        row: dict[str, Any] = {
            "layer": node.name,
            "neurons": 0,
            "shape": list(node.shape),
            "depth": node.depth,
            "sources": [s.source for s in node.branches],
            "weights": sum(s.weight.numel() for s in node.branches),
            "shift": max(int(s.shift.max()) for s in node.branches),
            "threshold": None,
            "counts": None,
            "two_sided": None,
            "membrane_bits": bound.bit_length() + 1,
        }
        if isinstance(node, Population):
            row |= {
                "layer": node.path,
                "neurons": torch.Size(node.shape).numel(),
                "threshold": [int(node.threshold.min()), int(node.threshold.max())],
                "counts": str(count_dtype(*limits[node.name])).removeprefix("torch."),
                "two_sided": node.two_sided,
            }
        rows.append(row)
    return rows


def _print(contents: dict[str, Any]) -> None:
    model, calibration = contents["model"], contents["provenance"].get("calibration", {})
    on = calibration.get("on")
    rows = [
        ("network", f"{model.get('name', 'unnamed')}, {contents['neurons']:,} neurons"),
        (
            "settings",
            f"T {contents['timesteps']}, {contents['schedule']}, {contents['neuron']}, V0 "
            f"{contents['initial_membrane']}, {contents['weight_bits']}-bit weights",
        ),
        (
            "clips",
            "unknown: it was converted from Python"
            if not calibration
            else f"{calibration['method']}, from "
            + (f"{on['images']} {on['split']} images, seed {on['seed']}" if on else "no data"),
        ),
        ("input", "x".join(map(str, contents["preprocessing"]["input_size"]))),
        ("outputs", ", ".join(f"{r['name']} {r['shape']}" for r in contents["readouts"])),
    ]
    if model.get("ann"):
        rows.append(("ANN", f"{model['ann']['top1_percent']:.2f} % top-1 at conversion"))
    console.print_table(None, ["", contents["checkpoint"]], rows)
    layers = [
        (
            row["layer"],
            "x".join(map(str, row["shape"])),
            row["depth"],
            " + ".join(row["sources"]),
            row["weights"],
            "–" if row["threshold"] is None else "..".join(map(str, row["threshold"])),
            row["counts"] or "–",
            row["membrane_bits"],
        )
        for row in contents["layers"]
    ]
    columns = ["layer", "shape", "depth", "from", "weights", "threshold", "counts", "membrane bits"]
    console.print_table(None, columns, layers)
