"""What simulating T steps costs, against one forward pass of the ANN and against SpikingJelly.

    python benchmarks/engines.py [--quick] [--device cuda] [--json FILE] [--plot FILE]
    python benchmarks/engines.py --stored FILE [--stored FILE] --plot FILE

All run side by side in one process, taking turns, so that what else the machine does falls on all
of them; the median of the repetitions counts. The ANN is the float network with BatchNorm folded,
in eager mode and in whichever memory layout is faster. Our engines run schedule `paper`, which
takes exactly T steps, and keep the logits of each; `endpoint` computes their exact end alone.
SpikingJelly 2.0.0 is measured with networks of its own converter, if it is installed (pip install
'snnconv[benchmarks]'). Weights and images are random: none of these methods skips anything because
of what they are. Extra memory is the peak above what the process held before, each in a process of
its own (Linux only). On a GPU only the clock counts, and memory is what torch has allocated there.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from snnconv import __version__
from snnconv.engine import kernels, native, prepare
from snnconv.graph import trace
from snnconv.model_zoo import register
from snnconv.pipeline import convert
from snnconv.preprocess import Preprocessing

# Name in reports: architecture and pixels a side.
NETWORKS = {
    "ResNet-20 32px": ("cifar_resnet20", 32),
    "ResNet-18 32px": ("cifar_resnet18", 32),
    "VGG-16 32px": ("cifar_vgg16", 32),
    "MobileNetV1 224px": ("mobilenetv1_100", 224),
    "ResNet-18 224px": ("resnet18", 224),
}
QUICK = {"networks": ("ResNet-20 32px", "ResNet-18 32px"), "batches": (16,), "timesteps": (8,)}
FULL = {"networks": tuple(NETWORKS), "batches": (1, 16, 64), "timesteps": (1, 3, 8, 15, 32)}
OURS = ("native", "counts")
PEER = ("spikingjelly step", "spikingjelly multi")
REPETITIONS = 5
REST = 0.05  # seconds
# A case is not repeated so often that it takes longer than this. One that takes longer by itself is
# measured once, without a run to warm up.
SECONDS = 60.0
# All steps at once need memory for all of them: 33 GiB for 64 images of 224 pixels and 32 steps.
MOST_PIXELS = 2**26
MEMORY_BATCH, MEMORY_STEPS = 16, (8, 32)
MEMORY_OF = ("native", "counts", "endpoint native", "ann", "spikingjelly multi")

Run = Callable[[], Any]


class Case:
    """One network at one batch size and T, and every way to run it."""

    def __init__(self, name: str, batch: int, timesteps: int, device: str) -> None:
        """Build the float network and convert it without training."""
        architecture, size = NETWORKS[name]
        torch.manual_seed(0)
        self.batch, self.timesteps, self.device = batch, timesteps, device
        preprocessing = Preprocessing((3, size, size), (0.5,) * 3, (0.25,) * 3)
        self.model = timm.create_model(architecture).eval()
        self.network = convert(
            self.model, preprocessing, calibration="bn", timesteps=timesteps
        ).network
        self.model.to(device)
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        self.pixels = pixels.to(device)
        self.images = preprocessing.normalize(self.pixels)

    def ann(self) -> Run:
        """Return a forward pass of the float network, in the faster layout."""
        from torch.fx.experimental.optimization import fuse

        traced = trace(copy.deepcopy(self.model).cpu(), tuple(self.images.shape[1:]))
        folded = fuse(traced.module).to(self.device)
        ways = []
        for layout in (torch.contiguous_format, torch.channels_last):
            module = copy.deepcopy(folded).to(memory_format=layout)
            ways.append(_call(module, self.images.contiguous(memory_format=layout)))
        return min(ways, key=lambda run: min(self.seconds(run)[0] for _ in range(3)))

    def compiled(self) -> Run:
        """Return a forward pass of the float network as torch.compile makes it."""
        module = torch.compile(copy.deepcopy(self.model))
        return _call(module, self.images)

    def trajectory(self, engine: str) -> Run:
        """Return a simulation of T steps."""
        ready = prepare(self.network, self.timesteps, engine, self.device)
        schedule = self.network.timetable(name="paper")
        return lambda: ready.simulate(self.pixels, schedule)

    def endpoint(self, engine: str) -> Run:
        """Return the computation of the exact end alone."""
        ready = prepare(self.network, self.timesteps, engine, self.device)
        return lambda: ready.endpoint(self.pixels)

    def spikingjelly(self, mode: str) -> Run:
        """Return a simulation of T steps by SpikingJelly, in step mode `s` or `m`."""
        from spikingjelly.activation_based import ann2snn, functional

        data = [(self.images, torch.zeros(self.batch, dtype=torch.long, device=self.device))]
        recipe = ann2snn.RateCodingRecipe(dataloader=data, mode="99.9%")
        converter = ann2snn.Converter(recipe=recipe, device=self.device)
        plain = _for_spikingjelly(self.model, self.images).to(self.device)
        network = converter.convert(plain).eval()
        functional.set_step_mode(network, mode)

        def run() -> Tensor:
            functional.reset_net(network)
            with torch.inference_mode():
                if mode == "m":
                    return network(self.images.expand(self.timesteps, *self.images.shape)).cumsum(0)
                return torch.stack([network(self.images) for _ in range(self.timesteps)]).cumsum(0)

        return run

    def ways(self, compiled: bool) -> dict[str, Run]:
        """Return all ways to run it by name, without those that are not installed."""
        found = {"ann": self.ann()}
        if compiled:
            found["ann compiled"] = self.compiled()
        found |= {engine: self.trajectory(engine) for engine in _ours(self.device)}
        found |= {f"endpoint {engine}": self.endpoint(engine) for engine in _ours(self.device)}
        try:
            found |= {name: self.spikingjelly(name.split()[1][0]) for name in self.peers()}
        except ImportError:
            print("SpikingJelly is not installed", file=sys.stderr)
        return found

    def peers(self) -> list[str]:
        """Return the modes of SpikingJelly there is memory for."""
        pixels = self.batch * self.timesteps * self.images.shape[2] * self.images.shape[3]
        return [name for name in PEER if pixels <= MOST_PIXELS or not name.endswith("multi")]

    def seconds(self, run: Run) -> tuple[float, float]:
        """Return the processor's and the clock's seconds of a run, after a rest.

        Threads that have worked for the run before wait for more by spinning for a while.
        """
        time.sleep(REST)
        self._synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        self._synchronize()
        return time.process_time() - cpu, time.perf_counter() - wall

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _ours(device: str) -> list[str]:
    natively = device == "cpu" and native.unavailable() is None
    return [e for e in OURS if e == "counts" or natively]


def _for_spikingjelly(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy its converter understands, of the same cost.

    ReLU and poolings become modules, ReLU6 becomes ReLU, and shortcuts that skip pixels and pad
    channels become 1x1 convolutions (1 % of ResNet-20's multiplications).
    """
    traced = trace(copy.deepcopy(model).cpu(), tuple(images.shape[1:]))
    module = traced.module
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            if isinstance(module.get_submodule(node.target), nn.ReLU6):
                module.add_submodule(node.target, nn.ReLU())
            continue
        if node.target in (torch.relu, nn.functional.relu, "relu"):
            replaced: nn.Module = nn.ReLU()
        elif node.target is nn.functional.adaptive_avg_pool2d:
            replaced = nn.AdaptiveAvgPool2d(node.args[1])
        elif node.target is nn.functional.pad:
            source = node.args[0].args[0]
            outputs, added = traced.shapes[node.name][0], sum(node.args[1])
            replaced = nn.Conv2d(outputs - added, outputs, 1, stride=2, bias=False)
            node.args = (source, *node.args[1:])
        else:
            continue
        module.add_submodule(f"{node.name}_module", replaced)
        with module.graph.inserting_after(node):
            call = module.graph.call_module(f"{node.name}_module", (node.args[0],))
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _call(module: nn.Module | Callable[..., Any], images: Tensor) -> Run:
    def run() -> Any:
        with torch.inference_mode():
            return module(images)

    return run


