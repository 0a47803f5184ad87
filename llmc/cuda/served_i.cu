// Served forms of codes against inputs that are quantized by row (ops.h): 8da4w, int8dq and their like, in integers.
// The sums of a group are exact, and what follows is a fixed expression in f32: the bits of the CPU wing, whichever of
// the kernels here makes them.
//
// With fields f (served.cuh; of 8 bits less 128) and the field z of a zero point, a group of n columns is
//   acc = sum (qx - zx) (f - z) = sum qx f - z sum qx - zx (sum f - n z)
// where all of these are integers; modulo 2^32, so that only acc must fit. An 8-bit unsigned input is less 128 too,
// codes and zero point: then both operands are int8.
//
// Inputs: a block a row finds scale and zero point and writes the codes, and their sum by slots (16 bytes of weights:
// 32 columns of 4 bits, 16 of 8).
//
// 1. Few tokens: a warp takes R rows of the weights, a lane a slot of each; dp4a sums four products. For int4 one token
//    takes 16 dp4a (8 of them for sum f) and 8 masks a slot: 0.8 instructions a weight, where 3 TB/s leave time for 5.5
//    (matvec.cuh), so memory is the bound up to some four tokens. The chain of fmaf over groups is one lane's per row
//    and token: lanes leave f32(acc) and scale of each group in shared memory, 64 slots at a time, and it reads them
//    from there; 64 steps of about two instructions while the other warps load.
// 2. Many tokens, groups: tiles (tiles.cuh) of weights less z as int8, which are unpacked in working memory with the
//    sum of each group. With groups of 32 an mma makes a group: its sums begin at -zx sum (f - z), and four fmaf with
//    the group's scales follow. An mma of 4096 products for a warp has 12 such instructions, so this runs at about half
//    of the rate of int8 tiles, with longer groups nearer to it.
// 3. Many tokens, a scale a row, nothing with a zero point (int8dq): the product of linear_i8_forward, by cuBLASLt.
// 4. Whatever else: a warp a row, a column a lane, for blocks of any width.
#include "fakequant.cuh"
#include "matmul.cuh"
#include "served.cuh"
#include "tiles.cuh"

#define FEW 8
#define PIECE (1 << 16)             // columns of one exact sum (ops.h)

static bool layout(ServedLayout *l, const QuantSpec *wq, int OC, int C) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(wq, OC, C, block, &err) < 0 || block[0] != 1) return false;
    if (wq->bits == 8 && quant_has_zero(wq) && block[1] > 1 << 15) return false;     // sums beyond int32
    *l = ServedLayout{};
    l->stored_bits = stored_bits(wq->bits);
    l->across = (int)(C / block[1]);
    int slot = 128 / l->stored_bits;
    int64_t span = block[1] / slot;                             // slots of a group: lanes whose sums are joined
    bool groups = block[1] % slot == 0 && span <= 32 && (span & (span - 1)) == 0;
    l->plain = !(l->across == 1 || groups) || C > PIECE;
    l->row_bytes = l->plain ? quant_row_bytes(wq->bits, C) : (size_t)((C + slot - 1) / slot) * 16;
    size_t n = (size_t)OC * (size_t)l->across, total = 0;
    served_place(&total, (size_t)OC * l->row_bytes);
    l->scale = served_place(&total, n * (l->plain || l->across == 1 ? sizeof(float) : sizeof(bf16)));
    l->zero = served_place(&total, quant_has_zero(wq) ? n * (l->plain ? sizeof(float) : 1) : 0);
    l->bytes = total;
    return true;
}

size_t served_i_bytes(const QuantSpec *wq, int OC, int C) {
    ServedLayout l;
    return layout(&l, wq, OC, C) ? l.bytes : 0;
}

// What is added to a code or its zero point to make what is stored.
static int stored_shift(const QuantSpec *wq) { return field_shift(wq) - (stored_bits(wq->bits) == 8 ? 128 : 0); }

