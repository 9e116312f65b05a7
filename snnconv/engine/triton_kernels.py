"""Kernels for GPUs, in Triton. Importing this module needs Triton; `snnconv.engine.scan` asks."""

import triton
import triton.language as tl


@triton.jit
def fire(
    charge,
    injected,
    fires,
    bias,
    threshold,
    start,
    state,
    counts,
    fired,
    size,
    channels,
    low,
    high,
    CHARGES: tl.constexpr,
    STEPS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Let BLOCK neurons of one image fire through STEPS steps; see `snnconv.engine.scan.scan`.

    The grid is images by blocks of the `size` neurons of an image, whose channels are last.
    """
    image = tl.program_id(0).to(tl.int64)
    images = tl.num_programs(0).to(tl.int64)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    place = image * size + within
    plane = images * size
    channel = within % channels
    step_bias = tl.load(bias + channel, mask=inside, other=0)
    theta = tl.load(threshold + channel, mask=inside, other=1)
    membrane = tl.load(start + channel, mask=inside, other=0)
    count = tl.load(state + place, mask=inside, other=0).to(tl.int32)
    arrived = tl.load(charge + place, mask=inside, other=0)
    for step in tl.static_range(STEPS):
        if CHARGES > 1 and step > 0:
            arrived = tl.load(charge + step * plane + place, mask=inside, other=0)
        now = membrane + arrived + tl.load(injected + step) * step_bias - theta * count
        may = inside & (tl.load(fires + step) > 0)
        spikes = (may & (now >= theta) & (count < high)).to(tl.int32)
        emitted = spikes
        if SIGNED:
            down = (may & (now < 0) & (count > low)).to(tl.int32)
            spikes -= down
            emitted += down
        count += spikes
        tl.atomic_add(fired + step * images + image, tl.sum(emitted))
        tl.store(counts + step * plane + place, count.to(counts.dtype.element_ty), mask=inside)
