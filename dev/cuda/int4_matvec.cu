// Laboratory of the int4 matvec of decoding: y (OC) = w (OC, C) . x (C), w in unsigned codes of 4 bits, two a byte, the
// even column low; each 64 of a row share a scale and a zero point of real units: w = (code - 8) * scale + zero. What
// counts is how fast w comes from memory: 40 bytes for 64 weights. How to compile: common.h.
//
//   1  a thread a row, byte by byte: neighbours read bytes that lie a row apart
//   2  a warp a row, neighbouring lanes read neighbouring bytes: whole sectors, but one byte a load
//   3  16-byte loads, 32 codes a lane: few loads, much on its way; x still comes from memory for every row, by loads
//      that lie 64 bytes apart
//   4  x in shared memory as f32, spread over the banks by exclusive or, and four rows a warp: a value of x is read
//      once for four rows
//   5  a code becomes f32 by one LOP3 and one FFMA instead of a shift, a mask, an addition and I2F, of which a
//      multiprocessor starts an eighth as many
//   6  the warps of a block share out the columns instead of the rows, so each keeps its x in registers; blocks stay
//      and walk through the rows, and ask for the next rows as soon as the registers of the last are free
//   7  the wing's: as 6, but x passes through shared memory, so that any number of columns and up to eight tokens have
//      room; it chooses the block itself
#include "common.h"
#include "cuda/matvec.cuh"

#define VARIANTS 7
#define GROUP 64
#define ROWS 4                  // of a warp in variants 4 and 5
#define SPAN 1024               // columns that a warp reads at once: 16 bytes a lane
#define STAY_ROWS 8             // of a block in variant 6

// ---------------------------------------------------------------------------------------------
// The reference.

static void matvec_cpu(floatX *y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero, int C,
                       int OC) {
    for (size_t r = 0; r < (size_t)OC; r++) {
        double total = 0.0;
        for (size_t g = 0; g < (size_t)(C / GROUP); g++) {
            double sum = 0.0, sum_x = 0.0;
            for (size_t c = g * GROUP; c < (g + 1) * GROUP; c++) {
                int byte = codes[(r * (size_t)C + c) / 2], code = c % 2 ? byte >> 4 : byte & 15;
                sum += (code - 8) * (double)x2f(x[c]);
                sum_x += (double)x2f(x[c]);
            }
            size_t at = r * (size_t)(C / GROUP) + g;
            total += sum * (double)scale[at] + sum_x * (double)zero[at];
        }
        y[r] = f2x((float)total);
    }
}

// ---------------------------------------------------------------------------------------------
// Variants.

static __device__ __forceinline__ float warp_sum(float v) {
    for (int bits = 16; bits; bits >>= 1) v += __shfl_xor_sync(FULL_WARP, v, bits);
    return v;
}

static __global__ void matvec_1(floatX *y, const floatX *x, const uint8_t *codes, const float *scale,
                                const float *zero, int C, int OC) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= OC) return;
    float total = 0.0f;
    for (int g = 0; g < C / GROUP; g++) {
        float sum = 0.0f, sum_x = 0.0f;
        for (int c = g * GROUP; c < (g + 1) * GROUP; c += 2) {
            int byte = codes[((size_t)row * C + c) / 2];
            float x0 = x2f(x[c]), x1 = x2f(x[c + 1]);
            sum = fmaf((float)((byte & 15) - 8), x0, sum);
            sum = fmaf((float)((byte >> 4) - 8), x1, sum);
            sum_x += x0 + x1;
        }
        size_t at = (size_t)row * (C / GROUP) + g;
        total = fmaf(sum, scale[at], total);
        total = fmaf(sum_x, zero[at], total);
    }
    y[row] = f2x(total);
}

