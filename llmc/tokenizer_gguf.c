// A tokenizer as GGUF metadata, the inverse of tokenizer_from_gguf. GGUF says what a token is and which merges there
// are, and names the way in which text is split by one word (tokenizer.ggml.pre): tokenizers that split in another way
// than those that have a word cannot be written.
#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>
#include "json.h"
#include "tokenizer_impl.h"

enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER = 4, TYPE_UNUSED = 5, TYPE_BYTE = 6 };

static const char *spelling(const Tokenizer *t, int32_t id, size_t *len) {
    *len = t->span[id].len;
    return (const char *)t->text.p + t->span[id].off;
}

static bool is_step(const Step *s, StepKind kind, int flags) { return s->kind == kind && s->flags == flags; }

// The word for how a byte-level tokenizer splits text; NULL if there is none.
static const char *pre_name(const Tokenizer *t) {
    const Step *s = t->pre;
    if (t->n_norm) return NULL;
    if (t->options & OPT_BYTES) return "gpt-2";          // a token a byte: no merge reaches across any split
    if (t->n_pre == 1 && is_step(s, PRE_BYTE_LEVEL, STEP_REGEX) && !(t->options & OPT_IGNORE_MERGES)) return "gpt-2";
    if (t->n_pre != 2) return NULL;
    if (is_step(s, PRE_DIGITS, 0) && s->behavior == SPLIT_ISOLATED && is_step(s + 1, PRE_BYTE_LEVEL, STEP_REGEX) &&
        !(t->options & OPT_IGNORE_MERGES))
        return "smollm";
    // llama-bpe looks a word up whole before it merges.
    bool llama3 = is_step(s, PRE_SPLIT, 0) && s->behavior == SPLIT_ISOLATED && s->a_len == strlen(LLAMA3_PATTERN) &&
        !memcmp(s->a, LLAMA3_PATTERN, s->a_len) && is_step(s + 1, PRE_BYTE_LEVEL, 0);
    if (llama3 && (t->options & OPT_IGNORE_MERGES)) return "llama-bpe";
    return NULL;
}

// Does a SentencePiece style tokenizer split as GGUF's "llama" does: spaces become U+2581, with one more in front?
// Characters that are no token go as their bytes there.
static bool is_plain_spm(const Tokenizer *t, bool *prefix) {
    int n = t->n_norm;
    if (!(t->options & OPT_BYTE_FALLBACK)) return false;
    *prefix = n == 2 && t->norm[0].kind == NORM_PREPEND && t->norm[0].a_len == strlen(SPACE_MARK) &&
        !memcmp(t->norm[0].a, SPACE_MARK, t->norm[0].a_len);
    const Step *last = n ? &t->norm[n - 1] : NULL;
    bool replaces = last && last->kind == NORM_REPLACE && last->a_len == 1 && last->a[0] == ' ' &&
        last->b_len == strlen(SPACE_MARK) && !memcmp(last->b, SPACE_MARK, last->b_len);
    if (replaces && t->n_pre == 0) return n == 1 || *prefix;
    if (n || t->n_pre != 1 || t->pre[0].kind != PRE_METASPACE || t->pre[0].flags & STEP_SPLIT) return false;
    if (t->pre[0].a_len != strlen(SPACE_MARK) || memcmp(t->pre[0].a, SPACE_MARK, t->pre[0].a_len)) return false;
    *prefix = t->pre[0].flags & STEP_PREFIX;
    return true;
}

static int token_type(const Tokenizer *t, int32_t id, bool spm) {
    int flags = id < t->n ? t->flags[id] : 0;
    size_t len;
    if (!flags) return TYPE_UNUSED;
    if (spm && id == t->unk) return TYPE_UNKNOWN;
    if (flags & TOK_SPECIAL) return TYPE_CONTROL;
    const char *s = spelling(t, id, &len);
    if (spm && len == 6 && !memcmp(s, "<0x", 3) && s[5] == '>') return TYPE_BYTE;
    return flags & TOK_ADDED ? TYPE_USER : TYPE_NORMAL;
}

static void put_tokens(GgufWriter *w, const Tokenizer *t, int vocab, bool spm) {
    gguf_put_array(w, "tokenizer.ggml.tokens", GGUF_STRING, (uint64_t)vocab);
    for (int32_t id = 0; id < vocab; id++) {
        char pad[32];
        size_t len = (size_t)snprintf(pad, sizeof pad, "[PAD%d]", id);
        const char *s = id < t->n && t->flags[id] ? spelling(t, id, &len) : pad;
        gguf_elem_string(w, s, len);
    }
    gguf_put_array(w, "tokenizer.ggml.token_type", GGUF_I32, (uint64_t)vocab);
    for (int32_t id = 0; id < vocab; id++) gguf_elem_i32(w, token_type(t, id, spm));
}

