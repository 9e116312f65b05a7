// Vectors of LANES numbers of each kind.

template <typename T, int N> struct VectorOf {
    typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
using Vec = VectorOf<int32_t, LANES>::type;
using Floats = VectorOf<float, LANES>::type;
using Weights = VectorOf<int8_t, 4 * LANES>::type;

template <typename V, typename T> inline V load(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
