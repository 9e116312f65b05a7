// One layer of neurons, for one instruction set.
//
// The including file defines LANES (32-bit numbers in a register), LARGEST_TILE_1, _2 and _4
// (pixels of a tile of so many registers per pixel), and what needs its instructions: `Bytes`, one
// a lane, with `filled`, `load_bytes`, `store`, `widened` (to numbers) and `narrowed` (back), `dot`
// (four products a lane), and `step`: neurons fire, up to the count `high`, and negative spikes
// take `down` off, 1 or 0. A `Tally` holds what they fired; `add_falls` adds 1 where counts have
// fallen. All is in an unnamed namespace, and
// functions of the standard library on plain types are left alone: compiled here for one
// instruction set, they could end up being called by code for another.

// Registers of one tile: P pixels of a row by Q vectors of output channels.
template <int P, int Q> struct Tile {
    Vec at[P][Q];
};

// Add the products of four channels of every pixel, and go on to the next four.
template <int P, int Q>
inline void multiply(Tile<P, Q> &sum, const uint8_t *p, int64_t next, const int8_t *w) {
    Weights weights[Q];
    UNROLLED(q, Q)
        weights[q] = load<Weights>(w + 4 * LANES * q);
    UNROLLED(i, P) {
        const int32_t four = load<int32_t>(p + i * next);
        UNROLLED(q, Q)
            sum.at[i][q] = dot(sum.at[i][q], four, weights[q]);
    }
}

template <int P, int Q> inline void convolve(Tile<P, Q> &sum, const Branch &branch,
                                             const uint8_t *corner, const int8_t *w) {
    const int64_t pixel = branch.source.pixel, next = branch.stride[1] * pixel;
    for (int y = 0; y < branch.kernel[0]; y++)
        for (int x = 0; x < branch.kernel[1]; x++) {
            const uint8_t *p = corner + y * branch.dilation[0] * branch.source.row +
                               x * branch.dilation[1] * pixel;
            int c = 0;
            for (; c + 16 <= branch.depth; c += 16, w += 16 * LANES * Q)
                UNROLLED(k, 4)
                    multiply(sum, p + c + 4 * k, next, w + 4 * k * LANES * Q);
            for (; c < branch.depth; c += 4, w += 4 * LANES * Q)
                multiply(sum, p + c, next, w);
        }
}

// The same for a convolution whose channels do not mix.
template <int P, int Q> inline void convolve_depthwise(Tile<P, Q> &sum, const Branch &branch,
                                                       const uint8_t *corner, const int32_t *w,
                                                       int channels) {
    const int64_t pixel = branch.source.pixel, next = branch.stride[1] * pixel;
    for (int y = 0; y < branch.kernel[0]; y++)
        for (int x = 0; x < branch.kernel[1]; x++, w += channels) {
            const uint8_t *p = corner + y * branch.dilation[0] * branch.source.row +
                               x * branch.dilation[1] * pixel;
            UNROLLED(q, Q) {
                const Vec weights = load<Vec>(w + LANES * q);
                UNROLLED(i, P)
                    sum.at[i][q] += weights * widened(load_bytes(p + i * next + LANES * q));
            }
        }
}

struct Place {
    int image, row, column, block;
};

inline int64_t offset(const Planes &planes, const Place &at) {
    return at.image * planes.image + at.row * planes.row + at.column * planes.pixel;
}

// Where a branch begins to read for an output.
inline Place corner(const Branch &branch, const Place &at) {
    return {at.image, at.row * branch.stride[0] - branch.padding[0],
            at.column * branch.stride[1] - branch.padding[1], at.block};
}

inline bool convolves(const Branch &branch) { return branch.weight || branch.depthwise; }

// What a convolution sums up at step t.
template <int P, int Q> ALWAYS_INLINE Tile<P, Q> convolved(const Layer &layer, const Branch &branch,
                                                           const Place &at, int t) {
    const uint8_t *p =
        branch.source.data + t * branch.source.step + offset(branch.source, corner(branch, at));
    const int channel = at.block * layer.block;
    Tile<P, Q> sum{};
    if (branch.depthwise) {
        convolve_depthwise(sum, branch, p + channel, branch.depthwise + channel, layer.channels);
    } else {
        const int64_t taps = static_cast<int64_t>(branch.kernel[0]) * branch.kernel[1];
        convolve(sum, branch, p + branch.first[at.block],
                 branch.weight + at.block * taps * branch.depth * layer.block);
    }
    UNROLLED(q, Q) {
        const Vec scale = load<Vec>(branch.scale + channel + LANES * q);
        UNROLLED(i, P)
            sum.at[i][q] <<= scale;
    }
    return sum;
}

