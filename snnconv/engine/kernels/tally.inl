// The positive and negative spikes of neurons whose counts lie in a register of 128 bits.

struct Tally {
    __m128i up, down;

    void count(Bytes before, Bytes more, Bytes now) {
        up = _mm_add_epi64(up, _mm_sad_epu8(more, before));
        down = _mm_add_epi64(down, _mm_sad_epu8(more, now));
    }

    static int64_t total(__m128i halves) {
        return _mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1);
    }
    int64_t ups() const { return total(up); }
    int64_t downs() const { return total(down); }
};
