// For any processor: the compiler makes of it what it can.

#include "simd.h"

#define LANES 4
#define LARGEST_TILE_1 0
#define LARGEST_TILE_2 0
#define LARGEST_TILE_4 2

namespace {
#include "vectors.inl"

inline Vec widened(const uint8_t *p) { return __builtin_convertvector(load<Bytes>(p), Vec); }

inline void store(uint8_t *p, Vec v) {
    const Bytes bytes = __builtin_convertvector(v, Bytes);
    std::memcpy(p, &bytes, sizeof bytes);
}

inline Vec floored(Vec numerator, Vec denominator) {
    Vec floors;
    for (int lane = 0; lane < LANES; lane++) {
        const int32_t quotient = numerator[lane] / denominator[lane];
        floors[lane] = quotient - (quotient * denominator[lane] > numerator[lane]);
    }
    return floors;
}

inline Vec dot(Vec sum, int32_t four, Weights w) {
    for (int lane = 0; lane < LANES; lane++)
        for (int k = 0; k < 4; k++)
            sum[lane] += static_cast<uint8_t>(four >> 8 * k) * w[4 * lane + k];
    return sum;
}

#include "layer.inl"
} // namespace

const InstructionSet portable{
    "portable", LANES, 4, 255, run<SNNCONV_FIRE>, run<SNNCONV_SETTLE>, run<SNNCONV_SUM>, max_pool};
