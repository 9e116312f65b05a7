"""Which of timm's architectures convert, and which conversions have been verified.

    python tests/coverage.py [PATTERN...] [--state FILE] [--seconds N] [--examine-only] [--again]

Every architecture is examined from its shapes, as `snnconv check` does. What converts and has at
most 30 M parameters is then built with random weights, converted at T = 3 on images as small as it
takes, and verified count for count on two images. BatchNorm's statistics are measured on the
images, its gains and shifts drawn, negative and zero ones among them. A network counts as verified
only if in every neuron layer between 5 and 95 % of the counts are not zero and some are saturated:
else a wrong layer might go unnoticed. Up to three draws are tried, until each layer has been active
in one of them. What has been done is kept in the state, a JSON line each, so an interrupted sweep
goes on where it was; `--again` does once more what has not been verified.
`docs/generate_coverage.py` renders it.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from snnconv.engine import prepare
from snnconv.errors import SnnconvError
from snnconv.examination import examine
from snnconv.graph import difference, flatten_outputs
from snnconv.load import load_model
from snnconv.pipeline import check_equal, convert
from snnconv.preprocess import Preprocessing
from snnconv.replace import replace_activations

STATE = Path(__file__).parents[1] / "runs" / "coverage.jsonl"
LARGEST = 30_000_000
TIMESTEPS = 3
SECONDS = 20
SIZES = (64, 96, 128, 160, 192, 224)
IMAGES, CALIBRATED, VERIFIED = 8, 6, 2
DRAWS = 3
LEAST, MOST = 5.0, 95.0


class Late(BaseException):
    """A conversion takes too long; no exception that others might catch on its way."""


def examined(name: str) -> dict[str, Any]:
    """Examine an architecture as it is, strictly, and with its activations replaced."""
    loaded = load_model(name, pretrained=False, shapes_only=True)
    size = loaded.preprocessing.input_size
    found = examine(loaded.model, size)
    obstacles = [e for e in found.plan.entries if e.role == "unsupported"]
    reasons = [f"{e.operation}: {e.reason}; {e.remedy}" for e in obstacles] or found.problems
    row: dict[str, Any] = {
        "name": name,
        "parameters": found.parameters,
        "convertible": not found.problems,
        "analog": len(found.plan.analog),
        "spiking_percent": round(found.plan.spiking_mac_share, 2),
        "problems": list(dict.fromkeys(reasons)),
    }
    if found.problems or found.plan.analog:
        model, replaced = replace_activations(loaded.model)
        again = examine(model, size) if replaced else found
        row["replaced"] = replaced
        row["replaced_convertible"] = bool(replaced) and not again.problems
        row["replaced_analog"] = len(again.plan.analog)
    return row


def verified(name: str, seconds: float = math.inf) -> dict[str, Any]:
    """Convert an architecture with random weights and verify it, in as many draws as it takes.

    No draw is begun that would not end within so many `seconds` of a processor.

    Returns in how many places counts were compared, how far the traced network's outputs are from
    the model's (relative, L2), and the layers that were in no draw as active as a proof asks for:
    path, percentage of counts that are not 0, whether any is saturated. Raises what conversion
    raises.
    """
    left: dict[str, tuple[float, bool]] | None = None
    begun = time.process_time()
    for seed in range(DRAWS):
        if seed and (time.process_time() - begun) * (seed + 1) / seed > seconds:
            break
        drawn, activity = _drawn(name, seed)
        unsuited = {
            path: (share, full)
            for path, share, full in activity
            if not LEAST <= share <= MOST or not full
        }
        draws = seed + 1
        left = unsuited if left is None else {k: v for k, v in unsuited.items() if k in left}
        if not left:
            break
    told = [[path, *found] for path, found in (left or {}).items()]
    return {
        "equal": True,
        **drawn,
        "layers": len(activity),
        "draws": draws,
        "unsuited_layers": told,
    }


def _drawn(name: str, seed: int) -> tuple[dict[str, Any], list[tuple[str, float, bool]]]:
    torch.manual_seed(seed)
    loaded = load_model(name, pretrained=False)
    model, preprocessing = _small(loaded.model, loaded.preprocessing)
    channels, height, width = preprocessing.input_size
    generator = torch.Generator().manual_seed(seed)
    pixels = _images((IMAGES, channels, height, width), generator)
    randomise_(model, preprocessing.normalize(pixels[:CALIBRATED]), generator)
    conversion = convert(model, preprocessing, [pixels[:CALIBRATED]], timesteps=TIMESTEPS)
    found, _ = check_equal(conversion, pixels[-VERIFIED:])
    traced = conversion.traced
    with torch.no_grad():
        pair = [flatten_outputs(m(traced.example.clone())) for m in (traced.module, model)]
    far = max(difference(*(outputs[key] for outputs in pair)) for key in pair[0])
    told = {"sites": found.sites, "pixels": height, "trace_difference": float(f"{far:.3g}")}
    return told, _activity(conversion.network, pixels)


def randomise_(model: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    """Draw gains and shifts of BatchNorm, with statistics of what it gets to see.

    Every layer is ready before the next one is measured, so that deep networks neither fade nor
    burst.
    """

    def ready(module: Any, inputs: tuple[Tensor, ...]) -> None:
        axes = [0, *range(2, inputs[0].ndim)]
        size = len(module.running_mean)
        variance, mean = torch.var_mean(inputs[0], axes, correction=0)
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance.clamp_min(1e-3))
        if module.weight is not None:
            gain = 0.6 + 0.8 * torch.rand(size, generator=generator)
            gain *= (torch.rand(size, generator=generator) > 0.1).float() * 2 - 1
            gain[0] = 0
            module.weight.copy_(gain)
            module.bias.copy_(0.3 * torch.randn(size, generator=generator))

    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    hooks = [norm.register_forward_pre_hook(ready) for norm in norms]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()


def _small(model: nn.Module, preprocessing: Preprocessing) -> tuple[nn.Module, Preprocessing]:
    """Return the model with the smallest input it takes."""
    from dataclasses import replace

    channels, *usual = preprocessing.input_size
    for size in SIZES:
        if size <= usual[0]:
            try:
                with torch.no_grad():
                    model.eval()(torch.randn(2, channels, size, size))
            except Exception:
                continue
            return model, replace(preprocessing, input_size=(channels, size, size))
    return model, preprocessing


def _images(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw images: a coarse pattern and noise, each of its own brightness and contrast."""
    coarse = torch.rand(*shape[:2], 5, 5, generator=generator)
    pattern = nn.functional.interpolate(coarse, shape[2:], mode="bilinear")
    noise = torch.rand(shape, generator=generator)
    middle = torch.rand(shape[0], shape[1], 1, 1, generator=generator)
    contrast = torch.rand(shape[0], 1, 1, 1, generator=generator)
    drawn = middle + contrast * (0.7 * pattern + 0.3 * noise - 0.5)
    return (255 * drawn.clamp(0, 1)).to(torch.uint8)


