// Quantization schemes by name, the reference quantizer of a whole tensor, packing, and plans as JSON.
#include "quant.h"

#include <errno.h>
#include <fnmatch.h>
#include <stdlib.h>

#include "json.h"

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
    return weight->bits && weight->gran == QG_CHANNEL && !weight->is_unsigned && !quant_has_zero(weight);
}

bool quant_has_zero(const QuantSpec *s) { return s->zero == QZ_FLOAT || s->mapping == QM_ASYMMETRIC; }

size_t quant_row_bytes(int bits, int64_t cols) { return ((size_t)cols * (size_t)bits + 7) / 8; }

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
    bool narrow = s->gran == QG_TOKEN && s->mapping != QM_ASYMMETRIC && !s->is_unsigned;
    return narrow ? -type_max(s) : type_min(s);
}

static float default_eps(const QuantSpec *s) {
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

static const char *const mapping_names[] = {"symmetric", "symmetric-no-clip", "asymmetric", "float"};

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
        for (int i = 0; i < 4; i++) {
            if (strcmp(word, mapping_names[i])) continue;
            s->mapping = i < 2 ? (QuantMapping)i : QM_ASYMMETRIC;
            s->zero = i == 3 ? QZ_FLOAT : QZ_INT;
            twice = &seen->mapping;
        }
    }
    if (!twice)
        return err_set(err, E_USAGE,
                       "unknown word \"%s\" in \"%s\": expected tensor, channel, group=G, block=RxC or token; "
                       "symmetric, symmetric-no-clip, asymmetric or float; range=LOW..HIGH; eps=E",
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
    const char *mapping = mapping_names[s->zero == QZ_FLOAT ? 3 : (int)s->mapping];
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

#define KNOWN_SCHEMES "none, int8wo, int8dq, int4wo-G, 8da4w-G, and int2-G to int8-G (G: group size, as in 8da4w-32)"

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
                                        "int7-32", "int8-32"};
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

// ---------------------------------------------------------------------------------------------
// Plans.

void quant_plan_none(QuantPlan *p) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "none");
}

int quant_plan_from_options(QuantPlan *p, const QuantPlan *base, const char *scheme, const char *weight,
                            const char *activation, const char *embedding, const char *head, const char *const *rules,
                            int n_rules, Err *err) {
    quant_plan_none(p);
    if (base) *p = *base;
    if (scheme && weight)
        return err_set(err, E_USAGE, "--scheme %s and --weight %s both say how weights are quantized; give one", scheme,
                       weight);
    int rc = 0;
    if (scheme || weight) p->n_rules = 0, p->linear = (QuantScheme){0};
    if (scheme && (rc = quant_scheme_from_name(&p->linear, scheme, err))) return rc;
    if (weight && (rc = quant_spec_parse(&p->linear.weight, weight, false, err))) return rc;
    if (activation && (rc = quant_spec_parse(&p->linear.act, activation, true, err))) return rc;
    if (embedding && (rc = quant_spec_parse(&p->embedding, embedding, false, err))) return rc;
    if (head && (rc = quant_spec_parse(&p->tied_head, head, false, err))) return rc;
    for (int i = 0; i < n_rules; i++)
        if ((rc = quant_plan_add_rule(p, rules[i], err))) return rc;
    QuantPlan alone = {0};                       // the scheme and nothing else
    if (scheme && (rc = quant_scheme_from_name(&alone.linear, scheme, err))) return rc;
    const char *name = quant_plan_is_none(p)                    ? "none"
                       : scheme && quant_plan_equal(p, &alone) ? scheme
                       : base && quant_plan_equal(p, base)     ? base->name
                                                               : "custom";
    snprintf(p->name, sizeof p->name, "%s", name);
    return 0;
}

// Tensor names are printable ASCII, so patterns are too; anything else would only make files that others cannot read.
static bool pattern_is_printable(const char *pattern) {
    for (; *pattern; pattern++)
        if (*pattern <= ' ' || *pattern > '~') return false;
    return true;
}

