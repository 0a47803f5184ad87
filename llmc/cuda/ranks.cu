// Bytes to and from the wire between ranks, and the sum of what came: rows_pack, rows_unpack, sum_ranks (ops.h).
//
// All are bound by memory. The rows of a rank in a window follow each other in the tensor and on the wire, so packing
// is a copy of one piece a rank, each byte read once and written once, by as many at a time as both ends and the row
// are aligned to, 16 of most tensors. One launch copies the pieces of all ranks: y of the grid is the rank, x the place
// in its piece. A thread has four loads under way, 64 bytes.
//
// sum_ranks reads 4 R bytes a value and writes 4 (reads 4 more to accumulate). A thread holds four values and has those
// of four ranks under way, 64 bytes too, while it adds in rank order.
#include "ranks.cuh"

#define THREADS 256
#define AHEAD 4                  // loads of a thread under way

template <class T>
static __global__ void __launch_bounds__(THREADS)
copy_kernel(char *wire, char *tensor, size_t stride, RankRows split, size_t row_bytes, bool pack) {
    int64_t row;
    size_t n = (size_t)rows_of_rank(&split, (int)blockIdx.y, &row) * row_bytes / sizeof(T);
    T *mine = (T *)(tensor + (size_t)row * row_bytes), *sent = (T *)(wire + blockIdx.y * stride);
    const T *from = pack ? mine : sent;
    T *to = pack ? sent : mine;
    const size_t turn = (size_t)gridDim.x * AHEAD * THREADS;
    for (size_t i = (size_t)blockIdx.x * AHEAD * THREADS + threadIdx.x; i < n; i += turn) {
        T v[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            if (i + u * THREADS < n) v[u] = from[i + u * THREADS];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            if (i + u * THREADS < n) to[i + u * THREADS] = v[u];
    }
}

template <class T>
static void copy(char *wire, char *tensor, size_t stride, const RowSplit *split, int64_t k0, int64_t kn,
                 size_t row_bytes, bool pack) {
    size_t most = (size_t)rank_rows_most(split, k0, kn) * row_bytes / sizeof(T);
    dim3 grid(grid_for((most + AHEAD * THREADS - 1) / (AHEAD * THREADS)), (unsigned)split->R);
    LAUNCH(copy_kernel<T>, grid, THREADS, 0, cuda_stream)
        (wire, tensor, stride, rank_rows(split, k0, kn), row_bytes, pack);
    CUDA_CHECK(cudaGetLastError());
}

static void copy_rows(void *wire, size_t stride, void *tensor, const RowSplit *split, int64_t k0, int64_t kn,
                      size_t row_bytes, bool pack) {
    if (rank_rows_most(split, k0, kn) == 0 || row_bytes == 0) return;
    char *w = (char *)wire, *t = (char *)tensor;
    size_t bits = (size_t)(uintptr_t)w | (size_t)(uintptr_t)t | stride | row_bytes;
    auto run = bits % 16 == 0 ? copy<uint4> : bits % 8 == 0 ? copy<uint2> : bits % 4 == 0 ? copy<uint32_t>
               : bits % 2 == 0 ? copy<uint16_t> : copy<uint8_t>;
    run(w, t, stride, split, k0, kn, row_bytes, pack);
}

void cuda_rows_pack(void *wire, size_t stride, const void *tensor, const RowSplit *split, int64_t k0, int64_t kn,
                    size_t row_bytes) {
    copy_rows(wire, stride, (void *)(uintptr_t)tensor, split, k0, kn, row_bytes, true);
}

void cuda_rows_unpack(void *tensor, const void *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn,
                      size_t row_bytes) {
    copy_rows((void *)(uintptr_t)wire, stride, tensor, split, k0, kn, row_bytes, false);
}

// ---------------------------------------------------------------------------------------------
template <int V>
static __device__ __forceinline__ void sum_step(float *out, const float *in, size_t stride, int R, bool accumulate) {
    Vec<float, V> sum = vec_load<float, V>(in);
    int r = 1;
    for (; r + AHEAD <= R; r += AHEAD) {
        Vec<float, V> v[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) v[u] = vec_load<float, V>(in + (size_t)(r + u) * stride);
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            for (int i = 0; i < V; i++) sum.v[i] += v[u].v[i];
    }
    for (; r < R; r++) {
        Vec<float, V> v = vec_load<float, V>(in + (size_t)r * stride);
        for (int i = 0; i < V; i++) sum.v[i] += v.v[i];
    }
    if (accumulate) {
        Vec<float, V> old = vec_load<float, V>(out);
        for (int i = 0; i < V; i++) sum.v[i] = old.v[i] + sum.v[i];
    }
    vec_store(out, sum);
}

// V values at a time of n; the rest one by one.
template <int V>
static __global__ void __launch_bounds__(THREADS)
sum_ranks_kernel(float *out, const float *in, size_t stride, int R, size_t n, bool accumulate) {
    size_t id = (size_t)blockIdx.x * THREADS + threadIdx.x, vectors = n / V;
    for (size_t i = id; i < vectors; i += (size_t)gridDim.x * THREADS)
        sum_step<V>(out + i * V, in + i * V, stride, R, accumulate);
    if (id < n - vectors * V) sum_step<1>(out + vectors * V + id, in + vectors * V + id, stride, R, accumulate);
}

void cuda_sum_ranks(float *out, const float *in, size_t stride, int R, size_t n, bool accumulate) {
    if (n == 0) return;
    bool aligned = ((uintptr_t)out | (uintptr_t)in | stride * sizeof(float)) % 16 == 0;
    unsigned grid = grid_for((n / (aligned ? 4 : 1) + THREADS) / THREADS);             // one thread more, for the rest
    LAUNCH((aligned ? sum_ranks_kernel<4> : sum_ranks_kernel<1>), grid, THREADS, 0, cuda_stream)
        (out, in, stride, R, n, accumulate);
    CUDA_CHECK(cudaGetLastError());
}
