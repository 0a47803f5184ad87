// classifier and loss_accumulate (ops.h).
#include "row.cuh"

// classifier: a block a row of the logits, of which each is needed twice: for the maximum and the sum of exponentials,
// which are taken together, and for the gradient. At the least 4 n V bytes are read and n V sizeof(floatX) written. The
// first logits of a row stay in shared memory: 56320 of them on an H100, which is whole rows of a vocabulary that
// small. The others are read again, backwards, as the L2 cache still holds what the first sweep read last: at V =
// 128256 the rest of 132 rows (50 registers: one block of 1024 threads a multiprocessor) is 38 MB, the cache 50.
// Sixty-four bytes a thread are in flight, and some 40 instructions a logit take two thirds of the time
// that memory does.
//
// A thread counts in powers of two from its own largest logit m: sum of 2^(z L - shift), L = f32(log2 e), shift = f32(m
// L). The rounding of shift is no error: it is divided by L again when the logarithm is taken. The threads' sums are
// brought to the row's largest shift and added in double.
#define THREADS 1024
#define LOG2E 1.44269504f
#define LEAST (-1e38f)                                         // in place of -infinity: differences are numbers

// The largest of the warp's shifts, and the sum of the lanes' sums brought to it. Lanes that saw nothing add nothing.
static __device__ __forceinline__ void warp_softmax(float *shift, double *sum) {
    float top = *shift;
    for (int bits = 16; bits; bits >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, bits));
    double s = *sum * (double)exp2_fast(*shift - top);
    for (int bits = 16; bits; bits >>= 1) s += __shfl_xor_sync(FULL_WARP, s, bits);
    *shift = top;
    *sum = s;
}

// W logits a load, U loads in flight. `keep` logits, a multiple of W, stay in shared memory.
template <int W, int U>
static __global__ void __launch_bounds__(THREADS)
classifier_kernel(float *losses, floatX *dlogits, const float *logits, const int32_t *targets, int V, int keep) {
    DYN_SHARED(float, kept);                                   // (keep)
    __shared__ float part_shift[32];
    __shared__ double part_sum[32];
    int target = targets[blockIdx.x], step = (int)blockDim.x * W, first = (int)threadIdx.x * W;
    const float *z = logits + (size_t)blockIdx.x * V;
    floatX *d = dlogits ? dlogits + (size_t)blockIdx.x * V : nullptr;
    if (target < 0) {
        Vec<floatX, W> zeros = {};
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        if (d)
            for (int c = first; c < V; c += step) vec_store(d + c, zeros);
        return;
    }

    // 1. Maximum and sum.
    float m = LEAST, shift = LEAST * LOG2E, s = 0.0f;
    for (int from = first; from < V; from += U * step) {
        float f[U][W], top = LEAST;
#pragma unroll
        for (int u = 0; u < U; u++) {
            int c = from + u * step;
            if (c < V) load_f32(f[u], z + c);
            else for (int i = 0; i < W; i++) f[u][i] = -INFINITY;
            if (c < keep) store_f32(kept + c, f[u]);
        }
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int i = 0; i < W; i++) top = fmaxf(top, f[u][i]);
        if (top > m) {
            m = top;
            s *= exp2_fast(shift - top * LOG2E);
            shift = top * LOG2E;
        }
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int i = 0; i < W; i++) s += exp2_fast(fmaf(f[u][i], LOG2E, -shift));
    }
    double sum = s;
    int lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32;
    warp_softmax(&shift, &sum);
    if (lane == 0) {
        part_shift[threadIdx.x / 32] = shift;
        part_sum[threadIdx.x / 32] = sum;
    }
    __syncthreads();                                           // the parts are complete
    shift = lane < warps ? part_shift[lane] : LEAST * LOG2E;
    sum = lane < warps ? part_sum[lane] : 0.0;
    warp_softmax(&shift, &sum);                                // each warp for itself: all threads need both
    if (threadIdx.x == 0)
        losses[blockIdx.x] = (float)((double)log_f32((float)sum) + ((double)shift / (double)LOG2E - (double)z[target]));
    if (!d) return;

    // 2. Gradient, backwards; a thread finds in shared memory what it put there itself. The target's is done again, by
    // the thread that wrote it.
    float scale = (float)(1.0 / sum);
    int spans = (V + U * step - 1) / (U * step);
    for (int from = first + (spans - 1) * U * step; from >= first; from -= U * step) {
        float f[U][W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int c = from + u * step;
            if (c < keep) load_f32(f[u], (const float *)kept + c);
            else if (c < V) load_f32(f[u], z + c);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            int c = from + u * step;
            if (c >= V) continue;
#pragma unroll
            for (int i = 0; i < W; i++) f[u][i] = exp2_fast(fmaf(f[u][i], LOG2E, -shift)) * scale;
            vec_store(d + c, to_x(f[u]));
        }
    }
    if (target / W % (int)blockDim.x == (int)threadIdx.x)
        d[target] = f2x((float)((double)exp2_fast(fmaf(z[target], LOG2E, -shift)) / sum - 1.0));
}

