// AVX-512 with VNNI: four products of a byte of counts and a byte of weights per lane.

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#define LANES 16
#define LARGEST_TILE_1 14
#define LARGEST_TILE_2 12
#define LARGEST_TILE_4 6

namespace {
#include "vectors.inl"

using Bytes = __m128i;

inline Bytes filled(int value) { return _mm_set1_epi8(static_cast<char>(value)); }

inline Bytes load_bytes(const uint8_t *p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
}

inline void store(uint8_t *p, Bytes bytes) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
}

inline Vec widened(Bytes bytes) { return reinterpret_cast<Vec>(_mm512_cvtepu8_epi32(bytes)); }
inline Bytes narrowed(Vec v) { return _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)); }

#include "tally.inl"

inline void step(Bytes &counts, Vec membrane, Vec threshold, Bytes high, Bytes down,
                 Tally &spikes) {
    const __m512i m = reinterpret_cast<__m512i>(membrane);
    const __mmask16 reached = _mm512_cmpge_epi32_mask(m, reinterpret_cast<__m512i>(threshold)),
                    negative = _mm512_movepi32_mask(m);
    const Bytes more =
        _mm_min_epu8(_mm_mask_adds_epu8(counts, reached, counts, _mm_set1_epi8(1)), high);
    const Bytes now = _mm_mask_subs_epu8(more, negative, more, down);
    spikes.count(counts, more, now);
    counts = now;
}

inline void add_falls(uint8_t *falls, Bytes before, Bytes now) {
    store(falls, _mm_add_epi8(load_bytes(falls), _mm_subs_epu8(before, now)));
}

inline Vec dot(Vec sum, int32_t four, Weights w) {
    return reinterpret_cast<Vec>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(four), reinterpret_cast<__m512i>(w)));
}

#include "layer.inl"
} // namespace

#if defined(__clang__)
#pragma clang attribute pop
#endif

const InstructionSet avx512{
    "avx512-vnni",    LANES,   4, 255, run<SNNCONV_FIRE>, run<SNNCONV_SETTLE>,
    run<SNNCONV_SUM>, max_pool};
#endif
