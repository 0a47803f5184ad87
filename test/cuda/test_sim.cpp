// The simulator itself: its arithmetic of lanes against the definitions (the same on a GPU), and what it claims to catch,
// which is planted here and must be caught.
#include "cuda_test.h"
#include "cuda/ptx.cuh"
#ifndef __CUDACC__
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

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

CUDA_TEST(lanes) {
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
CUDA_TEST(refused_launch) {
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

CUDA_TEST(planted_missing_barrier) {
    std::vector<float> x(64), reversed(64), rotated(64), sums(64);
    for (int i = 0; i < 64; i++) x[i] = (float)i;
    for (int i = 0; i < 64; i++) reversed[i] = x[63 - i], rotated[i] = x[i] + 2.0f, sums[i] = i < 32 ? 496.0f : 1520.0f;
    CHECK(wrong_orders(reverse_kernel<true>, x, reversed) == 0, "the correct kernel");
    CHECK(wrong_orders(rotate_kernel<true>, x, rotated) == 0, "the correct kernel");
    CHECK(wrong_orders(warp_sum_kernel<true>, x, sums) == 0, "the correct kernel");
#ifndef CUDASIM_RACE                   // which stops at the first: test_race.cpp
    CHECK(wrong_orders(rotate_kernel<false>, x, rotated) > 0, "an early overwrite shows in some order");
#endif
#if !defined(__SANITIZE_ADDRESS__) && !defined(CUDASIM_RACE)           // which take the place of the poison
    CHECK(wrong_orders(reverse_kernel<false>, x, reversed) == 8, "a read before the write shows in every order");
    CHECK(wrong_orders(warp_sum_kernel<false>, x, sums) == 8, "lanes of a warp do not run in step");
#endif
}

void check_dies(const char *name, void (*crime)(void), const char *word, const char *asan_word) {
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

CUDA_TEST(planted_out_of_bounds) {
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
CUDA_TEST(planted_for_asan) {
    check_dies("a read past the end of a static shared array", static_past, "AddressSanitizer", "insufficient space");
    check_dies("a read just past the end of device memory", read_slack, "AddressSanitizer", nullptr);
}
#endif
CUDA_TEST(planted_divergence) {
    check_dies("threads of one block at two barriers", uneven_barrier, "different barriers", nullptr);
    check_dies("a shuffle from a lane outside the mask", lane_outside, "not in the mask", nullptr);
    check_dies("lanes that wait for each other", deadlocked, "deadlock", nullptr);
}
#endif