// Bytes of dynamic shared memory for a row of `bytes`: all of it, or what the device has, in one of three sizes. sm_90
// has 227 KiB for a block, sm_80 163, others 99. What is to be asked for: see allow_shared.
template <class Kernel> static size_t shared_for_row(Kernel *kernel, size_t bytes) {
    static const size_t sizes[] = {(size_t)220 << 10, (size_t)160 << 10, ROW_SHARED_MAX};
    for (size_t size : sizes) {
        size_t want = bytes < size ? bytes : size;
        if (want <= 32 << 10 ||
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)want) == cudaSuccess)
            return want;
        (void)cudaGetLastError();
    }
    return 0;
}

void cuda_classifier(float *losses, floatX *dlogits, const float *logits, const int32_t *targets, size_t n, int V) {
    if (n == 0) return;
    bool vec = V % 4 == 0 && rows_take_vec(0, logits, dlogits);
    auto kernel = vec ? classifier_kernel<4, 4> : classifier_kernel<1, 8>;
    int each = vec ? 16 : 8, threads = ((V + each - 1) / each + 31) / 32 * 32;
    size_t shared = dlogits ? shared_for_row(kernel, (size_t)V * sizeof(float)) : 0;
    LAUNCH(kernel, (unsigned)n, (unsigned)(threads < THREADS ? threads : THREADS), shared, cuda_stream)
        (losses, dlogits, logits, targets, V, (int)(shared / sizeof(float)));
    CUDA_CHECK(cudaGetLastError());
}

// loss_accumulate: the sum is one chain of additions in double, whose order is part of the operation. One block brings
// the losses to shared memory, one thread adds them: some 10 cycles a token, 0.1 ms for 16384.
#define TILE 4096

static __global__ void __launch_bounds__(THREADS)
loss_accumulate_kernel(StepState *state, const float *losses, const int32_t *targets, size_t N) {
    __shared__ float tile[TILE];
    __shared__ unsigned long long counted;
    if (threadIdx.x == 0) counted = 0;
    unsigned long long mine = 0;
    double sum = state->loss_sum;
    for (size_t from = 0; from < N; from += TILE) {
        int here = (int)(N - from < TILE ? N - from : TILE);
        for (int i = threadIdx.x; i < here; i += THREADS) {
            tile[i] = losses[from + i];
            mine += targets[from + i] >= 0;
        }
        __syncthreads();                                       // the tile is complete
        if (threadIdx.x == 0)
#pragma unroll 8
            for (int i = 0; i < here; i++) sum += (double)tile[i];
        __syncthreads();                                       // and may be overwritten
    }
    atomicAdd(&counted, mine);
    __syncthreads();                                           // all have counted
    if (threadIdx.x == 0) {
        state->loss_sum = sum;
        state->tokens += (int64_t)counted;
    }
}

void cuda_loss_accumulate(StepState *state, const float *losses, const int32_t *targets, size_t N) {
    if (N == 0) return;
    LAUNCH(loss_accumulate_kernel, 1, THREADS, 0, cuda_stream)(state, losses, targets, N);
    CUDA_CHECK(cudaGetLastError());
}
