// Served forms (ops.h): which of the two kinds a linear has, and what their buffers are made of.
#include "served.cuh"

#define BLOCK 256

static bool quantizes(const QuantSpec *act) { return act && act->bits; }

size_t cuda_served_bytes(const QuantSpec *wq, const QuantSpec *act, int OC, int C) {
    if (!quantizes(act)) return served_w_bytes(wq, OC, C);
    return wq->zero == QZ_FLOAT || act->zero == QZ_FLOAT ? 0 : served_i_bytes(wq, OC, C);
}

void cuda_served_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                      const QuantSpec *act, int64_t row0, int64_t rows, int OC, int C) {
    if (rows == 0) return;
    if (!quant_has_zero(wq)) zero = nullptr;
    if (quantizes(act)) served_i_pack(served, codes, scale, zero, wq, row0, rows, OC, C);
    else served_w_pack(served, codes, scale, zero, wq, row0, rows, OC, C);
}

static void forward(ServedOut y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                    size_t N, int C, int OC) {
    if (N == 0) return;
    if (quantizes(act)) served_i_forward(y, x, served, wq, act, N, C, OC);
    else served_w_forward(y, x, served, wq, N, C, OC);
}
void cuda_served_forward(floatX *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                         size_t N, int C, int OC) {
    forward({y, nullptr}, x, served, wq, act, N, C, OC);
}
void cuda_served_forward_f32(float *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                             size_t N, int C, int OC) {
    forward({nullptr, y}, x, served, wq, act, N, C, OC);
}

static size_t piece_bytes = (size_t)256 << 20;
void cuda_served_piece(size_t bytes) { piece_bytes = bytes; }
size_t served_piece(void) { return piece_bytes; }

// ---------------------------------------------------------------------------------------------
// Packing: once, when a model is loaded. A thread an eight of codes.
template <int STORED>
static __global__ void __launch_bounds__(BLOCK)
pack_fields_kernel(uint8_t *to, size_t to_row_bytes, const uint8_t *codes, Packed pk, int C, int shift, bool fours,
                   bool is_signed) {
    size_t row = blockIdx.x;
    codes += row * pk.row_bytes;
    to += row * to_row_bytes;
    for (int unit = (int)threadIdx.x; unit < (int)(to_row_bytes / STORED); unit += BLOCK) {
        uint64_t eight = unit * 8 < C ? load_codes8<0>(codes, unit, &pk) : 0;
        uint64_t fields = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int field = unit * 8 + i < C ? (int)code_at(eight, i, &pk) + shift : 0;
            if (is_signed) field = unit * 8 + i < C ? field - 128 : 0;
            int at = STORED == 8 ? 8 * i : !fours ? 4 * i : i < 4 ? 8 * i : 8 * (i - 4) + 4;
            fields |= (uint64_t)((unsigned)field & (STORED == 8 ? 255u : 15u)) << at;
        }
#pragma unroll
        for (int i = 0; i < STORED; i += 4) *(uint32_t *)(to + (size_t)unit * STORED + i) = (uint32_t)(fields >> 8 * i);
    }
}

void served_pack_fields(uint8_t *to, size_t to_row_bytes, const uint8_t *codes, const QuantSpec *wq, int64_t rows,
                        int C, bool fours, bool is_signed) {
    Packed pk;
    if (!packed_init(&pk, wq, rows, C)) return;
    auto kernel = stored_bits(wq->bits) == 4 ? pack_fields_kernel<4> : pack_fields_kernel<8>;
    LAUNCH(kernel, (unsigned)rows, BLOCK, 0, cuda_stream)
        (to, to_row_bytes, codes, pk, C, field_shift(wq), fours, is_signed);
    CUDA_CHECK(cudaGetLastError());
}

static __global__ void __launch_bounds__(BLOCK)
pack_params_kernel(void *to, ServedParams format, const float *scale, const float *zero, float shift, size_t n) {
    for (size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (size_t)gridDim.x * BLOCK) {
        if (format == PARAMS_F32) ((float *)to)[i] = scale[i];
        else if (format == PARAMS_BYTE) ((uint8_t *)to)[i] = (uint8_t)(int)(zero[i] + shift);
        else if (format == PARAMS_BF16) ((bf16 *)to)[i] = bf16_from_f32(scale[i]);
        else ((uint32_t *)to)[i] = bf16_from_f32(scale[i]) | (uint32_t)bf16_from_f32(zero[i] + shift) << 16;
    }
}

void served_pack_params(void *to, ServedParams format, const float *scale, const float *zero, float shift, size_t n) {
    LAUNCH(pack_params_kernel, grid_for((n + BLOCK - 1) / BLOCK), BLOCK, 0, cuda_stream)
        (to, format, scale, zero, shift, n);
    CUDA_CHECK(cudaGetLastError());
}
