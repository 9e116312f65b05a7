"""Layer-wise reconstruction without training: what quantised inputs do to a layer, made up for.

Front to back, every layer gets the inputs the integer network has, computes with its own integers,
and shall give what the float network gives. Three closed forms are tried in turn: the weights and
biases with the least squared error of the current (a ridge keeps them near the pretrained ones), a
gain and a shift per channel over the positions where the activation answers, and the clips with the
least squared error of the activation. A quarter of the images teach nothing: on them each trial
must lessen the layer's error, and all together the divergence from the float network's outputs, or
they are taken back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from snnconv.calibrate import SMALLEST_SHARE
from snnconv.divergence import divergence
from snnconv.errors import DataError
from snnconv.network import count_values
from snnconv.normalize import image_carriers, rounded_layer
from snnconv.ops import convolve, per_channel
from snnconv.plan import Key, Relay, Source
from snnconv.preprocess import Preprocessing
from snnconv.progress import Progress, silent
from snnconv.quant import (
    Branch,
    Layer,
    Qann,
    activate,
    last_uses,
    only_logits,
    quantize,
    relay,
)

# Every fourth image judges.
HELD_OUT_EVERY = 4
FEWEST_IMAGES = 8
# Activations kept at once, float and quantised, of all images: 4 GiB. Fewer images where needed.
NUMBERS_KEPT = 2**30
NUMBERS_AT_ONCE = 2**24
# Positions of a layer that teach, as far as so many images have more: the first layers' are costly.
POSITIONS = 2**19
FEWEST_TAUGHT = 48
# Ridges, as shares of the inputs' mean square; the layer's held-out error chooses.
RIDGES = (0.03, 0.3)
# Multiplications a layer's least squares may cost; beyond, only some positions count.
PRODUCTS = 2**36
LARGEST_SYSTEM = 4609
LARGEST_GAIN = 1.4
FEWEST_POSITIONS = 100
# Clips tried, as shares of the present ones, on so many numbers of a layer at most.
CLIP_SHARES = (0.5, 0.6, 0.7, 0.78, 0.84, 0.9, 0.95, 1, 1.06, 1.13, 1.22, 1.35, 1.5)
NUMBERS_SCANNED = 2**25
# Least clips of a layer, as shares of its largest: few images may show a rare channel too weak.
FLOORS = (SMALLEST_SHARE, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Change:
    """What was added to a layer's weights, by the key of their branch, and to its bias, float64."""

    weights: dict[Key, Tensor]
    bias: Tensor


