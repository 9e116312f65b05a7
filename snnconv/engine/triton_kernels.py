"""Kernels for GPUs, in Triton. Importing this module needs Triton; `snnconv.engine.gpu` asks."""

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
    """Let BLOCK neurons of one image fire through STEPS steps; see `snnconv.engine.gpu.scan`.

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


@triton.jit
def convolve(
    x,
    weight,
    factor,
    out,
    positions,
    height,
    width,
    out_height,
    out_width,
    rows,
    stride_h,
    stride_w,
    above,
    left,
    dilation_h,
    dilation_w,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Convolve bytes for BLOCK_M of `positions` (images by rows by columns) and BLOCK_N rows.

    `x` is int8 `[N, H, W, C]`, `out` int32 `[N, H', W', O]`. `weight` is int8 `[kh kw C, O]`, with
    zeros up to multiples of BLOCK_K and BLOCK_N; a kernel is WIDE columns wide and has TAPS pixels.
    Sums are multiplied by `factor`, int32 `[O]`.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = m < positions
    image = (m // (out_height * out_width)).to(tl.int64) * height * width * CHANNELS
    row = (m // out_width) % out_height * stride_h - above
    column = m % out_width * stride_w - left
    columns = (rows + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, TAPS * CHANNELS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tap = k // CHANNELS
        at_row = row[:, None] + (tap // WIDE * dilation_h)[None, :]
        at_column = column[:, None] + (tap % WIDE * dilation_w)[None, :]
        inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
        inside &= within[:, None] & (tap < TAPS)[None, :]
        place = (at_row * width + at_column) * CHANNELS + (k % CHANNELS)[None, :]
        counts = tl.load(x + image[:, None] + place, mask=inside, other=0)
        weights = tl.load(weight + k[:, None] * columns + n[None, :])
        total += tl.dot(counts, weights, out_dtype=tl.int32)
    total *= tl.load(factor + n, mask=n < rows, other=0)[None, :]
    place = m.to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(out + place, total, mask=within[:, None] & (n < rows)[None, :])
