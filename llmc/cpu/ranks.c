// What happens to bytes before they go to other ranks and after they came (ops.h, "between ranks").
#include "cpu.h"

// Rows of rank r that lie in the window [k0, k0 + kn) of its own.
static int64_t rows_in_window(const RowSplit *split, int r, int64_t k0, int64_t kn) {
    int64_t n = split_count(split, r) - k0;
    return n < 0 ? 0 : n < kn ? n : kn;
}

void cpu_state_sum(StepState *state, const StepState *all, int R) {
    state->loss_sum = state->grad_squares = 0.0;
    state->tokens = 0;
    state->stop = 0;
    for (int r = 0; r < R; r++) {
        state->loss_sum += all[r].loss_sum;
        state->tokens += all[r].tokens;
        state->grad_squares += all[r].grad_squares;
        state->stop |= all[r].stop;
    }
}

void cpu_rows_pack(void *wire, size_t stride, const void *tensor, const RowSplit *split, int64_t k0, int64_t kn,
                   size_t row_bytes) {
    for (int r = 0; r < split->R; r++) {
        size_t n = (size_t)rows_in_window(split, r, k0, kn), at = (size_t)(split_begin(split, r) + k0);
        if (n) memcpy((uint8_t *)wire + (size_t)r * stride, (const uint8_t *)tensor + at * row_bytes, n * row_bytes);
    }
}

void cpu_rows_unpack(void *tensor, const void *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn,
                     size_t row_bytes) {
    for (int r = 0; r < split->R; r++) {
        size_t n = (size_t)rows_in_window(split, r, k0, kn), at = (size_t)(split_begin(split, r) + k0);
        if (n) memcpy((uint8_t *)tensor + at * row_bytes, (const uint8_t *)wire + (size_t)r * stride, n * row_bytes);
    }
}

void cpu_weight_pack(uint8_t *wire, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols, int64_t kn) {
    int64_t block[2];
    Err err;
    if (rows == 0) return;
    if (quant_block_shape(wq, rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return;
    }
    QuantWire at = quant_wire_layout(wq, kn, cols, block);
    size_t row_bytes = quant_row_bytes(wq->bits, cols);
    int64_t across = cols / block[1];
    memset(wire, 0, (size_t)rows * row_bytes);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < across; g++) {
            const float *first = master + r / block[0] * block[0] * cols + g * block[1];
            float mn = INFINITY, mx = -INFINITY;
            for (int64_t i = 0; i < block[0]; i++)
                for (int64_t c = 0; c < block[1]; c++) quant_minmax(&mn, &mx, bf16_round(first[i * cols + c]));
            QParams p = quant_choose(mn, mx, wq, QD_BF16);
            size_t k = (size_t)(r / block[0] * across + g);
            bf16 scale = bf16_from_f32(p.scale), zero = bf16_from_f32(p.zp);
            memcpy(wire + at.scale + 2 * k, &scale, 2);
            if (wq->zero == QZ_FLOAT) memcpy(wire + at.zero + 2 * k, &zero, 2);
            else if (quant_has_zero(wq)) wire[at.zero + k] = (uint8_t)(int)p.zp;
            for (int64_t c = g * block[1]; c < (g + 1) * block[1]; c++) {
                unsigned code = (unsigned)quant_code(bf16_round(master[r * cols + c]), p, wq, QD_BF16);
                for (int b = 0; b < wq->bits; b++) {
                    size_t bit = (size_t)c * (size_t)wq->bits + (size_t)b;
                    wire[(size_t)r * row_bytes + bit / 8] |= (uint8_t)((code >> b & 1) << bit % 8);
                }
            }
        }
}

void cpu_weight_unpack(floatX *work, float *wscale, const uint8_t *wire, size_t stride, const RowSplit *split,
                       int64_t k0, int64_t kn, const QuantSpec *wq, int64_t cols) {
    int64_t block[2];
    Err err;
    if (split->rows == 0) return;
    if (quant_block_shape(wq, split->rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return;
    }
    QuantWire at = quant_wire_layout(wq, kn, cols, block);
    size_t row_bytes = quant_row_bytes(wq->bits, cols);
    int64_t across = cols / block[1];
    int16_t *codes = cpu_workspace((size_t)cols * sizeof *codes);
    if (!codes) return;
    for (int r = 0; r < split->R; r++) {
        const uint8_t *part = wire + (size_t)r * stride;
        for (int64_t k = 0; k < rows_in_window(split, r, k0, kn); k++) {
            int64_t row = split_begin(split, r) + k0 + k;
            quant_unpack_row(codes, part + (size_t)k * row_bytes, cols, wq);
            for (int64_t c = 0; c < cols; c++) {
                size_t b = (size_t)(k / block[0] * across + c / block[1]);
                bf16 scale, zero = 0;
                memcpy(&scale, part + at.scale + 2 * b, 2);
                QParams p = {bf16_to_f32(scale), quant_mid(wq)};
                if (wq->zero == QZ_FLOAT) {
                    memcpy(&zero, part + at.zero + 2 * b, 2);
                    p.zp = bf16_to_f32(zero);
                } else if (quant_has_zero(wq)) {
                    uint8_t z = part[at.zero + b];
                    p.zp = wq->is_unsigned ? (float)z : (float)(int8_t)z;
                }
                bool as_codes = quant_works_as_codes(wq);
                work[row * cols + c] = f2x(as_codes ? (float)codes[c] : quant_dequant(codes[c], p, wq, QD_BF16));
                if (wscale && c == 0) wscale[row] = as_codes ? p.scale : 1.0f;
            }
        }
    }
}

void cpu_sum_ranks(float *out, const float *in, size_t stride, int R, size_t n, bool accumulate) {
    for (size_t i = 0; i < n; i++) {
        float sum = in[i];
        for (int r = 1; r < R; r++) sum += in[(size_t)r * stride + i];
        out[i] = accumulate ? out[i] + sum : sum;
    }
}