// Add what a shortcut brings at step t.
template <int P, int Q> ALWAYS_INLINE void
add_shortcut(Tile<P, Q> &total, const Layer &layer, const Branch &branch, const Place &at, int t) {
    const int channel = at.block * layer.block;
    const uint8_t *p = branch.source.data + t * branch.source.step +
                       offset(branch.source, corner(branch, at)) + channel;
    const int64_t next = branch.stride[1] * branch.source.pixel;
    UNROLLED(q, Q) {
        const Vec factor = load<Vec>(branch.scale + channel + LANES * q);
        UNROLLED(i, P)
            total.at[i][q] += factor * widened(load_bytes(p + i * next + LANES * q));
    }
}

// Where a tile's numbers lie in a plane that is handed in.
inline int64_t number(const Layer &layer, const Place &at) {
    const int64_t row = static_cast<int64_t>(at.image) * layer.rows + at.row;
    return (row * layer.columns + at.column) * layer.channels + at.block * layer.block;
}

// Add the charge that is handed in for step t.
template <int P, int Q>
ALWAYS_INLINE void add_charge(Tile<P, Q> &total, const Layer &layer, const Place &at, int t) {
    const int32_t *charge = layer.charge + t * layer.charge_step + number(layer, at);
    UNROLLED(i, P)
        UNROLLED(q, Q)
            total.at[i][q] += layer.held[t] * load<Vec>(charge + i * layer.channels + LANES * q);
}

// Add what every step begins with.
template <int P, int Q>
ALWAYS_INLINE void add_base(Tile<P, Q> &total, const Layer &layer, const Place &at) {
    const int32_t *base = layer.base + number(layer, at);
    UNROLLED(i, P)
        UNROLLED(q, Q)
            total.at[i][q] += load<Vec>(base + i * layer.channels + LANES * q);
}

template <int P, int Q> ALWAYS_INLINE void add(Tile<P, Q> &total, const Tile<P, Q> &more) {
    UNROLLED(i, P)
        UNROLLED(q, Q)
            total.at[i][q] += more.at[i][q];
}

// What all branches bring at step t; shortcuts are the first of them.
template <int P, int Q>
ALWAYS_INLINE Tile<P, Q> gathered(const Layer &layer, const Place &at, int t) {
    int shortcuts = 0;
    while (shortcuts < layer.branch_count && !convolves(layer.branches[shortcuts]))
        shortcuts++;
    Tile<P, Q> total{};
    for (int b = shortcuts; b < layer.branch_count; b++) {
        const Tile<P, Q> others = total;
        total = convolved<P, Q>(layer, layer.branches[b], at, t);
        if (b > shortcuts) add(total, others);
    }
    for (int b = 0; b < shortcuts; b++)
        add_shortcut(total, layer, layer.branches[b], at, t);
    return total;
}

// The same where it is not worth as much code.
template <int P, int Q>
__attribute__((noinline)) Tile<P, Q> gathered_apart(const Layer &layer, const Place &at, int t) {
    return gathered<P, Q>(layer, at, t);
}

// What a membrane holds at step t beside its charge, the same for all pixels.
inline Vec injected(const Layer &layer, int t, int channel) {
    return load<Vec>(layer.start + channel) + layer.injected[t] * load<Vec>(layer.bias + channel);
}

// Where the counts of a tile lie: of the step before, and of this one.
struct Course {
    const uint8_t *before;
    int64_t pixel_before;
    uint8_t *now;
    int64_t pixel_now;
};

template <int P, int Q> inline void copy(const Course &course) {
    UNROLLED(i, P)
        std::memcpy(course.now + i * course.pixel_now, course.before + i * course.pixel_before,
                    Q * LANES);
}