void served_i_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C) {
    ServedLayout l;
    if (!layout(&l, wq, OC, C)) return;
    uint8_t *base = (uint8_t *)served, *to = base + (size_t)row0 * l.row_bytes;
    size_t first = (size_t)row0 * (size_t)l.across, n = (size_t)rows * (size_t)l.across;
    const size_t bytes = (size_t)rows * l.row_bytes;
    if (l.plain) CUDA_CHECK(cudaMemcpyAsync(to, codes, bytes, cudaMemcpyDeviceToDevice, cuda_stream));
    else served_pack_fields(to, l.row_bytes, codes, wq, rows, C, l.stored_bits == 4, l.stored_bits == 8);
    if (l.plain || l.across == 1)
        served_pack_params((float *)(void *)(base + l.scale) + first, PARAMS_F32, scale, nullptr, 0.0f, n);
    else served_pack_params((bf16 *)(void *)(base + l.scale) + first, PARAMS_BF16, scale, nullptr, 0.0f, n);
    if (!zero) return;
    if (l.plain) served_pack_params((float *)(void *)(base + l.zero) + first, PARAMS_F32, zero, nullptr, 0.0f, n);
    else served_pack_params(base + l.zero + first, PARAMS_BYTE, scale, zero, (float)stored_shift(wq), n);
}

// The product modulo 2^32.
static __device__ __forceinline__ int times(int a, int b) { return (int)((unsigned)a * (unsigned)b); }
static __device__ __forceinline__ int plus(int a, int b) { return (int)((unsigned)a + (unsigned)b); }
static __device__ __forceinline__ int minus(int a, int b) { return (int)((unsigned)a - (unsigned)b); }

// ---------------------------------------------------------------------------------------------
// Inputs. A block a row; a lane four columns.
typedef struct {
    int8_t *codes;              // (N, K), zeros behind column C
    float *scale;               // (N)
    int *zero;                  // (N), shifted as the codes are
    int *sums;                  // (N, slots) of the codes of a slot
    int K, slots;
} Inputs;

template <bool VEC>
static __global__ void __launch_bounds__(ROW_THREADS_MAX)
quantize_inputs_kernel(Inputs in, const floatX *x, QuantSpec act, int C, int words_of_slot) {
    const size_t n = blockIdx.x;
    const floatX *row = x + n * (size_t)C;
    const int shift = act.is_unsigned && act.bits == 8 ? 128 : 0, words = in.K / 4;
    auto load = [&](float (&f)[4], int word) {
        Vec<floatX, 4> v = {};
        if (VEC && word * 4 < C) v = vec_load<floatX, 4>(row + word * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!VEC && word * 4 + i < C) v.v[i] = row[word * 4 + i];
            f[i] = x2f(v.v[i]);
        }
    };
    float mn = INFINITY, mx = -INFINITY;
    for (int w = (int)threadIdx.x; w < words; w += (int)blockDim.x) {
        float f[4];
        load(f, w);
#pragma unroll
        for (int i = 0; i < 4; i++) if (w * 4 + i < C) widen(&mn, &mx, f[i], f[i]);
    }
    QParams p = block_qparams(mn, mx, &act);
    if (threadIdx.x == 0) {
        in.scale[n] = p.scale;
        in.zero[n] = (int)p.zp - shift;
    }
    for (int w0 = 0; w0 < words; w0 += (int)blockDim.x) {       // whole warps come to the shuffles
        int w = w0 + (int)threadIdx.x, sum = 0;
        uint32_t word = 0;
        if (w < words) {
            float f[4];
            load(f, w);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (w * 4 + i < C) {
                    int q = quant_code(f[i], p, &act, QD_X) - shift;
                    word |= (uint32_t)(q & 255) << 8 * i;
                    sum += q;
                }
            ((uint32_t *)(void *)in.codes)[n * (size_t)words + (size_t)w] = word;
        }
        for (int bit = 1; bit < words_of_slot; bit *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, bit);
        if (w < words && w % words_of_slot == 0) in.sums[n * (size_t)in.slots + (size_t)(w / words_of_slot)] = sum;
    }
}