def measure(
    name: str, batch: int, timesteps: int, device: str, compiled: bool
) -> list[dict[str, Any]]:
    """Run one case in every way, taking turns; return a row for each."""
    case = Case(name, batch, timesteps, device)
    ways = case.ways(compiled)
    taken = {way: [case.seconds(run)] for way, run in ways.items()}
    repetitions = min(REPETITIONS, int(SECONDS / sum(wall for ((_, wall),) in taken.values())))
    for turn in range(repetitions):
        for way, run in ways.items():
            taken[way] = (taken[way] if turn else []) + [case.seconds(run)]
    cpu, wall = (
        {way: statistics.median(t[k] for t in times) for way, times in taken.items()}
        for k in (0, 1)
    )
    # A processor that waits for a GPU tells nothing.
    counted = cpu if device == "cpu" else wall
    peer = min((counted[way] for way in PEER if way in counted), default=None)
    return [
        {
            "network": name,
            "batch": batch,
            "timesteps": timesteps,
            "engine": way,
            "ratio_to_ann_cpu": cpu[way] / cpu["ann"] if device == "cpu" else None,
            "ratio_to_ann_wall": wall[way] / wall["ann"],
            f"ratio_to_spikingjelly_{'cpu' if device == 'cpu' else 'wall'}": (
                None if peer is None else counted[way] / peer
            ),
            "cpu_ms_per_image": 1000 * cpu[way] / batch,
            "wall_ms_per_image": 1000 * wall[way] / batch,
            "extra_memory_mib": None,
        }
        for way in ways
    ]


