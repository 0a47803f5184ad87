// rmsnorm_fq_forward and rmsnorm_backward (ops.h).
#include "fakequant.cuh"

// rmsnorm_fq_forward: residual add, RMSNorm and activation fake quantization in one pass over memory. A block a row.
// The row stays in shared memory (KEEP) from the first load to the last store: each byte of x, delta and weight is read
// once and each of res and y written once, (4 N C + C) sizeof(floatX) in all with a delta. A row too long for that is
// read again from x or res and quantized in y.
//
// The sum of squares keeps the order that ops.h fixes, so that CPU and GPU agree to the bit: element c belongs to
// partial sum c mod 16. Sixteen lanes of the first warp hold the sums, and the row is a chain of C/16 dependent
// additions of 4 cycles; the next eight values of a lane are on their way from shared memory while the chain works on
// the last ones. At C = 4096 that is some 1200 cycles. An H100's memory gives a multiprocessor 13 bytes a cycle, so it
// needs 2400 for the 32 KiB of a row, and eight blocks of 256 threads share it: a row may take 19000 cycles from first
// load to last store before memory waits, and takes about 5000.
#define STEPS 8                                                // of the chain for which values are held in registers

template <int V, bool KEEP>
static __global__ void __launch_bounds__(ROW_THREADS_MAX)
rmsnorm_fq_forward_kernel(floatX *res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta,
                          const floatX *weight, int C, float eps, QuantSpec act) {
    DYN_SHARED(floatX, kept);                                  // (C) if KEEP: the row of res, then of y unquantized
    __shared__ float row_rstd;
    size_t base = (size_t)blockIdx.x * C;
    x += base;
    y += base;
    if (res) res += base;
    const floatX *row = KEEP ? kept : res ? res : x;

    // 1. Residual add.
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
        Vec<floatX, V> v = vec_load<floatX, V>(x + c);
        if (delta) {
            Vec<floatX, V> d = vec_load<floatX, V>(delta + base + c);
            float f[V];
#pragma unroll
            for (int i = 0; i < V; i++) f[i] = x2f(v.v[i]) + x2f(d.v[i]);
            v = to_x(f);
        }
        if (res) vec_store(res + c, v);
        if (KEEP) vec_store(kept + c, v);
    }
    __syncthreads();                                           // the first warp reads what all have written

    // 2. Mean square.
    if (threadIdx.x < 16) {
        float sum = 0.0f, now[STEPS], next[STEPS];
        int c = threadIdx.x, whole = C / (16 * STEPS) * (16 * STEPS);
        if (c < whole)
#pragma unroll
            for (int i = 0; i < STEPS; i++) now[i] = x2f(row[c + 16 * i]);
        for (; c < whole; c += 16 * STEPS) {
            bool more = c + 16 * STEPS < whole;
#pragma unroll
            for (int i = 0; i < STEPS; i++) next[i] = more ? x2f(row[c + 16 * (STEPS + i)]) : 0.0f;
#pragma unroll
            for (int i = 0; i < STEPS; i++) sum = fmaf(now[i], now[i], sum);
#pragma unroll
            for (int i = 0; i < STEPS; i++) now[i] = next[i];
        }
        for (; c < C; c += 16) sum = fmaf(x2f(row[c]), x2f(row[c]), sum);
        for (int bits = 8; bits; bits >>= 1) sum += __shfl_xor_sync(0xffffu, sum, bits);
        if (threadIdx.x == 0) {
            row_rstd = 1.0f / sqrtf(sum / (float)C + eps);
            if (rstd) rstd[blockIdx.x] = row_rstd;
        }
    }
    __syncthreads();                                           // row_rstd is there; and kept may be written again

    // 3. Normalize, scale, and quantize.
    float r = row_rstd, mn = INFINITY, mx = -INFINITY;
    floatX *out = KEEP ? kept : y;
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
        Vec<floatX, V> v = vec_load<floatX, V>(row + c), w = vec_load<floatX, V>(weight + c);
        float f[V];
