// Tokenizers in and out: tokenizer.json, GGUF metadata, and the blob inside model.bin.
#include "tokenizer_impl.h"
#include "json.h"
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define ID_SLACK 65536                     // how far ids may exceed the number of tokens: holes are allowed, not oceans

static const char *const KIND_NAME[STEP_KINDS] = {"Prepend", "Replace", "Split", "Digits", "ByteLevel", "Metaspace"};
static const char *const BEHAVIOR_NAME[SPLIT_BEHAVIORS] = {"Removed", "Isolated", "MergedWithPrevious",
                                                           "MergedWithNext", "Contiguous"};

static char *copy_bytes(const char *s, size_t len) {
    char *p = xmalloc(len + 1);
    memcpy(p, s, len);
    p[len] = 0;
    return p;
}

static Step step_make(StepKind kind, Behavior how, int flags, const char *a, const char *b) {
    Step s = {.kind = (uint8_t)kind, .behavior = (uint8_t)how, .flags = (uint8_t)flags};
    if (a) { s.a = xstrdup(a); s.a_len = (uint32_t)strlen(a); }
    if (b) { s.b = xstrdup(b); s.b_len = (uint32_t)strlen(b); }
    return s;
}

// A tokenizer of no consistent meaning is refused before anything is built on it. Whoever built t has checked ids,
// UTF-8 and spans.
static int check(const Tokenizer *t, Err *err) {
    for (int i = 0; i < t->n_norm + t->n_pre; i++) {
        const Step *s = i < t->n_norm ? &t->norm[i] : &t->pre[i - t->n_norm];
        if (s->a_len > MAX_PATTERN || s->b_len > MAX_PATTERN)
            return err_set(err, E_FORMAT, "tokenizer: a %s with a text of %u bytes; expected at most %d",
                           KIND_NAME[s->kind], s->a_len > s->b_len ? s->a_len : s->b_len, MAX_PATTERN);
    }
    bool byte_level = t->options & OPT_BYTE_LEVEL;
    for (int i = 0; i < t->n_pre; i++)
        if (t->pre[i].kind == PRE_BYTE_LEVEL ? !byte_level || i != t->n_pre - 1 : i == t->n_pre - 1 && byte_level)
            return err_set(err, E_FORMAT, "tokenizer: ByteLevel is pre-tokenizer %d of %d; expected the last", i + 1,
                           t->n_pre);
    if (byte_level && !t->n_pre) return err_set(err, E_FORMAT, "tokenizer: byte-level without a ByteLevel "
                                                "pre-tokenizer");
    for (int i = 0; i < t->n_norm; i++)
        if (!t->norm[i].a_len) return err_set(err, E_FORMAT, "tokenizer: a %s normalizer with an empty text",
                                              KIND_NAME[t->norm[i].kind]);
    for (int i = 0; i < t->n_pre; i++)
        if (t->pre[i].kind == PRE_METASPACE && !t->pre[i].a_len)
            return err_set(err, E_FORMAT, "tokenizer: a Metaspace pre-tokenizer with an empty replacement");
    for (int k = 0; k < 3; k++) {
        int32_t id = k == 0 ? t->bos : k == 1 ? t->eos : t->unk;
        if (id < -1 || id >= t->n || (id >= 0 && !t->flags[id]))
            return err_set(err, E_FORMAT, "tokenizer: %s id %d is no token; expected 0 to %d",
                           k == 0 ? "bos" : k == 1 ? "eos" : "unknown", id, t->n - 1);
    }
    for (int m = 0; m < t->n_merges; m++) {
        const int32_t *p = &t->merges[m].a;
        for (int k = 0; k < 3; k++)
            if (p[k] < 0 || p[k] >= t->n || !(t->flags[p[k]] & TOK_MODEL) || !t->span[p[k]].len)
                return err_set(err, E_FORMAT, "tokenizer: merge %d names token %d, which the vocabulary lacks", m,
                               p[k]);
        Span a = t->span[p[0]], b = t->span[p[1]], c = t->span[p[2]];
        if (c.len != a.len + b.len || memcmp(t->text.p + c.off, t->text.p + a.off, a.len) ||
            memcmp(t->text.p + c.off + a.len, t->text.p + b.off, b.len))
            return err_set(err, E_FORMAT, "tokenizer: merge %d of tokens %d and %d gives token %d, which is spelled "
                           "otherwise", m, p[0], p[1], p[2]);
    }
    return 0;
}

static int finish(Tokenizer **out, Tokenizer *t, int rc, Err *err) {
    if (rc == 0 && t->text.failed) rc = err_set(err, E_NOMEM, "tokenizer: no memory for its tokens");
    if (rc == 0) rc = check(t, err);
    if (rc == 0) rc = tokenizer_finish(t, err);
    if (rc < 0) {
        tokenizer_free(t);
        return rc;
    }
    *out = t;
    return 0;
}

// The same checks for every source of a token's spelling.
static int put_token(Tokenizer *t, int32_t id, const char *s, size_t len, int flags, Err *err) {
    if (len > MAX_TOKEN_BYTES)
        return err_set(err, E_FORMAT, "tokenizer: token %d has %zu bytes; expected at most %u", id, len,
                       MAX_TOKEN_BYTES);
    if (!utf8_valid(s, len)) return err_set(err, E_FORMAT, "tokenizer: token %d is not valid UTF-8", id);
    Span have = t->span[id];
    if (t->flags[id] && (have.len != len || memcmp(t->text.p + have.off, s, len)))
        return err_set(err, E_FORMAT, "tokenizer: id %d belongs to \"%.*s\" and to \"%.*s\"", id,
                       have.len > 60 ? 60 : (int)have.len, (const char *)t->text.p + have.off, len > 60 ? 60 :
                           (int)len, s);
    tokenizer_put(t, id, s, len, flags);
    return t->text.failed ? err_set(err, E_NOMEM, "tokenizer: no memory for its tokens") : 0;
}

// ---------------------------------------------------------------------------------------------
// tokenizer.json in.

static const cJSON *field(const cJSON *o, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(o, key);
    return v && !cJSON_IsNull(v) ? v : NULL;
}

static bool truth(const cJSON *o, const char *key, bool missing) {
    const cJSON *v = field(o, key);
    return v ? cJSON_IsTrue(v) : missing;
}

static int json_id(const cJSON *v, int count, const char *name, int32_t *id, Err *err) {
    double d = cJSON_IsNumber(v) ? v->valuedouble : -1;
    if (!(d >= 0 && d < (double)count + ID_SLACK) || d != (double)(int32_t)d)
        return err_set(err, E_FORMAT, "tokenizer.json: id of \"%.60s\" is %g; expected an integer from 0 to %d",
                       name, d,
                       count + ID_SLACK - 1);
    *id = (int32_t)d;
    return 0;
}

static int add_step(Step *steps, int *n, Step s, Err *err) {
    if (*n == MAX_STEPS) {
        free(s.a);
        free(s.b);
        return err_set(err, E_FORMAT, "tokenizer.json: more than %d steps in one pipeline", MAX_STEPS);
    }
    steps[(*n)++] = s;
    return 0;
}

