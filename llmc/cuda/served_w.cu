// Served forms of codes against inputs as they are (ops.h): weight-only schemes.
//
// In the buffer lie fields (served.cuh) in rows as they are, then the parameters of groups: bf16 scales, or words of a
// bf16 scale and a bf16 zero point. An int4 group of 32 takes 18 bytes so, or 20 with a zero point: 4.5 or 5 bits a
// weight; rows with one scale have it in f32. Few tokens go through the kernel of matvec.cuh, which says what bounds
// it. For many the weights are unpacked in working memory, where linear_forward finds them, 256 MiB of them at a time;
// the results of such a piece go from working memory to their columns of y.
#include "matmul.cuh"
#include "matvec.cuh"
#include "served.cuh"

#define FEW CUDA_MATVEC_TOKENS

static bool layout(ServedLayout *l, const QuantSpec *wq, int OC, int C) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(wq, OC, C, block, &err) < 0 || block[0] != 1) return false;
    *l = ServedLayout{};
    l->stored_bits = stored_bits(wq->bits);
    l->across = (int)(C / block[1]);
    int slot = 128 / l->stored_bits;                            // codes in 16 bytes
    bool zero = quant_has_zero(wq);
    l->plain = block[1] % slot != 0 || (zero && l->stored_bits == 8) || !middle_is_zero(wq);
    l->row_bytes = l->plain ? quant_row_bytes(wq->bits, C) : (size_t)C * (size_t)l->stored_bits / 8;
    size_t groups = (size_t)OC * (size_t)l->across, total = 0;
    bool f32 = l->plain || (l->stored_bits == 8 && l->across == 1);
    served_place(&total, (size_t)OC * l->row_bytes);
    l->scale = served_place(&total, groups * (f32 || zero ? 4 : 2));
    l->zero = served_place(&total, l->plain && zero ? groups * sizeof(float) : 0);
    l->bytes = total;
    return true;
}

size_t served_w_bytes(const QuantSpec *wq, int OC, int C) {
    ServedLayout l;
    return layout(&l, wq, OC, C) ? l.bytes : 0;
}

void served_w_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C) {
    ServedLayout l;
    if (!layout(&l, wq, OC, C)) return;
    uint8_t *base = (uint8_t *)served, *to = base + (size_t)row0 * l.row_bytes;
    size_t first = (size_t)row0 * (size_t)l.across, groups = (size_t)rows * (size_t)l.across;
    if (l.plain) {
        CUDA_CHECK(cudaMemcpyAsync(to, codes, (size_t)rows * l.row_bytes, cudaMemcpyDeviceToDevice, cuda_stream));
        served_pack_params((float *)(base + l.scale) + first, PARAMS_F32, scale, nullptr, 0.0f, groups);
        if (zero) served_pack_params((float *)(base + l.zero) + first, PARAMS_F32, zero, nullptr, 0.0f, groups);
        return;
    }
    served_pack_fields(to, l.row_bytes, codes, wq, rows, C, false, false);
    float shift = wq->zero == QZ_FLOAT ? 0.0f : (float)field_shift(wq);
    if (zero) served_pack_params((uint32_t *)(base + l.scale) + first, PARAMS_PAIR, scale, zero, shift, groups);
    else if (l.stored_bits == 8 && l.across == 1)
        served_pack_params((float *)(base + l.scale) + first, PARAMS_F32, scale, nullptr, 0.0f, groups);
    else served_pack_params((bf16 *)(base + l.scale) + first, PARAMS_BF16, scale, nullptr, 0.0f, groups);
}

static Scaling scaling_of(const ServedLayout *l, const QuantSpec *wq) {
    if (quant_has_zero(wq)) return wq->zero == QZ_FLOAT ? SCALE_PAIR : SCALE_PAIR_INT;
    return l->stored_bits == 8 && l->across == 1 ? SCALE_ROW : SCALE_BF16;
}

