// The fused updates. A thread owns a few quads of one sample; a quad is 4 neighbouring elements and one block of the noise
// generator. scoresde/kernels/cuda.py mirrors the structs, chooses the grid and says what each kernel computes.
//
// Compiled once per type of the tensors, with -DSCORESDE_SCALAR=0 float | 1 double | 2 half | 3 bfloat16. Arithmetic is in
// float (double for double); coefficients arrive in float64.
#include "scoresde_math.h"

using namespace scoresde;

#if SCORESDE_SCALAR == 0
typedef float Scalar;
#elif SCORESDE_SCALAR == 1
typedef double Scalar;
#elif SCORESDE_SCALAR == 2
typedef Half Scalar;
#elif SCORESDE_SCALAR == 3
typedef Bfloat16 Scalar;
#endif

#if SCORESDE_SCALAR == 1
typedef double Real;
#else
typedef float Real;
#endif

#define BLOCK 128
#define DEVICE static __device__ __forceinline__
// blocks that a multiprocessor is to hold at once, which is what its 65,536 registers are shared out to
#define KERNEL(blocks) extern "C" __global__ void __launch_bounds__(BLOCK, sizeof(Real) == 8 ? 4 : blocks)

// ---- arguments ----

// one number for all samples (stride 0) or one for each; null: 1
struct Coefficient {
    const double* values;
    long long stride;
};

// where the noise of a batch is to be found; seeds null: no noise
struct Noise {
    const long long *seeds, *draws;
    long long seed_stride, draw_stride, draw;
    u32 row, row_stride;
};

// How the elements of a batch lie in memory and are shared out. Element c inner + hw of a sample is at offset
// hw channels + c of it (channels 1: contiguous). Thread i has quads first, first + step, … of its sample.
struct Layout {
    u32 samples, elements, quads;  // elements and quads of one sample
    u32 vector;                    // contiguous, whole quads, aligned: one access per quad
    u32 rows;                      // inner/4 where the quads of channels-last samples keep to a channel, else 0
    Division threads;              // threads per sample
    Division inner, channels;
};

// ---- who does what ----

struct Share {
    u32 sample, first, step;
    bool any;
};

DEVICE Share share_of(const Layout& layout, u32 thread)
{
    const u32 sample = divide(thread, layout.threads);
    return {sample, thread - sample * layout.threads.divisor, layout.threads.divisor, sample < layout.samples};
}

DEVICE Real value(const Coefficient& of, u32 sample)
{
    return of.values ? static_cast<Real>(of.values[sample * of.stride]) : 1;
}

DEVICE Stream stream_of(const Noise& noise, u32 sample)
{
    if (!noise.seeds) return {0, 0, 0};
    return {static_cast<u64>(noise.seeds[sample * noise.seed_stride]),
            static_cast<u64>(noise.draws[sample * noise.draw_stride] + noise.draw), noise.row + sample * noise.row_stride};
}

// ---- memory ----

struct Spot {
    u32 quad;
    u32 offset[4];  // of its elements within the sample, where they are not read in one access
    bool has[4];    // whether there is such an element
};

// The quads of channels-last samples are taken in the order of memory, so that neighbouring threads touch neighbours.
// A thread with no quad left is sent to the quad `instead`, which it may read but has no elements to write.
template <bool vector>
DEVICE Spot locate(const Layout& layout, u32 index, u32 instead)
{
    const bool here = index < layout.quads;
    Spot spot;
    spot.quad = here ? index : instead;
    if (!vector && layout.rows) {
        const u32 row = divide(spot.quad, layout.channels);
        spot.quad = (spot.quad - row * layout.channels.divisor) * layout.rows + row;
    }
    const u32 element = 4 * spot.quad;
    u32 channel = vector ? 0 : divide(element, layout.inner), hw = element - channel * layout.inner.divisor;
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
        spot.has[lane] = vector ? here : here && element + lane < layout.elements;
        spot.offset[lane] = hw * layout.channels.divisor + channel;
        if (++hw == layout.inner.divisor) {
            hw = 0;
            ++channel;
        }
    }
    return spot;
}

