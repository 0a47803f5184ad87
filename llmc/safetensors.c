// The safetensors container: see safetensors.h for what is checked.
#include "safetensors.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "json.h"

#define MAX_HEADER (100u * 1000 * 1000)

// A file's checksum of itself: the file, with zeros for the digits, in pieces of a mebibyte; the checksum of the
// pieces' checksums, one after the other as little-endian words. So many threads can verify one file.
#define SEAL_KEY "checksum"
#define SEAL_DIGITS 16
#define SEAL_PIECE ((size_t)1 << 20)
static const char seal_zeros[] = "0000000000000000";

// Where the digits are in a header's text; NULL if nowhere. In a string each quote would follow a backslash, so this is
// no part of another value.
static const char *seal_digits(const char *text, size_t len) {
    static const char key[] = "\"" SEAL_KEY "\":\"";
    const char *at = memmem(text, len, key, sizeof key - 1);
    if (at) at += sizeof key - 1;
    return at && (size_t)(text + len - at) > SEAL_DIGITS && at[SEAL_DIGITS] == '"' ? at : NULL;
}

static void add_word(Checksum *s, uint64_t word) {
    uint8_t le[8];
    for (int i = 0; i < 8; i++) le[i] = (uint8_t)(word >> (8 * i));
    checksum_add(s, le, sizeof le);
}

// ---------------------------------------------------------------------------------------------
// Reading

// Names end up in messages and in terminals.
static bool name_is_plain(const char *s) {
    if (!*s) return false;
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f) return false;
    return true;
}

// A JSON number that is an exact non-negative integer. 2^53: beyond it a double no longer holds every integer.
static bool exact_size(const cJSON *v, size_t *out) {
    if (!cJSON_IsNumber(v) || !(v->valuedouble >= 0 && v->valuedouble <= 9007199254740992.0)) return false;
    *out = (size_t)v->valuedouble;
    return (double)*out == v->valuedouble;
}

static int read_metadata(Safetensors *st, const cJSON *obj, Err *err) {
    if (!cJSON_IsObject(obj)) return err_set(err, E_FORMAT, "%s: __metadata__ is not an object", st->path);
    if (st->meta) return err_set(err, E_FORMAT, "%s: __metadata__ appears twice", st->path);
    st->meta = xcalloc((size_t)cJSON_GetArraySize(obj) + 1, sizeof *st->meta);
    const cJSON *v;
    cJSON_ArrayForEach(v, obj) {
        if (!cJSON_IsString(v) || !name_is_plain(v->string))
            return err_set(err, E_FORMAT, "%s: __metadata__ may hold only strings", st->path);
        if (safetensors_meta(st, v->string))
            return err_set(err, E_FORMAT, "%s: metadata key '%.100s' appears twice", st->path, v->string);
        st->meta[st->n_meta].key = xstrdup(v->string);
        st->meta[st->n_meta++].value = xstrdup(v->valuestring);
    }
    return 0;
}

