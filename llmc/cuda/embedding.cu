// embedding_forward and embedding_backward (ops.h).
#include "row.cuh"

#define BLOCK 256

// A block a token, 16 bytes a thread: 2 N C sizeof(floatX) bytes moved.
template <int V>
static __global__ void __launch_bounds__(BLOCK)
embedding_forward_kernel(floatX *out, const int32_t *tokens, const floatX *wte, int C) {
    const floatX *w = wte + (size_t)tokens[blockIdx.x] * C;
    out += (size_t)blockIdx.x * C;
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) vec_store(out + c, vec_load<floatX, V>(w + c));
}

void cuda_embedding_forward(floatX *out, const int32_t *tokens, const floatX *wte, size_t N, int C, int V) {
    (void)V;
    if (N == 0) return;
    bool vec = rows_take_vec(C, out, wte);
    auto kernel = vec ? embedding_forward_kernel<VEC_X> : embedding_forward_kernel<1>;
    int warps = ((vec ? C / VEC_X : C) + 31) / 32;
    LAUNCH(kernel, (unsigned)N, (unsigned)(warps < BLOCK / 32 ? warps * 32 : BLOCK), 0, cuda_stream)
        (out, tokens, wte, C);
    CUDA_CHECK(cudaGetLastError());
}

// The sum of a token's rows is taken by the block of the first position that holds it, in the order of the positions,
// so no two blocks meet in an element and the bits are the CPU wing's. A block
//   1. returns if an earlier position holds its token (it looks from the first on: frequent tokens come early);
//   2. collects the positions of its token, from its own on, in a list in shared memory, ascending: each warp's ballots
//      tell where in the list a hit belongs;
//   3. adds their rows to the table's row, each thread its own columns, 16 bytes of eight rows in flight at a time.
// All blocks together compare at most N^2 tokens (N = 16384 different ones: 2^28, 64 KiB that stay in the L1 cache:
// some 50 us of an H100), and in text far fewer, since most positions are not the first. A row of the table is read and
// written once: at most 2 N C sizeof(float) + N C sizeof(floatX). A token that fills much of the batch makes a long
// block, which starts early, since blocks start in the order of positions.
#define EACH 4                                                 // tokens that a thread compares at a time
#define ROUND (BLOCK * EACH)                                    // 1024: a ballot for each lane of a warp
#define IN_FLIGHT 8

// dwte_row += the rows at `count` positions, in order.
template <int V>
static __device__ __forceinline__ void add_rows(float *dwte_row, const floatX *dout, const int32_t *positions,
                                                int count, int C) {
    for (int c = threadIdx.x * V; c < C; c += BLOCK * V) {
        float sum[V];
        load_f32(sum, dwte_row + c);
        int k = 0;
        for (; k + IN_FLIGHT <= count; k += IN_FLIGHT) {
            Vec<floatX, V> d[IN_FLIGHT];
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++) d[j] = vec_load<floatX, V>(dout + (size_t)positions[k + j] * C + c);
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++)
                for (int i = 0; i < V; i++) sum[i] += x2f(d[j].v[i]);
        }
        for (; k < count; k++) {
            Vec<floatX, V> d = vec_load<floatX, V>(dout + (size_t)positions[k] * C + c);
            for (int i = 0; i < V; i++) sum[i] += x2f(d.v[i]);
        }
        store_f32(dwte_row + c, sum);
    }
}

template <int V>
static __global__ void __launch_bounds__(BLOCK)
embedding_backward_kernel(float *dwte, const floatX *dout, const int32_t *tokens, int N, int C) {
    __shared__ int32_t positions[2 * ROUND];
    __shared__ unsigned ballots[32];                           // bit i of word w: position from + 32 w + i is a hit
    int own = (int)blockIdx.x, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    int32_t token = tokens[own];
    for (int from = 0; from < own; from += ROUND) {
        bool hit = false;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int n = from + j * BLOCK + (int)threadIdx.x;
            hit |= n < own && tokens[n] == token;
        }
        if (__syncthreads_or(hit)) return;
    }
    float *dwte_row = dwte + (size_t)token * C;
    int count = 0;                                             // in all threads alike
    for (int from = own; from < N; from += ROUND) {
        bool hit[EACH], any = false;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int n = from + j * BLOCK + (int)threadIdx.x;
            hit[j] = n < N && tokens[n] == token;
            any |= hit[j];
        }
        if (!__syncthreads_or(any)) continue;                  // the barrier also ends the last use of ballots
        if (count > ROUND) {                                   // the list may not hold another round
            add_rows<V>(dwte_row, dout, positions, count, C);
            count = 0;
            __syncthreads();                                   // all have read positions
        }
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            unsigned b = __ballot_sync(FULL_WARP, hit[j]);
            if (lane == 0) ballots[j * (BLOCK / 32) + warp] = b;
        }
        __syncthreads();                                       // ballots are complete
        int hits = __popc(ballots[lane]), upto = hits;         // of word `lane`; of words 0 .. lane
        for (int d = 1; d < 32; d *= 2) {
            int lower = __shfl_up_sync(FULL_WARP, upto, d);
            upto += lane >= d ? lower : 0;
        }
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int word = j * (BLOCK / 32) + warp, before = __shfl_sync(FULL_WARP, upto - hits, word);
            if (hit[j])
                positions[count + before + __popc(ballots[word] & ((1u << lane) - 1u))] =
                    from + j * BLOCK + (int)threadIdx.x;
        }
        count += __shfl_sync(FULL_WARP, upto, 31);
    }
    __syncthreads();                                           // positions are complete
    add_rows<V>(dwte_row, dout, positions, count, C);
}

void cuda_embedding_backward(float *dwte, const floatX *dout, const int32_t *tokens, size_t N, int C, int V) {
    (void)V;
    if (N == 0) return;
    bool vec = rows_take_vec(C, dwte, dout);
    auto kernel = vec ? embedding_backward_kernel<VEC_X> : embedding_backward_kernel<1>;
    LAUNCH(kernel, (unsigned)N, BLOCK, 0, cuda_stream)(dwte, dout, tokens, (int)N, C);
    CUDA_CHECK(cudaGetLastError());
}