static void quantize_inputs(const Inputs *in, const floatX *x, const QuantSpec *act, size_t N, int C) {
    bool vec = C % 4 == 0 && (uintptr_t)x % (4 * sizeof *x) == 0;
    auto kernel = vec ? quantize_inputs_kernel<true> : quantize_inputs_kernel<false>;
    int warps = (in->K / 4 + 31) / 32, most = N < 512 ? ROW_THREADS_MAX / 32 : 8;
    LAUNCH(kernel, (unsigned)N, 32 * (unsigned)(warps < most ? warps : most), 0, cuda_stream)
        (*in, x, *act, C, in->K / 4 / in->slots);
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------
// 1. Few tokens.
#define ROW_WARPS 4
#define ROUND 64                    // slots whose groups wait in shared memory at a time

// zero: fields of the groups' zero points, NULL: `middle` is everyone's.
struct Weights {
    const uint8_t *codes;
    const void *scale;
    const int8_t *zero;
    int middle, slots, span, C;     // slots of a row and of a group
};

// sum f x and sum f of one slot.
template <int STORED> struct SlotWords;
template <> struct SlotWords<4> {
    static const int WORDS = 8;
    static __device__ __forceinline__ void spread(int (&f)[8], uint4 u) {
        const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            f[2 * i] = (int)(w[i] & 0x0f0f0f0fu);
            f[2 * i + 1] = (int)(w[i] >> 4 & 0x0f0f0f0fu);
        }
    }
};
template <> struct SlotWords<8> {
    static const int WORDS = 4;
    static __device__ __forceinline__ void spread(int (&f)[4], uint4 u) {
        f[0] = (int)u.x, f[1] = (int)u.y, f[2] = (int)u.z, f[3] = (int)u.w;
    }
};

