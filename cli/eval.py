"""`snnconv eval`: measure a spiking checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from snnconv.errors import UsageError

from . import console, options
from .ann import diagnosed, forwards_of, load_ann, measure_forwards, stored_ann
from .baselines import compare
from .convert import parse_drain

SHOWN_STEPS = 12


@options.command(
    "eval",
    example="snnconv eval --timesteps 8\n"
    "snnconv eval resnet20.snn.safetensors --data DIR --schedule wait --json\n"
    "snnconv eval resnet20.snn.safetensors resnet20.tuned.snn.safetensors --baselines",
)
@options.checkpoints_argument
@options.data_option
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="test",
    show_default=True,
    help="Which images; choose settings on train only.",
)
@click.option(
    "-T", "--timesteps", type=click.IntRange(1, 4095), help="T.  [default: the checkpoint's]"
)
@click.option(
    "--schedule",
    type=click.Choice(["paper", "drain", "stagger", "wait"]),
    help="When layers start and stop.  [default: the checkpoint's]",
)
@click.option(
    "--drain",
    metavar="auto|N",
    help="Steps after the last input: until nothing fires, or N.  [default: the checkpoint's]",
)
@click.option(
    "--stagger",
    type=click.IntRange(min=1),
    metavar="K",
    help="With --schedule stagger, a layer starts K steps after the one before.  [default: 1]",
)
@click.option(
    "--neuron",
    type=click.Choice(["signed", "unsigned"]),
    help="Whether neurons may emit negative spikes.  [default: the checkpoint's]",
)
@click.option(
    "--initial-membrane",
    type=click.Choice(["half", "zero"]),
    help="V0, half a threshold or zero.  [default: the checkpoint's]",
)
@click.option(
    "--ann",
    metavar="CHECKPOINT",
    help="Measure the ANN too: the source that was converted. Without retraining, its float QANN "
    "as well.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Compare all methods on the same images: unsigned and signed neurons at T, fine-tuned "
    "checkpoints, the exact schedules.",
)
@click.option(
    "--statistics/--no-statistics",
    default=True,
    show_default=True,
    help="Count operations and energy, and with --ann say which layer is to blame.",
)
@click.option(
    "--page/--no-page", default=True, show_default=True, help="Render the report as HTML, too."
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "native", "counts", "reference", "endpoint"]),
    default="auto",
    show_default=True,
    help="How to simulate; the results are the same. endpoint computes the final accuracy alone.",
)
@options.output_option(
    "Report (JSON).  [default: NAME.SETTINGS.eval.json or NAME.SETTINGS.baselines.json beside the "
    "checkpoint]"
)
@options.force_option
@options.limit_option
@options.seed_option
@options.device_option
@options.json_option
@options.verbosity_options
def command(
    checkpoints: tuple[str, ...],
    data: str | None,
    split: str,
    timesteps: int | None,
    schedule: str | None,
    drain: str | None,
    stagger: int | None,
    neuron: str | None,
    initial_membrane: str | None,
    ann: str | None,
    baselines: bool,
    statistics: bool,
    page: bool,
    engine: str,
    output: Path | None,
    force: bool,
    limit: int | None,
    seed: int,
    device: str,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Simulate a spiking checkpoint, by default the newest here, and report what it does.

    Shows the accuracy at every step, the agreement with the quantised ANN, spikes and latency, and
    writes them to a report. An earlier report of the same settings is replaced. With --baselines
    one checkpoint or several are run in every way there is, for one table.
    """
    if baselines:
        _refuse_with_baselines()
        compare(
            checkpoints,
            data,
            split=split,
            timesteps=timesteps,
            ann=ann,
            output=output,
            force=force,
            limit=limit,
            seed=seed,
            device=device,
            as_json=as_json,
            quiet=quiet,
        )
        return
    if len(checkpoints) > 1:
        raise UsageError("several checkpoints are compared with --baselines; else name one")
    checkpoint = checkpoints[0] if checkpoints else None
    changes: dict[str, Any] = {}
    if schedule is not None:
        changes["name"] = schedule
    if drain is not None:
        changes["drain"] = parse_drain(drain)
    if stagger is not None:
        changes["stagger"] = stagger
    path, named = options.spiking_checkpoint(checkpoint, quiet)
    where = options.require_data(data)

    from snnconv import distributed, report
    from snnconv.checkpoint import load_network
    from snnconv.data import choose_indices
    from snnconv.measure import evaluate, first_within
    from snnconv.normalize import with_settings
    from snnconv.report import comparison, html, reading

    network = load_network(path)
    settings = {"neuron": neuron, "initial_membrane": initial_membrane}
    network = with_settings(network, **{k: v for k, v in settings.items() if v is not None})
    timetable = network.timetable(timesteps, **changes)
    if stagger is not None and timetable.name != "stagger":
        raise UsageError("--stagger belongs to --schedule stagger")
    if timetable.timesteps != network.timesteps:
        console.note(
            f"hint: the network was made for T {network.timesteps}, not {timetable.timesteps}; "
            "converting anew at this T may be more accurate",
            quiet,
        )
    place = options.resolve_device(device)
    images = options.open_for(network, where, split, quiet)
    report_path = output or report.default_path(
        named, "eval", _settings(network, timetable, split, limit)
    )
    own = {"schema": "snnconv.evaluation/1", "data": images.name, "seed": seed}
    report.require_writable(report_path, force, None if output else own)
    page_path = report_path.with_suffix(".html")
    if page:
        report.require_writable(page_path, force or html.is_own(page_path))
    indices = choose_indices(len(images), limit, seed)
    with distributed.group(place, "start it again"), console.progress(quiet) as progress:
        model = None if ann is None else load_ann(ann, network)
        forwards = forwards_of(model, network, timetable.timesteps, place) if model else {}
        evaluation = evaluate(
            network,
            images,
            indices,
            timetable,
            engine=engine,
            device=place,
            seed=seed,
            ann=forwards.pop("ann", None),
            statistics=statistics,
            progress=progress,
        )
        evaluation["checkpoint"] = path.name
        if ann is None:
            evaluation["ann"] = stored_ann(network, images)
        if evaluation["by_step"] is not None and evaluation["ann"] is not None:
            wanted = evaluation["ann"]["top1_percent"]
            evaluation["first_within"]["ann"] = first_within(evaluation["by_step"], wanted)
        if statistics and evaluation["by_step"] is not None:
            evaluation["errors"] = diagnosed(
                network, images, indices, timetable, model, place, progress
            )
        evaluation |= measure_forwards(forwards, network, images, indices, place, progress)
    if distributed.is_leader():
        report.write(report_path, evaluation, console.arguments())
        if page:
            document = comparison.document([reading.read(report_path)])
            report.write_text(page_path, html.render(document))
    if as_json:
        console.emit_json(evaluation)
        return
    _print(evaluation)
    console.note(f"report: {report_path}" + (f", {page_path}" if page else ""), quiet)
    options.note_unreadable(images.unreadable, quiet)


