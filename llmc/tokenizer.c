// Encoding and decoding. Text runs through these stages, as in `tokenizers`:
//   lossy UTF-8 -> added tokens cut out -> normalizers -> normalized added tokens cut out -> pre-tokenizers -> BPE
// Words are never collected: each stage hands its pieces on to the next as it finds them.
#include "tokenizer_impl.h"
#include <limits.h>
#include <stdlib.h>
#include <string.h>

const char GPT2_PATTERN[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char LLAMA3_PATTERN[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
                              "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

// ---------------------------------------------------------------------------------------------
// Bytes, hashes, UTF-8.

void buf_put(Buf *b, const void *data, size_t bytes) {
    if (b->failed || !bytes) return;
    size_t need;
    if (!add_size(b->n, bytes, &need) || need > INT32_MAX) { b->failed = true; return; }
    if (need > b->cap) {
        size_t cap = b->cap ? b->cap * 2 : 256;
        if (cap < need) cap = need;
        uint8_t *p = realloc(b->p, cap);
        if (!p) { b->failed = true; return; }
        b->p = p;
        b->cap = cap;
    }
    memcpy(b->p + b->n, data, bytes);
    b->n = need;
}

void buf_str(Buf *b, const char *s) { buf_put(b, s, strlen(s)); }

// Eight bytes a step, multiply and fold. Not cryptographic: it keys tables and caches.
uint64_t hash_bytes(const void *data, size_t len, uint64_t seed) {
    const uint8_t *p = data;
    uint64_t h = seed ^ (len * 0x9E3779B97F4A7C15u), w;
    for (; len >= 8; p += 8, len -= 8) {
        memcpy(&w, p, 8);
        h = (h ^ w) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    }
    w = 0;
    for (size_t i = 0; i < len; i++) w |= (uint64_t)p[i] << (8 * i);
    h = (h ^ w) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    return h ^ (h >> 32);
}

static uint64_t hash_u64(uint64_t x) {
    x *= 0x9E3779B97F4A7C15u;
    return x ^ (x >> 29);
}

// Length of the longest prefix of s that begins a well-formed sequence, at most one whole one:
// *whole says whether it is.
static size_t utf8_sequence(const uint8_t *s, size_t len, bool *whole) {
    uint8_t c = s[0], lo = 0x80, hi = 0xBF;
    size_t need;
    *whole = false;
    if (c < 0x80) { *whole = true; return 1; }
    if (c >= 0xC2 && c <= 0xDF) need = 2;
    else if (c >= 0xE0 && c <= 0xEF) { need = 3; if (c == 0xE0) lo = 0xA0; if (c == 0xED) hi = 0x9F; }
    else if (c >= 0xF0 && c <= 0xF4) { need = 4; if (c == 0xF0) lo = 0x90; if (c == 0xF4) hi = 0x8F; }
    else return 1;
    for (size_t i = 1; i < need; i++) {
        if (i == len || s[i] < lo || s[i] > hi) return i;
        lo = 0x80;
        hi = 0xBF;
    }
    *whole = true;
    return need;
}

size_t utf8_valid_prefix(const char *text, size_t len) {
    const uint8_t *s = (const uint8_t *)text;
    size_t i = 0;
    while (i < len) {
        uint64_t w;
        if (len - i >= 8 && (memcpy(&w, s + i, 8), (w & 0x8080808080808080u) == 0)) { i += 8; continue; }
        bool whole;
        size_t k = utf8_sequence(s + i, len - i, &whole);
        if (!whole) return i;
        i += k;
    }
    return len;
}

bool utf8_valid(const char *s, size_t len) { return utf8_valid_prefix(s, len) == len; }

uint32_t utf8_next(const char *text, size_t *i) {
    const uint8_t *s = (const uint8_t *)text + *i;
    if (s[0] < 0x80) { *i += 1; return s[0]; }
    if (s[0] < 0xE0) { *i += 2; return (s[0] & 0x1Fu) << 6 | (s[1] & 0x3Fu); }
    if (s[0] < 0xF0) { *i += 3; return (s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3Fu); }
    *i += 4;
    return (s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3Fu);
}

static size_t char_start(const char *s, size_t end) {   // of the character that ends at `end` > 0
    do end--; while (end && ((uint8_t)s[end] & 0xC0) == 0x80);
    return end;
}

// Each maximal ill-formed subsequence becomes one U+FFFD, as in Unicode's recommendation and Rust's from_utf8_lossy.
static void utf8_lossy(Buf *b, const char *text, size_t len) {
    const uint8_t *s = (const uint8_t *)text;
    size_t i = 0;
    while (i < len) {
        size_t good = utf8_valid_prefix(text + i, len - i);
        buf_put(b, text + i, good);
        i += good;
        if (i < len) {
            bool whole;
            i += utf8_sequence(s + i, len - i, &whole);
            buf_put(b, "\xEF\xBF\xBD", 3);
        }
    }
}

// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes are U+0100.. in ascending order.
static bool alphabet_self(int c) { return (c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255); }

uint32_t byte_to_alphabet(int byte) {
    if (alphabet_self(byte)) return (uint32_t)byte;
    uint32_t k = 0;
    for (int c = 0; c < byte; c++) k += !alphabet_self(c);
    return 256 + k;
}

int alphabet_to_byte(uint32_t cp) {
    if (cp < 256) return alphabet_self((int)cp) ? (int)cp : -1;
    if (cp >= 256 + 68) return -1;
    uint32_t k = cp - 256;               // the k-th byte that is not printable: 0..32, 127..160, 173
    return (int)(k < 33 ? k : k < 67 ? k - 33 + 127 : 173);
}

// White_Space of Unicode: the \s of `tokenizers`' lstrip and rstrip.
static bool is_space_cp(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// ---------------------------------------------------------------------------------------------
// Tables.

static uint64_t table_size(size_t n) {
    uint64_t size = 16;
    while (size < 2 * (uint64_t)n) size *= 2;
    return size;
}

int32_t table_find(const StrTable *h, const Buf *text, const Span *span, const char *s, size_t len) {
    if (!h->slot) return -1;
    for (uint32_t i = (uint32_t)hash_bytes(s, len, 0) & h->mask;; i = (i + 1) & h->mask) {
        int32_t id = h->slot[i];
        if (id < 0) return -1;
        if (span[id].len == len && !memcmp(text->p + span[id].off, s, len)) return id;
    }
}

// Tokens that have all of the flags `want`. Two with the same bytes are an error.
int table_build(StrTable *h, const Buf *text, const Span *span, const uint8_t *flags, int n, int want, Err *err) {
    uint64_t size = table_size((size_t)n);
    h->slot = xmalloc(size * sizeof *h->slot);
    h->mask = (uint32_t)(size - 1);
    memset(h->slot, 0xFF, size * sizeof *h->slot);
    for (int32_t id = 0; id < n; id++) {
        if ((flags[id] & want) != want) continue;
        const char *s = (const char *)text->p + span[id].off;
        uint32_t len = span[id].len, i = (uint32_t)hash_bytes(s, len, 0) & h->mask;
        for (; h->slot[i] >= 0; i = (i + 1) & h->mask) {
            int32_t other = h->slot[i];
            if (span[other].len == len && !memcmp(text->p + span[other].off, s, len))
                return err_set(err, E_FORMAT, "tokenizer: tokens %d and %d are both \"%.*s\"", other, id,
                               len > 60 ? 60 : (int)len, s);
        }
        h->slot[i] = id;
    }
    return 0;
}

static const PairSlot *pair_find(const PairTable *h, int32_t a, int32_t b) {
    uint64_t key = (uint64_t)(uint32_t)a << 32 | (uint32_t)b;
    for (uint64_t i = hash_u64(key) & h->mask;; i = (i + 1) & h->mask) {
        const PairSlot *s = &h->slot[i];
        if (s->key == key) return s;
        if (s->key == UINT64_MAX) return NULL;
    }
}

static void trie_add(Trie *t, const char *s, size_t len, int32_t id) {
    if (!t->node) {
        t->cap = 64;
        t->node = xmalloc((size_t)t->cap * sizeof *t->node);
        t->node[t->n++] = (TrieNode){0, -1, -1, -1};
    }
    if (!len) return;
    t->first[(uint8_t)s[0]] = true;
    int32_t at = 0;
    for (size_t i = 0; i < len; i++) {
        int32_t k = t->node[at].child;
        while (k >= 0 && t->node[k].byte != (uint8_t)s[i]) k = t->node[k].next;
        if (k < 0) {
            if (t->n == t->cap) {
                TrieNode *bigger = xmalloc((size_t)t->cap * 2 * sizeof *bigger);
                memcpy(bigger, t->node, (size_t)t->n * sizeof *bigger);
                free(t->node);
                t->node = bigger;
                t->cap *= 2;
            }
            k = t->n++;
            t->node[k] = (TrieNode){(uint8_t)s[i], -1, t->node[at].child, -1};
            t->node[at].child = k;
        }
        at = k;
    }
    if (t->node[at].id < 0) t->node[at].id = id;
}

// The longest entry that s begins with: its length, 0 if none.
static size_t trie_match(const Trie *t, const char *s, size_t len, int32_t *id) {
    size_t best = 0;
    int32_t at = 0;
    for (size_t i = 0; i < len; i++) {
        int32_t k = t->node[at].child;
        while (k >= 0 && t->node[k].byte != (uint8_t)s[i]) k = t->node[k].next;
        if (k < 0) break;
        if (t->node[k].id >= 0) { best = i + 1; *id = t->node[k].id; }
        at = k;
    }
    return best;
}

// ---------------------------------------------------------------------------------------------
// Building.

Tokenizer *tokenizer_new(int n) {
    Tokenizer *t = xcalloc(1, sizeof *t);
    t->n = n;
    t->flags = xcalloc((size_t)n + 1, 1);
    t->span = xcalloc((size_t)n + 1, sizeof *t->span);
    t->bos = t->eos = t->unk = -1;
    pthread_mutex_init(&t->lock, NULL);
    buf_put(&t->text, "", 1);              // spans of empty tokens need something to point into
    buf_put(&t->raw, "", 1);
    return t;
}

void tokenizer_put(Tokenizer *t, int32_t id, const char *s, size_t len, int flags) {
    if (!t->flags[id]) {
        t->span[id] = (Span){(uint32_t)t->text.n, (uint32_t)len};
        buf_put(&t->text, s, len);
    }
    t->flags[id] |= (uint8_t)flags;
}

int32_t tokenizer_id_of(const Tokenizer *t, const char *s, size_t len) {
    int32_t id = table_find(&t->by_text, &t->text, t->span, s, len);
    for (int32_t i = 0; id < 0 && i < t->n; i++)
        if ((t->flags[i] & TOK_ADDED) && t->span[i].len == len && !memcmp(t->text.p + t->span[i].off, s, len)) id = i;
    return id;
}

// Letters and numbers of Unicode 15 and 16, which the regular expressions of `tokenizers` know and PCRE2's tables (14.0
// in Debian 12) may not; and the numbers of Unicode 17, which its Digits know besides.
static const uint32_t LATER_LETTERS[][2] = {
    {0x1C89, 0x1C8A}, {0xA7CB, 0xA7CD}, {0xA7DA, 0xA7DC}, {0x105C0, 0x105F3}, {0x10D4A, 0x10D65}, {0x10D6F, 0x10D85},
    {0x10EC2, 0x10EC4}, {0x1123F, 0x11240}, {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E},
    {0x11390, 0x113B5}, {0x113B7, 0x113B7}, {0x113D1, 0x113D1}, {0x113D3, 0x113D3}, {0x11BC0, 0x11BE0},
    {0x11F02, 0x11F02}, {0x11F04, 0x11F10}, {0x11F12, 0x11F33}, {0x1342F, 0x1342F}, {0x13441, 0x13446},
    {0x13460, 0x143FA}, {0x16100, 0x1611D}, {0x16D40, 0x16D6C}, {0x18CFF, 0x18CFF}, {0x1B132, 0x1B132},
    {0x1B155, 0x1B155}, {0x1DF25, 0x1DF2A}, {0x1E030, 0x1E06D}, {0x1E4D0, 0x1E4EB}, {0x1E5D0, 0x1E5ED},
    {0x1E5F0, 0x1E5F0}, {0x2B739, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF}
};
static const uint32_t LATER_NUMBERS[][2] = {
    {0x10D40, 0x10D49}, {0x116D0, 0x116E3}, {0x11BF0, 0x11BF9}, {0x11F50, 0x11F59}, {0x16130, 0x16139},
    {0x16D70, 0x16D79}, {0x1CCF0, 0x1CCF9}, {0x1D2C0, 0x1D2D3}, {0x1E4F0, 0x1E4F9}, {0x1E5F1, 0x1E5FA}
};
static const uint32_t LATEST_NUMBERS[][2] = {
    {0x11DE0, 0x11DE9}, {0x16FF4, 0x16FF6}
};

static void put_ranges(Buf *b, const uint32_t (*r)[2], size_t n) {
    for (size_t i = 0; i < n; i++) {
        char s[40];
        snprintf(s, sizeof s, "\\x{%x}-\\x{%x}", r[i][0], r[i][1]);
        buf_str(b, s);
    }
}

// Oniguruma's meaning of a pattern, said to PCRE2: \s without U+180E, \h as a hexadecimal digit, letters and numbers up
// to Unicode 16. What would silently mean something else is refused.
static int translate_pattern(Buf *b, const char *p, size_t len, Err *err) {
    bool in_class = false;
    for (size_t i = 0; i < len; i++) {
        if (p[i] == '\\' && i + 1 < len) {
            char c = p[++i];
            if (len - i > 3 && (!memcmp(p + i, "p{L}", 4) || !memcmp(p + i, "p{N}", 4))) {
                bool letters = p[i + 2] == 'L';
                if (!in_class) buf_str(b, "[");
                buf_put(b, p + i - 1, 5);
                if (letters) put_ranges(b, LATER_LETTERS, sizeof LATER_LETTERS / sizeof *LATER_LETTERS);
                else put_ranges(b, LATER_NUMBERS, sizeof LATER_NUMBERS / sizeof *LATER_NUMBERS);
                if (!in_class) buf_str(b, "]");
                i += 3;
            } else if (c == 's') buf_str(b, "\\p{White_Space}");
            else if (c == 'S') buf_str(b, "\\P{White_Space}");
            else if (c == 'h') buf_str(b, in_class ? "0-9A-Fa-f" : "[0-9A-Fa-f]");
            else if (strchr("HXRKGyYgkNO", c))
                return err_set(err, E_FORMAT, "tokenizer: \\%c in the regular expression \"%.*s\" is not supported", c,
                               (int)len, p);
            else buf_put(b, p + i - 1, 2);
            continue;
        }
        if (in_class && ((p[i] == '[' && !(i + 1 < len && p[i + 1] == ':')) ||
                         (p[i] == '&' && i + 1 < len && p[i + 1] == '&')))
            return err_set(err, E_FORMAT, "tokenizer: sets within a character class in the regular expression "
                           "\"%.*s\" are not supported", (int)len, p);
        if (in_class && p[i] == '[') {                          // [:name:]
            const char *end = memchr(p + i + 1, ']', len - i - 1);
            size_t k = end ? (size_t)(end - p) + 1 - i : len - i;
            buf_put(b, p + i, k);
            i += k - 1;
            continue;
        }
        buf_put(b, p + i, 1);
        if (p[i] == '[' && !in_class) {
            in_class = true;
            if (i + 1 < len && p[i + 1] == '^') buf_put(b, &p[++i], 1);
            if (i + 1 < len && p[i + 1] == ']') buf_put(b, &p[++i], 1);
        } else if (p[i] == ']') {
            in_class = false;
        }
    }
    return 0;
}

static int compile_pattern(pcre2_code **out, const char *p, size_t len, bool literal, Err *err) {
    Buf b = {0};
    int rc = 0, code = 0;
    if (len > MAX_PATTERN)
        return err_set(err, E_FORMAT, "tokenizer: a regular expression of %zu bytes; expected at most %d", len,
                       MAX_PATTERN);
    if (literal) buf_put(&b, p, len);
    else rc = translate_pattern(&b, p, len, err);
    if (rc == 0) {
        size_t where = 0;
        uint32_t opt = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C);
        *out = pcre2_compile(b.p ? b.p : (const uint8_t *)"", b.n, opt, &code, &where, NULL);
        if (*out) {
            pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE);       // failing leaves the interpreter: slower, same matches
        } else {
            uint8_t why[128] = "";
            pcre2_get_error_message(code, why, sizeof why);
            rc = err_set(err, E_FORMAT, "tokenizer: regular expression \"%.*s\": %s at byte %zu",
                         len > 300 ? 300 : (int)len, p, (const char *)why, where);
        }
    }
    free(b.p);
    return rc;
}

static int compile_digits(pcre2_code **out, Err *err) {
    Buf b = {0};
    buf_str(&b, "[\\p{N}");
    put_ranges(&b, LATEST_NUMBERS, sizeof LATEST_NUMBERS / sizeof *LATEST_NUMBERS);
    buf_str(&b, "]");
    int rc = compile_pattern(out, (const char *)b.p, b.n, false, err);
    free(b.p);
    return rc;
}

static int glue_index(uint32_t cp) { return cp < 128 ? (int)cp : cp == SPACE_MARK_CP ? 128 : -1; }

static bool glued(const Tokenizer *t, uint32_t c, uint32_t d) {
    int i = glue_index(c), j = glue_index(d);
    if (i >= 0 && j >= 0) return t->glue_ascii[i][j >> 6] >> (j & 63) & 1;
    uint64_t key = (uint64_t)c << 32 | d;
    for (uint64_t k = hash_u64(key) & t->glue_mask;; k = (k + 1) & t->glue_mask) {
        if (t->glue[k] == key) return true;
        if (t->glue[k] == UINT64_MAX) return false;
    }
}

static const char *text_of(const Tokenizer *t, int32_t id) { return (const char *)t->text.p + t->span[id].off; }

// Which pairs of characters any merge may join. Between two others a word can be cut with the same result, since every
// merge across the cut would have to join a symbol that ends with c to one that begins with d.
static void build_glue(Tokenizer *t) {
    uint64_t size = table_size((size_t)t->n_merges);
    t->glue = xmalloc(size * sizeof *t->glue);
    t->glue_mask = size - 1;
    memset(t->glue, 0xFF, size * sizeof *t->glue);
    t->segments = t->full_fallback || (!(t->options & OPT_BYTE_FALLBACK) && t->unk >= 0);
    for (int m = 0; m < t->n_merges; m++) {
        int32_t pair[2] = {t->merges[m].a, t->merges[m].b};
        for (int k = 0; k < 2; k++) {
            if (pair[k] == t->unk) t->segments = false;        // its symbol stands for other characters than its own
            for (int c = 0; c < 256; c++) if (pair[k] == t->byte_id[c]) t->segments = false;
        }
        size_t i = char_start(text_of(t, pair[0]), t->span[pair[0]].len), j = 0;
        uint32_t c = utf8_next(text_of(t, pair[0]), &i), d = utf8_next(text_of(t, pair[1]), &j);
        int ci = glue_index(c), di = glue_index(d);
        if (ci >= 0 && di >= 0) {
            t->glue_ascii[ci][di >> 6] |= (uint64_t)1 << (di & 63);
        } else {
            uint64_t key = (uint64_t)c << 32 | d, h = hash_u64(key) & t->glue_mask;
            while (t->glue[h] != UINT64_MAX && t->glue[h] != key) h = (h + 1) & t->glue_mask;
            t->glue[h] = key;
        }
    }
}

// A cut after "x\n" before a letter is safe for the two patterns below: none of their alternatives matches across it,
// none looks behind, and the white space before it is one newline, so that \s+(?!\S) and \s+ take the same.
static bool known_pattern(const Step *s) {
    return s->behavior == SPLIT_ISOLATED && !(s->flags & (STEP_INVERT | STEP_LITERAL)) &&
           ((s->a_len == strlen(GPT2_PATTERN) && !memcmp(s->a, GPT2_PATTERN, s->a_len)) ||
            (s->a_len == strlen(LLAMA3_PATTERN) && !memcmp(s->a, LLAMA3_PATTERN, s->a_len)));
}

static bool find_cuts(const Tokenizer *t) {
    for (int32_t id = 0; id < t->n; id++)
        if ((t->flags[id] & TOK_ADDED) && ((t->flags[id] & (TOK_LSTRIP | TOK_RSTRIP | TOK_SINGLE_WORD)) ||
                                           memchr(text_of(t, id), '\n', t->span[id].len)))
            return false;
    if (t->options & OPT_BYTE_LEVEL) {
        bool splits = t->n_merges == 0 && !(t->options & OPT_IGNORE_MERGES);
        for (int i = 0; i < t->n_pre; i++) {
            const Step *s = &t->pre[i];
            if (s->kind == PRE_BYTE_LEVEL && (s->flags & STEP_PREFIX)) return false;
            if (s->kind == PRE_SPLIT && !known_pattern(s)) return false;
            if (s->kind == PRE_SPLIT || (s->kind == PRE_BYTE_LEVEL && (s->flags & STEP_REGEX))) splits = true;
        }
        return splits && t->n_norm == 0;
    }
    for (int i = 0; i < t->n_norm; i++)
        if (t->norm[i].kind == NORM_REPLACE && !(t->norm[i].a_len == 1 && t->norm[i].a[0] == ' ')) return false;
    for (int i = 0; i < t->n_pre; i++)
        if (t->pre[i].kind != PRE_METASPACE) return false;
    return t->segments && !(t->options & OPT_IGNORE_MERGES) && (t->full_fallback || t->ascii_id['\n'] >= 0);
}

static int build_pieces(Tokenizer *t) {
    t->raw_span = xcalloc((size_t)t->n + 1, sizeof *t->raw_span);
    for (int32_t id = 0; id < t->n; id++) {
        const char *s = t->flags[id] ? text_of(t, id) : "";
        size_t len = t->span[id].len, start = t->raw.n, i = 0;
        if (!(t->flags[id] & TOK_MODEL)) {
            buf_put(&t->raw, s, len);
        } else if (t->options & OPT_BYTE_LEVEL) {
            bool all = true;
            for (i = 0; i < len && all;) {
                int c = alphabet_to_byte(utf8_next(s, &i));
                all = c >= 0;
                uint8_t byte = (uint8_t)c;
                if (all) buf_put(&t->raw, &byte, 1);
            }
            if (!all) {                                         // cannot arise from text; decodes to itself
                t->raw.n = start;
                buf_put(&t->raw, s, len);
            }
        } else if ((t->options & OPT_BYTE_FALLBACK) && len == 6 && !memcmp(s, "<0x", 3) && s[5] == '>') {
            char hex[3] = {s[3], s[4], 0}, *end;
            uint8_t byte = (uint8_t)strtoul(hex, &end, 16);
            buf_put(&t->raw, *end ? (const void *)s : &byte, *end ? 6 : 1);
        } else {
            while (i < len) {
                size_t from = i;
                if (utf8_next(s, &i) == SPACE_MARK_CP) buf_put(&t->raw, " ", 1);
                else buf_put(&t->raw, s + from, i - from);
            }
        }
        t->raw_span[id] = (Span){(uint32_t)start, (uint32_t)(t->raw.n - start)};
    }
    return t->raw.failed ? -1 : 0;
}

// Whether a byte-level token is spelled in the alphabet, so that text can give it.
static bool in_alphabet(const Tokenizer *t, int32_t id) {
    const char *s = text_of(t, id);
    for (size_t i = 0; i < t->span[id].len;)
        if (alphabet_to_byte(utf8_next(s, &i)) < 0) return false;
    return true;
}

static void normalize(const Tokenizer *t, Buf *out, const char *s, size_t len, bool prepend);

int tokenizer_finish(Tokenizer *t, Err *err) {
    int rc;
    if (t->text.failed) return err_set(err, E_NOMEM, "tokenizer: no memory for %zu bytes of tokens", t->text.n);
    for (int32_t id = 0; id < t->n; id++) if (t->span[id].len > t->max_len) t->max_len = t->span[id].len;
    if ((rc = table_build(&t->by_text, &t->text, t->span, t->flags, t->n, TOK_MODEL, err)) < 0) return rc;
    if (build_pieces(t) < 0) return err_set(err, E_NOMEM, "tokenizer: no memory for its tokens' bytes");

    bool byte_level = t->options & OPT_BYTE_LEVEL;
    t->full_fallback = !byte_level && (t->options & OPT_BYTE_FALLBACK);
    for (int c = 0; c < 256; c++) {
        char s[8];
        size_t len;
        if (byte_level) {
            uint32_t cp = byte_to_alphabet(c);
            len = cp < 128 ? 1 : 2;
            if (cp < 128) s[0] = (char)cp;
            else { s[0] = (char)(0xC0 | cp >> 6); s[1] = (char)(0x80 | (cp & 0x3F)); }
        } else {
            len = (size_t)snprintf(s, sizeof s, "<0x%02X>", c);
        }
        bool use = byte_level || (t->options & OPT_BYTE_FALLBACK);
        t->byte_id[c] = use ? table_find(&t->by_text, &t->text, t->span, s, len) : -1;
        if (t->byte_id[c] < 0) t->full_fallback = false;
        s[0] = (char)c;
        if (c < 128) t->ascii_id[c] = table_find(&t->by_text, &t->text, t->span, s, 1);
    }
    if (byte_level && (t->options & OPT_IGNORE_MERGES)) {
        uint8_t *usable = xcalloc((size_t)t->n + 1, 1);
        for (int32_t id = 0; id < t->n; id++) usable[id] = (t->flags[id] & TOK_MODEL) && in_alphabet(t, id);
        rc = table_build(&t->by_raw, &t->raw, t->raw_span, usable, t->n, 1, err);
        free(usable);
        if (rc < 0) return rc;
    }

    uint64_t size = table_size((size_t)t->n_merges);
    t->pairs.slot = xmalloc(size * sizeof *t->pairs.slot);
    memset(t->pairs.slot, 0xFF, size * sizeof *t->pairs.slot);
    t->pairs.mask = size - 1;
    for (int m = 0; m < t->n_merges; m++) {
        uint64_t key = (uint64_t)(uint32_t)t->merges[m].a << 32 | (uint32_t)t->merges[m].b, i =
            hash_u64(key) & t->pairs.mask;
        while (t->pairs.slot[i].key != UINT64_MAX && t->pairs.slot[i].key != key) i = (i + 1) & t->pairs.mask;
        t->pairs.slot[i] = (PairSlot){key, m, t->merges[m].c};  // of two equal merges the later one holds
    }
    if (!byte_level) build_glue(t);

    bool single_word = false;
    trie_add(&t->trie_raw, "", 0, -1);
    trie_add(&t->trie_norm, "", 0, -1);
    for (int32_t id = 0; id < t->n; id++) {
        if (!(t->flags[id] & TOK_ADDED)) continue;
        if (t->flags[id] & TOK_SINGLE_WORD) single_word = true;
        if (t->flags[id] & TOK_NORMALIZED) {
            Buf b = {0};
            normalize(t, &b, text_of(t, id), t->span[id].len, true);
            if (!b.failed) trie_add(&t->trie_norm, (const char *)b.p, b.n, id);
            free(b.p);
        } else {
            trie_add(&t->trie_raw, text_of(t, id), t->span[id].len, id);
        }
    }

    for (int i = 0; i < t->n_pre; i++) {
        Step *s = &t->pre[i];
        rc = 0;
        if (s->kind == PRE_SPLIT) rc = compile_pattern(&s->re, s->a, s->a_len, s->flags & STEP_LITERAL, err);
        else if (s->kind == PRE_DIGITS) rc = compile_digits(&s->re, err);
        else if (s->kind == PRE_BYTE_LEVEL && (s->flags & STEP_REGEX) && !t->gpt2_re)
            rc = compile_pattern(&t->gpt2_re, GPT2_PATTERN, strlen(GPT2_PATTERN), false, err);
        if (rc < 0) return rc;
    }
    if (single_word) {
        static const char word[] = "\\A[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}]";
        if ((rc = compile_pattern(&t->word_re, word, strlen(word), false, err)) < 0) return rc;
    }
    t->cuts = find_cuts(t);

    if (tokenizer_rehash(t) < 0) return err_set(err, E_NOMEM, "tokenizer: no memory for its binary form");
    return 0;
}

int tokenizer_rehash(Tokenizer *t) {
    Buf b = {0};
    tokenizer_content(t, &b);
    t->hash = hash_bytes(b.p, b.n, 1);
    free(b.p);
    return b.failed ? -1 : 0;
}

// ---------------------------------------------------------------------------------------------
// What a thread keeps between calls.

#define CACHE_SLOTS (1u << 16)
#define CACHE_KEY 30
#define CACHE_IDS 8
typedef struct { uint8_t len, n; char key[CACHE_KEY]; int32_t ids[CACHE_IDS]; } CacheSlot;   // 64 bytes; len 0: empty

struct Scratch {
    Scratch *next;
    CacheSlot *cache;
    int32_t *id, *prev, *link; size_t cap;              // symbols of a long word
    uint64_t *heap; size_t heap_n, heap_cap;            // rank << 32 | position
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

static void scratch_free(Scratch *s) {
    if (!s) return;
    free(s->cache); free(s->id); free(s->prev); free(s->link); free(s->heap);
    pcre2_match_data_free(s->match);
    pcre2_match_context_free(s->context);
    if (s->stack) pcre2_jit_stack_free(s->stack);
    free(s);
}

static Scratch *scratch_take(const Tokenizer *t) {
    Tokenizer *pool = (Tokenizer *)(uintptr_t)t;        // the pool is no part of what a tokenizer means
    pthread_mutex_lock(&pool->lock);
    Scratch *s = pool->pool;
    if (s) pool->pool = s->next;
    pthread_mutex_unlock(&pool->lock);
    if (s) return s;
    if (!(s = calloc(1, sizeof *s))) return NULL;
    s->cache = calloc(CACHE_SLOTS, sizeof *s->cache);
    s->match = pcre2_match_data_create(1, NULL);
    s->context = pcre2_match_context_create(NULL);
    s->stack = pcre2_jit_stack_create(32 << 10, 8 << 20, NULL);
    if (!s->cache || !s->match || !s->context) { scratch_free(s); return NULL; }
    pcre2_set_heap_limit(s->context, 256 << 10);        // KiB
    if (s->stack) pcre2_jit_stack_assign(s->context, NULL, s->stack);
    return s;
}

static void scratch_give(const Tokenizer *t, Scratch *s) {
    Tokenizer *pool = (Tokenizer *)(uintptr_t)t;
    pthread_mutex_lock(&pool->lock);
    s->next = pool->pool;
    pool->pool = s;
    pthread_mutex_unlock(&pool->lock);
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    for (Scratch *s = t->pool, *next; s; s = next) { next = s->next; scratch_free(s); }
    for (int i = 0; i < t->n_norm; i++) { free(t->norm[i].a); free(t->norm[i].b); }
    for (int i = 0; i < t->n_pre; i++) { free(t->pre[i].a); free(t->pre[i].b); pcre2_code_free(t->pre[i].re); }
    pcre2_code_free(t->gpt2_re);
    pcre2_code_free(t->word_re);
    pthread_mutex_destroy(&t->lock);
    free(t->flags); free(t->span); free(t->text.p); free(t->merges); free(t->config); free(t->json);
    free(t->raw.p); free(t->raw_span); free(t->by_text.slot); free(t->by_raw.slot); free(t->pairs.slot); free(t->glue);
    free(t->trie_raw.node); free(t->trie_norm.node);
    free(t);
}

typedef struct {
    const Tokenizer *t;
    Scratch *s;
    bool special, more;
    int32_t *ids; size_t n, cap;
    Err *err;
} Enc;

static int no_memory(Enc *e) { return err_set(e->err, E_NOMEM, "tokenizer: no memory while encoding (%zu tokens so "
                                              "far)", e->n); }

static int emit(Enc *e, const int32_t *ids, size_t n) {
    if (!n) return 0;
    if (e->cap - e->n < n) {
        size_t cap = e->cap ? e->cap * 2 : 256, bytes;
        if (cap - e->n < n) cap = e->n + n;
        int32_t *bigger = mul_size(cap, sizeof *bigger, &bytes) ? realloc(e->ids, bytes) : NULL;
        if (!bigger) return no_memory(e);
        e->ids = bigger;
        e->cap = cap;
    }
    memcpy(e->ids + e->n, ids, n * sizeof *ids);
    e->n += n;
    return 0;
}

// ---------------------------------------------------------------------------------------------
// BPE: the pair of lowest rank is joined, the leftmost of equals first, until no pair has a rank.

#define SMALL 48

// n <= SMALL symbols in place: a scan for the minimum beats a heap. Returns how many are left.
static size_t merge_small(const Tokenizer *t, int32_t *id, size_t n) {
    int32_t rank[SMALL], to[SMALL];
    for (size_t i = 0; i + 1 < n; i++) {
        const PairSlot *p = pair_find(&t->pairs, id[i], id[i + 1]);
        rank[i] = p ? p->rank : INT32_MAX;
        to[i] = p ? p->id : 0;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) if (rank[i] < rank[best]) best = i;
        if (rank[best] == INT32_MAX) break;
        id[best] = to[best];
        n--;
        for (size_t i = best + 1; i < n; i++) { id[i] = id[i + 1]; rank[i - 1] = rank[i]; to[i - 1] = to[i]; }
        for (size_t k = best ? best - 1 : 0; k <= best && k + 1 < n; k++) {
            const PairSlot *p = pair_find(&t->pairs, id[k], id[k + 1]);
            rank[k] = p ? p->rank : INT32_MAX;
            to[k] = p ? p->id : 0;
        }
    }
    return n;
}

static void sift_down(uint64_t *h, size_t n, size_t i) {
    uint64_t x = h[i];
    for (size_t k; (k = 2 * i + 1) < n; i = k) {
        if (k + 1 < n && h[k + 1] < h[k]) k++;
        if (h[k] >= x) break;
        h[i] = h[k];
    }
    h[i] = x;
}

static uint64_t heap_pop(Scratch *s) {
    uint64_t top = s->heap[0];
    s->heap[0] = s->heap[--s->heap_n];
    if (s->heap_n) sift_down(s->heap, s->heap_n, 0);
    return top;
}

static void heap_push(Scratch *s, uint64_t x) {
    size_t i = s->heap_n++;
    for (; i && s->heap[(i - 1) / 2] > x; i = (i - 1) / 2) s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = x;
}

// Symbols in a doubly linked list, candidates in a heap: O(n log n). A candidate that no longer holds is found out when
// it is popped, by looking its pair up again. Each merge removes one symbol and adds at most two candidates, so that
// 3n places suffice.
static int merge_large(Enc *e, int32_t *id, size_t n) {
    const Tokenizer *t = e->t;
    Scratch *s = e->s;
    if (s->heap_cap < 3 * n) {
        free(s->heap);
        s->heap = malloc(3 * n * sizeof *s->heap);
        s->heap_cap = s->heap ? 3 * n : 0;
        if (!s->heap) return no_memory(e);
    }
    int32_t *prev = s->prev, *link = s->link;
    s->heap_n = 0;
    for (size_t i = 0; i < n; i++) {
        prev[i] = (int32_t)i - 1;
        link[i] = i + 1 < n ? (int32_t)i + 1 : -1;
        const PairSlot *p = i + 1 < n ? pair_find(&t->pairs, id[i], id[i + 1]) : NULL;
        if (p) s->heap[s->heap_n++] = (uint64_t)p->rank << 32 | i;
    }
    for (size_t i = s->heap_n / 2; i-- > 0;) sift_down(s->heap, s->heap_n, i);
    while (s->heap_n) {
        uint64_t top = heap_pop(s);
        int32_t at = (int32_t)(uint32_t)top, right;
        if (id[at] < 0 || (right = link[at]) < 0) continue;
        const PairSlot *p = pair_find(&t->pairs, id[at], id[right]);
        if (!p || (uint64_t)p->rank != top >> 32) continue;
        id[at] = p->id;
        id[right] = -1;
        link[at] = link[right];
        if (link[at] >= 0) prev[link[at]] = at;
        if (prev[at] >= 0 && (p = pair_find(&t->pairs, id[prev[at]], id[at])))
            heap_push(s, (uint64_t)p->rank << 32 | (uint32_t)prev[at]);
        if (link[at] >= 0 && (p = pair_find(&t->pairs, id[at], id[link[at]])))
            heap_push(s, (uint64_t)p->rank << 32 | (uint32_t)at);
    }
    size_t m = 0;
    for (int32_t i = 0; i >= 0; i = link[i]) id[m++] = id[i];
    return emit(e, id, m);
}

// First symbols of a word, one a byte or a character, in id[], which holds len places. What the vocabulary lacks is
// spelled in <0xXX>, or becomes unk, or vanishes: in the order that `tokenizers` has it, where a pending unk follows
// fallback bytes.
static size_t first_symbols(const Tokenizer *t, int32_t *id, const char *s, size_t len) {
    size_t n = 0, pending = 0;
    for (size_t i = 0, k; i < len; i = k) {
        int32_t sym;
        k = i + 1;
        if (t->options & OPT_BYTE_LEVEL) {
            sym = t->byte_id[(uint8_t)s[i]];
        } else if ((uint8_t)s[i] < 128) {
            sym = t->ascii_id[(uint8_t)s[i]];
        } else {
            k = i;
            utf8_next(s, &k);
            sym = table_find(&t->by_text, &t->text, t->span, s + i, k - i);
        }
        if (sym >= 0) {
            if (pending) { id[n++] = t->unk; pending = 0; }
            id[n++] = sym;
            continue;
        }
        if (!(t->options & OPT_BYTE_LEVEL) && (t->options & OPT_BYTE_FALLBACK)) {
            bool all = true;
            for (size_t j = i; j < k; j++) all = all && t->byte_id[(uint8_t)s[j]] >= 0;
            if (all) {
                for (size_t j = i; j < k; j++) id[n++] = t->byte_id[(uint8_t)s[j]];
                continue;
            }
        }
        if (t->unk < 0) continue;
        if (pending && !(t->options & OPT_FUSE_UNK)) id[n++] = t->unk;
        pending = 1;
    }
    if (pending) id[n++] = t->unk;
    return n;
}

// One word, or one segment of it, that is not looked up as a whole.
static int encode_word(Enc *e, const char *s, size_t len) {
    const Tokenizer *t = e->t;
    CacheSlot *slot = NULL;
    if (len <= CACHE_KEY) {
        slot = &e->s->cache[hash_bytes(s, len, 0) & (CACHE_SLOTS - 1)];
        if (slot->len == len && !memcmp(slot->key, s, len)) return emit(e, slot->ids, slot->n);
    }
    if (len <= SMALL) {
        int32_t id[SMALL];
        size_t n = merge_small(t, id, first_symbols(t, id, s, len));
        if (slot && n <= CACHE_IDS) {
            slot->len = (uint8_t)len;
            slot->n = (uint8_t)n;
            memcpy(slot->key, s, len);
            memcpy(slot->ids, id, n * sizeof *id);
        }
        return emit(e, id, n);
    }
    Scratch *c = e->s;
    if (c->cap < len) {
        free(c->id); free(c->prev); free(c->link);
        c->cap = len;
        c->id = malloc(len * sizeof *c->id);
        c->prev = malloc(len * sizeof *c->prev);
        c->link = malloc(len * sizeof *c->link);
        if (!c->id || !c->prev || !c->link) { c->cap = 0; return no_memory(e); }
    }
    size_t n = first_symbols(t, c->id, s, len);
    return n ? merge_large(e, c->id, n) : 0;
}

static bool is_unk(const Tokenizer *t, const char *s, size_t from, size_t to) {
    if (t->full_fallback) return false;
    return (to - from == 1 ? t->ascii_id[(uint8_t)s[from]] :
            table_find(&t->by_text, &t->text, t->span, s + from, to - from)) < 0;
}

static int encode_piece(Enc *e, const char *s, size_t len) {
    const Tokenizer *t = e->t;
    if (!len) return 0;
    if ((t->options & OPT_IGNORE_MERGES) && len <= t->max_len) {
        int32_t id = t->options & OPT_BYTE_LEVEL ? table_find(&t->by_raw, &t->raw, t->raw_span, s, len)
                                                 : table_find(&t->by_text, &t->text, t->span, s, len);
        if (id >= 0) return emit(e, &id, 1);
    }
    if ((t->options & OPT_BYTE_LEVEL) || !t->segments) return encode_word(e, s, len);
    size_t from = 0, i = 0;
    uint32_t c = utf8_next(s, &i);
    while (i < len) {
        size_t at = i;
        uint32_t d = utf8_next(s, &i);
        if (!glued(t, c, d) && !((t->options & OPT_FUSE_UNK) && is_unk(t, s, at, i))) {
            int rc = encode_word(e, s + from, at - from);
            if (rc < 0) return rc;
            from = at;
        }
        c = d;
    }
    return encode_word(e, s + from, len - from);
}

// ---------------------------------------------------------------------------------------------
// Pre-tokenizers.

static int pretokenize(Enc *e, int step, const char *s, size_t len, bool first);

typedef struct { size_t from, to; bool have, prev_match; } Pending;

// Takes the next piece [a, b) of a split, a match of the pattern or what lies between, and hands on what is complete.
static int split_piece(Enc *e, int step, const char *s, bool first, Behavior how, Pending *p, size_t a, size_t b,
                       bool match) {
    size_t from = a, to = b;
    bool now = true, keep = false;                             // emit [from, to) now; keep [a, b) pending
    switch (how) {
    case SPLIT_REMOVED: now = !match; break;
    case SPLIT_CONTIGUOUS:
    case SPLIT_MERGED_PREVIOUS:
        if (p->have && (how == SPLIT_CONTIGUOUS ? match == p->prev_match : match && !p->prev_match)) {
            p->to = b;
            now = false;
            keep = true;
            a = p->from;
        } else {
            now = p->have;
            from = p->from;
            to = p->to;
            keep = true;
        }
        break;
    case SPLIT_MERGED_NEXT:                                     // only matches are pending
        if (match) { now = p->have; from = p->from; to = p->to; keep = true; }
        else if (p->have) from = p->from;
        break;
    default: break;
    }
    p->have = keep;
    p->from = a;
    p->to = b;
    p->prev_match = match;
    return now && to > from ? pretokenize(e, step + 1, s + from, to - from, first && from == 0) : 0;
}

// Oniguruma's iteration, as its Rust binding does it: an empty match right after a match is passed over.
static int split_regex(Enc *e, int step, const pcre2_code *re, Behavior how, bool invert, const char *s, size_t len,
                       bool first) {
    Pending p = {0};
    size_t done = 0, at = 0;                                    // pieces handed on; where the search begins
    bool any = false;
    int rc;
    uint32_t limit = len > UINT32_MAX / 64 ? UINT32_MAX : (uint32_t)len * 32 + 10000000u;
    pcre2_set_match_limit(e->s->context, limit);
    while (at <= len) {
        int found = pcre2_match(re, (PCRE2_SPTR)s, len, at, PCRE2_NO_UTF_CHECK, e->s->match, e->s->context);
        if (found == PCRE2_ERROR_JIT_STACKLIMIT)
            found = pcre2_match(re, (PCRE2_SPTR)s, len, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, e->s->match,
                                e->s->context);
        if (found == PCRE2_ERROR_NOMATCH) break;
        const size_t *v = pcre2_get_ovector_pointer(e->s->match);
        if (found < 0 || v[0] > v[1] || v[0] < done) {
            uint8_t why[128] = "it matched backwards";
            if (found < 0) pcre2_get_error_message(found, why, sizeof why);
            return err_set(e->err, E_FORMAT, "tokenizer: its regular expression failed on a text of %zu bytes at "
                           "byte %zu: %s; cut the text into shorter lines", len, at, (const char *)why);
        }
        size_t a = v[0], b = v[1];
        if (a == b && any && b == done) {
            if (at >= len) break;
            utf8_next(s, &at);
            continue;
        }
        if (a > done && (rc = split_piece(e, step, s, first, how, &p, done, a, invert)) < 0) return rc;
        if ((rc = split_piece(e, step, s, first, how, &p, a, b, !invert)) < 0) return rc;
        // The pieces handed on ran regular expressions of their own: the limit and v are theirs now.
        pcre2_set_match_limit(e->s->context, limit);
        done = at = b;
        any = true;
    }
    if (done < len && (rc = split_piece(e, step, s, first, how, &p, done, len, invert)) < 0) return rc;
    return p.have && p.to > p.from ? pretokenize(e, step + 1, s + p.from, p.to - p.from, first && p.from == 0) : 0;
}

static int metaspace(Enc *e, int step, const Step *st, const char *s, size_t len, bool first) {
    Buf b = {0};
    int rc = 0;
    bool begins = (s[0] == ' ' && st->a_len) || (len >= st->a_len && !memcmp(s, st->a, st->a_len));
    bool wanted = (st->flags & STEP_PREFIX) && (!(st->flags & STEP_FIRST_ONLY) || first);
    if (wanted && !begins && !(first && e->more)) buf_put(&b, st->a, st->a_len);
    for (size_t i = 0, k; i < len; i = k) {
        const char *space = memchr(s + i, ' ', len - i);
        k = space ? (size_t)(space - s) : len;
        buf_put(&b, s + i, k - i);
        if (space) { buf_put(&b, st->a, st->a_len); k++; }
    }
    if (b.failed) rc = no_memory(e);
    const char *p = (const char *)b.p;
    size_t from = 0, i = 0;
    while (rc == 0 && (st->flags & STEP_SPLIT) && i + st->a_len <= b.n) {   // each mark begins a word
        const char *mark = memmem(p + i, b.n - i, st->a, st->a_len);
        if (!mark) break;
        size_t at = (size_t)(mark - p);
        if (at > from) rc = pretokenize(e, step + 1, p + from, at - from, first && from == 0);
        from = at;
        i = at + st->a_len;
    }
    if (rc == 0 && from < b.n) rc = pretokenize(e, step + 1, p + from, b.n - from, first && from == 0);
    free(b.p);
    return rc;
}

static int pretokenize(Enc *e, int step, const char *s, size_t len, bool first) {
    const Tokenizer *t = e->t;
    if (!len) return 0;
    if (step == t->n_pre) return encode_piece(e, s, len);
    const Step *st = &t->pre[step];
    if (st->kind == PRE_METASPACE) return metaspace(e, step, st, s, len, first);
    if (st->kind != PRE_BYTE_LEVEL)
        return split_regex(e, step, st->re, (Behavior)st->behavior, st->flags & STEP_INVERT, s, len, first);

    char *copy = NULL;                                          // only where a space is put in front
    if ((st->flags & STEP_PREFIX) && s[0] != ' ' && !(first && e->more)) {
        if (!(copy = malloc(len + 1))) return no_memory(e);
        copy[0] = ' ';
        memcpy(copy + 1, s, len);
        s = copy;
        len++;
    }
    int rc = st->flags & STEP_REGEX ? split_regex(e, step, t->gpt2_re, SPLIT_ISOLATED, false, s, len, first)
                                    : pretokenize(e, step + 1, s, len, first);
    free(copy);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Normalizers and added tokens.

static void normalize(const Tokenizer *t, Buf *out, const char *s, size_t len, bool prepend) {
    Buf cur = {0};
    buf_put(&cur, s, len);
    for (int k = 0; k < t->n_norm && cur.n; k++) {
        const Step *st = &t->norm[k];
        Buf next = {0};
        if (st->kind == NORM_PREPEND) {
            if (!prepend) continue;
            buf_put(&next, st->a, st->a_len);
            buf_put(&next, cur.p, cur.n);
        } else {
            size_t i = 0;
            const uint8_t *hit;
            while (i < cur.n && (hit = memmem(cur.p + i, cur.n - i, st->a, st->a_len))) {
                size_t at = (size_t)(hit - cur.p);
                buf_put(&next, cur.p + i, at - i);
                buf_put(&next, st->b, st->b_len);
                i = at + st->a_len;
            }
            buf_put(&next, cur.p + i, cur.n - i);
        }
        next.failed |= cur.failed;
        free(cur.p);
        cur = next;
    }
    *out = cur;
}

static bool word_char(const Tokenizer *t, const char *s, size_t len) {
    pcre2_match_data *m = pcre2_match_data_create(1, NULL);
    bool yes = m && pcre2_match(t->word_re, (PCRE2_SPTR)s, len, 0, PCRE2_NO_UTF_CHECK, m, NULL) > 0;
    pcre2_match_data_free(m);
    return yes;
}

// Cuts added tokens out of s: leftmost, the longest at each place. level 0 looks in the text as it came,
// level 1 in what the normalizers made of the pieces between.
static int cut_added(Enc *e, const char *s, size_t len, int level, bool first) {
    const Tokenizer *t = e->t;
    const Trie *trie = level == 0 ? &t->trie_raw : &t->trie_norm;
    size_t done = 0, i = 0;
    int rc = 0;
    for (bool last = false; !last && rc == 0;) {
        int32_t id = -1;
        size_t k = 0, start, stop;
        if (trie->n > 1) while (i < len && !(trie->first[(uint8_t)s[i]] && (k = trie_match(trie, s + i, len - i,
            &id)))) i++;
        else i = len;
        last = i >= len;
        start = i;
        stop = i += k;
        if (!last) {
            int f = t->flags[id];
            if (!e->special && (f & TOK_SPECIAL)) continue;
            if ((f & TOK_SINGLE_WORD) && ((start && word_char(t, s + char_start(s, start), start - char_start(s,
                start))) ||
                                          (stop < len && word_char(t, s + stop, len - stop))))
                continue;
            if (f & TOK_LSTRIP)
                while (start > done) {
                    size_t from = char_start(s, start), at = from;
                    if (from < done || !is_space_cp(utf8_next(s, &at))) break;
                    start = from;
                }
            if (f & TOK_RSTRIP)
                while (stop < len) {
                    size_t at = stop;
                    if (!is_space_cp(utf8_next(s, &at))) break;
                    stop = at;
                }
        }
        if (start > done) {
            bool f = first && done == 0;
            if (level == 0) {
                if (t->n_norm) {
                    Buf b = {0};
                    normalize(t, &b, s + done, start - done, !(f && e->more));
                    rc = b.failed ? no_memory(e) : cut_added(e, (const char *)b.p, b.n, 1, f);
                    free(b.p);
                } else {
                    rc = cut_added(e, s + done, start - done, 1, f);
                }
            } else {
                rc = pretokenize(e, 0, s + done, start - done, f);
            }
        }
        if (rc == 0 && !last) rc = emit(e, &id, 1);
        if (stop > done) done = stop;
    }
    return rc;
}

static int encode(const Tokenizer *t, const char *text, size_t len, bool special, bool more, int32_t **ids, size_t *n,
                  Err *err) {
    Enc e = {.t = t, .special = special, .more = more, .err = err};
    Buf lossy = {0};
    *ids = NULL;
    *n = 0;
    if (len > INT32_MAX / 4)                                    // positions in a word are 32 bits, and text may grow
        return err_set(err, E_USAGE, "tokenizer: a text of %zu bytes in one piece; expected at most %d: cut it into "
                       "lines", len,
                       INT32_MAX / 4);
    if (!len) return 0;
    if (!(e.s = scratch_take(t))) return no_memory(&e);
    int rc = 0;
    if (!utf8_valid(text, len)) {
        utf8_lossy(&lossy, text, len);
        if (lossy.failed) rc = no_memory(&e);
        text = (const char *)lossy.p;
        len = lossy.n;
    }
    if (rc == 0) rc = cut_added(&e, text, len, 0, true);
    scratch_give(t, e.s);
    free(lossy.p);
    if (rc < 0 || !e.n) {
        free(e.ids);
        return rc;
    }
    *ids = e.ids;
    *n = e.n;
    return 0;
}

int tokenizer_encode(const Tokenizer *t, const char *text, size_t len, bool special, int32_t **ids, size_t *n,
                     Err *err) {
    return encode(t, text, len, special, false, ids, n, err);
}

int tokenizer_encode_more(const Tokenizer *t, const char *text, size_t len, bool special, int32_t **ids, size_t *n,
                          Err *err) {
    return encode(t, text, len, special, true, ids, n, err);
}

size_t tokenizer_safe_cut(const Tokenizer *t, const char *text, size_t len, size_t from) {
    if (!t->cuts) return len;
    for (size_t i = from > 1 ? from - 1 : 1; i + 1 < len; i++) {
        const char *nl = memchr(text + i, '\n', len - i);
        if (!nl) break;
        i = (size_t)(nl - text);
        if (i + 1 >= len) break;
        char before = text[i - 1], after = text[i + 1];
        bool letter = (after >= 'a' && after <= 'z') || (after >= 'A' && after <= 'Z');
        if (before > 32 && before < 127 && letter &&
            ((t->options & OPT_BYTE_LEVEL) || !glued(t, '\n', (uint8_t)after)))
            return i + 1;
    }
    return len;
}

// ---------------------------------------------------------------------------------------------
// Questions.

const char *tokenizer_piece(const Tokenizer *t, int32_t id, bool first, size_t *len) {
    *len = 0;
    if (id < 0 || id >= t->n || !t->flags[id]) return "";
    Span s = t->flags[id] & TOK_ADDED ? t->span[id] : t->raw_span[id];
    const char *p = (const char *)(t->flags[id] & TOK_ADDED ? t->text.p : t->raw.p) + s.off;
    bool strip = first && (t->options & OPT_STRIP_FIRST) && s.len && p[0] == ' ';
    *len = s.len - strip;
    return p + strip;
}

bool tokenizer_is_special(const Tokenizer *t, int32_t id) {
    return id >= 0 && id < t->n && (t->flags[id] & TOK_SPECIAL);
}

int tokenizer_vocab_size(const Tokenizer *t) { return t->n; }
int tokenizer_bos(const Tokenizer *t) { return t->bos; }
int tokenizer_eos(const Tokenizer *t) { return t->eos; }
uint64_t tokenizer_hash(const Tokenizer *t) { return t->hash; }

const char *tokenizer_name(const Tokenizer *t) {
    return t->options & OPT_BYTES ? "bytes" : t->options & OPT_BYTE_LEVEL ? "byte-level bpe" : "sentencepiece bpe";
}