// {"String": "..."} or {"Regex": "..."}
static const char *pattern_text(const cJSON *o, const char *key, bool *regex) {
    const cJSON *p = field(o, key);
    const char *s = json_string(p, "String");
    *regex = !s;
    return s ? s : json_string(p, "Regex");
}

static int read_normalizer(Tokenizer *t, const cJSON *o, Err *err) {
    if (!o || cJSON_IsNull(o)) return 0;
    const char *type = json_string(o, "type");
    if (!type) return err_set(err, E_FORMAT, "tokenizer.json: a normalizer without a type");
    if (!strcmp(type, "Sequence")) {
        const cJSON *k;
        cJSON_ArrayForEach(k, field(o, "normalizers")) {
            int rc = read_normalizer(t, k, err);
            if (rc < 0) return rc;
        }
        return 0;
    }
    if (!strcmp(type, "Prepend")) {
        const char *s = json_string(o, "prepend");
        if (!s) return err_set(err, E_FORMAT, "tokenizer.json: a Prepend normalizer without \"prepend\"");
        return add_step(t->norm, &t->n_norm, step_make(NORM_PREPEND, SPLIT_REMOVED, 0, s, NULL), err);
    }
    if (!strcmp(type, "Replace")) {
        bool regex;
        const char *from = pattern_text(o, "pattern", &regex), *to = json_string(o, "content");
        if (!from || !to || regex)
            return err_set(err, E_FORMAT, "tokenizer.json: a Replace normalizer needs a \"String\" pattern and "
                           "\"content\"");
        return add_step(t->norm, &t->n_norm, step_make(NORM_REPLACE, SPLIT_REMOVED, 0, from, to), err);
    }
    return err_set(err, E_FORMAT, "tokenizer.json: normalizer %.60s is not supported; known: Sequence, Prepend, "
                   "Replace", type);
}

static int read_pre_tokenizer(Tokenizer *t, const cJSON *o, Err *err) {
    if (!o || cJSON_IsNull(o)) return 0;
    const char *type = json_string(o, "type");
    if (!type) return err_set(err, E_FORMAT, "tokenizer.json: a pre-tokenizer without a type");
    if (!strcmp(type, "Sequence")) {
        const cJSON *k;
        cJSON_ArrayForEach(k, field(o, "pretokenizers")) {
            int rc = read_pre_tokenizer(t, k, err);
            if (rc < 0) return rc;
        }
        return 0;
    }
    Step s;
    if (!strcmp(type, "Split")) {
        bool regex;
        const char *p = pattern_text(o, "pattern", &regex), *how = json_string(o, "behavior");
        int b = 0;
        while (how && b < SPLIT_BEHAVIORS && strcmp(how, BEHAVIOR_NAME[b])) b++;
        if (!p) return err_set(err, E_FORMAT, "tokenizer.json: a Split without a pattern");
        if (!how || b == SPLIT_BEHAVIORS)
            return err_set(err, E_FORMAT, "tokenizer.json: Split behavior %.60s is unknown; known: Removed, Isolated, "
                           "MergedWithPrevious, MergedWithNext, Contiguous", how ? how : "(none)");
        int flags = (regex ? 0 : STEP_LITERAL) | (truth(o, "invert", false) ? STEP_INVERT : 0);
        s = step_make(PRE_SPLIT, (Behavior)b, flags, p, NULL);
    } else if (!strcmp(type, "Digits")) {
        s = step_make(PRE_DIGITS, truth(o, "individual_digits", false) ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS, 0, NULL,
                      NULL);
    } else if (!strcmp(type, "ByteLevel")) {
        t->options |= OPT_BYTE_LEVEL;
        s = step_make(PRE_BYTE_LEVEL, SPLIT_ISOLATED, (truth(o, "add_prefix_space", true) ? STEP_PREFIX : 0) |
                      (truth(o, "use_regex", true) ? STEP_REGEX : 0), NULL, NULL);
    } else if (!strcmp(type, "Metaspace")) {
        const char *scheme = json_string(o, "prepend_scheme"), *mark = json_string(o, "replacement");
        if (!scheme) scheme = truth(o, "add_prefix_space", true) ? "always" : "never";   // before tokenizers 0.16
        int prefix = !strcmp(scheme, "always") ? STEP_PREFIX : !strcmp(scheme, "first") ?
            STEP_PREFIX | STEP_FIRST_ONLY : 0;
        if (!prefix && strcmp(scheme, "never"))
            return err_set(err, E_FORMAT, "tokenizer.json: Metaspace prepend_scheme %.60s is unknown; known: always, "
                           "first, never", scheme);
        s = step_make(PRE_METASPACE, SPLIT_MERGED_NEXT, prefix | (truth(o, "split", true) ? STEP_SPLIT : 0),
                      mark ? mark : SPACE_MARK, NULL);
    } else {
        return err_set(err, E_FORMAT, "tokenizer.json: pre-tokenizer %.60s is not supported; known: Sequence, Split, "
                       "Digits, ByteLevel, Metaspace", type);
    }
    return add_step(t->pre, &t->n_pre, s, err);
}

// A TemplateProcessing that puts special tokens around the text tells bos and eos. Returns -1 where there is none.
static void read_template(Tokenizer *t, const cJSON *o) {
    const cJSON *k;
    if (!o) return;
    cJSON_ArrayForEach(k, field(o, "processors")) read_template(t, k);
    bool after = false;
    cJSON_ArrayForEach(k, field(o, "single")) {
        const char *name = json_string(field(k, "SpecialToken"), "id");
        if (field(k, "Sequence")) after = true;
        if (!name) continue;
        int32_t id = tokenizer_id_of(t, name, strlen(name));
        if (id < 0) continue;
        if (after) { t->eos = id; t->options |= OPT_ADD_EOS; }
        else { t->bos = id; t->options |= OPT_ADD_BOS; }
    }
}

// Where no file says which tokens begin and end a text, the names in use do.
static void guess_bos_eos(Tokenizer *t) {
    static const char *const bos[] = {"<s>", "<|begin_of_text|>", "<bos>", NULL};
    static const char *const eos[] = {"</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", NULL};
    for (int i = 0; t->bos < 0 && bos[i]; i++) t->bos = tokenizer_id_of(t, bos[i], strlen(bos[i]));
    for (int i = 0; t->eos < 0 && eos[i]; i++) t->eos = tokenizer_id_of(t, eos[i], strlen(eos[i]));
}

// "a b", split at its only space, or ["a", "b"].
static int read_merge(Tokenizer *t, const cJSON *m, int rank, Merge *out, Err *err) {
    const char *a = NULL, *b = NULL;
    size_t a_len = 0, b_len = 0;
    if (cJSON_IsString(m)) {
        const char *s = m->valuestring, *space = strchr(s, ' ');
        if (space && !strchr(space + 1, ' ')) {
            a = s; a_len = (size_t)(space - s);
            b = space + 1; b_len = strlen(b);
        }
    } else if (cJSON_IsArray(m) && cJSON_GetArraySize(m) == 2 && cJSON_IsString(m->child) &&
               cJSON_IsString(m->child->next)) {
        a = m->child->valuestring; a_len = strlen(a);
        b = m->child->next->valuestring; b_len = strlen(b);
    }
    if (!a || !a_len || !b_len)
        return err_set(err, E_FORMAT, "tokenizer.json: merge %d is neither \"a b\" nor [\"a\", \"b\"]", rank);
    char small[256], *ab = a_len + b_len <= sizeof small ? small : xmalloc(a_len + b_len);
    memcpy(ab, a, a_len);
    memcpy(ab + a_len, b, b_len);
    *out = (Merge){table_find(&t->by_text, &t->text, t->span, a, a_len), table_find(&t->by_text, &t->text, t->span,
        b, b_len),
                   table_find(&t->by_text, &t->text, t->span, ab, a_len + b_len)};
    if (ab != small) free(ab);
    if (out->a < 0 || out->b < 0 || out->c < 0)
        return err_set(err, E_FORMAT, "tokenizer.json: merge %d (\"%.60s\", \"%.60s\") has a part or a result that "
                       "the vocabulary lacks", rank, a, b);
    return 0;
}

