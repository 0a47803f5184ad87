// The CUDA wing against the CPU wing, over shapes that hurt; and the simulator itself: what it claims to catch is
// planted here and must be caught. Compiled by g++ against dev/cudasim (make test-cudasim), where every operation runs
// in several orders of blocks, warps and lanes that must give the same bits; or by nvcc against a GPU
// (dev/gpu/check.sh), where the planted mistakes are left out. An argument selects tests by part of their name.
#include <stdarg.h>
#include <stdio.h>
#include <vector>
#include "cuda/cuda.cuh"
#include "cuda/fakequant.cuh"
#include "rng.h"
extern "C" {
#include "device.h"
}
#ifndef __CUDACC__
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

static int failures;
#define CHECK(cond, ...) \
    do { \
        if (!(cond) && failures++ < 5) {       /* a broken kernel fails everywhere: the first few tell */ \
            printf("  %s:%d: %s: ", __FILE__, __LINE__, #cond); \
            printf(__VA_ARGS__); \
            printf("\n"); \
        } \
    } while (0)

#ifdef __CUDACC__
static const int ORDERS = 1;
static void set_order(int) {}
#else
#ifdef __SANITIZE_ADDRESS__            // slow, and looks for other mistakes
static const int ORDERS = 2;
#else
static const int ORDERS = 4;           // ascending, descending, and two random ones
#endif
static void set_order(int order) { cudasim_set_order((unsigned)order); }
#endif

// ---------------------------------------------------------------------------------------------
// Arrays on both sides.

// Device memory for n values, `offset` values into its allocation, so that unaligned rows are tried too.
template <class T> struct Device {
    T *base = nullptr, *p = nullptr;
    size_t n = 0;
    Device(const std::vector<T> &host, size_t offset = 0) : Device(host.size(), offset) {
        CUDA_CHECK(cudaMemcpy(p, host.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    Device(size_t n_, size_t offset = 0) : n(n_) {
        CUDA_CHECK(cudaMalloc((void **)&base, (n + offset) * sizeof(T)));
        CUDA_CHECK(cudaMemset(base, 0xff, (n + offset) * sizeof(T)));
        p = base + offset;
    }
    Device(const Device &) = delete;
    ~Device() { CUDA_CHECK(cudaFree(base)); }
    std::vector<T> host() const {
        std::vector<T> h(n);
        CUDA_CHECK(cudaMemcpy(h.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return h;
    }
};

// Equal bits; any NaN equals any NaN, since processors differ in the one they make.
static bool same(float a, float b) { return f32_bits(a) == f32_bits(b) || (a != a && b != b); }
static float value(float a) { return a; }
#ifndef PRECISION_FP32
static float value(floatX a) { return x2f(a); }
#endif
static float value(uint8_t a) { return a; }

template <class T> static void check_same(const char *what, const char *where, const std::vector<T> &got,
                                          const std::vector<T> &want) {
    size_t bad = 0, first = 0;
    for (size_t i = 0; i < want.size(); i++)
        if (!same(value(got[i]), value(want[i])) && bad++ == 0) first = i;
    CHECK(bad == 0, "%s, %s: %zu of %zu differ, the first at %zu: %.9g, expected %.9g", where, what, bad, want.size(),
          first, (double)value(got[first]), (double)value(want[first]));
}

static float uniform(uint64_t stream, uint64_t i) {             // in [-1, 1)
    return 2.0f * philox_uniform(philox(7, stream, i).v[0]) - 1.0f;
}
static std::vector<floatX> random_x(size_t n, uint64_t stream, float scale) {
    std::vector<floatX> v(n);
    for (size_t i = 0; i < n; i++) v[i] = f2x(scale * uniform(stream, i));
    return v;
}

static QuantSpec spec(const char *text) {
    QuantSpec s;
    Err err;
    if (quant_spec_parse(&s, text, true, &err) != 0) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    return s;
}

// ---------------------------------------------------------------------------------------------
// Operations.

static const int row_shapes[][2] = {                            // rows, C: one value, odd, one vector, many vectors
    {1, 1}, {3, 7}, {2, 16}, {1, 33}, {5, 64}, {3, 100}, {4, 576}, {2, 2048}, {2, 2056}, {1, 30000}};
static const char *const act_specs[] = {
    "none", "int8,token,asymmetric", "int8,token,symmetric", "uint4,token,asymmetric", "int3,token,symmetric-no-clip"};

static void test_rmsnorm_fq(void) {
    for (auto &shape : row_shapes)
        for (const char *text : act_specs)
            for (int variant = 0; variant < 4; variant++) {
                // Variants: 0 plain; 1 with delta; 2 delta in place, unaligned; 3 nothing optional, large values.
                size_t N = (size_t)shape[0], n = N * (size_t)shape[1];
                int C = shape[1];
                QuantSpec s = spec(text);
                bool add = variant == 1 || variant == 2, in_place = variant == 2, bare = variant == 3;
                std::vector<floatX> x = random_x(n, 1, bare ? 300.0f : 2.0f), delta = random_x(n, 2, 1.0f),
                                    weight = random_x((size_t)C, 3, 1.5f), y(n), res(n);
                if (n > 50) x[n / 2] = f2x(40.0f);               // an outlier
                std::vector<float> rstd(N);
                std::vector<uint8_t> mask(n);
                size_t offset = variant == 2 ? 1 : 0;
                char where[96];
                for (int order = 0; order < ORDERS; order++) {
                    set_order(order);
                    snprintf(where, sizeof where, "N=%zu C=%d act=%s variant=%d order=%d", N, C, text, variant, order);
                    Device<floatX> dx(x, offset), dd(delta, offset), dw(weight, offset), dy(n, offset), dres(n, offset);
                    Device<float> drstd(N);
                    Device<uint8_t> dmask(n, offset);
                    ops_cuda.rmsnorm_fq_forward(!add ? nullptr : in_place ? dx.p : dres.p, dy.p,
                                                bare ? nullptr : drstd.p, bare ? nullptr : dmask.p, dx.p,
                                                add ? dd.p : nullptr, dw.p, N, C, 1e-5f, s.bits ? &s : nullptr);
                    std::vector<floatX> hx = x;
                    ops_cpu.rmsnorm_fq_forward(!add ? nullptr : in_place ? hx.data() : res.data(), y.data(),
                                               bare ? nullptr : rstd.data(), bare ? nullptr : mask.data(), hx.data(),
                                               add ? delta.data() : nullptr, weight.data(), N, C, 1e-5f,
                                               s.bits ? &s : nullptr);
                    check_same("y", where, dy.host(), y);
                    if (add) check_same("res", where, in_place ? dx.host() : dres.host(), in_place ? hx : res);
                    if (!bare) check_same("rstd", where, drstd.host(), rstd);
                    if (!bare) check_same("mask", where, dmask.host(), mask);
                }
            }
}

static void test_fakequant(void) {
    for (auto &shape : row_shapes)
        for (const char *text : act_specs)
            for (int variant = 0; variant < 3; variant++) {
                size_t N = (size_t)shape[0], n = N * (size_t)shape[1], offset = variant == 1 ? 1 : 0;
                int C = shape[1];
                QuantSpec s = spec(text);
                std::vector<floatX> x = random_x(n, 4, 3.0f), y(n);
                if (variant == 1) for (int c = 0; c < C; c++) x[(size_t)c] = f2x(0.0f);           // an all-zero row
                if (variant == 2) {
                    x[n / 2] = f2x(NAN);
                    x[n - 1] = f2x(-INFINITY);
                }
                std::vector<uint8_t> mask(n);
                ops_cpu.fakequant_forward(y.data(), mask.data(), x.data(), N, C, &s);
                for (int order = 0; order < ORDERS; order++) {
                    char where[96];
                    snprintf(where, sizeof where, "N=%zu C=%d act=%s variant=%d order=%d", N, C, text, variant, order);
                    set_order(order);
                    Device<floatX> dx(x, offset), dy(n, offset);
                    Device<uint8_t> dmask(n, offset);
                    ops_cuda.fakequant_forward(dy.p, dmask.p, dx.p, N, C, &s);
                    check_same("y", where, dy.host(), y);
                    check_same("mask", where, dmask.host(), mask);
                    ops_cuda.fakequant_forward(dx.p, nullptr, dx.p, N, C, &s);
                    check_same("y in place", where, dx.host(), y);
                }
            }
}

static const int matmul_shapes[][3] = {                         // N, C, OC
    {1, 1, 1}, {1, 16, 64}, {3, 7, 5}, {64, 64, 64}, {65, 17, 63}, {2, 576, 130}, {70, 100, 200}, {1, 1030, 3}};

// Out: floatX or float. The kernel must give the bits of its definition in matmul.cu, and lie within a bound of the CPU
// wing, whose library sums in an order of its own:
//   |sum - exact| <= (C + 1) 2^-24 S, S = sum |x w|, for any order of C products and additions, fused or not, on each;
//   wscale multiplies both and adds one rounding, 2^-24 |y| <= 2^-24 S |wscale|, on each; X = bf16 adds one of 2^-9 |y|
//   on each. Together 2 ((C + 2) 2^-24 + 2^-9) S |wscale|, the last term for bf16 outputs only.
template <class Out> using Linear = void (*)(Out *, const floatX *, const floatX *, const float *, size_t, int, int);
template <class Out> static void check_linear(Linear<Out> cuda, Linear<Out> cpu, const char *name) {
    for (auto &shape : matmul_shapes)
        for (int variant = 0; variant < 3; variant++) {          // plain; wscale; wscale and unaligned
            size_t N = (size_t)shape[0];
            int C = shape[1], OC = shape[2];
            size_t ny = N * (size_t)OC, offset = variant == 2 ? 1 : 0;
            std::vector<floatX> x = random_x(N * (size_t)C, 5, 1.0f), w = random_x((size_t)OC * C, 6, 0.5f);
            std::vector<float> wscale((size_t)OC);
            for (int o = 0; o < OC; o++) wscale[(size_t)o] = 0.01f * (1.0f + uniform(8, (uint64_t)o));
            const float *hs = variant ? wscale.data() : nullptr;
            std::vector<Out> want(ny), wing(ny);
            std::vector<double> bound(ny);
            double u = 1.0 / (1 << 24), rounding = sizeof(Out) == 2 ? 1.0 / 512 : 0.0;
            for (size_t n = 0; n < N; n++)
                for (int o = 0; o < OC; o++) {
                    float sum = 0.0f;
                    double size = 0.0;
                    for (int k = 0; k < C; k++) {
                        float a = x2f(x[n * (size_t)C + (size_t)k]), b = x2f(w[(size_t)o * (size_t)C + (size_t)k]);
                        sum = fmaf(a, b, sum);
                        size += fabs((double)a * b);
                    }
                    if (hs) { sum *= hs[o]; size *= fabs((double)hs[o]); }
                    size_t i = n * (size_t)OC + (size_t)o;
                    want[i] = sizeof(Out) == sizeof(floatX) ? (Out)f2x(sum) : (Out)sum;
                    bound[i] = 2.0 * ((C + 2) * u + rounding) * size;
                }
            cpu(wing.data(), x.data(), w.data(), hs, N, C, OC);
            for (int order = 0; order < ORDERS; order++) {
                char where[96];
                snprintf(where, sizeof where, "%s N=%zu C=%d OC=%d variant=%d order=%d", name, N, C, OC, variant,
                         order);
                set_order(order);
                Device<floatX> dx(x, offset), dw(w, offset);
                Device<Out> dy(ny, offset);
                Device<float> ds(wscale);
                cuda(dy.p, dx.p, dw.p, variant ? ds.p : nullptr, N, C, OC);
                std::vector<Out> y = dy.host();
                check_same("bits of the definition", where, y, want);
                size_t bad = 0, first = 0;
                for (size_t i = 0; i < ny; i++)
                    if (!(fabs((double)value(y[i]) - (double)value(wing[i])) <= bound[i]) && bad++ == 0) first = i;
                CHECK(bad == 0, "%s: %zu of %zu beyond the bound, the first at %zu: %.9g, CPU wing %.9g, bound %.3g",
                      where, bad, ny, first, (double)value(y[first]), (double)value(wing[first]), bound[first]);
            }
        }
}
static void test_linear(void) {
    check_linear<floatX>(ops_cuda.linear_forward, ops_cpu.linear_forward, "linear_forward");
}
static void test_linear_f32(void) {
    check_linear<float>(ops_cuda.linear_forward_f32, ops_cpu.linear_forward_f32, "linear_forward_f32");
}

// Every entry of the table is either absent or compared with the CPU wing above: a new kernel needs a new test.
static void test_table(void) {
    int there = 0;
#define COUNT(name) there += ops_cuda.name != nullptr;
    QLLM_OPS(COUNT)
#undef COUNT
    CHECK(there == 4, "ops_cuda has %d operations, and 4 are tested here", there);
}

// ---------------------------------------------------------------------------------------------
// The simulator's own arithmetic of lanes, against the definitions; the same on a GPU.

static __global__ void lanes_kernel(int *out, unsigned *ballots, int *total) {
    int t = (int)threadIdx.x, v = 100 + t;
    out[t] = __shfl_sync(FULL_WARP, v, 5);
    out[64 + t] = __shfl_up_sync(FULL_WARP, v, 3);
    out[128 + t] = __shfl_down_sync(FULL_WARP, v, 9, 16);
    out[192 + t] = __shfl_xor_sync(FULL_WARP, v, 6);
    double wide = __shfl_xor_sync(FULL_WARP, (double)v, 1);
    out[256 + t] = (int)wide;
    if (t % 32 < 10) ballots[t] = __ballot_sync(0x3ffu, t & 1);  // ten lanes apart from the rest
    else ballots[t] = (unsigned)(2 * __any_sync(0xfffffc00u, t == 44) + __all_sync(0xfffffc00u, t < 60));
    __syncwarp();
    atomicAdd(total, v);
    atomicMax(total + 1, v);
}

static void test_lanes(void) {
    for (int order = 0; order < ORDERS; order++) {
        set_order(order);
        Device<int> out(320), total(std::vector<int>(2, 0));
        Device<unsigned> ballots(64);
        LAUNCH(lanes_kernel, 1, 64, 0, cuda_stream)(out.p, ballots.p, total.p);
        CUDA_CHECK(cudaGetLastError());
        std::vector<int> o = out.host(), sum = total.host();
        std::vector<unsigned> b = ballots.host();
        for (int t = 0; t < 64; t++) {
            int l = t % 32, w = t - l + 100;
            CHECK(o[t] == w + 5, "shfl, thread %d: %d", t, o[t]);
            CHECK(o[64 + t] == w + (l < 3 ? l : l - 3), "shfl_up, thread %d: %d", t, o[64 + t]);
            CHECK(o[128 + t] == w + (l % 16 + 9 > 15 ? l : l + 9), "shfl_down, thread %d: %d", t, o[128 + t]);
            CHECK(o[192 + t] == w + (l ^ 6), "shfl_xor, thread %d: %d", t, o[192 + t]);
            CHECK(o[256 + t] == w + (l ^ 1), "shfl_xor of a double, thread %d: %d", t, o[256 + t]);
            unsigned want = l < 10 ? 0x2aau : t < 32 ? 1u : 2u;
            CHECK(b[t] == want, "votes, thread %d: %x, expected %x", t, b[t], want);
        }
        CHECK(sum[0] == 64 * 100 + 63 * 32 && sum[1] == 163, "atomics: %d, %d", sum[0], sum[1]);
    }
}

// A launch that the hardware refuses is an error that reaches ops_set_error's caller, and nothing runs.
static void test_refused_launch(void) {
    Device<int> out(1);
    LAUNCH(lanes_kernel, 1, 2048, 0, cuda_stream)(out.p, nullptr, out.p);
    cudaError_t e = cudaGetLastError();
    CHECK(e == cudaErrorInvalidConfiguration || e == cudaErrorInvalidValue, "a block of 2048 threads: %s",
          cudaGetErrorString(e));
    CHECK(cudaGetLastError() == cudaSuccess, "reading an error clears it");
}

#ifndef __CUDACC__
// ---------------------------------------------------------------------------------------------
// Planted mistakes: each must be caught, and its correct twin must not be.

// Reverses 64 values through shared memory. Without the barrier a thread may read before its partner has written.
template <bool BARRIER> static __global__ void reverse_kernel(float *y, const float *x) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}
// Rotates values twice. Without the second barrier a fast warp overwrites what a slow one has yet to read: that passes
// for a kernel whose shared memory is always initialized, and shows only in some orders.
template <bool BARRIER> static __global__ void rotate_kernel(float *y, const float *x) {
    __shared__ float s[64];
    float v = x[threadIdx.x];
    for (int i = 0; i < 2; i++) {
        s[threadIdx.x] = v;
        __syncthreads();
        v = s[(threadIdx.x + 32) % 64] + 1.0f;
        if (BARRIER) __syncthreads();
    }
    y[threadIdx.x] = v;
}
// Sums over a warp through shared memory, as was usual before lanes could run apart.
template <bool BARRIER> static __global__ void warp_sum_kernel(float *y, const float *x) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncwarp();
    float sum = 0.0f;
    for (int l = 0; l < 32; l++) sum += s[threadIdx.x / 32 * 32 + l];
    y[threadIdx.x] = sum;
}

// In how many of 8 orders the result is not the expected one.
static int wrong_orders(void (*kernel)(float *, const float *), const std::vector<float> &x,
                        const std::vector<float> &want) {
    int wrong = 0;
    for (int order = 0; order < 8; order++) {
        set_order(order);
        Device<float> dx(x), dy(x.size());
        LAUNCH(kernel, 1, 64, 0, cuda_stream)(dy.p, dx.p);
        std::vector<float> y = dy.host();
        wrong += memcmp(y.data(), want.data(), y.size() * sizeof(float)) != 0;
    }
    return wrong;
}

static void test_planted_missing_barrier(void) {
    std::vector<float> x(64), reversed(64), rotated(64), sums(64);
    for (int i = 0; i < 64; i++) x[i] = (float)i;
    for (int i = 0; i < 64; i++) reversed[i] = x[63 - i], rotated[i] = x[i] + 2.0f, sums[i] = i < 32 ? 496.0f : 1520.0f;
    CHECK(wrong_orders(reverse_kernel<true>, x, reversed) == 0, "the correct kernel");
    CHECK(wrong_orders(rotate_kernel<true>, x, rotated) == 0, "the correct kernel");
    CHECK(wrong_orders(warp_sum_kernel<true>, x, sums) == 0, "the correct kernel");
    CHECK(wrong_orders(rotate_kernel<false>, x, rotated) > 0, "an early overwrite shows in some order");
#ifndef __SANITIZE_ADDRESS__           // which takes the place of the poison
    CHECK(wrong_orders(reverse_kernel<false>, x, reversed) == 8, "a read before the write shows in every order");
    CHECK(wrong_orders(warp_sum_kernel<false>, x, sums) == 8, "lanes of a warp do not run in step");
#endif
}

// Runs `crime` in a child, which must die and say `word` (or be stopped by AddressSanitizer, saying `asan_word`).
static void check_dies(const char *name, void (*crime)(void), const char *word, const char *asan_word) {
    int pipe_fd[2];
    if (pipe(pipe_fd) != 0) exit(1);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(pipe_fd[1], 2);
        close(pipe_fd[0]);
        crime();
        _exit(0);
    }
    close(pipe_fd[1]);
    std::vector<char> text(1 << 16);
    size_t n = 0;
    for (ssize_t got; n + 1 < text.size() && (got = read(pipe_fd[0], &text[n], text.size() - 1 - n)) > 0;)
        n += (size_t)got;
    close(pipe_fd[0]);
    int status;
    waitpid(pid, &status, 0);
    CHECK(!(WIFEXITED(status) && WEXITSTATUS(status) == 0), "%s was not caught", name);
    CHECK(strstr(text.data(), word) || (asan_word && strstr(text.data(), asan_word)),
          "%s: expected \"%s\" in the message:\n%s", name, word, text.data());
}

static __global__ void read_past_kernel(float *y, const float *x, int n) { y[threadIdx.x] = x[n + (int)threadIdx.x]; }
static __global__ void write_past_kernel(float *y, int n) { y[n] = 1.0f; }
static __global__ void dyn_past_kernel(float *y, int n) {
    DYN_SHARED(float, s);
    y[0] = s[n];
}
static __global__ void uneven_barrier_kernel(float *y) {
    if (threadIdx.x < 32) {
        __syncthreads();
        y[0] = 1.0f;
    } else {
        __syncthreads();
    }
}
static __global__ void lane_outside_kernel(int *y) {
    if (threadIdx.x < 16) y[threadIdx.x] = __shfl_down_sync(0xffffu, (int)threadIdx.x, 8);
}
static __global__ void deadlock_kernel(int *y) {
    if (threadIdx.x == 0) __syncwarp();
    else __syncthreads();
    y[0] = 1;
}
static __global__ void deep_kernel(float *y) {
    volatile float big[100000];
    for (int i = 0; i < 100000; i += 512) big[i] = 1.0f;
    y[0] = big[512];
}

static void read_past(void) {
    Device<float> x(100), y(32);                                // 400 bytes: the end is at a page, no slack
    LAUNCH(read_past_kernel, 1, 32, 0, cuda_stream)(y.p, x.p, 100);
}
static void write_past(void) {
    Device<float> y(5);                                         // 20 bytes: 12 bytes of pattern follow
    LAUNCH(write_past_kernel, 1, 1, 0, cuda_stream)(y.p, 5);
}
static void dyn_past(void) {
    Device<float> y(1);
    LAUNCH(dyn_past_kernel, 1, 1, 64, cuda_stream)(y.p, 16);
}
static void uneven_barrier(void) {
    Device<float> y(1);
    LAUNCH(uneven_barrier_kernel, 1, 64, 0, cuda_stream)(y.p);
}
static void lane_outside(void) {
    Device<int> y(32);
    LAUNCH(lane_outside_kernel, 1, 32, 0, cuda_stream)(y.p);
}
static void deadlocked(void) {
    Device<int> y(32);
    LAUNCH(deadlock_kernel, 1, 32, 0, cuda_stream)(y.p);
}
static void deep(void) {
    Device<float> y(1);
    LAUNCH(deep_kernel, 1, 1, 0, cuda_stream)(y.p);
}
static void host_reads(void) {
    Device<float> y(4);
    exit(*(volatile float *)y.p == 1.0f ? 0 : 0);
}
static void host_pointer(void) {
    float x[4] = {};
    Device<float> y(4);
    LAUNCH(read_past_kernel, 1, 4, 0, cuda_stream)(y.p, x, 0);
}
static void after_free(void) {
    Device<float> y(4);
    float *p;
    CUDA_CHECK(cudaMalloc((void **)&p, 64));
    CUDA_CHECK(cudaFree(p));
    LAUNCH(read_past_kernel, 1, 4, 0, cuda_stream)(y.p, p, 0);
}

static void test_planted_out_of_bounds(void) {
    check_dies("a read past the end of device memory", read_past, "past the end", "AddressSanitizer");
    check_dies("a write past the end of device memory", write_past, "past the end", "AddressSanitizer");
    check_dies("a read past the end of dynamic shared memory", dyn_past, "past the end", "AddressSanitizer");
    check_dies("host code that reads device memory", host_reads, "copy it out first", "AddressSanitizer");
    check_dies("a host pointer given to a kernel", host_pointer, "is not device memory", nullptr);
    check_dies("a freed pointer given to a kernel", after_free, "(freed)", nullptr);
    check_dies("a stack that is too deep", deep, "below the stack", "AddressSanitizer");
}
#ifdef __SANITIZE_ADDRESS__
// The guards around static shared arrays are AddressSanitizer's, and so are those in the 15 bytes at an allocation's
// end.
static __global__ void static_past_kernel(float *y, int n) {
    __shared__ float s[8];
    float *p = s;
    p[threadIdx.x] = 1.0f;
    y[0] = p[n];
}
static void static_past(void) {
    Device<float> y(1);
    LAUNCH(static_past_kernel, 1, 1, 0, cuda_stream)(y.p, 8);
}
static void read_slack(void) {
    Device<float> x(5), y(1);
    LAUNCH(read_past_kernel, 1, 1, 0, cuda_stream)(y.p, x.p, 5);
}
static void test_planted_for_asan(void) {
    check_dies("a read past the end of a static shared array", static_past, "AddressSanitizer", "insufficient space");
    check_dies("a read just past the end of device memory", read_slack, "AddressSanitizer", nullptr);
}
#endif
static void test_planted_divergence(void) {
    check_dies("threads of one block at two barriers", uneven_barrier, "different barriers", nullptr);
    check_dies("a shuffle from a lane outside the mask", lane_outside, "not in the mask", nullptr);
    check_dies("lanes that wait for each other", deadlocked, "deadlock", nullptr);
}
#endif

static const struct { const char *name; void (*run)(void); } tests[] = {
    {"table", test_table},
    {"lanes", test_lanes},
    {"refused_launch", test_refused_launch},
    {"rmsnorm_fq", test_rmsnorm_fq},
    {"fakequant", test_fakequant},
    {"linear", test_linear},
    {"linear_f32", test_linear_f32},
#ifndef __CUDACC__
    {"planted_missing_barrier", test_planted_missing_barrier},
    {"planted_out_of_bounds", test_planted_out_of_bounds},
    {"planted_divergence", test_planted_divergence},
#ifdef __SANITIZE_ADDRESS__
    {"planted_for_asan", test_planted_for_asan},
#endif
#endif
};

int main(int argc, char **argv) {
    int failed = 0, run = 0;
    for (auto &t : tests) {
        if (argc > 1 && !strstr(t.name, argv[1])) continue;
        failures = 0;
        double start = now_seconds();
        t.run();
        Err err = {};
        int e = device_sync(&err);
        CHECK(e == 0, "an operation reported: %s", err.text);
        printf("%s %s %s %s (%.1f s)\n", failures ? "not ok" : "ok", ops_cuda.name, FLOATX_NAME, t.name,
               now_seconds() - start);
        fflush(stdout);
        failed += failures != 0;
        run++;
    }
    printf("%d of %d tests passed\n", run - failed, run);
    return failed != 0 || run == 0;
}
