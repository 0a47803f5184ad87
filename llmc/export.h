// Models in the files of other engines: GGUF (llama.cpp) and compressed-tensors folders (transformers, vLLM). Packed
// codes and scales go over as they are wherever the format can hold them; doc/formats.md says what becomes what.
#ifndef QLLM_EXPORT_H
#define QLLM_EXPORT_H
#include "checkpoint.h"

// What became of one tensor. Exact: the file holds the very numbers (code - zero) * scale, or the very floats. Else the
// largest difference from them, to be seen beside the tensor's largest value.
typedef struct {
    const char *name, *form;             // Hugging Face name; "Q4_0", "BF16", "int4 packed", ...
    int64_t rows, cols;
    size_t bytes;
    bool exact;
    double max_err, amax;                // 0 where exact
} ExportRow;

typedef struct {
    bool allow_inexact;                  // write the nearest where a value cannot be said, instead of refusing
    int dtype;                           // of tensors that are floats: a DType, or -1 for what they are stored as
    void (*report)(void *ctx, const ExportRow *row);       // NULL, or called once a tensor before anything is written
    void (*note)(void *ctx, const char *text);             // NULL, or told what a reader does otherwise than we do
    void *ctx;
} ExportOptions;

// A GGUF file of an open model: int8 without zero points to Q8_0, int4 without to Q4_0, with to Q4_1 (groups are
// multiples of 32 values; their scale is repeated in every block of 32); floats to BF16, F16 or F32. Norms are F32.
// Refused with E_USAGE, naming the tensor and the way out: schemes that GGUF has no blocks for, and (unless
// allow_inexact) scales and minima that f16 does not hold.
int export_gguf(const char *path, const ModelFile *m, const ExportOptions *o, Err *err);

// A Hugging Face folder in the layouts of compressed-tensors of an open packed model: `int-quantized` for int8 weights
// whose inputs are quantized, `pack-quantized` for all others. Embeddings go as the floats they decode to. E_USAGE for
// a float zero point.
int export_compressed(const char *dir, const ModelFile *m, const ExportOptions *o, Err *err);

// A plain Hugging Face folder of what an open model's tensors decode to, as dtype (-1: BF16). What bf16 rounds is
// reported, not refused.
int export_dequantized(const char *dir, const ModelFile *m, const ExportOptions *o, Err *err);
#endif
