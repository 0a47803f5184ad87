// Quantization schemes by name, the reference quantizer of a whole tensor, packing.
#include "quant.h"

#include <errno.h>
#include <stdlib.h>

#define QUANT_MAX_GROUP (1 << 20)      // far beyond any row; keeps products of block sizes in range
#define QUANT_EPS_WEIGHT 0x1p-126f     // smallest normal: inert for real weights (an eps of bf16's 2^-7 ruins them)
#define QUANT_EPS_ACT 0x1p-23f
#define QUANT_EPS_FLOAT 1e-6f

// ---------------------------------------------------------------------------------------------
// Tensors.

int quant_block_shape(const QuantSpec *s, int64_t rows, int64_t cols, int64_t block[2], Err *err) {
    if (rows < 1 || cols < 1) return err_set(err, E_SHAPE, "cannot quantize a tensor of %lld x %lld values",
                                             (long long)rows, (long long)cols);
    switch (s->gran) {
    case QG_TENSOR: block[0] = rows, block[1] = cols; return 0;
    case QG_CHANNEL:
    case QG_TOKEN: block[0] = 1, block[1] = cols; return 0;
    case QG_GROUP: block[0] = 1, block[1] = s->group; break;
    case QG_BLOCK: block[0] = s->block[0], block[1] = s->block[1]; break;
    default: return err_set(err, E_USAGE, "unknown granularity %d", (int)s->gran);
    }
    if (block[0] < 1 || block[1] < 1 || rows % block[0] || cols % block[1]) {
        if (s->gran == QG_GROUP)
            return err_set(err, E_SHAPE,
                           "group %d does not divide the row of %lld values; use a divisor such as 32, 64 or 128",
                           s->group, (long long)cols);
        return err_set(err, E_SHAPE,
                       "block %dx%d does not divide the tensor of %lld x %lld values; use divisors of both",
                       s->block[0], s->block[1], (long long)rows, (long long)cols);
    }
    return 0;
}

int quant_tensor(int16_t *codes, QParams *qp, const float *w, int64_t rows, int64_t cols, const QuantSpec *s,
                 QuantDType d, Err *err) {
    int64_t block[2];
    int rc = quant_block_shape(s, rows, cols, block, err);
    if (rc) return rc;
    int64_t across = cols / block[1], n_blocks = rows / block[0] * across;
#pragma omp parallel for schedule(static) if (rows * cols >= 65536)
    for (int64_t b = 0; b < n_blocks; b++) {
        int64_t first = b / across * block[0] * cols + b % across * block[1];
        float mn = INFINITY, mx = -INFINITY;
        for (int64_t r = 0; r < block[0]; r++)
            for (int64_t c = 0; c < block[1]; c++) quant_minmax(&mn, &mx, w[first + r * cols + c]);
        QParams p = quant_choose(mn, mx, s, d);
        qp[b] = p;
        for (int64_t r = 0; r < block[0]; r++)
            for (int64_t c = 0; c < block[1]; c++) {
                int64_t i = first + r * cols + c;
                codes[i] = (int16_t)quant_code(w[i], p, s, d);
            }
    }
    return 0;
}

bool quant_works_as_codes(const QuantSpec *weight) {
    // A symmetric zero point is the middle of the range: an uneven range's is not zero.
    return weight->bits && weight->gran == QG_CHANNEL && !weight->is_unsigned && !quant_has_zero(weight) &&
           quant_mid(weight) == 0.0f;
}

bool quant_has_zero(const QuantSpec *s) { return s->zero == QZ_FLOAT || s->mapping == QM_ASYMMETRIC; }

size_t quant_row_bytes(int bits, int64_t cols) { return ((size_t)cols * (size_t)bits + 7) / 8; }

QuantWire quant_wire_layout(const QuantSpec *s, int64_t rows, int64_t cols, const int64_t block[2]) {
    size_t blocks = (size_t)(rows / block[0]) * (size_t)(cols / block[1]), up = 15;
    QuantWire w = {0};
    w.scale = ((size_t)rows * quant_row_bytes(s->bits, cols) + up) & ~up;
    w.zero = w.bytes = (w.scale + 2 * blocks + up) & ~up;
    if (quant_has_zero(s)) w.bytes = (w.zero + (s->zero == QZ_FLOAT ? 2 : 1) * blocks + up) & ~up;
    return w;
}