#pragma unroll
        for (int i = 0; i < V; i++) {
            f[i] = x2f(v.v[i]) * r * x2f(w.v[i]);
            widen(&mn, &mx, f[i], f[i]);
        }
        vec_store(out + c, to_x(f));
    }
    fakequant_row<V>(y, mask ? mask + base : nullptr, out, C, mn, mx, &act);
}

template <int V>
static void rmsnorm_fq(floatX *res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta,
                       const floatX *weight, size_t N, int C, float eps, const QuantSpec *act) {
    size_t bytes = (size_t)C * sizeof(floatX), shared = bytes <= ROW_SHARED_MAX ? bytes : 0;
    auto kernel = shared ? rmsnorm_fq_forward_kernel<V, true> : rmsnorm_fq_forward_kernel<V, false>;
    if (!allow_shared(kernel, shared)) return;
    LAUNCH(kernel, (unsigned)N, row_threads(N, C, V, shared), shared, cuda_stream)
        (res, y, rstd, mask, x, delta, weight, C, eps, spec_or_none(act));
    CUDA_CHECK(cudaGetLastError());
}
void cuda_rmsnorm_fq_forward(floatX *res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta,
                             const floatX *weight, size_t N, int C, float eps, const QuantSpec *act) {
    if (N == 0) return;
    if (rows_take_vec(C, x, y, weight, res, delta) && rows_take_vec(C, mask))
        rmsnorm_fq<VEC_X>(res, y, rstd, mask, x, delta, weight, N, C, eps, act);
    else rmsnorm_fq<1>(res, y, rstd, mask, x, delta, weight, N, C, eps, act);
}

// ---------------------------------------------------------------------------------------------
// rmsnorm_backward. y_c = x_c rstd w_c, so with g = dy w and xhat = x rstd
//   dx = rstd (g - xhat mean(g xhat)),   dw += dy xhat.
// A block takes a piece of the rows, one after another: a thread holds its columns' dy and x in registers between the
// row's sum and dres, and its columns' part of dweight from row to row. So dy, x and dres are read once and dres is
// written once, 4 N C sizeof(floatX), and the parts, pieces C sizeof(float), cost 6% more at N = 16384. Pieces depend
// on N alone, so the bits do not depend on the device. At N = 16384, C = 4096 there are 1024 pieces of 16 rows, and two
// blocks of 512 threads share a multiprocessor. Each takes a row, 24 KiB of loads, in some 1300 cycles (a load from
// memory, a reduction, stores); for what both bring in that time the memory of an H100 takes 4800.
#define MAX_PIECES 1024
#define MIN_PIECE_ROWS 16
#define BACKWARD_THREADS 512
#define MAX_VECS (16 / VEC_X)                                  // vectors a thread that registers hold: C <= 8192

// Sum over the block, to all threads. `part` (32) is written: a caller that calls again in a loop alternates between
// two, so that one barrier a call is enough.
static __device__ __forceinline__ float block_sum(float v, float *part) {
    int warps = (int)blockDim.x / 32, lane = (int)threadIdx.x % 32;
    for (int bits = 16; bits; bits >>= 1) v += __shfl_xor_sync(FULL_WARP, v, bits);
    if (lane == 0) part[threadIdx.x / 32] = v;
    __syncthreads();                                           // part is complete
    v = lane < warps ? part[lane] : 0.0f;
    for (int bits = 16; bits; bits >>= 1) v += __shfl_xor_sync(FULL_WARP, v, bits);
    return v;
}

