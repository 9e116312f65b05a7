"""How a network is named on the command line, how it is built, and what it is fed."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from snnconv.errors import UsageError
from snnconv.files import SUFFIX, ann_stem
from snnconv.preprocess import INTERPOLATIONS

from . import console
from .options import require_suitable

if TYPE_CHECKING:
    from snnconv.data import ImageData
    from snnconv.load import LoadedModel
    from snnconv.recipe import Recipe


@dataclass(frozen=True)
class NetworkOptions:
    """What the options say about a network; None where they say nothing."""

    arch: str | None
    model_args: dict[str, Any]
    recipe: str | None
    image_size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop_pct: float | None
    interpolation: str | None
    channels: str | None

    def read_recipe(self) -> Recipe | None:
        """Read the recipe these options name, if they do."""
        from snnconv.recipe import read_recipe

        return read_recipe(self.recipe) if self.recipe else None

    def load(
        self, source: str, *, pretrained: bool = True, shapes_only: bool = False
    ) -> LoadedModel:
        """Build the network a source names, with the preprocessing these options ask for."""
        from dataclasses import replace

        from snnconv.load import load_model
        from snnconv.preprocess import overridden

        loaded = load_model(
            source,
            arch=self.arch,
            model_args=self.model_args,
            pretrained=pretrained,
            recipe=self.read_recipe(),
            channels=self.channels,
            shapes_only=shapes_only,
        )
        known = loaded.preprocessing
        mean, std = _in_unit_range(self.mean, self.std)
        if loaded.channels == "bgr" and self.channels == "bgr":
            # Given in the order of the weights, which have been turned around.
            mean, std = (v and v[::-1] for v in (mean, std))
        size = None if self.image_size is None else (known.input_size[0], *self.image_size)
        preprocessing = overridden(
            known,
            input_size=size,
            mean=mean,
            std=std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
        )
        stated = loaded.size_stated or size is not None
        return replace(loaded, preprocessing=preprocessing, size_stated=stated)


def fit_to_images(loaded: LoadedModel, data: ImageData, quiet: bool) -> LoadedModel:
    """Take the images' own size where nothing says which size the network was trained on."""
    from dataclasses import replace

    from snnconv.preprocess import overridden

    size, known = data.images.size, loaded.preprocessing
    if size is None or size[1:] == known.input_size[1:]:
        return loaded
    theirs, ours = (f"{s[1]}x{s[2]}" for s in (size, known.input_size))
    if loaded.size_stated:
        console.note(f"the images of {theirs} are resized to the network's {ours}", quiet)
        return loaded
    console.note(
        f"the checkpoint does not say its image size: taking the images' own, {theirs}, not {ours} "
        "(--image-size overrides)",
        quiet,
    )
    size = (known.input_size[0], *size[1:])
    return replace(loaded, preprocessing=overridden(known, input_size=size, crop_pct=1.0))


def describe_input(preprocessing: dict[str, Any], channels: str) -> str:
    """Say in one line what happens to an image first."""

    def numbers(values: Any) -> str:
        return " ".join(f"{v:.4g}" for v in values)

    size = "x".join(map(str, preprocessing["input_size"]))
    text = (
        f"{size}, mean {numbers(preprocessing['mean'])}, "
        f"std {numbers(preprocessing['std'])}, crop {preprocessing['crop_pct']:g}, "
        f"{preprocessing['interpolation']}"
    )
    return text + (", first convolution turned from BGR to RGB" if channels == "bgr" else "")


def _in_unit_range(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Scale values given for pixels 0..255 to pixels 0..1; any value above 1 tells them."""
    if all(v <= 1 for v in (*(mean or ()), *(std or ()))):
        return mean, std
    scaled = [None if v is None else tuple(x / 255 for x in v) for v in (mean, std)]
    return scaled[0], scaled[1]


def complete_source(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer files, and the zoo's networks that have weights."""
    from snnconv.model_zoo import catalog

    zoo = [f"zoo:{e.name}" for e in catalog.entries() if e.path]
    found = [CompletionItem(name) for name in zoo if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


source_argument = click.argument(
    "source", metavar="CHECKPOINT|NAME|zoo:NAME", shell_complete=complete_source
)


def parse_model_args(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Turn K=V pairs into a table; values are Python literals, else text."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-arg {pair!r} is not K=V")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def _with_recipe(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    """Let a recipe's [convert] be what options are by default, after snnconv.toml."""
    if name is not None and not ctx.resilient_parsing:
        from snnconv.recipe import read_recipe

        defaults = read_recipe(name).convert
        params = {str(p.name): p for p in ctx.command.params}
        for key in defaults.keys() & params.keys():
            require_suitable(f"{name}: [convert] {key}", params[key], defaults[key])
        ctx.default_map = {**defaults, **(ctx.default_map or {})}
    return name


def _parse_size(text: str | int | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise UsageError(f"--image-size must be N or HEIGHTxWIDTH in pixels, not {text!r}")
    return int(parts[0]), int(parts[-1])


def _parse_numbers(option: str, text: Any) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in str(text).split(","))
    except ValueError:
        raise UsageError(f"{option} must be numbers like 0.5,0.5,0.5, not {text!r}") from None


_OPTIONS = (
    click.option(
        "--arch",
        metavar="NAME",
        help="timm architecture of a checkpoint file. Else what the file says, else its name.",
    ),
    click.option(
        "-m",
        "--model-arg",
        "model_args",
        multiple=True,
        metavar="K=V",
        help="Argument for the network's constructor, for example num_classes=7. Repeatable.",
    ),
    click.option(
        "--recipe",
        metavar="NAME|FILE",
        callback=_with_recipe,
        is_eager=True,
        help="What the file does not say: architecture, preprocessing, how to convert it "
        "(docs/data.md).",
    ),
    click.option(
        "--image-size",
        metavar="N|HxW",
        help="Pixels of an input image.  [default: the checkpoint's, else the architecture's, "
        "or that of arrays given to a network trained for other classes]",
    ),
    click.option(
        "--mean",
        metavar="X,..",
        help="Mean per channel, for pixels 0..1, or 0..255 if any number is above 1.",
    ),
    click.option("--std", metavar="X,..", help="Standard deviation per channel, likewise."),
    click.option(
        "--crop-pct", type=click.FloatRange(0, 1, min_open=True), help="Share the crop keeps."
    ),
    click.option("--interpolation", type=click.Choice(INTERPOLATIONS), help="How to resize."),
    click.option(
        "--channels",
        type=click.Choice(["rgb", "bgr"]),
        help="Order the weights were trained with; bgr turns the first convolution around.",
    ),
)


def network_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what a network is; they arrive as `network: NetworkOptions`."""

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> Any:
        network = NetworkOptions(
            values.pop("arch"),
            parse_model_args(values.pop("model_args")),
            values.pop("recipe"),
            _parse_size(values.pop("image_size")),
            _parse_numbers("--mean", values.pop("mean")),
            _parse_numbers("--std", values.pop("std")),
            values.pop("crop_pct"),
            values.pop("interpolation"),
            values.pop("channels"),
        )
        return function(*args, network=network, **values)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def default_name(source: str) -> Path:
    """Name the spiking checkpoint of a source, in the current folder."""
    name = source.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "network"
    return Path(f"{ann_stem(name)}{SUFFIX}")