static __global__ void matvec_2(floatX *y, const floatX *x, const uint8_t *codes, const float *scale,
                                const float *zero, int C, int OC) {
    int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= OC) return;
    float total = 0.0f;
    for (int c = lane * 2; c < C; c += 64) {                    // a warp, a group of 64
        int byte = codes[((size_t)row * C + c) / 2];
        float x0 = x2f(x[c]), x1 = x2f(x[c + 1]);
        size_t at = (size_t)row * (C / GROUP) + c / GROUP;
        float sum = fmaf((float)((byte >> 4) - 8), x1, (float)((byte & 15) - 8) * x0);
        total = fmaf(sum, scale[at], total);
        total = fmaf(x0 + x1, zero[at], total);
    }
    total = warp_sum(total);
    if (lane == 0) y[row] = f2x(total);
}

static __global__ void matvec_3(floatX *y, const floatX *x, const uint8_t *codes, const float *scale,
                                const float *zero, int C, int OC) {
    int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= OC) return;
    float total = 0.0f;
    for (int c = lane * 32; c < C; c += SPAN) {
        uint4 u = *(const uint4 *)(codes + ((size_t)row * C + c) / 2);
        const uint32_t words[4] = {u.x, u.y, u.z, u.w};
        float sum = 0.0f, sum_x = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float xs[8];
#pragma unroll
            for (int i = 0; i < 8; i += VEC_X) widen_x(xs + i, *(const uint4 *)(x + c + 8 * w + i));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum = fmaf((float)((int)(words[w] >> 4 * i & 15) - 8), xs[i], sum);
                sum_x += xs[i];
            }
        }
        size_t at = (size_t)row * (C / GROUP) + c / GROUP;
        total = fmaf(sum, scale[at], total);
        total = fmaf(sum_x, zero[at], total);
    }
    total = warp_sum(total);
    if (lane == 0) y[row] = f2x(total);
}

