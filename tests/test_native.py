"""The native engine: every instruction set gives the reference's bits, whatever the shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, converted, images
from test_engine import SCHEDULES, differences
from torch import Tensor, nn

from snnconv.engine import counts, endpoint, kernels, native, prepare, selfcheck, simulate
from snnconv.engine.reference import Engine as Reference
from snnconv.errors import UsageError
from snnconv.network import Population, SpikingNetwork
from snnconv.normalize import with_settings
from snnconv.pipeline import convert
from snnconv.preprocess import Preprocessing

# A library that somebody names must work.
MISSING = native.unavailable() is not None and kernels.VARIABLE not in os.environ
pytestmark = pytest.mark.skipif(MISSING, reason=str(native.unavailable()))
LEVELS = kernels.levels() if native.unavailable() is None else []


class Wide(nn.Module):
    """Channels beyond and between the kernels' blocks, groups that straddle them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 33, 3, padding=1)
        self.dense = nn.Conv2d(33, 64, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 5, padding=2, groups=64)
        self.grouped = nn.Conv2d(64, 130, 1, groups=2)
        self.skip = nn.Conv2d(33, 130, 1, stride=2)
        self.thin = nn.Conv2d(130, 40, (1, 3), padding=(0, 2), dilation=(1, 2), groups=10)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.head = nn.Conv2d(40, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.depthwise(self.dense(x).relu()).relu()
        x = (self.grouped(y) + self.skip(x)).relu()
        x = self.pool(self.thin(x).relu())
        return self.head(x).mean((2, 3))


SIZE = (3, 19, 29)


def wide(timesteps: int, bits: int = 8) -> SpikingNetwork:
    torch.manual_seed(3)
    preprocessing = Preprocessing(SIZE, (0.5, 0.4, 0.6), (0.25, 0.3, 0.2))
    pixels = [pictures(2, 7)]
    return convert(
        Wide().eval(), preprocessing, pixels, timesteps=timesteps, weight_bits=bits
    ).network


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *SIZE), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_instruction_set_agrees_with_the_reference(name: str, level: int) -> None:
    for seed, timesteps, neuron, start in (
        (0, 5, "signed", "half"),
        (1, 3, "unsigned", "zero"),
        (2, 1, "signed", "half"),
        (3, 11, "signed", "half"),
    ):
        net = converted(name, seed, timesteps).network
        net = with_settings(net, neuron=neuron, initial_membrane=start)
        engine = native.Engine(net, timesteps, level)
        for schedule in SCHEDULES:
            timetable = net.timetable(timesteps, **schedule)
            found = engine.simulate(images(3, seed), timetable, events=True)
            slow = Reference(net, timesteps).simulate(images(3, seed), timetable, events=True)
            assert not differences(found, slow)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("timesteps", [1, 8, 31, 127, 128, 129, 255, 256, 300])
def test_wide_layers_at_any_time_step(timesteps: int, level: int) -> None:
    net = wide(timesteps)
    engine, truth = native.Engine(net, timesteps, level), counts.Engine(net, timesteps)
    assert sum(p.fused for p in engine.packed.values()) >= 1
    pixels = pictures(2)
    timetable = net.timetable(timesteps, name="paper")
    assert not differences(engine.simulate(pixels, timetable), truth.simulate(pixels, timetable))
    found, expected = (e.endpoint(pixels, maps=True) for e in (engine, truth))
    for name, end in expected.counts.items():
        assert torch.equal(found.counts[name], end), name
    assert torch.equal(found.charges["logits"], expected.charges["logits"])


