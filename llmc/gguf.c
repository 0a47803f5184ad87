// GGUF: see gguf.h for what is checked. Layout of a file (little-endian throughout):
//
//   "GGUF" | u32 version | u64 tensors | u64 values | values | tensor infos | padding | data
//   value:       string key | u32 type | payload          string: u64 length | bytes, no NUL
//   array:       u32 element type | u64 count | elements
//   tensor info: string name | u32 ndim | u64 ne[ndim] | u32 type | u64 offset from the start of the data
//
// Source: ggml's docs/gguf.md and, for the block formats, the reference dequantization of ggml-quants.c.
#include "gguf.h"
#include <stdlib.h>
#include <string.h>

// ---------------------------------------------------------------------------------------------
// Tensor types

// A block of `values` values takes `bytes` bytes; bytes == 0: known by name, not read.
static const struct { const char *name; int values, bytes; } types[] = {
    [GGML_F32] = {"F32", 1, 4}, [GGML_F16] = {"F16", 1, 2}, [GGML_BF16] = {"BF16", 1, 2},
    [GGML_Q4_0] = {"Q4_0", 32, 18}, [GGML_Q4_1] = {"Q4_1", 32, 20}, [GGML_Q5_0] = {"Q5_0", 32, 22},
    [GGML_Q5_1] = {"Q5_1", 32, 24},
    [GGML_Q8_0] = {"Q8_0", 32, 34}, [GGML_Q4_K] = {"Q4_K", 256, 144}, [GGML_Q5_K] = {"Q5_K", 256, 176},
    [GGML_Q6_K] = {"Q6_K", 256, 210},
    [9] = {"Q8_1", 0, 0}, [10] = {"Q2_K", 0, 0}, [11] = {"Q3_K", 0, 0}, [15] = {"Q8_K", 0, 0}, [16] = {"IQ2_XXS", 0, 0},
    [17] = {"IQ2_XS", 0, 0}, [18] = {"IQ3_XXS", 0, 0}, [19] = {"IQ1_S", 0, 0}, [20] = {"IQ4_NL", 0, 0},
    [21] = {"IQ3_S", 0, 0}, [22] = {"IQ2_S", 0, 0}, [23] = {"IQ4_XS", 0, 0}, [24] = {"I8", 0, 0}, [25] = {"I16", 0, 0},
    [26] = {"I32", 0, 0}, [27] = {"I64", 0, 0}, [28] = {"F64", 0, 0}, [29] = {"IQ1_M", 0, 0}, [34] = {"TQ1_0", 0, 0},
    [35] = {"TQ2_0", 0, 0}, [39] = {"MXFP4", 0, 0},
};
#define N_TYPES (sizeof types / sizeof *types)
#define READABLE "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K"

const char *gguf_type_name(uint32_t type) { return type < N_TYPES && types[type].name ? types[type].name : "unknown"; }

// ---------------------------------------------------------------------------------------------
// A cursor over untrusted bytes. Reading past the end sets `bad` and gives zeros.

typedef struct { const uint8_t *p; size_t left; bool bad; } Cursor;

static const uint8_t *take(Cursor *c, uint64_t bytes) {
    if (c->bad || bytes > c->left) {
        c->bad = true;
        return NULL;
    }
    const uint8_t *at = c->p;
    c->p += bytes;
    c->left -= (size_t)bytes;
    return at;
}

static uint64_t load_le(const uint8_t *p, int bytes) {
    uint64_t v = 0;
    for (int i = bytes - 1; i >= 0; i--) v = v << 8 | p[i];
    return v;
}

static uint64_t take_int(Cursor *c, int bytes) {
    const uint8_t *p = take(c, (uint64_t)bytes);
    return p ? load_le(p, bytes) : 0;
}

static const char *take_string(Cursor *c, size_t *len) {
    uint64_t n = take_int(c, 8);
    const uint8_t *p = take(c, n);
    *len = p ? (size_t)n : 0;
    return (const char *)p;
}

static const int value_size[] = {
    [GGUF_U8] = 1, [GGUF_I8] = 1, [GGUF_U16] = 2, [GGUF_I16] = 2, [GGUF_U32] = 4, [GGUF_I32] = 4, [GGUF_F32] = 4,
    [GGUF_BOOL] = 1, [GGUF_STRING] = 0, [GGUF_ARRAY] = 0, [GGUF_U64] = 8, [GGUF_I64] = 8, [GGUF_F64] = 8,
};

