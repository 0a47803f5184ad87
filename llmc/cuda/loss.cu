// classifier and loss_accumulate (ops.h).
#include "row.cuh"
#include <float.h>

// classifier: a block a row of the logits, which is read twice: once for its maximum and the sum of e^(z - maximum)
// together, once for the gradient. A thread keeps its own largest logit and the sum that counts from it, in f32; the
// threads' sums are brought to the row's maximum and added in double. The second sweep goes backwards: what the first
// read last is still in the L2 cache (a row of V = 128256 is 501 KiB; one block of 1024 threads a multiprocessor makes
// 66 MiB in flight, an H100's L2 holds 50). It moves 8 n V bytes of logits less what the cache gives, and n V
// sizeof(floatX) of dlogits. Some fifty instructions a logit take half the time that memory does.
#define THREADS 1024

// The largest of the warp's m, and the sum of the lanes' sums brought to it. exp_f32(-FLT_MAX - m) is 0, so lanes that
// saw nothing add nothing.
static __device__ __forceinline__ void warp_softmax(float *m, double *sum) {
    float top = *m;
    for (int bits = 16; bits; bits >>= 1) {
        float other = __shfl_xor_sync(FULL_WARP, top, bits);
        top = other > top ? other : top;
    }
    double s = *sum * (double)exp_f32(*m - top);
    for (int bits = 16; bits; bits >>= 1) s += __shfl_xor_sync(FULL_WARP, s, bits);
    *m = top;
    *sum = s;
}

template <int W>
static __global__ void __launch_bounds__(THREADS)
classifier_kernel(float *losses, floatX *dlogits, const float *logits, const int32_t *targets, int V) {
    __shared__ float part_m[32];
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

    // 1. Maximum and sum. From -FLT_MAX and not -infinity, so that no difference is infinity - infinity.
    float m = -FLT_MAX, s = 0.0f;
#pragma unroll(W == 1 ? 4 : 1)
    for (int c = first; c < V; c += step) {
        float f[W];
        load_f32(f, z + c);
        float top = f[0];
#pragma unroll
        for (int i = 1; i < W; i++) top = fmaxf(top, f[i]);
        if (top > m) {
            s *= exp_f32(m - top);
            m = top;
        }
#pragma unroll
        for (int i = 0; i < W; i++) s += exp_f32(f[i] - m);
    }
    double sum = s;
    int lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32;
    warp_softmax(&m, &sum);
    if (lane == 0) {
        part_m[threadIdx.x / 32] = m;
        part_sum[threadIdx.x / 32] = sum;
    }
    __syncthreads();                                           // the parts are complete
    m = lane < warps ? part_m[lane] : -FLT_MAX;
    sum = lane < warps ? part_sum[lane] : 0.0;
    warp_softmax(&m, &sum);                                    // each warp for itself: all threads need both
    if (threadIdx.x == 0)
        losses[blockIdx.x] = (float)((double)log_f32((float)sum) + ((double)m - (double)z[target]));
    if (!d) return;

    // 2. Gradient, backwards. The target's logit is done again, by the thread that wrote it.
    float scale = (float)(1.0 / sum);
    bool mine = false;
#pragma unroll(W == 1 ? 4 : 1)
    for (int c = first + (V - 1 - first) / step * step; c >= first && c < V; c -= step) {
        float f[W];
        load_f32(f, z + c);
#pragma unroll
        for (int i = 0; i < W; i++) f[i] = exp_f32(f[i] - m) * scale;
        vec_store(d + c, to_x(f));
        mine |= (unsigned)(target - c) < (unsigned)W;
    }
    if (mine) d[target] = f2x((float)((double)exp_f32(z[target] - m) / sum - 1.0));
}

void cuda_classifier(float *losses, floatX *dlogits, const float *logits, const int32_t *targets, size_t n, int V) {
    if (n == 0) return;
    bool vec = rows_take_vec(V, logits, dlogits) && V % 4 == 0;
    int vecs = vec ? V / VEC_X : V, threads = ((vecs + 3) / 4 + 31) / 32 * 32;
    auto kernel = vec ? classifier_kernel<VEC_X> : classifier_kernel<1>;
    LAUNCH(kernel, (unsigned)n, (unsigned)(threads < THREADS ? threads : THREADS), 0, cuda_stream)
        (losses, dlogits, logits, targets, V);
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
