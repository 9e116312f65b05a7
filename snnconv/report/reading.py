"""Read reports, and compute energies anew under other assumptions."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from snnconv.errors import SnnconvError, UsageError, refuse_unknown
from snnconv.files import SUFFIX
from snnconv.schemas import BASELINES, EVALUATION

PATTERN = "*.eval.json"

# What readers here rely on: the fields that every report of a kind has, and their types.
_TEXT, _NUMBER = (str,), (int, float)
_REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    EVALUATION: {
        "model": _TEXT,
        "data": _TEXT,
        "split": _TEXT,
        "images": (int,),
        "partial": (bool,),
        "timesteps": (int,),
        "schedule": _TEXT,
        "neuron": _TEXT,
        "snn": (dict,),
    },
    BASELINES: {"model": _TEXT, "images": (int,), "partial": (bool,), "rows": (list,)},
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("checkpoint", "data_note", "engine", "device", "command"), _TEXT),
    **dict.fromkeys(("ann", "drop", "qann", "qann_float", "snn_by_count", "agreement"), (dict,)),
    **dict.fromkeys(("spikes", "first_within", "operations", "energy", "errors"), (dict,)),
    **dict.fromkeys(("by_step", "layers"), (list,)),
    **dict.fromkeys(("latency_steps", "latency_steps_clocked", "wall_ms_per_image"), _NUMBER),
}


@dataclass(frozen=True)
class Report:
    """A report as it was read, and where from."""

    path: Path
    contents: dict[str, Any]

    @property
    def is_evaluation(self) -> bool:
        """Tell an evaluation from a comparison of baselines."""
        return self.contents["schema"] == EVALUATION


def read(path: Path, kinds: Sequence[str] = (EVALUATION, BASELINES)) -> Report:
    """Read a report of one of the kinds.

    Raises UsageError if there is no such file, SnnconvError if it holds something else.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such report") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder; name a report in it") from error
    except (ValueError, RecursionError) as error:
        raise SnnconvError(f"{path} is no report: it does not hold JSON") from error
    schema = contents.get("schema") if isinstance(contents, dict) else None
    if schema not in kinds:
        what = f"{schema!r}" if isinstance(schema, str) else "no report of snnconv"
        raise SnnconvError(f"{path} is {what}; wanted is {' or '.join(kinds)}")
    wrong = [
        f"{key} must be {_names(types)}, not {json.dumps(contents.get(key))[:40]}"
        for key, types in _REQUIRED.get(str(schema), {}).items()
        if not _fits(contents.get(key), types)
    ]
    wrong += [
        f"{key} must be {_names(types)} or null, not {json.dumps(contents[key])[:40]}"
        for key, types in _OPTIONAL.items()
        if contents.get(key) is not None and not _fits(contents[key], types)
    ]
    if wrong:
        raise SnnconvError(f"{path} is no whole report", wrong)
    return Report(path, contents)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _names(types: tuple[type, ...]) -> str:
    words = {str: "a text", int: "a number", bool: "true or false", dict: "an object"}
    return words.get(types[0], "a list")


def newest(folder: Path) -> Path:
    """Find the newest evaluation in a folder. Raises UsageError if there is none."""
    found = [p for p in folder.glob(PATTERN) if p.is_file()]
    if not found:
        raise UsageError(
            f"no report given, and there is no {PATTERN} in the current folder; name one, or make "
            "one with snnconv eval"
        )
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name))


def beside(checkpoint: Path) -> list[Path]:
    """List the evaluations of a checkpoint, NAME.*.eval.json beside it, by name.

    Reports of other checkpoints whose names begin alike are left out. Raises UsageError if there
    is none.
    """
    stem = glob.escape(checkpoint.name.removesuffix(SUFFIX))
    names = {*checkpoint.parent.glob(f"{stem}.*.eval.json")}
    names |= {*checkpoint.parent.glob(f"{stem}.eval.json")}
    found = [p for p in sorted(names) if read(p).contents.get("checkpoint") == checkpoint.name]
    if not found:
        raise UsageError(
            f"{checkpoint}: there is no report {checkpoint.name.removesuffix(SUFFIX)}.*.eval.json "
            "beside it; make one with snnconv eval"
        )
    return found


def order(report: Report) -> tuple[Any, ...]:
    """Sort evaluations first, by network, T, schedule and neuron."""
    e = report.contents
    return (
        not report.is_evaluation,
        e["model"],
        e.get("timesteps", 0),
        e.get("schedule", ""),
        e.get("neuron", ""),
        report.path.name,
    )


def with_assumptions(report: Report, changes: Mapping[str, float]) -> Report:
    """Compute a report's energies anew from its operations, some assumptions (pJ) changed.

    Raises UsageError for unknown assumptions, and for reports without operations.
    """
    contents = report.contents
    energy, operations = contents.get("energy"), contents.get("operations")
    if not energy or not operations:
        raise UsageError(
            f"{report.path}: --energy needs the operations, which this report does not hold; "
            "measure again with snnconv eval"
        )
    refuse_unknown("--energy", changes, energy["assumptions"])
    from snnconv.energy import energy as computed_energy

    computed = computed_energy(
        operations,
        {**energy["assumptions"], **changes},
        activation_bits=energy["activation_bits"],
        weight_bits=energy["weight_bits"],
        steps=contents["latency_steps"],
    )
    return Report(report.path, {**contents, "energy": {**energy, **computed}})