static int read_tensor(Safetensors *st, const cJSON *obj, const uint8_t *data, size_t data_size, Err *err) {
    const char *name = obj->string;
    if (!name_is_plain(name))
        return err_set(err, E_FORMAT, "%s: a tensor name is empty or has control characters", st->path);
    if (!cJSON_IsObject(obj)) return err_set(err, E_FORMAT, "%s: entry '%.200s' is not an object", st->path, name);
    const char *type = json_string(obj, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(obj, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(obj, "data_offsets");
    if (!type || !cJSON_IsArray(shape) || !cJSON_IsArray(offsets))
        return err_set(err, E_FORMAT, "%s: tensor '%.200s' lacks dtype, shape or data_offsets", st->path, name);
    int dtype = dtype_from_name(type);
    if (dtype < 0)
        return err_set(err, E_DTYPE, "%s: tensor '%.200s' has dtype '%.20s', which is not read here; convert it to "
                       "F32, F16 or BF16", st->path, name, type);

    StTensor *t = &st->tensors[st->n];
    size_t bytes = dtype_size((DType)dtype);
    const cJSON *v;
    int ndim = 0;
    cJSON_ArrayForEach(v, shape) {
        size_t dim;
        if (ndim == ST_MAX_DIMS)
            return err_set(err, E_FORMAT, "%s: tensor '%.200s' has more than %d dimensions", st->path, name,
                           ST_MAX_DIMS);
        if (!exact_size(v, &dim))
            return err_set(err, E_FORMAT, "%s: tensor '%.200s': dimension %d is not a whole number >= 0", st->path,
                           name, ndim);
        if (!mul_size(bytes, dim, &bytes))
            return err_set(err, E_FORMAT, "%s: tensor '%.200s': its shape overflows", st->path, name);
        t->shape[ndim++] = (int64_t)dim;
    }
    size_t begin, end;
    if (cJSON_GetArraySize(offsets) != 2 || !exact_size(cJSON_GetArrayItem(offsets, 0), &begin) ||
        !exact_size(cJSON_GetArrayItem(offsets, 1), &end) || begin > end)
        return err_set(err, E_FORMAT, "%s: tensor '%.200s': data_offsets must be two whole numbers, begin <= end",
                       st->path, name);
    if (end > data_size)
        return err_set(err, E_FORMAT, "%s: tensor '%.200s' ends at byte %zu of the data, but there are only %zu: the "
                       "file is truncated or corrupt", st->path, name, end, data_size);
    if (end - begin != bytes)
        return err_set(err, E_FORMAT, "%s: tensor '%.200s' occupies %zu bytes, but its shape and dtype need %zu",
                       st->path, name, end - begin, bytes);
    t->dtype = (DType)dtype;
    t->ndim = ndim;
    t->bytes = bytes;
    t->data = data + begin;
    t->name = xstrdup(name);
    st->n++;
    return 0;
}

static int by_place(const void *a, const void *b) {
    const StTensor *x = a, *y = b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const StTensor *)a)->name, ((const StTensor *)b)->name);
}

static int read_header(Safetensors *st, const uint8_t *data, size_t size, Err *err) {
    if (size < 8)
        return err_set(err, E_FORMAT, "%s: %zu bytes are too few for a safetensors file", st->path, size);
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | data[i];
    if (n > MAX_HEADER)
        return err_set(err, E_FORMAT, "%s: not a safetensors file: its header would be %llu bytes (at most %u are "
                       "read)", st->path, (unsigned long long)n, MAX_HEADER);
    if (n > size - 8)
        return err_set(err, E_FORMAT, "%s: its header of %llu bytes goes beyond the end (%zu bytes): truncated?",
                       st->path, (unsigned long long)n, size);
    const char *text = (const char *)data + 8;
    size_t len = (size_t)n;
    while (len && text[len - 1] == ' ') len--;      // writers pad the header for alignment
    cJSON *root = json_parse(text, len, st->path, err);
    if (!root) return err ? err->code : E_FORMAT;
    int rc = 0;
    if (!cJSON_IsObject(root)) rc = err_set(err, E_FORMAT, "%s: the header is not a JSON object", st->path);
    st->tensors = xcalloc((size_t)cJSON_GetArraySize(root) + 1, sizeof *st->tensors);
    const uint8_t *base = data + 8 + n;
    size_t data_size = size - 8 - (size_t)n;
    const cJSON *v;
    if (!rc) cJSON_ArrayForEach(v, root) {
        if (strcmp(v->string, "__metadata__") == 0) rc = read_metadata(st, v, err);
        else rc = read_tensor(st, v, base, data_size, err);
        if (rc) break;
    }
    cJSON_Delete(root);
    if (rc) return rc;

    // Tensors must tile the data exactly: an overlap or a hole is where a hostile file hides something.
    qsort(st->tensors, (size_t)st->n, sizeof *st->tensors, by_place);
    const uint8_t *at = base;
    for (int i = 0; i < st->n; i++) {
        const StTensor *t = &st->tensors[i];
        if (t->data != at)
            return err_set(err, E_FORMAT, "%s: tensor '%.200s' begins at byte %zu of the data, expected %zu: tensors "
                           "%s", st->path, t->name, (size_t)(t->data - base), (size_t)(at - base),
                           t->data < at ? "overlap" : "leave a hole");
        at += t->bytes;
    }
    if (at != data + size)
        return err_set(err, E_FORMAT, "%s: %zu bytes after the last tensor", st->path, (size_t)(data + size - at));
    qsort(st->tensors, (size_t)st->n, sizeof *st->tensors, by_name);
    for (int i = 1; i < st->n; i++)
        if (strcmp(st->tensors[i - 1].name, st->tensors[i].name) == 0)
            return err_set(err, E_FORMAT, "%s: tensor '%.200s' appears twice", st->path, st->tensors[i].name);
    return 0;
}