// xs (C rounded up to SPAN) f32 in cells of 16 bytes. Lane l's 32 columns of a span are cells 8 l .. 8 l + 7, piece j
// of them at 8 l + (j ^ l % 8): eight neighbouring lanes that read piece j touch all banks.
template <bool TRICK>
static __global__ void matvec_shared(floatX *y, const floatX *x, const uint8_t *codes, const float *scale,
                                     const float *zero, int C, int OC) {
    DYN_SHARED(float, xs);
    for (int c = threadIdx.x; c < (C + SPAN - 1) / SPAN * SPAN; c += blockDim.x) {
        int cell = c / 4, owner = cell / 8, piece = cell % 8 ^ owner % 8;
        xs[(owner * 8 + piece) * 4 + c % 4] = c < C ? x2f(x[c]) : 0.0f;
    }
    __syncthreads();                                            // x is there
    int lane = threadIdx.x % 32, row0 = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    if (row0 >= OC) return;
    float total[ROWS] = {};
    for (int c = lane * 32; c < C; c += SPAN) {
        uint32_t words[ROWS][4];
        float s[ROWS], z[ROWS], sum[ROWS] = {}, sum_x = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            size_t row = (size_t)min(row0 + r, OC - 1), at = row * (C / GROUP) + c / GROUP;
            uint4 u = *(const uint4 *)(codes + (row * C + c) / 2);
            words[r][0] = u.x, words[r][1] = u.y, words[r][2] = u.z, words[r][3] = u.w;
            s[r] = scale[at];
            z[r] = zero[at];
        }
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                Vec<float, 4> four = vec_load<float, 4>(xs + (c / 4 + ((2 * w + i / 4) ^ lane % 8)) * 4);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    v[i + k] = four.v[k];
                    sum_x += four.v[k];
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float q[8];
                if (TRICK) unpack_step<CODES_4>(q, words[r], w, 0, 8.0f);
                else for (int i = 0; i < 8; i++) q[i] = (float)((int)(words[r][w] >> 4 * i & 15) - 8);
#pragma unroll
                for (int i = 0; i < 8; i++) sum[r] = fmaf(q[i], v[i], sum[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            total[r] = fmaf(sum[r], s[r], total[r]);
            total[r] = fmaf(sum_x, z[r], total[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        total[r] = warp_sum(total[r]);
        if (lane == 0 && row0 + r < OC) y[row0 + r] = f2x(total[r]);
    }
}

// Warp w holds columns w * SPAN .. of x in registers. The block takes rows blockIdx.x * STAY_ROWS .., then those a
// whole grid further. part has two halves: a warp may begin the next rows while the sums of the last are added.
static __global__ void __launch_bounds__(512)
matvec_stay(floatX *y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero, int C, int OC) {
    const int R = STAY_ROWS;
    __shared__ float part[2][32][R];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = warp * SPAN + lane * 32, half = 0;
    const bool in = c < C;
    const size_t groups = C / GROUP, row_bytes = C / 2;
    codes += c / 2;
    size_t g = (size_t)(c / GROUP);
    Slot slot[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        size_t row = (size_t)blockIdx.x * R + r;
        load_slot<SCALE_ZERO, true>(&slot[r], codes + row * row_bytes, in && row < (size_t)OC, scale, zero,
                                    row * groups + g);
    }
    float xs[32], sum_x = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i += VEC_X) widen_x(xs + i, load_x16<true>(x, (size_t)c + i, C - c));
#pragma unroll
    for (int i = 0; i < 32; i++) sum_x += xs[i];
    for (int row0 = blockIdx.x * R; row0 < OC; row0 += gridDim.x * R, half ^= 1) {
        float total[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                float q[8];
                unpack_step<CODES_4>(q, slot[r].w, w, 0, 8.0f);
#pragma unroll
                for (int i = 0; i < 8; i++) sum = fmaf(q[i], xs[8 * w + i], sum);
            }
            total[r] = fmaf(sum, slot[r].scale, slot[r].zero * sum_x);
            size_t next = (size_t)row0 + gridDim.x * R + r;
            load_slot<SCALE_ZERO, true>(&slot[r], codes + next * row_bytes, in && next < (size_t)OC, scale, zero,
                                        next * groups + g);
        }
#pragma unroll
        for (int b = 0; b < 5; b++) {                           // as in matvec.cuh: row r ends in lanes 4 r ..
            const int bit = 16 >> b, keep = R >> (b + 1);
            if (keep == 0) total[0] += __shfl_xor_sync(FULL_WARP, total[0], bit);
#pragma unroll
            for (int i = 0; i < keep; i++) {
                float mine = lane & bit ? total[i + keep] : total[i], give = lane & bit ? total[i] : total[i + keep];
                total[i] = mine + __shfl_xor_sync(FULL_WARP, give, bit);
            }
        }
        if (lane % 4 == 0) part[half][warp][lane / 4] = total[0];
        __syncthreads();                                        // all warps' sums of these rows are there
        int r = threadIdx.x;
        if (r < R && row0 + r < OC) {
            float all = 0.0f;
            for (int w = 0; w < (int)blockDim.x / 32; w++) all += part[half][w][r];
            y[row0 + r] = f2x(all);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Shapes of a layer of an 8B Llama.

static const int shapes[][2] = {                                // OC, C; the simulator's: odd rows, no whole span
    {LAB_GPU ? 4096 : 37, LAB_GPU ? 4096 : 1216}, {LAB_GPU ? 6144 : 5, LAB_GPU ? 4096 : 64},
    {LAB_GPU ? 14336 : 9, LAB_GPU ? 4096 : 2048}, {LAB_GPU ? 4096 : 3, LAB_GPU ? 14336 : 5184}};

struct Data { floatX *x, *y; uint8_t *codes; float *scale, *zero; };

static void launch(int variant, int block, const Data &d, int C, int OC) {
    const int warps = block / 32;
    if (variant == VARIANTS) {
        matvec_any_n<CODES_4, SCALE_ZERO, true>({d.y, nullptr}, d.x, d.codes, C / 2, 0, d.scale, d.zero, GROUP, 1, C,
                                                OC);
        return;
    }
    typedef void (*Kernel)(floatX *, const floatX *, const uint8_t *, const float *, const float *, int, int);
    static const struct { Kernel kernel; int rows_a_warp; } variants[VARIANTS - 1] = {
        {matvec_1, 32}, {matvec_2, 1}, {matvec_3, 1}, {matvec_shared<false>, ROWS}, {matvec_shared<true>, ROWS},
        {matvec_stay, 0}};
    auto &v = variants[variant - 1];
    int rows = v.rows_a_warp * warps, grid = rows ? (OC + rows - 1) / rows : 0;
    if (!rows) {                                                // a warp 1024 columns, 16 warps a multiprocessor
        block = (C + SPAN - 1) / SPAN * 32;
        grid = std::min((OC + STAY_ROWS - 1) / STAY_ROWS, LAB_GPU ? 132 * 512 / block : 2);
    }
    size_t bytes = v.rows_a_warp == ROWS ? (size_t)((C + SPAN - 1) / SPAN * SPAN) * sizeof(float) : 0;
    if (!allow_shared(v.kernel, bytes)) return;
    LAUNCH(v.kernel, (unsigned)grid, (unsigned)block, bytes, cuda_stream)
        (d.y, d.x, d.codes, d.scale, d.zero, C, OC);
}

static void run(int variant) {
    for (auto &shape : shapes) {
        const int OC = shape[0], C = shape[1];
        const size_t n_codes = (size_t)OC * (size_t)C / 2, n_scales = (size_t)OC * (size_t)(C / GROUP);
        floatX *x = lab_random_x((size_t)C, 1, 1.0f), *y = lab_array<floatX>((size_t)OC);
        uint8_t *codes = lab_array<uint8_t>(n_codes);
        float *scale = lab_array<float>(n_scales), *zero = lab_array<float>(n_scales);
        for (size_t i = 0; i < n_codes; i++) codes[i] = (uint8_t)(int)(128.0f + lab_random(2, i, 127.9f));
        for (size_t i = 0; i < n_scales; i++) {
            scale[i] = 0.02f + lab_random(3, i, 0.01f);
            zero[i] = lab_random(4, i, 0.02f);
        }
        matvec_cpu(y, x, codes, scale, zero, C, OC);
        // Copies of the tensor, together larger than any L2 cache: a kernel takes microseconds, as long as events do.
        const size_t copies = LAB_GPU ? 1 + ((size_t)256 << 20) / (n_codes + 8 * n_scales) : 1;
        Data d[256];
        for (size_t i = 0; i < copies; i++)
            d[i] = {lab_to_device(x, (size_t)C), lab_device<floatX>((size_t)OC), lab_to_device(codes, n_codes),
                    lab_to_device(scale, n_scales), lab_to_device(zero, n_scales)};
        const double bytes = (double)n_codes + 8.0 * (double)n_scales + (double)(C + OC) * sizeof(floatX);
        if (LAB_GPU) printf("OC = %d, C = %d\n", OC, C);
        for (int block : lab_blocks) {
            if (variant >= 6 && block != lab_blocks[0]) break;  // these choose the block themselves
            if (variant == 4 || variant == 5)                   // more would not leave shared memory to two blocks
                if (block > 512) break;
            launch(variant, block, d[0], C, OC);
            // One rounding to X, half a unit in the last of 8 bits, above that of the reference.
            if (!lab_check("y", d[0].y, y, (size_t)OC, sizeof(floatX) == 2 ? 1.0 / 127 : 1e-4))
                printf("  variant %d, block %d, OC %d, C %d\n", variant, block, OC, C);
            double s = lab_time_many((int)copies, [&](int i) { launch(variant, block, d[i], C, OC); });
            lab_report(variant, variant >= 6 ? 0 : block, s, bytes, 0.0);
        }
        for (size_t i = 0; i < copies; i++)
            for (void *p : {(void *)d[i].x, (void *)d[i].y, (void *)d[i].codes, (void *)d[i].scale, (void *)d[i].zero})
                LAB_CUDA(cudaFree(p));
        for (void *p : {(void *)x, (void *)y, (void *)codes, (void *)scale, (void *)zero}) free(p);
    }
}

int main(int argc, char **argv) { return lab_main(argc, argv, VARIANTS, run); }
