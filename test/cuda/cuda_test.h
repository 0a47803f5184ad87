// What the tests of the CUDA wing share: arrays on both sides, comparisons, and the count of operations that were
// tested. Compiled by g++ against dev/cudasim, where every operation runs in several orders of blocks, warps and lanes
// that must give the same bits (make test-cudasim); or by nvcc for a GPU (dev/gpu/check.sh).
//
// A test is CUDA_TEST(name) { ... }. It calls an operation as OP(name)(arguments): an operation counts as tested when
// some test called it, each call launched a kernel, and no test that called it failed.
#ifndef QLLM_CUDA_TEST_H
#define QLLM_CUDA_TEST_H
#include <stdarg.h>
#include <stdio.h>
#include <vector>
#include "cuda/cuda.cuh"
#include "rng.h"
extern "C" {
#include "device.h"
}

// Prints the first failures of a test; counts all.
void check_failed(const char *file, int line, const char *cond, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
#define CHECK(cond, ...) \
    do { \
        if (!(cond)) check_failed(__FILE__, __LINE__, #cond, __VA_ARGS__); \
    } while (0)

typedef void (*CudaTest)(void);
struct CudaTestEntry {
    CudaTestEntry(const char *name, CudaTest run);
};
#define CUDA_TEST(name) \
    static void test_##name(void); \
    static CudaTestEntry entry_##name(#name, test_##name); \
    static void test_##name(void)

enum OpIndex {
#define OP_INDEX(name) OP_##name,
    QLLM_OPS(OP_INDEX)
#undef OP_INDEX
    OP_COUNT
};
size_t kernels_launched(void);          // so far; 1 more each time on a GPU, where nobody counts
void op_called(int op, bool launched);
bool small_run(void);                   // QLLM_TEST_SMALL=1: small shapes, own kernels only
template <class... A> struct TestedOp {
    void (*f)(A...);
    int op;
    template <class... B> void operator()(B... b) const {
        CHECK(f, "the wing has no such operation");
        if (!f) return;
        size_t before = kernels_launched();
        f(b...);
        op_called(op, kernels_launched() > before);
    }
};
template <class... A> TestedOp<A...> tested_op(void (*f)(A...), int op) { return {f, op}; }
#define OP(name) tested_op(ops_cuda.name, OP_##name)

#ifndef __CUDACC__
// Runs `crime` in a child, which must die and say `word` (or be stopped by AddressSanitizer, saying `asan_word`).
void check_dies(const char *name, void (*crime)(void), const char *word, const char *asan_word);
#endif

#ifdef __CUDACC__
static const int ORDERS = 1;
static inline void set_order(int) {}
#else
#ifdef CUDASIM_RACE                    // finds what it looks for in any order
static const int ORDERS = 1;
#elif defined(__SANITIZE_ADDRESS__)    // slow, and looks for other mistakes
static const int ORDERS = 2;
#else
static const int ORDERS = 4;           // ascending, descending, and two random ones
#endif
static inline void set_order(int order) { cudasim_set_order((unsigned)order); }
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
static inline bool same(float a, float b) { return f32_bits(a) == f32_bits(b) || (a != a && b != b); }
static inline float value(float a) { return a; }
#ifndef PRECISION_FP32
static inline float value(floatX a) { return x2f(a); }
#endif
static inline float value(uint8_t a) { return a; }

template <class T> static void check_same(const char *what, const char *where, const std::vector<T> &got,
                                          const std::vector<T> &want) {
    size_t bad = 0, first = 0;
    for (size_t i = 0; i < want.size(); i++)
        if (!same(value(got[i]), value(want[i])) && bad++ == 0) first = i;
    CHECK(bad == 0, "%s, %s: %zu of %zu differ, the first at %zu: %.9g, expected %.9g", where, what, bad, want.size(),
          first, (double)value(got[first]), (double)value(want[first]));
}

static inline float uniform(uint64_t stream, uint64_t i) {             // in [-1, 1)
    return 2.0f * philox_uniform(philox(7, stream, i).v[0]) - 1.0f;
}
static inline std::vector<floatX> random_x(size_t n, uint64_t stream, float scale) {
    std::vector<floatX> v(n);
    for (size_t i = 0; i < n; i++) v[i] = f2x(scale * uniform(stream, i));
    return v;
}

static inline QuantSpec spec(const char *text, bool activation = true) {
    QuantSpec s;
    Err err;
    if (quant_spec_parse(&s, text, activation, &err) != 0) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    return s;
}


// In how many of 8 orders a block of 64 threads of kernel(y, x) does not give `want`.
static inline int wrong_orders(void (*kernel)(float *, const float *), const std::vector<float> &x,
                               const std::vector<float> &want) {
    int wrong = 0;
    for (int order = 0; order < 8; order++) {
        set_order(order);
        Device<float> dx(x), dy(want.size());
        LAUNCH(kernel, 1, 64, 0, cuda_stream)(dy.p, dx.p);
        std::vector<float> y = dy.host();
        wrong += memcmp(y.data(), want.data(), y.size() * sizeof(float)) != 0;
    }
    return wrong;
}

static const int row_shapes[][2] = {                            // rows, C: one value, odd, one vector, many vectors
    {1, 1}, {3, 7}, {2, 16}, {1, 33}, {5, 64}, {3, 100}, {4, 576}, {2, 2048}, {2, 2056}, {1, 30000}};
static const char *const act_specs[] = {
    "none", "int8,token,asymmetric", "int8,token,symmetric", "uint4,token,asymmetric", "int3,token,symmetric-no-clip"};
#endif
