"""Put ReLU in place of smooth activations, for networks that are to be retrained.

SiLU, GELU and the like are no sums of spikes. With ReLU in their place a network is all spikes, but
computes something else: without retraining it is worth little.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch.nn.functional as F
from torch import nn

TORCHS = (
    nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU,
    nn.SELU, nn.Softplus,
)  # fmt: skip
# Of timm's own, of which there are variants called so with `Me` behind.
TIMMS = ("Swish", "Mish", "HardSwish", "HardMish", "GELU", "GELUTanh", "QuickGELU", "PReLU")


def replace_activations(model: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    """Return a copy of a model with ReLU for every smooth or leaky activation, and how many.

    The numbers are by the name of the activation. Gates stay as they are: a sigmoid is no
    activation that a ReLU could stand for. So do functions that are called without a module, but
    for those of timm's `GammaAct`, which keeps its factor.
    """
    from timm.layers import activations, activations_me
    from timm.models.nfnet import GammaAct

    kinds = [getattr(activations, name, None) for name in TIMMS]
    kinds += [getattr(activations_me, f"{name}Me", None) for name in TIMMS]
    replaced = {*TORCHS, *kinds} - {None}
    parent = nn.ModuleDict({"model": copy.deepcopy(model)})
    found: Counter[str] = Counter()
    for path, module in list(parent.named_modules()):
        if isinstance(module, GammaAct) and module.act_fn is not F.relu:
            found[f"{type(module).__name__} of {module.act_fn.__name__}"] += 1
            module.act_fn = F.relu
        elif type(module) in replaced:
            parent.set_submodule(path, nn.ReLU().train(module.training))
            found[type(module).__name__] += 1
    return parent["model"], dict(found)
