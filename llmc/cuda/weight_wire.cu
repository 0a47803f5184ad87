// Quantized weights on the wire between ranks: weight_pack, weight_unpack (ops.h). The wire is aligned to 16 bytes.
//
// weight_pack reads 4 bytes a weight and writes bits/8 and a group's scale, 0.56 bytes with int4 in groups of 32. So a
// weight is read once, and its codes are made from registers or shared memory, where that can be. A lane takes eight
// weights, 32 bytes of loads, since eight codes of any width are whole bytes (of 4 bits, one store of 4 bytes):
//   - group_kernel  blocks of quantization of up to 256 weights that are whole eights (groups): a power of two of lanes
//                   holds one in registers and finds its range by shuffles; no barriers
//   - row_kernel    longer ones, and rows of any length: a block of threads each; the weights stay in shared memory as
//                   the bf16 values that quantization sees
//   - scale_kernel, code_kernel   everything else, which is rare (blocks of several rows, groups that end within eight
//                   weights, one scale for the tensor): scales first, then codes, which read them from the wire; so
//                   weights are read twice. Of a whole tensor, range_kernel takes the ranges of pieces before.
//
// weight_unpack reads those 0.56 bytes and writes sizeof(floatX), so what counts is the stores: a lane makes eight
// weights (packed.cuh). One launch for all ranks: y of the grid is the rank, and short rows share a block of threads.
#include "packed.cuh"
#include "quantblock.cuh"
#include "ranks.cuh"

#define THREADS 256
#define MAX_ROW_THREADS 512      // of row_kernel
#define MAX_CACHE (96 << 10)     // bytes of weights that row_kernel keeps; longer ones are read again
#define MAX_PARTIALS 1024        // pieces of a tensor that leave a range

// A rank's part of the wire, and how its values are quantized.
struct Sent {
    uint8_t *codes, *zero;       // zero NULL where quantization has no zero points of its own
    bf16 *scale;
    size_t row_bytes;
    QuantSpec s;
};

static __device__ __forceinline__ void store_params(const Sent *w, size_t k, float scale, float zp) {
    w->scale[k] = bf16_from_f32(scale);                        // exact: they are values of bf16
    if (!w->zero) return;
    if (w->s.zero == QZ_FLOAT) ((bf16 *)w->zero)[k] = bf16_from_f32(zp);
    else w->zero[k] = (uint8_t)(int)zp;
}
static __device__ __forceinline__ QParams load_params(const bf16 *scale, const uint8_t *zero, size_t k, float mid,
                                                      bool zero_is_float, bool is_unsigned) {
    QParams p = {bf16_to_f32(scale[k]), mid};
    if (!zero) return p;
    if (zero_is_float) p.zp = bf16_to_f32(((const bf16 *)zero)[k]);
    else p.zp = is_unsigned ? (float)zero[k] : (float)(int8_t)zero[k];
    return p;
}

// The field of a bf16 value's code. Codes are integers below 2^9, and adding 1.5 * 2^23 leaves their low bits in the
// sum's: no conversion, of which a GPU does few at a time.
static __device__ __forceinline__ uint32_t field_of(float x, const BlockQuant *b, uint32_t mask) {
    return f32_bits(clamped(x, b) + (12582912.0f + (b->zero_is_float ? 0.0f : b->zp))) & mask;
}
// n fields of eight, which begin at a byte. BITS is the width where they make one aligned store, else 0.
template <int BITS> static __device__ __forceinline__ void store_fields(uint8_t *to, uint64_t fields, int n, int bits) {
    if (BITS == 4) *(uint32_t *)to = (uint32_t)fields;
    else if (BITS == 8) *(uint64_t *)to = fields;
    else
        for (int i = 0; i < (n * bits + 7) / 8; i++) to[i] = (uint8_t)(fields >> 8 * i);
}
template <int BITS>
static __device__ __forceinline__ void store_codes(uint8_t *to, Vec<bf16, 8> r, int n, const BlockQuant *b,
                                                   int spec_bits) {
    const int bits = BITS ? BITS : spec_bits;
    const uint32_t mask = (1u << bits) - 1;
    uint64_t fields = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (BITS || i < n) fields |= (uint64_t)field_of(bf16_to_f32(r.v[i]), b, mask) << i * bits;
    store_fields<BITS>(to, fields, n, bits);
}

