// The linears whose weights are INT8 codes with a scale a row (ops.h).
//
// linear_w8: the codes become X in working memory, and the linear is matmul.cu's. A weight is a byte read and two
// (bf16) written, beside the 2 N FLOP of its products: 1 ps at 3 TB/s against 47 ps for N = 16384 tokens at 700
// TFLOP/s, so 2 % there and a tenth at 4096 tokens.
//
// linear_i8: acc (M, N) = a (M, K) . b (N, K)^T of codes, exact, then scaled by row of a and of b. Three steps:
//   operands   quantized by row where rows are what is summed over; else columns are quantized (their largest values
//              in one pass, codes in the next) and transposed, as weights are for the input's gradient: both operands
//              lie along K, which is what integer tensor cores take. In working memory K is padded by zeros to a
//              multiple of 16.
//   product    by cuBLASLt into int32, some rows at a time, or by tiles (tiles.cuh)
//   scales     in the tiles' last step, or in a kernel of its own that reads the int32
// Every way gives the same bits.
#include "cublaslt.cuh"
#include "matmul.cuh"
#include "row.cuh"
#include "tiles.cuh"

#define K_UNIT 16                       // K is padded to a multiple: a copy of 16 bytes exists as a whole or not at all
#define PIECE ((int64_t)1 << 16)        // products of one exact sum (ops.h)

// ---------------------------------------------------------------------------------------------
// Codes to X.
template <int V>
static __global__ void __launch_bounds__(256) codes_to_x_kernel(floatX *x, const int8_t *codes, size_t n) {
    for (size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * V; i < n; i += (size_t)gridDim.x * 256 * V) {
        Vec<int8_t, V> q = vec_load<int8_t, V>(codes + i);
        constexpr int W = V < VEC_X ? V : VEC_X;
#pragma unroll
        for (int j = 0; j < V; j += W) {
            float f[W];
            for (int e = 0; e < W; e++) f[e] = (float)q.v[j + e];
            vec_store(x + i + j, to_x(f));
        }
    }
}

// The codes as X in working memory, or NULL.
static floatX *codes_as_x(const int8_t *codes, size_t n) {
    floatX *x = (floatX *)cuda_workspace(n * sizeof *x, OUTER);
    if (!x) return nullptr;
    const int V = 16;
    bool vec = n % V == 0 && (uintptr_t)codes % V == 0;
    auto kernel = vec ? codes_to_x_kernel<V> : codes_to_x_kernel<1>;
    LAUNCH(kernel, grid_for(((vec ? n / V : n) + 255) / 256), 256, 0, cuda_stream)(x, codes, n);
    CUDA_CHECK(cudaGetLastError());
    return x;
}

void cuda_linear_w8_forward(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                            int OC) {
    const floatX *w = N ? codes_as_x(codes, (size_t)OC * (size_t)C) : nullptr;
    if (w) cuda_linear_forward(y, x, w, wscale, N, C, OC);
}
void cuda_linear_w8_forward_f32(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                                int OC) {
    const floatX *w = N ? codes_as_x(codes, (size_t)OC * (size_t)C) : nullptr;
    if (w) cuda_linear_forward_f32(y, x, w, wscale, N, C, OC);
}
void cuda_linear_w8_backward_input(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale,
                                   floatX *dy_scaled, size_t N, int C, int OC) {
    const floatX *w = N ? codes_as_x(codes, (size_t)OC * (size_t)C) : nullptr;
    if (w) cuda_linear_backward_input(dx, dy, w, wscale, dy_scaled, N, C, OC);
}

// ---------------------------------------------------------------------------------------------
// Quantizing.

// int8_nearest's code, two's complement in the low byte, of a value no larger than the amax that inv was made from:
// the product is at most 127 (1 + 2^-24)^3 or so, and there is nothing to clamp. Adding 1.5 * 2^23 rounds to the
// nearest integer, even at a half, and leaves it in the low bits. An infinity times inv = 0 is NaN and taken for zero
// like any other.
static __device__ __forceinline__ uint32_t code_byte(float x, float inv) {
    float v = x * inv;
    return f32_bits((v == v ? v : 0.0f) + 12582912.0f) & 0xffu;
}