int safetensors_parse(Safetensors *st, const uint8_t *data, size_t size, const char *what, Err *err) {
    memset(st, 0, sizeof *st);
    snprintf(st->path, sizeof st->path, "%s", what);
    int rc = read_header(st, data, size, err);
    if (rc) safetensors_close(st);
    return rc;
}

int safetensors_open(Safetensors *st, const char *path, Err *err) {
    FileMap map;
    memset(st, 0, sizeof *st);
    int rc = file_map(&map, path, err);
    if (rc) return rc;
    rc = safetensors_parse(st, map.data, map.size, path, err);
    if (rc) file_unmap(&map);
    else st->map = map;
    return rc;
}

void safetensors_close(Safetensors *st) {
    for (int i = 0; i < st->n; i++) free(st->tensors[i].name);
    for (int i = 0; i < st->n_meta; i++) {
        free(st->meta[i].key);
        free(st->meta[i].value);
    }
    free(st->tensors);
    free(st->meta);
    if (st->map.base) file_unmap(&st->map);
    memset(st, 0, sizeof *st);
}

const StTensor *safetensors_find(const Safetensors *st, const char *name) {
    int lo = 0, hi = st->n;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2, c = strcmp(name, st->tensors[mid].name);
        if (c == 0) return &st->tensors[mid];
        if (c < 0) hi = mid;
        else lo = mid + 1;
    }
    return NULL;
}

const char *safetensors_meta(const Safetensors *st, const char *key) {
    for (int i = 0; i < st->n_meta; i++)
        if (strcmp(st->meta[i].key, key) == 0) return st->meta[i].value;
    return NULL;
}

// Bytes [begin, end) of the file with zeros for the digits at `digits`.
static uint64_t piece_checksum(const uint8_t *file, size_t begin, size_t end, size_t digits) {
    if (digits >= end || digits + SEAL_DIGITS <= begin) return checksum_of(file + begin, end - begin);
    size_t from = digits > begin ? digits : begin, to = digits + SEAL_DIGITS < end ? digits + SEAL_DIGITS : end;
    Checksum s;
    checksum_begin(&s);
    checksum_add(&s, file + begin, from - begin);
    checksum_add(&s, seal_zeros, to - from);
    checksum_add(&s, file + to, end - to);
    return checksum_end(&s);
}

int safetensors_verify(const Safetensors *st, bool drop, Err *err) {
    const char *stored = safetensors_meta(st, SEAL_KEY);
    if (!stored) return 0;
    const uint8_t *file = st->map.data;
    size_t size = st->map.size, header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | file[i];         // checked when it was opened
    const char *digits = seal_digits((const char *)file + 8, header);
    if (!digits || strlen(stored) != SEAL_DIGITS || memcmp(digits, stored, SEAL_DIGITS))
        return err_set(err, E_FORMAT, "%s: its checksum is not in the form in which it was written: another program "
                       "changed the file; --no-verify reads it all the same", st->path);
    size_t n = (size + SEAL_PIECE - 1) / SEAL_PIECE, at = (size_t)((const uint8_t *)digits - file);
    uint64_t *sums = xmalloc(n * sizeof *sums);
    #pragma omp parallel for schedule(dynamic, 4)
    for (size_t i = 0; i < n; i++) {
        size_t begin = i * SEAL_PIECE, end = size - begin < SEAL_PIECE ? size : begin + SEAL_PIECE;
        sums[i] = piece_checksum(file, begin, end, at);
        if (drop) file_drop(&st->map, begin, end);
    }
    Checksum all;
    checksum_begin(&all);
    for (size_t i = 0; i < n; i++) add_word(&all, sums[i]);
    free(sums);
    char found[SEAL_DIGITS + 1];
    snprintf(found, sizeof found, "%016llx", (unsigned long long)checksum_end(&all));
    if (memcmp(found, stored, SEAL_DIGITS) == 0) return 0;
    return err_set(err, E_FORMAT, "%s: the checksum of its %zu bytes is %s, but %s was written: the file is damaged or "
                   "was changed; --no-verify reads it all the same", st->path, size, found, stored);
}

// ---------------------------------------------------------------------------------------------
// Writing

