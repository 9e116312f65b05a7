"""Read and write spiking checkpoints, `NAME.snn.safetensors`.

One safetensors file holds the whole network: its graph and settings as JSON in the metadata, its
integers, row units and clips as tensors. The scale sigma of a synapse is its row unit times
`2^shift`. Loading needs nothing else: no timm model code, no original checkpoint, no pickle. A hash
over all of it tells damage; shapes, types and ranges are checked besides, for a hash is no proof of
good faith.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snnconv.analog import FUNCTIONS
from snnconv.errors import CheckpointError, first_line
from snnconv.files import write_atomically
from snnconv.network import (
    Image,
    Island,
    Node,
    Population,
    Readout,
    SpikingNetwork,
    Synapse,
    check_shapes,
)
from snnconv.ops import Pool
from snnconv.plan import Relay
from snnconv.preprocess import Preprocessing
from snnconv.quant import reads

FORMAT = 1
SETTINGS = (
    "timesteps",
    "schedule",
    "drain",
    "stagger",
    "neuron",
    "initial_membrane",
    "weight_bits",
    "model",
    "provenance",
)
_KEY = "snnconv"
_HASH = "content_sha256"
_RELAYS = {
    "max_pool": {"kernel", "stride", "padding", "dilation", "ceil_mode"},
    "sum_pool": {"pool"},
    "concat": set(),
    "slice": {"slices"},
    "pad": {"padding"},
    "gather": {"rows", "columns"},
    "clamp": {"low", "high"},
    "rearrange": {"shape", "steps"},
    "flatten": set(),
}
_SYNAPSES = {
    "conv": {"stride", "padding", "dilation", "groups"},
    "linear": set(),
    "scale": set(),
}


def save_network(network: SpikingNetwork, path: Path | str, *, replace: bool = True) -> None:
    """Write a network; the file appears whole or not at all, and the same network gives the same
    bytes. Raises UsageError if the file is there and not to be replaced.
    """
    from safetensors.torch import save as to_bytes

    header, tensors = _contents(network)
    text = _canonical({**header, _HASH: _content_hash(header, tensors)})
    contents = to_bytes({k: v.contiguous() for k, v in tensors.items()}, {_KEY: text})
    write_atomically(Path(path), contents, replace=replace)


def sha256(network: SpikingNetwork) -> str:
    """Return the hash of a network's contents, which its file states."""
    return _content_hash(*_contents(network))


def _contents(network: SpikingNetwork) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    header = {
        "format": FORMAT,
        "graph": [_node_to_json(node, tensors) for node in network.nodes],
        "preprocessing": network.preprocessing.to_dict(),
        **{key: getattr(network, key) for key in SETTINGS},
    }
    return header, tensors


