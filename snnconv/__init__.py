"""Convert pretrained vision networks into spiking networks that equal their quantised ANN.

The public names load on first use (PEP 562), so that `import snnconv` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snnconv.data import open_data as open_data
    from snnconv.load import load_model as load_model

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "snnconv.load",
    "open_data": "snnconv.data",
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
