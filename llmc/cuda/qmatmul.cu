// Packed codes (quant.h): dequant_rows, embedding_q_forward and qmatvec_forward (ops.h).
//
// dequant_rows, before a matmul of many tokens. It reads bits/8 bytes a weight and writes sizeof(floatX): the writes
// count, so a lane makes eight weights, 16 bytes of bf16, of the `bits` bytes that hold them, and neighbouring lanes
// write one behind the other.
//
// qmatvec_forward, for decoding. Codes of 4 bits and of 8 that the kernel of matvec.cuh takes (groups of whole 16-byte
// slots, no integer zero points, rows aligned: all presets of 4 and 8 bits) run there, which see for what bounds them.
// All others take the general kernel: a warp a row, eight codes a lane at a time, any width, blocks that end anywhere.
// It is right for everything and meant for what is rare.
#include "matvec.cuh"
#include "packed.cuh"

#define DEQUANT_BLOCK 256

// A block a row. WHOLE: see working8.
template <int BITS, bool WHOLE>
static __global__ void __launch_bounds__(DEQUANT_BLOCK)
dequant_rows_kernel(floatX *work, float *wscale, const uint8_t *codes, const float *scale, const float *zero, Packed pk,
                    bool as_codes, int cols) {
    const size_t row = blockIdx.x, first = row / pk.b0 * pk.across;
    codes += row * pk.row_bytes;
    work += row * cols;
    scale += first;
    if (zero) zero += first;
    if (wscale && threadIdx.x == 0) wscale[row] = as_codes ? scale[0] : 1.0f;
    for (int unit = threadIdx.x; unit < (cols + 7) / 8; unit += DEQUANT_BLOCK)
        working8<BITS, WHOLE>(work, codes, unit, cols, &pk, as_codes, [&](int g) {
            return QParams{scale[g], zero ? zero[g] : pk.mid};
        });
}

void cuda_dequant_rows(floatX *work, float *wscale, const uint8_t *codes, const float *scale, const float *zero,
                       const QuantSpec *wq, int64_t rows, int64_t cols) {
    Packed pk;
    if (rows == 0 || !packed_init(&pk, wq, rows, cols)) return;
    bool whole = packed_whole(&pk, work, codes, cols);
    auto kernel = whole && pk.bits == 4 ? dequant_rows_kernel<4, true>
                  : whole && pk.bits == 8 ? dequant_rows_kernel<8, true>
                  : whole ? dequant_rows_kernel<0, true> : dequant_rows_kernel<0, false>;
    LAUNCH(kernel, (unsigned)rows, DEQUANT_BLOCK, 0, cuda_stream)
        (work, wscale, codes, scale, zero, pk, quant_works_as_codes(wq), (int)cols);
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------
// Few tokens.

#define ANY_WARPS 4

// A warp a row: lane l takes codes 8 l .. 8 l + 7, 8 (l + 32) .. and so on. Products of a block within the eight are a
// chain of fmaf, scaled and added to the lane's sum; the lanes fold +16, +8, +4, +2, +1.
static __global__ void __launch_bounds__(32 * ANY_WARPS)
qmatvec_any_kernel(MatvecOut y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero, Packed pk,
                   int N, int C, int OC) {
    const int NT = MATVEC_TOKENS, lane = threadIdx.x % 32, row = blockIdx.x * ANY_WARPS + threadIdx.x / 32;
    if (row >= OC) return;                                      // whole warps, and nothing below waits for a block
    const size_t first = (size_t)(row / pk.b0) * pk.across;
    codes += (size_t)row * pk.row_bytes;
    scale += first;
    if (zero) zero += first;
    float acc[NT] = {}, s[NT] = {}, sum[NT] = {};
    for (int unit = lane; unit < (C + 7) / 8; unit += 32) {
        uint64_t eight = load_codes8<0>(codes, unit, &pk);
        int c = unit * 8, last = min(8, C - c) - 1, g = c / pk.b1, left = pk.b1 - c % pk.b1;
        for (int i = 0; i <= last; i++) {
            float q = code_at(eight, i, &pk) - (zero && !pk.zero_is_float ? zero[g] : pk.mid);
#pragma unroll
            for (int n = 0; n < NT; n++)
                if (n < N) {
                    float v = x2f(x[(size_t)n * C + c + i]);
                    s[n] = fmaf(q, v, s[n]);
                    sum[n] += v;
                }
            if (--left > 0 && i < last) continue;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (pk.zero_is_float) acc[n] = fmaf(zero[g], sum[n], acc[n]);
                acc[n] = fmaf(s[n], scale[g], acc[n]);
                s[n] = sum[n] = 0.0f;
            }
            g++;
            left = pk.b1;
        }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
        for (int bits = 16; bits; bits >>= 1) acc[n] += __shfl_xor_sync(FULL_WARP, acc[n], bits);
        if (lane == 0 && n < N) store_y(y, (size_t)n * OC + row, acc[n]);
    }
}