def extra_memory(name: str, batch: int, timesteps: int, way: str, device: str) -> float:
    """Return the peak memory of one run above what is held before it, in MiB."""
    case = Case(name, batch, timesteps, device)
    kind, _, engine = way.partition(" ")
    if kind == "ann":
        run = case.ann()
    elif kind == "endpoint":
        run = case.endpoint(engine)
    else:
        run = case.spikingjelly(engine[0]) if engine else case.trajectory(way)
    if device == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
    ctypes.CDLL(None).malloc_trim(0)  # else the run takes what building the network has freed
    Path("/proc/self/clear_refs").write_text("5")
    before = _mib("VmRSS")
    run()
    return round(_mib("VmHWM") - before, 1)


def _mib(key: str) -> float:
    """Read one of this process's memory figures."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


@cache
def _extra_memory_apart(*case: Any) -> float | None:
    """Measure it in a process of its own; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-W", "ignore", __file__, "--memory", *map(str, case)]
    return float(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def report(plan: dict[str, Any], device: str, compiled: bool) -> Iterator[dict[str, Any]]:
    """Measure everything in a plan, and the memory of `MEMORY_BATCH` images.

    Yields the report after every case, as it grows.
    """
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "schema": "snnconv.benchmark.engines/1",
        "version": __version__,
        "torch": torch.__version__,
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "instructions": None if native.unavailable() else kernels.levels()[-1],
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", "benchmarks/engines.py", *sys.argv[1:]]),
        "rows": rows,
        "growth_of_memory": [],
    }
    for name in plan["networks"]:
        for batch in plan["batches"]:
            for timesteps in plan["timesteps"]:
                measured = measure(name, batch, timesteps, device, compiled)
                if batch == MEMORY_BATCH:
                    for row in measured:
                        case = name, batch, timesteps, row["engine"], device
                        if timesteps in MEMORY_STEPS and row["engine"] in plan["memory"]:
                            row["extra_memory_mib"] = _extra_memory_apart(*case)
                rows += measured
                for row in measured:
                    print(_line(row), file=sys.stderr, flush=True)
                yield found
        found["growth_of_memory"] += [
            {"network": name, "engine": engine, "ratio": _growth(name, engine, device)}
            for engine in _ours(device)
            if engine in plan["memory"]
        ]
        yield found


