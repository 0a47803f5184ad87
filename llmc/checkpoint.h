// Models in and out: Hugging Face folders, GGUF files, and our own model.bin.
#ifndef QLLM_CHECKPOINT_H
#define QLLM_CHECKPOINT_H
#include "common.h"
#include "gguf.h"
#include "llama.h"
#include "quant.h"
#include "safetensors.h"
#include "tokenizer.h"

typedef enum { MODEL_HF, MODEL_GGUF, MODEL_BIN } ModelKind;

// An open model. Tensors stay in their mapped files until read.
typedef struct {
    ModelKind kind;
    char path[1024];
    LlamaConfig config;
    QuantPlan plan;                      // of model.bin; none elsewhere
    bool packed;                         // quantized tensors are stored as codes
    int flags;                           // MODEL_STREAM...
    void (*rows_read)(void *ctx, const Param *p, int64_t n);   // for progress: model_row_source read n rows, on the
    void *rows_ctx;                      //   thread that asked for them; NULL: nobody wants to know
    Tokenizer *tokenizer;                // NULL when the model carries none
    Safetensors *files; int n_files;     // HF: shards; BIN: one
    Gguf gguf;
} ModelFile;

// path: a folder with config.json, a .gguf file, or a model.bin. Checks that every tensor of the configuration is there
// with its shape and a readable dtype, and that there is none too many (rotary inv_freq buffers aside).
// A model.bin that carries a checksum is read through and compared with it: E_FORMAT where they differ.
int model_open(ModelFile *m, const char *path, Err *err);
// The same with flags.
enum {
    MODEL_NO_VERIFY = 1,                 // --no-verify: the checksum is not looked at
    MODEL_STREAM = 2                     // rows are read once: pages that were read leave the process, so that a model
                                         // of any size takes up a few tiles
};
int model_open_with(ModelFile *m, const char *path, int flags, Err *err);
void model_close(ModelFile *m);
// E_FORMAT if one of the mapped files was written to (or cut) since model_open, by size and time: what was read from it
// then is of two models. Looks at the files' entries only. A file that was replaced by renaming is still there for us.
int model_unchanged(const ModelFile *m, Err *err);

// Configuration from a GGUF file's llama.* metadata and tensors (vocabulary, tied head, llama3 rope factors).
int llama_config_from_gguf(LlamaConfig *c, const Gguf *g, Err *err);

// Rows [row0, row0 + n) of parameter p as f32 (packed tensors: their dequantized values). GGUF's q/k row permutation is
// undone. NaN and infinite values are E_FORMAT, naming the tensor and the row.
int model_read_rows(const ModelFile *m, const Param *p, int64_t row0, int64_t n, float *out, Err *err);

// All values of p where they lie in the map row after row as dtype (DT_F32 or DT_BF16), aligned to it: returns 1 and
// *data. 0: they are stored otherwise. NaN and infinite values are E_FORMAT as above.
int model_values(const ModelFile *m, const Param *p, DType dtype, const void **data, Err *err);

// p was copied and is not read again soon: its bytes in the map leave the process's memory.
void model_done(const ModelFile *m, const Param *p);

// A packed tensor of a model.bin: pointers into the map; scales and zeros widened to f32 (malloc'ed, owned by the
// caller).
typedef struct { const uint8_t *codes; float *scale, *zero; int64_t n_scales; } PackedTensor;
// zero is NULL where no code is offset (symmetric, signed). Returns 1 and fills t if p is stored packed, 0 if it is
// stored as floats, negative on error. A tied head packed for itself (QuantPlan.tied_head) is asked for as ROLE_HEAD,
// "lm_head.weight".
int model_packed(const ModelFile *m, const Param *p, PackedTensor *t, Err *err);
void packed_tensor_free(PackedTensor *t);
// The spec that p is packed with in m; bits == 0 where it is stored as floats.
QuantSpec model_packed_spec(const ModelFile *m, const Param *p);

// Where the writers take the values from: `rows` of p starting at row0 as f32 into out; returns 0 or an error.
typedef int (*RowSource)(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err);

// model.bin with float tensors of dtype (DT_BF16 or DT_F32). The plan is stored: ./quantize reads it from there. A plan
// with INT8 rows is E_USAGE: they have no floats.
int model_write_bin(const char *path, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table,
                    const Tokenizer *tok, DType dtype, RowSource source, void *ctx, Err *err);
// model.bin with the plan's tensors packed (codes, bf16 scales, zero points) and the others as dtype. The codes are
// those of fake quantization: quant.h on bf16(value). INT8 rows (f32 scales) are made from the values themselves, as
// INT8 training begins, and a tied head's from its table's as dtype holds them. report, if not NULL, is called once a
// tensor with its error statistics.
typedef struct { const Param *p; const QuantSpec *spec; double sqnr_db, max_abs_err, amax; size_t bytes, float_bytes;
                } PackReport;
int model_write_packed(const char *path, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table,
                       const Tokenizer *tok, DType dtype, RowSource source, void *ctx,
                       void (*report)(void *ctx, const PackReport *r), void *report_ctx, Err *err);
// The same for a model whose INT8 rows (quant_is_int8_rows) were trained: their codes and f32 scales are written as
// they are; the others as dtype, or, a tied head with its own codes (plan->tied_head), quantized by int8_nearest from
// the table's values. `codes` fills codes (n, cols) and scale (n).
typedef int (*CodeSource)(void *ctx, const Param *p, int64_t row0, int64_t n, int8_t *codes, float *scale, Err *err);
int model_write_trained(const char *path, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table,
                        const Tokenizer *tok, DType dtype, RowSource rows, CodeSource codes, void *ctx, Err *err);
// A Hugging Face folder that transformers loads: config.json, generation_config.json, model.safetensors (shards above
// 4 GiB with an index), tokenizer.json, tokenizer_config.json. Written aside as DIR.tmp-PID and renamed. An existing
// DIR is replaced if it is empty or holds nothing but an earlier export of ours; else it is refused and stays as it
// is.
int model_write_hf(const char *dir, const LlamaConfig *c, const ParamTable *table, const Tokenizer *tok, DType dtype,
                   RowSource source, void *ctx, Err *err);
// The same with another size of shard (at least one tensor each).
int model_write_hf_shards(const char *dir, const LlamaConfig *c, const ParamTable *table, const Tokenizer *tok, DType
                          dtype, size_t shard_bytes, RowSource source, void *ctx, Err *err);
// The frame of both, for folders whose weights stand in another form (llmc/export.c): how many bytes a parameter takes,
// which tensors it becomes, and their data; `quantization`, if not NULL, is JSON text for config.json's
// quantization_config.
typedef struct {
    void *ctx;
    size_t (*bytes)(void *ctx, const Param *p);
    void (*declare)(void *ctx, const Param *p, StWriter *w);
    int (*write)(void *ctx, const Param *p, StWriter *w, Err *err);
} FolderWeights;
#define HF_SHARD_BYTES ((size_t)4 << 30)
int model_write_folder(const char *dir, const LlamaConfig *c, const ParamTable *table, const Tokenizer *tok,
                       DType dtype, size_t shard_bytes, const char *quantization, const FolderWeights *from, Err *err);
// The data of one float tensor of such a folder, streamed; it was declared with p's name and shape (norms: a vector).
int model_write_float(StWriter *w, const Param *p, DType dtype, RowSource source, void *ctx, Err *err);
// Name of a parameter in GGUF files: "blk.3.attn_q.weight".
void model_gguf_name(char *buf, size_t size, const Param *p);
// RowSource over an open model (ctx is the ModelFile). The one source that writers ask from several threads at once.
int model_row_source(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err);
#endif
