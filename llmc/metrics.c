// Wikitext, HellaSwag, distance from a reference: texts and values in, prepared texts and sums out.
#include "metrics.h"
#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <wctype.h>
#include "json.h"

// ---------------------------------------------------------------------------------------------
// Characters.

// Decodes one UTF-8 character of s[0, len), len > 0. Returns its length; a byte that starts none is a character of its
// own with a value that no class contains.
static size_t utf8_decode(const char *s, size_t len, uint32_t *c) {
    const uint8_t *p = (const uint8_t *)s;
    static const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    size_t n = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : p[0] < 0xf5 ? 4 : 0;
    *c = UINT32_MAX;
    if (n == 0 || n > len) return 1;
    uint32_t v = n == 1 ? p[0] : p[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80) return 1;
        v = v << 6 | (p[i] & 0x3fu);
    }
    if (v < smallest[n] || v > 0x10ffff || (v >= 0xd800 && v < 0xe000)) return 1;
    *c = v;
    return n;
}

static size_t utf8_encode(char *s, uint32_t c) {
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) s[i] = (char)(0x80 | (c & 0x3f));
    s[0] = (char)(n == 1 ? c : (0xf00u >> n & 0xffu) | c);
    return n;
}

// What Python's str.isspace() and \s say, which lm-eval splits and strips by.
static bool is_space(uint32_t c) {
    return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

// Length of the whitespace at the start of s.
static size_t space_prefix(const char *s, size_t len) {
    size_t i = 0;
    while (i < len) {
        uint32_t c;
        size_t n = utf8_decode(s + i, len - i, &c);
        if (!is_space(c)) break;
        i += n;
    }
    return i;
}

// Length of s without the whitespace at its end.
static size_t space_trimmed(const char *s, size_t len) {
    size_t end = 0;
    for (size_t i = 0; i < len;) {
        uint32_t c;
        i += utf8_decode(s + i, len - i, &c);
        if (!is_space(c)) end = i;
    }
    return end;
}

static TextSpan strip(const char *s, size_t len) {
    size_t start = space_prefix(s, len);
    return (TextSpan){s + start, space_trimmed(s + start, len - start)};
}

size_t count_words(const char *text, size_t len) {
    size_t fields = 1;
    bool in_space = false;
    for (size_t i = 0; i < len;) {
        uint32_t c;
        i += utf8_decode(text + i, len - i, &c);
        bool space = is_space(c);
        fields += space && !in_space;
        in_space = space;
    }
    return fields;
}

size_t count_chars(const char *text, size_t len) {
    size_t n = 0;
    for (size_t i = 0; i < len; n++) {
        uint32_t c;
        i += utf8_decode(text + i, len - i, &c);
    }
    return n;
}

// ---------------------------------------------------------------------------------------------
// A text that is rewritten in place. No rule makes it longer than it is, but for " [title]" -> ". ", which shortens.

typedef struct { char *s; size_t len; } Buffer;

static Buffer buffer_copy(const char *s, size_t len) {
    Buffer b = {xmalloc(len + 1), len};
    if (len) memcpy(b.s, s, len);
    b.s[len] = 0;
    return b;
}

// Every `from`, left to right without overlap, becomes `to`, which is no longer.
static void replace(Buffer *b, const char *from, const char *to) {
    size_t nf = strlen(from), nt = strlen(to), out = 0;
    for (size_t i = 0; i < b->len;) {
        if (b->len - i >= nf && memcmp(b->s + i, from, nf) == 0) {
            memcpy(b->s + out, to, nt);
            out += nt;
            i += nf;
        } else {
            b->s[out++] = b->s[i++];
        }
    }
    b->len = out;
    b->s[out] = 0;
}

// Whitespace at the inner edges of each pair goes. A pair is an `open` and the first `close` after it, whatever stands
// between; the search goes on behind it. One byte may be both: quotes pair up as they come.
static void strip_pairs(Buffer *b, char open, char close) {
    size_t out = 0;
    for (size_t i = 0; i < b->len;) {
        const char *end = b->s[i] == open ? memchr(b->s + i + 1, close, b->len - i - 1) : NULL;
        b->s[out++] = b->s[i++];
        if (!end) continue;
        TextSpan inner = strip(b->s + i, (size_t)(end - b->s) - i);
        memmove(b->s + out, inner.s, inner.len);
        out += inner.len;
        b->s[out++] = close;
        i = (size_t)(end - b->s) + 1;
    }
    b->len = out;
    b->s[out] = 0;
}

// ---------------------------------------------------------------------------------------------
// Wikitext.

// A title after "= = =" became "===" and "= =" became "==": "= Title =", but not "== Section ==".
static bool is_title(const char *line, size_t len) {
    Buffer b = buffer_copy(line, len);
    replace(&b, "= = =", "===");
    replace(&b, "= =", "==");
    TextSpan t = strip(b.s, b.len);
    bool title = t.len >= 2 && memcmp(t.s, "= ", 2) == 0 && memcmp(t.s + t.len - 2, " =", 2) == 0;
    free(b.s);
    return title;
}

typedef struct { TextSpan *page; int n, room; } PageList;

static void add_page(PageList *l, const char *s, size_t len) {
    if (space_prefix(s, len) == len) return;
    if (l->n == l->room) {
        l->room = l->room ? 2 * l->room : 64;
        TextSpan *more = realloc(l->page, (size_t)l->room * sizeof *more);
        if (!more) abort();                      // 16 bytes a page: the text itself would not have fit
        l->page = more;
    }
    l->page[l->n++] = (TextSpan){s, len};
}

int wikitext_pages(TextSpan **pages, const char *text, size_t len) {
    PageList list = {0};
    *pages = NULL;
    if (len == 0) return 0;
    size_t page = 0, line = 0;                   // where the current page and the current line start
    for (;;) {
        const char *nl = line < len ? memchr(text + line, '\n', len - line) : NULL;
        if (is_title(text + line, (nl ? (size_t)(nl - text) : len) - line)) {
            add_page(&list, text + page, line > page ? line - 1 - page : 0);
            page = line;
        }
        if (!nl) break;
        line = (size_t)(nl - text) + 1;
    }
    add_page(&list, text + page, len - page);
    *pages = list.page;
    return list.n;
}

char *wikitext_detokenize(const char *page, size_t len, size_t *out_len) {
    static const struct { const char *from, *to; } first[] = {
        {"s '", "s'"}, {" @-@ ", "-"}, {" @,@ ", ","}, {" @.@ ", "."},
        {" : ", ": "}, {" ; ", "; "}, {" . ", ". "}, {" ! ", "! "}, {" ? ", "? "}, {" , ", ", "},
    }, last[] = {
        {"= = = =", "===="}, {"= = =", "==="}, {"= =", "=="}, {" \xc2\xb0 ", "\xc2\xb0"},      // the degree sign
        {" \n", "\n"}, {"\n ", "\n"}, {" N ", " 1 "}, {" 's", "'s"},
    };
    static const char pairs[5][2] = {{'(', ')'}, {'[', ']'}, {'{', '}'}, {'"', '"'}, {'\'', '\''}};
    Buffer b = buffer_copy(page, len);
    for (size_t i = 0; i < sizeof first / sizeof *first; i++) replace(&b, first[i].from, first[i].to);
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) strip_pairs(&b, pairs[i][0], pairs[i][1]);
    for (size_t i = 0; i < sizeof last / sizeof *last; i++) replace(&b, last[i].from, last[i].to);
    *out_len = b.len;
    return b.s;
}

