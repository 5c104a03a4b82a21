// Runs the kernels of scoresde/kernels/csrc/kernels.cu on a CPU: the file itself, compiled by g++, one fiber for each
// thread of a block. Threads take turns at __syncthreads, blocks follow one another, all in one thread of the system.
#include <ucontext.h>

#include <math.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
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

// ---- what a GPU does in one instruction ----

static inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}

static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

namespace scoresde {
namespace instructions {

static inline float fast_sqrt(float x) { return sqrtf(x); }

static inline float widen_half(unsigned short x)
{
    const unsigned sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u) return __uint_as_float(sign | ((magnitude << 13) + 0x38000000u));
    // subnormal: a multiple of 2^-24
    return __uint_as_float(sign | __float_as_uint(static_cast<float>(magnitude) * 0x1p-24f));
}

static inline unsigned half_of(float x)
{
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000u, magnitude = __float_as_uint(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    // 65520 is nearer to 2^16 than to the largest half, 65504
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
    if (magnitude >= 0x38800000u)
        return sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    // below 2^-14: the floats of [1/2, 1) have the spacing of the subnormal halves, 2^-24
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u);
}

static inline unsigned bfloat16_of(float x)
{
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

static inline unsigned narrow_half(float low, float high) { return half_of(low) | half_of(high) << 16; }
static inline unsigned narrow_bfloat16(float low, float high) { return bfloat16_of(low) | bfloat16_of(high) << 16; }

}  // namespace instructions
}  // namespace scoresde

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

extern "C" void philox_words(u64 seed, u64 draw, u64 block, u64* words)
{
    philox({seed, draw, 0}, block, *reinterpret_cast<u64(*)[4]>(words));
}

extern "C" void box_muller_pairs(size_t n, const u32* words, Real* z)
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
    for (size_t i = 0; i < n; ++i) to[i] = narrow(from[i]);
}