def _refuse_with_baselines() -> None:
    """Raise UsageError for options that say how to run a network: --baselines takes all ways."""
    context = click.get_current_context()
    useless = [
        f"--{name.replace('_', '-')}"
        for name in ("schedule", "drain", "stagger", "neuron", "initial_membrane", "engine")
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if useless:
        raise UsageError(
            f"--baselines runs every way there is; {', '.join(useless)} would do nothing"
        )


def _settings(network: Any, timetable: Any, split: str, limit: int | None) -> list[str]:
    """Name what tells one evaluation of a checkpoint from another."""
    schedule = timetable.name
    if schedule == "stagger" and timetable.stagger != 1:
        schedule += str(timetable.stagger)
    if timetable.name in ("drain", "stagger") and timetable.drain is not None:
        schedule += f"-{timetable.drain}"
    parts = [f"T{timetable.timesteps}", schedule, network.neuron]
    parts += ["zero"] if network.initial_membrane == "zero" else []
    parts += [split] if split != "test" else []
    return parts + ([f"limit{limit}"] if limit else [])


def _print(e: dict[str, Any]) -> None:
    low, high = e["snn"]["interval95_percent"]
    some = f"{e['images']} {e['split']} images" + (" (a part of them)" if e["partial"] else "")
    rows = []
    if e["ann"] is not None:
        of = f", stored, {e['ann']['images']} images" if e["ann"]["source"] == "stored" else ""
        rows.append(("ANN top-1", f"{e['ann']['top1_percent']:.2f} %{of}"))
    if e["drop"] is not None:
        least, most = e["drop"]["interval95_percent"]
        lost = (
            f"{e['drop']['percent']:.2f} points, {least:.2f} to {most:.2f} at 95 %, image by image"
        )
        rows.append(("drop from the ANN", lost))
    if e["qann_float"] is not None:
        rows.append(("float QANN top-1", f"{e['qann_float']['top1_percent']:.2f} %"))
    rows += [
        ("quantised ANN top-1", f"{e['qann']['top1_percent']:.2f} %"),
        ("SNN top-1", f"{e['snn']['top1_percent']:.2f} % ({low:.2f} to {high:.2f} at 95 %)"),
    ]
    if e["snn_by_count"] is not None:
        by_count = e["snn_by_count"]["top1_percent"]
        rows.append(("  by spike count", f"{by_count:.2f} %, as neurons in the readout would fire"))
    if e["by_step"] is not None:
        rows += _course(e)
    rows += _verdicts(e)
    rows.append(
        ("time", f"{e['wall_ms_per_image']:.1f} ms per image, {e['engine']}, {e['device']}")
    )
    title = f"{e['model']}, T {e['timesteps']}, {e['schedule']}, {e['neuron']}: {some}"
    console.print_table(title, ["", "measured"], rows)
    if e["by_step"] is not None:
        steps = _thinned(e["by_step"])
        reached = ["–" if s["top1_percent"] is None else f"{s['top1_percent']:.2f}" for s in steps]
        columns = ["step", *(str(s["step"]) for s in steps)]
        console.print_table(None, columns, [("top-1 %", *reached)])


def _verdicts(e: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows of what it costs, and what to mend."""
    rows = []
    if (cost := e["energy"]) is not None:
        ours, matched = cost["snn_nj"]["total"], cost["qann_nj"]
        rows.append(
            (
                "energy",
                f"{ours / 1000:.2f} µJ per image, {ours / matched:.2f} of the quantised ANN of the "
                f"same bits, {ours / cost['qann_skipping_zeros_nj']:.2f} of one that skips zeros "
                "(arithmetic)",
            )
        )
    if e["errors"] is not None and (mend := e["errors"]["mend"]) is not None:
        rows.append(("mend first", f"{mend['layer']}, {mend['cause']}. {mend['suggestion']}"))
    return rows


def _course(e: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows of what the simulation told."""
    drain, spikes, agreement = e["drain_steps"], e["spikes"], e["agreement"]
    return [
        (
            "agreement",
            f"{agreement['argmax_percent']:.2f} % of arg-maxes, "
            f"{agreement['counts_percent']:.4g} % of counts"
            + (", exact" if agreement["counts_exact"] else ""),
        ),
        (
            "latency",
            f"{e['latency_steps']} steps ({e['latency_steps_clocked']} with one step per hop); "
            f"drain {drain['max']} at most, {drain['mean']:.1f} on average",
        ),
        (
            "spikes",
            f"{spikes['per_neuron']:.3f} per neuron, {spikes['negative_percent']:.1f} % negative, "
            f"{spikes['over_minimum']:.2f}x the minimum",
        ),
    ]


def _thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep a dozen steps, the first and the last among them."""
    if len(steps) <= SHOWN_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(i * last / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
