// The fused updates. A thread owns a few quads of one sample; a quad is 4 neighbouring elements and half a block of the
// noise generator. scoresde/kernels/arguments.py mirrors the structs and divides the work, and cuda.py launches.
//
// Compiled once per type of the tensors, with -DSCORESDE_SCALAR=0 float | 1 double | 2 half | 3 bfloat16. Arithmetic is
// in float (double for double); coefficients arrive in float64. The compiler unrolls every loop of constant length by
// itself, so that arrays stay in registers, which the tests check.
#include "scoresde_math.h"

namespace scoresde {

#define BLOCK 128
// `blocks`: how many a multiprocessor is to hold at once, and share its 65,536 registers among
#define KERNEL(blocks) extern "C" __global__ void __launch_bounds__(BLOCK, sizeof(Real) == 8 ? 4 : blocks)

// ---- arguments ----

// One number for all samples (stride 0) or one for each. If `values` is null it is `number`, which came with the launch.
struct Coefficient {
    const double* values;
    long long stride;
    double number;
};

// The address of the noise of a batch. If `seeds` is null there is no noise.
struct Noise {
    const long long *seeds, *draws;
    long long seed_stride, draw_stride, draw;
    u32 row, row_stride;
};

// How the elements of a batch lie in memory and are divided among threads. Element c inner + hw of a sample is at offset
// hw channels + c of it (channels 1: contiguous). Thread i has quads first, first + step, ... of its sample.
struct Layout {
    u32 samples, elements, quads;  // elements and quads of one sample
    u32 path;                      // a `Path`
    Division threads;              // per sample
    Division inner, channels;
};

// ---- who does what ----

struct Share {
    u32 sample, first, step;
    bool any;
};

DEVICE Share share_of(const Layout& layout)
{
    const u32 thread = blockIdx.x * BLOCK + threadIdx.x, sample = divide(thread, layout.threads);
    return {sample, thread - sample * layout.threads.divisor, layout.threads.divisor, sample < layout.samples};
}

DEVICE double exact_value(const Coefficient& of, u32 sample)
{
    return of.values ? of.values[sample * of.stride] : of.number;
}

DEVICE Real value(const Coefficient& of, u32 sample)
{
    return static_cast<Real>(exact_value(of, sample));
}

DEVICE Stream stream_of(const Noise& noise, u32 sample, u32 elements)
{
    if (!noise.seeds) return {0, 0, 0};
    const long long seed = noise.seeds[sample * noise.seed_stride];
    const long long draw = noise.draws[sample * noise.draw_stride] + noise.draw;
    const u64 row = noise.row + static_cast<u64>(sample) * noise.row_stride;
    return {static_cast<u64>(seed), static_cast<u64>(draw), row * elements};
}

// ---- memory ----

// How the quads of a batch are read and written:
// vector: in one access, as they are contiguous, whole and aligned;
// rows: with a fixed stride, as the batch is channels-last and each quad lies within a channel;
// scattered: element by element in all other cases, which need not be fast.
enum Path { vector, rows, scattered };

template <Path value>
struct At {
    static constexpr Path path = value;
};

// Calls `body` with the path of a layout as a constant, and the share of this thread, if it has one.
template <class Body>
DEVICE void by_path(const Layout& layout, Body body)
{
    const Share share = share_of(layout);
    if (!share.any) return;
    switch (layout.path) {
        case vector: return body(At<vector>(), share);
        case rows: return body(At<rows>(), share);
        default: return body(At<scattered>(), share);
    }
}

// A quad of a sample, and how many elements it has: 0 if the thread has no quad left.
struct Quad {
    u32 number, count;
    u32 offset;  // of its first element, in `rows`
};

// Quad `index` of a sample in the order of threads, which is that of memory. A thread with no quad left may read quad
// `instead`.
template <Path path>
DEVICE Quad quad_of(const Layout& layout, u32 index, u32 instead)
{
    const bool here = index < layout.quads;
    if (!here) index = instead;
    Quad quad = {index, here ? 4u : 0u, 0};
    if (path == rows) {
        const u32 row = divide(index, layout.channels), channel = index - row * layout.channels.divisor;
        quad.number = channel * (layout.inner.divisor / 4) + row;
        quad.offset = 4 * row * layout.channels.divisor + channel;
    }
    if (path == scattered && here && layout.elements - 4 * index < 4) quad.count = layout.elements - 4 * index;
    return quad;
}

// Quads of n inputs that a thread has in flight: enough loads to cover the latency of memory, few enough registers.
DEVICE constexpr int in_flight(Path path, int n)
{
    return path != scattered && n <= 2 ? 2 : 1;
}

// The distance of the quads that a thread has in flight. Two in `vector` are neighbours: they mostly share a block of
// noise, which is most of the work.
template <Path path, int width>
DEVICE u32 gap_of(const Share& share)
{
    return path == vector && width == 2 ? 1 : share.step;
}

// Where the elements of any quad lie within the sample.
DEVICE void offsets_of(const Layout& layout, const Quad& quad, u32 (&offsets)[4])
{
    u32 channel = divide(4 * quad.number, layout.inner), hw = 4 * quad.number - channel * layout.inner.divisor;
    for (u32 lane = 0; lane < 4; ++lane) {
        offsets[lane] = hw * layout.channels.divisor + channel;
        if (++hw == layout.inner.divisor) {
            hw = 0;
            ++channel;
        }
    }
}

// The elements of `width` quads of n tensors, given as pointers to a sample. All loads come before their first use.
template <Path path, int width, int n>
DEVICE void read(
    const Layout& layout, const Scalar* const (&samples)[n], const Quad (&quads)[width], Real (&x)[width][n][4])
{
    if (path == vector) {
        Packed packed[width][n];
        for (int k = 0; k < width; ++k)
            for (int i = 0; i < n; ++i)
                packed[k][i] = reinterpret_cast<const Packed*>(samples[i])[quads[k].number];
        for (int k = 0; k < width; ++k)
            for (int i = 0; i < n; ++i) unpack(packed[k][i], x[k][i]);
    } else if (path == rows) {
        for (int k = 0; k < width; ++k)
            for (int i = 0; i < n; ++i) {
                const Scalar* const first = samples[i] + quads[k].offset;
                for (u32 lane = 0; lane < 4; ++lane) x[k][i][lane] = widen(first[lane * layout.channels.divisor]);
            }
    } else {
        for (int k = 0; k < width; ++k) {
            u32 offsets[4];
            offsets_of(layout, quads[k], offsets);
            for (int i = 0; i < n; ++i)
                for (u32 lane = 0; lane < 4; ++lane)
                    x[k][i][lane] = lane < quads[k].count ? widen(samples[i][offsets[lane]]) : 0;
        }
    }
}

template <Path path, int width>
DEVICE void write(const Layout& layout, Scalar* sample, const Quad (&quads)[width], const Real (&x)[width][4])
{
    if (path == vector) {
        for (int k = 0; k < width; ++k) {
            Packed packed;
            pack(x[k], packed);
            if (quads[k].count) reinterpret_cast<Packed*>(sample)[quads[k].number] = packed;
        }
    } else if (path == rows) {
        for (int k = 0; k < width; ++k) {
            if (!quads[k].count) continue;
            Scalar* const first = sample + quads[k].offset;
            for (u32 lane = 0; lane < 4; ++lane) first[lane * layout.channels.divisor] = narrow(x[k][lane]);
        }
    } else {
        for (int k = 0; k < width; ++k) {
            u32 offsets[4];
            offsets_of(layout, quads[k], offsets);
            for (u32 lane = 0; lane < 4; ++lane)
                if (lane < quads[k].count) sample[offsets[lane]] = narrow(x[k][lane]);
        }
    }
}

template <bool of_signs, Path path, int width>
DEVICE void noise_of(const Stream& stream, const Quad (&quads)[width], Real (&z)[width][4])
{
    if (path == vector) return numbers<of_signs>(stream, stream.first / 4 + quads[0].number, z);
    constexpr int n = path == rows ? 1 : 2;
    for (int k = 0; k < width; ++k) {
        Real made[n][4];
        numbers<of_signs>(stream, stream.first / 4 + quads[k].number, made);
        // a row of an odd length may begin within a quad of the draw
        for (u32 turn = 0; path == scattered && turn < stream.first % 4; ++turn)
            for (int i = 0; i < 4 * n; ++i) made[i / 4][i % 4] = made[(i + 1) / 4 % n][(i + 1) % 4];
        for (int lane = 0; lane < 4; ++lane) z[k][lane] = made[0][lane];
    }
}

// ---- lincomb: out = sum of coefficients[i] inputs[i] + std z; out may be one of the inputs; z: normals or signs ----

struct Lincomb {
    Layout layout;
    Scalar* out;
    const Scalar* inputs[5];
    Coefficient coefficients[5], std;
    Noise noise;
};

template <int n, bool of_signs, Path path>
DEVICE void combine(const Lincomb& args, const Share& share)
{
    constexpr int width = in_flight(path, n), slots = n > 0 ? n : 1;
    const u64 start = static_cast<u64>(share.sample) * args.layout.elements;
    const Scalar* inputs[slots] = {};
    Real c[slots] = {};
    for (int i = 0; i < n; ++i) {
        inputs[i] = args.inputs[i] + start;
        c[i] = value(args.coefficients[i], share.sample);
    }
    const bool noisy = args.noise.seeds;
    const Real std = noisy ? value(args.std, share.sample) : 0;
    const Stream stream = stream_of(args.noise, share.sample, args.layout.elements);

    const u32 gap = gap_of<path, width>(share), first = gap == 1 ? width * share.first : share.first;
    for (u32 index = first; index < args.layout.quads; index += width * share.step) {
        Quad quads[width];
        Real x[width][slots][4], sum[width][4] = {};
        for (int k = 0; k < width; ++k) quads[k] = quad_of<path>(args.layout, index + k * gap, index);
        if (n > 0) read<path>(args.layout, inputs, quads, x);
        if (noisy) noise_of<of_signs, path>(stream, quads, sum);
        for (int k = 0; k < width; ++k)
            for (u32 lane = 0; lane < 4; ++lane) {
                sum[k][lane] *= std;
                for (int i = 0; i < n; ++i) sum[k][lane] = multiply_add(c[i], x[k][i][lane], sum[k][lane]);
            }
        write<path>(args.layout, args.out + start, quads, sum);
    }
}

template <int n, bool of_signs = false>
DEVICE void lincomb(const Lincomb& args)
{
    by_path(args.layout, [&](auto at, const Share& share) { combine<n, of_signs, at.path>(args, share); });
}

KERNEL(7) lincomb_0(Lincomb args) { lincomb<0>(args); }
KERNEL(7) lincomb_1(Lincomb args) { lincomb<1>(args); }
KERNEL(5) lincomb_2(Lincomb args) { lincomb<2>(args); }
KERNEL(6) lincomb_3(Lincomb args) { lincomb<3>(args); }
KERNEL(5) lincomb_4(Lincomb args) { lincomb<4>(args); }
KERNEL(5) lincomb_5(Lincomb args) { lincomb<5>(args); }
KERNEL(7) rademacher(Lincomb args) { lincomb<0, true>(args); }

// ---- sums of squares per sample, in two kernels and always in the same order: no atomics ----

// Each `group` (a power of two) of neighbouring threads leaves two sums of squares in partials[group number]: of a or
// a - z (z is eps or, where that is null, noise), and of the noise.
struct Squares {
    Layout layout;
    u32 group;
    Real (*partials)[2];
    const Scalar *a, *eps;
    Noise noise;
};

// The squares: of a alone, of a and of the noise, or of a - z.
enum Of { alone, and_noise, residual };

// Leaves the sums of a and of b over a group of threads in its first thread.
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

template <Of of, Path path>
DEVICE void add_squares(const Squares& args, const Share& share, Real& errors, Real& noises)
{
    // There is nothing to compute, so more loads have to be in flight.
    constexpr int width = of == alone && path != scattered ? 4 : in_flight(path, 2);
    const u64 start = static_cast<u64>(share.sample) * args.layout.elements;
    const Scalar* const a[1] = {args.a + start};
    const Scalar* const eps[1] = {args.eps ? args.eps + start : nullptr};
    const Stream stream = stream_of(args.noise, share.sample, args.layout.elements);

    const u32 gap = gap_of<path, width>(share), first = gap == 1 ? width * share.first : share.first;
    for (u32 index = first; index < args.layout.quads; index += width * share.step) {
        Quad quads[width];
        Real x[width][1][4], given[width][1][4] = {}, z[width][4] = {};
        for (int k = 0; k < width; ++k) quads[k] = quad_of<path>(args.layout, index + k * gap, index);
        read<path>(args.layout, a, quads, x);
        if (of == residual && args.eps)
            read<path>(args.layout, eps, quads, given);
        else if (of != alone)
            noise_of<false, path>(stream, quads, z);
        for (int k = 0; k < width; ++k)
            for (u32 lane = 0; lane < 4; ++lane) {
                const Real noise = of == residual && args.eps ? given[k][0][lane] : z[k][lane];
                const Real error = of == residual ? x[k][0][lane] - noise : x[k][0][lane];
                if (lane >= quads[k].count) continue;
                errors = multiply_add(error, error, errors);
                if (of == and_noise) noises = multiply_add(noise, noise, noises);
            }
    }
}

template <Of of>
DEVICE void squares(const Squares& args)
{
    Real errors = 0, noises = 0;
    by_path(args.layout, [&](auto at, const Share& share) { add_squares<of, at.path>(args, share, errors, noises); });
    reduce(errors, noises, args.group);
    const u32 thread = blockIdx.x * BLOCK + threadIdx.x;
    if (share_of(args.layout).any && thread % args.group == 0) {
        args.partials[thread / args.group][0] = errors;
        args.partials[thread / args.group][1] = noises;
    }
}

KERNEL(7) norms(Squares args) { squares<alone>(args); }
KERNEL(7) norms_and_noise(Squares args) { squares<and_noise>(args); }
KERNEL(6) squared_error(Squares args) { squares<residual>(args); }

// A result from partial sums: each sample has `parts` of them, and `group` threads.
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
    const double sigma = exact_value(args.factor, sample);
    const double ratio = langevin_ratio(args.snr, args.measured ? noises : args.elements, errors);
    args.eps[sample] = -ratio * sigma;
    args.std[sample] = sqrt(2 * ratio) * sigma;
}

// the mean square of a sample times its weight; factor: weight
KERNEL(7) finish_loss(Finish args)
{
    double errors, noises;
    const u32 sample = total(args, errors, noises);
    if (sample >= args.samples) return;
    args.loss[sample] = static_cast<Real>(exact_value(args.factor, sample) * (errors / args.elements));
}

}  // namespace scoresde