size_t rolling_window_count(size_t n, int M) { return n / (size_t)M + (n % (size_t)M != 0); }

Window rolling_window(size_t n, int M, size_t i) {
    size_t m = (size_t)M, done = i * m, scored = n - done < m ? n - done : m;
    // Inputs end one before the last target: position done + scored of [prefix] + tokens, exclusive.
    size_t end = done + scored, begin = end > m ? end - m : 0;
    return (Window){begin, (int)(end - begin), (int)scored};
}

double word_perplexity(const TextScore *s) { return exp(-s->loglik / (double)s->words); }
double byte_perplexity(const TextScore *s) { return exp(-s->loglik / (double)s->bytes); }
double bits_per_byte(const TextScore *s) { return -s->loglik / (double)s->bytes / log(2.0); }
double token_perplexity(const TextScore *s) { return exp(-s->loglik / (double)s->tokens); }

// ---------------------------------------------------------------------------------------------
// HellaSwag.

char *hellaswag_clean(const char *text) {
    TextSpan t = strip(text, strlen(text));
    Buffer b = buffer_copy(t.s, t.len);
    replace(&b, " [title]", ". ");
    // \[.*?\] goes: from a bracket to the first closing one on its line.
    size_t out = 0;
    for (size_t i = 0; i < b.len;) {
        const char *close = b.s[i] == '[' ? memchr(b.s + i, ']', b.len - i) : NULL;
        if (close && !memchr(b.s + i, '\n', (size_t)(close - b.s) - i)) i = (size_t)(close - b.s) + 1;
        else b.s[out++] = b.s[i++];
    }
    b.len = out;
    b.s[out] = 0;
    replace(&b, "  ", " ");
    return b.s;
}