// Buffers between who makes the data and the thread that writes them.
#define BEHIND_BUFFERS 3
#define BEHIND_BYTES ((size_t)4 << 20)
typedef struct {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t turn;
    uint8_t *buffer[BEHIND_BUFFERS];
    size_t bytes[BEHIND_BUFFERS];
    unsigned filled, written;            // buffers handed over, and written, so far
    bool end;
} Behind;

struct StWriter {
    cJSON *root, *meta;                  // the header; meta is its first member
    size_t declared, given;              // bytes of data
    bool overflow, open;
    AtomicFile file;
    Checksum *sum;                       // of the whole file, if asked for
    bool seal;                           // the file carries its own, too: at byte `digits`
    size_t digits;
    Checksum piece, pieces;              // of the piece that is being written, and of those before
    Behind *behind;                      // NULL: data are written by who gives them
};

static void seal_add(StWriter *w, const uint8_t *data, size_t bytes) {
    while (bytes) {
        size_t room = SEAL_PIECE - (size_t)w->piece.bytes, n = bytes < room ? bytes : room;
        checksum_add(&w->piece, data, n);
        if (n == room) {
            add_word(&w->pieces, checksum_end(&w->piece));
            checksum_begin(&w->piece);
        }
        data += n;
        bytes -= n;
    }
}

static void put(StWriter *w, const void *data, size_t bytes) {
    if (w->sum) checksum_add(w->sum, data, bytes);
    if (w->seal) seal_add(w, data, bytes);
    atomic_write(&w->file, data, bytes);
}

static void *write_behind(void *arg) {
    StWriter *w = arg;
    Behind *b = w->behind;
    pthread_mutex_lock(&b->lock);
    for (;;) {
        while (b->written == b->filled && !b->end) pthread_cond_wait(&b->turn, &b->lock);
        if (b->written == b->filled) break;
        unsigned i = b->written % BEHIND_BUFFERS;
        pthread_mutex_unlock(&b->lock);
        put(w, b->buffer[i], b->bytes[i]);
        atomic_sync_soon(&w->file);
        pthread_mutex_lock(&b->lock);
        b->bytes[i] = 0;
        b->written++;
        pthread_cond_signal(&b->turn);
    }
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

// The buffer that is being filled goes to the thread, and the next one is waited for.
static void hand_over(Behind *b) {
    pthread_mutex_lock(&b->lock);
    b->filled++;
    pthread_cond_signal(&b->turn);
    while (b->filled - b->written == BEHIND_BUFFERS) pthread_cond_wait(&b->turn, &b->lock);
    pthread_mutex_unlock(&b->lock);
}

static void put_behind(Behind *b, const uint8_t *data, size_t bytes) {
    while (bytes) {
        unsigned i = b->filled % BEHIND_BUFFERS;
        size_t room = BEHIND_BYTES - b->bytes[i], n = bytes < room ? bytes : room;
        memcpy(b->buffer[i] + b->bytes[i], data, n);
        b->bytes[i] += n;
        if (n == room) hand_over(b);
        data += n;
        bytes -= n;
    }
}

static void end_behind(StWriter *w) {
    Behind *b = w->behind;
    if (!b) return;
    if (b->bytes[b->filled % BEHIND_BUFFERS]) hand_over(b);
    pthread_mutex_lock(&b->lock);
    b->end = true;
    pthread_cond_signal(&b->turn);
    pthread_mutex_unlock(&b->lock);
    pthread_join(b->thread, NULL);
    pthread_mutex_destroy(&b->lock);
    pthread_cond_destroy(&b->turn);
    free(b->buffer[0]);
    free(b);
    w->behind = NULL;
}

static void put_seal(StWriter *w) {
    char digits[SEAL_DIGITS + 1];
    if (w->piece.bytes) add_word(&w->pieces, checksum_end(&w->piece));
    snprintf(digits, sizeof digits, "%016llx", (unsigned long long)checksum_end(&w->pieces));
    if (fseeko(w->file.f, (off_t)w->digits, SEEK_SET) && !w->file.failed) w->file.failed = errno;
    atomic_write(&w->file, digits, SEAL_DIGITS);
}

StWriter *st_writer_new(void) {
    StWriter *w = xcalloc(1, sizeof *w);
    w->root = cJSON_CreateObject();
    w->meta = cJSON_AddObjectToObject(w->root, "__metadata__");
    return w;
}

static void writer_free(StWriter *w) {
    cJSON_Delete(w->root);
    free(w);
}

void st_writer_meta(StWriter *w, const char *key, const char *value) {
    cJSON_AddStringToObject(w->meta, key, value);
}

void st_writer_tensor(StWriter *w, const char *name, DType dtype, int ndim, const int64_t *shape) {
    size_t bytes = dtype_size(dtype), end;
    cJSON *t = cJSON_CreateObject(), *dims = cJSON_CreateArray(), *offsets = cJSON_CreateArray();
    for (int i = 0; i < ndim; i++) {
        if (!mul_size(bytes, (size_t)shape[i], &bytes)) w->overflow = true;
        cJSON_AddItemToArray(dims, cJSON_CreateNumber((double)shape[i]));
    }
    if (!add_size(w->declared, bytes, &end)) w->overflow = true;
    cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)w->declared));
    cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)end));
    cJSON_AddStringToObject(t, "dtype", dtype_name(dtype));
    cJSON_AddItemToObject(t, "shape", dims);
    cJSON_AddItemToObject(t, "data_offsets", offsets);
    cJSON_AddItemToObject(w->root, name, t);
    w->declared = end;
}

