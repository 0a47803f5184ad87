// sum_squares, state_sum, global_norm (ops.h): the gradients' norm, here and over all ranks, and what follows from it,
// to the CPU wing's bit (llmc/cpu/adamw.c, llmc/cpu/ranks.c).
//
// sum_squares. Blocks of 2^16 gradients have 16 sums in double each, whose order is fixed, so 16 lanes walk a block: a
// chain of 4096 additions a lane. A multiprocessor's share of 3 TB/s is some 3 values a cycle and an addition takes 8
// cycles: 27 lanes keep up, a model of 135M weights has 250 a multiprocessor. What matters is the latency of memory, so
// a lane has its next 32 values under way while it adds the last 32 (4 KB a warp; 64 bytes in a row a half-warp, whole
// sectors). Reads 4 bytes a gradient. The blocks' sums are then added one after the other by one thread, 8 cycles each
// or 5 percent of the time in all, the price of the fixed order.
#include "cuda.cuh"

#define NORM_BLOCK 65536
#define AHEAD 32                 // values of a lane under way; divides NORM_BLOCK / 16
#define THREADS 64               // of sums_kernel: four blocks of gradients
#define CHUNK 256                // sums in shared memory at a time
#define ADDERS 256               // threads of add_kernel
#define STATES 128               // ranks whose states are in shared memory at a time

static __device__ __forceinline__ double add_square(double sum, float g) {
    return fma((double)g, (double)g, sum);                     // the square is exact: the same bits as two steps
}

static __global__ void __launch_bounds__(THREADS)
sums_kernel(double *sums, const float *grad, size_t n, size_t blocks) {
    size_t k = (size_t)blockIdx.x * (THREADS / 16) + threadIdx.x / 16, at = k * NORM_BLOCK + threadIdx.x % 16;
    double sum = 0.0;
    if (k < blocks) {
        size_t left = n - k * NORM_BLOCK;
        if (left >= NORM_BLOCK) {
            const float *g = grad + at;
            float now[AHEAD], next[AHEAD];
            for (int i = 0; i < AHEAD; i++) now[i] = g[i * 16];
            for (int batch = 1; batch < NORM_BLOCK / 16 / AHEAD; batch++) {
                g += AHEAD * 16;
                for (int i = 0; i < AHEAD; i++) next[i] = g[i * 16];
                for (int i = 0; i < AHEAD; i++) sum = add_square(sum, now[i]);
                for (int i = 0; i < AHEAD; i++) now[i] = next[i];
            }
            for (int i = 0; i < AHEAD; i++) sum = add_square(sum, now[i]);
        } else {
            for (; at < n; at += 16) sum = add_square(sum, grad[at]);
        }
    }
    for (int h = 8; h; h >>= 1) sum += __shfl_down_sync(FULL_WARP, sum, h, 16);
    if (k < blocks && threadIdx.x % 16 == 0) sums[k] = sum;
}

// One block: the first warp adds a chunk of sums while the others bring the next.
static __global__ void __launch_bounds__(ADDERS) add_kernel(StepState *state, const double *sums, size_t blocks) {
    __shared__ double chunk[2][CHUNK];
    double total = 0.0;
    size_t chunks = (blocks + CHUNK - 1) / CHUNK;
    for (size_t c = 0; c <= chunks; c++) {                     // turn c adds chunk c - 1
        if (threadIdx.x == 0 && c > 0) {
            size_t left = blocks - (c - 1) * CHUNK;
            int in_it = left < CHUNK ? (int)left : CHUNK;
            const double *s = chunk[(c - 1) % 2];
#pragma unroll 16
            for (int i = 0; i < in_it; i++) total += s[i];
        }
        if (threadIdx.x >= 32)
            for (size_t i = threadIdx.x - 32; i < CHUNK && c * CHUNK + i < blocks; i += ADDERS - 32)
                chunk[c % 2][i] = sums[c * CHUNK + i];
        __syncthreads();                                       // chunk c is there, chunk c - 1 is free
    }
    if (threadIdx.x == 0) state->grad_squares += total;
}

void cuda_sum_squares(StepState *state, const float *grad, size_t n) {
    size_t blocks = (n + NORM_BLOCK - 1) / NORM_BLOCK;
    if (!blocks) return;
    double *sums = (double *)cuda_workspace(blocks * sizeof(double));
    if (!sums) return;
    unsigned grid = (unsigned)((blocks + THREADS / 16 - 1) / (THREADS / 16));
    LAUNCH(sums_kernel, grid, THREADS, 0, cuda_stream)(sums, grad, n, blocks);
    CUDA_CHECK(cudaGetLastError());
    LAUNCH(add_kernel, 1, ADDERS, 0, cuda_stream)(state, sums, blocks);
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------
// state_sum. A thread adds what the others bring, STATES ranks at a time: two chains of additions in double, 8 cycles a
// rank.
static __global__ void __launch_bounds__(STATES) state_sum_kernel(StepState *state, const StepState *all, int R) {
    __shared__ StepState part[STATES];
    double loss_sum = 0.0, grad_squares = 0.0;
    int64_t tokens = 0;
    int32_t stop = 0;
    for (int first = 0; first < R; first += STATES) {
        int n = min(STATES, R - first), t = (int)threadIdx.x;
        if (t < n) part[t] = all[first + t];
        __syncthreads();                                       // part is there
        for (int r = 0; r < n && t == 0; r++) {
            loss_sum += part[r].loss_sum;
            grad_squares += part[r].grad_squares;
            tokens += part[r].tokens;
            stop |= part[r].stop;
        }
        __syncthreads();                                       // part may be written again
    }
    if (threadIdx.x != 0) return;
    state->loss_sum = loss_sum;
    state->grad_squares = grad_squares;
    state->tokens = tokens;
    state->stop = stop;
}

void cuda_state_sum(StepState *state, const StepState *all, int R) {
    LAUNCH(state_sum_kernel, 1, STATES, 0, cuda_stream)(state, all, R);
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------
// global_norm.
static __global__ void __launch_bounds__(32) norm_kernel(StepState *state, float max_norm) {
    if (threadIdx.x != 0) return;
    double tokens = (double)state->tokens, norm = sqrt(state->grad_squares) / tokens, loss = state->loss_sum;
    bool good = state->tokens > 0 && norm - norm == 0.0 && loss - loss == 0.0;     // neither is NaN or infinite
    double clip = max_norm > 0.0f && norm > (double)max_norm ? (double)max_norm / norm : 1.0;
    state->norm = (float)norm;
    state->skip = !good;
    state->grad_scale = good ? (float)(clip / tokens) : 0.0f;
}

void cuda_global_norm(StepState *state, float max_norm) {
    LAUNCH(norm_kernel, 1, 32, 0, cuda_stream)(state, max_norm);
    CUDA_CHECK(cudaGetLastError());
}
