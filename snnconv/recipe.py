"""Recipes: what a checkpoint file does not say about its network, and how to convert it, as TOML.

    arch = "squeezenet1_0"    # may be left out where the recipe is for any network
    description = "..."
    reference = "..."
    timesteps = 3             # T, if --timesteps does not say
    weight_bits = 8           # likewise
    [model_args]              # passed to the network's constructor
    [preprocessing]           # any of: input_size mean std scale crop_pct interpolation channels
    [convert]                 # any of CONVERT_KEYS: defaults of the options of that name
    [train]                   # how to retrain: any key of snnconv.train.TrainSettings

`mean` and `std` hold for pixels from 0 to `scale` (default 1), in the order red, green, blue;
`channels = "bgr"` says that the weights of the first convolution have the other order.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snnconv.choices import (
    MAX_TIMESTEPS,
    MAX_WEIGHT_BITS,
    MIN_TIMESTEPS,
    MIN_WEIGHT_BITS,
)
from snnconv.errors import UsageError, refuse_unknown, suggestion
from snnconv.preprocess import Preprocessing, overridden

KEYS = (
    "arch", "description", "reference", "timesteps", "weight_bits", "model_args", "preprocessing",
    "convert", "train",
)  # fmt: skip
TABLES = ("model_args", "preprocessing", "convert", "train")
PREPROCESSING_KEYS = (
    "input_size", "mean", "std", "scale", "crop_pct", "interpolation", "channels",
)  # fmt: skip
CONVERT_KEYS = (
    "calibration", "calibration_images", "percentile", "neuron", "initial_membrane",
    "compensation", "schedule", "drain",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to read, convert and retrain checkpoints of one kind."""

    name: str
    arch: str | None = None
    description: str = ""
    reference: str = ""
    timesteps: int | None = None
    weight_bits: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> str:
        """Return the order of the weights' input channels, `rgb` or `bgr`."""
        return str(self.preprocessing.get("channels", "rgb"))

    def applied(self, known: Preprocessing) -> Preprocessing:
        """Return a network's preprocessing with what the recipe says put in."""
        values = {k: v for k, v in self.preprocessing.items() if k not in ("scale", "channels")}
        scale = float(self.preprocessing.get("scale", 1))
        for key in ("mean", "std"):
            if key in values:
                given = values[key] if isinstance(values[key], list) else [values[key]]
                values[key] = tuple(v / scale for v in given)
        return overridden(known, **values)


def _require_sound(path: Path, preprocessing: dict[str, Any]) -> None:
    """Raise UsageError for values of [preprocessing] that are of a wrong type."""

    def number(value: Any) -> bool:
        return type(value) in (int, float)

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(number, value))

    sound: dict[str, tuple[Callable[[Any], bool], str]] = {
        "input_size": (lambda v: numbers(v) and len(v) == 3, "[channels, height, width]"),
        "mean": (lambda v: number(v) or numbers(v), "a number, or one per channel"),
        "std": (lambda v: number(v) or numbers(v), "a number, or one per channel"),
        "scale": (lambda v: number(v) and v > 0, "a number above 0"),
        "crop_pct": (number, "a number"),
        "interpolation": (lambda v: isinstance(v, str), "a name"),
    }
    for key, (fits, meant) in sound.items():
        if key in preprocessing and not fits(preprocessing[key]):
            raise UsageError(f"{path}: {key} must be {meant}, not {preprocessing[key]!r}")


def folder() -> Path:
    """Return where the package's own recipes lie."""
    from snnconv import model_zoo

    return Path(model_zoo.__path__[0]) / "recipes"


def names() -> list[str]:
    """Name the package's own recipes."""
    return sorted(p.stem for p in folder().glob("*.toml"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe of the package by its name, or a file ending in .toml.

    Raises UsageError for an unknown name, a file that is no TOML, and unknown keys.
    """
    path = Path(name) if name.endswith(".toml") else folder() / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise UsageError(f"{name}: no such recipe file")
        others = f"there are {', '.join(names())}"
        raise UsageError(f"there is no recipe {name!r}{suggestion(name, names(), others)}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    refuse_unknown(str(path), values, KEYS)
    if not isinstance(values.get("arch", ""), str):
        raise UsageError(f"{path}: arch must be the name of a timm architecture")
    for key, low, high in (
        ("timesteps", MIN_TIMESTEPS, MAX_TIMESTEPS),
        ("weight_bits", MIN_WEIGHT_BITS, MAX_WEIGHT_BITS),
    ):
        number = values.get(key, low)
        if type(number) is not int or not low <= number <= high:
            raise UsageError(f"{path}: {key} must be a whole number from {low} to {high}")
    for key in TABLES:
        if not isinstance(values.get(key, {}), dict):
            raise UsageError(f"{path}: {key} must be a table")
    for table, keys in (("preprocessing", PREPROCESSING_KEYS), ("convert", CONVERT_KEYS)):
        refuse_unknown(f"{path}: [{table}]", values.get(table, {}), keys)
    _require_sound(path, values.get("preprocessing", {}))
    recipe = Recipe(path.stem, **values)
    if recipe.channels not in ("rgb", "bgr"):
        raise UsageError(f'{path}: channels must be "rgb" or "bgr", not {recipe.channels!r}')
    return recipe
