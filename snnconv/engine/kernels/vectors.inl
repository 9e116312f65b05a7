// Vectors of LANES numbers of each kind.

template <typename T, int N> struct VectorOf {
    typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
using Vec = VectorOf<int32_t, LANES>::type;
using Weights = VectorOf<int8_t, 4 * LANES>::type;
using Bytes = VectorOf<uint8_t, LANES>::type;

template <typename V, typename T> inline V load(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Neurons of one channel each: counts so far, and sums of their spikes.
struct Neurons {
    Vec &counts, &ups, &downs;
};

#if !defined(STEP_WITH_MASKS)
inline void step(Neurons neurons, Vec membrane, Vec threshold, Vec high, Vec is_signed) {
    const Vec up = (membrane >= threshold) & (neurons.counts < high);
    const Vec down = (membrane < 0) & (neurons.counts > 0) & is_signed;
    neurons.counts += down - up;
    neurons.ups -= up;
    neurons.downs -= down;
}
#endif