// ---------------------------------------------------------------------------------------------
// Many tokens: the values that dequant_rows makes, of rows that begin at `codes` and params. A block a row, a thread
// eight weights.
template <int STORED, int SCALING>
static __global__ void __launch_bounds__(256)
unpack_kernel(floatX *work, float *wscale, const uint8_t *codes, const void *params, int C, int across, bool as_codes) {
    const size_t row = blockIdx.x, first = row * (unsigned)across;
    const int group = C / across;
    codes += row * ((size_t)C * STORED / 8);
    work += row * (size_t)C;
    auto scale_of = [&](size_t g) {
        return SCALING == SCALE_ROW ? ((const float *)params)[g]
               : SCALING == SCALE_BF16 ? bf16_to_f32(((const bf16 *)params)[g])
                                       : low_half(((const uint32_t *)params)[g]);
    };
    if (threadIdx.x == 0 && wscale) wscale[row] = as_codes ? scale_of(first) : 1.0f;
    for (int c = (int)threadIdx.x * 8; c < C; c += 256 * 8) {
        size_t g = first + (size_t)(c / group);
        float scale = scale_of(g), middle = (float)(1 << (STORED - 1)), zero = middle, plus = 0.0f, f[8];
        if (SCALING == SCALE_PAIR) plus = high_half(((const uint32_t *)params)[g]);
        if (SCALING == SCALE_PAIR_INT) zero = high_half(((const uint32_t *)params)[g]);
        uint64_t eight = STORED == 8 ? *(const uint64_t *)(codes + c) : *(const uint32_t *)(codes + c / 2);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float q = (float)(int)(eight >> STORED * i & ((1u << STORED) - 1)) - zero;
            if (!as_codes) q = SCALING == SCALE_PAIR ? fmaf(q, scale, plus) : q * scale;
#ifdef PRECISION_FP32
            q = bf16_round(q);
#endif
            f[i] = q;
        }
        Vec<floatX, 8> v = to_x(f);
#pragma unroll
        for (int i = 0; i < 8; i += VEC_X) {
            Vec<floatX, VEC_X> part;
            for (int j = 0; j < VEC_X; j++) part.v[j] = v.v[i + j];
            vec_store(work + c + i, part);
        }
    }
}

// Rows [row0, row0 + rows) as X, with their scales where they work as codes.
static void unpack(floatX *work, float *wscale, const uint8_t *base, const ServedLayout *l, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int C) {
    const uint8_t *codes = base + (size_t)row0 * l->row_bytes;
    size_t first = (size_t)row0 * (size_t)l->across;
    if (l->plain) {
        const float *zero = quant_has_zero(wq) ? (const float *)(base + l->zero) + first : nullptr;
        cuda_dequant_rows(work, wscale, codes, (const float *)(base + l->scale) + first, zero, wq, rows, C);
        return;
    }
    Scaling s = scaling_of(l, wq);
    auto kernel = l->stored_bits == 8 ? (s == SCALE_ROW ? unpack_kernel<8, SCALE_ROW> : unpack_kernel<8, SCALE_BF16>)
                  : s == SCALE_BF16 ? unpack_kernel<4, SCALE_BF16>
                  : s == SCALE_PAIR ? unpack_kernel<4, SCALE_PAIR> : unpack_kernel<4, SCALE_PAIR_INT>;
    const uint8_t *params = base + l->scale + first * (s == SCALE_BF16 ? 2 : 4);
    LAUNCH(kernel, (unsigned)rows, 256, 0, cuda_stream)
        (work, wscale, codes, params, C, l->across, quant_works_as_codes(wq));
    CUDA_CHECK(cudaGetLastError());
}

static void linear(ServedOut y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC) {
    if (y.x) cuda_linear_forward(y.x, x, w, wscale, N, C, OC);
    else cuda_linear_forward_f32(y.f, x, w, wscale, N, C, OC);
}

