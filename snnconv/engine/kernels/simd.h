// What every instruction set shares.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

// Work on the rows first..last of all images, row r being row r % rows of image r / rows.
template <typename Work> using Rows = void (*)(const Work &work, int first, int last);

struct InstructionSet {
    const char *name;
    int lanes, widest; // 32-bit numbers in a register, registers per pixel of the largest block
    int highest_count;
    Rows<Layer> fire, settle, sum;
    Rows<Pool> max_pool;
};

extern const InstructionSet portable, avx2, avx512;

// A loop over the pixels or the registers of a tile: unrolled, so that a tile is registers.
#define UNROLLED(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)

// For functions that hand on tiles, which else would go through memory.
#define ALWAYS_INLINE inline __attribute__((always_inline))
