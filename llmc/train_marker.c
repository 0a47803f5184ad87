// The marker of a training checkpoint, and what the file of each rank says of itself: see train_state.h.
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "checksum.h"
#include "json.h"
#include "train_state.h"

#define MARKER_FORMAT "qllm.c training checkpoint"
#define FILE_FORMAT "qllm.c training state"
#define EXACT 9007199254740992.0       // 2^53: up to it a JSON number holds every integer

void train_file_name(char *buf, size_t size, int rank, int ranks, const char *end) {
    snprintf(buf, size, "rank-%05d-of-%05d%s", rank, ranks, end);
}

// 64-bit values are strings: a JSON number is a double.
static void add_u64(cJSON *o, const char *key, uint64_t value) {
    char text[24];
    snprintf(text, sizeof text, "%" PRIu64, value);
    cJSON_AddStringToObject(o, key, text);
}

static int get_u64(const cJSON *o, const char *key, uint64_t max, uint64_t *out, Err *err) {
    const char *s = json_string(o, key);
    if (!s) return err_set(err, E_MISSING, "field \"%s\" is missing or not a string", key);
    size_t n = strlen(s);
    errno = 0;
    bool digits = n && n <= 20 && strspn(s, "0123456789") == n;
    unsigned long long value = digits ? strtoull(s, NULL, 10) : 0;
    if (!digits || errno || value > max)
        return err_set(err, E_FORMAT, "field \"%s\" is not a whole number from 0 to %" PRIu64, key, max);
    *out = value;
    return 0;
}

static cJSON *progress_to_json(const TrainProgress *p) {
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "step", (double)p->step);
    cJSON_AddNumberToObject(o, "t", (double)p->t);
    add_u64(o, "loader_position", p->loader_position);
    add_u64(o, "tokens", (uint64_t)p->tokens);
    cJSON_AddNumberToObject(o, "skipped", (double)p->skipped);
    add_u64(o, "data_hash", p->data_hash);
    add_u64(o, "seed", p->seed);
    cJSON_AddNumberToObject(o, "seq_len", p->T);
    return o;
}

static int progress_from_json(TrainProgress *p, const cJSON *o, Err *err) {
    int64_t T = 0;
    uint64_t tokens = 0;
    *p = (TrainProgress){0};
    if (!cJSON_IsObject(o)) return err_set(err, E_FORMAT, "field \"progress\" is not an object");
    int rc = json_int(o, "step", true, 0, INT32_MAX, &p->step, err);
    if (rc == 0) rc = json_int(o, "t", true, 0, INT32_MAX, &p->t, err);
    if (rc == 0) rc = json_int(o, "skipped", true, 0, INT32_MAX, &p->skipped, err);
    if (rc == 0) rc = json_int(o, "seq_len", true, 1, INT32_MAX, &T, err);
    if (rc == 0) rc = get_u64(o, "loader_position", UINT64_MAX, &p->loader_position, err);
    if (rc == 0) rc = get_u64(o, "tokens", INT64_MAX, &tokens, err);
    if (rc == 0) rc = get_u64(o, "data_hash", UINT64_MAX, &p->data_hash, err);
    if (rc == 0) rc = get_u64(o, "seed", UINT64_MAX, &p->seed, err);
    p->T = (int)T;
    p->tokens = (int64_t)tokens;
    return rc;
}

static char *print_and_free(cJSON *o, bool pretty) {
    char *text = pretty ? cJSON_Print(o) : cJSON_PrintUnformatted(o);
    cJSON_Delete(o);
    char *mine = text ? xstrdup(text) : NULL;
    cJSON_free(text);
    return mine;
}

// The marker's last bytes: a checksum of all that is before them.
static void marker_tail(char *buf, size_t size, uint64_t checksum) {
    snprintf(buf, size, ",\n\t\"checksum\":\t\"%016" PRIx64 "\"\n}\n", checksum);
}

