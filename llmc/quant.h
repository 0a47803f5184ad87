// Quantization schemes: one type for what is trained, converted, stored and served, and the exact scalar
// arithmetic behind it. Source: torchao's quant_primitives (affine quantization) and its QAT package;
// doc/numerics.md states every rounding.
//
// Names: bits, group_size, scale (real units per step), zero_point (in codes, or in real units in the float
// domain), amax. A value x and its code q:  x ~ (q - zero_point) * scale      (integer domain)
//                                          x ~ (q - mid) * scale + zero_point (float domain, mid = 2^(bits-1))
#ifndef QLLM_QUANT_H
#define QLLM_QUANT_H
#include "common.h"
#include "optimizer.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef enum { QG_TENSOR, QG_CHANNEL, QG_GROUP, QG_BLOCK, QG_TOKEN } QuantGranularity;   // CHANNEL: a row of (OC, C)
typedef enum { QM_SYMMETRIC, QM_SYMMETRIC_NO_CLIP, QM_ASYMMETRIC, QM_ROWS } QuantMapping;   // ROWS: see below
typedef enum { QZ_INT, QZ_FLOAT } QuantZeroPoint;
typedef enum { QD_F32, QD_BF16 } QuantDType;       // the dtype whose rounding every step of the qparams follows

// How one tensor is quantized. bits == 0 means not at all. Plain data: the CUDA kernels take it by value.
typedef struct {
    int bits;                 // 2..8, or 0
    int is_unsigned;          // codes 0..2^bits-1 instead of -2^(bits-1)..2^(bits-1)-1
    int qmin, qmax;           // inclusive; may be narrower than the type, as int8dq's -127..127
    QuantGranularity gran;
    int group;                // QG_GROUP: values along the row that share a scale
    int block[2];             // QG_BLOCK: rows, columns
    QuantMapping mapping;
    QuantZeroPoint zero;      // QZ_FLOAT: asymmetric, not pulled to zero (tinygemm)
    float eps;                // smallest scale
} QuantSpec;

// Weight and input-activation quantization of a linear.
typedef struct { QuantSpec weight, act; } QuantScheme;

typedef struct {
    float scale;
    float zp;                 // integer domain: an integer held as float (0 when symmetric); float domain: real units
} QParams;

// ---------------------------------------------------------------------------------------------
// Scalar arithmetic. D is the dtype of the data: QD_BF16 rounds after each operation as eager PyTorch does on
// bf16 tensors, QD_F32 does not. Scales are held and used as f32 in both cases (their values are bf16 values for
// QD_BF16). Weights are always read as bf16 values with QD_BF16; activations with the dtype of floatX.

QHD float quant_round_d(float v, QuantDType d) { return d == QD_BF16 ? bf16_round(v) : v; }
QHD float quant_clampf(float v, float lo, float hi) { return v < lo ? lo : v > hi ? hi : v; }   // NaN passes
// The middle of the range: 0 for signed codes, 2^(bits-1) for unsigned ones. The zero point of a symmetric spec.
QHD float quant_mid(const QuantSpec *s) { return (float)((s->qmax + s->qmin + 1) / 2); }

// Widens [*mn, *mx] to hold x; start from (INFINITY, -INFINITY). A NaN takes no part, so that vector minimums may be
// used in any order.
QHD void quant_minmax(float *mn, float *mx, float x) {
    if (x < *mn) *mn = x;
    if (x > *mx) *mx = x;
}

// max(scale, eps), eps as a value of D; NaN stays.
QHD float quant_floor_scale(float scale, const QuantSpec *s, QuantDType d) {
    float eps = quant_round_d(s->eps, d);
    return scale < eps ? eps : scale;
}

// Scale and zero point of a block with minimum mn and maximum mx (torchao's choose_qparams_affine). Zero belongs to
// every block's range but the float domain's. An all-zero block gets scale eps, a block of nothing but NaN too; a block
// with infinities, or whose width overflows, gets an infinite scale and decodes to NaN. INT8 rows are f32 whatever D.
QHD QParams quant_choose(float mn, float mx, const QuantSpec *s, QuantDType d) {
    QParams p;
    float range = (float)(s->qmax - s->qmin);
    if (!(mn <= mx)) mn = mx = 0.0f;
    if (s->zero == QZ_FLOAT) {
        p.scale = quant_floor_scale(quant_round_d(quant_round_d(mx - mn, d) / range, d), s, d);
        p.zp = quant_round_d(mn + quant_round_d(p.scale * quant_mid(s), d), d);
        return p;
    }
    mn = mn < 0.0f ? mn : 0.0f;
    mx = mx > 0.0f ? mx : 0.0f;
    if (s->mapping == QM_ROWS) {
        p.scale = int8_row_scale(-mn > mx ? -mn : mx);
        p.zp = 0.0f;
        return p;
    }
    if (s->mapping == QM_ASYMMETRIC) {
        p.scale = quant_floor_scale(quant_round_d(quant_round_d(mx - mn, d) / range, d), s, d);
        float r = quant_round_d((float)s->qmin - rintf(quant_round_d(mn / p.scale, d)), d);
        p.zp = r == r ? quant_clampf(r, (float)s->qmin, (float)s->qmax) : (float)s->qmin;   // inf / inf
        return p;
    }
    if (s->mapping == QM_SYMMETRIC_NO_CLIP) {
        float smin = quant_round_d(mn / (float)s->qmin, d), smax = quant_round_d(mx / (float)s->qmax, d);
        p.scale = quant_floor_scale(smin > smax ? smin : smax, s, d);
    } else {
        float a = -mn > mx ? -mn : mx;
        p.scale = quant_floor_scale(quant_round_d(a / (range * 0.5f), d), s, d);
    }
    p.zp = quant_mid(s);
    return p;
}