template <bool vector>
DEVICE void read(const Scalar* sample, const Spot& spot, Real (&x)[4])
{
    if (vector) {
        const Packed<Scalar> packed = reinterpret_cast<const Packed<Scalar>*>(sample)[spot.quad];
        unpack(packed, x);
    } else {
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) x[lane] = spot.has[lane] ? widen(sample[spot.offset[lane]]) : 0;
    }
}

template <bool vector>
DEVICE void write(Scalar* sample, const Spot& spot, const Real (&x)[4])
{
    if (vector) {
        Packed<Scalar> packed;
        pack(x, packed);
        if (spot.has[0]) reinterpret_cast<Packed<Scalar>*>(sample)[spot.quad] = packed;
    } else {
#pragma unroll
        for (int lane = 0; lane < 4; ++lane)
            if (spot.has[lane]) narrow(x[lane], sample[spot.offset[lane]]);
    }
}

DEVICE void noise_at(const Stream& stream, u32 quad, Real (&z)[4])
{
    float normal[4];
    normals(stream, quad, normal);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) z[lane] = normal[lane];
}

// ---- lincomb: out = sum of coefficients[i] inputs[i] + std z; out may be one of the inputs ----

struct Lincomb {
    Layout layout;
    Scalar* out;
    const Scalar* inputs[5];
    Coefficient coefficients[5], std;
    Noise noise;
};

// quads that a thread has in flight: enough loads to cover the latency of memory, few enough registers
template <int inputs>
struct InFlight {
    static const int quads = inputs <= 2 ? 2 : 1;
};

template <int n, bool vector>
DEVICE void combine(const Lincomb& args, const Share& share)
{
    constexpr int width = vector ? InFlight<n>::quads : 1, slots = n > 0 ? n : 1;
    const u64 start = static_cast<u64>(share.sample) * args.layout.elements;
    const Scalar* inputs[slots] = {};
    Real c[slots] = {};
#pragma unroll
    for (int i = 0; i < n; ++i) {
        inputs[i] = args.inputs[i] + start;
        c[i] = value(args.coefficients[i], share.sample);
    }
    Scalar* const out = args.out + start;
    const bool noisy = args.noise.seeds;
    const Real std = noisy ? value(args.std, share.sample) : 0;
    const Stream stream = stream_of(args.noise, share.sample);

    for (u32 index = share.first; index < args.layout.quads; index += width * share.step) {
        Spot spot[width];
        Real x[width][slots][4], sum[width][4] = {};
#pragma unroll
        for (int k = 0; k < width; ++k) {
            spot[k] = locate<vector>(args.layout, index + k * share.step, index);
#pragma unroll
            for (int i = 0; i < n; ++i) read<vector>(inputs[i], spot[k], x[k][i]);
        }
        if (noisy) {
#pragma unroll
            for (int k = 0; k < width; ++k) noise_at(stream, spot[k].quad, sum[k]);
        }
#pragma unroll
        for (int k = 0; k < width; ++k) {
#pragma unroll
            for (int lane = 0; lane < 4; ++lane) {
                sum[k][lane] *= std;
#pragma unroll
                for (int i = 0; i < n; ++i) sum[k][lane] = multiply_add(c[i], x[k][i][lane], sum[k][lane]);
            }
            write<vector>(out, spot[k], sum[k]);
        }
    }
}

template <int n>
DEVICE void lincomb(const Lincomb& args)
{
    const Share share = share_of(args.layout, blockIdx.x * BLOCK + threadIdx.x);
    if (!share.any) return;
    if (args.layout.vector)
        combine<n, true>(args, share);
    else
        combine<n, false>(args, share);
}

KERNEL(7) lincomb_0(Lincomb args) { lincomb<0>(args); }
KERNEL(7) lincomb_1(Lincomb args) { lincomb<1>(args); }
KERNEL(7) lincomb_2(Lincomb args) { lincomb<2>(args); }
KERNEL(7) lincomb_3(Lincomb args) { lincomb<3>(args); }
KERNEL(6) lincomb_4(Lincomb args) { lincomb<4>(args); }
KERNEL(6) lincomb_5(Lincomb args) { lincomb<5>(args); }