static int rule_parse(QuantRule *rule, const char *text, Err *err) {
    const char *equals = strchr(text, '=');
    if (!equals || equals == text || !equals[1])
        return err_set(err, E_USAGE,
                       "rule \"%.100s\": expected PATTERN=SCHEME or PATTERN=WEIGHT;ACTIVATION, for instance "
                       "'*.down_proj.*=int8wo'",
                       text);
    size_t len = (size_t)(equals - text);
    if (len >= sizeof rule->pattern)
        return err_set(err, E_USAGE, "rule \"%.60s...\": the pattern is longer than %zu bytes", text,
                       sizeof rule->pattern - 1);
    memcpy(rule->pattern, text, len);
    rule->pattern[len] = 0;
    if (!pattern_is_printable(rule->pattern))
        return err_set(err, E_USAGE, "rule \"%.100s\": the pattern has a character that no tensor name has", text);

    const char *value = equals + 1, *semicolon = strchr(value, ';');
    if (!semicolon && !strchr(value, ',')) return quant_scheme_from_name(&rule->scheme, value, err);
    char weight[128];
    size_t wlen = semicolon ? (size_t)(semicolon - value) : strlen(value);
    if (wlen >= sizeof weight) return err_set(err, E_USAGE, "rule \"%.60s...\": the quantization is too long", text);
    memcpy(weight, value, wlen);
    weight[wlen] = 0;
    int rc = quant_spec_parse(&rule->scheme.weight, weight, false, err);
    return rc || !semicolon ? rc : quant_spec_parse(&rule->scheme.act, semicolon + 1, true, err);
}

int quant_plan_add_rule(QuantPlan *p, const char *text, Err *err) {
    if (p->n_rules == QUANT_MAX_RULES)
        return err_set(err, E_USAGE, "more than %d rules; join some with patterns, as in '*.mlp.*=int8wo'",
                       QUANT_MAX_RULES);
    QuantRule rule = {0};
    int rc = rule_parse(&rule, text, err);
    if (rc) return rc;
    p->rules[p->n_rules++] = rule;
    strcpy(p->name, "custom");
    return 0;
}

QuantScheme quant_plan_linear(const QuantPlan *p, const char *name) {
    for (int i = p->n_rules - 1; i >= 0; i--)
        if (fnmatch(p->rules[i].pattern, name, 0) == 0) return p->rules[i].scheme;
    return p->linear;
}

static bool scheme_equal(const QuantScheme *a, const QuantScheme *b) {
    return quant_spec_equal(&a->weight, &b->weight) && quant_spec_equal(&a->act, &b->act);
}

bool quant_plan_is_none(const QuantPlan *p) {
    static const QuantScheme none;
    bool all = scheme_equal(&p->linear, &none) && !p->embedding.bits && !p->tied_head.bits;
    for (int i = 0; i < p->n_rules; i++) all = all && scheme_equal(&p->rules[i].scheme, &none);
    return all;
}

bool quant_plan_equal(const QuantPlan *a, const QuantPlan *b) {
    bool same = scheme_equal(&a->linear, &b->linear) && quant_spec_equal(&a->embedding, &b->embedding) &&
                quant_spec_equal(&a->tied_head, &b->tied_head) && a->n_rules == b->n_rules;
    for (int i = 0; same && i < a->n_rules; i++)
        same =
            !strcmp(a->rules[i].pattern, b->rules[i].pattern) && scheme_equal(&a->rules[i].scheme, &b->rules[i].scheme);
    return same;
}

// ---------------------------------------------------------------------------------------------
// JSON: {"name": "8da4w-32", "linear": {"weight": SPEC, "activation": SPEC}, "embedding": SPEC, "tied_head": SPEC,
// "rules": [{"pattern": P, "weight": SPEC, "activation": SPEC}, ...]} with specs in their canonical text.

static void json_no_memory(void) {
    Err e;
    err_set(&e, E_NOMEM, "no memory for the quantization plan's JSON");
    die(&e);
}

static void json_add_text(cJSON *obj, const char *key, const char *text) {
    if (!cJSON_AddStringToObject(obj, key, text)) json_no_memory();
}

static void json_add_spec(cJSON *obj, const char *key, const QuantSpec *s) {
    char text[QUANT_SPEC_TEXT];
    quant_spec_text(text, sizeof text, s);
    json_add_text(obj, key, text);
}

char *quant_plan_to_json(const QuantPlan *p) {
    cJSON *root = cJSON_CreateObject();
    json_add_text(root, "name", p->name);
    cJSON *linear = cJSON_AddObjectToObject(root, "linear");
    json_add_spec(linear, "weight", &p->linear.weight);
    json_add_spec(linear, "activation", &p->linear.act);
    json_add_spec(root, "embedding", &p->embedding);
    json_add_spec(root, "tied_head", &p->tied_head);
    cJSON *rules = cJSON_AddArrayToObject(root, "rules");
    for (int i = 0; i < p->n_rules; i++) {
        cJSON *rule = cJSON_CreateObject();
        json_add_text(rule, "pattern", p->rules[i].pattern);
        json_add_spec(rule, "weight", &p->rules[i].scheme.weight);
        json_add_spec(rule, "activation", &p->rules[i].scheme.act);
        cJSON_AddItemToArray(rules, rule);
    }
    char *text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    if (!text) json_no_memory();
    char *copy = xstrdup(text);      // cJSON's own allocator need not be malloc
    cJSON_free(text);
    return copy;
}