@dataclass(frozen=True)
class LayerResult:
    """What was kept of a layer (`weights`, `gain`, `clip`), and its error on held-out images.

    Errors are squared distances from the float activations over the square of those.
    """

    layer: str
    kept: tuple[str, ...]
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Reconstruction:
    """What has been done to a QANN: the changes by layer name, and how they were judged.

    `kl_before` and `kl_after` are the mean divergences of class probabilities from the float
    network's on the held-out images, None unless it is a classifier; `kept` is False if all was
    taken back.
    """

    changes: dict[str, Change]
    images: int
    held_out_images: int
    kl_before: float | None
    kl_after: float | None
    kept: bool
    layers: tuple[LayerResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the changes."""
        return {
            "images": self.images,
            "held_out_images": self.held_out_images,
            "kl_before": self.kl_before,
            "kl_after": self.kl_after,
            "kept": self.kept,
            "layers": [{**asdict(r), "kept": list(r.kept)} for r in self.layers],
        }


class Reservoir:
    """Up to `most` of the images that pass, each with the same chance, always the same ones."""

    def __init__(self, most: int) -> None:
        """Start empty."""
        self.most, self.seen = most, 0
        self.chosen: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def add(self, batch: Tensor) -> Tensor:
        """Take some of the images `[N, C, H, W]`; return the batch as it is."""
        for image in batch:
            self.seen += 1
            if len(self.chosen) < self.most:
                self.chosen.append(image.clone())
                continue
            place = int(torch.randint(self.seen, (1,), generator=self.generator))
            if place < self.most:
                self.chosen[place] = image.clone()
        return batch

    def images(self) -> Tensor:
        """Return what was kept in random order. Raises DataError if nothing passed."""
        if not self.chosen:
            raise DataError("calibration: no images; give at least one")
        order = torch.randperm(len(self.chosen), generator=self.generator).tolist()
        return torch.stack([self.chosen[i] for i in order])


def most_images(qann: Qann) -> int:
    """Return how many images' activations may be kept while a QANN is reconstructed."""
    sizes = {node.name: math.prod(node.shape) for node in qann.nodes}
    uses = last_uses(qann.nodes)
    alive = largest = 0
    for position, node in enumerate(qann.nodes):
        alive += sizes[node.name]
        largest = max(largest, alive)
        alive -= sum(sizes[name] for name in uses.get(position, ()))
    return max(FEWEST_IMAGES, NUMBERS_KEPT // (2 * largest))


def reconstruct_(
    qann: Qann,
    preprocessing: Preprocessing,
    pixels: Tensor,
    timesteps: int,
    *,
    weight_bits: int = 8,
    offset: float = 0.5,
    progress: Progress = silent,
) -> Reconstruction:
    """Change weights, biases and clips of a calibrated QANN in place, layer after layer.

    `pixels` are uint8 `[N, C, H, W]`, in random order, at most `most_images`; the first quarter of
    them judges. `offset` is V0 over the threshold. Readouts and islands stay. Errors are those of
    the weights and biases as they are stored, of `weight_bits`.
    """
    images = preprocessing.normalize(pixels), preprocessing.center(pixels)
    numerics = _Numerics(qann, preprocessing, timesteps, weight_bits, offset)
    held = len(pixels) // HELD_OUT_EVERY
    if len(pixels) < FEWEST_IMAGES:
        raise DataError(f"calibration: reconstruction needs {FEWEST_IMAGES} images or more")
    readout = only_logits(qann.readouts())
    layers = qann.weighted()
    before = {layer.name: _state(layer) for layer in layers}
    results: list[LayerResult] = []
    with torch.no_grad():
        first = None
        if readout is not None:
            first = numerics.outputs(images[1][:held])[readout.name]
        logits = _walk(numerics, images, held, results, progress)
        kl_before = kl_after = None
        kept = True
        if readout is not None and first is not None:
            wanted, found = (x[:held].double().flatten(1) for x in logits[readout.name])
            kl_before = divergence(first.flatten(1), wanted) / held
            kl_after = divergence(found, wanted) / held
            kept = kl_after < kl_before
        if not kept:
            for layer in layers:
                _restore_(layer, before[layer.name])
    changes = {}
    for layer in layers:
        weights, bias, _ = before[layer.name]
        added = [
            new.detach().double() - old.double()
            for new, old in zip(layer.weights, weights, strict=True)
        ]
        by_key = {b.key: a for b, a in zip(layer.branches, added, strict=True)}
        changes[layer.name] = Change(by_key, layer.bias.detach().double() - bias.double())
    return Reconstruction(
        changes, len(pixels) - held, held, kl_before, kl_after, kept, tuple(results)
    )


def _images_at_once(qann: Qann) -> int:
    return max(1, NUMBERS_AT_ONCE // max(math.prod(node.shape) for node in qann.nodes))


@dataclass(frozen=True)
class _Numerics:
    """How a QANN is computed as the integers it will be stored as."""

    qann: Qann
    preprocessing: Preprocessing
    timesteps: int
    weight_bits: int
    offset: float

    def stored(self, layer: Layer) -> tuple[list[Tensor], Tensor]:
        """Return the weights and the bias of a layer as they are stored, for its present clips."""
        values = count_values(self.qann.nodes, self.preprocessing)
        found = rounded_layer(self.qann, layer, values, self.timesteps, self.weight_bits)
        return [w.float() for w in found.weights], found.bias.float()

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return every readout for images of `Preprocessing.center`."""
        copied = copy.deepcopy(self.qann)
        for own, layer in zip(copied.weighted(), self.qann.weighted(), strict=True):
            own.assign_(*self.stored(layer))
        parts = images.split(_images_at_once(copied))
        found = [copied(part, self.timesteps, offset=self.offset) for part in parts]
        return {name: torch.cat([f[name] for f in found]) for name in found[0]}


def _walk(
    numerics: _Numerics,
    images: tuple[Tensor, Tensor],
    held: int,
    results: list[LayerResult],
    progress: Progress,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Reconstruct every population on the way; return per readout its float and quantised value.

    `images` are normalised, and centred for the integers.
    """
    qann = numerics.qann
    values: dict[str, tuple[Tensor, Tensor]] = {}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    uses = last_uses(qann.nodes)
    size = _images_at_once(qann)
    populations = len(list(qann.populations()))
    for position, node in enumerate(qann.nodes):
        if isinstance(node, Source):
            values[node.name] = images
        elif isinstance(node, Layer) and not node.readout:
            inputs = [values[b.source] for b in node.branches]
            site = _Site(node, inputs, held, size, numerics)
            results.append(_reconstruct_layer_(site))
            values[node.name] = site.wanted, site.fired()
            progress("reconstruct", len(results), populations, node.path)
        elif isinstance(node, Layer):
            exact = [values[b.source][0] for b in node.branches]
            quantised = [values[b.source][1] for b in node.branches]
            wanted = _in_parts(node, exact, size)
            state = _state(node)
            node.assign_(*numerics.stored(node))
            outputs[node.name] = wanted, _in_parts(node, quantised, size)
            _restore_(node, state)
        else:

            def run(parts: list[Tensor], node: Any = node) -> Tensor:
                if isinstance(node, Relay):
                    return relay(node, parts, averaged=True)
                result: Tensor = node(parts)
                return result

            ways = zip(*(values[i] for i in node.inputs), strict=True)
            exact_value, value = (_in_parts(run, list(way), size) for way in ways)
            values[node.name] = exact_value, value
        for name in uses.get(position, ()):
            values.pop(name, None)
    return outputs


def _in_parts(run: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], size: int) -> Tensor:
    """Run a function on some images after the other."""
    split = (x.split(size) for x in inputs)
    return torch.cat([run(list(part)) for part in zip(*split, strict=True)])


State = tuple[list[Tensor], Tensor, Tensor]


def _state(layer: Layer) -> State:
    weights = [w.detach().clone() for w in layer.weights]
    return weights, layer.bias.detach().clone(), layer.clip.clone()


def _restore_(layer: Layer, state: State) -> None:
    weights, bias, clip = state
    layer.assign_(weights, bias)
    layer.clip.copy_(clip)


class _Site:
    """A layer with its inputs, float and quantised, and the activations it shall have."""

    def __init__(
        self,
        layer: Layer,
        inputs: list[tuple[Tensor, Tensor]],
        held: int,
        size: int,
        numerics: _Numerics,
    ) -> None:
        self.layer, self.held, self.size, self.numerics = layer, held, size, numerics
        self.exact, self.quantised = (list(way) for way in zip(*inputs, strict=True))
        self.pretrained = _state(layer)
        self.stored = numerics.stored(layer)
        # Nodes with images: their integers have a constant part, and lack nothing.
        self.carriers = image_carriers(numerics.qann)
        self.wanted = _in_parts(lambda x: activate(layer, layer(x), None), self.exact, size)
        self.numbers = self.wanted[0].numel()
        enough = max(FEWEST_TAUGHT, math.ceil(POSITIONS * len(layer.bias) / self.numbers))
        self.taught = min(enough, len(self.wanted) - held)

    def parts(self, judged: bool) -> Iterator[slice]:
        """Yield the images that judge, or those that teach, some at a time."""
        first, last = (0, self.held) if judged else (self.held, self.held + self.taught)
        for start in range(first, last, self.size):
            yield slice(start, min(start + self.size, last))

    def take_(self, state: State) -> None:
        """Put weights, bias and clips into the layer."""
        _restore_(self.layer, state)
        self.stored = self.numerics.stored(self.layer)

    def current(self, part: slice) -> Tensor:
        """Return the layer's current from quantised inputs, with weights as stored."""
        return self._with(self.stored, [x[part] for x in self.quantised])

    def unrounded_current(self, part: slice) -> Tensor:
        """Return the layer's current from quantised inputs, with weights that are not rounded."""
        found: Tensor = self.layer([x[part] for x in self.quantised])
        return found

    def wanted_current(self, part: slice) -> Tensor:
        """Return the float network's current."""
        return self._with(self.pretrained[:2], [x[part] for x in self.exact])

    def _with(self, tensors: tuple[list[Tensor], Tensor], inputs: list[Tensor]) -> Tensor:
        state = _state(self.layer)
        self.layer.assign_(*tensors)
        found: Tensor = self.layer(inputs)
        _restore_(self.layer, state)
        return found

    def quantize(self, current: Tensor, clip: Tensor) -> Tensor:
        """Return what the neurons fire for a current, with clips `[C]`."""
        return quantize(
            current,
            per_channel(clip, current.ndim),
            self.numerics.timesteps,
            two_sided=self.layer.two_sided,
            offset=self.numerics.offset,
        )

    def fired(self) -> Tensor:
        """Return what the neurons fire for all images."""
        clip = self.layer.clip
        return _in_parts(
            lambda x: self.quantize(self._with(self.stored, x), clip), self.quantised, self.size
        )

    def error(self, clips: Sequence[Tensor] = ()) -> list[float]:
        """Return the squared error on the images that judge, for the layer's or other clips."""
        clips = clips or [self.layer.clip]
        errors = [0.0] * len(clips)
        for part in self.parts(judged=True):
            current, wanted = self.current(part), self.wanted[part]
            for i, clip in enumerate(clips):
                errors[i] += float((self.quantize(current, clip) - wanted).square().sum())
        return errors

    def answers(self, current: Tensor, wanted: Tensor) -> Tensor:
        """Return where the activation of either current is no constant, as 0 and 1."""
        cap = self.layer.cap
        if self.layer.two_sided:
            return torch.ones_like(current)
        mask = (current > 0) | (wanted > 0)
        if cap is not None:
            mask &= (current < cap) | (wanted < cap)
        return mask.float()


def _reconstruct_layer_(site: _Site) -> LayerResult:
    """Try each closed form; keep what lessens the held-out error."""
    layer = site.layer
    (before,) = site.error()
    error, kept = before, []
    trials = (("weights", _weight_trials), ("gain", _gain_trial), ("clip", _clip_trials))
    for name, trial in trials:
        state, best = _state(layer), None
        for proposed in trial(site):
            site.take_(proposed)
            (found,) = site.error()
            if found < error:
                error, best = found, proposed
        if best is not None:
            kept.append(name)
        site.take_(best or state)
    square = float(site.wanted[: site.held].square().sum()) or 1.0
    return LayerResult(layer.path, tuple(kept), before / square, error / square)


def _weight_trials(site: _Site) -> list[State]:
    """Return the least squares weights and bias of the first weighted branch, per ridge."""
    layer = site.layer
    found = [
        i
        for i, b in enumerate(layer.branches)
        if b.kind != "scale" and not b.pools and b.source not in site.carriers
    ]
    if not found:
        return []
    index = found[0]
    branch, weight = layer.branches[index], layer.weights[index].detach()
    groups = branch.attributes.get("groups", 1)
    unknowns = weight[0].numel() + 1
    if unknowns > LARGEST_SYSTEM:
        return []
    gram, moment = _normal_equations(site, index, groups, unknowns)
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    level = diagonal[:, :-1].mean(1, keepdim=True).clamp_min(1e-12)
    weights, bias, clip = _state(layer)
    states = []
    for ridge in RIDGES:
        held_back = torch.cat([(ridge * level).expand(-1, unknowns - 1), 1e-6 * level], 1)
        added = torch.linalg.solve(gram + torch.diag_embed(held_back), moment)
        added = added.transpose(1, 2).reshape(len(weight), unknowns).float()
        changed = list(weights)
        changed[index] = weights[index] + added[:, :-1].reshape(weight.shape)
        states.append((changed, bias + added[:, -1], clip))
    return states


def _normal_equations(site: _Site, index: int, groups: int, unknowns: int) -> tuple[Tensor, Tensor]:
    """Return the Gram matrices of a branch's inputs, and their products with what is missing.

    Float64 `[G, K, K]` and `[G, K, O/G]` with K inputs of a row, the last of them the bias. Where a
    group has one row, only positions count at which its activation answers.
    """
    layer, branch = site.layer, site.layer.branches[index]
    rows = len(layer.bias) // groups
    gram = torch.zeros(groups, unknowns, unknowns, dtype=torch.float64)
    moment = torch.zeros(groups, unknowns, rows, dtype=torch.float64)
    plane = site.numbers // len(layer.bias)
    positions = plane * site.taught
    stride = math.ceil(positions * groups * unknowns**2 / PRODUCTS)
    few = max(1, NUMBERS_AT_ONCE // (groups * unknowns * plane))
    for whole in site.parts(judged=False):
        for start in range(whole.start, whole.stop, few):
            part = slice(start, min(start + few, whole.stop))
            current, wanted = site.unrounded_current(part), site.wanted_current(part)
            missing = _by_group(wanted - current, groups)[..., ::stride]
            inputs = _patches(branch, layer.weights[index], site.quantised[index][part])
            inputs = inputs[..., ::stride]
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
            counted = inputs
            if rows == 1:
                mask = _by_group(site.answers(current, wanted), groups)[..., ::stride]
                counted = inputs * mask
            gram += (counted @ inputs.transpose(1, 2)).double()
            moment += (counted @ missing.transpose(1, 2)).double()
    return gram, moment


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Return `[N, C, ...]` as `[G, C/G, positions]`."""
    return x.transpose(0, 1).flatten(1).view(groups, x.shape[1] // groups, -1)


def _patches(branch: Branch, weight: Tensor, x: Tensor) -> Tensor:
    """Return what each row's weights are multiplied with, `[G, inputs of a row, positions]`."""
    if branch.kind == "linear":
        return x.t()[None]
    groups = branch.attributes["groups"]
    _, inputs, height, width = weight.shape
    taps = height * width
    channels = groups * inputs
    pick = torch.eye(taps).view(taps, 1, height, width).repeat(channels, 1, 1, 1)
    every = convolve(x, pick, **{**branch.attributes, "groups": channels})
    return every.transpose(0, 1).flatten(1).view(groups, inputs * taps, -1)


def _gain_trial(site: _Site) -> list[State]:
    """Return the layer with the least squares gain and shift of every channel's current."""
    layer = site.layer
    sums = torch.zeros(5, len(layer.bias), dtype=torch.float64)
    for part in site.parts(judged=False):
        current, wanted = site.current(part), site.wanted_current(part)
        mask = site.answers(current, wanted)
        x, y = current * mask, wanted * mask
        for i, product in enumerate((mask, x, y, x * current, x * wanted)):
            sums[i] += product.transpose(0, 1).flatten(1).sum(1).double()
    count, sum_x, sum_y, square_x, product = sums
    known = count >= FEWEST_POSITIONS
    count = count.clamp_min(1)
    spread = square_x - sum_x.square() / count
    gain = (product - sum_x * sum_y / count) / spread.clamp_min(1e-12)
    gain = torch.where(known & (spread > 1e-9), gain, 1.0).clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
    shift = torch.where(known, (sum_y - gain * sum_x) / count, 0.0)
    weights, bias, clip = _state(layer)
    gain, shift = gain.float(), shift.float()
    scaled = [w * gain.view(-1, *[1] * (w.ndim - 1)) for w in weights]
    return [(scaled, bias * gain + shift, clip)]


def _clip_trials(site: _Site) -> list[State]:
    """Return the layer with the least squares clips of its channels, per floor."""
    layer = site.layer
    weights, bias, clip = _state(layer)
    tried = [share * clip for share in CLIP_SHARES]
    if layer.cap is not None:
        tried = [c.clamp(max=layer.cap) for c in tried]
    errors = torch.zeros(len(tried), len(clip), dtype=torch.float64)
    stride = math.ceil(site.taught * site.numbers / NUMBERS_SCANNED)
    for part in site.parts(judged=False):
        current, wanted = (
            x.transpose(0, 1).flatten(1).t()[::stride]
            for x in (site.current(part), site.wanted[part])
        )
        for i, candidate in enumerate(tried):
            away = site.quantize(current, candidate) - wanted
            errors[i] += away.square().sum(0).double()
    best = torch.stack(tried).gather(0, errors.argmin(0)[None])[0]
    clips = [best.clamp(min=floor * float(best.max())) for floor in FLOORS]
    found = site.error(clips)
    chosen = clips[min(range(len(clips)), key=lambda i: found[i])]
    return [(weights, bias, chosen)]