static int put_merges(GgufWriter *w, const Tokenizer *t, Err *err) {
    gguf_put_array(w, "tokenizer.ggml.merges", GGUF_STRING, (uint64_t)t->n_merges);
    Buf pair = {0};
    for (int m = 0; m < t->n_merges; m++) {
        size_t a, b;
        const char *left = spelling(t, t->merges[m].a, &a), *right = spelling(t, t->merges[m].b, &b);
        if (memchr(left, ' ', a) || memchr(right, ' ', b)) {
            free(pair.p);
            return err_set(err, E_USAGE, "the tokenizer merges tokens with spaces in them, which GGUF's merges cannot "
                           "say; write the model without its tokenizer (--allow-inexact), or use --to hf");
        }
        pair.n = 0;
        buf_put(&pair, left, a);
        buf_str(&pair, " ");
        buf_put(&pair, right, b);
        gguf_elem_string(w, (const char *)pair.p, pair.n);
    }
    free(pair.p);
    return 0;
}

// SentencePiece files have scores instead of merges: any two neighbours that make a token may be joined, the best token
// first. So the merges must be all the ways to cut tokens in two, and those of one token must stand together.
static int put_scores(GgufWriter *w, const Tokenizer *t, int vocab, Err *err) {
    float *score = xcalloc((size_t)vocab, sizeof *score);
    bool *made = xcalloc((size_t)vocab, sizeof *made);
    int64_t ways = 0;
    int rank = 0;
    bool ordered = true;
    for (int m = 0; m < t->n_merges; m++) {
        int32_t c = t->merges[m].c;
        if (made[c]) {
            ordered &= t->merges[m - 1].c == c;
            continue;
        }
        made[c] = true;
        score[c] = -(float)++rank;
    }
    for (int32_t id = 0; id < t->n; id++) {
        size_t len, i = 0;
        if (token_type(t, id, true) != TYPE_NORMAL) continue;
        const char *s = spelling(t, id, &len);
        while (i < len) {
            utf8_next(s, &i);
            ways += i < len && table_find(&t->by_text, &t->text, t->span, s, i) >= 0 &&
                table_find(&t->by_text, &t->text, t->span, s + i, len - i) >= 0;
        }
    }
    gguf_put_array(w, "tokenizer.ggml.scores", GGUF_F32, (uint64_t)vocab);
    for (int32_t id = 0; id < vocab; id++) gguf_elem_f32(w, score[id]);
    free(score);
    free(made);
    if (ordered && ways == t->n_merges && rank < 1 << 24) return 0;
    return err_set(err, E_USAGE, "the tokenizer's %d merges are not those of a SentencePiece vocabulary (%lld ways to "
                   "cut its tokens in two), which GGUF's scores cannot say; write the model without its tokenizer "
                   "(--allow-inexact), or use --to hf", t->n_merges, (long long)ways);
}

// The template itself, or that called "default" where there are several.
static void put_chat_template(GgufWriter *w, const Tokenizer *t) {
    cJSON *root = t->config ? json_parse(t->config, t->config_len, "tokenizer_config.json", NULL) : NULL;
    const cJSON *chat = cJSON_GetObjectItemCaseSensitive(root, "chat_template"), *one;
    const char *text = cJSON_GetStringValue(chat);
    cJSON_ArrayForEach(one, chat) {
        const char *name = json_string(one, "name");
        if (name && !strcmp(name, "default")) text = json_string(one, "template");
    }
    if (text) gguf_put_text(w, "tokenizer.chat_template", text);
    cJSON_Delete(root);
}

int tokenizer_to_gguf(const Tokenizer *t, GgufWriter *w, int vocab, Err *err) {
    bool spm = !(t->options & OPT_BYTE_LEVEL), prefix = false;
    const char *pre = spm ? NULL : pre_name(t);
    if (t->n > vocab)
        return err_set(err, E_FORMAT, "the tokenizer has ids up to %d, the model's vocabulary ends at %d", t->n - 1,
                       vocab - 1);
    if (spm ? !is_plain_spm(t, &prefix) : !pre)
        return err_set(err, E_USAGE, "the tokenizer (%s) splits text in a way that GGUF has no name for; write the "
                       "model without its tokenizer (--allow-inexact), or use --to hf", tokenizer_name(t));
    gguf_put_text(w, "tokenizer.ggml.model", spm ? "llama" : "gpt2");
    if (pre) gguf_put_text(w, "tokenizer.ggml.pre", pre);
    put_tokens(w, t, vocab, spm);
    int rc = spm ? put_scores(w, t, vocab, err) : put_merges(w, t, err);
    if (rc) return rc;
    if (t->unk >= 0) gguf_put_u32(w, "tokenizer.ggml.unknown_token_id", (uint32_t)t->unk);
    gguf_put_bool(w, "tokenizer.ggml.add_bos_token", t->options & OPT_ADD_BOS);
    gguf_put_bool(w, "tokenizer.ggml.add_eos_token", t->options & OPT_ADD_EOS);
    if (spm) gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", prefix);
    put_chat_template(w, t);
    return 0;
}
