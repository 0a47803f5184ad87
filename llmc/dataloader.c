#include "dataloader.h"
#include "json.h"
#include "logger.h"
#include "rng.h"
#include <glob.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define SHARD_HEADER 1024                  // 256 int32 words
#define PART_BYTES ((size_t)1 << 20)       // of text, that one thread tokenizes at a time
#define PROGRESS_BYTES ((size_t)8 << 20)   // of text, above which a progress bar is worth its lines
#define PAIR_STREAM 0xDA7A000000000000u    // the shuffle's own range of Philox streams

enum { KIND_TEXT, KIND_JSONL, KIND_SHARD };
typedef struct { char *path; int kind; FileMap map; } Source;
typedef struct { Source *file; size_t n, cap; size_t bytes; } Sources;

// ---------------------------------------------------------------------------------------------
// Which files.

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), k = strlen(end);
    return n > k && !strcmp(s + n - k, end);
}

static int kind_of(const char *path) {
    return ends_with(path, ".jsonl") ? KIND_JSONL : ends_with(path, ".bin") ? KIND_SHARD : KIND_TEXT;
}

static int add_file(Sources *s, const char *path, Err *err) {
    if (s->n == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 16;
        Source *bigger = realloc(s->file, cap * sizeof *bigger);
        if (!bigger) return err_set(err, E_NOMEM, "no memory for a list of %zu data files", cap);
        s->file = bigger;
        s->cap = cap;
    }
    Source *f = &s->file[s->n];
    *f = (Source){.path = xstrdup(path), .kind = kind_of(path)};
    s->n++;
    int rc = file_map(&f->map, path, err);
    if (rc < 0) return rc;
    if (!add_size(s->bytes, f->map.size, &s->bytes)) return err_set(err, E_USAGE, "the data files are too large");
    if ((f->kind == KIND_SHARD) != (s->file[0].kind == KIND_SHARD))
        return err_set(err, E_USAGE, "%s and %s: text and token shards do not mix; give them one after the other",
                       s->file[0].path, path);
    return 0;
}

static int add_matches(Sources *s, const char *pattern, bool by_ending, Err *err) {
    glob_t g = {0};
    int rc = glob(pattern, 0, NULL, &g);
    if (rc == GLOB_NOMATCH) rc = 0;
    else if (rc) rc = err_set(err, E_FAIL, "%s: cannot list the files", pattern);
    for (size_t i = 0; i < g.gl_pathc && rc == 0; i++) {
        const char *p = g.gl_pathv[i];
        if (path_is_dir(p) || (by_ending && !ends_with(p, ".txt") && kind_of(p) == KIND_TEXT)) continue;
        rc = add_file(s, p, err);
    }
    globfree(&g);
    return rc;
}

static int find_files(Sources *s, const char *path, Err *err) {
    int rc = 0;
    if (path_is_dir(path)) {
        // The folder's name may hold characters that mean something in a pattern.
        char *pattern = xmalloc(2 * strlen(path) + 3), *p = pattern;
        for (const char *c = path; *c; c++) {
            if (strchr("*?[]\\", *c)) *p++ = '\\';
            *p++ = *c;
        }
        strcpy(p, "/*");
        rc = add_matches(s, pattern, true, err);
        free(pattern);
        if (rc == 0 && !s->n) return err_set(err, E_USAGE, "%s: the folder holds no .txt, .jsonl or .bin file", path);
    } else if (path_exists(path)) {
        rc = add_file(s, path, err);
    } else if (strpbrk(path, "*?[")) {
        rc = add_matches(s, path, false, err);
        if (rc == 0 && !s->n) return err_set(err, E_USAGE, "%s: no file matches this pattern", path);
    } else {
        return err_set(err, E_USAGE, "%s: no such file; expected text, .jsonl, .bin shards, a folder or a pattern",
                       path);
    }
    return rc;
}

static void free_sources(Sources *s) {
    for (size_t i = 0; i < s->n; i++) {
        file_unmap(&s->file[i].map);
        free(s->file[i].path);
    }
    free(s->file);
}

