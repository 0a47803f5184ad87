// GGUF files out (version 3): what gguf.h reads. Metadata and tensors are declared first, then the data come in the
// order of the declarations, in pieces of any size. The file appears whole or not at all.
#ifndef QLLM_GGUF_WRITE_H
#define QLLM_GGUF_WRITE_H
#include "gguf.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct GgufWriter GgufWriter;

GgufWriter *gguf_writer_new(void);
void gguf_put_u32(GgufWriter *w, const char *key, uint32_t v);
void gguf_put_f32(GgufWriter *w, const char *key, float v);
void gguf_put_bool(GgufWriter *w, const char *key, bool v);
void gguf_put_text(GgufWriter *w, const char *key, const char *s);
void gguf_put_string(GgufWriter *w, const char *key, const char *s, size_t len);
// An array: its head, and then exactly `count` elements of the kind announced (GGUF_STRING, GGUF_I32 or GGUF_F32).
void gguf_put_array(GgufWriter *w, const char *key, GgufType elem, uint64_t count);
void gguf_elem_string(GgufWriter *w, const char *s, size_t len);
void gguf_elem_i32(GgufWriter *w, int32_t v);
void gguf_elem_f32(GgufWriter *w, float v);

// A tensor of `rows` rows of `cols` values (ne = {cols, rows}; a vector if rows is 1 and `vector`). cols must be a
// whole number of the type's blocks.
void gguf_writer_tensor(GgufWriter *w, const char *name, uint32_t type, int64_t rows, int64_t cols, bool vector);
int gguf_writer_begin(GgufWriter *w, const char *path, Err *err);
void gguf_writer_data(GgufWriter *w, const void *data, size_t bytes);   // padding between tensors is the writer's care
int gguf_writer_finish(GgufWriter *w, Err *err);   // E_FAIL if a write failed or the data do not add up; frees w
void gguf_writer_abort(GgufWriter *w);             // removes what was written; frees w

// Bytes of a row of `cols` values; 0 for a type that is not written, or a row that is no whole number of blocks.
size_t gguf_row_bytes(uint32_t type, int64_t cols);

// One block of 32 values, as gguf.c draws them. Codes of Q8_0 are -128..127 with values d * code, those of Q4_0 -8..7
// with values d * code, those of Q4_1 0..15 with values d * code + m.
void gguf_block_q8_0(uint8_t *dst, const int16_t *codes, f16 d);
void gguf_block_q4_0(uint8_t *dst, const int16_t *codes, f16 d);
void gguf_block_q4_1(uint8_t *dst, const int16_t *codes, f16 d, f16 m);

#ifdef __cplusplus
}
#endif
#endif