// ---------------------------------------------------------------------------------------------
// Parsing

// Names end up in messages and in terminals.
static bool plain(const char *s, size_t len) {
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f) return false;
    return len > 0;
}

static int parse_value(Gguf *g, Cursor *c, int index, Err *err) {
    GgufValue *v = &g->values[g->n_values];
    v->key = take_string(c, &v->key_len);
    if (c->bad) return err_set(err, E_FORMAT, "%s: truncated or corrupt at the key of metadata value %d", g->path,
                               index);
    if (v->key_len > 65535 || !plain(v->key, v->key_len))
        return err_set(err, E_FORMAT, "%s: the key of metadata value %d is empty, too long or has control characters",
                       g->path, index);
    int shown = v->key_len > 100 ? 100 : (int)v->key_len;
    uint64_t type = take_int(c, 4), elem = type, count = 1;
    if (type == GGUF_ARRAY) {
        elem = take_int(c, 4);
        count = take_int(c, 8);
        if (elem == GGUF_ARRAY)
            return err_set(err, E_FORMAT, "%s: '%.*s' is an array of arrays; no Llama has one", g->path, shown, v->key);
    }
    if (type > GGUF_F64 || elem > GGUF_F64)
        return err_set(err, E_FORMAT, "%s: '%.*s' has the unknown value type %llu", g->path, shown, v->key,
                       (unsigned long long)(type > GGUF_F64 ? type : elem));
    v->type = (GgufType)type;
    v->elem = (GgufType)elem;
    v->count = count;
    v->data = c->p;
    size_t left = c->left;
    if (elem == GGUF_STRING) {
        size_t len;
        for (uint64_t i = 0; i < count && !c->bad; i++) take_string(c, &len);   // each takes 8 bytes or more
    } else if (count > c->left / (size_t)value_size[elem]) {
        c->bad = true;
    } else {
        take(c, count * (uint64_t)value_size[elem]);
    }
    if (c->bad) return err_set(err, E_FORMAT, "%s: truncated or corrupt at '%.*s'", g->path, shown, v->key);
    v->bytes = left - c->left;
    g->n_values++;
    return 0;
}

// data and bytes are filled in later, when the start of the data is known; until then data_offset stands in `offsets`.
static int parse_tensor(Gguf *g, Cursor *c, int index, uint64_t *offset, Err *err) {
    GgufTensor *t = &g->tensors[g->n_tensors];
    size_t len;
    const char *name = take_string(c, &len);
    if (c->bad) return err_set(err, E_FORMAT, "%s: truncated or corrupt at the name of tensor %d", g->path, index);
    if (len >= sizeof t->name || !plain(name, len))
        return err_set(err, E_FORMAT, "%s: the name of tensor %d is empty, longer than %zu bytes or has control "
                       "characters", g->path, index, sizeof t->name - 1);
    memcpy(t->name, name, len);
    uint64_t ndim = take_int(c, 4);
    if (ndim < 1 || ndim > 4)
        return err_set(err, E_FORMAT, "%s: tensor '%s' has %llu dimensions; 1 to 4 are possible", g->path, t->name,
                       (unsigned long long)ndim);
    t->ndim = (int)ndim;
    size_t values = 1;
    for (int i = 0; i < 4; i++) {
        uint64_t ne = i < t->ndim ? take_int(c, 8) : 1;
        if (c->bad) return err_set(err, E_FORMAT, "%s: truncated at the shape of tensor '%s'", g->path, t->name);
        if (ne < 1 || ne > INT64_MAX || !mul_size(values, (size_t)ne, &values))
            return err_set(err, E_FORMAT, "%s: tensor '%s': dimension %d is %llu: zero or the product overflows",
                           g->path, t->name, i, (unsigned long long)ne);
        t->ne[i] = (int64_t)ne;
    }
    t->type = (uint32_t)take_int(c, 4);
    *offset = take_int(c, 8);
    if (c->bad) return err_set(err, E_FORMAT, "%s: truncated at tensor '%s'", g->path, t->name);
    if (t->type >= N_TYPES || !types[t->type].bytes)
        return err_set(err, E_DTYPE, "%s: tensor '%s' is stored as %s (type %u), which is not read; convert the "
                       "model to one of " READABLE, g->path, t->name, gguf_type_name(t->type), t->type);
    int per_block = types[t->type].values;
    if (t->ne[0] % per_block)
        return err_set(err, E_FORMAT, "%s: tensor '%s': rows of %lld values are no whole number of %s blocks of %d",
                       g->path, t->name, (long long)t->ne[0], types[t->type].name, per_block);
    if (!mul_size(values / (size_t)per_block, (size_t)types[t->type].bytes, &t->bytes))
        return err_set(err, E_FORMAT, "%s: tensor '%s': its size overflows", g->path, t->name);
    g->n_tensors++;
    return 0;
}