// R rows a warp against NT tokens, of which N are there. Four blocks a multiprocessor: for more the compiler would spill.
template <int STORED, bool GROUPS, int NT, int R>
static __global__ void __launch_bounds__(32 * ROW_WARPS, 4)
few_kernel(ServedOut y, Inputs in, Weights w, int N, int OC) {
    const int M = R * NT, WORDS = SlotWords<STORED>::WORDS, COLUMNS = 4 * WORDS;
    __shared__ Vec<float, 2> groups[ROW_WARPS][GROUPS ? M : 1][GROUPS ? ROUND + 1 : 1];     // f32(acc), scale
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = ((int)blockIdx.x * ROW_WARPS + warp) * R;
    if (row0 >= OC) return;                                     // whole warps, and no barrier is the block's
    const int across = w.slots / w.span, rows = min(R, OC - row0);
    const uint8_t *codes = w.codes + (size_t)row0 * w.slots * 16;
    int zx[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) zx[n] = n < N ? in.zero[n] : 0;
    float t = 0.0f;                                             // of lane m's row m / NT and token m % NT
    int total[M] = {};
    uint4 next[R];
    float scale[R] = {};
    auto load = [&](int slot) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            bool there = slot < w.slots && r < rows;
            next[r] = load16_once_if(codes + ((size_t)r * w.slots + slot) * 16, there);
            const size_t group = (size_t)(row0 + r) * across + slot / w.span;
            if (GROUPS) scale[r] = bf16_to_f32(load2_if((const bf16 *)w.scale + group, there));
        }
    };
    load(lane);
    for (int base = 0; base < w.slots; base += ROUND) {
        if (GROUPS) __syncwarp();                               // the groups before have been read
#pragma unroll 1
        for (int half = 0; half < ROUND && base + half < w.slots; half += 32) {
            const int slot = base + half + lane, there = min(max(w.C - slot * COLUMNS, 0), COLUMNS);
            uint4 now[R];
            float s[R];
#pragma unroll
            for (int r = 0; r < R; r++) now[r] = next[r], s[r] = scale[r];
            load(slot + 32);
            int f[R][WORDS], sum[R], z[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                SlotWords<STORED>::spread(f[r], now[r]);
                sum[r] = 0;
#pragma unroll
                for (int i = 0; i < WORDS; i++) sum[r] = __dp4a(f[r][i], 0x01010101, sum[r]);
                z[r] = w.middle;
                if (w.zero && slot < w.slots && r < rows) {
                    z[r] = w.zero[(size_t)(row0 + r) * across + (GROUPS ? slot / w.span : 0)];
                    if (STORED == 4) z[r] &= 255;
                }
                sum[r] = minus(sum[r], times(there, z[r]));
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 u[WORDS / 4] = {};
                int sx = 0;
                if (slot < w.slots && n < N) {
                    const uint4 *from = (const uint4 *)(const void *)(in.codes + (size_t)n * in.K + slot * COLUMNS);
#pragma unroll
                    for (int i = 0; i < WORDS / 4; i++) u[i] = from[i];
                    sx = in.sums[(size_t)n * in.slots + slot];
                }
#pragma unroll
                for (int r = 0; r < R; r++) {
                    int a = 0;
#pragma unroll
                    for (int i = 0; i < WORDS / 4; i++) {
                        a = __dp4a(f[r][4 * i], (int)u[i].x, a);
                        a = __dp4a(f[r][4 * i + 1], (int)u[i].y, a);
                        a = __dp4a(f[r][4 * i + 2], (int)u[i].z, a);
                        a = __dp4a(f[r][4 * i + 3], (int)u[i].w, a);
                    }
                    a = minus(minus(a, times(z[r], sx)), times(zx[n], sum[r]));
                    if (GROUPS) {
                        for (int bit = 1; bit < w.span; bit *= 2) a = plus(a, __shfl_xor_sync(FULL_WARP, a, bit));
                        Vec<float, 2> group = {{(float)a, s[r]}};
                        if (lane % w.span == 0)
                            vec_store(&groups[warp][r * NT + n][(half + lane) / w.span].v[0], group);
                    } else {
                        total[r * NT + n] = plus(total[r * NT + n], a);
                    }
                }
            }
        }
        if (GROUPS) {
            __syncwarp();                                       // the groups of these slots are there
            const int count = min(ROUND, w.slots - base) / w.span;
            if (lane < M)
#pragma unroll 8
                for (int g = 0; g < count; g++) {
                    Vec<float, 2> v = vec_load<float, 2>(&groups[warp][lane][g].v[0]);
                    t = fmaf(v.v[0], v.v[1], t);
                }
        }
    }
    if (!GROUPS) {
        int mine = 0;
#pragma unroll
        for (int m = 0; m < M; m++) {
            for (int bit = 16; bit; bit /= 2) total[m] = plus(total[m], __shfl_xor_sync(FULL_WARP, total[m], bit));
            if (lane == m) mine = total[m];
        }
        t = (float)mine;
    }
    const int r = lane / NT, n = lane % NT;
    if (lane >= M || r >= rows || n >= N) return;
    float v = GROUPS ? t * in.scale[n] : t * in.scale[n] * ((const float *)w.scale)[row0 + r];
    size_t at = (size_t)n * OC + (size_t)(row0 + r);
    if (y.x) y.x[at] = f2x(v);
    else y.f[at] = v;
}

template <int STORED, bool GROUPS, int NT, int R>
static void launch_few(ServedOut y, const Inputs *in, const Weights *w, int N, int OC) {
    auto kernel = few_kernel<STORED, GROUPS, NT, R>;
    LAUNCH(kernel, (unsigned)((OC + ROW_WARPS * R - 1) / (ROW_WARPS * R)), 32 * ROW_WARPS, 0, cuda_stream)
        (y, *in, *w, N, OC);
    CUDA_CHECK(cudaGetLastError());
}

// The rows of y, and of the inputs, from token t on.
static ServedOut out_at(ServedOut y, size_t at) { return {y.x ? y.x + at : nullptr, y.f ? y.f + at : nullptr}; }
static Inputs inputs_at(const Inputs *in, size_t t) {
    return {in->codes + t * (size_t)in->K, in->scale + t, in->zero + t, in->sums + t * (size_t)in->slots, in->K,
            in->slots};
}

