"""`snnconv eval`: measure a spiking checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.choices import INITIAL_MEMBRANES, NEURONS
from snnconv.errors import UsageError
from snnconv.launch import is_leader
from snnconv.schedule import SCHEDULES

from . import console, evaluation, options
from .ann import drawn_for_ann, load_ann
from .baselines import compare

if TYPE_CHECKING:
    import numpy as np

    from snnconv.data import ImageData
    from snnconv.network import SpikingNetwork

GATE_MISSED = 4


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
@click.option("-T", "--timesteps", type=options.TIMESTEPS, help="T.  [default: the checkpoint's]")
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULES),
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
    type=click.Choice(NEURONS),
    help="Whether neurons may emit negative spikes.  [default: the checkpoint's]",
)
@click.option(
    "--initial-membrane",
    type=click.Choice(INITIAL_MEMBRANES),
    help="V0, half a threshold or zero.  [default: the checkpoint's]",
)
@click.option(
    "--ann",
    metavar="CHECKPOINT",
    help="Measure the ANN too: the source that was converted. If its weights are still in use, its "
    "float QANN as well.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Compare all methods on the same images: unsigned and signed neurons at T, fine-tuned "
    "checkpoints, the exact schedules.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="End with exit code 4 if the top-1 accuracy is more percentage points below the ANN's; "
    "the report is written all the same.",
)
@click.option(
    "--statistics/--no-statistics",
    default=True,
    show_default=True,
    help="Count operations and energy, and say which layer is to blame, with --ann by which cause.",
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
    max_drop: float | None,
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
) -> int:
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
        return 0
    if len(checkpoints) > 1:
        raise UsageError("several checkpoints are compared with --baselines; else name one")
    checkpoint = checkpoints[0] if checkpoints else None
    changes: dict[str, Any] = {}
    if schedule is not None:
        changes["name"] = schedule
    if drain is not None:
        changes["drain"] = options.parse_drain(drain)
    if stagger is not None:
        changes["stagger"] = stagger
    path, named = options.spiking_checkpoint(checkpoint, quiet)
    where = options.require_data(data)

    from snnconv import distributed
    from snnconv.checkpoint import load_network
    from snnconv.data import choose_indices
    from snnconv.normalize import with_settings

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
    indices = choose_indices(len(images), limit, seed)
    if max_drop is not None and math.isnan(max_drop):
        raise UsageError("--max-drop must be a number of percentage points, not nan")
    if max_drop is not None and ann is None:
        _require_stored_ann(network, images, indices)
    simulated = engine != "endpoint"
    report_path = output or evaluation.default_path(
        named, network, timetable, split, limit, simulated=simulated
    )
    evaluation.require_writable(
        report_path,
        images,
        indices,
        seed,
        limit,
        page=page,
        named=output is not None,
        force=force,
    )
    ann_before = evaluation.ann_of(report_path) if ann is None else None
    with distributed.group(place, "start it again"), console.progress(quiet) as progress:
        found = evaluation.evaluated(
            network,
            images,
            indices,
            timetable,
            checkpoint=path.name,
            model=None if ann is None else load_ann(ann, network),
            engine=engine,
            device=place,
            seed=seed,
            statistics=statistics,
            progress=progress,
        )
    if is_leader():
        command = options.arguments(None if checkpoints else path)
        evaluation.write(report_path, found, page=page, command=command)
    if as_json:
        console.emit_json(found)
    else:
        evaluation.show(report_path, found, page=page, quiet=quiet)
        options.note_unreadable(images.unreadable, quiet)
    if ann_before is not None:
        console.note(
            f"hint: the report this one replaces was made with --ann {ann_before}; it also told "
            "what is lost from the ANN, and in which layer",
            quiet,
        )
    # Under torchrun the others would end the first one, which is still at work.
    return 0 if max_drop is None or not is_leader() else _gate(found, max_drop)


def _require_stored_ann(network: SpikingNetwork, images: ImageData, indices: np.ndarray) -> None:
    """Raise UsageError unless the checkpoint says how accurate its ANN is on these images."""
    measured = drawn_for_ann(network, images)
    if measured is None or measured.tolist() != indices.tolist():
        raise UsageError(
            "--max-drop needs the ANN's accuracy on these images, and the checkpoint does not have "
            "it: give --ann"
        )


def _gate(found: dict[str, Any], max_drop: float) -> int:
    """Return the exit code of an evaluation that must not lose more than so many points."""
    ann, snn = (found[name]["top1_percent"] for name in ("ann", "snn"))
    # Percents of thousands of images, not exact in binary.
    if ann - snn <= max_drop + 1e-9:
        return 0
    console.note(
        f"the spiking network's {snn:.2f} % is {ann - snn:.2f} points less than the ANN's "
        f"{ann:.2f} %; --max-drop allows {max_drop:g}"
    )
    return GATE_MISSED


def _refuse_with_baselines() -> None:
    """Raise UsageError for options that say how to run a network: --baselines takes all ways."""
    names = ["schedule", "drain", "stagger", "neuron", "initial_membrane", "engine", "max_drop"]
    names.append("statistics")
    names += ["page"] if click.get_current_context().params["page"] else []  # there is none
    useless = options.given(*names)
    if useless:
        raise UsageError(
            f"--baselines runs every way there is; {', '.join(useless)} would do nothing"
        )
