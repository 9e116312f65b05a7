"""Convert pretrained vision networks into spiking networks that equal their quantised ANN.

The public names load on first use (PEP 562), so that `import snnconv` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snnconv.calibrate import calibrate_ as calibrate_
    from snnconv.checkpoint import load_network as load_network
    from snnconv.checkpoint import save_network as save_network
    from snnconv.data import from_arrays as from_arrays
    from snnconv.data import open_data as open_data
    from snnconv.diagnosis import diagnose as diagnose
    from snnconv.engine import endpoint as endpoint
    from snnconv.engine import prepare as prepare
    from snnconv.engine import simulate as simulate
    from snnconv.examination import examine as examine
    from snnconv.finetune import FinetuneSettings as FinetuneSettings
    from snnconv.finetune import tune as tune
    from snnconv.folding import fold as fold
    from snnconv.graph import trace as trace
    from snnconv.load import load_model as load_model
    from snnconv.measure import evaluate as evaluate
    from snnconv.normalize import integerize as integerize
    from snnconv.pipeline import check_equal as check_equal
    from snnconv.pipeline import convert as convert
    from snnconv.plan import make_plan as make_plan
    from snnconv.preprocess import Preprocessing as Preprocessing
    from snnconv.train import TrainSettings as TrainSettings
    from snnconv.train import retrain as retrain

__version__ = "0.1.0"

# Public name → its module, in the order of the data's way. No name may be that of a module here,
# which would take its place as soon as it is imported.
_PUBLIC = {
    "load_model": "snnconv.load",
    "Preprocessing": "snnconv.preprocess",
    "open_data": "snnconv.data",
    "from_arrays": "snnconv.data",
    "examine": "snnconv.examination",
    "convert": "snnconv.pipeline",
    "check_equal": "snnconv.pipeline",
    "trace": "snnconv.graph",
    "make_plan": "snnconv.plan",
    "fold": "snnconv.folding",
    "calibrate_": "snnconv.calibrate",
    "retrain": "snnconv.train",
    "TrainSettings": "snnconv.train",
    "integerize": "snnconv.normalize",
    "save_network": "snnconv.checkpoint",
    "load_network": "snnconv.checkpoint",
    "prepare": "snnconv.engine",
    "simulate": "snnconv.engine",
    "endpoint": "snnconv.engine",
    "tune": "snnconv.finetune",
    "FinetuneSettings": "snnconv.finetune",
    "evaluate": "snnconv.measure",
    "diagnose": "snnconv.diagnosis",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted({*globals(), *_PUBLIC})