char *train_marker_to_json(const TrainMarker *m) {
    cJSON *o = cJSON_CreateObject(), *list;
    char name[64];
    cJSON_AddStringToObject(o, "format", MARKER_FORMAT);
    cJSON_AddNumberToObject(o, "version", 1);
    cJSON_AddItemToObject(o, "progress", progress_to_json(&m->progress));
    cJSON_AddStringToObject(o, "config", m->config);
    cJSON_AddStringToObject(o, "quant", m->quant);
    if (strcmp(m->formats, TRAIN_FORMATS_F32)) cJSON_AddStringToObject(o, "formats", m->formats);
    list = cJSON_AddArrayToObject(o, "arrays");
    for (int a = 0; a < m->n_arrays; a++) cJSON_AddItemToArray(list, cJSON_CreateString(m->arrays[a]));
    cJSON_AddNumberToObject(o, "ranks", m->ranks);
    list = cJSON_AddObjectToObject(o, "tensors");
    for (int i = 0; i < m->n_tensors; i++) {
        const RowSplit *s = &m->tensors[i].split;
        cJSON_AddItemToObject(list, m->tensors[i].name,
                              cJSON_CreateDoubleArray((double[]){(double)s->rows, (double)s->unit, s->first}, 3));
    }
    list = cJSON_AddObjectToObject(o, "files");
    for (int r = 0; r < m->ranks; r++) {
        cJSON *pair = cJSON_CreateArray();
        char sum[24];
        train_file_name(name, sizeof name, r, m->ranks, ".safetensors");
        snprintf(sum, sizeof sum, "%016" PRIx64, m->files[r].checksum);
        cJSON_AddItemToArray(pair, cJSON_CreateNumber((double)m->files[r].bytes));
        cJSON_AddItemToArray(pair, cJSON_CreateString(sum));
        cJSON_AddItemToObject(list, name, pair);
    }
    char *text = print_and_free(o, true), tail[64];
    if (!text) return NULL;
    size_t n = strlen(text) - 2;                                 // without "\n}"
    marker_tail(tail, sizeof tail, checksum_of(text, n));
    char *whole = xmalloc(n + strlen(tail) + 1);
    memcpy(whole, text, n);
    strcpy(whole + n, tail);
    free(text);
    return whole;
}

void train_marker_free(TrainMarker *m) {
    free(m->config);
    free(m->quant);
    free(m->tensors);
    free(m->files);
    *m = (TrainMarker){0};
}

// Texts end up in messages and in terminals.
static bool plain_text(const char *s, size_t max) {
    size_t n = 0;
    for (; s && s[n]; n++)
        if (n == max || s[n] < 0x20 || s[n] == 0x7f) return false;
    return n > 0;
}

static bool plain_name(const char *s, size_t max) { return plain_text(s, max) && !strchr(s, ' '); }

static bool exact(const cJSON *v, int64_t lo, int64_t hi, int64_t *out) {
    if (!cJSON_IsNumber(v) || !(v->valuedouble >= (double)lo && v->valuedouble <= (double)hi)) return false;
    *out = (int64_t)v->valuedouble;
    return (double)*out == v->valuedouble;
}

static bool parse_hex(const char *s, uint64_t *out) {
    if (!s || strlen(s) != 16 || strspn(s, "0123456789abcdef") != 16) return false;
    *out = strtoull(s, NULL, 16);
    return true;
}

static int parse_lists(TrainMarker *m, const cJSON *o, Err *err) {
    const cJSON *arrays = cJSON_GetObjectItemCaseSensitive(o, "arrays"), *v,
                *tensors = cJSON_GetObjectItemCaseSensitive(o, "tensors"),
                *files = cJSON_GetObjectItemCaseSensitive(o, "files");
    if (!cJSON_IsArray(arrays)) return err_set(err, E_FORMAT, "field \"arrays\" is not a list");
    cJSON_ArrayForEach(v, arrays) {
        if (m->n_arrays == MARKER_MAX_ARRAYS || !plain_name(cJSON_GetStringValue(v), sizeof m->arrays[0] - 1))
            return err_set(err, E_FORMAT, "field \"arrays\" is not a list of at most %d short names",
                           MARKER_MAX_ARRAYS);
        strcpy(m->arrays[m->n_arrays++], v->valuestring);
    }

    // Lists are as long as the text that holds them, so no count can ask for more memory than that.
    if (!cJSON_IsObject(tensors)) return err_set(err, E_FORMAT, "field \"tensors\" is not an object");
    m->tensors = xcalloc((size_t)cJSON_GetArraySize(tensors) + 1, sizeof *m->tensors);
    cJSON_ArrayForEach(v, tensors) {
        int64_t rows, unit, first;
        if (!plain_name(v->string, sizeof m->tensors[0].name - 1))
            return err_set(err, E_FORMAT, "name %d of \"tensors\" is empty, too long or has control characters",
                           m->n_tensors);
        if (!cJSON_IsArray(v) || cJSON_GetArraySize(v) != 3 || !exact(cJSON_GetArrayItem(v, 0), 1, INT32_MAX, &rows) ||
            !exact(cJSON_GetArrayItem(v, 1), 1, rows, &unit) || rows % unit ||
            !exact(cJSON_GetArrayItem(v, 2), 0, m->ranks - 1, &first))
            return err_set(err, E_FORMAT, "tensor %s: expected [rows, rows that stay together, rank 0 to %d]",
                           v->string, m->ranks - 1);
        strcpy(m->tensors[m->n_tensors].name, v->string);
        m->tensors[m->n_tensors++].split = (RowSplit){.rows = rows, .unit = unit, .R = m->ranks, .first = (int)first};
    }

    if (!cJSON_IsObject(files) || cJSON_GetArraySize(files) != m->ranks)
        return err_set(err, E_FORMAT, "field \"files\" does not name one file for each of %d ranks", m->ranks);
    m->files = xcalloc((size_t)m->ranks, sizeof *m->files);
    int r = 0;
    cJSON_ArrayForEach(v, files) {
        char name[64];
        int64_t bytes;
        train_file_name(name, sizeof name, r, m->ranks, ".safetensors");
        if (!v->string || strcmp(v->string, name))
            return err_set(err, E_FORMAT, "name %d of \"files\" is not %s", r, name);
        if (!cJSON_IsArray(v) || cJSON_GetArraySize(v) != 2 ||
            !exact(cJSON_GetArrayItem(v, 0), 1, (int64_t)EXACT, &bytes) ||
            !parse_hex(cJSON_GetStringValue(cJSON_GetArrayItem(v, 1)), &m->files[r].checksum))
            return err_set(err, E_FORMAT, "file %s: expected [bytes, \"checksum of 16 hexadecimal digits\"]", name);
        m->files[r++].bytes = (uint64_t)bytes;
    }
    return 0;
}

