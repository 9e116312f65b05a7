"""From a checkpoint, or a name, to a model with its weights in it.

Nothing in a checkpoint is executed: `.pt` files are read with `weights_only`. Every key that does
not fit is named; nothing is loaded in part.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snnconv.errors import CheckpointError, UsageError, first_line, suggestion
from snnconv.files import ANN_SUFFIXES, SUFFIX, ann_stem
from snnconv.preprocess import Preprocessing, overridden
from snnconv.recipe import Recipe

# Where trainers keep the weights within a checkpoint, averaged ones first.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
LARGEST_RATIO = 100
ARCH_KEYS = ("arch", "architecture", "model_name", "model")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, and what is known about it.

    `name` is the architecture as timm knows it; `size_stated` says whether the image size comes
    from the checkpoint, a tag or a recipe, and not just from the architecture's usual one.
    `channels` is the order of the colours the weights were trained with; the first convolution of
    a `bgr` network has been turned to read RGB. `weights_sha256` is a hash of all tensors with
    their names, empty for a model without numbers.
    """

    model: nn.Module
    name: str
    model_args: dict[str, Any]
    preprocessing: Preprocessing
    num_classes: int
    class_names: tuple[str, ...] | None
    weights_sha256: str
    size_stated: bool = True
    channels: str = "rgb"


def load_model(
    source: str | Path,
    *,
    arch: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    recipe: Recipe | None = None,
    channels: str | None = None,
    shapes_only: bool = False,
) -> LoadedModel:
    """Build the model a source names: a checkpoint file, a timm name, or `zoo:NAME`.

    timm names may have tags (`resnet18.a1_in1k`) or the prefixes `hf-hub:` and `local-dir:`. The
    architecture of a file comes from `arch`, else the file's metadata, else the `recipe`, else the
    file's name. `model_args` are passed to the model's constructor. Without `pretrained` a timm
    name gets random weights, and nothing is fetched; if only `shapes_only` are wanted, none at all
    where the architecture can be built so (on torch's `meta` device). `channels` (`rgb`, `bgr`) is
    the order the weights were trained with. Raises UsageError for unknown names, CheckpointError
    for a file that is damaged, foreign, or does not fit the architecture.
    """
    from snnconv.model_zoo import register

    register()
    source = str(source)
    args = {**(recipe.model_args if recipe else {}), **(model_args or {})}
    fallback = recipe.arch if recipe else None
    loaded = _load(source, arch, fallback, args, pretrained, shapes_only and not pretrained)
    if recipe is not None:
        if recipe.arch and not arch and _base(recipe.arch) != _base(loaded.name):
            raise UsageError(
                f"the recipe {recipe.name} is for {recipe.arch}, and {source} is {loaded.name}"
            )
        preprocessing = recipe.applied(loaded.preprocessing)
        stated = loaded.size_stated or "input_size" in recipe.preprocessing
        loaded = replace(loaded, preprocessing=preprocessing, size_stated=stated)
    if (channels or (recipe.channels if recipe else "rgb")) == "bgr":
        loaded = replace(loaded, channels="bgr")
        _turn_first_convolution_(loaded)
    return loaded


def _load(
    source: str,
    arch: str | None,
    fallback: str | None,
    args: dict[str, Any],
    pretrained: bool,
    shapes_only: bool,
) -> LoadedModel:
    if source.startswith("zoo:"):
        path, own = _zoo_weights(source)
        _refuse_other_arch(source, arch, own)
        return _from_file(path, own, None, args)
    if source.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        loaded = _from_timm(source, args, pretrained)
        _refuse_other_arch(source, arch, loaded.name)
        return loaded
    path = Path(source)
    if path.exists() or path.suffix in ANN_SUFFIXES or "/" in source:
        return _from_file(path, arch, fallback, args)
    _refuse_other_arch(source, arch, source)
    _require_known(source)
    if shapes_only:
        try:
            with torch.device("meta"):
                return _from_timm(source, args, pretrained)
        except (CheckpointError, UsageError):
            pass  # a constructor that asks for numbers; if it is that, it will not complain again
    return _from_timm(source, args, pretrained)


def _refuse_other_arch(source: str, arch: str | None, own: str) -> None:
    """Raise UsageError if a source that names its own architecture is to have another."""
    if arch is not None and arch != own:
        raise UsageError(f"{source} is {own}, not {arch}; --arch belongs to a checkpoint file")


def _turn_first_convolution_(loaded: LoadedModel) -> None:
    """Turn the input channels of the first convolution around, from BGR to RGB."""
    cfg = getattr(loaded.model, "pretrained_cfg", None) or {}
    names = cfg.get("first_conv")
    names = [names] if isinstance(names, str) else list(names or ())
    if not names or loaded.preprocessing.input_size[0] != 3:
        raise UsageError(
            f"--channels bgr: timm does not say which convolution of {loaded.name} comes first, or "
            "it does not take three colours"
        )
    with torch.no_grad():
        for name in names:
            weight: Any = loaded.model.get_submodule(name).weight
            weight.copy_(weight.flip(1))


