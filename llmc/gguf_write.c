// GGUF out: see gguf_write.h, and gguf.c for the layout.
#include "gguf_write.h"
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 32u

typedef struct { uint8_t *p; size_t n, room; } Bytes;

struct GgufWriter {
    Bytes values, infos;                 // metadata, tensor infos: as they stand in the file
    uint64_t n_values, n_tensors;
    size_t *bytes;                       // of each tensor, n_tensors of room
    size_t room;
    uint64_t offset;                     // of the next tensor from the start of the data
    AtomicFile file;
    size_t tensor, given;                // the tensor that is being written, and how much of it came
    bool too_much;
};

static void put(Bytes *b, const void *data, size_t n) {
    if (b->room - b->n < n) {
        size_t room = 2 * (b->n + n) + 4096;
        uint8_t *grown = xmalloc(room);
        if (b->n) memcpy(grown, b->p, b->n);
        free(b->p);
        b->p = grown;
        b->room = room;
    }
    if (n) memcpy(b->p + b->n, data, n);
    b->n += n;
}

static void put_int(Bytes *b, uint64_t v, int bytes) {
    uint8_t le[8];
    for (int i = 0; i < bytes; i++) le[i] = (uint8_t)(v >> (8 * i));
    put(b, le, (size_t)bytes);
}

static void put_text(Bytes *b, const char *s, size_t len) {
    put_int(b, len, 8);
    put(b, s, len);
}

// ---------------------------------------------------------------------------------------------
// Metadata

GgufWriter *gguf_writer_new(void) { return xcalloc(1, sizeof(GgufWriter)); }

static void put_key(GgufWriter *w, const char *key, GgufType type) {
    put_text(&w->values, key, strlen(key));
    put_int(&w->values, type, 4);
    w->n_values++;
}

void gguf_put_u32(GgufWriter *w, const char *key, uint32_t v) {
    put_key(w, key, GGUF_U32);
    put_int(&w->values, v, 4);
}

void gguf_put_f32(GgufWriter *w, const char *key, float v) {
    put_key(w, key, GGUF_F32);
    put_int(&w->values, f32_bits(v), 4);
}

void gguf_put_bool(GgufWriter *w, const char *key, bool v) {
    put_key(w, key, GGUF_BOOL);
    put_int(&w->values, v, 1);
}

void gguf_put_text(GgufWriter *w, const char *key, const char *s) { gguf_put_string(w, key, s, strlen(s)); }

void gguf_put_string(GgufWriter *w, const char *key, const char *s, size_t len) {
    put_key(w, key, GGUF_STRING);
    put_text(&w->values, s, len);
}

void gguf_put_array(GgufWriter *w, const char *key, GgufType elem, uint64_t count) {
    put_key(w, key, GGUF_ARRAY);
    put_int(&w->values, elem, 4);
    put_int(&w->values, count, 8);
}

void gguf_elem_string(GgufWriter *w, const char *s, size_t len) { put_text(&w->values, s, len); }
void gguf_elem_i32(GgufWriter *w, int32_t v) { put_int(&w->values, (uint32_t)v, 4); }
void gguf_elem_f32(GgufWriter *w, float v) { put_int(&w->values, f32_bits(v), 4); }

// ---------------------------------------------------------------------------------------------
// Tensors

size_t gguf_row_bytes(uint32_t type, int64_t cols) {
    int values = 1, bytes = 0;
    switch (type) {
    case GGML_F32: bytes = 4; break;
    case GGML_F16: case GGML_BF16: bytes = 2; break;
    case GGML_Q8_0: values = 32, bytes = 34; break;
    case GGML_Q4_0: values = 32, bytes = 18; break;
    case GGML_Q4_1: values = 32, bytes = 20; break;
    default: return 0;
    }
    return cols % values ? 0 : (size_t)(cols / values) * (size_t)bytes;
}

