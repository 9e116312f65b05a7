// What event-driven execution could gain: a 1x1 convolution of counts with AVX-512 VNNI against
// adding the weights of those inputs whose counts changed since the last step.
//
//     g++ -std=c++17 -O3 -march=native benchmarks/events.cpp -o /tmp/events && /tmp/events
//
// Prints JSON: dense time over event-driven time per number of channels and share of changes. It
// favours events: their lists are there already, the weights are in the cache, and sums stay in
// registers from input to input. Above 1 events win.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <immintrin.h>
#include <random>
#include <vector>

// So that tiles are registers.
#define UNROLLED _Pragma("GCC unroll 16")

namespace {

constexpr int PIXELS = 6, VECTORS = 4, OUTPUTS = 16 * VECTORS, TILES = 256;

struct Event {
    int32_t channel, sign;
};

void dense(const uint8_t *counts, const int8_t *weight, int channels, int32_t *out) {
    __m512i sum[PIXELS][VECTORS]{};
    for (int c = 0; c < channels; c += 4)
        UNROLLED
            for (int q = 0; q < VECTORS; q++) {
                const __m512i w = _mm512_loadu_si512(weight + (c * VECTORS / 4 + q) * 64);
                UNROLLED
                    for (int i = 0; i < PIXELS; i++) {
                        int32_t four;
                        std::memcpy(&four, counts + i * channels + c, 4);
                        sum[i][q] = _mm512_dpbusd_epi32(sum[i][q], _mm512_set1_epi32(four), w);
                    }
            }
    UNROLLED
        for (int i = 0; i < PIXELS; i++)
            UNROLLED
                for (int q = 0; q < VECTORS; q++)
                    _mm512_storeu_si512(out + i * OUTPUTS + 16 * q, sum[i][q]);
}

// Weights [channels][OUTPUTS]; `first` are where the events of a pixel begin, and of the next.
void by_events(const Event *events, const int *first, const int8_t *weight, int32_t *out) {
    for (int i = 0; i < PIXELS; i++) {
        __m512i sum[VECTORS];
        UNROLLED
            for (int q = 0; q < VECTORS; q++)
                sum[q] = _mm512_loadu_si512(out + i * OUTPUTS + 16 * q);
        for (const Event *e = events + first[i]; e != events + first[i + 1]; e++) {
            const __m512i sign = _mm512_set1_epi32(e->sign);
            UNROLLED
                for (int q = 0; q < VECTORS; q++) {
                    const __m512i w = _mm512_cvtepi8_epi32(_mm_loadu_si128(
                        reinterpret_cast<const __m128i *>(weight + e->channel * OUTPUTS + 16 * q)));
                    // The sign as a mask: w ^ -1 = -w - 1, and the ones are part of the bias.
                    sum[q] = _mm512_add_epi32(sum[q], _mm512_xor_si512(w, sign));
                }
        }
        UNROLLED
            for (int q = 0; q < VECTORS; q++)
                _mm512_storeu_si512(out + i * OUTPUTS + 16 * q, sum[q]);
    }
}

template <typename F> double seconds(F run) {
    double best = 1e9;
    for (int repetition = 0; repetition < 20; repetition++) {
        const auto start = std::chrono::steady_clock::now();
        run();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        best = taken.count() < best ? taken.count() : best;
    }
    return best;
}

} // namespace

int main() {
    std::mt19937 random(0);
    std::printf("{\"schema\": \"snnconv.benchmark.events/1\", \"rows\": [");
    const char *separator = "";
    for (int channels : {64, 128, 256, 512})
        for (double share : {0.05, 0.10, 0.15, 0.20, 0.25, 0.40}) {
            std::vector<uint8_t> counts(TILES * PIXELS * channels);
            std::vector<int8_t> weight(channels * OUTPUTS);
            std::vector<int32_t> out(TILES * PIXELS * OUTPUTS);
            for (auto &count : counts)
                count = random() % 9;
            for (auto &w : weight)
                w = static_cast<int8_t>(random() % 255 - 127);
            std::vector<Event> events;
            std::vector<int> first{0};
            for (int pixel = 0; pixel < TILES * PIXELS; pixel++) {
                for (int c = 0; c < channels; c++)
                    if (random() % 10000 < share * 10000)
                        events.push_back({c, random() % 10 ? 0 : -1});
                first.push_back(static_cast<int>(events.size()));
            }
            const double a = seconds([&] {
                for (int t = 0; t < TILES; t++)
                    dense(&counts[t * PIXELS * channels], weight.data(), channels,
                          &out[t * PIXELS * OUTPUTS]);
            });
            const double b = seconds([&] {
                for (int t = 0; t < TILES; t++)
                    by_events(events.data(), &first[t * PIXELS], weight.data(),
                              &out[t * PIXELS * OUTPUTS]);
            });
            std::printf("%s\n {\"channels\": %d, \"changes_percent\": %.0f, \"speedup\": %.2f, "
                        "\"dense_gops\": %.0f}",
                        separator, channels, 100 * share, a / b,
                        2e-9 * TILES * PIXELS * OUTPUTS * channels / a);
            separator = ",";
        }
    std::printf("\n]}\n");
}