def _growth(name: str, engine: str, device: str) -> float | None:
    """Return the extra memory of the most steps over that of the fewest."""
    few, many = (
        _extra_memory_apart(name, MEMORY_BATCH, steps, engine, device) for steps in MEMORY_STEPS
    )
    return many / few if few and many else None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line[13:] for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _line(row: dict[str, Any]) -> str:
    peer = row.get("ratio_to_spikingjelly_cpu", row.get("ratio_to_spikingjelly_wall"))
    against = "" if peer is None else f", {peer:.3f} of SpikingJelly"
    clock = row["ratio_to_ann_wall"]
    times = f"{clock:6.2f} ANN by the clock"
    if row["ratio_to_ann_cpu"] is not None:
        times = f"{row['ratio_to_ann_cpu']:6.2f} ANN ({clock:.2f} by the clock)"
    memory = "" if row["extra_memory_mib"] is None else f", {row['extra_memory_mib']:.0f} MiB"
    return (
        f"{row['network']:18} N={row['batch']:<3} T={row['timesteps']:<3} {row['engine']:20} "
        f"{times}{against}{memory}"
    )


def plot(rows: list[dict[str, Any]], path: Path, clock: str) -> None:
    """Draw the cost against T, and per image against the batch, by a clock: `cpu` or `wall`.

    Above, a cost proportional to T runs along the dotted lines; below, one proportional to the
    batch runs level.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = pyplot.subplots(2, len(names), figsize=(3.4 * len(names), 7), squeeze=False)
    for name, (above, below) in zip(names, axes.T, strict=True):
        for axis, x, held, value in (
            (above, "timesteps", ("batch", 16), f"ratio_to_ann_{clock}"),
            (below, "batch", ("timesteps", 8), f"{clock}_ms_per_image"),
        ):
            here = [r for r in rows if r["network"] == name and r[held[0]] == held[1]]
            for engine in dict.fromkeys(r["engine"] for r in here):
                points = sorted((r[x], r[value]) for r in here if r["engine"] == engine)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=engine)
            ticks = sorted({r[x] for r in here})
            axis.set(xlabel=f"{x} ({held[0]} {held[1]})", xscale="log", yscale="log", title=name)
            axis.set_xticks(ticks, map(str, ticks), minor=False)
            axis.minorticks_off()
        for engine in ("native", "spikingjelly step"):
            through = [
                r[f"ratio_to_ann_{clock}"]
                for r in rows
                if (r["network"], r["engine"], r["batch"], r["timesteps"]) == (name, engine, 16, 8)
            ]
            if through:
                steps = [1, 32]
                line = [through[0] * t / 8 for t in steps]
                above.plot(steps, line, color="gray", linestyle=":", linewidth=1)
        above.set(ylabel=f"{clock} time, ANN forwards")
        below.set(ylabel=f"{clock} time per image, ms")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncols=len(labels), fontsize="small")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, T = 8, 16 images")
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only these")
    parser.add_argument("--batch", type=int, action="append", help="only these numbers of images")
    parser.add_argument("--timesteps", type=int, action="append", help="only these T")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--compiled", action="store_true", help="torch.compile's ANN beside")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--stored", type=Path, action="append", help="measure nothing, plot these reports"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    register()
    if arguments.memory:
        name, batch, timesteps, way, device = arguments.memory
        print(extra_memory(name, int(batch), int(timesteps), way, device))
        return
    plan = dict(QUICK if arguments.quick else FULL)
    for key, chosen in (
        ("networks", arguments.network),
        ("batches", arguments.batch),
        ("timesteps", arguments.timesteps),
    ):
        plan[key] = chosen or plan[key]
    plan["memory"] = () if arguments.no_memory else MEMORY_OF
    rows: list[dict[str, Any]] = []
    for path in arguments.stored or ():
        rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
    if not arguments.stored:
        for found in report(plan, arguments.device, arguments.compiled):
            rows = found["rows"]
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot, "cpu" if arguments.device == "cpu" else "wall")


if __name__ == "__main__":
    main()