void cuda_qmatvec(floatX *yx, float *yf, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                  const QuantSpec *wq, size_t N, int C, int OC) {
    Packed pk;
    if (N == 0 || !packed_init(&pk, wq, OC, C)) return;
    int slot = 128 / pk.bits;                                   // codes in 16 bytes
    bool wide = (pk.bits == 4 || pk.bits == 8) && C % slot == 0 && pk.b0 == 1 && pk.b1 % slot == 0 &&
                rows_take_vec(C, x, codes) && pk.mid == (pk.sign ? 0.0f : (float)(1 << (pk.bits - 1)));
    if (wide && (!zero || (pk.zero_is_float && pk.bits == 4))) {
        auto run = pk.bits == 4 ? (zero ? matvec_any_n<CODES_4, SCALE_ZERO, true>
                                        : matvec_any_n<CODES_4, SCALE_GROUP, true>)
                   : pk.across == 1 ? matvec_any_n<CODES_8, SCALE_ROW, true>
                                    : matvec_any_n<CODES_8, SCALE_GROUP, true>;
        uint32_t flip = pk.sign * (pk.bits == 4 ? 0x11111111u : 0x01010101u);
        run({yx, yf}, x, codes, (int)pk.row_bytes, flip, scale, zero, (unsigned)pk.b1, N, C, OC);
        return;
    }
    for (size_t t = 0; t < N; t += MATVEC_TOKENS) {
        int n = N - t < MATVEC_TOKENS ? (int)(N - t) : MATVEC_TOKENS;
        MatvecOut y = {yx ? yx + t * OC : nullptr, yf ? yf + t * OC : nullptr};
        LAUNCH(qmatvec_any_kernel, (unsigned)((OC + ANY_WARPS - 1) / ANY_WARPS), 32 * ANY_WARPS, 0, cuda_stream)
            (y, x + t * C, codes, scale, zero, pk, n, C, OC);
        CUDA_CHECK(cudaGetLastError());
    }
}

void cuda_qmatvec_forward(floatX *y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                          const QuantSpec *wq, size_t N, int C, int OC) {
    cuda_qmatvec(y, nullptr, x, codes, scale, zero, wq, N, C, OC);
}

// ---------------------------------------------------------------------------------------------
// A block a token, which finds its row.
template <int BITS, bool WHOLE>
static __global__ void __launch_bounds__(DEQUANT_BLOCK)
embedding_q_kernel(floatX *out, const int32_t *tokens, const uint8_t *codes, const float *scale, const float *zero,
                   Packed pk, bool as_codes, int cols) {
    const size_t row = (size_t)tokens[blockIdx.x], first = row * pk.across;
    codes += row * pk.row_bytes;
    out += (size_t)blockIdx.x * cols;
    scale += first;
    if (zero) zero += first;
    for (int unit = threadIdx.x; unit < (cols + 7) / 8; unit += blockDim.x)
        working8<BITS, WHOLE>(out, codes, unit, cols, &pk, as_codes, [&](int g) {
            return QParams{scale[g], zero ? zero[g] : pk.mid};
        });
}

void cuda_embedding_q_forward(floatX *out, const int32_t *tokens, const uint8_t *codes, const float *scale,
                              const float *zero, const QuantSpec *wq, size_t N, int C, int V) {
    Packed pk;
    if (N == 0 || !packed_init(&pk, wq, V, C)) return;
    bool whole = packed_whole(&pk, out, codes, C);
    auto kernel = whole && pk.bits == 4 ? embedding_q_kernel<4, true>
                  : whole && pk.bits == 8 ? embedding_q_kernel<8, true>
                  : whole ? embedding_q_kernel<0, true> : embedding_q_kernel<0, false>;
    int warps = (C + 255) / 256;
    LAUNCH(kernel, (unsigned)N, 32 * (unsigned)(warps < 8 ? warps : 8), 0, cuda_stream)
        (out, tokens, codes, scale, zero, pk, quant_works_as_codes(wq), C);
    CUDA_CHECK(cudaGetLastError());
}