template <int STORED, bool GROUPS>
static void few(ServedOut y, const Inputs *all, const Weights *w, size_t N, int OC) {
    for (size_t t = 0; t < N; t += FEW) {
        int n = N - t < FEW ? (int)(N - t) : FEW;
        auto launch = n == 1 ? launch_few<STORED, GROUPS, 1, 4> : n == 2 ? launch_few<STORED, GROUPS, 2, 4>
                      : n <= 4 ? launch_few<STORED, GROUPS, 4, 2> : launch_few<STORED, GROUPS, 8, 1>;
        Inputs in = inputs_at(all, t);
        launch(out_at(y, t * (size_t)OC), &in, w, n, OC);
    }
}

// ---------------------------------------------------------------------------------------------
// 2. Many tokens, or a scale a row with zero points.

// What a group's columns of the tiles need: scale and the sum of f - z.
struct GroupOf { float scale; int sum; };

// codes (rows, K) = fields less z, groups (across, ld) from fields of `rows` rows; a warp a row.
template <int STORED>
static __global__ void __launch_bounds__(256)
spread_kernel(int8_t *codes, GroupOf *groups, Weights w, bool scale_f32, int rows, int ld, int K) {
    const int WORDS = SlotWords<STORED>::WORDS, COLUMNS = 4 * WORDS, lane = threadIdx.x % 32;
    const int row = (int)blockIdx.x * 8 + (int)threadIdx.x / 32, across = scale_f32 ? 1 : w.slots / w.span;
    if (row >= rows) return;                                    // whole warps
    int all = 0;
    for (int first = 0; first < w.slots; first += 32) {
        const int slot = first + lane, there = min(max(w.C - slot * COLUMNS, 0), COLUMNS);
        int f[WORDS] = {}, sum = 0, z = w.middle;
        if (slot < w.slots) {
            SlotWords<STORED>::spread(f, ((const uint4 *)(const void *)w.codes)[(size_t)row * w.slots + slot]);
            if (w.zero) z = w.zero[(size_t)row * across + (scale_f32 ? 0 : slot / w.span)];
            if (STORED == 4) z &= 255;
#pragma unroll
            for (int i = 0; i < WORDS; i++) sum = __dp4a(f[i], 0x01010101, sum);
            sum = minus(sum, times(there, z));
            uint32_t zeros = (uint32_t)z * 0x01010101u;
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                Vec<uint32_t, 4> v;
                for (int j = 0; j < 4; j++)                     // bytes of at most 15 less ones of at most 15
                    v.v[j] = STORED == 8 ? (uint32_t)f[i + j]
                                         : (((uint32_t)f[i + j] | 0x80808080u) - zeros) ^ 0x80808080u;
                vec_store((uint32_t *)(void *)(codes + (size_t)row * K + slot * COLUMNS + 4 * i), v);
            }
        }
        if (scale_f32) {
            all = plus(all, sum);
            continue;
        }
        for (int bit = 1; bit < w.span; bit *= 2) sum = plus(sum, __shfl_xor_sync(FULL_WARP, sum, bit));
        if (slot < w.slots && slot % w.span == 0) {
            int g = slot / w.span;
            groups[(size_t)g * ld + row] = {bf16_to_f32(((const bf16 *)w.scale)[(size_t)row * across + g]), sum};
        }
    }
    if (!scale_f32) return;
    for (int bit = 16; bit; bit /= 2) all = plus(all, __shfl_xor_sync(FULL_WARP, all, bit));
    if (lane == 0) groups[row] = {((const float *)w.scale)[row], all};
}

// How groups lie in slices of 64 columns: two in each; each of some whole slices; one of all.
enum Grouping { GROUPS_32, GROUPS_64, ONE_GROUP };