static int read_model(Tokenizer *t, const cJSON *model, Err *err) {
    const char *type = json_string(model, "type"), *unk = json_string(model, "unk_token");
    if (type && strcmp(type, "BPE"))
        return err_set(err, E_FORMAT, "tokenizer.json: model type %.60s is not supported; known: BPE", type);
    static const char *const affix[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (int i = 0; i < 2; i++) {
        const char *s = json_string(model, affix[i]);
        if (s && *s) return err_set(err, E_FORMAT, "tokenizer.json: %s \"%.60s\" is not supported; expected null",
                                    affix[i], s);
    }
    const cJSON *dropout = field(model, "dropout");
    if (dropout && dropout->valuedouble != 0)
        return err_set(err, E_FORMAT, "tokenizer.json: dropout %g is not supported; expected null",
                       dropout->valuedouble);
    if (truth(model, "fuse_unk", false)) t->options |= OPT_FUSE_UNK;
    if (truth(model, "byte_fallback", false)) t->options |= OPT_BYTE_FALLBACK;
    if (truth(model, "ignore_merges", false)) t->options |= OPT_IGNORE_MERGES;
    if ((t->options & OPT_BYTE_LEVEL) && (t->options & OPT_BYTE_FALLBACK))
        return err_set(err, E_FORMAT, "tokenizer.json: byte_fallback together with ByteLevel is not supported");
    if (unk && (t->unk = table_find(&t->by_text, &t->text, t->span, unk, strlen(unk))) < 0)
        return err_set(err, E_FORMAT, "tokenizer.json: unk_token \"%.60s\" is not in the vocabulary", unk);
    const cJSON *merges = field(model, "merges"), *m;
    if (!cJSON_IsArray(merges)) return err_set(err, E_MISSING, "tokenizer.json: model.merges is missing");
    int n = cJSON_GetArraySize(merges);
    t->merges = xcalloc((size_t)n + 1, sizeof *t->merges);
    cJSON_ArrayForEach(m, merges) {
        int rc = read_merge(t, m, t->n_merges, &t->merges[t->n_merges], err);
        if (rc < 0) return rc;
        t->n_merges++;
    }
    return 0;
}

static int read_added(Tokenizer *t, const cJSON *added, int count, Err *err) {
    const cJSON *a;
    cJSON_ArrayForEach(a, added) {
        const char *s = json_string(a, "content");
        int32_t id = -1;
        if (!s) return err_set(err, E_FORMAT, "tokenizer.json: an added token without content");
        int rc = json_id(cJSON_GetObjectItemCaseSensitive(a, "id"), count, s, &id, err);
        if (rc < 0) return rc;
        if (!*s) continue;                                      // `tokenizers` ignores them too
        int32_t model = table_find(&t->by_text, &t->text, t->span, s, strlen(s));
        if (model >= 0 && model != id)
            return err_set(err, E_FORMAT, "tokenizer.json: added token \"%.60s\" has id %d, but %d in the "
                           "vocabulary", s, id, model);
        bool special = truth(a, "special", false);
        int flags = TOK_ADDED | (special ? TOK_SPECIAL : 0) | (truth(a, "lstrip", false) ? TOK_LSTRIP : 0) |
                    (truth(a, "rstrip", false) ? TOK_RSTRIP : 0) | (truth(a, "single_word", false) ?
                                                                    TOK_SINGLE_WORD : 0) |
                    (truth(a, "normalized", !special) ? TOK_NORMALIZED : 0);
        if ((rc = put_token(t, id, s, strlen(s), flags, err)) < 0) return rc;
    }
    return 0;
}

static int read_json(Tokenizer **out, const cJSON *root, const char *text, size_t len, Err *err) {
    const cJSON *model = field(root, "model"), *vocab = field(model, "vocab"), *added = field(root, "added_tokens"), *k;
    if (!cJSON_IsObject(model) || !cJSON_IsObject(vocab))
        return err_set(err, E_MISSING, "tokenizer.json: model.vocab is missing; expected a BPE model with an object "
                       "of tokens");
    int count = cJSON_GetArraySize(vocab) + (cJSON_IsArray(added) ? cJSON_GetArraySize(added) : 0), rc = 0;
    int32_t id = -1, top = -1;
    cJSON_ArrayForEach(k, vocab) {
        if ((rc = json_id(k, count, k->string, &id, err)) < 0) return rc;
        if (id > top) top = id;
    }
    cJSON_ArrayForEach(k, added) {
        const char *s = json_string(k, "content");
        if ((rc = json_id(cJSON_GetObjectItemCaseSensitive(k, "id"), count, s ? s : "", &id, err)) < 0) return rc;
        if (id > top) top = id;
    }
    if (top < 0) return err_set(err, E_FORMAT, "tokenizer.json: the vocabulary is empty");
    Tokenizer *t = tokenizer_new(top + 1);
    cJSON_ArrayForEach(k, vocab)
        if (rc == 0) rc = put_token(t, (int32_t)k->valuedouble, k->string, strlen(k->string), TOK_MODEL, err);
    // The merges need to find tokens by spelling; tokenizer_finish builds the table again.
    if (rc == 0) rc = table_build(&t->by_text, &t->text, t->span, t->flags, t->n, TOK_MODEL, err);
    if (rc == 0) rc = read_normalizer(t, field(root, "normalizer"), err);
    if (rc == 0) rc = read_pre_tokenizer(t, field(root, "pre_tokenizer"), err);
    if (rc == 0) rc = read_model(t, model, err);
    if (rc == 0) rc = read_added(t, added, count, err);
    if (rc == 0) {
        read_template(t, field(root, "post_processor"));
        guess_bos_eos(t);
        for (int i = 0; i < t->n_norm; i++) if (t->norm[i].kind == NORM_PREPEND) t->options |= OPT_STRIP_FIRST;
        for (int i = 0; i < t->n_pre; i++)
            if (t->pre[i].kind == PRE_METASPACE && (t->pre[i].flags & STEP_PREFIX)) t->options |= OPT_STRIP_FIRST;
        t->json = copy_bytes(text, len);
        t->json_len = len;
    }
    free(t->by_text.slot);
    t->by_text.slot = NULL;
    return finish(out, t, rc, err);
}

int tokenizer_from_json(Tokenizer **out, const char *text, size_t len, Err *err) {
    *out = NULL;
    if (!utf8_valid(text, len)) return err_set(err, E_FORMAT, "tokenizer.json is not valid UTF-8");
    cJSON *root = json_parse(text, len, "tokenizer.json", err);
    if (!root) return E_FORMAT;
    int rc = read_json(out, root, text, len, err);
    cJSON_Delete(root);
    return rc;
}

void tokenizer_set_config(Tokenizer *t, const char *config_json, size_t len) {
    cJSON *root = json_parse(config_json, len, "tokenizer_config.json", NULL);
    if (!cJSON_IsObject(root)) {
        cJSON_Delete(root);
        return;
    }
    free(t->config);
    t->config = copy_bytes(config_json, len);
    t->config_len = len;
    for (int k = 0; k < 2; k++) {
        const cJSON *v = cJSON_GetObjectItemCaseSensitive(root, k ? "eos_token" : "bos_token");
        const char *s = cJSON_IsObject(v) ? json_string(v, "content") : cJSON_IsString(v) ? v->valuestring : NULL;
        int32_t id = s ? tokenizer_id_of(t, s, strlen(s)) : -1;
        if (id >= 0 || cJSON_IsNull(v)) *(k ? &t->eos : &t->bos) = id;
    }
    tokenizer_rehash(t);
    cJSON_Delete(root);
}

// ---------------------------------------------------------------------------------------------
// The built-in bytes.

static size_t put_utf8(char s[4], uint32_t cp) {        // cp < 0x800
    if (cp < 128) { s[0] = (char)cp; return 1; }
    s[0] = (char)(0xC0 | cp >> 6);
    s[1] = (char)(0x80 | (cp & 0x3F));
    return 2;
}

Tokenizer *tokenizer_bytes(void) {
    Tokenizer *t = tokenizer_new(258);
    Err err;
    char s[4];
    for (int c = 0; c < 256; c++) {
        size_t len = put_utf8(s, byte_to_alphabet(c));
        tokenizer_put(t, c, s, len, TOK_MODEL);
    }
    tokenizer_put(t, 256, "<|bos|>", 7, TOK_ADDED | TOK_SPECIAL);
    tokenizer_put(t, 257, "<|eos|>", 7, TOK_ADDED | TOK_SPECIAL);
    t->bos = 256;
    t->eos = 257;
    t->options = OPT_BYTE_LEVEL | OPT_BYTES;
    t->pre[t->n_pre++] = step_make(PRE_BYTE_LEVEL, SPLIT_ISOLATED, 0, NULL, NULL);
    t->merges = xcalloc(1, sizeof *t->merges);
    if (tokenizer_finish(t, &err) < 0) die(&err);       // nothing from outside is in it: only memory can be missing
    return t;
}

// ---------------------------------------------------------------------------------------------
// GGUF.

static const GgufValue *gguf_array(Gguf *g, const char *key, bool strings, uint64_t count, bool required, int *rc,
                                   Err *err) {
    const GgufValue *v = gguf_value(g, key);
    if (*rc < 0) return NULL;
    if (!v) {
        if (required) *rc = err_set(err, E_MISSING, "%s is missing: the file carries no usable tokenizer", key);
        return NULL;
    }
    if (v->type != GGUF_ARRAY || (v->elem == GGUF_STRING) != strings || v->elem == GGUF_ARRAY ||
        v->count > INT32_MAX / 2 ||
        (count && v->count != count)) {
        *rc = err_set(err, E_FORMAT, "%s is not an array of %s of the right length (%llu)", key, strings ?
                      "strings" : "numbers",
                      (unsigned long long)(v->type == GGUF_ARRAY ? v->count : 0));
        return NULL;
    }
    return v;
}

static int gguf_pre(Tokenizer *t, Gguf *g, Err *err) {
    static const char known[] = "llama-bpe, llama3, llama-v3, smollm, starcoder, refact, gpt-2, default";
    size_t len = 0;
    const char *s = gguf_get_string(g, "tokenizer.ggml.pre", &len);
    char pre[64] = "";
    if (!s)
        return err_set(err, E_MISSING, "tokenizer.ggml.pre is missing, so how text is split is unknown; convert the "
                       "model to GGUF again with a current converter (known: %s)", known);
    if (len < sizeof pre) memcpy(pre, s, len);
    t->options |= OPT_BYTE_LEVEL;
    if (!strcmp(pre, "llama-bpe") || !strcmp(pre, "llama3") || !strcmp(pre, "llama-v3")) {
        t->options |= OPT_IGNORE_MERGES;
        t->pre[t->n_pre++] = step_make(PRE_SPLIT, SPLIT_ISOLATED, 0, LLAMA3_PATTERN, NULL);
        t->pre[t->n_pre++] = step_make(PRE_BYTE_LEVEL, SPLIT_ISOLATED, 0, NULL, NULL);
    } else if (!strcmp(pre, "smollm") || !strcmp(pre, "starcoder") || !strcmp(pre, "refact")) {
        t->pre[t->n_pre++] = step_make(PRE_DIGITS, SPLIT_ISOLATED, 0, NULL, NULL);
        t->pre[t->n_pre++] = step_make(PRE_BYTE_LEVEL, SPLIT_ISOLATED, STEP_REGEX, NULL, NULL);
    } else if (!strcmp(pre, "gpt-2") || !strcmp(pre, "default")) {
        t->pre[t->n_pre++] = step_make(PRE_BYTE_LEVEL, SPLIT_ISOLATED, STEP_REGEX, NULL, NULL);
    } else {
        return err_set(err, E_FORMAT, "tokenizer.ggml.pre is \"%.*s\"; known: %s", len > 60 ? 60 : (int)len, s, known);
    }
    return 0;
}

static int gguf_merges(Tokenizer *t, Gguf *g, const GgufValue *v, Err *err) {
    t->merges = xcalloc((size_t)v->count + 1, sizeof *t->merges);
    for (uint64_t i = 0; i < v->count; i++) {
        size_t len = 0;
        const char *s = gguf_string_at(g, v, i, &len), *space = s && len > 1 ? memchr(s + 1, ' ', len - 1) : NULL;
        if (!space || space + 1 == s + len || len > 2 * (size_t)MAX_TOKEN_BYTES)
            return err_set(err, E_FORMAT, "tokenizer.ggml.merges[%llu] is not of the form \"a b\"",
                           (unsigned long long)i);
        size_t a = (size_t)(space - s), b = len - a - 1;
        char *ab = xmalloc(a + b);
        memcpy(ab, s, a);
        memcpy(ab + a, space + 1, b);
        Merge *m = &t->merges[t->n_merges++];
        m->a = table_find(&t->by_text, &t->text, t->span, ab, a);
        m->b = table_find(&t->by_text, &t->text, t->span, ab + a, b);
        m->c = table_find(&t->by_text, &t->text, t->span, ab, a + b);
        free(ab);
        if (m->a < 0 || m->b < 0 || m->c < 0)
            return err_set(err, E_FORMAT, "tokenizer.ggml.merges[%llu] \"%.*s\" has a part or a result that the "
                           "vocabulary lacks",
                           (unsigned long long)i, len > 60 ? 60 : (int)len, s);
    }
    return 0;
}

typedef struct { Merge m; double score; } Scored;

static int by_score(const void *x, const void *y) {
    const Scored *a = x, *b = y;
    if (a->score != b->score) return a->score > b->score ? -1 : 1;
    if (a->m.c != b->m.c) return a->m.c < b->m.c ? -1 : 1;
    if (a->m.a != b->m.a) return a->m.a < b->m.a ? -1 : 1;
    return a->m.b < b->m.b ? -1 : a->m.b > b->m.b;
}

// A SentencePiece vocabulary has scores and no merges. Every way to cut a token into two tokens is a merge; they are
// ranked by the score of the token, then by ids: the order in which transformers' converter wrote them for Llama-2 and
// TinyLlama, so that their GGUF files give the merges of their tokenizer.json again.
static int merges_from_scores(Tokenizer *t, const GgufValue *scores, const GgufValue *types, Err *err) {
    size_t n = 0, cap = 1024;
    Scored *all = xmalloc(cap * sizeof *all);
    for (int32_t id = 0; id < t->n; id++) {
        if (types && gguf_int_at(types, (uint64_t)id) != 1) continue;    // control, byte, user-defined: never merged
        const char *s = (const char *)t->text.p + t->span[id].off;
        uint32_t len = t->span[id].len;
        double score = gguf_double_at(scores, (uint64_t)id);
        if (len > 256 || score != score) {
            free(all);
            return err_set(err, E_FORMAT, "tokenizer.ggml: token %d has %u bytes and score %g; expected at most 256 "
                           "bytes and a number", id, len, score);
        }
        for (size_t i = 0; i < len;) {
            utf8_next(s, &i);
            if (i == len) break;
            int32_t a = table_find(&t->by_text, &t->text, t->span, s, i);
            int32_t b = a < 0 ? -1 : table_find(&t->by_text, &t->text, t->span, s + i, len - i);
            if (b < 0) continue;
            if (n == cap) {
                Scored *bigger = xmalloc(2 * cap * sizeof *bigger);
                memcpy(bigger, all, n * sizeof *all);
                free(all);
                all = bigger;
                cap *= 2;
            }
            all[n++] = (Scored){{a, b, id}, score};
        }
    }
    qsort(all, n, sizeof *all, by_score);
    t->merges = xcalloc(n + 1, sizeof *t->merges);
    for (size_t i = 0; i < n; i++) t->merges[i] = all[i].m;
    t->n_merges = (int)n;
    free(all);
    return 0;
}

static int gguf_id(Gguf *g, const char *key, int n, int32_t *id, Err *err) {
    int64_t v = -1;
    int rc = gguf_get_int(g, key, false, -1, (int64_t)UINT32_MAX, &v, err);
    *id = v >= 0 && v < n ? (int32_t)v : -1;            // some converters write 2^32-1 for "none"
    return rc;
}

static int gguf_flag(Gguf *g, const char *key, bool *out, Err *err) {
    int64_t v = *out;
    const GgufValue *k = gguf_value(g, key);
    if (k && k->type == GGUF_BOOL) v = k->data[0] != 0;
    else if (k) return err_set(err, E_FORMAT, "%s is not a boolean", key);
    *out = v != 0;
    return 0;
}

static void json_text(Buf *b, const char *s, size_t len);

static char *default_config(const Tokenizer *t, const char *chat, size_t chat_len) {
    Buf b = {0};
    buf_str(&b, "{\n");
    for (int k = 0; k < 3; k++) {
        int32_t id = k == 0 ? t->bos : k == 1 ? t->eos : t->unk;
        buf_str(&b, k == 0 ? "  \"bos_token\": " : k == 1 ? "  \"eos_token\": " : "  \"unk_token\": ");
        if (id >= 0) json_text(&b, (const char *)t->text.p + t->span[id].off, t->span[id].len);
        else buf_str(&b, "null");
        buf_str(&b, ",\n");
    }
    if (chat && utf8_valid(chat, chat_len)) {
        buf_str(&b, "  \"chat_template\": ");
        json_text(&b, chat, chat_len);
        buf_str(&b, ",\n");
    }
    buf_str(&b, "  \"clean_up_tokenization_spaces\": false,\n  \"model_max_length\": 1000000000000000019884624838656,\n"
            "  \"tokenizer_class\": \"PreTrainedTokenizerFast\"\n}\n");
    buf_put(&b, "", 1);
    if (b.failed) { free(b.p); return NULL; }
    return (char *)b.p;
}

static int read_gguf(Tokenizer *t, Gguf *g, bool spm, const GgufValue *tokens, Err *err) {
    int rc = 0;
    const GgufValue *types = gguf_array(g, "tokenizer.ggml.token_type", false, tokens->count, false, &rc, err);
    const GgufValue *scores = gguf_array(g, "tokenizer.ggml.scores", false, tokens->count, false, &rc, err);
    const GgufValue *merges = gguf_array(g, "tokenizer.ggml.merges", true, 0, !spm, &rc, err);
    if (rc < 0) return rc;
    for (int32_t id = 0; id < t->n; id++) {
        size_t len = 0;
        const char *s = gguf_string_at(g, tokens, (uint64_t)id, &len);
        int64_t type = types ? gguf_int_at(types, (uint64_t)id) : 1;
        // Unknown, control and user-defined tokens are found in the text as they stand.
        int flags = TOK_MODEL | (type >= 2 && type <= 4 ? TOK_ADDED : 0) | (type == 2 || type == 3 ? TOK_SPECIAL : 0);
        if (!s) return err_set(err, E_FORMAT, "tokenizer.ggml.tokens[%d] lies outside of the file", id);
        if (memchr(s, 0, len) || (!len && (flags & TOK_ADDED)))
            return err_set(err, E_FORMAT, "tokenizer.ggml.tokens[%d] is empty or contains a NUL byte", id);
        if ((rc = put_token(t, id, s, len, flags, err)) < 0) return rc;
    }
    if ((rc = table_build(&t->by_text, &t->text, t->span, t->flags, t->n, TOK_MODEL, err)) < 0) return rc;
    if ((rc = gguf_id(g, "tokenizer.ggml.bos_token_id", t->n, &t->bos, err)) < 0) return rc;
    if ((rc = gguf_id(g, "tokenizer.ggml.eos_token_id", t->n, &t->eos, err)) < 0) return rc;
    bool add_bos = spm, add_eos = false, prefix = true, squeeze = false;
    if ((rc = gguf_flag(g, "tokenizer.ggml.add_bos_token", &add_bos, err)) < 0) return rc;
    if ((rc = gguf_flag(g, "tokenizer.ggml.add_eos_token", &add_eos, err)) < 0) return rc;
    if ((rc = gguf_flag(g, "tokenizer.ggml.add_space_prefix", &prefix, err)) < 0) return rc;
    if ((rc = gguf_flag(g, "tokenizer.ggml.remove_extra_whitespaces", &squeeze, err)) < 0) return rc;
    if (add_bos && t->bos >= 0) t->options |= OPT_ADD_BOS;
    if (add_eos && t->eos >= 0) t->options |= OPT_ADD_EOS;
    if (!spm) {
        if ((rc = gguf_pre(t, g, err)) < 0) return rc;
        return gguf_merges(t, g, merges, err);
    }
    if (squeeze) return err_set(err, E_FORMAT, "tokenizer.ggml.remove_extra_whitespaces is not supported; expected "
                                "false");
    if ((rc = gguf_id(g, "tokenizer.ggml.unknown_token_id", t->n, &t->unk, err)) < 0) return rc;
    if (t->unk < 0) t->unk = table_find(&t->by_text, &t->text, t->span, "<unk>", 5);
    t->options |= OPT_BYTE_FALLBACK | OPT_FUSE_UNK | (prefix ? OPT_STRIP_FIRST : 0);
    if (prefix) t->norm[t->n_norm++] = step_make(NORM_PREPEND, SPLIT_REMOVED, 0, SPACE_MARK, NULL);
    t->norm[t->n_norm++] = step_make(NORM_REPLACE, SPLIT_REMOVED, 0, " ", SPACE_MARK);
    if (merges) return gguf_merges(t, g, merges, err);
    if (!scores) return err_set(err, E_MISSING, "tokenizer.ggml.scores is missing: a \"llama\" tokenizer needs it, "
                                "or merges");
    return merges_from_scores(t, scores, types, err);
}

int tokenizer_from_gguf(Tokenizer **out, Gguf *g, Err *err) {
    *out = NULL;
    size_t len = 0;
    const char *model = gguf_get_string(g, "tokenizer.ggml.model", &len);
    if (!model) return err_set(err, E_MISSING, "tokenizer.ggml.model is missing: the file carries no tokenizer");
    bool spm = len == 5 && !memcmp(model, "llama", 5);
    if (!spm && !(len == 4 && !memcmp(model, "gpt2", 4)))
        return err_set(err, E_FORMAT, "tokenizer.ggml.model is \"%.*s\"; known: llama, gpt2", len > 60 ? 60 :
                       (int)len, model);
    int rc = 0;
    const GgufValue *tokens = gguf_array(g, "tokenizer.ggml.tokens", true, 0, true, &rc, err);
    if (!tokens) return rc;
    if (!tokens->count) return err_set(err, E_FORMAT, "tokenizer.ggml.tokens is empty");
    Tokenizer *t = tokenizer_new((int)tokens->count);
    rc = read_gguf(t, g, spm, tokens, err);
    free(t->by_text.slot);
    t->by_text.slot = NULL;
    if ((rc = finish(out, t, rc, err)) < 0) return rc;
    size_t chat_len = 0;
    const char *chat = gguf_get_string(g, "tokenizer.chat_template", &chat_len);
    t->config = default_config(t, chat, chat_len);
    t->config_len = t->config ? strlen(t->config) : 0;
    return 0;
}

char *tokenizer_config_json(const Tokenizer *t) {
    if (t->config) return copy_bytes(t->config, t->config_len);
    return default_config(t, NULL, 0);
}

// ---------------------------------------------------------------------------------------------
// tokenizer.json out.

static void json_text(Buf *b, const char *s, size_t len) {
    buf_str(b, "\"");
    for (size_t i = 0, k; i < len; i = k) {
        for (k = i; k < len && (uint8_t)s[k] >= 0x20 && s[k] != '"' && s[k] != '\\' && s[k] != 0x7F; k++) {}
        buf_put(b, s + i, k - i);
        if (k == len) break;
        char esc[8];
        if (s[k] == '"' || s[k] == '\\') snprintf(esc, sizeof esc, "\\%c", s[k]);
        else snprintf(esc, sizeof esc, "\\u%04x", (uint8_t)s[k]);
        buf_str(b, esc);
        k++;
    }
    buf_str(b, "\"");
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void put(Buf *b, const char *fmt, ...) {
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    buf_str(b, line);
}

static void put_token_text(Buf *b, const Tokenizer *t, int32_t id) {
    json_text(b, (const char *)t->text.p + t->span[id].off, t->span[id].len);
}

static const char *yes(bool b) { return b ? "true" : "false"; }

static void put_step(Buf *b, const Step *s) {
    put(b, "{\"type\": \"%s\"", KIND_NAME[s->kind]);
    switch ((StepKind)s->kind) {
    case NORM_PREPEND:
        buf_str(b, ", \"prepend\": ");
        json_text(b, s->a, s->a_len);
        break;
    case NORM_REPLACE:
        buf_str(b, ", \"pattern\": {\"String\": ");
        json_text(b, s->a, s->a_len);
        buf_str(b, "}, \"content\": ");
        json_text(b, s->b, s->b_len);
        break;
    case PRE_SPLIT:
        put(b, ", \"pattern\": {\"%s\": ", s->flags & STEP_LITERAL ? "String" : "Regex");
        json_text(b, s->a, s->a_len);
        put(b, "}, \"behavior\": \"%s\", \"invert\": %s", BEHAVIOR_NAME[s->behavior], yes(s->flags & STEP_INVERT));
        break;
    case PRE_DIGITS:
        put(b, ", \"individual_digits\": %s", yes(s->behavior == SPLIT_ISOLATED));
        break;
    case PRE_BYTE_LEVEL:
        put(b, ", \"add_prefix_space\": %s, \"trim_offsets\": true, \"use_regex\": %s", yes(s->flags & STEP_PREFIX),
            yes(s->flags & STEP_REGEX));
        break;
    case PRE_METASPACE:
        buf_str(b, ", \"replacement\": ");
        json_text(b, s->a, s->a_len);
        put(b, ", \"prepend_scheme\": \"%s\", \"split\": %s",
            !(s->flags & STEP_PREFIX) ? "never" : s->flags & STEP_FIRST_ONLY ? "first" : "always",
                yes(s->flags & STEP_SPLIT));
        break;
    case STEP_KINDS: break;
    }
    buf_str(b, "}");
}

static void put_steps(Buf *b, const char *key, const char *list, const Step *s, int n) {
    put(b, "  \"%s\": ", key);
    if (n == 0) buf_str(b, "null");
    if (n > 1) put(b, "{\"type\": \"Sequence\", \"%s\": [", list);
    for (int i = 0; i < n; i++) {
        if (i) buf_str(b, ", ");
        put_step(b, &s[i]);
    }
    if (n > 1) buf_str(b, "]}");
    buf_str(b, ",\n");
}

static void put_template_token(Buf *b, const Tokenizer *t, int32_t id, int type) {
    buf_str(b, "{\"SpecialToken\": {\"id\": ");
    put_token_text(b, t, id);
    put(b, ", \"type_id\": %d}}", type);
}

// bos A eos, and for pairs bos A eos bos B eos, as far as the tokenizer adds them.
static void put_template(Buf *b, const Tokenizer *t) {
    bool bos = (t->options & OPT_ADD_BOS) && t->bos >= 0, eos = (t->options & OPT_ADD_EOS) && t->eos >= 0;
    buf_str(b, "  \"post_processor\": ");
    if (!bos && !eos) {
        buf_str(b, t->options & OPT_BYTE_LEVEL ? "{\"type\": \"ByteLevel\", \"add_prefix_space\": true, "
                "\"trim_offsets\": false, \"use_regex\": true},\n" : "null,\n");
        return;
    }
    buf_str(b, "{\"type\": \"TemplateProcessing\", ");
    for (int pair = 0; pair < 2; pair++) {
        put(b, "\"%s\": [", pair ? "pair" : "single");
        for (int k = 0; k <= pair; k++) {
            if (k) buf_str(b, ", ");
            if (bos) { put_template_token(b, t, t->bos, k); buf_str(b, ", "); }
            put(b, "{\"Sequence\": {\"id\": \"%s\", \"type_id\": %d}}", k ? "B" : "A", k);
            if (eos) { buf_str(b, ", "); put_template_token(b, t, t->eos, k); }
        }
        buf_str(b, "], ");
    }
    buf_str(b, "\"special_tokens\": {");
    for (int k = 0, some = 0; k < 2; k++) {
        if (!(k ? eos && !(bos && t->eos == t->bos) : bos)) continue;
        int32_t id = k ? t->eos : t->bos;
        if (some++) buf_str(b, ", ");
        put_token_text(b, t, id);
        buf_str(b, ": {\"id\": ");
        put_token_text(b, t, id);
        put(b, ", \"ids\": [%d], \"tokens\": [", id);
        put_token_text(b, t, id);
        buf_str(b, "]}");
    }
    buf_str(b, "}},\n");
}

static void put_decoder(Buf *b, const Tokenizer *t) {
    if (t->options & OPT_BYTE_LEVEL) {
        buf_str(b, "  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, \"trim_offsets\": true, "
                "\"use_regex\": true},\n");
        return;
    }
    buf_str(b, "  \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": "
            "{\"String\": \"" SPACE_MARK
            "\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}");
    if (t->options & OPT_STRIP_FIRST) buf_str(b, ", {\"type\": \"Strip\", \"content\": \" \", \"start\": 1, "
                                              "\"stop\": 0}");
    buf_str(b, "]},\n");
}

int tokenizer_to_json(const Tokenizer *t, char **text, size_t *len, Err *err) {
    if (t->json) {
        *text = copy_bytes(t->json, t->json_len);
        *len = t->json_len;
        return 0;
    }
    Buf b = {0};
    buf_str(&b, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [");
    bool some = false, spaces = false;
    for (int32_t id = 0; id < t->n; id++) {
        int f = t->flags[id];
        if (!(f & TOK_ADDED)) continue;
        put(&b, "%s\n    {\"id\": %d, \"content\": ", some ? "," : "", id);
        put_token_text(&b, t, id);
        put(&b, ", \"single_word\": %s, \"lstrip\": %s, \"rstrip\": %s, \"normalized\": %s, \"special\": %s}",
            yes(f & TOK_SINGLE_WORD), yes(f & TOK_LSTRIP), yes(f & TOK_RSTRIP), yes(f & TOK_NORMALIZED),
                yes(f & TOK_SPECIAL));
        some = true;
    }
    buf_str(&b, "\n  ],\n");
    put_steps(&b, "normalizer", "normalizers", t->norm, t->n_norm);
    put_steps(&b, "pre_tokenizer", "pretokenizers", t->pre, t->n_pre);
    put_template(&b, t);
    put_decoder(&b, t);
    buf_str(&b, "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": ");
    if (t->unk >= 0) put_token_text(&b, t, t->unk);
    else buf_str(&b, "null");
    put(&b, ",\n    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n    \"fuse_unk\": %s,\n"
        "    \"byte_fallback\": %s,\n    \"ignore_merges\": %s,\n    \"vocab\": {", yes(t->options & OPT_FUSE_UNK),
        yes(t->options & OPT_BYTE_FALLBACK), yes(t->options & OPT_IGNORE_MERGES));
    some = false;
    for (int32_t id = 0; id < t->n; id++) {
        if (!(t->flags[id] & TOK_MODEL)) continue;
        buf_str(&b, some ? ",\n      " : "\n      ");
        put_token_text(&b, t, id);
        put(&b, ": %d", id);
        some = true;
    }
    buf_str(&b, "\n    },\n    \"merges\": [");
    for (int m = 0; m < t->n_merges && !spaces; m++) {
        Span s = t->span[t->merges[m].c];
        spaces = memchr(t->text.p + s.off, ' ', s.len) != NULL;
    }
    for (int m = 0; m < t->n_merges; m++) {                     // "a b" is what older readers know
        buf_str(&b, m ? ",\n      " : "\n      ");
        if (spaces) {
            buf_str(&b, "[");
            put_token_text(&b, t, t->merges[m].a);
            buf_str(&b, ", ");
            put_token_text(&b, t, t->merges[m].b);
            buf_str(&b, "]");
        } else {
            Buf pair = {0};
            buf_put(&pair, t->text.p + t->span[t->merges[m].a].off, t->span[t->merges[m].a].len);
            buf_str(&pair, " ");
            buf_put(&pair, t->text.p + t->span[t->merges[m].b].off, t->span[t->merges[m].b].len);
            json_text(&b, (const char *)pair.p, pair.n);
            b.failed |= pair.failed;
            free(pair.p);
        }
    }
    buf_str(&b, "\n    ]\n  }\n}\n");
    *len = b.n;
    buf_put(&b, "", 1);
    if (b.failed) {
        free(b.p);
        return err_set(err, E_NOMEM, "tokenizer: no memory for tokenizer.json (%zu bytes so far)", b.n);
    }
    *text = (char *)b.p;
    return 0;
}

// ---------------------------------------------------------------------------------------------
// The blob. Integers are little-endian; v is a variable-length number, seven bits a byte, lowest first, the top bit set
// on all but the last.
//   "QTOK" | u32 version | u64 bytes of body | u64 hash of body | body | v length, tokenizer_config.json
//   body: v options | v n | v bos+1 | v eos+1 | v unk+1
//         v n_norm, steps | v n_pre, steps      step: kind, behavior, flags (a byte each) | v length, a | v length, b
//         n tokens: flags (a byte) | where flags are set: v length, spelling
//         v n_merges | each: v a, v b, v c

#define BLOB_MAGIC "QTOK"
#define BLOB_VERSION 1u
#define BLOB_HEADER 24

static void put_v(Buf *b, uint64_t v) {
    uint8_t byte[10];
    size_t n = 0;
    do {
        byte[n] = (uint8_t)(v & 0x7F);
        v >>= 7;
        if (v) byte[n] |= 0x80;
        n++;
    } while (v);
    buf_put(b, byte, n);
}

static void put_le(uint8_t *p, uint64_t v, int bytes) { for (int i = 0; i < bytes; i++) p[i] =
                                                       (uint8_t)(v >> (8 * i)); }

static uint64_t get_le(const uint8_t *p, int bytes) {
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++) v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static void put_blob_steps(Buf *b, const Step *s, int n) {
    put_v(b, (uint64_t)n);
    for (int i = 0; i < n; i++) {
        buf_put(b, (uint8_t[]){s[i].kind, s[i].behavior, s[i].flags}, 3);
        put_v(b, s[i].a_len);
        buf_put(b, s[i].a, s[i].a_len);
        put_v(b, s[i].b_len);
        buf_put(b, s[i].b, s[i].b_len);
    }
}

void tokenizer_content(const Tokenizer *t, Buf *b) {
    put_v(b, t->options);
    put_v(b, (uint64_t)t->n);
    put_v(b, (uint64_t)(t->bos + 1));
    put_v(b, (uint64_t)(t->eos + 1));
    put_v(b, (uint64_t)(t->unk + 1));
    put_blob_steps(b, t->norm, t->n_norm);
    put_blob_steps(b, t->pre, t->n_pre);
    for (int32_t id = 0; id < t->n; id++) {
        buf_put(b, &t->flags[id], 1);
        if (!t->flags[id]) continue;
        put_v(b, t->span[id].len);
        buf_put(b, t->text.p + t->span[id].off, t->span[id].len);
    }
    put_v(b, (uint64_t)t->n_merges);
    for (int m = 0; m < t->n_merges; m++) {
        put_v(b, (uint64_t)t->merges[m].a);
        put_v(b, (uint64_t)t->merges[m].b);
        put_v(b, (uint64_t)t->merges[m].c);
    }
}

int tokenizer_to_blob(const Tokenizer *t, uint8_t **blob, size_t *size, Err *err) {
    Buf b = {0};
    uint8_t head[BLOB_HEADER] = BLOB_MAGIC;
    buf_put(&b, head, sizeof head);
    tokenizer_content(t, &b);
    size_t body = b.n - BLOB_HEADER;
    if (!b.failed) {
        put_le(b.p + 4, BLOB_VERSION, 4);
        put_le(b.p + 8, body, 8);
        put_le(b.p + 16, hash_bytes(b.p + BLOB_HEADER, body, 1), 8);
    }
    put_v(&b, t->config_len);
    buf_put(&b, t->config, t->config_len);
    if (b.failed) {
        free(b.p);
        return err_set(err, E_NOMEM, "tokenizer: no memory for its binary form (%zu bytes so far)", b.n);
    }
    *blob = b.p;
    *size = b.n;
    return 0;
}

typedef struct { const uint8_t *p; size_t n, at; bool bad; } Cursor;

static const uint8_t *take(Cursor *c, uint64_t bytes) {
    if (c->bad || bytes > c->n - c->at) { c->bad = true; return NULL; }
    const uint8_t *p = c->p + c->at;
    c->at += (size_t)bytes;
    return p;
}

static uint64_t take_v(Cursor *c, uint64_t max) {
    uint64_t v = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        const uint8_t *p = take(c, 1);
        if (!p) return 0;
        v |= (uint64_t)(*p & 0x7F) << shift;
        if (!(*p & 0x80)) {
            if (v > max) break;
            return v;
        }
    }
    c->bad = true;
    return 0;
}

static char *take_text(Cursor *c, uint32_t *len, uint32_t max) {
    uint64_t n = take_v(c, max);
    const uint8_t *p = take(c, n);
    *len = p ? (uint32_t)n : 0;
    return p && n ? copy_bytes((const char *)p, (size_t)n) : NULL;
}

static void take_steps(Cursor *c, Step *s, int *n, bool norm) {
    uint64_t count = take_v(c, MAX_STEPS);
    for (uint64_t i = 0; i < count && !c->bad; i++) {
        const uint8_t *head = take(c, 3);
        if (!head) return;
        Step *st = &s[(*n)++];
        *st = (Step){.kind = head[0], .behavior = head[1], .flags = head[2]};
        st->a = take_text(c, &st->a_len, MAX_PATTERN);
        st->b = take_text(c, &st->b_len, MAX_PATTERN);
        if (st->kind >= STEP_KINDS || (st->kind <= NORM_REPLACE) != norm || st->behavior >= SPLIT_BEHAVIORS ||
            st->flags > STEP_ALL || !utf8_valid(st->a ? st->a : "", st->a_len) || !utf8_valid(st->b ? st->b : "",
                st->b_len))
            c->bad = true;
    }
}

static Tokenizer *read_body(Cursor *c, int *rc, Err *err) {
    uint64_t options = take_v(c, OPT_ALL), n = take_v(c, INT32_MAX / 2);
    if (c->bad || n > c->n) return NULL;                        // each token takes a byte or more
    Tokenizer *t = tokenizer_new((int)n);
    t->options = (uint32_t)options;
    t->bos = (int32_t)take_v(c, n) - 1;
    t->eos = (int32_t)take_v(c, n) - 1;
    t->unk = (int32_t)take_v(c, n) - 1;
    take_steps(c, t->norm, &t->n_norm, true);
    take_steps(c, t->pre, &t->n_pre, false);
    for (int32_t id = 0; id < t->n && !c->bad && *rc == 0; id++) {
        const uint8_t *flags = take(c, 1);
        if (!flags || !*flags) continue;
        uint64_t len = take_v(c, MAX_TOKEN_BYTES);
        const uint8_t *s = take(c, len);
        if (*flags >= 2 * TOK_NORMALIZED || ((*flags & ~TOK_MODEL) && !(*flags & TOK_ADDED))) c->bad = true;
        if (s && !c->bad) *rc = put_token(t, id, (const char *)s, (size_t)len, *flags, err);
    }
    uint64_t merges = take_v(c, INT32_MAX / 2);
    if (merges > c->n - c->at) c->bad = true;
    t->merges = xcalloc(c->bad ? 1 : (size_t)merges + 1, sizeof *t->merges);
    for (uint64_t m = 0; m < merges && !c->bad; m++) {
        int32_t *p = &t->merges[t->n_merges].a;
        for (int k = 0; k < 3; k++) p[k] = (int32_t)take_v(c, n);
        t->n_merges++;
    }
    return t;
}

int tokenizer_from_blob(Tokenizer **out, const uint8_t *blob, size_t size, Err *err) {
    *out = NULL;
    if (size < BLOB_HEADER || memcmp(blob, BLOB_MAGIC, 4))
        return err_set(err, E_FORMAT, "tokenizer: %zu bytes that do not begin with %s: not a tokenizer", size,
                       BLOB_MAGIC);
    if (get_le(blob + 4, 4) != BLOB_VERSION)
        return err_set(err, E_FORMAT, "tokenizer: version %u; expected %u: it was written by another version of this "
                       "program",
                       (unsigned)get_le(blob + 4, 4), BLOB_VERSION);
    uint64_t body = get_le(blob + 8, 8);
    if (body > size - BLOB_HEADER)
        return err_set(err, E_FORMAT, "tokenizer: truncated: %zu bytes; expected %llu or more", size,
                       (unsigned long long)body + BLOB_HEADER);
    if (hash_bytes(blob + BLOB_HEADER, (size_t)body, 1) != get_le(blob + 16, 8))
        return err_set(err, E_FORMAT, "tokenizer: its checksum does not match its %llu bytes: the file is damaged",
                       (unsigned long long)body);
    Cursor c = {blob + BLOB_HEADER, (size_t)body, 0, false};
    int rc = 0;
    Tokenizer *t = read_body(&c, &rc, err);
    if (rc == 0 && (c.bad || !t || c.at != c.n))
        rc = err_set(err, E_FORMAT, "tokenizer: malformed at byte %zu of %zu", c.at + BLOB_HEADER, size);
    if (!t) return rc;
    Cursor tail = {blob + BLOB_HEADER + body, size - BLOB_HEADER - (size_t)body, 0, false};
    uint32_t config_len = 0;
    if (rc == 0) {
        t->config = take_text(&tail, &config_len, INT32_MAX);
        t->config_len = config_len;
        if (tail.bad || tail.at != tail.n)
            rc = err_set(err, E_FORMAT, "tokenizer: malformed after byte %llu", (unsigned long long)body + BLOB_HEADER);
    }
    return finish(out, t, rc, err);
}