// V values of X as f32.
template <int V> static __device__ __forceinline__ void load_values(float (&f)[V], const floatX *p) {
    constexpr int W = V < VEC_X ? V : VEC_X;
#pragma unroll
    for (int j = 0; j < V; j += W) {
        Vec<floatX, W> v = vec_load<floatX, W>(p + j);
        for (int e = 0; e < W; e++) f[j + e] = x2f(v.v[e]);
    }
}

// The largest of all threads' values, to all threads: exact in any order. Called by all, at most once in a kernel.
static __device__ float block_max(float v) {
    __shared__ float part[ROW_THREADS_MAX / 32];               // of each warp
    for (int bits = 16; bits; bits /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, bits));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();                                           // part is complete
    for (int w = 0; w < (int)blockDim.x / 32; w++) v = fmaxf(v, part[w]);
    return v;
}

// q (rows, K), scale (rows) of x (rows, C) X, SCALED: times columns (C) f32; zeros from C to K. A block a row: what the
// threads hold, HELD vectors each, is read once, and what a longer row has beyond that once more.
template <bool SCALED> constexpr int HELD = SCALED ? 2 : 4;    // as registers allow
template <int V, bool SCALED>
static __global__ void __launch_bounds__(ROW_THREADS_MAX)
quantize_rows_kernel(int8_t *q, float *scale, const floatX *x, const float *columns, int C, int K) {
    constexpr int held_vectors = HELD<SCALED>;
    const floatX *row = x + (size_t)blockIdx.x * (size_t)C;
    int8_t *to = q + (size_t)blockIdx.x * (size_t)K;
    int step = (int)blockDim.x * V, first = (int)threadIdx.x * V;
    auto load = [&](float (&f)[V], int c) {
        for (int j = 0; j < V; j++) f[j] = 0.0f;
        if (c >= C) return;
        load_values(f, row + c);
        if (SCALED) {
            float s[V];
            load_f32(s, columns + c);
            for (int j = 0; j < V; j++) f[j] *= s[j];
        }
    };
    float held[held_vectors][V], most = 0.0f;                          // fmaxf passes a NaN over
#pragma unroll
    for (int i = 0; i < held_vectors; i++) {
        load(held[i], first + i * step);
        for (int j = 0; j < V; j++) most = fmaxf(most, fabsf(held[i][j]));
    }
#pragma unroll 1
    for (int c = first + held_vectors * step; c < C; c += step) {
        float f[V];
        load(f, c);
        for (int j = 0; j < V; j++) most = fmaxf(most, fabsf(f[j]));
    }
    float s = int8_row_scale(block_max(most)), inv = int8_row_inv(s);
    if (threadIdx.x == 0) scale[blockIdx.x] = s;
    auto store_codes = [&](const float (&f)[V], int c) {
        if (c >= K) return;
        if constexpr (V == 8) {
            Vec<uint32_t, 2> two = {};
#pragma unroll
            for (int j = 0; j < V; j++) two.v[j / 4] |= code_byte(f[j], inv) << 8 * (j % 4);
            vec_store((uint32_t *)(void *)(to + c), two);
        } else {
            to[c] = (int8_t)code_byte(f[0], inv);
        }
    };
#pragma unroll
    for (int i = 0; i < held_vectors; i++) store_codes(held[i], first + i * step);
#pragma unroll 1
    for (int c = first + held_vectors * step; c < K; c += step) {
        float f[V];
        load(f, c);
        store_codes(f, c);
    }
}

static void quantize_rows(int8_t *q, float *scale, const floatX *x, const float *columns, size_t rows, int C, int K) {
    bool vec = rows_take_vec(0, x, columns) && C % 8 == 0;
    auto kernel = vec ? (columns ? quantize_rows_kernel<8, true> : quantize_rows_kernel<8, false>)
                      : (columns ? quantize_rows_kernel<1, true> : quantize_rows_kernel<1, false>);
    int vectors = vec ? K / 8 : K, each = 32 * (columns ? HELD<true> : HELD<false>);
    int warps = (vectors + each - 1) / each;
    unsigned threads = 32 * (unsigned)(warps < ROW_THREADS_MAX / 32 ? warps : ROW_THREADS_MAX / 32);
    LAUNCH(kernel, (unsigned)rows, threads, 0, cuda_stream)(q, scale, x, columns, C, K);
    CUDA_CHECK(cudaGetLastError());
}