static void many(ServedOut y, const floatX *x, const uint8_t *base, const ServedLayout *l, const QuantSpec *wq,
                 size_t N, int C, int OC) {
    size_t value = y.x ? sizeof(floatX) : sizeof(float), total = 0;
    int64_t most = (int64_t)(served_piece() / ((size_t)C * sizeof(floatX))), rows = most < 16 ? 16 : most;
    if (rows > OC) rows = OC;
    size_t at_w = served_place(&total, (size_t)rows * (size_t)C * sizeof(floatX));
    size_t at_scale = served_place(&total, (size_t)rows * sizeof(float));
    size_t at_y = served_place(&total, rows < OC ? N * (size_t)rows * value : 0);
    char *work = (char *)cuda_workspace(total, OUTER);
    if (!work) return;
    floatX *w = (floatX *)(void *)(work + at_w);
    bool as_codes = quant_works_as_codes(wq);
    float *wscale = as_codes ? (float *)(void *)(work + at_scale) : nullptr;
    for (int64_t row = 0; row < OC; row += rows) {
        int64_t n = OC - row < rows ? OC - row : rows;
        unpack(w, wscale, base, l, wq, row, n, C);
        if (rows == OC) {
            linear(y, x, w, wscale, N, C, OC);
            return;
        }
        void *at = work + at_y;
        ServedOut piece = {y.x ? (floatX *)at : nullptr, y.f ? (float *)at : nullptr};
        linear(piece, x, w, wscale, N, C, (int)n);
        char *to = (y.x ? (char *)y.x : (char *)y.f) + (size_t)row * value;
        CUDA_CHECK(cudaMemcpy2DAsync(to, (size_t)OC * value, work + at_y, (size_t)n * value, (size_t)n * value, N,
                                     cudaMemcpyDeviceToDevice, cuda_stream));
    }
}

// ---------------------------------------------------------------------------------------------
static void few(ServedOut y, const floatX *x, const uint8_t *base, const ServedLayout *l, const QuantSpec *wq, size_t N,
                int C, int OC) {
    if (l->plain) {
        const float *zero = quant_has_zero(wq) ? (const float *)(base + l->zero) : nullptr;
        cuda_qmatvec(y.x, y.f, x, base, (const float *)(base + l->scale), zero, wq, N, C, OC);
        return;
    }
    if (!rows_take_vec(C, x)) {                                 // not on 16 bytes: a copy that is
        floatX *copy = (floatX *)cuda_workspace(N * (size_t)C * sizeof *copy, OUTER);
        if (!copy) return;
        CUDA_CHECK(cudaMemcpyAsync(copy, x, N * (size_t)C * sizeof *x, cudaMemcpyDeviceToDevice, cuda_stream));
        x = copy;
    }
    Scaling s = scaling_of(l, wq);
    auto run = l->stored_bits == 8 ? (s == SCALE_ROW ? matvec_any_n<CODES_8, SCALE_ROW, true>
                                                     : matvec_any_n<CODES_8, SCALE_BF16, true>)
               : s == SCALE_BF16 ? matvec_any_n<CODES_4, SCALE_BF16, true>
               : s == SCALE_PAIR ? matvec_any_n<CODES_4, SCALE_PAIR, true>
                                 : matvec_any_n<CODES_4, SCALE_PAIR_INT, true>;
    run({y.x, y.f}, x, base, (int)l->row_bytes, 0, base + l->scale, nullptr, (unsigned)(C / l->across), N, C, OC);
}

void served_w_forward(ServedOut y, const floatX *x, const void *served, const QuantSpec *wq, size_t N, int C, int OC) {
    ServedLayout l;
    if (!layout(&l, wq, OC, C)) return;
    if (N <= FEW) few(y, x, (const uint8_t *)served, &l, wq, N, C, OC);
    else many(y, x, (const uint8_t *)served, &l, wq, N, C, OC);
}
