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

inline Vec widened(const uint8_t *p) {
    return reinterpret_cast<Vec>(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}

inline void store(uint8_t *p, Vec v) {
    const __m256i numbers = reinterpret_cast<__m256i>(v);
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(words, words));
}

inline __m128i half(__m128i n, __m128i d) {
    return _mm256_cvtpd_epi32(
        _mm256_floor_pd(_mm256_div_pd(_mm256_cvtepi32_pd(n), _mm256_cvtepi32_pd(d))));
}

inline Vec floored(Vec numerator, Vec denominator) {
    const __m256i n = reinterpret_cast<__m256i>(numerator),
                  d = reinterpret_cast<__m256i>(denominator);
    const __m128i low = half(_mm256_castsi256_si128(n), _mm256_castsi256_si128(d));
    const __m128i high = half(_mm256_extracti128_si256(n, 1), _mm256_extracti128_si256(d, 1));
    return reinterpret_cast<Vec>(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
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