void st_writer_checksum(StWriter *w, Checksum *sum) {
    checksum_begin(sum);
    w->sum = sum;
}

void st_writer_seal(StWriter *w) {
    w->seal = true;
    checksum_begin(&w->piece);
    checksum_begin(&w->pieces);
    st_writer_meta(w, SEAL_KEY, seal_zeros);
}

int st_writer_begin(StWriter *w, const char *path, Err *err) {
    if (w->overflow) return err_set(err, E_SHAPE, "%s: the tensors to write have impossible sizes", path);
    if (!w->meta->child) cJSON_DeleteItemFromObjectCaseSensitive(w->root, "__metadata__");
    char *text = cJSON_PrintUnformatted(w->root);
    if (!text) return err_set(err, E_NOMEM, "%s: no memory for the header", path);
    size_t len = strlen(text), padded = (8 + len + 63) / 64 * 64 - 8;
    if (padded > MAX_HEADER) {
        cJSON_free(text);
        return err_set(err, E_FORMAT, "%s: its header would be %zu bytes, more than the %u a reader accepts", path,
                       padded, MAX_HEADER);
    }
    if (w->seal) w->digits = 8 + (size_t)(seal_digits(text, len) - text);
    int rc = atomic_open(&w->file, path, err);
    if (rc == 0) {
        w->open = true;
        uint8_t n[8];
        for (int i = 0; i < 8; i++) n[i] = (uint8_t)(padded >> (8 * i));
        put(w, n, 8);
        put(w, text, len);
        char spaces[64];
        memset(spaces, ' ', sizeof spaces);
        put(w, spaces, padded - len);
    }
    cJSON_free(text);
    return rc;
}

void st_writer_behind(StWriter *w) {
    Behind *b = xcalloc(1, sizeof *b);
    b->buffer[0] = xmalloc(BEHIND_BUFFERS * BEHIND_BYTES);
    for (int i = 1; i < BEHIND_BUFFERS; i++) b->buffer[i] = b->buffer[0] + (size_t)i * BEHIND_BYTES;
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->turn, NULL);
    w->behind = b;
    if (pthread_create(&b->thread, NULL, write_behind, w) == 0) return;
    w->behind = NULL;
    pthread_mutex_destroy(&b->lock);
    pthread_cond_destroy(&b->turn);
    free(b->buffer[0]);
    free(b);
}

void st_writer_data(StWriter *w, const void *data, size_t bytes) {
    w->given += bytes;
    if (w->given > w->declared) return;
    if (w->behind) put_behind(w->behind, data, bytes);
    else put(w, data, bytes);
}

int st_writer_finish(StWriter *w, Err *err) {
    int rc;
    end_behind(w);
    if (w->given != w->declared) {
        rc = err_set(err, E_FAIL, "%s: %zu bytes of data were written, %zu declared", w->file.path, w->given,
                     w->declared);
        atomic_abort(&w->file);
    } else {
        if (w->seal) put_seal(w);
        rc = atomic_commit(&w->file, err);
    }
    writer_free(w);
    return rc;
}

void st_writer_abort(StWriter *w) {
    end_behind(w);
    if (w->open) atomic_abort(&w->file);
    writer_free(w);
}