// ---- perturb_and_target: noisy = alpha x0 + sigma z, target = p x0 + q z, z = eps or, where that is null, noise ----

struct Perturb {
    Layout layout;
    Scalar *noisy, *target;
    const Scalar *x0, *eps;
    Coefficient alpha, sigma, p, q;
    Noise noise;
};

template <bool vector>
DEVICE void perturb(const Perturb& args, const Share& share)
{
    constexpr int width = vector ? 2 : 1;
    const u64 start = static_cast<u64>(share.sample) * args.layout.elements;
    const Real alpha = value(args.alpha, share.sample), sigma = value(args.sigma, share.sample);
    const Real p = value(args.p, share.sample), q = value(args.q, share.sample);
    const Stream stream = stream_of(args.noise, share.sample);

    for (u32 index = share.first; index < args.layout.quads; index += width * share.step) {
        Spot spot[width];
        Real x0[width][4], eps[width][4];
#pragma unroll
        for (int k = 0; k < width; ++k) {
            spot[k] = locate<vector>(args.layout, index + k * share.step, index);
            read<vector>(args.x0 + start, spot[k], x0[k]);
            if (args.eps) read<vector>(args.eps + start, spot[k], eps[k]);
        }
#pragma unroll
        for (int k = 0; k < width; ++k) {
            Real noisy[4], target[4];
            if (!args.eps) noise_at(stream, spot[k].quad, eps[k]);
#pragma unroll
            for (int lane = 0; lane < 4; ++lane) {
                noisy[lane] = multiply_add(alpha, x0[k][lane], sigma * eps[k][lane]);
                target[lane] = multiply_add(p, x0[k][lane], q * eps[k][lane]);
            }
            write<vector>(args.noisy + start, spot[k], noisy);
            write<vector>(args.target + start, spot[k], target);
        }
    }
}

KERNEL(7) perturb_and_target(Perturb args)
{
    const Share share = share_of(args.layout, blockIdx.x * BLOCK + threadIdx.x);
    if (!share.any) return;
    if (args.layout.vector)
        perturb<true>(args, share);
    else
        perturb<false>(args, share);
}

// ---- sums of squares per sample, in two kernels and always in the same order: no atomics ----

// Each `group` (a power of two) of neighbouring threads leaves two sums in partials[group number]: the squares of
// a - p x0 - q z (x0 null: none; z: eps, or noise, or where both are null none), and of the noise.
struct Squares {
    Layout layout;
    u32 group;
    Real (*partials)[2];
    const Scalar *a, *x0, *eps;
    Coefficient p, q;
    Noise noise;
};

// the sums of a and of b over the group of a thread, in its first thread
template <class T>
DEVICE void reduce(T& a, T& b, u32 group)
{
    __shared__ T sums[2][BLOCK];
    const u32 thread = threadIdx.x;
    sums[0][thread] = a;
    sums[1][thread] = b;
    for (u32 half = group / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((thread & (group - 1)) < half) {
            sums[0][thread] += sums[0][thread + half];
            sums[1][thread] += sums[1][thread + half];
        }
    }
    a = sums[0][thread];
    b = sums[1][thread];
}

template <bool vector, bool residual>
DEVICE void add_squares(const Squares& args, const Share& share, Real& errors, Real& noises)
{
    constexpr int width = vector ? 2 : 1;
    const u64 start = static_cast<u64>(share.sample) * args.layout.elements;
    const bool noisy = args.noise.seeds;
    const Real p = residual && args.x0 ? value(args.p, share.sample) : 0;
    const Real q = residual ? value(args.q, share.sample) : 0;
    const Stream stream = stream_of(args.noise, share.sample);

    for (u32 index = share.first; index < args.layout.quads; index += width * share.step) {
        Spot spot[width];
        Real a[width][4], x0[width][4] = {}, z[width][4] = {};
#pragma unroll
        for (int k = 0; k < width; ++k) {
            spot[k] = locate<vector>(args.layout, index + k * share.step, index);
            read<vector>(args.a + start, spot[k], a[k]);
            if (residual && args.x0) read<vector>(args.x0 + start, spot[k], x0[k]);
            if (residual && args.eps) read<vector>(args.eps + start, spot[k], z[k]);
        }
#pragma unroll
        for (int k = 0; k < width; ++k) {
            if (noisy) noise_at(stream, spot[k].quad, z[k]);
#pragma unroll
            for (int lane = 0; lane < 4; ++lane) {
                if (!spot[k].has[lane]) continue;
                Real error = a[k][lane];
                if (residual) error = multiply_add(-q, z[k][lane], multiply_add(-p, x0[k][lane], error));
                errors = multiply_add(error, error, errors);
                if (!residual) noises = multiply_add(z[k][lane], z[k][lane], noises);
            }
        }
    }
}