// A spec field: a missing one means none.
static int json_spec(const cJSON *obj, const char *key, bool is_activation, QuantSpec *out, Err *err) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(obj, key);
    if (!item) return 0;
    if (!cJSON_IsString(item)) return err_set(err, E_FORMAT, "quantization plan: \"%s\" is not a text", key);
    Err inner = {0};
    if (quant_spec_parse(out, item->valuestring, is_activation, &inner))
        return err_set(err, E_FORMAT, "quantization plan: \"%s\": %.800s", key, inner.text);
    return 0;
}

static int json_scheme(const cJSON *obj, QuantScheme *out, Err *err) {
    int rc = json_spec(obj, "weight", false, &out->weight, err);
    return rc ? rc : json_spec(obj, "activation", true, &out->act, err);
}

// Every key of obj is one of the NULL-terminated list: what a newer version may have added is not silently lost.
static int json_only_keys(const cJSON *obj, const char *const *keys, Err *err) {
    if (!cJSON_IsObject(obj))
        return err_set(err, E_FORMAT, "quantization plan: expected a JSON object with \"%s\"", keys[0]);
    for (const cJSON *item = obj->child; item; item = item->next) {
        int i = 0;
        while (keys[i] && strcmp(keys[i], item->string)) i++;
        if (!keys[i])
            return err_set(err, E_FORMAT, "quantization plan: unknown field \"%.60s\"; written by a newer version?",
                           item->string);
        for (const cJSON *other = item->next; other; other = other->next)
            if (!strcmp(other->string, item->string))
                return err_set(err, E_FORMAT, "quantization plan: field \"%.60s\" appears twice", item->string);
    }
    return 0;
}

static bool name_is_safe(const char *name) {
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    return *name && *name != '.' && *name != '-' && !name[strspn(name, allowed)];
}

static int plan_from_object(QuantPlan *p, const cJSON *root, Err *err) {
    static const char *const keys[] = {"name", "linear", "embedding", "tied_head", "rules", NULL};
    static const char *const linear_keys[] = {"weight", "activation", NULL};
    static const char *const rule_keys[] = {"pattern", "weight", "activation", NULL};
    int rc = json_only_keys(root, keys, err);
    if (rc) return rc;
    const char *name = json_string(root, "name");
    if (!name || strlen(name) >= sizeof p->name || !name_is_safe(name))
        return err_set(err, E_FORMAT,
                       "quantization plan: \"name\" is \"%.80s\"; expected 1 to %zu letters, digits, '.', '_' or "
                       "'-', as in 8da4w-32",
                       name ? name : "", sizeof p->name - 1);
    strcpy(p->name, name);
    const cJSON *linear = cJSON_GetObjectItemCaseSensitive(root, "linear");
    if (linear && ((rc = json_only_keys(linear, linear_keys, err)) || (rc = json_scheme(linear, &p->linear, err))))
        return rc;
    if ((rc = json_spec(root, "embedding", false, &p->embedding, err))) return rc;
    if ((rc = json_spec(root, "tied_head", false, &p->tied_head, err))) return rc;

    const cJSON *rules = cJSON_GetObjectItemCaseSensitive(root, "rules"), *item;
    if (rules && !cJSON_IsArray(rules)) return err_set(err, E_FORMAT, "quantization plan: \"rules\" is not an array");
    cJSON_ArrayForEach(item, rules) {
        if (p->n_rules == QUANT_MAX_RULES)
            return err_set(err, E_FORMAT, "quantization plan: more than %d rules", QUANT_MAX_RULES);
        QuantRule *rule = &p->rules[p->n_rules];
        if ((rc = json_only_keys(item, rule_keys, err))) return rc;
        const char *pattern = json_string(item, "pattern");
        if (!pattern || !*pattern || strlen(pattern) >= sizeof rule->pattern || !pattern_is_printable(pattern))
            return err_set(err, E_FORMAT, "quantization plan: rule %d has no pattern of 1 to %zu printable characters",
                           p->n_rules, sizeof rule->pattern - 1);
        strcpy(rule->pattern, pattern);
        if ((rc = json_scheme(item, &rule->scheme, err))) return rc;
        p->n_rules++;
    }
    return 0;
}

int quant_plan_from_json(QuantPlan *p, const char *text, size_t len, Err *err) {
    quant_plan_none(p);
    cJSON *root = json_parse(text, len, "quantization plan", err);
    if (!root) return err ? err->code : E_FORMAT;
    int rc = plan_from_object(p, root, err);
    cJSON_Delete(root);
    if (rc) quant_plan_none(p);
    return rc;
}