// amax (C), zero before: the bits of each column's largest magnitude over N rows; as integers they are ordered as the
// numbers are. A block takes 32 V columns of `slice` rows, a warp every eighth of these.
template <int V> static __global__ void __launch_bounds__(256)
column_amax_kernel(unsigned *amax, const floatX *x, size_t N, int C, size_t slice) {
    __shared__ float part[8][32 * V];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, first = (int)blockIdx.x * 32 * V;
    size_t begin = blockIdx.y * slice, end = begin + slice < N ? begin + slice : N;
    float most[V] = {};
    if (first + lane * V < C) {
        const floatX *p = x + first + lane * V;
#pragma unroll 4
        for (size_t n = begin + (size_t)warp; n < end; n += 8) {
            float f[V];
            load_values(f, p + n * (size_t)C);
            for (int j = 0; j < V; j++) most[j] = fmaxf(most[j], fabsf(f[j]));
        }
    }
    for (int j = 0; j < V; j++) part[warp][lane * V + j] = most[j];
    __syncthreads();                                           // part is complete
    int c = (int)threadIdx.x;
    if (c >= 32 * V || first + c >= C) return;
    float m = 0.0f;
    for (int w = 0; w < 8; w++) m = fmaxf(m, part[w][c]);
    atomicMax(&amax[first + c], f32_bits(m));
}

// q (C, K) = codes of x (N, C), transposed; zeros from N to K, the multiple of K_UNIT above. In = floatX: by column
// from amax, scale (C) is written; int8_t: as they are. A block takes 64 columns of 128 rows, a thread 8 columns of 4
// rows, whose codes of a column make a word. Word w of 32 of column c lies at c * 32 + (w ^ 4 (c / 8)): stores of a
// warp, 4 words of 8 columns that are 8 apart, fall into 32 banks, and loads of 16 bytes stay together.
#define COLUMNS 64
#define ROWS 128
template <class In, bool VEC>
static __global__ void __launch_bounds__(256)
transpose_kernel(int8_t *q, float *scale, const In *x, const unsigned *amax, size_t N, int C, size_t K) {
    constexpr bool QUANTIZE = !std::is_same<In, int8_t>::value;
    __shared__ __align__(16) uint32_t words[COLUMNS * ROWS / 4];
    __shared__ __align__(16) float inv[COLUMNS];
    int c0 = (int)blockIdx.x * COLUMNS;
    size_t n0 = (size_t)blockIdx.y * ROWS;
    if (QUANTIZE) {
        int c = c0 + (int)threadIdx.x;
        if (threadIdx.x < COLUMNS) {
            float s = c < C ? int8_row_scale(f32_from_bits(amax[c])) : 0.0f;
            inv[threadIdx.x] = int8_row_inv(s);
            if (c < C && blockIdx.y == 0) scale[c] = s;
        }
        __syncthreads();                                       // inv is complete
    }
    int group = (int)threadIdx.x % 8, four = (int)threadIdx.x / 8, c = c0 + group * 8;
    uint32_t w[8] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        size_t n = n0 + (size_t)(four * 4 + i);
        if (n >= N || c >= C) continue;
        const In *p = x + n * (size_t)C + c;
        int there = VEC || C - c > 8 ? 8 : C - c;
        if constexpr (QUANTIZE) {
            float f[8] = {};
            if (VEC) load_values(f, p);
            else for (int j = 0; j < 8; j++) if (j < there) f[j] = x2f(p[j]);
#pragma unroll
            for (int j = 0; j < 8; j++) w[j] |= code_byte(f[j], inv[group * 8 + j]) << 8 * i;
        } else {
            Vec<int8_t, 8> f = {};
            if (VEC) f = vec_load<int8_t, 8>(p);
            else for (int j = 0; j < 8; j++) if (j < there) f.v[j] = p[j];
#pragma unroll
            for (int j = 0; j < 8; j++) w[j] |= (uint32_t)(uint8_t)f.v[j] << 8 * i;
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) words[(group * 8 + j) * (ROWS / 4) + (four ^ 4 * group)] = w[j];
    __syncthreads();                                           // words are complete
    for (int i = (int)threadIdx.x; i < COLUMNS * ROWS / 16; i += 256) {
        int column = i / (ROWS / 16), part = i % (ROWS / 16);
        size_t n = n0 + (size_t)part * 16;
        if (c0 + column >= C || n >= K) continue;
        Vec<uint32_t, 4> v = vec_load<uint32_t, 4>(&words[column * (ROWS / 4) + 4 * (part ^ column / 8)]);
        vec_store((uint32_t *)(void *)(q + (size_t)(c0 + column) * K + n), v);
    }
}