// First letter upper, all others lower, as str.capitalize(). The library's C.UTF-8 tables map one character to one, so
// the few letters that grow (sharp s to "Ss") stay as they are; a character whose code changes length too, for safety.
static char *capitalize(const char *text) {
    Buffer b = buffer_copy(text, strlen(text));
    locale_t utf8 = newlocale(LC_CTYPE_MASK, "C.UTF-8", (locale_t)0);
    for (size_t i = 0, n; i < b.len; i += n) {
        uint32_t c, changed;
        n = utf8_decode(b.s + i, b.len - i, &c);
        if (c == UINT32_MAX) continue;
        if (utf8) changed = (uint32_t)(i ? towlower_l((wint_t)c, utf8) : towupper_l((wint_t)c, utf8));
        else changed = i ? c + (c >= 'A' && c <= 'Z' ? 32 : 0) : c - (c >= 'a' && c <= 'z' ? 32 : 0);
        char coded[4];
        if (changed != c && utf8_encode(coded, changed) == n) memcpy(b.s + i, coded, n);
    }
    if (utf8) freelocale(utf8);
    return b.s;
}

static char *join3(const char *a, const char *between, const char *b) {
    size_t na = strlen(a), nm = strlen(between), nb = strlen(b);
    char *s = xmalloc(na + nm + nb + 1);
    memcpy(s, a, na);
    memcpy(s + na, between, nm);
    memcpy(s + na + nm, b, nb + 1);
    return s;
}

static void item_free(HellaswagItem *it) {
    free(it->context);
    for (int i = 0; i < 4; i++) free(it->ending[i]);
}

void hellaswag_free(Hellaswag *h) {
    for (int i = 0; i < h->n; i++) item_free(&h->item[i]);
    free(h->item);
    *h = (Hellaswag){0};
}