// n of eight weights as bf16 values, V at a time; n is 8 where V is not 1. They widen the range.
template <int V>
static __device__ __forceinline__ Vec<bf16, 8> load_weights(const float *master, int n, float *mn, float *mx) {
    Vec<bf16, 8> r = {};
#pragma unroll
    for (int i = 0; i < 8; i += V) {
        if (V == 1 && i >= n) break;
        Vec<bf16, V> h = to_bf16(vec_load<float, V>(master + i));
        add_range(mn, mx, from_bf16(h));
#pragma unroll
        for (int j = 0; j < V; j++) r.v[i + j] = h.v[j];
    }
    return r;
}

// `count` blocks of b1 weights, a multiple of 8, in a row: `team` lanes each (a power of two, team * 8 >= b1).
template <int BITS, int V>
static __global__ void __launch_bounds__(THREADS)
group_kernel(Sent w, const float *master, size_t count, int b1, int team) {
    int lane = (int)threadIdx.x & (team - 1), eights = b1 / 8, teams = THREADS / team;
    size_t member = threadIdx.x / (unsigned)team;
    for (size_t first = (size_t)blockIdx.x * teams; first < count; first += (size_t)gridDim.x * teams) {
        size_t k = first + member, unit = k * eights + lane;
        bool have = k < count && lane < eights;                // lanes without weights go along, for the shuffles
        float mn = INFINITY, mx = -INFINITY;
        Vec<bf16, 8> r = {};
        if (have) r = load_weights<V>(master + unit * 8, 8, &mn, &mx);
        for (int bits = team / 2; bits; bits >>= 1)
            widen(&mn, &mx, __shfl_xor_sync(FULL_WARP, mn, bits), __shfl_xor_sync(FULL_WARP, mx, bits));
        BlockQuant q = block_quant(mn, mx, &w.s, false);
        if (have) store_codes<BITS>(w.codes + unit * w.s.bits, r, 8, &q, w.s.bits);
        if (lane == 0 && k < count) store_params(&w, k, q.scale, q.zp);
    }
}

// A block of threads a block of b1 weights in a row, whose codes take `bytes` whole bytes. `cached`: there is shared
// memory for the weights.
template <int BITS, int V>
static __global__ void __launch_bounds__(MAX_ROW_THREADS)
row_kernel(Sent w, const float *master, int b1, size_t bytes, bool cached) {
    DYN_SHARED(bf16, cache);
    size_t k = blockIdx.x;
    uint8_t *codes = w.codes + k * bytes;
    float mn = INFINITY, mx = -INFINITY;
    master += k * b1;
    for (int unit = threadIdx.x; unit < (b1 + 7) / 8; unit += blockDim.x) {
        Vec<bf16, 8> r = load_weights<V>(master + unit * 8, min(8, b1 - unit * 8), &mn, &mx);
        if (cached) vec_store(cache + unit * 8, r);
    }
    block_range(&mn, &mx);
    BlockQuant q = block_quant(mn, mx, &w.s, false);
    for (int unit = threadIdx.x; unit < (b1 + 7) / 8; unit += blockDim.x) {    // a thread reads what it wrote itself
        int n = min(8, b1 - unit * 8);
        Vec<bf16, 8> r = cached ? vec_load<bf16, 8>(cache + unit * 8)
                                : load_weights<V>(master + unit * 8, n, &mn, &mx);
        store_codes<BITS>(codes + (size_t)unit * w.s.bits, r, n, &q, w.s.bits);
    }
    if (threadIdx.x == 0) store_params(&w, k, q.scale, q.zp);
}

// The range of what each block of threads reads of n weights.
static __global__ void __launch_bounds__(THREADS) range_kernel(float2 *partials, const float *master, size_t n) {
    float mn = INFINITY, mx = -INFINITY;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) {
        float r = bf16_round(master[i]);
        widen(&mn, &mx, r, r);
    }
    block_range(&mn, &mx);
    if (threadIdx.x == 0) partials[blockIdx.x] = {mn, mx};
}

// Scales and zero points: a team of lanes (a power of two) a block. Of a tensor that is one block, from its partials.
static __global__ void __launch_bounds__(THREADS)
scale_kernel(Sent w, const float *master, Blocks b, int team, const float2 *partials, int n_partials) {
    int lane = (int)threadIdx.x & (team - 1);
    size_t k = ((size_t)blockIdx.x * THREADS + threadIdx.x) / (unsigned)team;
    float mn = INFINITY, mx = -INFINITY;
    if (partials)
        for (int i = lane; i < n_partials; i += team) widen(&mn, &mx, partials[i].x, partials[i].y);
    else if (k < b.count)
        for (size_t e = lane; e < b.b0 * b.b1; e += team) {
            float r = bf16_round(master[block_at(&b, k, e)]);
            widen(&mn, &mx, r, r);
        }
    for (int bits = team / 2; bits; bits >>= 1)
        widen(&mn, &mx, __shfl_xor_sync(FULL_WARP, mn, bits), __shfl_xor_sync(FULL_WARP, mx, bits));
    QParams p = quant_choose(mn, mx, &w.s, QD_BF16);
    if (lane == 0 && k < b.count) store_params(&w, k, p.scale, p.zp);
}

