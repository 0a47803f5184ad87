// y (N, OC) = x (N, C) . w (OC, C)^T for up to eight tokens, the rows of w being packed codes or plain floatX: one
// kernel for qmatvec_forward (qmatmul.cu) and cuda_matvec (matvec.cu), the inner loop of decoding.
//
// What bounds it. Each byte of w is read once for all tokens, so the floor is the time to read w. An H100 reads 3 TB/s,
// 13 bytes a cycle and multiprocessor, which starts 128 lanes' instructions in that cycle:
//                      bytes a weight     weights a cycle     instructions there are for each
//   bf16               2                   6.5                19
//   int8 by row        1                  13                   9.8
//   int4, G = 64       0.5 + 4 / 64       23                   5.5     with a scale
//   int4, float zero   0.5 + 8 / 64       21                   6.2     with scale and zero point
// What one token takes, as compiled for sm_90, for rows of 4096 (R = 8 rows share the values of x):
//   bf16   4.0   a shift or mask and a FFMA; the rest is loads, addresses, x and the sums across lanes
//   int8   4.8   PRMT, FADD, FFMA
//   int4   4.5   LOP3, FFMA, FFMA: unpack_step; the first rows of a block, which wait for x, take 5.8
// So memory is the bound for bf16 and int8. int4 starts three quarters of the instructions that there is time for,
// which overlaps with the loads only in part: not measured, 0.65 to 0.75 of the copy bandwidth is to be expected of
// tensors of which a block sees several groups of rows, 0.6 of 4096 x 4096, of which it sees one. Each further token
// adds 1.5 instructions a weight (FFMA, and x for R = 4 rows): with 8 tokens bf16 stays at the bound of memory, int8
// reaches half of it and int4 a third.
//
// What keeps memory busy: 3 TB/s times 0.7 us of latency is 16 KiB a multiprocessor on its way at any time. Each lane
// asks for 16 bytes of each of R = 8 rows before it touches the first, 4 KiB a warp, and asks for its next 16 bytes of
// a row as soon as it has used the last: 16 warps have up to 64 KiB under way. The 8 MiB of a 4096 x 4096 int4 tensor
// are all asked for at once, and x arrives meanwhile.
//
// Shape. There are as many blocks as run at a time. A block takes R rows, then those a whole grid further, whose
// weights it asks for while it works on the last; what is known of x then, and of the addresses, stays. The bytes of
// the rows are cut into chunks of 512: a lane's slot is 16 bytes of it, V weights (32 codes of 4 bits, 16 of 8, 8
// bf16). Chunk k belongs to warp k mod warps. So each value of x is read by one warp of a block, once for R rows. x
// comes by 16-byte loads, neighbours by neighbouring lanes, while a lane needs the V values of its slot, P pieces of 16
// bytes: they pass through shared memory, private to the warp. Piece j of lane l lies at
//   16-byte cell l * P + (j ^ (l / (8 / P)) % P)
// so that eight lanes which write, or read, at once touch all 32 banks. Example, P = 4 (int4 with bf16 x):
//   cells  0..3   lane 0: pieces 0 1 2 3     cells  4..7   lane 1: pieces 0 1 2 3
//   cells  8..11  lane 2: pieces 1 0 3 2     cells 12..15  lane 3: pieces 1 0 3 2     and so on
//
// Order of sums, the same for any number of tokens: a lane's slot is a chain of fmaf in the order of the columns, times
// the scale of its group, and the lane adds its slots in ascending order (with a scale a row, all its slots are one
// chain); lanes fold +16, +8, +4, +2, +1; warps are added in order. How many warps there are follows from the bytes of
// a row.
#ifndef QLLM_MATVEC_CUH
#define QLLM_MATVEC_CUH
#include "ptx.cuh"

enum WeightKind { CODES_4, CODES_8, PLAIN };
// Parameters of weights: one f32 scale a row; one a group; and a zero point of real units. In the served form
// (served_w.cu) those of a group are bf16: the scale alone (BF16), or in a word with it, in the upper half, a zero
// point of real units (PAIR) or the field whose value is 0 (PAIR_INT).
enum Scaling { SCALE_ROW, SCALE_GROUP, SCALE_ZERO, SCALE_BF16, SCALE_PAIR, SCALE_PAIR_INT };

#define MATVEC_TOKENS (sizeof(floatX) == 2 ? 8 : 4)     // at a time: what fits into registers
#define MATVEC_WARPS 8                                  // at most: the tokens' x takes up to 16 KiB a warp
#define CHUNK 512