// y (M, OC), its columns [0, N) from weights (N, K) and groups (across, ld), ld a multiple of the squares.
template <int GROUPING>
static __global__ void __launch_bounds__(TILE_THREADS, 1)                  // for two blocks registers do not suffice
tiles_kernel(ServedOut y, Inputs in, const int8_t *codes, const GroupOf *groups, size_t M, size_t N, size_t OC, int ld,
             int across) {
    DYN_SHARED(int8_t, ring);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    size_t m0, n0, K = (size_t)in.K;
    tile_place(&m0, &n0, M, N);
    const size_t row = m0 + (size_t)(warp / 4 * 64 + lane / 4), column = n0 + (size_t)(warp % 4 * 32 + lane % 4 * 2);
    __shared__ int zeros[SQUARE];               // of the square's rows; they are there after the first slice's barrier
    for (int i = (int)threadIdx.x; i < SQUARE; i += TILE_THREADS) zeros[i] = m0 + i < M ? in.zero[m0 + i] : 0;
    auto zx = [&](int i, int h) { return zeros[warp / 4 * 64 + lane / 4 + i * 16 + h * 8]; };
    float t[4][4][4] = {};
    int acc[4][4][4] = {};
    const int slices = GROUPING == GROUPS_64 ? in.K / across / SLICE_BYTES : 1;
    tile_slices<false, true, true>(ring, (const int8_t *)in.codes, codes, m0, n0, M, N, K, K, K,
                                   [&](int step, const int8_t *sa, const int8_t *sb) {
#pragma unroll
        for (int kk = 0; kk < SLICE_BYTES / 32; kk++) {
            uint32_t fa[4][4], fb[4][2];
            tile_fragments<false, true>(fa, fb, sa, sb, kk);
            if (GROUPING != GROUPS_32) {
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) mma(acc[i][j], fa[i], fb[j]);
            }
            const int g = GROUPING == GROUPS_32 ? 2 * step + kk : step / slices;
            const bool ends = GROUPING == GROUPS_32 ? g < across
                              : GROUPING == GROUPS_64 ? kk == 1 && (step + 1) % slices == 0 : false;
            if (ends) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    Vec<uint32_t, 4> v = vec_load<uint32_t, 4>(
                        (const uint32_t *)(const void *)(groups + (size_t)g * ld + column + j * 8));
                    const float s[2] = {__uint_as_float(v.v[0]), __uint_as_float(v.v[2])};
                    const int sum[2] = {(int)v.v[1], (int)v.v[3]};
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if (GROUPING == GROUPS_32) {
                            int d[4];
#pragma unroll
                            for (int e = 0; e < 4; e++) d[e] = minus(0, times(zx(i, e / 2), sum[e % 2]));
                            mma(d, fa[i], fb[j]);
#pragma unroll
                            for (int e = 0; e < 4; e++) t[i][j][e] = fmaf((float)d[e], s[e % 2], t[i][j][e]);
                        } else {
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                int d = minus(acc[i][j][e], times(zx(i, e / 2), sum[e % 2]));
                                t[i][j][e] = fmaf((float)d, s[e % 2], t[i][j][e]);
                                acc[i][j][e] = 0;
                            }
                        }
                    }
                }
            }
        }
    });
    if (GROUPING == ONE_GROUP) {
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const GroupOf *of = groups + column + j * 8 + e % 2;
                    size_t m = row + (size_t)(i * 16 + e / 2 * 8);
                    float sx = m < M ? in.scale[m] : 0.0f;
                    t[i][j][e] = (float)minus(acc[i][j][e], times(zx(i, e / 2), of->sum)) * sx * of->scale;
                }
    }
    tile_store(t, m0, n0, M, [&](size_t m, size_t n, float s0, float s1) {
        float sx = GROUPING == ONE_GROUP ? 1.0f : in.scale[m];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (n + (size_t)e >= N) continue;
            size_t at = m * OC + n + (size_t)e;
            float v = GROUPING == ONE_GROUP ? (e ? s1 : s0) : (e ? s1 : s0) * sx;
            if (y.x) y.x[at] = f2x(v);
            else y.f[at] = v;
        }
    });
}

typedef struct { int64_t rows, ld; size_t codes, groups, total; } Spread;