// Codes, of scales that are there. x of a block of threads goes along a row, y over rows.
static __global__ void __launch_bounds__(THREADS) code_kernel(Sent w, const float *master, Blocks b) {
    const uint32_t mask = (1u << w.s.bits) - 1;
    const size_t turn = (size_t)gridDim.x * blockDim.y;
    for (size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y; row < b.rows; row += turn) {
        size_t first = row / b.b0 * b.across;
        for (size_t c = threadIdx.x * 8; c < b.cols; c += blockDim.x * 8) {
            size_t g = c / b.b1, end = (g + 1) * b.b1;
            int n = (int)min((size_t)8, b.cols - c);
            uint64_t fields = 0;
            for (int i = 0; i < n;) {
                QParams p = load_params(w.scale, w.zero, first + g, quant_mid(&w.s), w.s.zero == QZ_FLOAT,
                                        w.s.is_unsigned);
                BlockQuant q = block_quant_of(p, &w.s, false);
                for (; i < n && c + i < end; i++)
                    fields |= (uint64_t)field_of(bf16_round(master[row * b.cols + c + i]), &q, mask) << i * w.s.bits;
                g++;
                end += b.b1;
            }
            store_fields<0>(w.codes + row * w.row_bytes + c / 8 * w.s.bits, fields, n, w.s.bits);
        }
    }
}

// Threads of a block along rows of `eights` (x, a power of two) and over rows (y).
static dim3 threads_for(int64_t eights) {
    unsigned x = 1;
    while (x < THREADS && x < eights) x *= 2;
    return dim3(x, THREADS / x);
}

template <int BITS, int V> static void pack_groups(const Sent *w, const float *master, const Blocks *b) {
    int team = 1;
    while ((size_t)team * 8 < b->b1) team *= 2;
    unsigned grid = grid_for((b->count * (size_t)team + THREADS - 1) / THREADS);
    LAUNCH((group_kernel<BITS, V>), grid, THREADS, 0, cuda_stream)(*w, master, b->count, (int)b->b1, team);
}

template <int BITS, int V> static void pack_rows(const Sent *w, const float *master, const Blocks *b) {
    size_t eights = (b->b1 + 7) / 8, bytes = eights * 8 * sizeof(bf16), half = (eights + 1) / 2;
    unsigned threads = half > MAX_ROW_THREADS ? MAX_ROW_THREADS : (unsigned)(half + 31) / 32 * 32;
    bool cached = bytes <= MAX_CACHE;
    if (cached && !allow_shared(row_kernel<BITS, V>, bytes)) return;
    LAUNCH((row_kernel<BITS, V>), (unsigned)b->count, threads, cached ? bytes : 0, cuda_stream)
        (*w, master, (int)b->b1, quant_row_bytes(w->s.bits, (int64_t)b->b1), cached);
}

static void pack_any(const Sent *w, const float *master, const Blocks *b) {
    size_t n = b->rows * b->cols, size = b->b0 * b->b1, pieces = (n + 16 * THREADS - 1) / (16 * THREADS);
    unsigned n_partials = (unsigned)(pieces < MAX_PARTIALS ? pieces : MAX_PARTIALS);
    float2 *partials = nullptr;
    if (b->count == 1) {
        partials = (float2 *)cuda_workspace(MAX_PARTIALS * sizeof(float2));
        if (!partials) return;
        LAUNCH(range_kernel, n_partials, THREADS, 0, cuda_stream)(partials, master, n);
        CUDA_CHECK(cudaGetLastError());
    }
    int team = 1;
    while (team < 32 && (size_t)team * 2 < size) team *= 2;
    LAUNCH(scale_kernel, (unsigned)((b->count * (size_t)team + THREADS - 1) / THREADS), THREADS, 0, cuda_stream)
        (*w, master, *b, team, partials, (int)n_partials);
    CUDA_CHECK(cudaGetLastError());
    dim3 threads = threads_for((int64_t)(b->cols + 7) / 8);
    LAUNCH(code_kernel, grid_for((b->rows + threads.y - 1) / threads.y), threads, 0, cuda_stream)(*w, master, *b);
}