// The value before clamping, still a float: what --ste clip tests against [qmin, qmax].
QHD float quant_unclamped(float x, QParams p, const QuantSpec *s, QuantDType d) {
    if (s->zero == QZ_FLOAT) {
        float m = quant_round_d(p.zp - quant_round_d(p.scale * quant_mid(s), d), d);   // value of code qmin
        return rintf(quant_round_d(quant_round_d(x - m, d) / p.scale, d));
    }
    if (s->mapping == QM_ROWS) return rintf(x * int8_row_inv(p.scale));
    return rintf(x * (1.0f / p.scale)) + p.zp;
}

// Code of x; NaN gets the code nearest to zero.
QHD int quant_code(float x, QParams p, const QuantSpec *s, QuantDType d) {
    float q = quant_unclamped(x, p, s, d);
    if (q != q) q = quant_unclamped(0.0f, p, s, d);
    if (q != q) return s->qmin;                          // a block that decodes to NaN whatever the code
    return (int)quant_clampf(q, (float)s->qmin, (float)s->qmax);
}

// Value of a code, rounded once to d. Float domain: one fused multiply-add, as the serving kernels do.
QHD float quant_dequant(float code, QParams p, const QuantSpec *s, QuantDType d) {
    if (s->zero == QZ_FLOAT) return quant_round_d(fmaf(code - quant_mid(s), p.scale, p.zp), d);
    return quant_round_d((code - p.zp) * p.scale, d);
}

// quantize and dequantize in one, NaN kept.
QHD float quant_fake(float x, QParams p, const QuantSpec *s, QuantDType d) {
    float q = quant_clampf(quant_unclamped(x, p, s, d), (float)s->qmin, (float)s->qmax);
    return quant_dequant(q, p, s, d);
}

// Whether --ste clip lets the gradient of x through: its code lies in [qmin, qmax] before clamping.
QHD bool quant_in_range(float x, QParams p, const QuantSpec *s, QuantDType d) {
    float q = quant_unclamped(x, p, s, d);
    return q >= (float)s->qmin && q <= (float)s->qmax;
}

// INT8 rows, as INT8 training keeps them (train_llama_qt; arithmetic in optimizer.h): 8 bits, -128..127, one f32 scale
// amax / 127 a row. Weights are trained as codes and stored as they are; fake quantization never makes them.
// As the activation of a linear it says that rows of its input are quantized in the same way and that the product is an
// integer one (linear_i8_forward). Text: int8,channel,rows and int8,token,rows; presets int8qt and int8qt-int8.
// Integer products need weights that are INT8 rows too; an embedding is read with no matmul after it and has none.
static inline bool quant_is_int8_rows(const QuantSpec *s) { return s->bits == 8 && s->mapping == QM_ROWS; }

// ---------------------------------------------------------------------------------------------
// Tensors (host reference; the wings have fast twins that give the same bits).

// Rows and columns that share one (scale, zero point) in a (rows, cols) tensor. E_SHAPE if they do not divide it.
int quant_block_shape(const QuantSpec *s, int64_t rows, int64_t cols, int64_t block[2], Err *err);
// Quantizes w (rows, cols) f32 holding values of d: codes (rows, cols) int16, qp (rows/block[0], cols/block[1]).
int quant_tensor(int16_t *codes, QParams *qp, const float *w, int64_t rows, int64_t cols, const QuantSpec *s,
                 QuantDType d, Err *err);
// Symmetric per-channel weights work as their codes, with the row's scale applied to the accumulator.
bool quant_works_as_codes(const QuantSpec *weight);
// Whether blocks have a zero point of their own; without one it is quant_mid everywhere and is not stored.
bool quant_has_zero(const QuantSpec *s);

// Packed codes. One row is a little-endian stream of `bits`-bit fields, two's complement when signed, each row
// starting at a byte: code c occupies bits [c*bits, (c+1)*bits). For 4 bits even c is the low nibble:
//   byte        0           1           2           3
//   bits    7..4 3..0   7..4 3..0   7..4 3..0   7..4 3..0
//   holds    c1   c0     c3   c2     c5   c4     c7   c6        c0 = -3 (0xD), c1 = 5 -> byte 0 = 0x5D
size_t quant_row_bytes(int bits, int64_t cols);
void quant_pack_row(uint8_t *dst, const int16_t *codes, int64_t cols, int bits);
void quant_unpack_row(int16_t *codes, const uint8_t *src, int64_t cols, const QuantSpec *s);