// Weights in 16 bytes, and how many are turned into f32 at a time.
template <int KIND> static constexpr int slot_weights = KIND == CODES_4 ? 32 : KIND == CODES_8 ? 16 : VEC_X;
template <int KIND> static constexpr int step_weights = slot_weights<KIND> < 8 ? slot_weights<KIND> : 8;

static __device__ __forceinline__ float low_half(uint32_t w) { return __uint_as_float(w << 16); }
static __device__ __forceinline__ float high_half(uint32_t w) { return __uint_as_float(w & 0xffff0000u); }

// 16 bytes of floatX as f32.
static __device__ __forceinline__ void widen_x(float *v, uint4 u) {
    const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#ifdef PRECISION_FP32
        v[i] = __uint_as_float(w[i]);
#else
        v[2 * i] = low_half(w[i]);
        v[2 * i + 1] = high_half(w[i]);
#endif
    }
}

// Step s of a slot as f32, codes counted from field `origin`: 8 or 128, the middle of their type, or a zero point.
// `flip` has the sign bit of each code set when codes are signed: two's complement with that bit flipped counts from
// the lowest code.
//   An f32 between 2^23 and 2^24 is an integer, its last 23 bits say how far above 2^23. A code's field put there,
//   without moving it, gives 2^23 + field * 16^i for nibble i; times 16^-i, less (2^23 * 16^-i + origin) in one fmaf,
//   is field - origin, exactly. Five nibbles of a word lie in those 23 bits, the last three after a shift.
template <int KIND>
static __device__ __forceinline__ void unpack_step(float *v, const uint32_t *slot, int s, uint32_t flip, float origin) {
    if (KIND == CODES_4) {
        uint32_t word = slot[s], high = word >> 12;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at = i < 5 ? i : i - 3;
            const uint32_t mask = 0xfu << 4 * at;
            const float unit = 1.0f / (float)(1 << 4 * at);
            float f = __uint_as_float(and_xor(i < 5 ? word : high, mask, 0x4b000000u ^ (flip & mask)));
            v[i] = fmaf(f, unit, -(8388608.0f * unit + origin));
        }
    } else if (KIND == CODES_8) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t word = slot[2 * s + i / 4] ^ flip;
            v[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u + i % 4)) - (8388608.0f + origin);
        }
    } else {
        widen_x(v, make_uint4(slot[0], slot[1], slot[2], slot[3]));
    }
}