static Spread spread_for(const Weights *w, int K, int OC) {
    Spread s = {};
    int64_t most = (int64_t)(served_piece() / (size_t)K) / SQUARE * SQUARE;
    s.rows = most < SQUARE ? SQUARE : most;
    if (s.rows > OC) s.rows = OC;
    s.ld = (s.rows + SQUARE - 1) / SQUARE * SQUARE;
    s.codes = served_place(&s.total, (size_t)s.rows * (size_t)K);
    s.groups = served_place(&s.total, (size_t)s.ld * (size_t)(w->slots / w->span) * sizeof(GroupOf));
    return s;
}

// work: spread_for's total.
static void many(ServedOut y, const Inputs *in, const Weights *w, int stored, bool groups, size_t N, int OC,
                 char *work) {
    Spread s = spread_for(w, in->K, OC);
    int across = groups ? w->slots / w->span : 1, group = in->K / across;
    int8_t *codes = (int8_t *)work + s.codes;
    GroupOf *of = (GroupOf *)(void *)(work + s.groups);
    auto spread = stored == 4 ? spread_kernel<4> : spread_kernel<8>;
    auto kernel = !groups ? tiles_kernel<ONE_GROUP> : group == 32 ? tiles_kernel<GROUPS_32> : tiles_kernel<GROUPS_64>;
    if (!allow_shared(kernel, TILES_SHARED)) return;
    for (int64_t row = 0; row < OC; row += s.rows) {
        int n = (int)(OC - row < s.rows ? OC - row : s.rows);
        Weights part = *w;
        part.codes += (size_t)row * (size_t)w->slots * 16;
        part.scale = (const char *)w->scale + (size_t)row * (size_t)across * (groups ? sizeof(bf16) : sizeof(float));
        if (w->zero) part.zero += row * across;
        LAUNCH(spread, (unsigned)((n + 7) / 8), 256, 0, cuda_stream)(codes, of, part, !groups, n, (int)s.ld, in->K);
        LAUNCH(kernel, tile_blocks((int64_t)N, n), TILE_THREADS, TILES_SHARED, cuda_stream)
            (out_at(y, (size_t)row), *in, codes, of, N, (size_t)n, (size_t)OC, (int)s.ld, across);
        CUDA_CHECK(cudaGetLastError());
    }
}

// ---------------------------------------------------------------------------------------------
// 4. A warp a row of the weights and a token.
static __global__ void __launch_bounds__(128)
plain_kernel(ServedOut y, Inputs in, const uint8_t *codes, const float *scale, const float *zero, Packed pk, int OC) {
    const int lane = threadIdx.x % 32, row = (int)blockIdx.x * 4 + (int)threadIdx.x / 32;
    const size_t n = blockIdx.y;
    if (row >= OC) return;                                      // whole warps
    codes += (size_t)row * pk.row_bytes;
    const int8_t *x = in.codes + n * (size_t)in.K;
    const int zx = in.zero[n];
    float t = 0.0f, sum = 0.0f;
    for (int g = 0; g < pk.across; g++) {
        const size_t at = (size_t)row * pk.across + g;
        const int zw = (int)(zero ? zero[at] : pk.mid);
        sum = 0.0f;
        for (int c0 = 0; c0 < pk.b1; c0 += PIECE) {
            int acc = 0;
            for (int c = c0 + lane; c < min(pk.b1, c0 + PIECE); c += 32) {
                int column = g * pk.b1 + c, unit = column / 8;
                int q = (int)code_at(load_codes8<0>(codes, unit, &pk), column % 8, &pk);
                acc = plus(acc, times(x[column] - zx, q - zw));
            }
            for (int bit = 16; bit; bit /= 2) acc = plus(acc, __shfl_xor_sync(FULL_WARP, acc, bit));
            sum += (float)acc;
        }
        t = fmaf(sum, scale[at], t);
    }
    if (lane) return;
    float v = pk.across == 1 ? sum * in.scale[n] * scale[row] : t * in.scale[n];
    if (y.x) y.x[n * (size_t)OC + (size_t)row] = f2x(v);
    else y.f[n * (size_t)OC + (size_t)row] = v;
}