template <int P, int Q> void fire(const Layer &layer, const Place &at, Tally *tally) {
    const int channel = at.block * layer.block;
    Tile<P, Q> still;
    if (layer.constant) still = gathered_apart<P, Q>(layer, at, 0);
    const Bytes high = filled(layer.high), down = filled(layer.is_signed);
    uint8_t *state = layer.state.data + offset(layer.state, at) + channel;
    uint8_t *out = layer.out.data + offset(layer.out, at) + channel;
    uint8_t *falls = layer.falls ? layer.falls + (state - layer.state.data) : nullptr;
    Course course{state, layer.state.pixel, out, layer.out.pixel};
    for (int t = 0; t < layer.steps; t++) {
        if (layer.fires[t]) {
            Tile<P, Q> total = layer.constant ? still : gathered<P, Q>(layer, at, t);
            if (layer.charge) add_charge(total, layer, at, t);
            if (layer.base) add_base(total, layer, at);
            Tally spikes = tally[t];
            UNROLLED(q, Q) {
                const int here = channel + LANES * q;
                const Vec threshold = load<Vec>(layer.threshold + here);
                const Vec base = injected(layer, t, here);
                UNROLLED(i, P) {
                    Bytes counts = load_bytes(course.before + i * course.pixel_before + LANES * q);
                    const Bytes before = counts;
                    const Vec membrane = total.at[i][q] + base - widened(counts) * threshold;
                    step(counts, membrane, threshold, high, down, spikes);
                    store(course.now + i * course.pixel_now + LANES * q, counts);
                    if (falls) add_falls(falls + i * layer.state.pixel + LANES * q, before, counts);
                }
            }
            tally[t] = spikes;
        } else {
            copy<P, Q>(course);
        }
        course = {course.now, layer.out.pixel, course.now + layer.out.step, layer.out.pixel};
    }
    copy<P, Q>({course.before, layer.out.pixel, state, layer.state.pixel});
}

// Where neurons end: about the quotient of membrane and threshold, set right by one step more. In
// single precision it is less than one off, as far as counts reach.
template <int P, int Q> void settle(const Layer &layer, const Place &at, Tally *spikes) {
    const int channel = at.block * layer.block;
    uint8_t *out = layer.out.data + offset(layer.out, at) + channel;
    Tile<P, Q> total = gathered_apart<P, Q>(layer, at, 0);
    if (layer.charge) add_charge(total, layer, at, 0);
    const Bytes high = filled(layer.high), down = filled(1);
    const Floats most = Floats{} + static_cast<float>(layer.high);
    UNROLLED(q, Q) {
        const int here = channel + LANES * q;
        const Vec threshold = load<Vec>(layer.threshold + here);
        const Vec base = injected(layer, 0, here);
        UNROLLED(i, P) {
            const Vec membrane = total.at[i][q] + base;
            Floats about = __builtin_convertvector(membrane, Floats) /
                           __builtin_convertvector(threshold, Floats);
            about = about < Floats{} ? Floats{} : about;
            about = about > most ? most : about;
            const Vec estimate = __builtin_convertvector(about, Vec);
            Bytes counts = narrowed(estimate);
            step(counts, membrane - estimate * threshold, threshold, high, down, *spikes);
            store(out + i * layer.out.pixel + LANES * q, counts);
        }
    }
}

template <int P, int Q> void sum(const Layer &layer, const Place &at, Tally *) {
    const int channel = at.block * layer.block;
    for (int t = 0; t < layer.steps; t++) {
        Tile<P, Q> total = gathered_apart<P, Q>(layer, at, t);
        if (layer.charge) add_charge(total, layer, at, t);
        const int64_t image = static_cast<int64_t>(t) * layer.images + at.image;
        const int64_t pixel = (image * layer.rows + at.row) * layer.columns + at.column;
        int32_t *sums = layer.sums + pixel * layer.channels + channel;
        UNROLLED(q, Q) {
            const Vec bias = load<Vec>(layer.bias + channel + LANES * q);
            UNROLLED(i, P) {
                const Vec v = total.at[i][q] + bias;
                std::memcpy(sums + i * layer.channels + LANES * q, &v, sizeof v);
            }
        }
    }
}

using Kernel = void (*)(const Layer &, const Place &, Tally *);

template <Kind K, int P, int Q> constexpr Kernel kernel() {
    return K == SNNCONV_FIRE ? fire<P, Q> : K == SNNCONV_SETTLE ? settle<P, Q> : sum<P, Q>;
}

template <Kind K, int Q, int... P> Kernel choose(int pixels, std::integer_sequence<int, P...>) {
    static constexpr Kernel kernels[] = {kernel<K, P + 1, Q>()...};
    return kernels[pixels - 1];
}

