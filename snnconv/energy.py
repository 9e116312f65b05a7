"""Estimate the energy of a spiking network's arithmetic, beside that of its ANN.

Plain arithmetic on plain numbers: a report can be priced anew without the network. The figures
are those of Horowitz (ISSCC 2014) for 45 nm; each can be changed. Memory and routing are not in
it, and they decide on most hardware (Davies et al., Proceedings of the IEEE 2021). So the verdict
is about arithmetic alone, and it compares with the quantised ANN of the same bits first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from snnconv.errors import UsageError, refuse_unknown

# Picojoules; an int8 MAC multiplies for 0.2 pJ and, as one of fewer bits does, adds in int32.
ASSUMPTIONS = {
    "mac_fp32_pj": 4.6,
    "mac_int8_pj": 0.3,
    "multiply_int8_pj": 0.2,
    "add_int32_pj": 0.1,
    "analog_mac_pj": 4.6,
}
SOURCE = (
    "Horowitz, ISSCC 2014, 45 nm; arithmetic alone: memory and routing are not in it. MACs that "
    "read the image are done once per inference, since the current they give is held"
)
PICO_PER_NANO = 1000


def energy(
    operations: Mapping[str, Any],
    assumptions: Mapping[str, float] | None = None,
    *,
    activation_bits: int,
    weight_bits: int,
    steps: int,
) -> dict[str, Any]:
    """Return the energy per image in nanojoules, as plain JSON values.

    `operations` are what `snnconv.workload.count_operations` returns, `assumptions` replace some of
    `ASSUMPTIONS`, in picojoules. The quantised ANN multiplies activations of `activation_bits`
    (`ceil(log2(T + 1))`) with weights of `weight_bits`, at a price that goes with the product of
    the bits, and adds in int32; pixels and what islands emit have 8 bits, there and here. Analog
    islands, and the layers that read them, are computed once by ANNs, in each of `steps` by the
    spiking network. Layers have no share in pooling and
    islands. Raises UsageError for unknown names, and prices that are no numbers from 0 on.
    """
    prices = {**ASSUMPTIONS, **_checked(assumptions or {})}
    rows, total = operations["layers"], operations["total"]
    parts = _spiking(total, prices, steps)
    snn = sum(parts.values())
    matched = (
        prices["multiply_int8_pj"] * activation_bits * weight_bits / 64 + prices["add_int32_pj"]
    )
    islands = prices["analog_mac_pj"] * total.get("analog_macs", 0) / PICO_PER_NANO

    def quantised(row: Mapping[str, Any], macs: str = "macs") -> float:
        wide = row.get("wide_macs", row["image_macs"])
        picojoules = prices["mac_int8_pj"] * wide + matched * (row[macs] - wide)
        return float(picojoules / PICO_PER_NANO)

    qann = quantised(total) + islands
    found = {
        "assumptions": prices,
        "source": SOURCE,
        "activation_bits": activation_bits,
        "weight_bits": weight_bits,
        "snn_nj": {**parts, "total": snn},
        "ann_fp32_nj": (
            prices["mac_fp32_pj"] * (total["macs"] + total.get("analog_macs", 0)) / PICO_PER_NANO
        ),
        "ann_int8_nj": prices["mac_int8_pj"] * total["macs"] / PICO_PER_NANO + islands,
        "qann_nj": qann,
        "qann_skipping_zeros_nj": quantised(total, "qann_nonzero_macs") + islands,
        "layers": [
            {
                "layer": row["layer"],
                "snn_nj": sum(_spiking(row, prices, steps).values()),
                "qann_nj": quantised(row),
            }
            for row in rows
        ],
        "break_even": _break_even(total, parts, qann, steps),
    }
    return {**found, "verdict": _verdict(found, total)}


def activation_bits(timesteps: int) -> int:
    """Return how many bits the counts 0..T have, `ceil(log2(T + 1))`."""
    return timesteps.bit_length()


def _checked(assumptions: Mapping[str, float]) -> Mapping[str, float]:
    refuse_unknown("the prices of operations", assumptions, ASSUMPTIONS)
    for name, price in assumptions.items():
        if (
            isinstance(price, bool)
            or not isinstance(price, int | float)
            or not (0 <= price < math.inf)
        ):
            raise UsageError(f"{name} must be picojoules from 0 on, not {price!r}")
    return assumptions


def _spiking(row: Mapping[str, Any], prices: Mapping[str, float], steps: int) -> dict[str, float]:
    """Return the parts of a spiking network's energy, or a layer's, in nanojoules."""
    add = prices["add_int32_pj"]
    islands = prices["analog_mac_pj"] * row.get("analog_macs", 0)
    islands += prices["mac_int8_pj"] * row.get("island_macs", 0)
    picojoules = {
        "image": prices["mac_int8_pj"] * row["image_macs"],
        "synapses": add * row["synaptic_operations"],
        "bias": add * row["bias_additions"],
        "membrane": add * row["membrane_updates"],
        "resets": add * row["resets"],
        "pooling": add * row.get("pooling", 0),
        "analog": islands * steps,
    }
    return {key: value / PICO_PER_NANO for key, value in picojoules.items()}


def _break_even(
    total: Mapping[str, Any], parts: Mapping[str, float], goal: float, steps: int
) -> dict[str, float] | None:
    """Return the spikes at which the energies meet, if they stay distributed as they are.

    What goes with spikes are accumulates, resets and pooling; None if the rest alone is more than
    the `goal`, or nothing spikes.
    """
    by_spikes = parts["synapses"] + parts["resets"] + parts["pooling"]
    left = goal - (sum(parts.values()) - by_spikes)
    if left <= 0 or by_spikes <= 0 or not total.get("neurons"):
        return None
    spikes = total["resets"] / total["neurons"] * left / by_spikes
    return {"spikes_per_neuron": spikes, "rate_percent": 100 * spikes / steps}


def _verdict(found: Mapping[str, Any], total: Mapping[str, Any]) -> str:
    """Say in two sentences who takes more."""
    snn, qann = found["snn_nj"]["total"], found["qann_nj"]
    meets = found["break_even"]
    outcome = "less energy than" if snn < qann else "more energy than"
    if math.isclose(snn, qann):
        outcome = "the same energy as"
    text = (
        f"The spiking network's arithmetic takes {outcome} that of the quantised ANN "
        f"of the same bits ({found['activation_bits']}-bit activations, {found['weight_bits']}-bit "
        f"weights): {_nj(snn)} against {_nj(qann)} nJ per image"
    )
    if meets is not None:
        spikes = total["resets"] / total["neurons"]
        text += (
            f", with {spikes:.3g} spikes per neuron where {meets['spikes_per_neuron']:.3g} "
            "would break even"
        )
    elif snn > qann:
        text += ", and what it takes without any spike is more already"
    skipping, int8, fp32 = (
        f"{times(snn, found[key])} the energy of {who} ({_nj(found[key])} nJ)"
        for key, who in (
            ("qann_skipping_zeros_nj", "a quantised ANN that skips zeros"),
            ("ann_int8_nj", "the int8 ANN"),
            ("ann_fp32_nj", "the fp32 ANN"),
        )
    )
    return (
        f"{text}. It takes {skipping}, {int8} and {fp32}; memory traffic is in none of these "
        "figures."
    )


def _nj(energy: float) -> str:
    return f"{energy:,.0f}" if energy >= 100 else f"{energy:.3g}"


def times(ours: float, other: float) -> str:
    """Say how many times another energy ours is; there is no number where that is 0."""
    if not other:
        return "infinitely many times" if ours else "1 times"
    return f"{ours / other:.3g} times"
