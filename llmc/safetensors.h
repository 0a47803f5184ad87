// The safetensors container: u64 header length, JSON header, data. Reader maps the file and checks everything before
// a byte of data is used: header size (<= 100 MB and within the file), JSON depth, unknown dtypes, negative or
// overflowing shapes, offsets that leave the file, overlap, leave holes or do not match shape x dtype, duplicate
// names.
#ifndef QLLM_SAFETENSORS_H
#define QLLM_SAFETENSORS_H
#include "checksum.h"
#include "common.h"
#ifdef __cplusplus
extern "C" {
#endif

#define ST_MAX_DIMS 8
typedef struct {
    char *name;
    DType dtype;
    int ndim;
    int64_t shape[ST_MAX_DIMS];
    size_t bytes;
    const uint8_t *data;                 // into the map
} StTensor;

typedef struct {
    FileMap map;
    char path[1024];
    StTensor *tensors; int n;            // sorted by name
    struct { char *key, *value; } *meta; int n_meta;
} Safetensors;

int safetensors_open(Safetensors *st, const char *path, Err *err);
// The same from memory (for fuzzing and tests); `data` must outlive st.
int safetensors_parse(Safetensors *st, const uint8_t *data, size_t size, const char *what, Err *err);
void safetensors_close(Safetensors *st);
const StTensor *safetensors_find(const Safetensors *st, const char *name);
const char *safetensors_meta(const Safetensors *st, const char *key);
// An open file that carries its own checksum (st_writer_seal) holds the bytes that were written: 0, else E_FORMAT. One
// without a checksum passes. drop: pages leave this process once they were read (file_drop).
int safetensors_verify(const Safetensors *st, bool drop, Err *err);

// Writer: declare everything, then give the data in the order declared, in pieces of any size. Appears atomically.
// Tensors are laid out in the order declared, data aligned to 64 bytes by padding the header.
typedef struct StWriter StWriter;
StWriter *st_writer_new(void);
void st_writer_meta(StWriter *w, const char *key, const char *value);
void st_writer_tensor(StWriter *w, const char *name, DType dtype, int ndim, const int64_t *shape);
// From st_writer_begin on, every byte of the file also goes into *sum, which must outlive the writer.
void st_writer_checksum(StWriter *w, Checksum *sum);
// The file carries its checksum, as metadata "checksum": sixteen hexadecimal digits, filled in at the end. Not together
// with st_writer_checksum.
void st_writer_seal(StWriter *w);
int st_writer_begin(StWriter *w, const char *path, Err *err);
// From here on data are copied, and a thread of the writer's own checksums and writes them meanwhile. Where there is no
// thread to be had the caller's does it.
void st_writer_behind(StWriter *w);
void st_writer_data(StWriter *w, const void *data, size_t bytes);
int st_writer_finish(StWriter *w, Err *err);   // E_FAIL with the cause if a write failed or data do not add up; frees w
void st_writer_abort(StWriter *w);             // removes what was written; frees w
#ifdef __cplusplus
}
#endif
#endif
