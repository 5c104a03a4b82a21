// The arithmetic of the kernels: the type of the tensors, counter-based noise, the Langevin rule. What a GPU does in one
// instruction has its name in CUDA or stands in `instructions`; on a CPU, tests/emulator.cpp gives all of these the same
// values, bit by bit or correctly rounded, so what a GPU runs is tested without one.
#pragma once

#define DEVICE static __device__ __forceinline__

namespace scoresde {

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if SCORESDE_SCALAR == 1
typedef double Real;
#else
typedef float Real;
#endif

#if defined(__CUDACC__)
namespace instructions {

// sqrt of 0 or of a normal number, with a relative error of at most 2^-23
DEVICE float fast_sqrt(float x)
{
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
}

DEVICE float widen_half(u16 x)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}

// two floats rounded to nearest even, `low` in the low 16 bits; NaN stays NaN
DEVICE u32 narrow_half(float low, float high)
{
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high));
    return pair;
}

DEVICE u32 narrow_bfloat16(float low, float high)
{
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high));
    return pair;
}

}  // namespace instructions
#endif

// a b + c, rounded once
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// ---- the type of the tensors: halves are computed with in float ----
// `Packed` is four neighbouring elements, read and written in one access of 8 or 16 bytes (two for double).

#if SCORESDE_SCALAR < 2

typedef Real Scalar;

struct alignas(16) Packed {
    Scalar v[4];
};

DEVICE Real widen(Scalar x) { return x; }
DEVICE Scalar narrow(Real x) { return x; }

DEVICE void unpack(const Packed& from, Real (&x)[4])
{
    for (int lane = 0; lane < 4; ++lane) x[lane] = from.v[lane];
}

DEVICE void pack(const Real (&x)[4], Packed& to)
{
    for (int lane = 0; lane < 4; ++lane) to.v[lane] = x[lane];
}

#else

struct Scalar {
    u16 bits;
};

struct alignas(8) Packed {
    u32 v[2];  // pairs, which a GPU rounds in one instruction
};