static int item_from_json(HellaswagItem *it, const char *line, size_t len, const char *where, Err *err) {
    cJSON *obj = json_parse(line, len, where, err);
    if (!obj) return err ? err->code : E_FORMAT;
    const char *a = json_string(obj, "ctx_a"), *b = json_string(obj, "ctx_b");
    const char *activity = json_string(obj, "activity_label");
    const cJSON *endings = cJSON_GetObjectItemCaseSensitive(obj, "endings");
    const cJSON *label = cJSON_GetObjectItemCaseSensitive(obj, "label");
    int rc = 0;
    // The data set has the label as a string, its mirrors as a number.
    double right = cJSON_IsNumber(label) ? label->valuedouble
                 : cJSON_IsString(label) && strlen(label->valuestring) == 1 ? label->valuestring[0] - '0' : -1;
    if (!a || !b || !activity || !cJSON_IsArray(endings) || cJSON_GetArraySize(endings) != 4)
        rc = err_set(err, E_FORMAT, "%s: expected strings ctx_a, ctx_b and activity_label and an array of 4 endings",
                     where);
    else if (!(right == 0 || right == 1 || right == 2 || right == 3))
        rc = err_set(err, E_FORMAT, "%s: label must be 0, 1, 2 or 3 (the test split has no labels: use the validation "
                                    "split)", where);
    for (int i = 0; rc == 0 && i < 4; i++)
        if (!cJSON_IsString(cJSON_GetArrayItem(endings, i))) rc = err_set(err, E_FORMAT,
                "%s: ending %d is not a string", where, i);
    if (rc == 0) {
        char *second = capitalize(b), *context = join3(a, " ", second), *query = join3(activity, ": ", context);
        it->context = hellaswag_clean(query);
        free(second);
        free(context);
        free(query);
        for (int i = 0; i < 4; i++) it->ending[i] = hellaswag_clean(cJSON_GetArrayItem(endings, i)->valuestring);
        it->label = (int)right;
    }
    cJSON_Delete(obj);
    return rc;
}

static char *line_copy(TextSpan line) {
    char *s = xmalloc(line.len + 1);
    memcpy(s, line.s, line.len);
    s[line.len] = 0;
    return s;
}

static int item_from_lines(HellaswagItem *it, const TextSpan line[6], const char *where, Err *err) {
    if (line[1].len != 1 || line[1].s[0] < '0' || line[1].s[0] > '3')
        return err_set(err, E_FORMAT, "%s: the second of six lines must be the index of the right ending, 0 to 3, "
                                      "found \"%.*s\"",
                       where, (int)(line[1].len < 40 ? line[1].len : 40), line[1].s);
    it->label = line[1].s[0] - '0';
    it->context = line_copy(line[0]);
    for (int i = 0; i < 4; i++) it->ending[i] = line_copy(line[2 + i]);
    return 0;
}

int hellaswag_parse(Hellaswag *h, const char *text, size_t len, const char *what, int limit, Err *err) {
    *h = (Hellaswag){0};
    h->prepared = space_prefix(text, len) == len || text[space_prefix(text, len)] != '{';
    int room = 0, filled = 0;
    TextSpan six[6];
    size_t number = 0;
    for (size_t at = 0; at < len && !(limit > 0 && h->n == limit);) {
        const char *nl = memchr(text + at, '\n', len - at);
        size_t end = nl ? (size_t)(nl - text) : len;
        TextSpan line = {text + at, end - at};
        if (line.len && line.s[line.len - 1] == '\r') line.len--;
        at = end + 1;
        number++;
        if (memchr(line.s, 0, line.len)) {
            hellaswag_free(h);
            return err_set(err, E_FORMAT, "%s: line %zu contains a NUL byte", what, number);
        }
        if (space_prefix(line.s, line.len) == line.len && (!h->prepared || filled == 0)) continue;
        if (h->prepared) {
            six[filled++] = line;
            if (filled < 6) continue;
            filled = 0;
        }
        if (h->n == room) {
            room = room ? 2 * room : 256;
            HellaswagItem *more = realloc(h->item, (size_t)room * sizeof *more);
            if (!more) {
                hellaswag_free(h);
                return err_set(err, E_NOMEM, "%s: no memory for %d tasks; use --limit", what, room);
            }
            h->item = more;
        }
        HellaswagItem *it = &h->item[h->n++];
        *it = (HellaswagItem){0};
        char where[1100];
        snprintf(where, sizeof where, "%s, line %zu", what, number);
        int rc = h->prepared ? item_from_lines(it, six, where, err) : item_from_json(it, line.s, line.len, where, err);
        if (rc < 0) {
            hellaswag_free(h);
            return rc;
        }
        for (int i = 0; i < 4; i++) {
            size_t chars = count_chars(it->ending[i], strlen(it->ending[i]));
            it->chars[i] = chars > 0 ? (int)chars : 1;       // an empty ending: its score stands as it is
        }
    }
    if (h->n == 0 || filled) {
        int n = h->n;
        hellaswag_free(h);
        if (n == 0 && !filled) return err_set(err, E_FORMAT, "%s: no HellaSwag tasks in it", what);
        return err_set(err, E_FORMAT, "%s: ends in the middle of a task (%d of 6 lines)", what, filled);
    }
    return 0;
}