// 16 bytes of floatX from `at` values behind `base` on, of which `left` values are there; zeros for the others. VEC:
// all or none are, and none means that others are read and thrown away: several such loads can be under way, while one
// that depends on a condition is waited for.
template <bool VEC> static __device__ __forceinline__ uint4 load_x16(const floatX *base, size_t at, int left) {
    if (VEC) {
        uint4 v = *(const uint4 *)(base + (left > 0 ? at : 0));
        return left > 0 ? v : make_uint4(0, 0, 0, 0);
    }
    uint32_t w[4] = {};
#pragma unroll
    for (int i = 0; i < VEC_X; i++) {
        uint32_t bits = i < left ? f32_bits(x2f(base[at + i])) : 0;
        if (sizeof(floatX) == 4) w[i % 4] = bits;
        else w[i / 2] |= i % 2 ? bits & 0xffff0000u : bits >> 16;
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// What a lane holds of a row: 16 bytes of weights, and the parameters of the group they lie in.
struct Slot { uint32_t w[4]; float scale, zero; };

// The slot at `row`, of whose bytes `left` are still in the row, with the parameters of group `group`; zeros behind the
// row's end. Weights are read once, so they ask for no place in a cache.
template <int SCALING, bool VEC>
static __device__ __forceinline__ void load_slot(Slot *s, const uint8_t *row, int left, const void *scale,
                                                 const float *zero, size_t group) {
    uint4 u = VEC ? load16_once_if(row, left > 0)
                  : load_x16<false>((const floatX *)row, 0, left / (int)sizeof(floatX));
    s->w[0] = u.x, s->w[1] = u.y, s->w[2] = u.z, s->w[3] = u.w;
    if (SCALING == SCALE_GROUP || SCALING == SCALE_ZERO) s->scale = load4_if((const float *)scale + group, left > 0);
    if (SCALING == SCALE_ZERO) s->zero = load4_if(zero + group, left > 0);
    if (SCALING == SCALE_BF16) s->scale = bf16_to_f32(load2_if((const bf16 *)scale + group, left > 0));
    if (SCALING == SCALE_PAIR || SCALING == SCALE_PAIR_INT) {
        uint32_t both = f32_bits(load4_if((const float *)scale + group, left > 0));
        s->scale = low_half(both), s->zero = high_half(both);
    }
}
// Whether a zero point multiplies the sum of x, and the field that codes are counted from.
template <int SCALING> static constexpr bool zero_of_sum = SCALING == SCALE_ZERO || SCALING == SCALE_PAIR;
template <int KIND, int SCALING> static __device__ __forceinline__ float slot_origin(const Slot &s) {
    return SCALING == SCALE_PAIR_INT ? s.zero : KIND == CODES_4 ? 8.0f : 128.0f;
}

// Where results go: X or f32, the other one NULL.
struct MatvecOut { floatX *x; float *f; };
static __device__ __forceinline__ void store_y(MatvecOut y, size_t at, float v) {
    if (y.x) y.x[at] = f2x(v);
    else y.f[at] = v;
}

// Sums over the lanes: as long as a lane has several it gives half of them away and adds to the other half, the bits of
// the lane's number saying which; M - 1 shuffles instead of 5 M. A template and no loop, whose bounds would change from
// round to round: the compiler gives up on those before it knows the indices, and keeps the sums in memory.
template <int HALF, int BIT, int M> static __device__ __forceinline__ void fold_lanes(float (&acc)[M], int lane) {
    if constexpr (BIT > 0) {
        if (HALF == 0) acc[0] += __shfl_xor_sync(FULL_WARP, acc[0], BIT);
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            float keep = lane & BIT ? acc[i + HALF] : acc[i], give = lane & BIT ? acc[i] : acc[i + HALF];
            acc[i] = keep + __shfl_xor_sync(FULL_WARP, give, BIT);
        }
        fold_lanes<HALF / 2, BIT / 2>(acc, lane);
    }
}

// R rows against NT tokens, of which N are there. group: weights that share a scale, C being a multiple of it (not with
// SCALE_ROW). scale (OC) may be NULL with SCALE_ROW.
template <int KIND, int SCALING, int NT, int R, bool VEC>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS, NT <= 4 && sizeof(floatX) == 2 ? 2 : 1)
matvec_kernel(MatvecOut y, const floatX *x, const uint8_t *w, int row_bytes, uint32_t flip, const void *scale,
              const float *zero, unsigned group, int N, int C, int OC) {
    const int V = slot_weights<KIND>, STEP = step_weights<KIND>, P = V / VEC_X, M = R * NT;
    DYN_SHARED(uint4, shared_x);                                // (warps, NT, 32, P) where P > 1
    __shared__ float part[2][MATVEC_WARPS][M];                  // of these rows and of the last
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int first = warp * CHUNK, stride = warps * CHUNK, groups = SCALING == SCALE_ROW ? 0 : C / (int)group;
    uint4 *stage = shared_x + (P > 1 ? warp * NT * 32 * P : 0);
    const int swizzle = lane / (8 / P) % P;

    // 1. The weights of the first chunk are on their way before anything else.
    int row0 = blockIdx.x * R, at = first + lane * 16;          // what is loaded next: rows, and this lane's byte
    const uint8_t *from = w + (size_t)row0 * row_bytes + at;
    size_t g = (size_t)row0 * groups + (SCALING == SCALE_ROW ? 0 : (unsigned)at / 16 * V / group);
    Slot slot[R] = {};
#pragma unroll
    for (int r = 0; r < R; r++)
        load_slot<SCALING, VEC>(&slot[r], from + (size_t)r * row_bytes, r < OC - row0 ? row_bytes - at : 0, scale, zero,
                                g + (size_t)r * groups);
    bool x_is_there = false;                                    // of a warp's only chunk, from the rows before
    for (int half = 0; row0 < OC; row0 += gridDim.x * R, half ^= 1) {
        float acc[M] = {};                                          // of row r and token n at r * NT + n
        for (int chunk = first; chunk < row_bytes; chunk += stride) {
            // 2. x of this chunk, for each lane that of its slot.
            const int col0 = chunk / 16 * V;                        // of the chunk; this lane's is col0 + lane * V
            if (P > 1 && !x_is_there) {
                x_is_there = stride >= row_bytes;
                const int BATCH = NT * P < 8 ? NT * P : 8;          // loads on their way at a time
                __syncwarp();                                       // all lanes have read the chunk before
#pragma unroll 1
                for (int k = 0; k < NT * P; k += BATCH) {
                    uint4 piece[BATCH];
#pragma unroll
                    for (int i = 0; i < BATCH; i++) {
                        int n = (k + i) / P, col = col0 + ((k + i) % P * 32 + lane) * VEC_X;
                        piece[i] = load_x16<true>(x, (size_t)n * C + col, n < N ? C - col : 0);
                    }
#pragma unroll
                    for (int i = 0; i < BATCH; i++) {
                        int n = (k + i) / P, q = (k + i) % P * 32 + lane, owner = q / P;
                        stage[(n * 32 + owner) * P + (q % P ^ owner / (8 / P) % P)] = piece[i];
                    }
                }
                __syncwarp();                                       // the chunk is there
            }
            // 3. The slot's products, and the next chunk's weights into the place of those that are done with.
            const bool more = chunk + stride < row_bytes;           // of these rows
            const int next = more ? row0 : row0 + (int)gridDim.x * R;
            at = (more ? chunk + stride : first) + lane * 16;
            from = w + (size_t)next * row_bytes + at;
            if (SCALING != SCALE_ROW) g = (size_t)next * groups + (unsigned)at / 16 * V / group;
            float s[M], sum[NT] = {};
#pragma unroll
            for (int k = 0; k < M; k++) s[k] = SCALING == SCALE_ROW ? acc[k] : 0.0f;
            if (NT == 1) {                                      // x in registers, one row behind the other as they come
                float xs[V];
#pragma unroll
                for (int j = 0; j < P; j++)
                    widen_x(xs + j * VEC_X, P > 1 ? stage[lane * P + (j ^ swizzle)]
                                                  : load_x16<VEC>(x, col0 + lane * V, C - col0 - lane * V));
                if (zero_of_sum<SCALING>) {
#pragma unroll
                    for (int j = 0; j < V; j++) sum[0] += xs[j];
                }
#pragma unroll
                for (int r = 0; r < R; r++) {
#pragma unroll
                    for (int p = 0; p < V / STEP; p++) {
                        float v[STEP];
                        unpack_step<KIND>(v, slot[r].w, p, flip, slot_origin<KIND, SCALING>(slot[r]));
#pragma unroll
                        for (int j = 0; j < STEP; j++) s[r] = fmaf(v[j], xs[p * STEP + j], s[r]);
                    }
                    if (zero_of_sum<SCALING>) acc[r] = fmaf(slot[r].zero, sum[0], acc[r]);
                    acc[r] = SCALING == SCALE_ROW ? s[r] : fmaf(s[r], slot[r].scale, acc[r]);
                    load_slot<SCALING, VEC>(&slot[r], from + (size_t)r * row_bytes, r < OC - next ? row_bytes - at : 0,
                                            scale, zero, g + (size_t)r * groups);
                }
            } else {
                // A step of all rows in registers, token by token. Not unrolled: the compiler would unpack all steps
                // before the first product and run out of registers. So the words of the next step move up to this
                // one's place.
                const int WORDS = 4 * STEP / V;
#pragma unroll 1
                for (int p = 0; p < V / STEP; p++) {
                    float v[R][STEP];
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        unpack_step<KIND>(v[r], slot[r].w, 0, flip, slot_origin<KIND, SCALING>(slot[r]));
#pragma unroll
                        for (int i = 0; i + WORDS < 4; i++) slot[r].w[i] = slot[r].w[i + WORDS];
                    }
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        float xs[STEP];
#pragma unroll
                        for (int j = 0; j < STEP / VEC_X; j++) {
                            int piece = p * (STEP / VEC_X) + j;
                            widen_x(xs + j * VEC_X, P > 1 ? stage[(n * 32 + lane) * P + (piece ^ swizzle)]
                                                          : load_x16<VEC>(x, (size_t)n * C + col0 + lane * V,
                                                                          n < N ? C - col0 - lane * V : 0));
                        }
#pragma unroll
                        for (int j = 0; j < STEP; j++) {
                            if (zero_of_sum<SCALING>) sum[n] += xs[j];
#pragma unroll
                            for (int r = 0; r < R; r++) s[r * NT + n] = fmaf(v[r][j], xs[j], s[r * NT + n]);
                        }
                    }
                }
#pragma unroll
                for (int r = 0; r < R; r++) {
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        float *a = &acc[r * NT + n];
                        if (zero_of_sum<SCALING>) *a = fmaf(slot[r].zero, sum[n], *a);
                        *a = SCALING == SCALE_ROW ? s[r * NT + n] : fmaf(s[r * NT + n], slot[r].scale, *a);
                    }
                    load_slot<SCALING, VEC>(&slot[r], from + (size_t)r * row_bytes, r < OC - next ? row_bytes - at : 0,
                                            scale, zero, g + (size_t)r * groups);
                }
            }
        }

        // 4. Lanes. Sum i ends in lanes i * (32 / M) and following.
        fold_lanes<M / 2, 16>(acc, lane);
        if (lane % (32 / M) == 0) part[half][warp][lane / (32 / M)] = acc[0];
        __syncthreads();                                            // all warps' sums of these rows are there

        // 5. Warps.
        const int r = threadIdx.x / NT, n = threadIdx.x % NT;
        if (r < R && r < OC - row0 && n < N) {
            float total = part[half][0][threadIdx.x];
            for (int i = 1; i < warps; i++) total += part[half][i][threadIdx.x];
            if (SCALING == SCALE_ROW && scale) total *= ((const float *)scale)[row0 + r];
            store_y(y, (size_t)n * OC + row0 + r, total);
        }
    }
}

