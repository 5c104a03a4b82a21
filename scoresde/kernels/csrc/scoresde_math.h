// The arithmetic of the kernels: counter-based noise, conversions, the Langevin rule. It compiles under nvcc, NVRTC and
// g++ (C++17) with no other header, so what a GPU runs is tested on a CPU. Where the two differ is marked
// __CUDA_ARCH__: one instruction there, the same function bit by bit or correctly rounded here.
#pragma once

#if defined(__CUDACC__)
#define SHARED_FUNCTION static __host__ __device__ __forceinline__
#else
#define SHARED_FUNCTION static inline
#endif

namespace scoresde {

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- floating point ----

SHARED_FUNCTION u32 bits_of(float x)
{
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    u32 bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

SHARED_FUNCTION float float_of(u32 bits)
{
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

SHARED_FUNCTION float absolute(float x)
{
#if defined(__CUDA_ARCH__)
    return fabsf(x);
#else
    return __builtin_fabsf(x);
#endif
}

// a b + c, rounded once
SHARED_FUNCTION float multiply_add(float a, float b, float c)
{
#if defined(__CUDA_ARCH__)
    return fmaf(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

SHARED_FUNCTION double multiply_add(double a, double b, double c)
{
#if defined(__CUDA_ARCH__)
    return fma(a, b, c);
#else
    return __builtin_fma(a, b, c);
#endif
}

// sqrt of 0 or of a normal number; on the GPU one instruction with a relative error of at most 2^-23
SHARED_FUNCTION float fast_sqrt(float x)
{
#if defined(__CUDA_ARCH__)
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#else
    return __builtin_sqrtf(x);
#endif
}

SHARED_FUNCTION double exact_sqrt(double x)
{
#if defined(__CUDA_ARCH__)
    return sqrt(x);
#else
    return __builtin_sqrt(x);
#endif
}

// ---- the types of tensors: halves are computed with in float and rounded to nearest even; NaN stays NaN ----

struct Half {
    u16 bits;
};

struct Bfloat16 {
    u16 bits;
};

SHARED_FUNCTION float widen(float x) { return x; }
SHARED_FUNCTION double widen(double x) { return x; }
SHARED_FUNCTION float widen(Bfloat16 x) { return float_of(static_cast<u32>(x.bits) << 16); }

SHARED_FUNCTION float widen(Half x)
{
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    const u32 sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));  // subnormal: a multiple of 2^-24
#endif
}

SHARED_FUNCTION void narrow(float x, float& y) { y = x; }
SHARED_FUNCTION void narrow(double x, double& y) { y = x; }

SHARED_FUNCTION void narrow(float x, Bfloat16& y)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const u32 bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        y.bits = static_cast<u16>(bits >> 16 | 0x40u);
    else
        y.bits = static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

SHARED_FUNCTION void narrow(float x, Half& y)
{
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const u32 sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        y.bits = static_cast<u16>(sign | 0x7e00u);
    else if (magnitude >= 0x477ff000u)  // 65520 is nearer to 2^16 than to the largest half, 65504
        y.bits = static_cast<u16>(sign | 0x7c00u);
    else if (magnitude >= 0x38800000u)
        y.bits = static_cast<u16>(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
    else  // below 2^-14: the floats of [1/2, 1) have the spacing of the subnormal halves, 2^-24
        y.bits = static_cast<u16>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
#endif
}

// ---- four neighbouring elements, read and written in one access of 8 or 16 bytes (two for double) ----

template <class Scalar>
struct alignas(sizeof(Scalar) == 2 ? 8 : 16) Packed {
    Scalar v[4];
};

// halves as pairs of 32 bits: the GPU shifts them apart and rounds two at a time
template <>
struct alignas(8) Packed<Half> {
    u32 v[2];
};

template <>
struct alignas(8) Packed<Bfloat16> {
    u32 v[2];
};

template <class Scalar>
SHARED_FUNCTION void unpack(const Packed<Scalar>& from, Scalar (&x)[4])
{
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) x[lane] = from.v[lane];
}

SHARED_FUNCTION void unpack(const Packed<Bfloat16>& from, float (&x)[4])
{
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
        x[2 * pair] = float_of(from.v[pair] << 16);
        x[2 * pair + 1] = float_of(from.v[pair] & 0xffff0000u);
    }
}

SHARED_FUNCTION void unpack(const Packed<Half>& from, float (&x)[4])
{
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
        x[2 * pair] = widen(Half{static_cast<u16>(from.v[pair])});
        x[2 * pair + 1] = widen(Half{static_cast<u16>(from.v[pair] >> 16)});
    }
}

template <class Scalar>
SHARED_FUNCTION void pack(const Scalar (&x)[4], Packed<Scalar>& to)
{
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) to.v[lane] = x[lane];
}

// the bits of two halves, that of `low` in the low 16
SHARED_FUNCTION u32 pair_of(float low, float high, Half)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high));
    return pair;
#else
    Half first, second;
    narrow(low, first);
    narrow(high, second);
    return first.bits | static_cast<u32>(second.bits) << 16;
#endif
}

SHARED_FUNCTION u32 pair_of(float low, float high, Bfloat16)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high));
    return pair;
#else
    Bfloat16 first, second;
    narrow(low, first);
    narrow(high, second);
    return first.bits | static_cast<u32>(second.bits) << 16;
#endif
}