def _activity(network: Any, pixels: Tensor) -> list[tuple[str, float, bool]]:
    """Return per layer of neurons: path, percentage that is not 0, whether any is saturated."""
    end = prepare(network, network.timesteps).endpoint(pixels)
    rows = []
    for population in network.populations:
        counts = end.counts[population.name].long()
        share = 100 * float((counts != 0).double().mean())
        rows.append(
            (population.path, round(share, 1), bool((counts.abs() == network.timesteps).any()))
        )
    return rows


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Late if a block takes more of the processor's time."""

    def late(*_: Any) -> None:
        raise Late(f"it takes more than {seconds:g} s of a processor")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def row(name: str, seconds: float, examine_only: bool) -> dict[str, Any]:
    """Return everything about an architecture; what goes wrong is told, too."""
    started = time.monotonic()
    try:
        found = examined(name)
    except SnnconvError as error:
        return {"name": name, "convertible": False, "problems": [error.message]}
    except Exception as error:
        return {"name": name, "convertible": False, "problems": [], "broken": repr(error)[:300]}
    if found["convertible"] and found["parameters"] <= LARGEST and not examine_only:
        try:
            with within(seconds):
                found["verified"] = verified(name, seconds)
        except Late as error:
            found["verified"] = {"skipped": str(error)}
        except SnnconvError as error:
            found["verified"] = {"refused": error.message}
        except Exception as error:
            found["verified"] = {"broken": repr(error)[:300]}
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def main() -> None:
    """Sweep, from where it was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one conversion")
    parser.add_argument("--examine-only", action="store_true", help="convert nothing")
    parser.add_argument("--again", action="store_true", help="what has not been verified, too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    arguments.state.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    if arguments.state.is_file():
        lines = arguments.state.read_text(encoding="utf-8").splitlines()
        rows = {found["name"]: found for found in map(json.loads, lines)}
    done = {name for name, found in rows.items() if not arguments.again or settled(found)}
    names = [n for p in arguments.patterns for n in timm.list_models(p)]
    for number, name in enumerate(names, 1):
        if name in done:
            continue
        found = row(name, arguments.seconds, arguments.examine_only)
        with arguments.state.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        done.add(name)
        print(f"{number}/{len(names)} {name}: {_told(found)}", flush=True)


def settled(found: dict[str, Any]) -> bool:
    """Return whether a network is verified, or too large to be."""
    tried = found.get("verified")
    if tried is None:
        return bool(found["convertible"]) and found["parameters"] > LARGEST
    return bool(tried.get("equal")) and not tried["unsuited_layers"]


def _told(found: dict[str, Any]) -> str:
    if not found["convertible"]:
        return (found["problems"] or [found.get("broken", "?")])[0][:120]
    tried = found.get("verified")
    if tried is None:
        return "convertible"
    if "equal" not in tried:
        return f"convertible, not verified: {next(iter(tried.values()))[:120]}"
    unsuited = tried["unsuited_layers"]
    return "verified" if not unsuited else f"equal, but {len(unsuited)} layers prove little"


if __name__ == "__main__":
    main()