int hellaswag_load(Hellaswag *h, const char *path, int limit, Err *err) {
    FileMap map;
    int rc = file_map(&map, path, err);
    if (rc < 0) return rc;
    rc = hellaswag_parse(h, (const char *)map.data, map.size, path, limit, err);
    file_unmap(&map);
    return rc;
}

void choice_add(ChoiceScore *c, const double *scores, const int *chars, int n_choices, int label) {
    int best = 0, best_norm = 0;
    for (int i = 1; i < n_choices; i++) {
        if (scores[i] > scores[best]) best = i;
        if (scores[i] / chars[i] > scores[best_norm] / chars[best_norm]) best_norm = i;
    }
    c->n++;
    c->right += best == label;
    c->right_norm += best_norm == label;
}

double choice_stderr(int n, int right) {
    if (n < 2) return NAN;
    double acc = (double)right / n;
    return sqrt(acc * (1.0 - acc) / (n - 1));
}

// ---------------------------------------------------------------------------------------------
// Distance from a reference model.

typedef struct { double mean, error; } Mean;

// Of a[i] - b[i], b NULL for none, in the order of the text.
static Mean window_mean(const float *a, const float *b, const size_t *count, size_t windows) {
    double sum = 0, squares = 0;
    size_t n = 0;
    for (size_t w = 0; w < windows; w++) n += count[w];
    for (size_t i = 0; i < n; i++) sum += (double)a[i] - (b ? (double)b[i] : 0.0);
    double mean = sum / (double)n;
    for (size_t w = 0, i = 0; w < windows; w++) {
        double off = -mean * (double)count[w];
        for (size_t end = i + count[w]; i < end; i++) off += (double)a[i] - (b ? (double)b[i] : 0.0);
        squares += off * off;
    }
    double W = (double)windows;
    return (Mean){mean, windows < 2 ? NAN : sqrt(W / (W - 1) * squares) / (double)n};
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double percentile(const float *sorted, size_t n, double q) {
    double at = q * (double)(n - 1);
    size_t low = (size_t)at, high = low + 1 < n ? low + 1 : low;
    return (double)sorted[low] + (at - (double)low) * ((double)sorted[high] - (double)sorted[low]);
}

void distance_measure(Distance *d, float *kl, const float *loss, const float *ref_loss, const float *same,
                      const size_t *count, size_t windows) {
    Mean divergence = window_mean(kl, NULL, count, windows), alike = window_mean(same, NULL, count, windows);
    Mean change = window_mean(loss, ref_loss, count, windows);
    *d = (Distance){.kl_mean = divergence.mean, .kl_stderr = divergence.error, .same = alike.mean,
                    .same_stderr = alike.error, .ratio = exp(change.mean),
                    .ratio_stderr = exp(change.mean) * change.error};
    for (size_t w = 0; w < windows; w++) d->n += count[w];
    if (isnan(divergence.mean)) {                            // nothing to sort by
        *d = (Distance){d->n, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN};
        return;
    }
    qsort(kl, d->n, sizeof *kl, by_value);
    d->kl_median = percentile(kl, d->n, 0.5);
    d->kl_p99 = percentile(kl, d->n, 0.99);
    d->kl_max = (double)kl[d->n - 1];
}