static void plain(ServedOut y, const Inputs *in, const uint8_t *base, const ServedLayout *l, const QuantSpec *wq,
                  size_t N, int C, int OC) {
    Packed pk;
    if (!packed_init(&pk, wq, OC, C)) return;
    const float *scale = (const float *)(const void *)(base + l->scale);
    const float *zero = quant_has_zero(wq) ? (const float *)(const void *)(base + l->zero) : nullptr;
    for (size_t t = 0; t < N; t += 32768) {                     // a grid is at most 65535 high
        size_t n = N - t < 32768 ? N - t : 32768;
        LAUNCH(plain_kernel, dim3((unsigned)((OC + 3) / 4), (unsigned)n), 128, 0, cuda_stream)
            (out_at(y, t * (size_t)OC), inputs_at(in, t), base, scale, zero, pk, OC);
        CUDA_CHECK(cudaGetLastError());
    }
}

// ---------------------------------------------------------------------------------------------
// Whether the inputs' zero point, as stored, is always 0.
static bool inputs_without_zero(const QuantSpec *act) {
    return act->mapping != QM_ASYMMETRIC &&
           (act->mapping == QM_ROWS || (int)quant_mid(act) == (act->is_unsigned && act->bits == 8 ? 128 : 0));
}

void served_i_forward(ServedOut y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                      size_t N, int C, int OC) {
    ServedLayout l;
    if (!layout(&l, wq, OC, C)) return;
    const uint8_t *base = (const uint8_t *)served;
    const int columns = l.plain ? 16 : 128 / l.stored_bits;     // of a slot
    Inputs in = {};
    in.slots = (C + columns - 1) / columns;
    in.K = in.slots * columns;
    const bool groups = l.across > 1;
    Weights w = {base, base + l.scale, quant_has_zero(wq) ? (const int8_t *)base + l.zero : nullptr,
                 (int)quant_mid(wq) + stored_shift(wq), in.slots, groups ? in.slots / l.across : 1, C};
    if (!groups) w.span = in.slots;
    // 8-bit fields with zero points of their own do not fit into int8 when these are taken off.
    const bool centred = l.stored_bits == 8 && !w.zero && w.middle == 0;
    const bool library = !l.plain && N > FEW && !groups && centred && inputs_without_zero(act);
    const bool tiled = !l.plain && N > FEW && !library && (l.stored_bits == 4 || centred) &&
                       (!groups || C / l.across == 32 || C / l.across % 64 == 0);

    size_t total = 0, at_codes = served_place(&total, N * (size_t)in.K);
    size_t at_scale = served_place(&total, N * sizeof(float)), at_zero = served_place(&total, N * sizeof(int));
    size_t at_sums = served_place(&total, N * (size_t)in.slots * sizeof(int));
    size_t at_work = served_place(&total, tiled ? spread_for(&w, in.K, OC).total
                                          : library ? cuda_int8_bytes((int64_t)N, OC, in.K) : 0);
    char *work = (char *)cuda_workspace(total);
    if (!work) return;
    in.codes = (int8_t *)work + at_codes;
    in.scale = (float *)(void *)(work + at_scale);
    in.zero = (int *)(void *)(work + at_zero);
    in.sums = (int *)(void *)(work + at_sums);
    quantize_inputs(&in, x, act, N, C);

    if (l.plain) {
        plain(y, &in, base, &l, wq, N, C, OC);
    } else if (tiled) {
        many(y, &in, &w, l.stored_bits, groups, N, OC, work + at_work);
    } else if (library) {
        const float *scale = (const float *)w.scale;
        const int8_t *codes = (const int8_t *)base;
        char *sums = work + at_work;
        if (y.x) cuda_int8_product(y.x, in.codes, codes, in.scale, scale, (int64_t)N, OC, in.K, sums);
        else cuda_int8_product(y.f, in.codes, codes, in.scale, scale, (int64_t)N, OC, in.K, sums);
    } else {
        auto run = l.stored_bits == 4 ? (groups ? few<4, true> : few<4, false>) : groups ? few<8, true> : few<8, false>;
        run(y, &in, &w, N, OC);
    }
}
