// Served forms (ops.h) of the CUDA wing: codes against inputs as they are (served_w.cu), and against quantized inputs,
// in integers (served_i.cu). What the two share is here: how codes are stored.
//
// Codes of up to 4 bits take 4 bits, wider ones 8. A stored field counts from the lowest code of a type of that width:
// code - middle of its own type + 8 or 128. Rows begin at multiples of 16 bytes. So kernels know two widths and one
// sign.
#ifndef QLLM_SERVED_CUH
#define QLLM_SERVED_CUH
#include "packed.cuh"

// y (N, OC): X or f32, the other one NULL.
struct ServedOut { floatX *x; float *f; };

size_t served_w_bytes(const QuantSpec *wq, int OC, int C);
void served_w_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C);
void served_w_forward(ServedOut y, const floatX *x, const void *served, const QuantSpec *wq, size_t N, int C, int OC);

size_t served_i_bytes(const QuantSpec *wq, int OC, int C);
void served_i_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C);
void served_i_forward(ServedOut y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                      size_t N, int C, int OC);

// Tests: bytes of weights that exist unpacked at one time.
void cuda_served_piece(size_t bytes);
size_t served_piece(void);

// Where what lies in the buffer: codes first, then scales and zero points. `plain`: codes as packed, scales and zero
// points in f32; for what the fast kernels do not take.
typedef struct {
    bool plain;
    int stored_bits;            // 4 or 8
    int across;                 // groups of a row
    size_t row_bytes;           // of codes
    size_t scale, zero, bytes;
} ServedLayout;

static inline size_t served_place(size_t *total, size_t bytes) {
    size_t at = *total;
    *total += (bytes + 255) / 256 * 256;
    return at;
}
static inline int stored_bits(int bits) { return bits <= 4 ? 4 : 8; }
// What is added to a code to make its field, and whether codes without a zero point count from the middle of the
// fields.
static inline int field_shift(const QuantSpec *wq) {
    int middle = 1 << (stored_bits(wq->bits) - 1);
    return wq->is_unsigned ? middle - (1 << (wq->bits - 1)) : middle;
}
static inline bool middle_is_zero(const QuantSpec *wq) {
    return (int)quant_mid(wq) + field_shift(wq) == 1 << (stored_bits(wq->bits) - 1);
}

// Fields of `rows` rows. FOURS: in each eight of 4 bits, byte b holds code b in its lower half and code b + 4 in the
// upper one, so that a mask makes bytes of four codes in order; else in order from the lowest bits on. SIGNED: of 8
// bits, less 128. Fields behind the row's end are 0.
void served_pack_fields(uint8_t *to, size_t to_row_bytes, const uint8_t *codes, const QuantSpec *wq, int64_t rows,
                        int C, bool fours, bool is_signed);
// Parameters of n groups as bf16 scales, words of a bf16 scale and, in the upper half, a bf16 zero point plus shift,
// f32, or zero points plus shift as bytes.
enum ServedParams { PARAMS_BF16, PARAMS_PAIR, PARAMS_F32, PARAMS_BYTE };
void served_pack_params(void *to, ServedParams format, const float *scale, const float *zero, float shift, size_t n);
#endif