// Fields are fed through an accumulator of at most 7 + 8 bits.
void quant_pack_row(uint8_t *dst, const int16_t *codes, int64_t cols, int bits) {
    uint32_t acc = 0, mask = (1u << bits) - 1;
    int held = 0;
    for (int64_t c = 0; c < cols; c++) {
        acc |= ((uint32_t)(int32_t)codes[c] & mask) << held;
        held += bits;
        if (held >= 8) {
            *dst++ = (uint8_t)acc;
            acc >>= 8;
            held -= 8;
        }
    }
    if (held) *dst = (uint8_t)acc;
}

void quant_unpack_row(int16_t *codes, const uint8_t *src, int64_t cols, const QuantSpec *s) {
    uint32_t acc = 0, mask = (1u << s->bits) - 1;
    int32_t sign = s->is_unsigned ? 0 : 1 << (s->bits - 1);
    int held = 0;
    for (int64_t c = 0; c < cols; c++) {
        if (held < s->bits) {
            acc |= (uint32_t)*src++ << held;
            held += 8;
        }
        int32_t field = (int32_t)(acc & mask);
        codes[c] = (int16_t)((field ^ sign) - sign);     // flipping and subtracting the sign bit extends it
        acc >>= s->bits;
        held -= s->bits;
    }
}

// ---------------------------------------------------------------------------------------------
// Specs.

static int type_min(const QuantSpec *s) { return s->is_unsigned ? 0 : -(1 << (s->bits - 1)); }
static int type_max(const QuantSpec *s) { return (s->is_unsigned ? 1 << s->bits : 1 << (s->bits - 1)) - 1; }

// What stands when the text says nothing. Symmetric activations give up their lowest code, as torchao's int8dq.
static int default_qmin(const QuantSpec *s) {
    bool narrow = s->gran == QG_TOKEN && s->mapping != QM_ASYMMETRIC && s->mapping != QM_ROWS && !s->is_unsigned;
    return narrow ? -type_max(s) : type_min(s);
}

static float default_eps(const QuantSpec *s) {
    if (s->mapping == QM_ROWS) return 0.0f;                      // scales are not floored
    return s->zero == QZ_FLOAT ? QUANT_EPS_FLOAT : s->gran == QG_TOKEN ? QUANT_EPS_ACT : QUANT_EPS_WEIGHT;
}

static QuantSpec spec_make(int bits, bool is_unsigned, QuantGranularity gran, int group, QuantMapping mapping,
                           QuantZeroPoint zero) {
    QuantSpec s = {
        .bits = bits, .is_unsigned = is_unsigned, .gran = gran, .group = group, .mapping = mapping, .zero = zero};
    s.qmin = default_qmin(&s);
    s.qmax = type_max(&s);
    s.eps = default_eps(&s);
    return s;
}

// Reads the whole of text as a decimal integer in [lo, hi].
static bool parse_int(const char *text, long lo, long hi, int *out) {
    const char *digits = *text == '-' ? text + 1 : text;
    if (*digits < '0' || *digits > '9') return false;
    char *end;
    errno = 0;
    long v = strtol(text, &end, 10);
    if (*end || errno || v < lo || v > hi) return false;
    *out = (int)v;
    return true;
}

// "16x2" or "-7..7" : two integers around a separator.
static bool parse_pair(const char *text, const char *separator, long lo, long hi, int out[2]) {
    char left[16];
    const char *mid = strstr(text, separator);
    if (!mid || (size_t)(mid - text) >= sizeof left) return false;
    memcpy(left, text, (size_t)(mid - text));
    left[mid - text] = 0;
    return parse_int(left, lo, hi, &out[0]) && parse_int(mid + strlen(separator), lo, hi, &out[1]);
}

// By QuantMapping, and last the asymmetric one of the float domain.
static const char *const mapping_names[] = {"symmetric", "symmetric-no-clip", "asymmetric", "rows", "float"};
enum { NAME_FLOAT = 4, N_MAPPING_NAMES = 5 };

