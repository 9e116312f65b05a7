// Choice of the instruction set, and threads.

#include "simd.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

#include <sys/types.h>
#include <unistd.h>

namespace {

const InstructionSet *const LEVELS[] = {
    &portable,
#if defined(__x86_64__)
    &avx2,
    &avx512,
#endif
};
constexpr int COUNT = sizeof LEVELS / sizeof *LEVELS;

// Leave the processor to its other thread for a moment.
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Hands out the pieces of one task after another. A thread that comes late finds less to do, and
// nobody waits for it.
class Pieces {
public:
    // Take a piece: the number of its task, and its own.
    std::pair<uint32_t, uint32_t> take() {
        const uint64_t ticket = tickets.fetch_add(1, std::memory_order_acq_rel);
        return {static_cast<uint32_t>(ticket >> 32), static_cast<uint32_t>(ticket)};
    }

    // Count a piece as done; return whether it was the last of the task.
    bool done(uint32_t pieces) {
        return finished.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces;
    }

    // Go on to the task after one of which all is done.
    void next(uint32_t task) {
        finished.store(0, std::memory_order_relaxed);
        {
            const std::lock_guard<std::mutex> lock(mutex);
            tickets.store(static_cast<uint64_t>(task + 1) << 32, std::memory_order_release);
        }
        changed.notify_all();
    }

    // Wait until a task is over, at first without falling asleep: a layer takes less.
    void wait(uint32_t task) {
        const auto over = [&] { return tickets.load(std::memory_order_acquire) >> 32 != task; };
        for (int turn = 0; turn < PATIENCE; turn++) {
            if (over()) return;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, over);
    }

private:
    static constexpr int PATIENCE = 1000;
    std::atomic<uint64_t> tickets{0};
    std::atomic<uint32_t> finished{0};
    std::mutex mutex;
    std::condition_variable changed;
};

// Threads that wait for work; to start one anew takes longer than a layer.
class Crew {
public:
    // The crew of the calling thread. It ends with the thread; a forked process has none of it.
    static Crew &of_this_thread() {
        thread_local std::unique_ptr<Crew, Dismissal> crew;
        if (!crew || crew->process != getpid()) {
            crew.release(); // not ours to end
            crew.reset(new Crew);
        }
        return *crew;
    }

    // Let so many threads work, this one among them. It waits for none that has not begun.
    void run(int threads, const std::function<void()> &work) {
        try {
            while (static_cast<int>(others.size()) < threads - 1)
                others.emplace_back([this] { wait_for_work(); });
        } catch (const std::exception &) { // there are no more threads to be had
        }
        {
            const std::lock_guard<std::mutex> lock(mutex);
            current = &work;
            places = threads - 1;
        }
        wanted.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex);
        places = 0;
        idle.wait(lock, [this] { return busy == 0; });
    }

private:
    struct Dismissal {
        void operator()(Crew *crew) const {
            if (crew->process == getpid()) delete crew;
        }
    };

    Crew() = default;

    ~Crew() {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            over = true;
        }
        wanted.notify_all();
        for (std::thread &other : others)
            other.join();
    }

    void wait_for_work() {
        std::unique_lock<std::mutex> lock(mutex);
        while (true) {
            wanted.wait(lock, [this] { return places > 0 || over; });
            if (over) return;
            places--;
            busy++;
            const std::function<void()> &work = *current;
            lock.unlock();
            work();
            lock.lock();
            if (--busy == 0) idle.notify_one();
        }
    }

    const pid_t process = getpid();
    std::vector<std::thread> others;
    std::mutex mutex;
    std::condition_variable wanted, idle;
    const std::function<void()> *current = nullptr;
    int places = 0, busy = 0; // threads that may still join in, and those that work
    bool over = false;
};

// Rows of all images, in pieces of no more than an image.
struct Cut {
    int rows, rows_of_piece;

    Cut(int images, int rows_of_image, int threads) : rows(images * rows_of_image) {
        const int few = rows / (threads * PIECES_OF_THREAD);
        rows_of_piece = few < 1 ? 1 : few < rows_of_image ? few : rows_of_image;
        if (threads == 1) rows_of_piece = rows;
    }

    uint32_t pieces() const { return (rows + rows_of_piece - 1) / rows_of_piece; }

    template <typename Work> void run(Rows<Work> run, const Work &work, uint32_t piece) const {
        const int first = static_cast<int>(piece) * rows_of_piece, end = first + rows_of_piece;
        run(work, first, end < rows ? end : rows);
    }

    static constexpr int PIECES_OF_THREAD = 4;
};

bool moves(const Planes &planes) { return planes.moves && *planes.moves; }

template <typename Number> bool any(const Number *numbers, int64_t count) {
    return std::any_of(numbers, numbers + count, [](Number n) { return n != 0; });
}

// A layer as it is in a block: what does not move has one step, which stands for all.
struct Ready {
    Layer layer;
    std::vector<Branch> branches;

    Ready(const Task &task, const Block &block)
        : layer(*static_cast<const Layer *>(task.work)),
          branches(layer.branches, layer.branches + layer.branch_count) {
        layer.branches = branches.data();
        layer.images = block.images;
        layer.constant = !layer.charge_step;
        for (Branch &branch : branches) {
            if (moves(branch.source))
                layer.constant = 0;
            else
                branch.source.step = 0;
        }
        const int64_t counters = static_cast<int64_t>(block.steps) * block.images * 2;
        layer.fired = block.fired + task.population * counters;
        const bool one = task.kind == SNNCONV_FIRE  ? !any(layer.fires, block.steps)
                         : task.kind == SNNCONV_SUM ? layer.constant
                                                    : true;
        layer.steps = one ? 1 : block.steps;
    }
};

// Do pieces of tasks until there are none; the last piece of a task says whether its planes move.
void help(const Task *tasks, uint32_t count, const Block &block, Pieces &pieces) {
    const InstructionSet &set = *LEVELS[block.level];
    uint32_t number, piece;
    std::tie(number, piece) = pieces.take();
    while (number < count) {
        const uint32_t current = number;
        const Task &task = tasks[current];
        const auto work_on = [&](auto run, const auto &work, int32_t *moves, const auto &moving) {
            const Cut cut(work.images, work.rows, block.threads);
            for (; number == current && piece < cut.pieces();
                 std::tie(number, piece) = pieces.take()) {
                cut.run(run, work, piece);
                if (pieces.done(cut.pieces())) {
                    *moves = moving();
                    pieces.next(current);
                }
            }
        };
        if (task.kind == SNNCONV_MAX_POOL) {
            Pool pool = *static_cast<const Pool *>(task.work);
            pool.images = block.images;
            pool.steps = moves(pool.source) ? block.steps : 1;
            work_on(set.max_pool, pool, pool.out.moves, [&] { return pool.steps > 1; });
        } else {
            const Ready ready(task, block);
            const Layer &layer = ready.layer;
            const int64_t counters = static_cast<int64_t>(layer.steps) * layer.images * 2;
            if (task.kind == SNNCONV_FIRE)
                work_on(set.fire, layer, layer.out.moves,
                        [&] { return any(layer.fired, counters); });
            else
                work_on(task.kind == SNNCONV_SETTLE ? set.settle : set.sum, layer, layer.out.moves,
                        [&] { return layer.steps > 1; });
        }
        if (number == current) {
            pieces.wait(current);
            std::tie(number, piece) = pieces.take();
        }
    }
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
    Pieces pieces;
    Crew::of_this_thread().run(block->threads,
                               [&] { help(tasks, static_cast<uint32_t>(count), *block, pieces); });
}