template <int V> static __device__ __forceinline__ Vec<floatX, V> masked_dy(const floatX *dy, const uint8_t *mask) {
    Vec<floatX, V> d = vec_load<floatX, V>(dy);
    if (!mask) return d;
    Vec<uint8_t, V> m = vec_load<uint8_t, V>(mask);
#pragma unroll
    for (int i = 0; i < V; i++) d.v[i] = m.v[i] ? d.v[i] : (floatX)0;
    return d;
}
static __device__ __forceinline__ float dres_of(floatX dres, floatX dy, floatX w, floatX x, float rstd, float mean) {
    return x2f(dres) + rstd * (x2f(dy) * x2f(w) - x2f(x) * rstd * mean);
}

// VECS: vectors a thread, all in registers: C <= VECS * V * blockDim.x.
template <int V, int VECS>
static __global__ void __launch_bounds__(BACKWARD_THREADS, VECS == 1 ? 2 : 1)
rmsnorm_backward_kernel(floatX *dres, float *parts, const floatX *dy, const uint8_t *mask, const floatX *x,
                        const floatX *weight, const float *rstd, size_t N, int C, size_t piece_rows) {
    __shared__ float part[2][32];
    float dw[VECS][V] = {};
    Vec<floatX, V> w[VECS] = {};
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        int c = (int)(threadIdx.x + k * blockDim.x) * V;
        if (c < C) w[k] = vec_load<floatX, V>(weight + c);
    }
    size_t first = blockIdx.x * piece_rows, last = first + piece_rows < N ? first + piece_rows : N;
    for (size_t n = first; n < last; n++) {
        size_t base = n * C;
        Vec<floatX, V> d[VECS] = {}, a[VECS] = {}, r[VECS] = {};
#pragma unroll
        for (int k = 0; k < VECS; k++) {
            int c = (int)(threadIdx.x + k * blockDim.x) * V;
            if (c >= C) continue;
            d[k] = masked_dy<V>(dy + base + c, mask ? mask + base + c : nullptr);
            a[k] = vec_load<floatX, V>(x + base + c);
            r[k] = vec_load<floatX, V>(dres + base + c);
        }
        float s = rstd[n], sum = 0.0f;
#pragma unroll
        for (int k = 0; k < VECS; k++)
#pragma unroll
            for (int i = 0; i < V; i++) {
                float gx = x2f(d[k].v[i]) * (x2f(a[k].v[i]) * s);
                dw[k][i] += gx;
                sum = fmaf(gx, x2f(w[k].v[i]), sum);
            }
        float mean = block_sum(sum, part[n % 2]) / (float)C;
#pragma unroll
        for (int k = 0; k < VECS; k++) {
            int c = (int)(threadIdx.x + k * blockDim.x) * V;
            if (c >= C) continue;
            float f[V];
#pragma unroll
            for (int i = 0; i < V; i++) f[i] = dres_of(r[k].v[i], d[k].v[i], w[k].v[i], a[k].v[i], s, mean);
            vec_store(dres + base + c, to_x(f));
        }
    }
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        int c = (int)(threadIdx.x + k * blockDim.x) * V;
        if (c < C) store_f32(parts + (size_t)blockIdx.x * C + c, dw[k]);
    }
}