// The words after the type. Each of the four kinds may appear once.
typedef struct { bool gran, mapping, range, eps; } SpecSeen;

static int spec_word(QuantSpec *s, SpecSeen *seen, const char *word, const char *text, Err *err) {
    bool *twice = NULL;
    if (!strcmp(word, "tensor") || !strcmp(word, "channel") || !strcmp(word, "token")) {
        s->gran = word[0] == 'c' ? QG_CHANNEL : word[1] == 'e' ? QG_TENSOR : QG_TOKEN;
        twice = &seen->gran;
    } else if (!strncmp(word, "group=", 6)) {
        if (!parse_int(word + 6, 2, QUANT_MAX_GROUP, &s->group))
            return err_set(err, E_USAGE, "\"%s\" in \"%s\": a group holds 2 to %d values, for instance group=32", word,
                           text, QUANT_MAX_GROUP);
        s->gran = QG_GROUP;
        twice = &seen->gran;
    } else if (!strncmp(word, "block=", 6)) {
        if (!parse_pair(word + 6, "x", 1, QUANT_MAX_GROUP, s->block))
            return err_set(err, E_USAGE, "\"%s\" in \"%s\": expected rows x columns, for instance block=2x16", word,
                           text);
        s->gran = QG_BLOCK;
        twice = &seen->gran;
    } else if (!strncmp(word, "range=", 6)) {
        int range[2];
        if (!parse_pair(word + 6, "..", type_min(s), type_max(s), range) || range[0] >= range[1])
            return err_set(err, E_USAGE, "\"%s\" in \"%s\": expected range=LOW..HIGH within %d..%d", word, text,
                           type_min(s), type_max(s));
        s->qmin = range[0];
        s->qmax = range[1];
        twice = &seen->range;
    } else if (!strncmp(word, "eps=", 4)) {
        char *end;
        s->eps = strtof(word + 4, &end);
        if (end == word + 4 || *end || !(s->eps >= QUANT_EPS_WEIGHT && s->eps <= 1.0f))
            return err_set(err, E_USAGE, "\"%s\" in \"%s\": the smallest scale lies between 1.2e-38 and 1", word, text);
        twice = &seen->eps;
    } else {
        for (int i = 0; i < N_MAPPING_NAMES; i++) {
            if (strcmp(word, mapping_names[i])) continue;
            s->mapping = i == NAME_FLOAT ? QM_ASYMMETRIC : (QuantMapping)i;
            s->zero = i == NAME_FLOAT ? QZ_FLOAT : QZ_INT;
            twice = &seen->mapping;
        }
    }
    if (!twice)
        return err_set(err, E_USAGE,
                       "unknown word \"%s\" in \"%s\": expected tensor, channel, group=G, block=RxC or token; "
                       "symmetric, symmetric-no-clip, asymmetric, float or rows; range=LOW..HIGH; eps=E",
                       word, text);
    if (*twice)
        return err_set(err, E_USAGE, "\"%s\" says the same kind of thing twice, the second time with \"%s\"", text,
                       word);
    *twice = true;
    return 0;
}

