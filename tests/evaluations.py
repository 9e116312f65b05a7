"""Evaluations for tests: stored ones, and one that holds all that an evaluation can hold."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "model_zoo" / "results"
STORED = sorted(RESULTS.glob("*.eval.json"))
STAGES = ["clipping", "levels", "integers", "time"]
ASSUMPTIONS = {
    "mac_fp32_pj": 4.6,
    "mac_int8_pj": 0.23,
    "multiply_int8_pj": 0.2,
    "add_int8_pj": 0.03,
    "add_int32_pj": 0.1,
    "analog_mac_pj": 4.6,
}


def stored(name: str) -> dict[str, Any]:
    """Read one of the zoo's reports."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def whole(name: str = "resnet20-T8-drain-signed.eval.json", **changes: Any) -> dict[str, Any]:
    """Return a stored evaluation with every field there is; what is added is made up."""
    e = stored(name)
    latency, layers = e["latency_steps"], e["layers"]
    e["first_within"] = {
        "ann": {"0.5": None, "1": None, "2": latency},
        "qann": {"0.5": latency - 1, "1": latency - 2, "2": latency - 2},
    }
    for i, row in enumerate(layers):
        row |= {
            "rate_percent": 100 * row["spikes_per_neuron"] / latency,
            "saturated_percent": 1.5 + i % 3,
            "zero_percent": 48.25 - i,
            "dead_percent": 0.5 * (i % 4),
            "sequential_error": 0.021 / (i + 1),
        }
    operations = [_operations(row, i, latency, e["timesteps"]) for i, row in enumerate(layers)]
    operations.append(
        {**operations[-1], "layer": "logits", "kind": "readout", "resets": 0.0, "macs": 640}
    )
    keys = [k for k in operations[0] if k not in ("layer", "kind")]
    total = {k: sum(row[k] for row in operations) for k in keys}
    total |= {"pooling": 9830.4, "analog_macs": 1200}
    e["operations"] = {
        "images": e["images"],
        "layers": operations,
        "pooling": 9830.4,
        "analog_macs": 1200,
        "total": total,
    }
    e["energy"] = energy(
        e["operations"], ASSUMPTIONS, activation_bits=4, weight_bits=8, steps=latency
    )
    e["errors"] = _errors([row["layer"] for row in layers])
    return {**e, **copy.deepcopy(changes)}


def energy(
    operations: dict[str, Any],
    assumptions: dict[str, float],
    *,
    activation_bits: int,
    weight_bits: int,
    steps: int | None,
) -> dict[str, Any]:
    """Stand in for `snnconv.energy.energy`: linear in the operations."""
    total = operations["total"]

    def nanojoules(count: str, assumption: str) -> float:
        return total[count] * assumptions[assumption] / 1000

    snn = {
        "image": nanojoules("image_macs", "mac_int8_pj"),
        "synapses": nanojoules("synaptic_operations", "add_int8_pj"),
        "bias": nanojoules("bias_additions", "add_int32_pj"),
        "membrane": nanojoules("membrane_updates", "add_int32_pj"),
        "resets": nanojoules("resets", "add_int32_pj"),
        "pooling": nanojoules("pooling", "add_int8_pj"),
        "analog": nanojoules("analog_macs", "analog_mac_pj"),
    }
    snn["total"] = sum(snn.values())
    qann = total["macs"] * 0.13 / 1000
    return {
        "assumptions": assumptions,
        "source": "Horowitz, ISSCC 2014, 45 nm",
        "activation_bits": activation_bits,
        "weight_bits": weight_bits,
        "snn_nj": snn,
        "ann_fp32_nj": nanojoules("macs", "mac_fp32_pj"),
        "ann_int8_nj": nanojoules("macs", "mac_int8_pj"),
        "qann_nj": qann,
        "qann_skipping_zeros_nj": total["qann_nonzero_macs"] * 0.13 / 1000,
        "layers": [
            {"layer": row["layer"], "snn_nj": row["synaptic_operations"] / 1e4, "qann_nj": 1.5}
            for row in operations["layers"]
        ],
        "break_even": {"spikes_per_neuron": 1.2, "rate_percent": 13.0},
        "verdict": f"The SNN takes {snn['total'] / qann:.2f} times the quantised ANN's energy.",
    }


def _operations(row: dict[str, Any], i: int, latency: int, timesteps: int) -> dict[str, Any]:
    macs = 2359296 if i else 442368
    synaptic = macs * row["spikes_per_neuron"] if i else 0.0
    return {
        "layer": row["layer"],
        "kind": "neurons",
        "macs": macs,
        "image_macs": 0 if i else macs,
        "synaptic_operations": synaptic,
        "effective_operations": 0.985 * synaptic,
        "qann_nonzero_macs": 0.55 * macs,
        "bias_additions": float(row["neurons"] * timesteps),
        "membrane_updates": float(row["neurons"] * latency),
        "resets": row["neurons"] * row["spikes_per_neuron"],
    }


def _errors(names: list[str]) -> dict[str, Any]:
    layers = []
    for i, name in enumerate(names):
        causes = (0.004, 0.03 + 0.01 * (i % 5), -0.002 if i % 3 else 0.003, 0.01)
        by_cause = dict(zip(STAGES, causes, strict=True))
        cumulative, so_far = {}, 0.0
        for stage in STAGES:
            so_far += by_cause[stage]
            cumulative[stage] = so_far
        layers.append(
            {
                "layer": name,
                "cumulative": cumulative,
                "by_cause": by_cause,
                "isolated": {**by_cause, "time": None},
                "sqnr_db": -10 * math.log10(so_far),
            }
        )
    return {
        "images": 256,
        "against": "ann",
        "stages": STAGES,
        "layers": layers,
        "output": {
            "kl": dict(zip(STAGES, (0.01, 0.09, 0.092, 0.11), strict=True)),
            "agreement_percent": dict(zip(STAGES, (98.8, 93.0, 92.6, 92.0), strict=True)),
        },
        "restored": {
            "images": 64,
            "kl": 0.1,
            "layers": [{"layer": name, "kl": 0.09 - 0.001 * i} for i, name in enumerate(names)],
        },
        "mend": {
            "layer": names[4],
            "cause": "levels",
            "share_percent": 23.4,
            "suggestion": "Give it a higher T.",
        },
    }