class Odd(nn.Module):
    """Shortcuts that begin elsewhere, slices of slices, padding of nothing, flattened maps."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.one, self.two = nn.Conv2d(20, 20, 3), nn.Conv2d(20, 40, 3, stride=2)
        self.three, self.head = nn.Conv2d(40, 40, 1), nn.Conv2d(40, classes, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.one(x) + x[:, :, 1:-1][:, :, :, 2:]).relu()
        skip = F.pad(x[:, :, 1:-1, 1:-1][:, 3:][:, :, ::2][..., ::2], (0, 0, 0, 0, 5, 18))
        x = (self.two(x) + skip).relu()
        y = F.pad(x[:, 7:30], (0, 0, 0, 0, 0, 17))
        x = (self.three(x) + F.pad(y, (0, 0, 0, 0))).relu()
        return self.head(x).flatten(1)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("classes", [1, 3])
def test_shortcuts_of_every_kind_and_flattened_maps(classes: int, level: int) -> None:
    torch.manual_seed(classes)
    preprocessing = Preprocessing((3, 9, 9), (0.5, 0.4, 0.6), (0.25, 0.3, 0.2))
    pixels = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    net = convert(Odd(classes).eval(), preprocessing, [pixels], timesteps=7).network
    engine, truth = native.Engine(net, 7, level), Reference(net, 7)
    read = [s.attributes for p in engine.packed.values() for s in p.synapses if s.kind == "scale"]
    assert [a["start"] for a in read] == [(1, 2), (1, 1), (0, 0)]
    assert [a["channel"] for a in read] == [0, -2, 7]
    timetable = net.timetable(7)
    assert not differences(engine.simulate(pixels, timetable), truth.simulate(pixels, timetable))
    end, expected = engine.endpoint(pixels, maps=True), truth.endpoint(pixels, maps=True)
    for name, counted in expected.counts.items():
        assert torch.equal(end.counts[name].long(), counted.long()), name
    assert torch.equal(end.charges["logits"], expected.charges["logits"])


def test_weights_of_the_widest_layers_run_in_the_kernels() -> None:
    engine = native.Engine(wide(8), 8)
    assert all(engine.packed[p.name].fused for p in engine.network.populations)


def test_a_usual_network_is_one_call_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    net = converted("residual", timesteps=8).network
    engine = native.Engine(net, 8)
    done: list[int] = []
    run = kernels.Program.run

    def counted(program: kernels.Program, first: int, end: int, *rest: Any) -> None:
        done.append(end - first)
        run(program, first, end, *rest)

    monkeypatch.setattr(kernels.Program, "run", counted)
    engine.simulate(images(4), net.timetable(8, name="paper"))
    images_apart = int(any(packed.images for packed in engine.packed.values()))
    assert len(done) == 1 + images_apart
    assert sum(done) == len(net.populations) + len(net.readouts) + images_apart
    assert engine.hidden
    done.clear()
    engine.endpoint(images(4))
    assert len(done) == 1


def test_batch_and_threads_change_nothing() -> None:
    net, pixels = wide(4, bits=4), pictures(5)
    timetable = net.timetable(4)
    whole = simulate(net, pixels, timetable, "native")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            assert not differences(whole, simulate(net, pixels, timetable, "native"))
            alone = simulate(net, pixels[2:3], timetable, "native")
            assert torch.equal(alone.charges["logits"][-1, 0], whole.charges["logits"][-1, 2])
    finally:
        torch.set_num_threads(threads)


def test_a_planted_mistake_is_noticed() -> None:
    net = selfcheck.sample()
    engine = native.Engine(net, selfcheck.TIMESTEPS)
    assert selfcheck.wrong(engine) is None
    for name in ("grouped", "joined", "strided", "narrow"):
        for what in ("threshold", "start"):
            engine = native.Engine(net, selfcheck.TIMESTEPS)
            getattr(engine.packed[name].cell, what).add_(900)
            assert selfcheck.wrong(engine) == name
    engine = native.Engine(net, selfcheck.TIMESTEPS)
    engine.packed["logits"].cell.bias.add_(1)
    assert selfcheck.wrong(engine) == "the readout"
    engine = native.Engine(net, selfcheck.TIMESTEPS)
    if engine.packed["stem"].images:
        engine.packed["stem"].image_cell.bias.add_(900)
        assert selfcheck.wrong(engine) == "stem"


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_counts_beyond_a_byte_move_with_their_windows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows so small that they move at every block.
    monkeypatch.setattr(native.kernels, "largest_count", lambda level: 17)
    for seed, neuron in ((0, "signed"), (1, "unsigned")):
        net = with_settings(converted(name, seed, 30).network, neuron=neuron)
        engine = native.Engine(net, 30)
        assert engine.windowed
        for schedule in SCHEDULES:
            timetable = net.timetable(30, **schedule)
            found = engine.simulate(images(3, seed), timetable, events=True)
            slow = Reference(net, 30).simulate(images(3, seed), timetable, events=True)
            assert not differences(found, slow)
        end, expected = (e.endpoint(images(3, seed)) for e in (engine, Reference(net, 30)))
        for node, counted in expected.counts.items():
            assert torch.equal(end.counts[node].long(), counted.long()), node


def test_two_sided_counts_beyond_a_byte() -> None:
    net = selfcheck.sample()
    pixels = torch.randint(0, 256, (3, *net.preprocessing.input_size), dtype=torch.uint8)
    for timesteps in (128, 270):
        engine = native.Engine(net, timesteps)
        assert engine.windowed
        timetable = net.timetable(timesteps)
        found = engine.simulate(pixels, timetable)
        assert max(int(c.abs().max()) for c in found.counts.values()) == timesteps
        assert not differences(found, Reference(net, timesteps).simulate(pixels, timetable))


def test_a_window_that_stays_too_long_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = converted("residual", timesteps=300).network
    engine = native.Engine(net, 300)
    timetable = net.timetable(300, name="paper")
    truth = counts.Engine(net, 300).simulate(images(3), timetable)
    assert not differences(engine.simulate(images(3), timetable), truth)
    engine.window_steps = 300
    assert differences(engine.simulate(images(3), timetable), truth)


def test_what_the_engine_cannot_do_is_refused() -> None:
    net = selfcheck.sample()
    assert native.refusal(net, 8, "cpu") is None
    assert "CPUs only" in str(native.refusal(net, 8, "cuda"))
    assert prepare(net, 300).name == "native"
    wide = replace(
        net,
        nodes=tuple(
            replace(n, bias=torch.full_like(n.bias, 2**20)) if isinstance(n, Population) else n
            for n in net.nodes
        ),
    )
    assert "do not fit into the native engine's 32 bits" in str(native.refusal(wide, 4095, "cpu"))
    with pytest.raises(UsageError, match="32 bits; take --engine counts"):
        prepare(wide, 4095, "native")
    pixels = torch.zeros(1, *net.preprocessing.input_size, dtype=torch.uint8)
    assert prepare(wide, 4095).name == "counts"
    assert endpoint(wide, pixels, 4095).timesteps == 4095


@pytest.mark.parametrize(
    ("contents", "message"),
    [(None, "cannot be loaded"), (b"not a library", "cannot be loaded")],
)
def test_without_the_library_everything_still_works(
    contents: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernels.so"
    if contents is not None:
        file.write_bytes(contents)
    monkeypatch.setenv(kernels.VARIABLE, str(file))
    kernels.library.cache_clear()
    native.unavailable.cache_clear()
    try:
        assert message in str(native.unavailable())
        assert prepare(converted("residual").network, 5).name == "counts"
    finally:
        kernels.library.cache_clear()
        native.unavailable.cache_clear()


def test_the_kernels_do_not_need_torch_to_be_built() -> None:
    symbols = Path(str(kernels.library()._name)).read_bytes()
    assert b"c10" not in symbols
    assert b"_ZN2at" not in symbols


def test_importing_snnconv_does_not_load_the_kernels() -> None:
    code = (
        "import snnconv.engine, snnconv.engine.kernels as k;"
        "assert k.library.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_network_without_neurons_runs() -> None:
    preprocessing = Preprocessing((3, 4, 4), (0.5,) * 3, (0.25,) * 3)
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    net = convert(model, preprocessing, [pixels], timesteps=3).network
    assert native.refusal(net, 3, "cpu") == "the network has no neurons"
    assert simulate(net, pixels, net.timetable()).steps == 3


def test_an_engine_first_used_in_inference_mode_goes_on_outside() -> None:
    net = selfcheck.sample()
    engine = native.Engine(net, selfcheck.TIMESTEPS)
    with torch.inference_mode():
        assert selfcheck.wrong(engine) is None
    assert selfcheck.wrong(engine) is None


def test_events_first_counted_in_inference_mode_are_counted_outside() -> None:
    net = selfcheck.sample()
    engine = native.Engine(net, selfcheck.TIMESTEPS)
    pixels, timetable = torch.zeros(2, *net.preprocessing.input_size).byte(), net.timetable()
    with torch.inference_mode():
        inside = engine.simulate(pixels, timetable, events=True).events
    outside = engine.simulate(pixels, timetable, events=True).events
    assert inside is not None and outside is not None
    assert all(torch.equal(inside[name], outside[name]) for name in inside)


def test_one_engine_may_be_used_by_several_threads() -> None:
    engine = native.Engine(selfcheck.sample(), selfcheck.TIMESTEPS)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: selfcheck.wrong(engine), range(12))) == {None}


def test_a_forked_process_has_its_own_threads() -> None:
    program = """
