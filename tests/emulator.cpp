// Runs the kernels of scoresde/kernels/csrc/kernels.cu on a CPU: the file itself, compiled by g++, one fiber for each
// thread of a block. Threads take turns at __syncthreads, blocks follow one another, all in one thread of the system.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

struct Dim {
    unsigned x;
};

static Dim threadIdx, blockIdx;

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)
void __syncthreads();

#include "kernels.cu"

using namespace scoresde;

namespace {

enum State { ready, waiting, done };

struct Fiber {
    ucontext_t context;
    State state;
    std::vector<char> stack = std::vector<char>(64 * 1024);
};

Fiber* current;
ucontext_t scheduler;
void (*body)(const void*);
const void* arguments;

void enter()
{
    body(arguments);
    current->state = done;
}

// One round of the block: every fiber that is not done runs to its next barrier or to its end. Returns how many wait.
unsigned run_round(std::vector<Fiber>& fibers, bool backwards)
{
    unsigned at_barrier = 0;
    for (unsigned i = 0; i < fibers.size(); ++i) {
        threadIdx.x = backwards ? fibers.size() - 1 - i : i;
        current = &fibers[threadIdx.x];
        if (current->state == done) continue;
        current->state = ready;
        swapcontext(&scheduler, &current->context);
        at_barrier += current->state == waiting;
    }
    return at_barrier;
}

// 0, or 1 where some threads of a block wait at a barrier that others never reach
int run_grid(unsigned grid, unsigned block, bool backwards)
{
    static std::vector<Fiber> fibers;
    fibers.resize(block);
    for (unsigned number = 0; number < grid; ++number) {
        blockIdx.x = backwards ? grid - 1 - number : number;
        for (Fiber& fiber : fibers) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, enter, 0);
            fiber.state = ready;
        }
        unsigned at_barrier;
        do {
            at_barrier = run_round(fibers, backwards);
            if (at_barrier != 0 && at_barrier != block) return 1;
        } while (at_barrier);
    }
    return 0;
}

template <class Args, void (*kernel)(Args)>
int emulate(unsigned grid, unsigned block, bool backwards, const void* args)
{
    body = [](const void* args) { kernel(*static_cast<const Args*>(args)); };
    arguments = args;
    return run_grid(grid, block, backwards);
}

}  // namespace

void __syncthreads()
{
    current->state = waiting;
    swapcontext(&current->context, &scheduler);
}

#define EMULATE(kernel, Args)                                                                                  \
    extern "C" int emulate_##kernel(unsigned grid, unsigned block, bool backwards, size_t size, const void* args) \
    {                                                                                                          \
        if (size != sizeof(Args)) return 2;                                                                    \
        return emulate<Args, kernel>(grid, block, backwards, args);                                            \
    }

EMULATE(lincomb_0, Lincomb)
EMULATE(lincomb_1, Lincomb)
EMULATE(lincomb_2, Lincomb)
EMULATE(lincomb_3, Lincomb)
EMULATE(lincomb_4, Lincomb)
EMULATE(lincomb_5, Lincomb)
EMULATE(norms, Squares)
EMULATE(norms_and_noise, Squares)
EMULATE(squared_error, Squares)
EMULATE(finish_langevin, Finish)
EMULATE(finish_loss, Finish)
EMULATE(rademacher, Lincomb)

// ---- the functions of the header, on arrays ----

extern "C" void philox_words(const u64* seed, const u32* counter, u32* words)
{
    const Stream stream = {*seed, counter[2] | static_cast<u64>(counter[3]) << 32, counter[1]};
    const Words result = philox(stream, counter[0]);
    for (int i = 0; i < 4; ++i) words[i] = result.w[i];
}

extern "C" void box_muller_pairs(size_t n, const u32* words, float* z)
{
    for (size_t i = 0; i < n; ++i) box_muller(words[2 * i], words[2 * i + 1], z[2 * i], z[2 * i + 1]);
}

extern "C" void quotients(size_t n, const u32* numbers, const Division* by, u32* quotients)
{
    for (size_t i = 0; i < n; ++i) quotients[i] = divide(numbers[i], *by);
}

extern "C" void widen_all(size_t n, const Scalar* from, Real* to)
{
    for (size_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

extern "C" void narrow_all(size_t n, const Real* from, Scalar* to)
{
    for (size_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}