static int value_by_key(const void *a, const void *b) {
    const GgufValue *x = a, *y = b;
    int c = memcmp(x->key, y->key, x->key_len < y->key_len ? x->key_len : y->key_len);
    return c ? c : (x->key_len > y->key_len) - (x->key_len < y->key_len);
}

static int tensor_by_name(const void *a, const void *b) {
    return strcmp(((const GgufTensor *)a)->name, ((const GgufTensor *)b)->name);
}

static int tensor_by_place(const void *a, const void *b) {
    const uint8_t *x = ((const GgufTensor *)a)->data, *y = ((const GgufTensor *)b)->data;
    return (x > y) - (x < y);
}

static int parse(Gguf *g, const uint8_t *data, size_t size, Err *err) {
    Cursor c = {data, size, false};
    const uint8_t *magic = take(&c, 4);
    if (!magic || memcmp(magic, "GGUF", 4)) return err_set(err, E_FORMAT, "%s: not a GGUF file", g->path);
    uint64_t version = take_int(&c, 4), n_tensors = take_int(&c, 8), n_values = take_int(&c, 8);
    if (version != 2 && version != 3)
        return err_set(err, E_FORMAT, "%s: GGUF version %llu%s; versions 2 and 3, little-endian, are read", g->path,
                       (unsigned long long)version, version & 0xffff ? "" : " (a big-endian file?)");
    if (c.bad) return err_set(err, E_FORMAT, "%s: truncated: no room for the header", g->path);
    // The least a value (key of one byte, type, payload of one) and a tensor info can take bounds both counts.
    if (n_values > c.left / 14 || n_tensors > c.left / 33 || n_values > INT32_MAX || n_tensors > INT32_MAX)
        return err_set(err, E_FORMAT, "%s: %llu metadata values and %llu tensors cannot stand in %zu bytes: corrupt "
                       "or truncated", g->path, (unsigned long long)n_values, (unsigned long long)n_tensors, size);
    g->values = xcalloc((size_t)n_values + 1, sizeof *g->values);
    for (int i = 0; i < (int)n_values; i++) {
        int rc = parse_value(g, &c, i, err);
        if (rc) return rc;
    }
    qsort(g->values, (size_t)g->n_values, sizeof *g->values, value_by_key);
    for (int i = 1; i < g->n_values; i++)
        if (value_by_key(&g->values[i - 1], &g->values[i]) == 0)
            return err_set(err, E_FORMAT, "%s: metadata key '%.*s' appears twice", g->path,
                           g->values[i].key_len > 100 ? 100 : (int)g->values[i].key_len, g->values[i].key);
    int64_t alignment = 32;
    int rc = gguf_get_int(g, "general.alignment", false, 1, 1 << 24, &alignment, err);
    if (rc) return rc;
    if (alignment & (alignment - 1))
        return err_set(err, E_FORMAT, "%s: general.alignment %lld is not a power of two", g->path,
                       (long long)alignment);

    g->tensors = xcalloc((size_t)n_tensors + 1, sizeof *g->tensors);
    uint64_t *offset = xcalloc((size_t)n_tensors + 1, sizeof *offset);
    for (int i = 0; i < (int)n_tensors && rc == 0; i++) rc = parse_tensor(g, &c, i, &offset[i], err);
    size_t start = (size - c.left + (size_t)alignment - 1) & ~((size_t)alignment - 1);
    for (int i = 0; i < g->n_tensors && rc == 0; i++) {
        GgufTensor *t = &g->tensors[i];
        if (offset[i] % (uint64_t)alignment)
            rc = err_set(err, E_FORMAT, "%s: tensor '%s' begins at byte %llu, which is not a multiple of the "
                         "alignment %lld", g->path, t->name, (unsigned long long)offset[i], (long long)alignment);
        else if (start > size || offset[i] > size - start || t->bytes > size - start - offset[i])
            rc = err_set(err, E_FORMAT, "%s: tensor '%s' (%zu bytes at %llu of the data) goes beyond the end of the "
                         "file (%zu bytes): truncated or corrupt", g->path, t->name, t->bytes,
                         (unsigned long long)offset[i], size);
        else
            t->data = data + start + offset[i];
    }
    free(offset);
    if (rc) return rc;
    qsort(g->tensors, (size_t)g->n_tensors, sizeof *g->tensors, tensor_by_place);
    for (int i = 1; i < g->n_tensors; i++)
        if (g->tensors[i - 1].data + g->tensors[i - 1].bytes > g->tensors[i].data)
            return err_set(err, E_FORMAT, "%s: tensors '%s' and '%s' overlap", g->path, g->tensors[i - 1].name,
                           g->tensors[i].name);
    qsort(g->tensors, (size_t)g->n_tensors, sizeof *g->tensors, tensor_by_name);
    for (int i = 1; i < g->n_tensors; i++)
        if (strcmp(g->tensors[i - 1].name, g->tensors[i].name) == 0)
            return err_set(err, E_FORMAT, "%s: tensor '%s' appears twice", g->path, g->tensors[i].name);
    return 0;
}