// What the device has: multiprocessors, and shared memory that a block may ask for.
typedef struct { int multiprocessors, shared; } MatvecDevice;
static inline MatvecDevice matvec_device(void) {
    MatvecDevice d = {1, 48 << 10};
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&d.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    return d;
}

static inline int matvec_warps(int row_bytes) {
    int chunks = (row_bytes + CHUNK - 1) / CHUNK, rounds = (chunks + MATVEC_WARPS - 1) / MATVEC_WARPS;
    return (chunks + rounds - 1) / rounds;
}
// Bytes of shared memory for x.
template <int KIND> static inline size_t matvec_shared(int warps, int tokens) {
    int slot_x = slot_weights<KIND> * (int)sizeof(floatX);
    return slot_x > 16 ? (size_t)(warps * tokens * 32 * slot_x) : 0;
}

template <int KIND, int SCALING, int NT, int R, bool VEC>
static void matvec_launch(MatvecOut y, const floatX *x, const uint8_t *w, int row_bytes, uint32_t flip,
                          const void *scale, const float *zero, unsigned group, int N, int C, int OC) {
    auto kernel = matvec_kernel<KIND, SCALING, NT, R, VEC>;
    int warps = matvec_warps(row_bytes), blocks = matvec_device().multiprocessors * 16 / warps;    // as many as run
    size_t bytes = matvec_shared<KIND>(warps, NT);
    if (!allow_shared(kernel, bytes)) return;
    LAUNCH(kernel, (unsigned)min((OC + R - 1) / R, blocks), 32 * warps, bytes, cuda_stream)
        (y, x, w, row_bytes, flip, scale, zero, group, N, C, OC);
    CUDA_CHECK(cudaGetLastError());
}