template <class In>
static void transpose(int8_t *q, float *scale, const In *x, const unsigned *amax, size_t N, int C, int64_t K) {
    bool vec = (uintptr_t)x % 16 == 0 && C % 8 == 0;
    auto kernel = vec ? transpose_kernel<In, true> : transpose_kernel<In, false>;
    dim3 grid((unsigned)((C + COLUMNS - 1) / COLUMNS), (unsigned)((N + ROWS - 1) / ROWS));
    LAUNCH(kernel, grid, 256, 0, cuda_stream)(q, scale, x, amax, N, C, (size_t)K);
    CUDA_CHECK(cudaGetLastError());
}

// q (C, K), scale (C) of the columns of x (N, C); amax (C) is scratch.
static void quantize_columns(int8_t *q, float *scale, unsigned *amax, const floatX *x, size_t N, int C, int64_t K) {
    bool vec = rows_take_vec(0, x) && C % 8 == 0;
    unsigned across = (unsigned)((C + (vec ? 255 : 31)) / (vec ? 256 : 32));
    size_t slices = (N + 63) / 64, enough = (2048 + across - 1) / across;       // 8 rows a warp at least
    if (slices > enough) slices = enough;
    size_t slice = (N + slices - 1) / slices;
    CUDA_CHECK(cudaMemsetAsync(amax, 0, (size_t)C * sizeof *amax, cuda_stream));
    auto kernel = vec ? column_amax_kernel<8> : column_amax_kernel<1>;
    LAUNCH(kernel, dim3(across, (unsigned)((N + slice - 1) / slice)), 256, 0, cuda_stream)(amax, x, N, C, slice);
    CUDA_CHECK(cudaGetLastError());
    transpose(q, scale, x, amax, N, C, K);
}

// Rows of codes that are not aligned, or not K_UNIT long: zeros from C to K.
static __global__ void __launch_bounds__(256)
pad_rows_kernel(int8_t *q, const int8_t *codes, size_t rows, int C, int K) {
    for (size_t r = blockIdx.x; r < rows; r += gridDim.x)
        for (int k = (int)threadIdx.x; k < K; k += 256)
            q[r * (size_t)K + k] = k < C ? codes[r * (size_t)C + k] : (int8_t)0;
}

// ---------------------------------------------------------------------------------------------
// Products.
typedef struct {
    int64_t M, N, K;            // K: padded, and what rows of both operands lie apart
    const int8_t *a, *b;        // (M, K), (N, K)
    const float *sa, *sb;       // (M); (N) or NULL
    bool accumulate;
} IntProduct;

// s = f32(acc) * sa * sb, the last where given; c = s or c + s.
template <class Out>
static __device__ __forceinline__ void finish(Out *c, float s, float sa, const float *sb, size_t n, bool accumulate) {
    s *= sa;
    if (sb) s *= sb[n];
    store(c, accumulate ? load(c) + s : s);
}