int quant_spec_parse(QuantSpec *out, const char *text, bool is_activation, Err *err) {
    memset(out, 0, sizeof *out);
    if (!strcmp(text, "none")) return 0;
    char words[128];
    size_t len = strlen(text);
    if (len >= sizeof words)
        return err_set(err, E_USAGE, "\"%.40s...\" is too long for a quantization (%zu bytes)", text, len);
    memcpy(words, text, len + 1);

    QuantSpec s = {0};
    SpecSeen seen = {0};
    char *next = words, *word = strsep(&next, ",");
    s.is_unsigned = word[0] == 'u';
    const char *type = word + s.is_unsigned;
    if (strncmp(type, "int", 3) || !parse_int(type + 3, 2, 8, &s.bits))
        return err_set(err, E_USAGE, "\"%s\" is no quantization: it begins with int2 to int8 or uint2 to uint8, as in "
                       "%s, or is none", text, is_activation ? "int8,token,asymmetric" : "int4,group=32,symmetric");
    s.gran = is_activation ? QG_TOKEN : QG_CHANNEL;
    s.mapping = s.is_unsigned ? QM_ASYMMETRIC : QM_SYMMETRIC;
    while ((word = strsep(&next, ","))) {
        int rc = spec_word(&s, &seen, word, text, err);
        if (rc) return rc;
    }
    if (is_activation && s.gran != QG_TOKEN)
        return err_set(err, E_USAGE, "activations are quantized per token: write int%d,token instead of \"%s\"", s.bits,
                       text);
    if (!is_activation && s.gran == QG_TOKEN)
        return err_set(err, E_USAGE,
                       "weights have no tokens: use tensor, channel, group=G or block=RxC instead of \"%s\"", text);
    if (s.mapping == QM_ROWS && (s.bits != 8 || s.is_unsigned || (s.gran != QG_CHANNEL && s.gran != QG_TOKEN) ||
                                 seen.range || seen.eps))
        return err_set(err, E_USAGE, "\"%s\": rows are those of INT8 training, 8 bits with one scale a row that "
                       "nothing limits: write int8,%s,rows", text, is_activation ? "token" : "channel");
    if (s.is_unsigned && s.mapping != QM_ASYMMETRIC)
        return err_set(err, E_USAGE, "\"%s\": symmetric codes are signed, write int%d", text, s.bits);
    if (s.zero == QZ_FLOAT && (!s.is_unsigned || is_activation || seen.range))
        return err_set(err, E_USAGE, "\"%s\": the float zero point is for the whole range of unsigned weights, as in "
                       "uint4,group=64,float", text);
    if (s.gran == QG_BLOCK && (int64_t)s.block[0] * s.block[1] < 2)
        return err_set(err, E_USAGE, "\"%s\": a block of one value is not quantization", text);
    if (!seen.range) s.qmin = default_qmin(&s), s.qmax = type_max(&s);
    if (s.mapping == QM_SYMMETRIC_NO_CLIP && (s.qmin >= 0 || s.qmax <= 0))
        return err_set(err, E_USAGE, "\"%s\": symmetric-no-clip needs codes on both sides of zero", text);
    if (s.mapping == QM_SYMMETRIC && (s.qmax < 1 || s.qmin + s.qmax > 0 || s.qmin + s.qmax < -1))
        return err_set(err, E_USAGE, "\"%s\": a symmetric range is centered on zero, as -7..7 or -8..7", text);
    if (!seen.eps) s.eps = default_eps(&s);
    *out = s;
    return 0;
}

void quant_spec_text(char *buf, size_t size, const QuantSpec *s) {
    if (!s->bits) {
        snprintf(buf, size, "none");
        return;
    }
    char gran[40], range[32] = "", eps[32] = "";
    switch (s->gran) {
    case QG_TENSOR: snprintf(gran, sizeof gran, "tensor"); break;
    case QG_CHANNEL: snprintf(gran, sizeof gran, "channel"); break;
    case QG_GROUP: snprintf(gran, sizeof gran, "group=%d", s->group); break;
    case QG_BLOCK: snprintf(gran, sizeof gran, "block=%dx%d", s->block[0], s->block[1]); break;
    case QG_TOKEN: snprintf(gran, sizeof gran, "token"); break;
    }
    if (s->qmin != default_qmin(s) || s->qmax != type_max(s))
        snprintf(range, sizeof range, ",range=%d..%d", s->qmin, s->qmax);
    if (s->eps != default_eps(s)) snprintf(eps, sizeof eps, ",eps=%.9g", (double)s->eps);
    const char *mapping = mapping_names[s->zero == QZ_FLOAT ? NAME_FLOAT : (int)s->mapping];
    snprintf(buf, size, "%sint%d,%s,%s%s%s", s->is_unsigned ? "u" : "", s->bits, gran, mapping, range, eps);
}

bool quant_spec_equal(const QuantSpec *a, const QuantSpec *b) {
    if (a->bits != b->bits) return false;
    if (!a->bits) return true;
    if (a->gran == QG_GROUP && a->group != b->group) return false;
    if (a->gran == QG_BLOCK && (a->block[0] != b->block[0] || a->block[1] != b->block[1])) return false;
    return a->is_unsigned == b->is_unsigned && a->qmin == b->qmin && a->qmax == b->qmax && a->gran == b->gran &&
           a->mapping == b->mapping && a->zero == b->zero && a->eps == b->eps;
}

