// GGUF files (versions 2 and 3) of architecture llama: metadata, tensors, and their block formats dequantized to f32.
// Everything in the file is checked before use: counts, string lengths, nesting, alignment, offsets, shapes times
// block sizes.
#ifndef QLLM_GGUF_H
#define QLLM_GGUF_H
#include "common.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef enum { GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY,
               GGUF_U64, GGUF_I64, GGUF_F64 } GgufType;

// Types of tensors that are read; F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are written, too (gguf_write.h).
enum { GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q4_1 = 3, GGML_Q5_0 = 6, GGML_Q5_1 = 7, GGML_Q8_0 = 8,
       GGML_Q4_K = 12, GGML_Q5_K = 13, GGML_Q6_K = 14, GGML_BF16 = 30 };

typedef struct {
    const char *key; size_t key_len;                 // into the map, not NUL-terminated
    GgufType type;                                   // GGUF_ARRAY: elem and count
    GgufType elem; uint64_t count;
    const uint8_t *data; size_t bytes;               // little-endian payload; strings: u64 length, bytes
} GgufValue;

typedef struct {
    char name[128];
    uint32_t type;                                   // ggml type number
    int ndim; int64_t ne[4];                         // ne[0] is the row length, as the file has it
    const uint8_t *data; size_t bytes;
} GgufTensor;

typedef struct {
    FileMap map; char path[1024];
    GgufValue *values; int n_values;
    GgufTensor *tensors; int n_tensors;
    // An index of the strings of each array is built on demand by gguf_string_at.
    struct { const GgufValue *v; uint64_t *offset; } cache[8]; int n_cache;
} Gguf;

int gguf_open(Gguf *g, const char *path, Err *err);
int gguf_parse(Gguf *g, const uint8_t *data, size_t size, const char *what, Err *err);
void gguf_close(Gguf *g);
const GgufValue *gguf_value(const Gguf *g, const char *key);
// Of any integer or number type. A missing value is E_MISSING if required, else *out keeps what it is.
int gguf_get_int(const Gguf *g, const char *key, bool required, int64_t lo, int64_t hi, int64_t *out, Err *err);
int gguf_get_double(const Gguf *g, const char *key, bool required, double *out, Err *err);
const char *gguf_get_string(const Gguf *g, const char *key, size_t *len);      // NULL if absent
// Element i of an array of strings, numbers.
const char *gguf_string_at(Gguf *g, const GgufValue *v, uint64_t i, size_t *len);
int64_t gguf_int_at(const GgufValue *v, uint64_t i);
double gguf_double_at(const GgufValue *v, uint64_t i);
const GgufTensor *gguf_tensor(const Gguf *g, const char *name);

// F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K; others are E_DTYPE naming the type.
const char *gguf_type_name(uint32_t type);
// Row r (ne[0] values) of a tensor, to f32 exactly as ggml's reference dequantizes it.
int gguf_row(float *dst, const GgufTensor *t, int64_t row, Err *err);

#ifdef __cplusplus
}
#endif
#endif
