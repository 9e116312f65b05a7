"""The options of a conversion, and the method they come to with a recipe and the data there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from snnconv.choices import (
    CALIBRATIONS,
    COMPENSATIONS,
    DEFAULT_PERCENTILE,
    DEFAULT_TIMESTEPS,
    DEFAULT_WEIGHT_BITS,
    INITIAL_MEMBRANES,
    MAX_WEIGHT_BITS,
    MIN_WEIGHT_BITS,
    NEURONS,
    default_schedule,
)
from snnconv.errors import UsageError
from snnconv.schedule import SCHEDULES, Schedule

from . import options

if TYPE_CHECKING:
    from snnconv.recipe import Recipe


@dataclass(frozen=True)
class Method:
    """How a network is converted: keywords of `snnconv.pipeline.convert`."""

    calibration: str
    percentile: float
    timesteps: int
    weight_bits: int
    neuron: str
    initial_membrane: str
    compensation: str
    shortcut_normalization: bool
    strict: bool
    schedule: str
    drain: int | None


@dataclass(frozen=True)
class ConversionOptions:
    """What the options say about a conversion; None where they say nothing."""

    calibration: str | None
    percentile: float | None
    calibration_images: int
    timesteps: int | None
    weight_bits: int | None
    neuron: str
    initial_membrane: str | None
    compensation: str
    shortcut_normalization: bool
    replace_activations: str | None
    strict: bool
    schedule: str | None
    drain: str

    def method(self, recipe: Recipe | None, data: str | None) -> Method:
        """Return the method of these options, the recipe's where they are silent.

        Raises UsageError for options that do not go together, or need the data that are not given.
        """
        calibration = self.calibration or ("mse" if data else "bn")
        if calibration != "bn":
            options.require_data(data)
        if calibration != "percentile" and options.given("percentile"):
            raise UsageError(f"--percentile belongs to --calibration percentile, not {calibration}")
        gain = self.compensation == "gain"
        if gain and self.initial_membrane == "half" and options.given("initial_membrane"):
            raise UsageError(
                "--compensation gain belongs with --initial-membrane zero: with half a threshold "
                "the neurons would fire too much"
            )
        timesteps = self.timesteps or (recipe and recipe.timesteps) or DEFAULT_TIMESTEPS
        drain = options.parse_drain(self.drain)
        schedule = self.schedule or default_schedule(self.compensation)
        Schedule(schedule, timesteps, 1, drain)
        return Method(
            calibration=calibration,
            percentile=self.percentile or DEFAULT_PERCENTILE,
            timesteps=timesteps,
            weight_bits=self.weight_bits or (recipe and recipe.weight_bits) or DEFAULT_WEIGHT_BITS,
            neuron=self.neuron,
            initial_membrane="zero" if gain else self.initial_membrane or "half",
            compensation=self.compensation,
            shortcut_normalization=self.shortcut_normalization,
            strict=self.strict,
            schedule=schedule,
            drain=drain,
        )


_OPTIONS = (
    click.option(
        "--calibration",
        type=click.Choice(CALIBRATIONS),
        help="How clips are chosen; reconstruct also fits weights and biases, layer by layer, in "
        "place of training; bn needs no data.  [default: reconstruct with --epochs 0, else mse; "
        "without data bn]",
    ),
    click.option(
        "--percentile",
        type=click.FloatRange(0, 100, min_open=True),
        metavar="P",
        help="Share of a layer's activations below the clip of --calibration percentile; where so "
        f"many are 0, the largest is taken.  [default: {DEFAULT_PERCENTILE}]",
    ),
    click.option(
        "--calibration-images",
        type=click.IntRange(min=1),
        default=1000,
        show_default=True,
        metavar="N",
        help="Training images to calibrate on, drawn with --seed.",
    ),
    click.option(
        "-T",
        "--timesteps",
        type=options.TIMESTEPS,
        help="T, the levels of an activation and the steps of input.  [default: the recipe's, else "
        f"{DEFAULT_TIMESTEPS}]",
    ),
    click.option(
        "--weight-bits",
        type=click.IntRange(MIN_WEIGHT_BITS, MAX_WEIGHT_BITS),
        help="Bits of the weights; the first layer and the readout have 8.  [default: the "
        f"recipe's, else {DEFAULT_WEIGHT_BITS}]",
    ),
    click.option(
        "--neuron",
        type=click.Choice(NEURONS),
        default="signed",
        show_default=True,
        help="Whether neurons may emit negative spikes.",
    ),
    click.option(
        "--initial-membrane",
        type=click.Choice(INITIAL_MEMBRANES),
        help="V0: half a threshold rounds half up, zero rounds down.  [default: half; zero with "
        "--compensation gain]",
    ),
    click.option(
        "--compensation",
        type=click.Choice(COMPENSATIONS),
        default="none",
        show_default=True,
        help="Without retraining, make up for what neurons lose in T steps: one gain for all "
        "weights, or a bias per channel.",
    ),
    click.option(
        "--shortcut-normalization/--no-shortcut-normalization",
        default=True,
        show_default=True,
        help="Weigh a spike that takes a shortcut by its own threshold; without, by that of where "
        "it ends, to see the difference.",
    ),
    options.replace_option,
    options.strict_option,
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        help="When layers start and stop; eval can choose another.  [default: drain; paper with "
        "--compensation]",
    ),
    click.option(
        "--drain",
        default="auto",
        show_default=True,
        metavar="auto|N",
        help="Steps after the last input: until nothing fires, or N.",
    ),
)

# Adds the options of a conversion; they arrive as `chosen: ConversionOptions`.
conversion_options = options.gathered("chosen", ConversionOptions, _OPTIONS)