// c (M, N) scaled, or the sums themselves where c is int32.
template <class Out>
static __global__ void __launch_bounds__(TILE_THREADS, 2)
int8_tiles_kernel(Out *c, const int8_t *a, const int8_t *b, const float *sa, const float *sb, size_t M, size_t N,
                  size_t K, size_t ld, bool accumulate, bool pairs) {
    DYN_SHARED(int8_t, ring);
    size_t m0, n0;
    tile_place(&m0, &n0, M, N);
    int acc[4][4][4] = {};
    tile_sums<false, true, true>(acc, ring, a, b, m0, n0, M, N, K, ld, ld);
    tile_store(acc, m0, n0, M, [&](size_t m, size_t n, int s0, int s1) {
        Out *p = c + m * N + n;
        if constexpr (std::is_same<Out, int>::value) {
            if (pairs && n < N) {
                store_pair(p, s0, s1);
            } else {
                if (n < N) p[0] = s0;
                if (n + 1 < N) p[1] = s1;
            }
        } else {
            float s = sa[m];
            if (pairs && n < N && !accumulate) {
                float f0 = (float)s0 * s, f1 = (float)s1 * s;
                store_pair(p, sb ? f0 * sb[n] : f0, sb ? f1 * sb[n + 1] : f1);
            } else {
                if (n < N) finish(p, (float)s0, s, sb, n, accumulate);
                if (n + 1 < N) finish(p + 1, (float)s1, s, sb, n + 1, accumulate);
            }
        }
    });
}

template <class Out>
static void tiles(Out *c, const IntProduct *p, const int8_t *a, const int8_t *b, int64_t M, int64_t K) {
    auto kernel = int8_tiles_kernel<Out>;
    if (!allow_shared(kernel, TILES_SHARED)) return;
    bool pairs = p->N % 2 == 0 && (uintptr_t)c % (2 * sizeof *c) == 0;
    LAUNCH(kernel, tile_blocks(M, p->N), TILE_THREADS, TILES_SHARED, cuda_stream)
        (c, a, b, p->sa, p->sb, (size_t)M, (size_t)p->N, (size_t)K, (size_t)p->K, p->accumulate, pairs);
    CUDA_CHECK(cudaGetLastError());
}

// The last steps apart from the product, a row a block: s = f32(acc), or before + f32(acc) from the pieces before it;
// into `after` where more follow, else scaled into c.
template <class Out, int V>
static __global__ void __launch_bounds__(256)
finish_kernel(Out *c, const int *acc, const float *before, float *after, const float *sa, const float *sb, int N,
              bool accumulate) {
    size_t row = (size_t)blockIdx.x * (size_t)N;
    float scale = sa[blockIdx.x];
    for (int n = (int)threadIdx.x * V; n < N; n += (int)blockDim.x * V) {
        constexpr int W = V < 4 ? V : 4;
        Vec<Out, V> out;
#pragma unroll
        for (int j = 0; j < V; j += W) {
            Vec<int, W> i = vec_load<int, W>(acc + row + n + j);
            float s[W];
            for (int e = 0; e < W; e++) s[e] = (float)i.v[e];
            if (before) {
                float b[W];
                load_f32(b, before + row + n + j);
                for (int e = 0; e < W; e++) s[e] = b[e] + s[e];
            }
            if (after) {
                store_f32(after + row + n + j, s);
                continue;
            }
            float t[W];
            if (sb) load_f32(t, sb + n + j);
            for (int e = 0; e < W; e++) {
                s[e] *= scale;
                if (sb) s[e] *= t[e];
                if (accumulate) s[e] = load(c + row + n + j + e) + s[e];
                store(&out.v[j + e], s[e]);
            }
        }
        if (after) continue;
        constexpr int S = V * (int)sizeof(Out) > 16 ? 16 / (int)sizeof(Out) : V;     // 16 bytes at a time
#pragma unroll
        for (int j = 0; j < V; j += S) {
            Vec<Out, S> part;
            for (int e = 0; e < S; e++) part.v[e] = out.v[j + e];
            vec_store(c + row + n + j, part);
        }
    }
}

