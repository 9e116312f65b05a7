// The plain C interface of the native engine: layers of neurons over a block of time steps.
//
// Counts are unsigned bytes, laid out as steps x images x rows x columns x channels. Channels are
// padded to a multiple of 16 with counts nobody reads. Two-sided neurons count from `-low` up, so
// that every count is from 0 to `high`; what that shifts is in `start`.

#pragma once

#include <cstdint>

// The most steps of a block.
enum { SNNCONV_MOST_STEPS = 32 };

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {

// Counts of one tensor. `data` is pixel (0, 0) of image 0 at the first step; a convolution may read
// the border around it. Strides are in bytes. Where `*moves` is 0, or there is none, the first step
// stands for all; who writes the planes sets it.
struct Planes {
    uint8_t *data;
    int64_t step, image, row, pixel;
    int32_t *moves;
};

// What a layer of neurons sums: a convolution with `weight`, a depthwise one with `depthwise`, or
// (both null) a shortcut, which reads one pixel of every stride.
//
// Weights of a convolution are packed [blocks][taps][depth/4][channels of a block][4]: the outputs
// of a block read `depth` input channels from `first[block]` on. Its charge is shifted left by
// `scale` per output channel; that of a shortcut is multiplied by `scale`. Channels where that is 0
// may lie beyond those of the source.
struct Branch {
    Planes source;
    const int8_t *weight;
    const int32_t *depthwise; // [taps][channels]
    const int32_t *scale;
    const int32_t *first;
    int32_t depth;
    int32_t kernel[2], stride[2], dilation[2], padding[2];
};

// A population, or sums that no neuron reads. Arrays per channel have its padded length.
//
// The membrane before firing at step t is
//     sum of branches + held[t] charge + injected[t] bias + start + base - threshold count(t - 1).
// `state` holds the counts before the first step and is written with those after the last.
// `fired` [steps][images][2] is increased by the positive and negative spikes, and `falls` (laid
// out as `state`, or null) by the negative ones of each neuron.
//
// Sums are those of the branches and the bias; of `out` they have `moves` only.
struct Layer {
    const Branch *branches;
    Planes out, state;
    const int32_t *charge; // [steps][images][rows][columns][channels], or null
    int64_t charge_step;   // in numbers; 0 repeats one plane
    const int32_t *base;   // [images][rows][columns][channels], or null
    const int32_t *held, *injected;
    const int32_t *fires; // whether the neurons fire at a step
    uint8_t *falls;
    const int32_t *threshold, *bias, *start;
    int32_t *sums; // [steps][images][rows][columns][channels]
    int32_t branch_count, rows, columns, channels, block;
    int32_t high, is_signed;
    int32_t border[4], border_value; // of `out`: left, right, top, bottom
    // These are filled in for a block.
    int64_t *fired;
    int32_t images, steps;
    int32_t constant; // branches and charge are the same at every step
};

// A max-pool; pixels outside of the image do not count.
struct Pool {
    Planes source, out;
    int32_t rows, columns, channels, source_rows, source_columns;
    int32_t kernel[2], stride[2], dilation[2], padding[2];
    int32_t border[4], border_value; // of `out`
    int32_t images, steps;           // filled in for a block
};

enum Kind {
    SNNCONV_FIRE,   // a Layer fires through a block of steps
    SNNCONV_SETTLE, // a Layer's counts in the end, one step: clip(floor(membrane/threshold), 0,
                    // high)
    SNNCONV_SUM,    // a Layer's sums, one step if its branches do not move
    SNNCONV_MAX_POOL,
};

struct Task {
    const void *work; // Layer or Pool
    int32_t kind;
    int32_t population; // which counters of spikes are its own
};

// A block of steps. `fired` [populations][steps][images][2] must be 0 before.
struct Block {
    int64_t *fired;
    int32_t images, steps, level, threads;
};

// The sizes of all structures together: who calls with others has other sources.
int64_t snnconv_sizes(void);

// The best instruction set of this processor that the library has: see `level_name`.
int snnconv_level(void);

// The name of an instruction set, or null beyond the last.
const char *snnconv_level_name(int level);

// The largest counts an instruction set multiplies without overflow.
int snnconv_highest_count(int level);

// How many output channels a block of packed weights has, for a padded number of channels.
int snnconv_block(int level, int channels);

// Do one task after another.
void snnconv_run(const Task *tasks, int count, const Block *block);
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