void gguf_writer_tensor(GgufWriter *w, const char *name, uint32_t type, int64_t rows, int64_t cols, bool vector) {
    if (w->n_tensors == w->room) {
        size_t *grown = xcalloc(w->room = w->room ? 2 * w->room : 256, sizeof *grown);
        if (w->n_tensors) memcpy(grown, w->bytes, (size_t)w->n_tensors * sizeof *grown);
        free(w->bytes);
        w->bytes = grown;
    }
    size_t bytes = w->bytes[w->n_tensors++] = (size_t)rows * gguf_row_bytes(type, cols);
    put_text(&w->infos, name, strlen(name));
    put_int(&w->infos, vector ? 1 : 2, 4);
    put_int(&w->infos, (uint64_t)cols, 8);
    if (!vector) put_int(&w->infos, (uint64_t)rows, 8);
    put_int(&w->infos, type, 4);
    put_int(&w->infos, w->offset, 8);
    w->offset += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static void pad(GgufWriter *w, size_t written) {
    static const uint8_t zeros[ALIGNMENT];
    atomic_write(&w->file, zeros, (ALIGNMENT - written % ALIGNMENT) % ALIGNMENT);
}

int gguf_writer_begin(GgufWriter *w, const char *path, Err *err) {
    gguf_put_u32(w, "general.alignment", ALIGNMENT);
    int rc = atomic_open(&w->file, path, err);
    if (rc) return rc;
    Bytes head = {0};
    put(&head, "GGUF", 4);
    put_int(&head, 3, 4);
    put_int(&head, w->n_tensors, 8);
    put_int(&head, w->n_values, 8);
    atomic_write(&w->file, head.p, head.n);
    atomic_write(&w->file, w->values.p, w->values.n);
    atomic_write(&w->file, w->infos.p, w->infos.n);
    pad(w, head.n + w->values.n + w->infos.n);
    free(head.p);
    return 0;
}

void gguf_writer_data(GgufWriter *w, const void *data, size_t bytes) {
    const uint8_t *p = data;
    while (bytes) {
        if (w->tensor == w->n_tensors) {
            w->too_much = true;
            return;
        }
        size_t left = w->bytes[w->tensor] - w->given, n = bytes < left ? bytes : left;
        atomic_write(&w->file, p, n);
        p += n;
        bytes -= n;
        w->given += n;
        if (w->given == w->bytes[w->tensor]) {
            pad(w, w->given);
            w->given = 0;
            w->tensor++;
        }
    }
}

static void release(GgufWriter *w) {
    free(w->values.p);
    free(w->infos.p);
    free(w->bytes);
    free(w);
}

int gguf_writer_finish(GgufWriter *w, Err *err) {
    int rc = 0;
    if (w->tensor != w->n_tensors || w->too_much) {
        rc = err_set(err, E_FAIL, "%s: the data of %zu tensors of %llu were given%s; nothing was written", w->file.path,
                     w->tensor, (unsigned long long)w->n_tensors, w->too_much ? ", and more" : "");
        atomic_abort(&w->file);
    } else {
        rc = atomic_commit(&w->file, err);
    }
    release(w);
    return rc;
}

void gguf_writer_abort(GgufWriter *w) {
    if (w->file.f) atomic_abort(&w->file);
    release(w);
}

// ---------------------------------------------------------------------------------------------
// Blocks

static void put_half(uint8_t *dst, f16 h) {
    dst[0] = (uint8_t)h;
    dst[1] = (uint8_t)(h >> 8);
}

void gguf_block_q8_0(uint8_t *dst, const int16_t *codes, f16 d) {
    put_half(dst, d);
    for (int i = 0; i < 32; i++) dst[2 + i] = (uint8_t)codes[i];
}

void gguf_block_q4_0(uint8_t *dst, const int16_t *codes, f16 d) {
    put_half(dst, d);
    for (int i = 0; i < 16; i++) dst[2 + i] = (uint8_t)((codes[i] + 8) | (codes[i + 16] + 8) << 4);
}

void gguf_block_q4_1(uint8_t *dst, const int16_t *codes, f16 d, f16 m) {
    put_half(dst, d);
    put_half(dst + 2, m);
    for (int i = 0; i < 16; i++) dst[4 + i] = (uint8_t)(codes[i] | codes[i + 16] << 4);
}