void cuda_weight_pack(uint8_t *wire, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols, int64_t kn) {
    int64_t block[2];
    Err err;
    if (rows == 0) return;
    if (quant_block_shape(wq, rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return;
    }
    QuantWire at = quant_wire_layout(wq, kn, cols, block);
    Sent w = {wire, quant_has_zero(wq) ? wire + at.zero : nullptr, (bf16 *)(wire + at.scale),
              quant_row_bytes(wq->bits, cols), *wq};
    size_t b0 = (size_t)block[0], b1 = (size_t)block[1];
    Blocks b = {(size_t)rows / b0 * ((size_t)cols / b1), (size_t)cols / b1, b0, b1, (size_t)rows, (size_t)cols};
    bool whole = b1 % 8 == 0, vec = whole && (uintptr_t)master % 16 == 0;
    int bits = whole && (wq->bits == 4 || wq->bits == 8) ? wq->bits : 0;
    if (b0 == 1 && whole && b1 <= 256) {
        auto run = vec ? (bits == 4 ? pack_groups<4, 4> : bits == 8 ? pack_groups<8, 4> : pack_groups<0, 4>)
                       : (bits == 4 ? pack_groups<4, 1> : bits == 8 ? pack_groups<8, 1> : pack_groups<0, 1>);
        run(&w, master, &b);
    } else if (b0 == 1 && (whole || b.across == 1)) {
        auto run = vec ? (bits == 4 ? pack_rows<4, 4> : bits == 8 ? pack_rows<8, 4> : pack_rows<0, 4>)
                       : (bits == 4 ? pack_rows<4, 1> : bits == 8 ? pack_rows<8, 1> : pack_rows<0, 1>);
        run(&w, master, &b);
    } else {
        pack_any(&w, master, &b);
    }
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------
// x of a block of threads goes along a row, y over rows. WHOLE: see working8.
template <int BITS, bool WHOLE>
static __global__ void __launch_bounds__(THREADS)
unpack_kernel(floatX *work, float *wscale, const uint8_t *wire, size_t stride, RankRows split, QuantWire at,
              bool has_zero, Packed pk, bool as_codes, int cols) {
    int64_t begin;
    size_t n = (size_t)rows_of_rank(&split, (int)blockIdx.y, &begin);
    wire += blockIdx.y * stride;
    work += (size_t)begin * cols;
    for (size_t k = (size_t)blockIdx.x * blockDim.y + threadIdx.y; k < n; k += (size_t)gridDim.x * blockDim.y) {
        size_t first = (pk.b0 == 1 ? k : k / pk.b0) * pk.across;
        const bf16 *scale = (const bf16 *)(wire + at.scale) + first;
        const uint8_t *zero = has_zero ? wire + at.zero + first * (pk.zero_is_float ? 2 : 1) : nullptr;
        if (wscale && threadIdx.x == 0) wscale[(size_t)begin + k] = as_codes ? bf16_to_f32(scale[0]) : 1.0f;
        for (int unit = threadIdx.x; unit < (cols + 7) / 8; unit += blockDim.x)
            working8<BITS, WHOLE>(work + k * cols, wire + k * pk.row_bytes, unit, cols, &pk, as_codes, [&](int g) {
                return load_params(scale, zero, (size_t)g, pk.mid, pk.zero_is_float, !pk.sign);
            });
    }
}

void cuda_weight_unpack(floatX *work, float *wscale, const uint8_t *wire, size_t stride, const RowSplit *split,
                        int64_t k0, int64_t kn, const QuantSpec *wq, int64_t cols) {
    int64_t most = rank_rows_most(split, k0, kn);
    Packed pk;
    if (most == 0 || !packed_init(&pk, wq, split->rows, cols)) return;
    const int64_t block[2] = {pk.b0, pk.b1};
    QuantWire at = quant_wire_layout(wq, kn, cols, block);
    bool whole = packed_whole(&pk, work, wire, cols);
    auto kernel = whole && pk.bits == 4 ? unpack_kernel<4, true> : whole && pk.bits == 8 ? unpack_kernel<8, true>
                  : whole ? unpack_kernel<0, true> : unpack_kernel<0, false>;
    dim3 threads = threads_for((cols + 7) / 8);
    dim3 grid(grid_for(((size_t)most + threads.y - 1) / threads.y), (unsigned)split->R);
    LAUNCH(kernel, grid, threads, 0, cuda_stream)
        (work, wscale, wire, stride, rank_rows(split, k0, kn), at, quant_has_zero(wq), pk, quant_works_as_codes(wq),
         (int)cols);
    CUDA_CHECK(cudaGetLastError());
}