// Working memory of a product: int32 sums of some rows, and f32 sums of the pieces before where there are several. None
// where the tiles make it in one go.
static int64_t rows_apart(const IntProduct *p) {
    int64_t rows = cuda_scaled_rows(p->M, p->N);
    Product part = {};
    part.tb = part.i8 = true;
    part.M = rows;
    part.N = p->N;
    part.K = p->K < PIECE ? p->K : PIECE;
    part.ld = p->K;
    bool library = cuda_matmul_allowed(MATMUL_LIBRARY) && cublaslt_plan(&part, false, nullptr, nullptr, nullptr);
    return library || p->K > PIECE ? rows : 0;
}
static size_t sums_bytes(const IntProduct *p) {
    return (size_t)rows_apart(p) * (size_t)p->N * (sizeof(int) + (p->K > PIECE ? sizeof(float) : 0));
}

// work: sums_bytes.
template <class Out> static void product(Out *c, const IntProduct *p, void *work) {
    int64_t rows = rows_apart(p);
    if (rows == 0) {
        tiles(c, p, p->a, p->b, p->M, p->K);
        return;
    }
    int *acc = (int *)work;
    float *sums = (float *)(acc + rows * p->N);
    Product part = {};
    part.tb = part.i8 = true;
    part.N = p->N;
    part.ld = p->K;
    for (int64_t m = 0; m < p->M; m += rows)
        for (int64_t k = 0; k < p->K; k += PIECE) {
            const int8_t *a = p->a + m * p->K + k, *b = p->b + k;
            part.M = p->M - m < rows ? p->M - m : rows;
            part.K = p->K - k < PIECE ? p->K - k : PIECE;
            const struct CublasltPlan *plan =
                cuda_matmul_allowed(MATMUL_LIBRARY) ? cublaslt_plan(&part, false, acc, a, b) : nullptr;
            if (plan) cublaslt_run(plan, false, acc, a, b, nullptr);
            else tiles(acc, p, a, b, part.M, part.K);
            Out *to = c + m * p->N;
            bool vec = p->N % 8 == 0 && rows_take_vec(0, to, p->sb);
            auto kernel = vec ? finish_kernel<Out, 8> : finish_kernel<Out, 1>;
            int64_t warps = ((vec ? p->N / 8 : p->N) + 31) / 32;
            LAUNCH(kernel, (unsigned)part.M, 32 * (unsigned)(warps < 8 ? warps : 8), 0, cuda_stream)
                (to, acc, k ? sums : nullptr, k + PIECE < p->K ? sums : nullptr, p->sa + m, p->sb, (int)p->N,
                 p->accumulate);
            CUDA_CHECK(cudaGetLastError());
        }
}

// For the served form of weights with a scale a row (served_i.cu).
static IntProduct int_product(int64_t M, int64_t N, int64_t K) {
    IntProduct p = {};
    p.M = M;
    p.N = N;
    p.K = K;
    return p;
}
size_t cuda_int8_bytes(int64_t M, int64_t N, int64_t K) {
    IntProduct p = int_product(M, N, K);
    return sums_bytes(&p);
}
template <class Out>
void cuda_int8_product(Out *c, const int8_t *a, const int8_t *b, const float *sa, const float *sb, int64_t M, int64_t N,
                       int64_t K, void *work) {
    IntProduct p = int_product(M, N, K);
    p.a = a;
    p.b = b;
    p.sa = sa;
    p.sb = sb;
    product(c, &p, work);
}
template void cuda_int8_product(float *, const int8_t *, const int8_t *, const float *, const float *, int64_t, int64_t,
                                int64_t, void *);
#ifndef PRECISION_FP32
template void cuda_int8_product(floatX *, const int8_t *, const int8_t *, const float *, const float *, int64_t,
                                int64_t, int64_t, void *);
#endif

// ---------------------------------------------------------------------------------------------
// The operations. Working memory is one piece: offsets of its parts first, then what lies there.
static size_t place(size_t *total, size_t bytes) {
    size_t at = *total;
    *total += (bytes + 255) / 256 * 256;
    return at;
}
static int64_t padded(int64_t K) { return (K + K_UNIT - 1) / K_UNIT * K_UNIT; }