// VEC: rows of w and of x begin at multiples of 16 bytes, and those of w end there; only PLAIN weights go without.
template <int KIND, int SCALING, bool VEC>
static void matvec_any_n(MatvecOut y, const floatX *x, const uint8_t *w, int row_bytes, uint32_t flip,
                         const void *scale, const float *zero, unsigned group, size_t N, int C, int OC) {
    // The x of eight tokens, as int4 needs it, takes 128 KiB, and consumer cards have 99: half as many at a time then.
    const size_t most = matvec_shared<KIND>(matvec_warps(row_bytes), MATVEC_TOKENS) + 2048 <=
                        (size_t)matvec_device().shared ? MATVEC_TOKENS : MATVEC_TOKENS / 2;
    for (size_t t = 0; t < N; t += most) {
        const int n = (int)(N - t < most ? N - t : most);
        auto launch = matvec_launch<KIND, SCALING, MATVEC_TOKENS, 4, VEC>;
        if constexpr (VEC) {                                    // not aligned: one kernel for all, with the same bits
            constexpr int ROWS_1 = KIND == PLAIN || sizeof(floatX) == 2 ? 8 : 4;    // what fits into registers
            if (n == 1) launch = matvec_launch<KIND, SCALING, 1, ROWS_1, VEC>;
            else if (n == 2) launch = matvec_launch<KIND, SCALING, 2, 4, VEC>;
            else if (n <= 4) launch = matvec_launch<KIND, SCALING, 4, 4, VEC>;
        }
        MatvecOut to = {y.x ? y.x + t * OC : nullptr, y.f ? y.f + t * OC : nullptr};
        launch(to, x + t * C, w, row_bytes, flip, scale, zero, group, n, C, OC);
    }
}
#endif