def _zoo_weights(source: str) -> tuple[Path, str]:
    from snnconv.model_zoo import catalog

    name = source.removeprefix("zoo:")
    found = {e.name: e for e in catalog.entries()}
    with_weights = [e.name for e in found.values() if e.path]
    if name not in found:
        raise UsageError(
            f"the zoo has no network {name!r}; with weights it has {', '.join(with_weights)} "
            "(see snnconv zoo)"
        )
    path = found[name].path
    if path is None:
        raise UsageError(
            f"zoo:{name} is an architecture without weights; give a checkpoint file and "
            f"--arch {found[name].arch}"
        )
    return path, found[name].arch


def _base(arch: str) -> str:
    """Return the name of an architecture without the tag of its weights."""
    return arch.partition(".")[0]


def _is_known(arch: str) -> bool:
    import timm

    return bool(timm.is_model(_base(arch)))


def _require_known(arch: str) -> None:
    if not _is_known(arch):
        raise UsageError(f"unknown architecture {arch!r}{_near(arch)}")


def _near(arch: str) -> str:
    import timm

    known = timm.list_models()
    return suggestion(_base(arch), known, "timm.list_models() lists them all")


def _create(arch: str, args: dict[str, Any], **options: Any) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(arch, **options, **args)
    except (TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
        line = first_line(error)
        raise UsageError(f"{arch} cannot be built with {_spell(args)}: {line}") from error
    return model


def _spell(args: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in args.items()) or "its default arguments"


def _from_timm(name: str, args: dict[str, Any], pretrained: bool) -> LoadedModel:
    hub = ":" in name
    if pretrained and not hub and not _has_weights(name):
        raise UsageError(
            f"timm has no pretrained weights for {name}; give a checkpoint file and --arch {name}"
        )
    try:
        model = _create(name, args, pretrained=pretrained)
    except UsageError:
        raise
    except Exception as error:  # whatever a download can raise
        line = first_line(error)
        if not pretrained:
            raise UsageError(f"{name} cannot be built: {line}") from error
        raise CheckpointError(
            f"the weights of {name} could not be fetched: {line.rstrip('.')}; download the "
            "checkpoint elsewhere and give the file"
        ) from error
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return _finish(model, str(cfg.get("architecture", name)) if hub else name, args)


def _has_weights(name: str) -> bool:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and cfg.has_weights


def _from_file(
    path: Path, arch: str | None, fallback: str | None, args: dict[str, Any]
) -> LoadedModel:
    contents, metadata = _read(path)
    state = _weights(path, contents)
    stated = {k: contents[k] for k in ARCH_KEYS if isinstance(contents.get(k), str)} | metadata
    saved = contents.get("args")
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else {}
    named = {k: v for k, v in saved.items() if isinstance(v, str)} | stated
    arch = arch or _stated_arch(named) or fallback or _arch_of_name(path, state)
    _require_known(arch)
    sized = _saved_arguments(saved) | _inferred_sizes(arch, state) | args
    model = _create(arch, sized)
    _fill(model, state, path, arch)
    loaded = _finish(model, arch, sized)
    preprocessing, size_stated = _saved_preprocessing(loaded, saved)
    # A network trained anew, for other classes, may have been trained on another size too.
    usual = "num_classes" not in sized
    return replace(loaded, preprocessing=preprocessing, size_stated=size_stated or usual)


def _saved_arguments(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Take from timm's saved training arguments those of the network's constructor."""
    given = saved.get("model_kwargs")
    given = {str(k): v for k, v in given.items()} if isinstance(given, dict) else {}
    # timm's options --gp and --bn-eps leave no trace in the weights.
    passed = {"global_pool": saved.get("gp"), "bn_eps": saved.get("bn_eps")}
    return {k: v for k, v in passed.items() if v is not None} | given


def _saved_preprocessing(
    loaded: LoadedModel, saved: Mapping[str, Any]
) -> tuple[Preprocessing, bool]:
    """Take from timm's saved training arguments what they say about the input."""
    known = loaded.preprocessing
    size = saved.get("input_size")
    if size is None and isinstance(saved.get("img_size"), int):
        size = (known.input_size[0], saved["img_size"], saved["img_size"])
    values = {key: saved.get(key) for key in ("mean", "std", "crop_pct", "interpolation")}
    if values["interpolation"] in ("", "random"):  # timm's default, and no single one
        values["interpolation"] = None
    try:
        return overridden(known, input_size=size, **values), size is not None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's saved arguments make no sense: {error}") from error


def _stated_arch(named: Mapping[str, Any]) -> str | None:
    for key in ARCH_KEYS:
        if isinstance(named.get(key), str) and _is_known(named[key]):
            return str(named[key])
    return None


def _arch_of_name(path: Path, state: Mapping[str, Tensor]) -> str:
    """Guess the architecture from a file name like `resnet18-5c106cde.pth`."""
    stem = ann_stem(path.name).lower()
    guesses = [stem, re.split(r"[-.]", stem)[0], re.sub(r"[-.]", "_", stem)]
    for guess in guesses:
        if "linear.weight" in state and _is_known(f"cifar_{guess}"):
            return f"cifar_{guess}"
        if _is_known(guess):
            return guess
    raise UsageError(
        f"{path.name} does not say which architecture it is for, and its name is none; "
        f"give --arch NAME{_near(guesses[1])}"
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a file holds, and its metadata."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give a checkpoint file")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.name.endswith(SUFFIX):
        raise CheckpointError(
            f"{path} is a spiking checkpoint already; evaluate it with snnconv eval, or give the "
            "ANN it came from"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    path.open("rb").close()  # what the system has against it, in its own words
    _refuse_odd_archives(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything, also OSError
        raise CheckpointError(f"{path} {_unreadable(path, error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(
            f"{path} holds a {type(contents).__name__}, not weights; save model.state_dict()"
        )
    return contents, {}


def _unreadable(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "is empty"
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
    if found or "weights_only" in str(error).lower().replace(" ", "_"):
        what = f" ({found.group(1)})" if found else ""
        return (
            f"is no checkpoint of tensors, or holds Python objects{what}, which are not executed; "
            "save model.state_dict()"
        )
    return "is damaged or not a PyTorch checkpoint; download or save it again"


def _refuse_odd_archives(path: Path) -> None:
    """Raise CheckpointError for a zip archive that would unpack to absurd sizes, or repeats names.

    torch stores tensors without compression.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # an older format, or no checkpoint: torch.load will say
    unpacked = sum(e.file_size for e in entries)
    if unpacked > LARGEST_RATIO * path.stat().st_size:
        raise CheckpointError(
            f"{path} would unpack from {path.stat().st_size:,} to {unpacked:,} bytes; that is no "
            "checkpoint"
        )
    if len({e.filename for e in entries}) < len(entries):
        raise CheckpointError(f"{path} holds entries of the same name; save it again")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); download or save it again"
        ) from error


def _weights(path: Path, contents: dict[str, Any]) -> dict[str, Tensor]:
    """Find the state dict in a checkpoint, and take the wrappers' prefixes off its names."""
    for key in CONTAINERS:
        if isinstance(contents.get(key), dict) and contents[key]:
            return _weights(path, contents[key])
    state = {k: v for k, v in contents.items() if isinstance(v, Tensor) and isinstance(k, str)}
    odd = [k for k, v in state.items() if v.layout != torch.strided or v.is_quantized]
    if odd:
        raise CheckpointError(f"{path} holds weights that are sparse or quantised", odd)
    if not state:
        raise CheckpointError(
            f"{path} holds no weights, but {', '.join(map(str, list(contents)[:5])) or 'nothing'}"
        )
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    undefined = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if undefined:
        raise CheckpointError(f"{path} holds weights that are infinite or undefined", undefined)
    return state


def _inferred_sizes(arch: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the number of classes and of input channels off the weights, where they differ."""
    import timm

    base, _, tag = arch.partition(".")
    cfg = timm.get_pretrained_cfg(arch if tag else base)
    sizes = {}
    if cfg is None:
        return {}
    for argument, layer, axis, usual in (
        ("num_classes", cfg.classifier, 0, cfg.num_classes),
        ("in_chans", cfg.first_conv, 1, cfg.input_size[0]),
    ):
        weight = state.get(f"{layer}.weight") if isinstance(layer, str) else None
        if weight is not None and weight.ndim > axis and weight.shape[axis] != usual:
            sizes[argument] = weight.shape[axis]
    return sizes


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Load the weights; every key must fit."""
    own = model.state_dict()
    counters = {k for k in own if k.endswith("num_batches_tracked")}
    problems = [f"missing: {k}" for k in own if k not in state and k not in counters]
    problems += [f"unexpected: {k}" for k in state if k not in own]
    problems += [
        f"shape of {k}: {list(v.shape)} in the file, {list(own[k].shape)} in the model"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if problems:
        raise CheckpointError(
            f"{path.name} does not fit {arch}; check --arch and --model-arg",
            problems,
        )
    model.load_state_dict({**{k: own[k] for k in counters}, **state})


def _finish(model: nn.Module, name: str, args: dict[str, Any]) -> LoadedModel:
    from timm.data import resolve_model_data_config

    cfg = resolve_model_data_config(model)
    usual, *size = cfg["input_size"]
    channels = int(args.get("in_chans", usual))
    mean, std = (tuple(map(float, cfg[key])) for key in ("mean", "std"))
    if channels != usual:
        mean, std = ((sum(v) / len(v),) * channels for v in (mean, std))
    preprocessing = Preprocessing(
        (channels, *size),
        mean,
        std,
        float(cfg["crop_pct"]),
        str(cfg["interpolation"]),
    )
    labels = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    on_meta = any(p.is_meta for p in model.parameters())
    return LoadedModel(
        model.eval(),
        name,
        args,
        preprocessing,
        int(getattr(model, "num_classes", 0)),
        tuple(labels) if labels else None,
        "" if on_meta else hash_weights(model.state_dict()),
    )


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over all tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