template <class Out>
static void forward(Out *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C, int OC) {
    if (N == 0) return;
    IntProduct p = {};
    p.M = (int64_t)N;
    p.N = OC;
    p.K = padded(C);
    bool copy = p.K != C || (uintptr_t)codes % K_UNIT;
    size_t bytes = 0, at_x = place(&bytes, N * (size_t)p.K), at_scale = place(&bytes, N * sizeof(float));
    size_t at_w = place(&bytes, copy ? (size_t)OC * (size_t)p.K : 0), at_sums = place(&bytes, sums_bytes(&p));
    char *work = (char *)cuda_workspace(bytes);
    if (!work) return;
    quantize_rows((int8_t *)work + at_x, (float *)(work + at_scale), x, nullptr, N, C, (int)p.K);
    if (copy) {
        LAUNCH(pad_rows_kernel, grid_for((size_t)OC), 256, 0, cuda_stream)
            ((int8_t *)work + at_w, codes, (size_t)OC, C, (int)p.K);
        CUDA_CHECK(cudaGetLastError());
    }
    p.a = (int8_t *)work + at_x;
    p.b = copy ? (int8_t *)work + at_w : codes;
    p.sa = (float *)(work + at_scale);
    p.sb = wscale;
    product(y, &p, work + at_sums);
}

void cuda_linear_i8_forward(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                            int OC) {
    forward(y, x, codes, wscale, N, C, OC);
}
void cuda_linear_i8_forward_f32(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                                int OC) {
    forward(y, x, codes, wscale, N, C, OC);
}

void cuda_linear_i8_backward_input(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale, size_t N,
                                   int C, int OC) {
    if (N == 0) return;
    IntProduct p = {};
    p.M = (int64_t)N;
    p.N = C;
    p.K = padded(OC);
    size_t bytes = 0, at_dy = place(&bytes, N * (size_t)p.K), at_scale = place(&bytes, N * sizeof(float));
    size_t at_w = place(&bytes, (size_t)C * (size_t)p.K), at_sums = place(&bytes, sums_bytes(&p));
    char *work = (char *)cuda_workspace(bytes);
    if (!work) return;
    quantize_rows((int8_t *)work + at_dy, (float *)(work + at_scale), dy, wscale, N, OC, (int)p.K);
    transpose((int8_t *)work + at_w, nullptr, codes, nullptr, (size_t)OC, C, p.K);
    p.a = (int8_t *)work + at_dy;
    p.b = (int8_t *)work + at_w;
    p.sa = (float *)(work + at_scale);
    product(dx, &p, work + at_sums);
}

void cuda_linear_i8_backward_weight(float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC,
                                    bool accumulate) {
    if (N == 0) {
        if (!accumulate) CUDA_CHECK(cudaMemsetAsync(dw, 0, (size_t)OC * (size_t)C * sizeof *dw, cuda_stream));
        return;
    }
    IntProduct p = {};
    p.M = OC;
    p.N = C;
    p.K = padded((int64_t)N);
    p.accumulate = accumulate;
    int most = OC > C ? OC : C;
    size_t bytes = 0, at_dy = place(&bytes, (size_t)OC * (size_t)p.K), at_x = place(&bytes, (size_t)C * (size_t)p.K);
    size_t at_sg = place(&bytes, (size_t)OC * sizeof(float)), at_sx = place(&bytes, (size_t)C * sizeof(float));
    size_t at_amax = place(&bytes, (size_t)most * sizeof(unsigned)), at_sums = place(&bytes, sums_bytes(&p));
    char *work = (char *)cuda_workspace(bytes);
    if (!work) return;
    unsigned *amax = (unsigned *)(work + at_amax);
    quantize_columns((int8_t *)work + at_dy, (float *)(work + at_sg), amax, dy, N, OC, p.K);
    quantize_columns((int8_t *)work + at_x, (float *)(work + at_sx), amax, x, N, C, p.K);
    p.a = (int8_t *)work + at_dy;
    p.b = (int8_t *)work + at_x;
    p.sa = (float *)(work + at_sg);
    p.sb = (float *)(work + at_sx);
    product(dw, &p, work + at_sums);
}