static int parse_marker_object(TrainMarker *m, const cJSON *o, Err *err) {
    int64_t version = 0, ranks = 0;
    const char *format = json_string(o, "format"), *config = json_string(o, "config"), *quant = json_string(o, "quant");
    if (!format || strcmp(format, MARKER_FORMAT)) return err_set(err, E_FORMAT, "not a training checkpoint");
    int rc = json_int(o, "version", true, 1, 1, &version, err);
    if (rc == 0) rc = progress_from_json(&m->progress, cJSON_GetObjectItemCaseSensitive(o, "progress"), err);
    if (rc == 0) rc = json_int(o, "ranks", true, 1, MARKER_MAX_RANKS, &ranks, err);
    if (rc == 0 && (!config || !quant))
        rc = err_set(err, E_FORMAT, "fields \"config\" and \"quant\" are not both texts");
    if (rc < 0) return rc;
    const cJSON *formats = cJSON_GetObjectItemCaseSensitive(o, "formats");
    if (formats && !plain_text(cJSON_GetStringValue(formats), sizeof m->formats - 1))
        return err_set(err, E_FORMAT, "field \"formats\" is not a short text");
    snprintf(m->formats, sizeof m->formats, "%s", formats ? formats->valuestring : TRAIN_FORMATS_F32);
    m->ranks = (int)ranks;
    m->config = xstrdup(config);
    m->quant = xstrdup(quant);
    return parse_lists(m, o, err);
}

int train_marker_parse(TrainMarker *m, const char *text, size_t len, const char *what, Err *err) {
    char tail[64];
    *m = (TrainMarker){0};
    if (len > MARKER_MAX_BYTES)
        return err_set(err, E_FORMAT, "%s: %zu bytes; at most %zu are expected of such a file", what, len,
                       MARKER_MAX_BYTES);
    marker_tail(tail, sizeof tail, 0);
    size_t n = strlen(tail);
    if (len >= n) marker_tail(tail, sizeof tail, checksum_of(text, len - n));
    if (len < n || memcmp(text + len - n, tail, n))
        return err_set(err, E_FORMAT, "%s: its checksum is not that of its text: truncated or damaged; name an earlier "
                       "checkpoint in the file latest", what);
    cJSON *o = json_parse(text, len, what, err);
    if (!o) return E_FORMAT;
    Err why = {0};
    int rc = parse_marker_object(m, o, &why);
    cJSON_Delete(o);
    if (rc < 0) {
        train_marker_free(m);
        return err_set(err, E_FORMAT, "%s: %.600s", what, why.text);
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------
// What the file of one rank says of itself, besides its tensors. The reader makes the same texts and compares.

static char *rows_to_json(const TrainMarker *m, int rank) {
    cJSON *o = cJSON_CreateObject();
    for (int i = 0; i < m->n_tensors; i++) {
        const RowSplit *s = &m->tensors[i].split;
        if (!split_count(s, rank)) continue;
        cJSON_AddItemToObject(o, m->tensors[i].name,
                              cJSON_CreateDoubleArray((double[]){(double)split_begin(s, rank), (double)s->rows}, 2));
    }
    return print_and_free(o, false);
}

void train_file_meta(TrainFileMeta meta[TRAIN_FILE_META], const TrainMarker *m, int rank) {
    char text[2][16];
    snprintf(text[0], sizeof text[0], "%d", rank);
    snprintf(text[1], sizeof text[1], "%d", m->ranks);
    meta[0] = (TrainFileMeta){"format", xstrdup(FILE_FORMAT)};
    meta[1] = (TrainFileMeta){"rank", xstrdup(text[0])};
    meta[2] = (TrainFileMeta){"ranks", xstrdup(text[1])};
    meta[3] = (TrainFileMeta){"progress", print_and_free(progress_to_json(&m->progress), false)};
    meta[4] = (TrainFileMeta){"rows", rows_to_json(m, rank)};
    meta[5] = (TrainFileMeta){"config", xstrdup(m->config)};
    meta[6] = (TrainFileMeta){"quant", xstrdup(m->quant)};
}

void train_file_meta_free(TrainFileMeta meta[TRAIN_FILE_META]) {
    for (int i = 0; i < TRAIN_FILE_META; i++) free(meta[i].text);
}
