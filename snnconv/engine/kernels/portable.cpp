// For any processor: the compiler makes of it what it can.

#include "simd.h"

#define LANES 4
#define LARGEST_TILE_1 0
#define LARGEST_TILE_2 0
#define LARGEST_TILE_4 2

namespace {
#include "vectors.inl"

using Bytes = VectorOf<uint8_t, LANES>::type;

inline Bytes filled(int value) { return Bytes{} + static_cast<uint8_t>(value); }
inline Bytes load_bytes(const uint8_t *p) { return load<Bytes>(p); }
inline void store(uint8_t *p, Bytes bytes) { std::memcpy(p, &bytes, sizeof bytes); }
inline Vec widened(Bytes bytes) { return __builtin_convertvector(bytes, Vec); }
inline Bytes narrowed(Vec v) { return __builtin_convertvector(v, Bytes); }

struct Tally {
    Vec up, down;

    static int32_t total(Vec v) { return v[0] + v[1] + v[2] + v[3]; }
    int32_t ups() const { return total(up); }
    int32_t downs() const { return total(down); }
};

inline void step(Bytes &counts, Vec membrane, Vec threshold, Bytes high, Bytes down,
                 Tally &spikes) {
    const Vec before = widened(counts);
    const Vec ups = (membrane >= threshold) & (before < widened(high)) & 1;
    const Vec downs = (membrane < 0) & (before > 0) & widened(down);
    spikes.up += ups;
    spikes.down += downs;
    counts = narrowed(before + ups - downs);
}

inline void add_falls(uint8_t *falls, Bytes before, Bytes now) {
    const Vec fallen = (widened(before) > widened(now)) & 1;
    store(falls, load_bytes(falls) + narrowed(fallen));
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