int gguf_parse(Gguf *g, const uint8_t *data, size_t size, const char *what, Err *err) {
    memset(g, 0, sizeof *g);
    snprintf(g->path, sizeof g->path, "%s", what);
    int rc = parse(g, data, size, err);
    if (rc) gguf_close(g);
    return rc;
}

int gguf_open(Gguf *g, const char *path, Err *err) {
    FileMap map;
    memset(g, 0, sizeof *g);
    int rc = file_map(&map, path, err);
    if (rc) return rc;
    rc = gguf_parse(g, map.data, map.size, path, err);
    if (rc) file_unmap(&map);
    else g->map = map;
    return rc;
}

void gguf_close(Gguf *g) {
    for (int i = 0; i < g->n_cache; i++) free(g->cache[i].offset);
    free(g->values);
    free(g->tensors);
    if (g->map.base) file_unmap(&g->map);
    memset(g, 0, sizeof *g);
}

// ---------------------------------------------------------------------------------------------
// Metadata

const GgufValue *gguf_value(const Gguf *g, const char *key) {
    GgufValue probe = {.key = key, .key_len = strlen(key)};
    return g->n_values ? bsearch(&probe, g->values, (size_t)g->n_values, sizeof *g->values, value_by_key) : NULL;
}

static bool is_integer(GgufType t) { return t != GGUF_F32 && t != GGUF_F64 && t != GGUF_STRING && t != GGUF_ARRAY; }

// One number at p. Unsigned 64-bit values beyond INT64_MAX saturate: no field of a model reaches there.
static int64_t load_int(const uint8_t *p, GgufType t) {
    uint64_t u = load_le(p, value_size[t]);
    switch (t) {
    case GGUF_I8: return (int8_t)u;
    case GGUF_I16: return (int16_t)u;
    case GGUF_I32: return (int32_t)u;
    case GGUF_I64: return (int64_t)u;
    default: return u > INT64_MAX ? INT64_MAX : (int64_t)u;
    }
}

static double load_double(const uint8_t *p, GgufType t) {
    if (t == GGUF_F32) return f32_from_bits((uint32_t)load_le(p, 4));
    if (t == GGUF_F64) {
        uint64_t u = load_le(p, 8);
        double d;
        memcpy(&d, &u, 8);
        return d;
    }
    return (double)load_int(p, t);
}

int gguf_get_int(const Gguf *g, const char *key, bool required, int64_t lo, int64_t hi, int64_t *out, Err *err) {
    const GgufValue *v = gguf_value(g, key);
    if (!v) return required ? err_set(err, E_MISSING, "%s: metadata value '%s' is missing", g->path, key) : 0;
    if (!is_integer(v->type)) return err_set(err, E_FORMAT, "%s: metadata value '%s' is not an integer", g->path, key);
    int64_t x = load_int(v->data, v->type);
    if (x < lo || x > hi)
        return err_set(err, E_FORMAT, "%s: %s is %lld; expected %lld to %lld", g->path, key, (long long)x,
                       (long long)lo, (long long)hi);
    *out = x;
    return 0;
}

int gguf_get_double(const Gguf *g, const char *key, bool required, double *out, Err *err) {
    const GgufValue *v = gguf_value(g, key);
    if (!v) return required ? err_set(err, E_MISSING, "%s: metadata value '%s' is missing", g->path, key) : 0;
    if (v->type == GGUF_STRING || v->type == GGUF_ARRAY)
        return err_set(err, E_FORMAT, "%s: metadata value '%s' is not a number", g->path, key);
    double x = load_double(v->data, v->type);
    if (!isfinite(x)) return err_set(err, E_FORMAT, "%s: %s is not finite", g->path, key);
    *out = x;
    return 0;
}