// Quantized rows on the wire between ranks: codes, then scales as bf16, then zero points (as bf16 in the float domain, as
// a byte in the integer domain), row-major as in files; each part at a multiple of 16 bytes. Offsets and size in bytes of
// `rows` rows, which are whole blocks of block[0] rows; zero == bytes where there are none.
typedef struct { size_t codes, scale, zero, bytes; } QuantWire;
QuantWire quant_wire_layout(const QuantSpec *s, int64_t rows, int64_t cols, const int64_t block[2]);

// ---------------------------------------------------------------------------------------------
// Names. Presets are torchao's: none, int8wo, int8dq, int4wo-G, 8da4w-G, and intB-G for weight-only symmetric
// groups of any width (int3-32). G is a group size of at least 2 that divides the row. int8qt and int8qt-int8 are what
// train_llama_qt makes: INT8 rows, their matmuls weight-only or of integers.

int quant_scheme_from_name(QuantScheme *out, const char *name, Err *err);
// TYPE[,GRANULARITY][,MAPPING][,range=LO..HI][,eps=E], or "none":
//   TYPE         int2..int8, uint2..uint8
//   GRANULARITY  tensor, channel (default for weights), group=G, block=RxC; token (activations, and only they)
//   MAPPING      symmetric (default of intB), symmetric-no-clip, asymmetric (default of uintB), float (uintB weights),
//                rows (int8 by channel or token, all codes, no eps: INT8 training's)
//   range        narrower codes; default: all of the type, but -(2^(B-1)-1).. for symmetric activations (int8dq)
//   eps          smallest scale; default 2^-126, activations 2^-23, float 1e-6
// "int4,group=32,symmetric" | "uint4,group=64,float" | "int8,token,asymmetric" | "int8,channel" | "int5,block=2x16" |
// "int8,channel,rows"
int quant_spec_parse(QuantSpec *out, const char *text, bool is_activation, Err *err);
// The inverse: the canonical text of a spec ("none" for bits == 0), at most QUANT_SPEC_TEXT bytes.
#define QUANT_SPEC_TEXT 96
void quant_spec_text(char *buf, size_t size, const QuantSpec *s);
bool quant_spec_equal(const QuantSpec *a, const QuantSpec *b);

// Which scheme each tensor gets: a default for linears, one for the embedding, one for a tied head, and rules by
// name pattern (fnmatch on a linear's Hugging Face name), the last match winning.
#define QUANT_MAX_RULES 16
typedef struct { char pattern[96]; QuantScheme scheme; } QuantRule;
typedef struct {
    char name[64];                       // short name for files and tables: "8da4w-32", "none", "custom"
    QuantScheme linear;
    QuantSpec embedding;
    QuantSpec tied_head;                 // bits == 0: the head of a tied table stays in floatX
    int n_rules;
    QuantRule rules[QUANT_MAX_RULES];
} QuantPlan;

void quant_plan_none(QuantPlan *p);
// The plan of a program's options, each NULL when not given: --scheme NAME or --weight SPEC for linears, --activation
// SPEC for their inputs, --embedding SPEC, --head SPEC, --rule RULE... What is not said is as in `base` (NULL: not
// quantized); a scheme, or weights, replace its linears and rules. Named after the scheme (int8qt with or without a tied
// head of INT8 rows), or the base, that it equals, else "custom".
int quant_plan_from_options(QuantPlan *p, const QuantPlan *base, const char *scheme, const char *weight,
                            const char *activation, const char *embedding, const char *head, const char *const *rules,
                            int n_rules, Err *err);
// Parses one rule: PATTERN=SCHEME, PATTERN=WEIGHTSPEC (with a comma in it) or PATTERN=WEIGHTSPEC;ACTSPEC. Sets the
// plan's name to "custom".
int quant_plan_add_rule(QuantPlan *p, const char *text, Err *err);
// Scheme of the linear called `name`.
QuantScheme quant_plan_linear(const QuantPlan *p, const char *name);
bool quant_plan_is_none(const QuantPlan *p);                                      // nothing is quantized anywhere
bool quant_plan_equal(const QuantPlan *a, const QuantPlan *b);                    // names aside
bool quant_plan_has_rows(const QuantPlan *p);                                     // INT8 rows somewhere, in any rule
// JSON text in and out (for model.bin's metadata); from_json refuses anything out of range. The name is checked too: it
// becomes part of file names, so only letters, digits, '.', '_' and '-' pass, and no '.' or '-' in front.
char *quant_plan_to_json(const QuantPlan *p);                                     // malloc'ed
int quant_plan_from_json(QuantPlan *p, const char *text, size_t len, Err *err);

#ifdef __cplusplus
}
#endif
#endif
