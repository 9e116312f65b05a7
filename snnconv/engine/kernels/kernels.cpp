// Choice of the instruction set, and threads.

#include "simd.h"

#include <exception>
#include <functional>
#include <thread>
#include <vector>

namespace {

const InstructionSet *const LEVELS[] = {
    &portable,
#if defined(__x86_64__)
    &avx2,
    &avx512,
#endif
};
constexpr int COUNT = sizeof LEVELS / sizeof *LEVELS;

// Give every thread as many rows as any other. Starting threads costs little beside a layer.
template <typename Task> void divide(Rows<Task> run, const Task &task, int threads) {
    const int64_t rows = static_cast<int64_t>(task.images) * task.rows;
    if (threads > rows) threads = static_cast<int>(rows);
    int left = static_cast<int>(rows); // the first rows, which no other thread has taken
    std::vector<std::thread> others;
    try {
        others.reserve(threads);
        for (int k = threads - 1; k > 0; k--) {
            const int first = static_cast<int>(rows * k / threads);
            others.emplace_back(run, std::cref(task), first, left);
            left = first;
        }
    } catch (const std::exception &) { // there are no more threads to be had
    }
    run(task, 0, left);
    for (std::thread &other : others)
        other.join();
}

} // namespace

int64_t snnconv_sizes(void) { return sizeof(Layer) + sizeof(Branch) + sizeof(Pool); }

int snnconv_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

const char *snnconv_level_name(int level) { return level < COUNT ? LEVELS[level]->name : nullptr; }

int snnconv_highest_count(int level) { return LEVELS[level]->highest_count; }

int snnconv_block(int level, int channels) {
    int block = LEVELS[level]->lanes * LEVELS[level]->widest;
    while (channels % block)
        block /= 2;
    return block;
}

int snnconv_fire(const Layer *layer, int level, int threads) {
    divide(LEVELS[level]->fire, *layer, threads);
    const int64_t counters = static_cast<int64_t>(layer->steps) * layer->images * 2;
    for (int64_t k = 0; k < counters; k++)
        if (layer->fired[k]) return 1;
    return 0;
}

void snnconv_settle(const Layer *layer, int level, int threads) {
    divide(LEVELS[level]->settle, *layer, threads);
}

void snnconv_max_pool(const Pool *pool, int level, int threads) {
    divide(LEVELS[level]->max_pool, *pool, threads);
}
