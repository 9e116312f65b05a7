"""`snnconv eval --baselines`: all methods on the same images, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snnconv.errors import UsageError
from snnconv.files import require_named
from snnconv.launch import is_leader
from snnconv.schemas import BASELINES

from . import console, options
from .ann import forwards_of, load_ann, measure_forwards, stored_ann


def compare(
    checkpoints: Sequence[str],
    data: str | None,
    *,
    split: str,
    timesteps: int | None,
    ann: str | None,
    output: Path | None,
    force: bool,
    limit: int | None,
    seed: int,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure checkpoints, by default the newest here, in every way; print and store a table."""
    found = [options.spiking_checkpoint(name, quiet) for name in checkpoints or (None,)]
    where = options.require_data(data)

    from snnconv import __version__, distributed, measure, report
    from snnconv.checkpoint import load_network
    from snnconv.data import choose_indices

    networks = {path.name: load_network(path) for path, _ in found}
    if len(networks) < len(found):
        raise UsageError("two of the checkpoints have the same name; a table needs different ones")
    first = next(iter(networks.values()))
    place = options.resolve_device(device)
    same = len({network.model.get("weights_sha256") for network in networks.values()}) == 1
    if ann is not None and not same:
        raise UsageError("the checkpoints come from several ANNs; --ann is for those of one")
    images = options.open_for(first, where, split, quiet)
    for other in list(networks.values())[1:]:
        if options.open_for(other, where, split, quiet=True).note != images.note:
            raise UsageError(
                f"{images.name} has one part, and the checkpoints were calibrated on different "
                "images of it; compare them on data with a test part"
            )
    settings = [f"T{timesteps}"] if timesteps else []
    settings += [split] if split != "test" else []
    settings += [f"limit{limit}"] if limit else []
    path = output or report.default_path(found[0][1], "baselines", settings)
    own = {
        "schema": BASELINES,
        "checkpoints": list(networks),
        "data": images.name,
        "seed": seed,
    }
    require_named(path, ".json", "a report")
    report.require_writable(path, force, None if output else own)
    indices = choose_indices(len(images), limit, seed)
    with distributed.group(place, "start it again"), console.progress(quiet) as progress:
        rows = measure.compare(
            networks,
            images,
            indices,
            timesteps=timesteps,
            device=place,
            seed=seed,
            progress=progress,
        )
        measured = stored_ann(first, images) if same else None
        if ann is not None:
            steps = first.timetable(timesteps).timesteps
            forwards = forwards_of(load_ann(ann, first), first, steps, place)
            only = {"ann": forwards["ann"]}
            measured = measure_forwards(only, first, images, indices, place, progress)["ann"]
    measured_images = len(indices) - len(images.unreadable)
    contents = {
        **own,
        "version": __version__,
        "model": ", ".join(dict.fromkeys(network.title for network in networks.values())),
        "split": split,
        "images": measured_images,
        "partial": measured_images < len(images),
        "data_note": images.note,
        "data_sha256": images.sha256(indices),
        "ann": measured,
        "rows": rows,
        "device": place,
    }
    if is_leader():
        report.write(path, contents, options.arguments(None if checkpoints else found[0][0]))
    if as_json:
        console.emit_json(contents)
        return
    _print(contents)
    console.note(f"report: {path}", quiet)
    options.note_unreadable(images.unreadable, quiet)


def _print(contents: dict[str, Any]) -> None:
    several = len({row["checkpoint"] for row in contents["rows"]}) > 1
    rows = []
    if contents["ann"] is not None:
        ann = contents["ann"]
        of = f", stored, {ann['images']} images" if ann["source"] == "stored" else ""
        rows.append([f"ANN{of}", "", f"{ann['top1_percent']:.2f}", *[""] * 6])
    rows += [_row(row) for row in contents["rows"]]
    columns = ["method", "checkpoint", "top-1 %", "at 95 %", "steps", "clocked", "spikes",
               "negative %", "counts %"]  # fmt: skip
    if not several:
        rows = [[row[0], *row[2:]] for row in rows]
        del columns[1]
    some = f"{contents['images']} {contents['split']} images"
    some += " (a part of them)" if contents["partial"] else ""
    console.print_table(f"{contents['model']}: {some}; spikes per neuron", columns, rows)
    for row in contents["rows"]:
        if row["recovered_percent"] is not None:
            console.note(
                f"{row['checkpoint']}: fine-tuning has won back {row['recovered_percent']:.0f} % "
                "of what its parent loses at T; an exact schedule wins back all, in its steps"
            )


def _row(row: dict[str, Any]) -> list[str]:
    from snnconv.report.document import nearly_all

    def number(key: str, form: str) -> str:
        return "" if row[key] is None else format(row[key], form)

    interval, counts = row["interval95_percent"], row["counts_percent"]
    return [
        row["method"],
        row["checkpoint"],
        number("top1_percent", ".2f"),
        "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
        number("latency_steps", "d"),
        number("latency_steps_clocked", "d"),
        number("spikes_per_neuron", ".3f"),
        number("negative_percent", ".1f"),
        "" if counts is None else nearly_all(counts),
    ]