const char *gguf_get_string(const Gguf *g, const char *key, size_t *len) {
    const GgufValue *v = gguf_value(g, key);
    if (!v || v->type != GGUF_STRING) return NULL;
    *len = v->bytes - 8;
    return (const char *)v->data + 8;
}

const char *gguf_string_at(Gguf *g, const GgufValue *v, uint64_t i, size_t *len) {
    if (v->elem != GGUF_STRING || i >= v->count) return NULL;
    int slot = 0;
    while (slot < g->n_cache && g->cache[slot].v != v) slot++;
    if (slot == g->n_cache) {
        if (g->n_cache == (int)(sizeof g->cache / sizeof *g->cache)) free(g->cache[--slot].offset);   // reuse the last
        else g->n_cache++;
        uint64_t *offset = xmalloc((size_t)v->count * sizeof *offset), at = 0;
        for (uint64_t k = 0; k < v->count; k++) {
            offset[k] = at;
            at += 8 + load_le(v->data + at, 8);
        }
        g->cache[slot].v = v;
        g->cache[slot].offset = offset;
    }
    const uint8_t *p = v->data + g->cache[slot].offset[i];
    *len = (size_t)load_le(p, 8);
    return (const char *)p + 8;
}

int64_t gguf_int_at(const GgufValue *v, uint64_t i) {
    return i < v->count && is_integer(v->elem) ? load_int(v->data + i * (uint64_t)value_size[v->elem], v->elem) : 0;
}

double gguf_double_at(const GgufValue *v, uint64_t i) {
    if (i >= v->count || v->elem == GGUF_STRING || v->elem == GGUF_ARRAY) return 0;
    return load_double(v->data + i * (uint64_t)value_size[v->elem], v->elem);
}

// ---------------------------------------------------------------------------------------------
// Tensors. Below, q is one block of the file and y its values. Every product and sum is rounded to f32 once, in the
// order of ggml's reference; this file is compiled without contraction.

const GgufTensor *gguf_tensor(const Gguf *g, const char *name) {
    int lo = 0, hi = g->n_tensors;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2, c = strcmp(name, g->tensors[mid].name);
        if (c == 0) return &g->tensors[mid];
        if (c < 0) hi = mid;
        else lo = mid + 1;
    }
    return NULL;
}

static float half_at(const uint8_t *p) { return f16_to_f32((f16)(p[0] | p[1] << 8)); }

// d (f16) | 32 int8
static void block_q8_0(float *y, const uint8_t *q) {
    float d = half_at(q);
    for (int i = 0; i < 32; i++) y[i] = (float)(int8_t)q[2 + i] * d;
}

// d | 16 bytes: byte i holds value i in its low nibble, value i + 16 in its high one.
static void block_q4_0(float *y, const uint8_t *q) {
    float d = half_at(q);
    for (int i = 0; i < 16; i++) {
        y[i] = (float)((q[2 + i] & 15) - 8) * d;
        y[i + 16] = (float)((q[2 + i] >> 4) - 8) * d;
    }
}

// d | minimum | 16 bytes
static void block_q4_1(float *y, const uint8_t *q) {
    float d = half_at(q), m = half_at(q + 2);
    for (int i = 0; i < 16; i++) {
        y[i] = (float)(q[4 + i] & 15) * d + m;
        y[i + 16] = (float)(q[4 + i] >> 4) * d + m;
    }
}