template <Kind K> Kernel choose(int pixels, int vectors) {
    switch (vectors) {
#if LARGEST_TILE_4 > 0
    case 4:
        return choose<K, 4>(pixels, std::make_integer_sequence<int, LARGEST_TILE_4>{});
#endif
#if LARGEST_TILE_2 > 0
    case 2:
        return choose<K, 2>(pixels, std::make_integer_sequence<int, LARGEST_TILE_2>{});
#endif
#if LARGEST_TILE_1 > 0
    case 1:
        return choose<K, 1>(pixels, std::make_integer_sequence<int, LARGEST_TILE_1>{});
#endif
    }
    return nullptr; // no block of this instruction set has so many
}

int largest_tile(int vectors) {
    return vectors == 4 ? LARGEST_TILE_4 : vectors == 2 ? LARGEST_TILE_2 : LARGEST_TILE_1;
}

// Fill the border of `out` around one row, and above the first and below the last.
template <typename Output> void fill_border(const Output &layer, int image, int row) {
    const Planes &out = layer.out;
    const auto [left, right, top, bottom] = layer.border;
    const int64_t width = (left + layer.columns + right) * out.pixel;
    for (int t = 0; t < layer.steps; t++) {
        uint8_t *p = out.data + t * out.step + image * out.image + row * out.row - left * out.pixel;
        std::memset(p, layer.border_value, left * out.pixel);
        std::memset(p + (left + layer.columns) * out.pixel, layer.border_value, right * out.pixel);
        for (int k = 1; row == 0 && k <= top; k++)
            std::memset(p - k * out.row, layer.border_value, width);
        for (int k = 1; row == layer.rows - 1 && k <= bottom; k++)
            std::memset(p + k * out.row, layer.border_value, width);
    }
}

// Run the rows first..last of all images: row r is row r % rows of image r / rows.
template <Kind K> void run(const Layer &layer, int first, int last) {
    const int vectors = layer.block / LANES, blocks = layer.channels / layer.block;
    const int most = largest_tile(vectors), tiles = (layer.columns + most - 1) / most;
    Tally tally[SNNCONV_MOST_STEPS];
    for (int begin = first; begin < last;) {
        const int image = begin / layer.rows;
        const int whole = (image + 1) * layer.rows, end = last < whole ? last : whole;
        for (int t = 0; t < layer.steps; t++)
            tally[t] = Tally{};
        for (int block = 0; block < blocks; block++)
            for (int r = begin; r < end; r++)
                for (int tile = 0; tile < tiles; tile++) {
                    const int column = layer.columns * tile / tiles,
                              next = layer.columns * (tile + 1) / tiles;
                    const Place at{image, r - image * layer.rows, column, block};
                    choose<K>(next - column, vectors)(layer, at, tally);
                }
        for (int r = begin; K != SNNCONV_SUM && r < end; r++)
            fill_border(layer, image, r - image * layer.rows);
        for (int t = 0; K == SNNCONV_FIRE && t < layer.steps; t++) {
            int64_t *fired = layer.fired + (static_cast<int64_t>(t) * layer.images + image) * 2;
            __atomic_fetch_add(fired, tally[t].ups(), __ATOMIC_RELAXED);
            __atomic_fetch_add(fired + 1, tally[t].downs(), __ATOMIC_RELAXED);
        }
        begin = end;
    }
}

using Sixteen = VectorOf<uint8_t, 16>::type;

void max_pool(const Pool &pool, int first, int last) {
    for (int r = first; r < last; r++) {
        const int image = r / pool.rows, row = r % pool.rows;
        for (int t = 0; t < pool.steps; t++) {
            const uint8_t *plane =
                pool.source.data + t * pool.source.step + image * pool.source.image;
            uint8_t *out =
                pool.out.data + t * pool.out.step + image * pool.out.image + row * pool.out.row;
            for (int column = 0; column < pool.columns; column++, out += pool.out.pixel)
                for (int c = 0; c < pool.channels; c += 16) {
                    Sixteen most{};
                    for (int y = 0; y < pool.kernel[0]; y++) {
                        const int in_row =
                            row * pool.stride[0] - pool.padding[0] + y * pool.dilation[0];
                        if (in_row < 0 || in_row >= pool.source_rows) continue;
                        for (int x = 0; x < pool.kernel[1]; x++) {
                            const int in_column =
                                column * pool.stride[1] - pool.padding[1] + x * pool.dilation[1];
                            if (in_column < 0 || in_column >= pool.source_columns) continue;
                            const auto here = load<Sixteen>(plane + in_row * pool.source.row +
                                                            in_column * pool.source.pixel + c);
                            most = here > most ? here : most;
                        }
                    }
                    std::memcpy(out + c, &most, sizeof most);
                }
        }
        fill_border(pool, image, row);
    }
}