// ---------------------------------------------------------------------------------------------
// Token shards.

static uint32_t le32(const uint8_t *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

int shard_parse(const uint8_t *file, size_t size, const char *what, const uint8_t **tokens, size_t *n, int *width,
                Err *err) {
    if (size < SHARD_HEADER)
        return err_set(err, E_FORMAT, "%s: %zu bytes; a token shard has a header of %d", what, size, SHARD_HEADER);
    uint32_t magic = le32(file), version = le32(file + 4), count = le32(file + 8);
    if (magic == 20240520u && version == 1) *width = 2;
    else if (magic == 20240801u && version == 7) *width = 4;
    else
        return err_set(err, E_FORMAT, "%s: magic %u version %u; expected 20240520 version 1 (16-bit tokens) or "
                       "20240801 version 7 (32-bit tokens): tokenize the text again", what, magic, version);
    if (count > INT32_MAX || size - SHARD_HEADER != (size_t)count * (size_t)*width)
        return err_set(err, E_FORMAT, "%s: the header says %u tokens of %d bytes, the file holds %zu bytes of them: it "
                       "is truncated or damaged", what, count, *width, size - SHARD_HEADER);
    *tokens = file + SHARD_HEADER;
    *n = count;
    return 0;
}

static int check_ids(const int32_t *tokens, size_t n, int V, const char *what, Err *err) {
    for (size_t i = 0; i < n; i++)
        if ((uint32_t)tokens[i] >= (uint32_t)V)
            return err_set(err, E_USAGE, "%s: token %zu has id %u; the model's vocabulary has %d: the data were "
                           "tokenized for another model", what, i, (uint32_t)tokens[i], V);
    return 0;
}

static int load_shards(TokenData *d, Sources *s, int V, Err *err) {
    size_t total = 0;
    const uint8_t *p;
    size_t n;
    int width, rc;
    for (size_t i = 0; i < s->n; i++) {
        const Source *f = &s->file[i];
        if ((rc = shard_parse(f->map.data, f->map.size, f->path, &p, &n, &width, err)) < 0) return rc;
        total += n;
    }
    if (s->n == 1 && width == 4) {                              // the map itself
        if ((rc = check_ids((const int32_t *)(const void *)p, n, V, s->file[0].path, err)) < 0) return rc;
        d->map = s->file[0].map;
        s->file[0].map = (FileMap){0};
        d->tokens = (const int32_t *)(const void *)p;
        d->n = n;
        return 0;
    }
    d->owned = malloc((total + 1) * sizeof *d->owned);
    if (!d->owned) return err_set(err, E_NOMEM, "no memory for %zu tokens", total);
    size_t at = 0;
    for (size_t i = 0; i < s->n; i++) {
        shard_parse(s->file[i].map.data, s->file[i].map.size, s->file[i].path, &p, &n, &width, err);
        if (width == 4) memcpy(d->owned + at, p, n * 4);
        else for (size_t k = 0; k < n; k++) d->owned[at + k] = p[2 * k] | p[2 * k + 1] << 8;
        if ((rc = check_ids(d->owned + at, n, V, s->file[i].path, err)) < 0) return rc;
        at += n;
    }
    d->tokens = d->owned;
    d->n = total;
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Text.

int jsonl_text(const char *s, size_t len, const char *what, size_t line, char **text, size_t *text_len, Err *err) {
    *text = NULL;
    *text_len = 0;
    size_t k = 0;
    while (k < len && (s[k] == ' ' || s[k] == '\t' || s[k] == '\r')) k++;
    if (k == len) return 0;
    Err why;
    cJSON *o = json_parse(s, len, "line", &why);
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(o, "text");
    int rc = 0;
    if (!o) rc = err_set(err, E_FORMAT, "%s, line %zu: %s", what, line, why.text);
    else if (!cJSON_IsString(v))
        rc = err_set(err, E_FORMAT, "%s, line %zu: no string \"text\"; expected {\"text\": \"...\"} on each line", what,
                     line);
    else if (!(*text = strdup(v->valuestring))) rc = err_set(err, E_NOMEM, "%s, line %zu: no memory", what, line);
    if (rc == 0) *text_len = strlen(*text);
    cJSON_Delete(o);
    return rc;
}

// What one thread tokenizes: a piece of a text, cut where the ids do not feel it, or whole lines of JSON.
typedef struct {
    const Source *file;
    const char *p; size_t len;
    bool begins, ends;                     // this piece begins or ends its document
    size_t line;                           // number of the first line of JSON
    int32_t *ids; size_t n;
} Part;
typedef struct { Part *part; size_t n, cap; } Parts;

static int add_part(Parts *ps, Part p, Err *err) {
    if (ps->n == ps->cap) {
        size_t cap = ps->cap ? 2 * ps->cap : 64;
        Part *bigger = realloc(ps->part, cap * sizeof *bigger);
        if (!bigger) return err_set(err, E_NOMEM, "no memory to cut the data into %zu parts", cap);
        ps->part = bigger;
        ps->cap = cap;
    }
    ps->part[ps->n++] = p;
    return 0;
}

static int cut_source(Parts *ps, const Source *f, const Tokenizer *tok, Err *err) {
    const char *p = (const char *)f->map.data;
    size_t size = f->map.size, line = 1;
    for (size_t at = 0, end; at < size; at = end) {
        Part part = {.file = f, .p = p + at, .begins = at == 0, .line = line};
        end = size - at <= PART_BYTES ? size : at + PART_BYTES;
        if (f->kind == KIND_JSONL) {
            const char *nl = end < size ? memchr(p + end, '\n', size - end) : NULL;
            end = nl ? (size_t)(nl - p) + 1 : size;
            for (const char *c = p + at; (c = memchr(c, '\n', (size_t)(p + end - c))); c++) line++;
        } else if (end < size) {
            end = at + tokenizer_safe_cut(tok, p + at, size - at, PART_BYTES);
        }
        part.len = end - at;
        part.ends = end == size;
        int rc = add_part(ps, part, err);
        if (rc < 0) return rc;
    }
    return 0;
}

static int append(Part *p, size_t *cap, const int32_t *ids, size_t n, Err *err) {
    if (!n) return 0;
    if (*cap - p->n < n) {
        size_t want = *cap ? 2 * *cap : PART_BYTES / 16;
        if (want - p->n < n) want = p->n + n;
        int32_t *bigger = realloc(p->ids, want * sizeof *bigger);
        if (!bigger) return err_set(err, E_NOMEM, "%s: no memory for %zu tokens", p->file->path, want);
        p->ids = bigger;
        *cap = want;
    }
    memcpy(p->ids + p->n, ids, n * sizeof *ids);
    p->n += n;
    return 0;
}

// `around`: each document gets bos and eos.
static int tokenize_part(Part *p, const Tokenizer *tok, bool around, Err *err) {
    int32_t bos = tokenizer_bos(tok), eos = tokenizer_eos(tok), *ids;
    size_t n, cap = 0;
    int rc = 0;
    if (p->file->kind == KIND_TEXT) {
        rc = p->begins ? tokenizer_encode(tok, p->p, p->len, true, &ids, &n, err)
                       : tokenizer_encode_more(tok, p->p, p->len, true, &ids, &n, err);
        if (rc < 0 || !around) {
            p->ids = ids;
            p->n = n;
            return rc;
        }
        if (p->begins && bos >= 0) rc = append(p, &cap, &bos, 1, err);
        if (rc == 0) rc = append(p, &cap, ids, n, err);
        if (rc == 0 && p->ends && eos >= 0) rc = append(p, &cap, &eos, 1, err);
        free(ids);
        return rc;
    }
    size_t line = p->line;
    for (size_t at = 0, end; at < p->len && rc == 0; at = end + 1, line++) {
        const char *nl = memchr(p->p + at, '\n', p->len - at);
        char *text;
        size_t len;
        end = nl ? (size_t)(nl - p->p) : p->len;
        rc = jsonl_text(p->p + at, end - at, p->file->path, line, &text, &len, err);
        if (rc < 0 || !text) continue;
        rc = tokenizer_encode(tok, text, len, true, &ids, &n, err);
        free(text);
        if (rc < 0) continue;
        if (bos >= 0) rc = append(p, &cap, &bos, 1, err);
        if (rc == 0) rc = append(p, &cap, ids, n, err);
        if (rc == 0 && eos >= 0) rc = append(p, &cap, &eos, 1, err);
        free(ids);
    }
    return rc;
}

static int tokenize(TokenData *d, const Sources *s, const Tokenizer *tok, Err *err) {
    Parts ps = {0};
    bool around = s->n > 1 || s->file[0].kind == KIND_JSONL;
    int rc = 0;
    for (size_t i = 0; i < s->n && rc == 0; i++) rc = cut_source(&ps, &s->file[i], tok, err);

    size_t failed = SIZE_MAX, done = 0;                         // the first part that failed: its message is kept
    Progress bar;
    bool show = s->bytes >= PROGRESS_BYTES;
    if (rc == 0) {
        if (show) progress_begin(&bar, "tokenizing", (double)s->bytes);
        #pragma omp parallel for schedule(dynamic, 1)
        for (size_t i = 0; i < ps.n; i++) {
            size_t stop, sum;
            #pragma omp atomic read
            stop = failed;
            if (i > stop) continue;
            Err mine;
            int bad = tokenize_part(&ps.part[i], tok, around, &mine);
            #pragma omp critical (tokenize_failed)
            if (bad < 0 && i < failed) {
                failed = i;
                rc = bad;
                if (err) *err = mine;
            }
            #pragma omp atomic capture
            sum = done += ps.part[i].len;
            if (show && omp_get_thread_num() == 0) progress_update(&bar, (double)sum, NULL);
        }
        if (show) progress_end(&bar);
    }
    size_t total = 0;
    for (size_t i = 0; i < ps.n; i++) total += ps.part[i].n;
    if (rc == 0 && !(d->owned = malloc((total + 1) * sizeof *d->owned)))
        rc = err_set(err, E_NOMEM, "no memory for %zu tokens", total);
    for (size_t i = 0; i < ps.n; i++) {
        if (rc == 0 && ps.part[i].n) memcpy(d->owned + d->n, ps.part[i].ids, ps.part[i].n * sizeof *d->owned);
        d->n += ps.part[i].n;
        free(ps.part[i].ids);
    }
    free(ps.part);
    d->tokens = d->owned;
    return rc;
}

// ---------------------------------------------------------------------------------------------
// The cache: one file a key. Header of 64 bytes: magic, version, key of content, of tokenizer, bytes of content, count,
// checksum of the tokens; then the tokens, i32. All in the machine's byte order, which the magic tells.

#define CACHE_MAGIC 0x4B4F5443u
#define CACHE_VERSION 1u
typedef struct {
    uint32_t magic, version;
    uint64_t content, tokenizer, bytes, count, checksum, zero[2];
} CacheHeader;

// Four independent chains of multiply and fold over 32 bytes a step, so that it runs at the speed of memory.
static uint64_t content_hash(const void *data, size_t len, uint64_t seed) {
    const uint8_t *p = data;
    uint64_t h[4] = {seed, seed ^ 0x9E3779B97F4A7C15u, seed + 0xD6E8FEB86659FD93u, ~seed};
    uint8_t tail[32] = {0};
    for (size_t left = len;; left -= 32, p += 32) {
        if (left < 32) { memcpy(tail, p ? p : tail, left); p = tail; }
        for (int k = 0; k < 4; k++) {
            uint64_t w;
            memcpy(&w, p + 8 * k, 8);
            h[k] = (h[k] ^ w) * 0xD6E8FEB86659FD93u;
            h[k] ^= h[k] >> 32;
        }
        if (left < 32) break;
    }
    uint64_t r = len;
    for (int k = 0; k < 4; k++) { r = (r ^ h[k]) * 0x9E3779B97F4A7C15u; r ^= r >> 29; }
    return r;
}

static CacheHeader cache_key(const Sources *s, const Tokenizer *tok) {
    CacheHeader h = {.magic = CACHE_MAGIC, .version = CACHE_VERSION, .tokenizer = tokenizer_hash(tok),
                     .bytes = s->bytes};
    h.content = s->n;                                           // where one file ends matters: bos and eos go there
    for (size_t i = 0; i < s->n; i++)
        h.content = content_hash(s->file[i].map.data, s->file[i].map.size, h.content ^ (uint64_t)s->file[i].kind);
    return h;
}

// Takes the tokens from the cache if it holds just these, unharmed. Whatever is wrong with it, they are made again.
static bool cache_read(TokenData *d, const char *path, const CacheHeader *key) {
    if (!path_exists(path) || file_map(&d->map, path, NULL) < 0) return false;
    CacheHeader h;
    bool good = d->map.size >= sizeof h;
    if (good) {
        memcpy(&h, d->map.data, sizeof h);
        good = h.magic == key->magic && h.version == key->version && h.content == key->content &&
               h.tokenizer == key->tokenizer && h.bytes == key->bytes && h.count <= SIZE_MAX / 8 &&
               d->map.size == sizeof h + h.count * 4 &&
               h.checksum == content_hash(d->map.data + sizeof h, d->map.size - sizeof h, h.count);
    }
    if (!good) {
        fprintf(stderr, "%s: %s is damaged or of another version; the text is tokenized again\n", program_name, path);
        file_unmap(&d->map);
        d->map = (FileMap){0};
        return false;
    }
    d->tokens = (const int32_t *)(const void *)(d->map.data + sizeof h);
    d->n = (size_t)h.count;
    return true;
}

// A cache that cannot be written costs time in the next run, not this one: a warning, no error.
static void cache_write(const TokenData *d, const char *path, CacheHeader h) {
    Err err;
    AtomicFile a;
    h.count = d->n;
    h.checksum = content_hash(d->tokens, d->n * 4, d->n);
    int rc = atomic_open(&a, path, &err);
    if (rc == 0) {
        atomic_write(&a, &h, sizeof h);
        atomic_write(&a, d->tokens, d->n * 4);
        rc = atomic_commit(&a, &err);
    }
    if (rc < 0) fprintf(stderr, "%s: the tokens are not cached: %s\n", program_name, err.text);
}

static int load_text(TokenData *d, const Sources *s, const Tokenizer *tok, const char *cache_dir, Err *err) {
    if (!s->bytes) return err_set(err, E_USAGE, "%s: empty; expected text", s->file[0].path);
    if (!cache_dir) return tokenize(d, s, tok, err);
    CacheHeader key = cache_key(s, tok);
    char path[1024];
    int rc = make_dir(cache_dir, err);
    if (rc < 0) return rc;
    int len = snprintf(path, sizeof path, "%s/tokens-%016llx-%016llx.cache", cache_dir, (unsigned long long)key.content,
                       (unsigned long long)key.tokenizer);
    if (len < 0 || (size_t)len >= sizeof path) return err_set(err, E_USAGE, "%s: the path is too long", cache_dir);
    if (cache_read(d, path, &key)) return 0;
    if ((rc = tokenize(d, s, tok, err)) < 0) return rc;
    cache_write(d, path, key);
    return 0;
}

int token_data_load(TokenData *d, const char *path, const Tokenizer *tok, int V, const char *cache_dir, Err *err) {
    Sources s = {0};
    *d = (TokenData){0};
    int rc = find_files(&s, path, err);
    if (rc == 0 && s.file[0].kind == KIND_SHARD) {
        rc = load_shards(d, &s, V, err);
    } else if (rc == 0) {
        rc = tok ? load_text(d, &s, tok, cache_dir, err)
                 : err_set(err, E_USAGE, "%s: text needs a tokenizer; give .bin shards or a model with one", path);
        if (rc == 0) rc = check_ids(d->tokens, d->n, V, path, err);
    }
    if (rc == 0 && d->n < 2)
        rc = err_set(err, E_USAGE, "%s: %zu tokens; expected two or more, one to read and one to predict", path, d->n);
    free_sources(&s);
    if (rc < 0) {
        token_data_free(d);
        return rc;
    }
    d->hash = content_hash(d->tokens, d->n * 4, 0);
    return 0;
}

void token_data_free(TokenData *d) {
    free(d->owned);
    file_unmap(&d->map);
    *d = (TokenData){0};
}

// ---------------------------------------------------------------------------------------------
// Batches.

// Fisher-Yates, keyed by (seed, epoch). A 64-bit draw is scaled to 0..i by its high product: the bias is below 2^-32.
static void shuffle(DataLoader *dl, uint64_t epoch) {
    for (uint64_t i = 0; i < dl->n_windows; i++) dl->order[i] = (uint32_t)i;
    for (uint64_t i = dl->n_windows - 1; i > 0; i--) {
        Philox r = philox(dl->seed, PAIR_STREAM ^ epoch, i);
        uint64_t draw = (uint64_t)r.v[0] << 32 | r.v[1];
        // draw * (i + 1) >> 64, for i + 1 <= 2^32
        uint64_t k = ((draw >> 32) * (i + 1) + ((draw & 0xFFFFFFFFu) * (i + 1) >> 32)) >> 32;
        uint32_t x = dl->order[i];
        dl->order[i] = dl->order[k];
        dl->order[k] = x;
    }
    dl->order_epoch = epoch;
}

int dataloader_init(DataLoader *dl, const TokenData *data, int B, int T, bool shuffled, uint64_t seed, Err *err) {
    *dl = (DataLoader){.data = data, .B = B, .T = T, .shuffle = shuffled, .seed = seed, .R = 1};
    if (B < 1 || T < 1)
        return err_set(err, E_USAGE, "batches of %d sequences of %d tokens; expected 1 or more of each", B, T);
    if (data->n < 2) return err_set(err, E_USAGE, "%zu tokens of data; expected two or more", data->n);
    dl->n_windows = (data->n - 1) / (size_t)T;
    if (!dl->n_windows) dl->n_windows = 1;
    if (dl->n_windows > UINT32_MAX)
        return err_set(err, E_USAGE, "%llu windows of %d tokens; expected at most %u: use longer sequences",
                       (unsigned long long)dl->n_windows, T, UINT32_MAX);
    if (!shuffled) return 0;
    dl->order = malloc((size_t)dl->n_windows * sizeof *dl->order);
    if (!dl->order)
        return err_set(err, E_NOMEM, "no memory to shuffle %llu windows", (unsigned long long)dl->n_windows);
    shuffle(dl, 0);
    return 0;
}

void dataloader_ranks(DataLoader *dl, int rank, int R) {
    dl->rank = rank;
    dl->R = R;
}

void dataloader_free(DataLoader *dl) {
    free(dl->order);
    *dl = (DataLoader){0};
}

void dataloader_seek(DataLoader *dl, uint64_t position) { dl->position = position; }

void dataloader_next(DataLoader *dl, int32_t *tokens, int32_t *targets) {
    size_t T = (size_t)dl->T, n = dl->data->n;
    uint64_t R = (uint64_t)dl->R;
    for (int b = 0; b < dl->B; b++) {
        uint64_t at = dl->position + (uint64_t)b * R + (uint64_t)dl->rank;
        uint64_t epoch = at / dl->n_windows, w = at % dl->n_windows;
        if (dl->shuffle) {
            if (epoch != dl->order_epoch) shuffle(dl, epoch);
            w = dl->order[w];
        }
        const int32_t *p = dl->data->tokens + w * T;
        int32_t *x = tokens + (size_t)b * T, *y = targets + (size_t)b * T;
        size_t k = n - 1 - (size_t)w * T < T ? n - 1 - (size_t)w * T : T;   // less than T only in the one short window
        memcpy(x, p, k * sizeof *x);
        memcpy(y, p + 1, k * sizeof *y);
        for (size_t t = k; t < T; t++) { x[t] = 0; y[t] = -1; }
    }
    dl->position += (uint64_t)dl->B * R;
}