// d | u32: fifth bit of value i at bit i | 16 bytes
static void block_q5_0(float *y, const uint8_t *q) {
    float d = half_at(q);
    uint32_t high = (uint32_t)load_le(q + 2, 4);
    for (int i = 0; i < 16; i++) {
        int a = (q[6 + i] & 15) | (int)(high >> i & 1) << 4, b = q[6 + i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
        y[i] = (float)(a - 16) * d;
        y[i + 16] = (float)(b - 16) * d;
    }
}

// d | minimum | u32 | 16 bytes
static void block_q5_1(float *y, const uint8_t *q) {
    float d = half_at(q), m = half_at(q + 2);
    uint32_t high = (uint32_t)load_le(q + 4, 4);
    for (int i = 0; i < 16; i++) {
        int a = (q[8 + i] & 15) | (int)(high >> i & 1) << 4, b = q[8 + i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
        y[i] = (float)a * d + m;
        y[i + 16] = (float)b * d + m;
    }
}

// Eight 6-bit scales and eight 6-bit minima in 12 bytes: bytes 0..3 hold scales 0..3 and bytes 4..7 minima 0..3 in
// their low six bits; the low nibbles of bytes 8..11 are the low four bits of scales 4..7, the high nibbles those of
// minima 4..7, whose upper two bits are the top bits of bytes 0..3 and 4..7.
static void scale_min(const uint8_t *s, int j, int *scale, int *min) {
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        *min = s[j + 4] >> 4 | (s[j] >> 6) << 4;
    }
}

// d | dmin | 12 bytes of scales | (Q5_K: 32 bytes, fifth bits: bit j of byte i for value 32 j + i) | 128 bytes of
// nibbles: byte 32 k + i holds value 64 k + i low, value 64 k + 32 + i high.
static void block_q45_k(float *y, const uint8_t *q, bool five) {
    float d = half_at(q), dmin = half_at(q + 2);
    const uint8_t *high = q + 16, *nibbles = q + 16 + (five ? 32 : 0);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        scale_min(q + 4, j, &scale, &min);
        float ds = d * (float)scale, dm = dmin * (float)min;
        for (int i = 0; i < 32; i++) {
            int code = nibbles[32 * (j / 2) + i] >> (4 * (j % 2)) & 15;
            if (five) code |= (high[i] >> j & 1) << 4;
            y[32 * j + i] = ds * (float)code - dm;
        }
    }
}

// 128 bytes of low nibbles | 64 bytes of upper bit pairs | 16 int8 scales | d. Two halves of 128 values, each four
// runs of 32: run r of half h takes its nibbles from bytes 64 h + 32 (r % 2) + i (low for r < 2, else high), its
// pairs from bits 2 r of byte 32 h + i, its scale from 8 h + 2 r + i / 16.
static void block_q6_k(float *y, const uint8_t *q) {
    const uint8_t *low = q, *pairs = q + 128, *scales = q + 192;
    float d = half_at(q + 208);
    for (int h = 0; h < 2; h++)
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < 32; i++) {
                int nibble = low[64 * h + 32 * (r % 2) + i] >> (r < 2 ? 0 : 4) & 15;
                int code = (nibble | (pairs[32 * h + i] >> (2 * r) & 3) << 4) - 32;
                y[128 * h + 32 * r + i] = d * (float)(int8_t)scales[8 * h + 2 * r + i / 16] * (float)code;
            }
}

int gguf_row(float *dst, const GgufTensor *t, int64_t row, Err *err) {
    int64_t rows = t->ne[1] * t->ne[2] * t->ne[3];
    if (row < 0 || row >= rows)
        return err_set(err, E_SHAPE, "tensor '%s' has %lld rows, row %lld is asked for", t->name, (long long)rows,
                       (long long)row);
    if (t->type >= N_TYPES || !types[t->type].bytes)
        return err_set(err, E_DTYPE, "tensor '%s' is stored as %s; only " READABLE " are read", t->name,
                       gguf_type_name(t->type));
    int values = types[t->type].values, bytes = types[t->type].bytes;
    int64_t blocks = t->ne[0] / values;
    const uint8_t *q = t->data + (size_t)row * (size_t)blocks * (size_t)bytes;
    switch (t->type) {
    case GGML_F32: return convert_to_f32(dst, q, DT_F32, (size_t)t->ne[0]);
    case GGML_F16: return convert_to_f32(dst, q, DT_F16, (size_t)t->ne[0]);
    case GGML_BF16: return convert_to_f32(dst, q, DT_BF16, (size_t)t->ne[0]);
    default: break;
    }
    for (int64_t b = 0; b < blocks; b++, q += bytes, dst += values)
        switch (t->type) {
        case GGML_Q8_0: block_q8_0(dst, q); break;
        case GGML_Q4_0: block_q4_0(dst, q); break;
        case GGML_Q4_1: block_q4_1(dst, q); break;
        case GGML_Q5_0: block_q5_0(dst, q); break;
        case GGML_Q5_1: block_q5_1(dst, q); break;
        case GGML_Q4_K: block_q45_k(dst, q, false); break;
        case GGML_Q5_K: block_q45_k(dst, q, true); break;
        default: block_q6_k(dst, q); break;
        }
    return 0;
}
