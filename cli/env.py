"""`snnconv env`: show what snnconv runs on, also when torch or timm cannot be imported."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from snnconv import __version__

from . import console, options

PACKAGES = ("torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "scikit-learn")
IMPORTED = ("torch", "torchvision", "timm")


@options.command("env", example="snnconv env")
@options.json_option
@options.verbosity_options
def command(as_json: bool, verbose: bool, quiet: bool) -> None:
    """Show versions, processors and accelerators; paste it into a bug report."""
    found = environment()
    if as_json:
        console.emit_json(found)
        return
    rows: list[tuple[str, object]] = [("snnconv", found["version"]), ("python", found["python"])]
    rows += [(name, version or "not installed") for name, version in found["packages"].items()]
    rows += [("platform", found["platform"]), ("cpu", found["cpu"]), ("cores", found["cores"])]
    rows.append(("torch threads", found["threads"] or "unknown"))
    rows.append(("engine", _engine_text(found["engine"])))
    rows += [(a["device"], _accelerator_text(a)) for a in found["accelerators"]]
    if not found["accelerators"]:
        rows.append(("accelerators", "none"))
    rows += [(f"{p['package']} fails", p["error"]) for p in found["problems"]]
    console.print_table(None, ["what", "here"], rows)


def environment() -> dict[str, Any]:
    """Describe this machine and installation as the object that `env --json` prints."""
    problems = []
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            problems.append({"package": name, "error": _explain(error)})
    threads, accelerators = _torch()
    return {
        "schema": "snnconv.env/1",
        "version": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": threads,
        "engine": _engine(),
        "accelerators": [{**a, "engine": _counts_engine(a["device"])} for a in accelerators],
        "problems": problems,
    }


def _engine() -> dict[str, Any]:
    """Return the engine in use on the CPU, its instructions, and why it is not the native one."""
    try:
        from snnconv.engine import kernels, native

        reason = native.unavailable()
        if reason is None:
            return {"name": "native", "instructions": kernels.levels()[-1], "reason": None}
    except Exception as error:
        reason = _explain(error)
    return {"name": "counts", "instructions": None, "reason": reason}


def _engine_text(engine: dict[str, Any]) -> str:
    if engine["reason"] is None:
        return f"{engine['name']}, {engine['instructions']}"
    return f"{engine['name']}: {engine['reason']}"


def _accelerator_text(accelerator: dict[str, Any]) -> str:
    engine = accelerator["engine"]
    fast = [name for name in ("int8", "triton") if engine[name] is None]
    slow = [f"not {name}: {engine[name]}" for name in ("int8", "triton") if engine[name]]
    return f"{accelerator['name']}, counts engine with {', '.join([*fast, *slow])}"


def _counts_engine(device: str) -> dict[str, str | None]:
    """Say why the counts engine's fast ways do not serve on a device; None where they do."""
    try:
        import torch

        from snnconv.engine import gpu
        from snnconv.engine.linear import bytes_multiply

        place = torch.device(device)
        multiply = bytes_multiply(place)
    except Exception as error:
        return dict.fromkeys(("int8", "triton"), _explain(error))
    return {
        "int8": None if multiply else "torch has no exact product of int8 matrices there",
        "triton": gpu.unavailable(place),
    }


def _explain(error: Exception) -> str:
    from .main import explain

    return explain(error) or f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Name the processor, from Linux's own list where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _torch() -> tuple[int | None, list[dict[str, Any]]]:
    """Return torch's thread count and its accelerators; nothing if torch does not work."""
    accelerators: list[dict[str, Any]] = []
    try:
        import torch

        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            gib = round(found.total_memory / 2**30, 1)
            accelerators.append({"device": f"cuda:{index}", "name": found.name, "memory_gib": gib})
        if torch.backends.mps.is_available():
            accelerators.append({"device": "mps", "name": "Apple GPU", "memory_gib": None})
        return torch.get_num_threads(), accelerators
    except Exception:
        return None, accelerators
