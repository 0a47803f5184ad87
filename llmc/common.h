// Ground floor: data types, errors, checked arithmetic, memory and files. Everything includes this.
#ifndef QLLM_COMMON_H
#define QLLM_COMMON_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include "scalar.h"
#ifdef __cplusplus
extern "C" {
#endif

#define QLLM_VERSION "0.1.0"

// ---------------------------------------------------------------------------------------------
// Errors. Library functions return 0 or a negative code and leave one message that names the value
// that was wrong, what was expected and the way out. Only programs print and exit.

enum {
    E_FAIL = -1,      // the operating system or a library refused
    E_USAGE = -2,     // the user asked for something impossible; programs exit with status 2
    E_FORMAT = -3,    // a file is malformed, truncated or not what it claims to be
    E_MISSING = -4,   // a file, tensor or field is not there
    E_SHAPE = -5,     // right name, wrong shape
    E_DTYPE = -6,     // right name, wrong data type
    E_NOMEM = -7
};

typedef struct {
    int code;
    char text[1024];
} Err;

// Sets err (which may be NULL) and returns code, so that `return err_set(err, E_SHAPE, "...")` reads well.
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int err_set(Err *err, int code, const char *fmt, ...);

// Prints "PROGRAM: text" to stderr and exits: status 2 for E_USAGE, else 1.
#if defined(__GNUC__)
__attribute__((noreturn))
#endif
void die(const Err *err);
extern const char *program_name;   // set by main, used as the prefix of messages

// ---------------------------------------------------------------------------------------------
// Data types as files know them.

typedef enum { DT_F32, DT_F16, DT_BF16, DT_I8, DT_U8, DT_I16, DT_I32, DT_I64, DT_F64, DT_BOOL, DT_COUNT } DType;
size_t dtype_size(DType t);
const char *dtype_name(DType t);                  // safetensors' names: "F32", "BF16", ...
int dtype_from_name(const char *name);            // a DType, or -1
// Converts n values of dtype t (DT_F32, DT_F16, DT_BF16, DT_F64) to f32. Returns 0 or E_DTYPE.
int convert_to_f32(float *dst, const void *src, DType t, size_t n);

// ---------------------------------------------------------------------------------------------
// Checked arithmetic for whatever comes from a file or a flag: false on overflow.

bool mul_size(size_t a, size_t b, size_t *out);
bool add_size(size_t a, size_t b, size_t *out);

// ---------------------------------------------------------------------------------------------
// Memory. xmalloc and xcalloc are for small host objects and die when there is none; the planned arenas use
// big_alloc, which reports. Both align to 64 bytes; release with free().

void *xmalloc(size_t bytes);
void *xcalloc(size_t n, size_t size);
char *xstrdup(const char *s);
int big_alloc(void **out, size_t bytes, const char *what, Err *err);   // zeroed, 2 MiB-aligned for large sizes

// ---------------------------------------------------------------------------------------------
// Files.

// A whole file, mapped read-only. An empty file has data == NULL and size == 0.
typedef struct { const uint8_t *data; size_t size; void *base; uint64_t device, inode; int64_t written; } FileMap;
int file_map(FileMap *map, const char *path, Err *err);
void file_unmap(FileMap *map);
// Was the mapped file, if it still stands at `path`, written to since? (One that was replaced is still mapped whole.)
bool file_changed(const FileMap *map, const char *path);
// The map will be read from front to back: the system reads far ahead.
void file_sequential(const FileMap *map);
// Bytes [begin, end) of the map were read and are not soon again: their pages leave this process, not the page cache.
// Both ends are rounded down to pages, so that neighbours dropped one after the other leave nothing behind.
void file_drop(const FileMap *map, size_t begin, size_t end);

// Reads a small text file into a NUL-terminated malloc'ed buffer; refuses more than max bytes.
int file_read(char **text, size_t *len, const char *path, size_t max, Err *err);

// A file that appears whole or not at all: written to PATH.tmp-PID, synced, renamed to PATH, folder synced.
// Any failed write is remembered and reported by atomic_commit, which then removes the temporary file.
typedef struct { FILE *f; char path[1024], tmp[1100]; int failed; } AtomicFile;
int atomic_open(AtomicFile *a, const char *path, Err *err);
void atomic_write(AtomicFile *a, const void *data, size_t bytes);
void atomic_sync_soon(AtomicFile *a);             // what was written begins its way to the disk; nobody waits for it
int atomic_commit(AtomicFile *a, Err *err);
void atomic_abort(AtomicFile *a);

int make_dir(const char *path, Err *err);         // like mkdir -p; checks that it can be written to
bool path_is_dir(const char *path);
bool path_exists(const char *path);

double now_seconds(void);                         // monotonic
size_t peak_rss_bytes(void);                      // of this process so far
size_t physical_memory_bytes(void);

#ifdef __cplusplus
}
#endif
#endif