// ---------------------------------------------------------------------------------------------
// Schemes by name.

#define KNOWN_SCHEMES "none, int8wo, int8dq, int4wo-G, 8da4w-G, int2-G to int8-G (G: group size, as in 8da4w-32), " \
    "and int8qt, int8qt-int8 of train_llama_qt"

// Letters to insert, delete or replace to make b of a. Both shorter than 32.
static int edit_distance(const char *a, const char *b) {
    int row[33], n = (int)strlen(b);
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int replace = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int least = row[j] < row[j - 1] ? row[j] : row[j - 1];
            row[j] = replace < least + 1 ? replace : least + 1;
        }
    }
    return row[n];
}

static const char *closest_scheme(const char *name) {
    static const char *const names[] = {"none", "int8wo", "int8dq", "int4wo-32", "int4wo-64", "int4wo-128", "8da4w-32",
                                        "8da4w-64", "8da4w-128", "int2-32", "int3-32", "int4-32", "int5-32", "int6-32",
                                        "int7-32", "int8-32", "int8qt", "int8qt-int8"};
    const char *best = NULL;
    int least = 5;      // farther away it is no misspelling
    for (size_t i = 0; strlen(name) < 32 && i < sizeof names / sizeof *names; i++) {
        // A name cut off before its group size is meant exactly.
        bool cut = strlen(name) >= 4 && !strncmp(names[i], name, strlen(name));
        int distance = cut ? 0 : edit_distance(name, names[i]);
        if (distance < least) least = distance, best = names[i];
    }
    return best;
}

int quant_scheme_from_name(QuantScheme *out, const char *name, Err *err) {
    memset(out, 0, sizeof *out);
    if (!strcmp(name, "none")) return 0;
    if (!strcmp(name, "int8wo") || !strcmp(name, "int8dq")) {
        out->weight = spec_make(8, false, QG_CHANNEL, 0, QM_SYMMETRIC, QZ_INT);
        if (name[4] == 'd') out->act = spec_make(8, false, QG_TOKEN, 0, QM_SYMMETRIC, QZ_INT);
        return 0;
    }
    if (!strcmp(name, "int8qt") || !strcmp(name, "int8qt-int8")) {
        out->weight = spec_make(8, false, QG_CHANNEL, 0, QM_ROWS, QZ_INT);
        if (name[6]) out->act = spec_make(8, false, QG_TOKEN, 0, QM_ROWS, QZ_INT);
        return 0;
    }
    bool tinygemm = !strncmp(name, "int4wo-", 7), dynamic = !strncmp(name, "8da4w-", 6);
    bool plain = !strncmp(name, "int", 3) && name[3] >= '2' && name[3] <= '8' && name[4] == '-';
    if (tinygemm || dynamic || plain) {
        int group;
        if (!parse_int(name + (tinygemm ? 7 : dynamic ? 6 : 5), 2, QUANT_MAX_GROUP, &group))
            return err_set(err, E_USAGE,
                           "scheme \"%.60s\": the group size after the dash is a number from 2 to %d, as in "
                           "8da4w-32",
                           name, QUANT_MAX_GROUP);
        if (tinygemm) out->weight = spec_make(4, true, QG_GROUP, group, QM_ASYMMETRIC, QZ_FLOAT);
        else out->weight = spec_make(plain ? name[3] - '0' : 4, false, QG_GROUP, group, QM_SYMMETRIC, QZ_INT);
        if (dynamic) out->act = spec_make(8, false, QG_TOKEN, 0, QM_ASYMMETRIC, QZ_INT);
        return 0;
    }
    const char *closest = closest_scheme(name);
    return err_set(err, E_USAGE, "unknown scheme \"%.60s\"%s%s%s; known: " KNOWN_SCHEMES, name,
                   closest ? ", did you mean " : "", closest ? closest : "", closest ? "?" : "");
}