def _canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _content_hash(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return a hash over the header, without its own entry, and all tensors with their names."""
    digest = hashlib.sha256(_canonical({k: v for k, v in header.items() if k != _HASH}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_network(path: Path | str) -> SpikingNetwork:
    """Rebuild a network from its file alone.

    Raises CheckpointError if the file is missing, damaged, no spiking checkpoint, of a newer
    format, or inconsistent.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a spiking checkpoint in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb"):
        pass  # what is wrong is said here: safetensors takes every failure for a missing file
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise CheckpointError(
                    f"{path} is no spiking checkpoint; make one of it with snnconv convert"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or no spiking checkpoint ({error}); convert the network again"
        ) from error
    try:
        header = json.loads(metadata[_KEY], object_pairs_hook=_without_duplicates)
        found = header["format"]
        if not isinstance(found, int) or found != FORMAT:
            raise CheckpointError(
                f"{path} has format {found}, this snnconv reads format {FORMAT}; "
                + ("update snnconv" if str(found) > str(FORMAT) else "convert the network again")
            )
        if header[_HASH] != _content_hash(header, tensors):
            raise CheckpointError(
                f"{path} is damaged: its contents do not have the hash it states; convert the "
                "network again"
            )
        return _from_header(header, tensors)
    except CheckpointError:
        raise
    except Exception as error:  # a file may be wrong in any way there is
        what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(
            f"{path} is inconsistent: {what}; convert the network again"
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return dict(pairs)


def _from_header(header: dict[str, Any], tensors: dict[str, Tensor]) -> SpikingNetwork:
    nodes: list[Node] = []
    known_names: set[str] = set()
    for entry in header["graph"]:
        node = _node_from_json(entry, tensors)
        missing = set(reads(node)) - known_names
        if missing or node.name in known_names:
            raise ValueError(f"node {node.name} reads {sorted(missing)} or stands twice")
        known_names.add(node.name)
        nodes.append(node)
    if not any(isinstance(n, Readout) for n in nodes):
        raise ValueError("the graph has no readout")
    network = SpikingNetwork(
        tuple(nodes),
        Preprocessing.from_dict(header["preprocessing"]),
        **{key: header[key] for key in SETTINGS},
    )
    for name, kind in (("model", dict), ("provenance", dict)):
        if not isinstance(getattr(network, name), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    check_shapes(network)
    return network


def _node_to_json(node: Node, tensors: dict[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any]
    if isinstance(node, Image):
        kind, values = "image", {"shape": node.shape, "zero_point": node.zero_point}
    elif isinstance(node, Relay):
        kind = "map"
        values = {
            "op": node.op,
            "inputs": node.inputs,
            "shape": node.shape,
            "attributes": _plain(node.attributes),
        }
    elif isinstance(node, Island):
        kind = "island"
        values = {
            "path": node.path,
            "function": node.function,
            "attributes": {k: v for k, v in node.attributes.items() if k != "constants"},
            "inputs": node.inputs,
            "shape": node.shape,
            "depth": node.depth,
        }
        for i, constant in enumerate(node.attributes.get("constants", ())):
            tensors[f"{node.name}/constant{i}"] = constant
        tensors[f"{node.name}/unit"] = node.unit
    else:
        values = {"shape": node.shape, "depth": node.depth}
        values["branches"] = [
            _synapse_to_json(synapse, f"{node.name}/{i}", tensors)
            for i, synapse in enumerate(node.branches)
        ]
        tensors[f"{node.name}/bias"] = node.bias
        if isinstance(node, Readout):
            kind = "readout"
            values["unit"] = node.unit
            if node.threshold is not None:
                values["threshold"] = node.threshold
        else:
            kind = "neurons"
            values |= {"path": node.path, "two_sided": node.two_sided}
            for name in ("threshold", "row_unit", "clip"):
                tensors[f"{node.name}/{name}"] = getattr(node, name)
    return {"kind": kind, "name": node.name, **values}


def _synapse_to_json(synapse: Synapse, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors[f"{prefix}.weight"], tensors[f"{prefix}.shift"] = synapse.weight, synapse.shift
    return {
        "source": synapse.source,
        "key": synapse.key,
        "kind": synapse.kind,
        "attributes": _plain(synapse.attributes),
        "pools": [_plain(pool) for pool in synapse.pools],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Pool):
        return {"h": value.h, "w": value.w}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _pool(value: dict[str, Any]) -> Pool:
    return Pool(_tuples(value["h"]), _tuples(value["w"]))


def _attributes(value: dict[str, Any], expected: set[str]) -> dict[str, Any]:
    if set(value) != expected:
        raise ValueError(f"attributes {sorted(value)} where {sorted(expected)} belong")
    return {k: _pool(v) if k == "pool" else _tuples(v) for k, v in value.items()}


def _program(name: str, value: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Read the steps of an island's program and its constants, finite float64."""
    if set(value) != {"steps"}:
        raise ValueError(f"{name}: attributes {sorted(value)} of a program")
    steps = tuple(
        (operation, _tuples(operands), {k: _tuples(v) for k, v in attributes.items()})
        for operation, operands, attributes in value["steps"]
    )
    read = sum(f"{name}/constant{i}" in tensors for i in range(len(tensors)))
    constants = tuple(_tensor(tensors, f"{name}/constant{i}", torch.float64) for i in range(read))
    if not all(bool(constant.isfinite().all()) for constant in constants):
        raise ValueError(f"{name}: constants that are no numbers")
    return {"steps": steps, "constants": constants}


def _node_from_json(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Node:
    name, kind, shape = entry["name"], entry["kind"], _tuples(entry["shape"])
    if kind == "image":
        return Image(name, shape, _tuples(entry["zero_point"]))
    if kind == "map":
        expected = _RELAYS[entry["op"]]
        attributes = _attributes(entry["attributes"], expected)
        return Relay(name, entry["op"], _tuples(entry["inputs"]), shape, attributes)
    if kind == "island":
        attributes = dict(entry["attributes"])
        if entry["function"] == "program":
            attributes = _program(name, entry["attributes"], tensors)
        elif entry["function"] not in FUNCTIONS:
            raise ValueError(f"{name} is of unknown function {entry['function']!r}")
        return Island(
            name,
            entry["path"],
            entry["function"],
            attributes,
            _tuples(entry["inputs"]),
            shape,
            entry["depth"],
            _positive(_tensor(tensors, f"{name}/unit", torch.float64, shape[0])),
        )
    if kind not in ("neurons", "readout"):
        raise ValueError(f"node {name} is of unknown kind {kind!r}")
    bias = _tensor(tensors, f"{name}/bias", torch.int32)
    branches = tuple(
        _synapse_from_json(b, f"{name}/{i}", tensors, len(bias))
        for i, b in enumerate(entry["branches"])
    )
    if not branches:
        raise ValueError(f"{name} has no synapses")
    if kind == "readout":
        threshold = entry.get("threshold")
        if threshold is not None and not (type(threshold) is int and 0 < threshold < 2**31):
            raise ValueError(f"{name}: the threshold is no positive integer of 32 bits")
        unit = _positive(entry["unit"])
        return Readout(name, branches, bias, shape, entry["depth"], unit, threshold)
    threshold = _tensor(tensors, f"{name}/threshold", torch.int32, len(bias))
    if int(threshold.min()) < 1:
        raise ValueError(f"{name} has thresholds below 1")
    if not isinstance(entry["two_sided"], bool):
        raise ValueError(f"{name}: two_sided is no truth value")
    return Population(
        name,
        entry["path"],
        branches,
        threshold,
        bias,
        shape,
        entry["two_sided"],
        entry["depth"],
        _positive(_tensor(tensors, f"{name}/row_unit", torch.float64, len(bias))),
        _positive(_tensor(tensors, f"{name}/clip", torch.float64, len(bias))),
    )


def _synapse_from_json(
    entry: dict[str, Any], prefix: str, tensors: dict[str, Tensor], rows: int
) -> Synapse:
    kind = entry["kind"]
    attributes = _attributes(entry["attributes"], _SYNAPSES[kind])
    dtype = torch.int32 if kind == "scale" else torch.int8
    weight = _tensor(tensors, f"{prefix}.weight", dtype, rows)
    if weight.ndim != {"conv": 4, "linear": 2, "scale": 1}[kind]:
        raise ValueError(f"{prefix}.weight has {weight.ndim} axes")
    shift = _tensor(tensors, f"{prefix}.shift", torch.int32, rows)
    if not 0 <= int(shift.min()) <= int(shift.max()) < 31:
        raise ValueError(f"{prefix}.shift is out of range")
    pools = tuple(_pool(p) for p in entry["pools"])
    return Synapse(entry["source"], tuple(entry["key"]), kind, weight, shift, attributes, pools)


def _positive(value: Any) -> Any:
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if not bool((numbers.isfinite() & (numbers > 0)).all()):
        raise ValueError("a unit or clip is not positive and finite")
    return value


def _tensor(
    tensors: dict[str, Tensor], name: str, dtype: torch.dtype, rows: int | None = None
) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype != dtype or (rows is not None and len(tensor) != rows):
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    return tensor
