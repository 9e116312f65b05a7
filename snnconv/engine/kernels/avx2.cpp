// AVX2: pairs of products are added in 16 bits, which counts up to 128 cannot overflow.

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define LANES 8
#define LARGEST_TILE_1 0
#define LARGEST_TILE_2 4
#define LARGEST_TILE_4 0

namespace {
#include "vectors.inl"

using Bytes = __m128i; // the lower half of it

inline Bytes filled(int value) { return _mm_move_epi64(_mm_set1_epi8(static_cast<char>(value))); }

inline Bytes load_bytes(const uint8_t *p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
}

inline void store(uint8_t *p, Bytes bytes) {
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), bytes);
}

inline Vec widened(Bytes bytes) { return reinterpret_cast<Vec>(_mm256_cvtepu8_epi32(bytes)); }

inline Bytes narrowed(Vec v) {
    const __m256i numbers = reinterpret_cast<__m256i>(v);
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
    return _mm_packus_epi16(words, _mm_setzero_si128());
}

#include "tally.inl"

inline void step(Bytes &counts, Vec membrane, Vec threshold, Bytes high, Bytes down,
                 Tally &spikes) {
    const Bytes reached = narrowed((membrane >= threshold) & 1);
    const Bytes negative = narrowed((membrane < 0) & 1);
    const Bytes more = _mm_min_epu8(_mm_adds_epu8(counts, reached), high);
    const Bytes now = _mm_subs_epu8(more, _mm_and_si128(negative, down));
    spikes.count(counts, more, now);
    counts = now;
}

inline void add_falls(uint8_t *falls, Bytes before, Bytes now) {
    store(falls, _mm_add_epi8(load_bytes(falls), _mm_subs_epu8(before, now)));
}

inline Vec dot(Vec sum, int32_t four, Weights w) {
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_set1_epi32(four), reinterpret_cast<__m256i>(w));
    return sum + reinterpret_cast<Vec>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "layer.inl"
} // namespace

#if defined(__clang__)
#pragma clang attribute pop
#endif

const InstructionSet avx2{"avx2",           LANES,   2, 128, run<SNNCONV_FIRE>, run<SNNCONV_SETTLE>,
                          run<SNNCONV_SUM>, max_pool};
#endif