template <bool residual>
DEVICE void squares(const Squares& args)
{
    const u32 thread = blockIdx.x * BLOCK + threadIdx.x;
    const Share share = share_of(args.layout, thread);
    Real errors = 0, noises = 0;
    if (share.any) {
        if (args.layout.vector)
            add_squares<true, residual>(args, share, errors, noises);
        else
            add_squares<false, residual>(args, share, errors, noises);
    }
    reduce(errors, noises, args.group);
    if (share.any && thread % args.group == 0) {
        args.partials[thread / args.group][0] = errors;
        args.partials[thread / args.group][1] = noises;
    }
}

// the squares of a and of the noise
KERNEL(7) norms(Squares args) { squares<false>(args); }

// the squares of a - p x0 - q z
KERNEL(7) squared_error(Squares args) { squares<true>(args); }

// What is made of the partial sums, `parts` for each sample, by `group` threads for each.
struct Finish {
    u32 samples, parts, group, measured;
    const Real (*partials)[2];
    Coefficient factor;
    double snr, elements;
    double *eps, *std;
    Real* loss;
};

DEVICE u32 total(const Finish& args, double& errors, double& noises)
{
    const u32 thread = blockIdx.x * BLOCK + threadIdx.x, sample = thread / args.group;
    errors = noises = 0;
    if (sample < args.samples) {
        for (u32 part = thread % args.group; part < args.parts; part += args.group) {
            const Real(&pair)[2] = args.partials[static_cast<u64>(sample) * args.parts + part];
            errors += pair[0];
            noises += pair[1];
        }
    }
    reduce(errors, noises, args.group);
    return thread % args.group == 0 ? sample : args.samples;
}

// the coefficients of a Langevin step of length h: -h/sigma of eps_hat and sqrt(2 h) of the noise; factor: sigma
KERNEL(7) finish_langevin(Finish args)
{
    double errors, noises;
    const u32 sample = total(args, errors, noises);
    if (sample >= args.samples) return;
    const double sigma = args.factor.values[sample * args.factor.stride];
    const double ratio = langevin_ratio(args.snr, args.measured ? noises : args.elements, errors);
    args.eps[sample] = -ratio * sigma;
    args.std[sample] = exact_sqrt(2 * ratio) * sigma;
}

// the mean square of a sample times its weight; factor: weight
KERNEL(7) finish_loss(Finish args)
{
    double errors, noises;
    const u32 sample = total(args, errors, noises);
    if (sample >= args.samples) return;
    args.loss[sample] = static_cast<Real>(args.factor.values[sample * args.factor.stride] * (errors / args.elements));
}

// ---- rademacher: fills with -1 and 1 ----

struct Signs {
    Layout layout;
    Scalar* out;
    Noise noise;
};

template <bool vector>
DEVICE void fill_signs(const Signs& args, const Share& share)
{
    const u64 start = static_cast<u64>(share.sample) * args.layout.elements;
    const Stream stream = stream_of(args.noise, share.sample);
    for (u32 index = share.first; index < args.layout.quads; index += share.step) {
        const Spot spot = locate<vector>(args.layout, index, index);
        Real x[4];
        signs(stream, spot.quad, x);
        write<vector>(args.out + start, spot, x);
    }
}

KERNEL(7) rademacher(Signs args)
{
    const Share share = share_of(args.layout, blockIdx.x * BLOCK + threadIdx.x);
    if (!share.any) return;
    if (args.layout.vector)
        fill_signs<true>(args, share);
    else
        fill_signs<false>(args, share);
}
