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
#define STEP_WITH_MASKS
#define LARGEST_TILE_1 14
#define LARGEST_TILE_2 12
#define LARGEST_TILE_4 6

namespace {
#include "vectors.inl"

inline Vec widened(const uint8_t *p) {
    return reinterpret_cast<Vec>(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}

inline void store(uint8_t *p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                     _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
}

inline __m256i half(__m256i n, __m256i d) {
    const __m512d quotient = _mm512_div_pd(_mm512_cvtepi32_pd(n), _mm512_cvtepi32_pd(d));
    return _mm512_cvtpd_epi32(
        _mm512_roundscale_pd(quotient, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}

inline Vec floored(Vec numerator, Vec denominator) {
    const __m512i n = reinterpret_cast<__m512i>(numerator),
                  d = reinterpret_cast<__m512i>(denominator);
    const __m256i low = half(_mm512_castsi512_si256(n), _mm512_castsi512_si256(d));
    const __m256i high = half(_mm512_extracti64x4_epi64(n, 1), _mm512_extracti64x4_epi64(d, 1));
    return reinterpret_cast<Vec>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

inline void add(__mmask16 where, Vec &to, __m512i what) {
    const __m512i before = reinterpret_cast<__m512i>(to);
    to = reinterpret_cast<Vec>(_mm512_mask_add_epi32(before, where, before, what));
}

inline void step(Neurons neurons, Vec membrane, Vec threshold, Vec high, Vec is_signed) {
    const __m512i m = reinterpret_cast<__m512i>(membrane), zero = _mm512_setzero_si512();
    const __m512i theta = reinterpret_cast<__m512i>(threshold), one = _mm512_set1_epi32(1);
    const __m512i counts = reinterpret_cast<__m512i>(neurons.counts);
    const __mmask16 reached = _mm512_cmpge_epi32_mask(m, theta);
    const __mmask16 up =
        _mm512_mask_cmplt_epi32_mask(reached, counts, reinterpret_cast<__m512i>(high));
    const __mmask16 below = _mm512_mask_cmplt_epi32_mask(
        _mm512_movepi32_mask(reinterpret_cast<__m512i>(is_signed)), m, zero);
    const __mmask16 down = _mm512_mask_cmpgt_epi32_mask(below, counts, zero);
    add(up, neurons.counts, one);
    add(down, neurons.counts, _mm512_set1_epi32(-1));
    add(up, neurons.ups, one);
    add(down, neurons.downs, one);
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