SHARED_FUNCTION void pack(const float (&x)[4], Packed<Half>& to)
{
    to = {{pair_of(x[0], x[1], Half()), pair_of(x[2], x[3], Half())}};
}

SHARED_FUNCTION void pack(const float (&x)[4], Packed<Bfloat16>& to)
{
    to = {{pair_of(x[0], x[1], Bfloat16()), pair_of(x[2], x[3], Bfloat16())}};
}

// ---- integers ----

// the high half of a b
SHARED_FUNCTION u32 multiply_high(u32 a, u32 b)
{
#if defined(__CUDA_ARCH__)
    return __umulhi(a, b);
#else
    return static_cast<u32>(static_cast<u64>(a) * b >> 32);
#endif
}

// n / divisor for n < 2^31 (Granlund & Montgomery 1994, fig. 4.1): shift = ceil(log2 divisor),
// magic = floor(2^32 (2^shift - divisor)/divisor) + 1
struct Division {
    u32 divisor, magic, shift;
};

SHARED_FUNCTION u32 divide(u32 n, Division by)
{
    return (multiply_high(n, by.magic) + n) >> by.shift;
}

struct Words {
    u32 w[4];
};

// Where the noise of a sample is to be found: counter (quad, row, draw) under key seed.
struct Stream {
    u64 seed, draw;
    u32 row;
};

// Philox4x32-10 (Salmon et al. 2011, sec. 3.3; the constants are the paper's)
SHARED_FUNCTION Words philox(const Stream& stream, u32 quad)
{
    u32 c0 = quad, c1 = stream.row, c2 = static_cast<u32>(stream.draw), c3 = static_cast<u32>(stream.draw >> 32);
    u32 k0 = static_cast<u32>(stream.seed), k1 = static_cast<u32>(stream.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u32 high0 = multiply_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const u32 high1 = multiply_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// ---- normals ----

// -2 log u of a normal u in (0, 1], relative error below 2^-23: u = m 2^e with m in [2/3, 4/3), and a minimax
// polynomial for (-2 log m + 2 (m - 1))/(m - 1)^2 (error of the whole: 2^-25 before rounding)
SHARED_FUNCTION float minus_two_log(float u)
{
    const u32 bits = bits_of(u), exponent = (bits - 0x3f2aaaabu) & 0xff800000u;
    const float f = float_of(bits - exponent) - 1.0f;
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
SHARED_FUNCTION float cos_pi(float y)
{
    const float s = y * y;
    float p = -0x1.889edap-6f;
    p = multiply_add(p, s, 0x1.e0a1dcp-3f);
    p = multiply_add(p, s, -0x1.55cd26p+0f);
    p = multiply_add(p, s, 0x1.03c1d4p+2f);
    p = multiply_add(p, s, -0x1.3bd3ccp+2f);
    return multiply_add(p, s, 1.0f);
}

SHARED_FUNCTION float flip_sign(float x, u32 by)
{
    return float_of(bits_of(x) ^ (by & 0x80000000u));
}

// Box & Muller (1958): two normals of two words, r (cos, sin)(pi v) with r = sqrt(-2 log u), u = w0 2^-32 + 2^-33 in
// (0, 1], v = w1 2^-31 in [-1, 1] (w1 signed)
SHARED_FUNCTION void box_muller(u32 w0, u32 w1, float& z0, float& z1)
{
    const float r = fast_sqrt(minus_two_log(multiply_add(static_cast<float>(w0), 0x1p-32f, 0x1p-33f)));
    const float v = static_cast<float>(static_cast<int>(w1)) * 0x1p-31f;
    // with a = 1/2 - |v| and b = 1/2 - |a| both cosines have |argument| <= pi/2:
    // cos(pi v) = sign(a) cos(pi b), sin(pi v) = sign(v) cos(pi a)
    const float a = 0.5f - absolute(v);
    const float b = 0.5f - absolute(a);
    z0 = flip_sign(r * cos_pi(b), bits_of(a));
    z1 = flip_sign(r * cos_pi(a), w1);
}

// the four normals 4 quad ... 4 quad + 3 of a stream
SHARED_FUNCTION void normals(const Stream& stream, u32 quad, float (&z)[4])
{
    const Words words = philox(stream, quad);
    box_muller(words.w[0], words.w[1], z[0], z[1]);
    box_muller(words.w[2], words.w[3], z[2], z[3]);
}

// the four signs 4 quad ... 4 quad + 3: bit e & 31 of word e >> 5, one block of the generator for 32 quads
template <class Real>
SHARED_FUNCTION void signs(const Stream& stream, u32 quad, Real (&z)[4])
{
    const Words words = philox(stream, quad >> 5);
    const u32 low = quad & 8u ? words.w[1] : words.w[0], high = quad & 8u ? words.w[3] : words.w[2];
    const u32 word = (quad & 16u ? high : low) >> (quad & 7u) * 4;
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) z[lane] = word >> lane & 1u ? Real(1) : Real(-1);
}

// ---- the Langevin rule ----

// h/sigma^2 = min(2 snr^2 (z2 + 64)/(eps2 + 64), 1) with z2 = |z|^2 or its mean and eps2 = |eps_hat|^2; NaN stays NaN
SHARED_FUNCTION double langevin_ratio(double snr, double z2, double eps2)
{
    const double ratio = 2 * snr * snr * ((z2 + 64) / (eps2 + 64));
    return ratio > 1 ? 1 : ratio;
}

}  // namespace scoresde