import os, torch
from snnconv.engine import native, selfcheck
torch.set_num_threads(3)
network = selfcheck.sample()
engine = native.Engine(network, selfcheck.TIMESTEPS)
pixels = torch.full((5, *network.preprocessing.input_size), 7, dtype=torch.uint8)
def charges():
    trace = engine.simulate(pixels, network.timetable(selfcheck.TIMESTEPS))
    return torch.cat([c.flatten() for c in trace.charges.values()]).tolist()
expected = charges()
child = os.fork()
if not child:
    os._exit(charges() != expected)  # torch cannot end there in order
assert os.waitpid(child, 0)[1] == 0
assert charges() == expected
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=300)


def test_settings_of_precision_are_left_as_they_were() -> None:
    net = selfcheck.sample()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("medium", "high"):
            torch.set_float32_matmul_precision(precision)
            assert selfcheck.wrong(counts.Engine(net, selfcheck.TIMESTEPS)) is None
            assert selfcheck.wrong(native.Engine(net, selfcheck.TIMESTEPS)) is None
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_self_check_goes_through_every_width_of_block() -> None:
    engine = native.Engine(selfcheck.sample(), selfcheck.TIMESTEPS)
    widest = kernels.block(engine.level, 64)
    blocks = {packed.cell.block for packed in engine.packed.values() if packed.synapses}
    assert {16, widest} <= blocks
    assert len(blocks) == len({16, min(32, widest), widest})