#if SCORESDE_SCALAR == 2
DEVICE Real widen(Scalar x) { return instructions::widen_half(x.bits); }
DEVICE u32 narrow_pair(Real low, Real high) { return instructions::narrow_half(low, high); }
#else
DEVICE Real widen(Scalar x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
DEVICE u32 narrow_pair(Real low, Real high) { return instructions::narrow_bfloat16(low, high); }
#endif

DEVICE Scalar narrow(Real x) { return {static_cast<u16>(narrow_pair(x, 0))}; }

DEVICE void unpack(const Packed& from, Real (&x)[4])
{
    for (int lane = 0; lane < 4; ++lane) x[lane] = widen({static_cast<u16>(from.v[lane / 2] >> 16 * (lane % 2))});
}

DEVICE void pack(const Real (&x)[4], Packed& to)
{
    for (int pair = 0; pair < 2; ++pair) to.v[pair] = narrow_pair(x[2 * pair], x[2 * pair + 1]);
}

#endif

// ---- integers ----

// n / divisor for n < 2^31 (Granlund & Montgomery 1994, fig. 4.1): shift = ceil(log2 divisor),
// magic = floor(2^32 (2^shift - divisor)/divisor) + 1
struct Division {
    u32 divisor, magic, shift;
};

DEVICE u32 divide(u32 n, Division by) { return (__umulhi(n, by.magic) + n) >> by.shift; }

// Where the noise of a sample is to be found: element `first` of it has that number in its draw.
struct Stream {
    u64 seed, draw, first;
};

// Philox4x64-10 (Salmon et al. 2011, sec. 3.3; the constants are the paper's): the words of a block of a draw. NumPy
// counts on before it makes a block, so the first is that of counter 1.
DEVICE void philox(const Stream& stream, u64 block, u64 (&words)[4])
{
    u64 c0 = block + 1, c1 = stream.draw, c2 = 0, c3 = 0, k0 = stream.seed, k1 = 0;
    for (int round = 0; round < 10; ++round) {
        const u64 high = __umul64hi(c0, 0xD2E7470EE14C6C93u), low = c0 * 0xD2E7470EE14C6C93u;
        c0 = __umul64hi(c2, 0xCA5A826395121157u) ^ c1 ^ k0;
        c1 = c2 * 0xCA5A826395121157u;
        c2 = high ^ c3 ^ k1;
        c3 = low;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    const u64 made[4] = {c0, c1, c2, c3};
    for (int k = 0; k < 4; ++k) words[k] = made[k];
}

// ---- normals ----

// -2 log u of a normal u in (0, 1], relative error below 2^-23: u = m 2^e with m in [2/3, 4/3), and a minimax
// polynomial for (-2 log m + 2 (m - 1))/(m - 1)^2 (error of the whole: 2^-25 before rounding)
DEVICE float minus_two_log(float u)
{
    const u32 bits = __float_as_uint(u), exponent = (bits - 0x3f2aaaabu) & 0xff800000u;
    const float f = __uint_as_float(bits - exponent) - 1.0f;
    float p = -0x1.1f243cp-2f;
    p = multiply_add(p, f, 0x1.3b0e5cp-2f);
    p = multiply_add(p, f, -0x1.1ea94cp-2f);
    p = multiply_add(p, f, 0x1.503884p-2f);
    p = multiply_add(p, f, -0x1.99d3a8p-2f);
    p = multiply_add(p, f, 0x1.00145p-1f);
    p = multiply_add(p, f, -0x1.5554fcp-1f);
    p = multiply_add(p, f, 0x1.ffffd6p-1f);
    const float log_m = multiply_add(f * f, p, -2.0f * f);
    // exponent holds e 2^23: times -2 log 2 * 2^-23
    return multiply_add(static_cast<float>(static_cast<int>(exponent)), -0x1.62e43p-23f, log_m);
}

// cos(pi y) for |y| <= 1/2, absolute error below 2^-23: 1 + s P(s), s = y^2, P minimax (2^-29 before rounding)
DEVICE float cos_pi(float y)
{
    const float s = y * y;
    float p = -0x1.889edap-6f;
    p = multiply_add(p, s, 0x1.e0a1dcp-3f);
    p = multiply_add(p, s, -0x1.55cd26p+0f);
    p = multiply_add(p, s, 0x1.03c1d4p+2f);
    p = multiply_add(p, s, -0x1.3bd3ccp+2f);
    return multiply_add(p, s, 1.0f);
}

DEVICE float flip_sign(float x, u32 by) { return __uint_as_float(__float_as_uint(x) ^ (by & 0x80000000u)); }

// Box & Muller (1958): two normals of two words, r (cos, sin)(pi v) with r = sqrt(-2 log u), u = w0 2^-32 + 2^-33 in
// (0, 1], v = w1 2^-31 in [-1, 1] (w1 signed)
DEVICE void box_muller(u32 w0, u32 w1, Real& z0, Real& z1)
{
    const float r = instructions::fast_sqrt(minus_two_log(multiply_add(static_cast<float>(w0), 0x1p-32f, 0x1p-33f)));
    const float v = static_cast<float>(static_cast<int>(w1)) * 0x1p-31f;
    // with a = 1/2 - |v| and b = 1/2 - |a| both cosines have |argument| <= pi/2:
    // cos(pi v) = sign(a) cos(pi b), sin(pi v) = sign(v) cos(pi a)
    const float a = 0.5f - fabsf(v);
    const float b = 0.5f - fabsf(a);
    z0 = flip_sign(r * cos_pi(b), __float_as_uint(a));
    z1 = flip_sign(r * cos_pi(a), w1);
}

// the normals of half a block: one word has two u, the other their v
DEVICE void normals(const u64 (&words)[4], bool second, Real (&z)[4])
{
    const u64 u = second ? words[2] : words[0], v = second ? words[3] : words[1];
    box_muller(static_cast<u32>(u), static_cast<u32>(v), z[0], z[2]);
    box_muller(static_cast<u32>(u >> 32), static_cast<u32>(v >> 32), z[1], z[3]);
}

// four of the 256 signs of a block: bit e & 63 of word e >> 6
DEVICE void signs(const u64 (&words)[4], u32 quad, Real (&z)[4])
{
    const u64 low = quad & 16u ? words[1] : words[0], high = quad & 16u ? words[3] : words[2];
    const u32 bits = static_cast<u32>((quad & 32u ? high : low) >> (quad & 15u) * 4);
    for (int lane = 0; lane < 4; ++lane) z[lane] = bits >> lane & 1u ? Real(1) : Real(-1);
}

// n neighbouring quads of a draw, numbers 4 quad ... 4 (quad + n) - 1; a block has 64 quads of signs, or 2 of normals
template <bool of_signs, int n>
DEVICE void numbers(const Stream& stream, u64 quad, Real (&z)[n][4])
{
    constexpr u32 of_block = of_signs ? 64 : 2;
    u64 words[4];
    for (int k = 0; k < n; ++k) {
        const u32 place = static_cast<u32>(quad + k) % of_block;
        if (k == 0 || place == 0) philox(stream, (quad + k) / of_block, words);
        of_signs ? signs(words, place, z[k]) : normals(words, place, z[k]);
    }
}

// ---- the Langevin rule ----

// h/sigma^2 = min(2 snr^2 (z2 + 64)/(eps2 + 64), 1) with z2 = |z|^2 or its mean and eps2 = |eps_hat|^2; NaN stays NaN
DEVICE double langevin_ratio(double snr, double z2, double eps2)
{
    const double ratio = 2 * snr * snr * ((z2 + 64) / (eps2 + 64));
    return ratio > 1 ? 1 : ratio;
}

}  // namespace scoresde
