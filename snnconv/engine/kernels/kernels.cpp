// Choice of the instruction set, and threads.

#include "simd.h"

#include <algorithm>
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
template <typename Work> void divide(Rows<Work> run, const Work &work, int threads) {
    const int64_t rows = static_cast<int64_t>(work.images) * work.rows;
    if (threads > rows) threads = static_cast<int>(rows);
    int left = static_cast<int>(rows); // the first rows, which no other thread has taken
    std::vector<std::thread> others;
    try {
        others.reserve(threads);
        for (int k = threads - 1; k > 0; k--) {
            const int first = static_cast<int>(rows * k / threads);
            others.emplace_back(run, std::cref(work), first, left);
            left = first;
        }
    } catch (const std::exception &) { // there are no more threads to be had
    }
    run(work, 0, left);
    for (std::thread &other : others)
        other.join();
}

bool moves(const Planes &planes) { return planes.moves && *planes.moves; }

template <typename Number> bool any(const Number *numbers, int64_t count) {
    return std::any_of(numbers, numbers + count, [](Number n) { return n != 0; });
}

void run(Layer layer, const Task &task, const Block &block) {
    const InstructionSet &set = *LEVELS[block.level];
    std::vector<Branch> branches(layer.branches, layer.branches + layer.branch_count);
    layer.branches = branches.data();
    layer.images = block.images;
    layer.constant = !layer.charge_step;
    for (Branch &branch : branches) {
        if (moves(branch.source))
            layer.constant = 0;
        else
            branch.source.step = 0;
    }
    layer.steps = block.steps;
    if (task.kind == SNNCONV_FIRE) {
        layer.fired =
            block.fired + static_cast<int64_t>(task.population) * block.steps * block.images * 2;
        if (!any(layer.fires, layer.steps)) layer.steps = 1;
        divide(set.fire, layer, block.threads);
        *layer.out.moves = any(layer.fired, static_cast<int64_t>(layer.steps) * layer.images * 2);
    } else {
        if (task.kind == SNNCONV_SETTLE || layer.constant) layer.steps = 1;
        divide(task.kind == SNNCONV_SETTLE ? set.settle : set.sum, layer, block.threads);
        *layer.out.moves = layer.steps > 1;
    }
}

void max_pool(Pool pool, const Block &block) {
    pool.images = block.images;
    pool.steps = moves(pool.source) ? block.steps : 1;
    divide(LEVELS[block.level]->max_pool, pool, block.threads);
    *pool.out.moves = pool.steps > 1;
}

} // namespace

int64_t snnconv_sizes(void) {
    return sizeof(Layer) + sizeof(Branch) + sizeof(Pool) + sizeof(Task) + sizeof(Block);
}

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

void snnconv_run(const Task *tasks, int count, const Block *block) {
    for (const Task *task = tasks; task < tasks + count; task++)
        if (task->kind == SNNCONV_MAX_POOL)
            max_pool(*static_cast<const Pool *>(task->work), *block);
        else
            run(*static_cast<const Layer *>(task->work), *task, *block);
}