// The same for rows of any length: two sweeps over a row, the second from cache, and the part of dweight in memory.
template <int V>
static __global__ void __launch_bounds__(BACKWARD_THREADS)
rmsnorm_backward_wide_kernel(floatX *dres, float *parts, const floatX *dy, const uint8_t *mask, const floatX *x,
                             const floatX *weight, const float *rstd, size_t N, int C, size_t piece_rows) {
    __shared__ float part[2][32];
    float *dw = parts + (size_t)blockIdx.x * C;
    size_t first = blockIdx.x * piece_rows, last = first + piece_rows < N ? first + piece_rows : N;
    for (size_t n = first; n < last; n++) {
        size_t base = n * C;
        float s = rstd[n], sum = 0.0f;
        for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
            Vec<floatX, V> d = masked_dy<V>(dy + base + c, mask ? mask + base + c : nullptr),
                           a = vec_load<floatX, V>(x + base + c), w = vec_load<floatX, V>(weight + c);
            float total[V] = {};
            if (n > first) load_f32(total, dw + c);
#pragma unroll
            for (int i = 0; i < V; i++) {
                float gx = x2f(d.v[i]) * (x2f(a.v[i]) * s);
                total[i] += gx;
                sum = fmaf(gx, x2f(w.v[i]), sum);
            }
            store_f32(dw + c, total);
        }
        float mean = block_sum(sum, part[n % 2]) / (float)C;
        for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
            Vec<floatX, V> d = masked_dy<V>(dy + base + c, mask ? mask + base + c : nullptr),
                           a = vec_load<floatX, V>(x + base + c), w = vec_load<floatX, V>(weight + c),
                           r = vec_load<floatX, V>(dres + base + c);
            float f[V];
#pragma unroll
            for (int i = 0; i < V; i++) f[i] = dres_of(r.v[i], d.v[i], w.v[i], a.v[i], s, mean);
            vec_store(dres + base + c, to_x(f));
        }
    }
}

// dweight (C) += sum over the pieces: 32 columns a block, each by up to 32 warps that take equal shares of the pieces
// in order; then their sums in order.
#define MAX_GROUPS 32
static __global__ void __launch_bounds__(32 * MAX_GROUPS)
dweight_kernel(float *dweight, const float *parts, int pieces, int C) {
    __shared__ float sums[MAX_GROUPS][32];
    int groups = (int)blockDim.y, c = (int)(blockIdx.x * 32 + threadIdx.x), each = (pieces + groups - 1) / groups;
    int first = (int)threadIdx.y * each, last = first + each < pieces ? first + each : pieces;
    float sum = 0.0f;
    if (c < C)
#pragma unroll 8
        for (int k = first; k < last; k++) sum += parts[(size_t)k * C + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();                                           // sums are complete
    if (threadIdx.y != 0 || c >= C) return;
    for (int g = 1; g < groups; g++) sum += sums[g][threadIdx.x];
    dweight[c] += sum;
}

void cuda_rmsnorm_backward(floatX *dres, float *dweight, const floatX *dy, const uint8_t *mask, const floatX *x,
                           const floatX *weight, const float *rstd, size_t N, int C) {
    if (N == 0) return;
    size_t pieces = (N + MIN_PIECE_ROWS - 1) / MIN_PIECE_ROWS;
    if (pieces > MAX_PIECES) pieces = MAX_PIECES;
    size_t rows = (N + pieces - 1) / pieces;
    pieces = (N + rows - 1) / rows;                            // none is empty
    float *parts = (float *)cuda_workspace(pieces * (size_t)C * sizeof(float));
    if (!parts) return;
    bool vec = rows_take_vec(C, dres, dy, mask, x, weight);
    int vecs = vec ? C / VEC_X : C, each = (vecs + BACKWARD_THREADS - 1) / BACKWARD_THREADS;
    auto kernel = !vec ? rmsnorm_backward_wide_kernel<1>
                  : each == 1 ? rmsnorm_backward_kernel<VEC_X, 1>
                  : each <= MAX_VECS ? rmsnorm_backward_kernel<VEC_X, MAX_VECS> : rmsnorm_backward_wide_kernel<VEC_X>;
    int threads = ((vecs + each - 1) / each + 31) / 32 * 32;
    if (threads > BACKWARD_THREADS) threads = BACKWARD_THREADS;
    LAUNCH(kernel, (unsigned)pieces, (unsigned)threads, 0, cuda_stream)
        (dres, parts, dy, mask, x, weight, rstd, N, C, rows);
    dim3 columns(32, (unsigned)(pieces < MAX_GROUPS ? pieces : MAX_GROUPS));
    LAUNCH(dweight_kernel, (unsigned)((C + 31) / 32), columns, 0, cuda_stream)(dweight, parts, (int)pieces, C);
    CUDA_CHECK(cudaGetLastError());
}
