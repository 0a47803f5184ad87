// Ids against Hugging Face's `tokenizers` (dev/ref/gen_tokenizer.py), the three forms a tokenizer has, speed on words
// that would be quadratic, and bad files.
#include "test_common.h"
#include "safetensors.h"
#include "tokenizer.h"
#ifdef _OPENMP
#include <omp.h>
#endif

static Safetensors golden;
static const uint8_t *text_data;
static const int64_t *text_offset;
static size_t n_texts;

static int open_golden(void **state) {
    (void)state;
    Err err;
    if (safetensors_open(&golden, "test/golden/tokens.safetensors", &err) < 0) {
        print_error("%s\n", err.text);
        return -1;
    }
    const StTensor *text = safetensors_find(&golden, "text"), *offset = safetensors_find(&golden, "offsets");
    if (!text || !offset) return -1;
    text_data = text->data;
    text_offset = (const int64_t *)(const void *)offset->data;
    n_texts = (size_t)offset->shape[0] - 1;
    return 0;
}

static int close_golden(void **state) {
    (void)state;
    safetensors_close(&golden);
    return 0;
}

static Tokenizer *load(const char *path) {
    Tokenizer *t = NULL;
    Err err = {0};
    size_t n = strlen(path);
    int rc;
    if (n > 5 && !strcmp(path + n - 5, ".gguf")) {
        Gguf g;
        rc = gguf_open(&g, path, &err);
        if (rc == 0) {
            rc = tokenizer_from_gguf(&t, &g, &err);
            gguf_close(&g);
        }
    } else {
        char *text;
        size_t len;
        rc = file_read(&text, &len, path, (size_t)1 << 26, &err);
        if (rc == 0) {
            rc = tokenizer_from_json(&t, text, len, &err);
            free(text);
        }
    }
    if (rc < 0) fail_msg("%s: %s", path, err.text);
    return t;
}

static Tokenizer *through_blob(const Tokenizer *t) {
    Err err = {0};
    uint8_t *blob;
    size_t size;
    Tokenizer *u;
    assert_int_equal(tokenizer_to_blob(t, &blob, &size, &err), 0);
    if (tokenizer_from_blob(&u, blob, size, &err) < 0) fail_msg("%s", err.text);
    free(blob);
    return u;
}

static Tokenizer *through_json(const Tokenizer *t) {
    Err err = {0};
    char *text;
    size_t len;
    Tokenizer *u;
    assert_int_equal(tokenizer_to_json(t, &text, &len, &err), 0);
    if (tokenizer_from_json(&u, text, len, &err) < 0) fail_msg("%s", err.text);
    free(text);
    return u;
}

static const int32_t *tensor_i32(const char *name, const char *suffix) {
    char key[128];
    snprintf(key, sizeof key, "%s%s", name, suffix);
    const StTensor *t = safetensors_find(&golden, key);
    if (!t) fail_msg("no golden %s", key);
    return (const int32_t *)(const void *)t->data;
}

static void same_ids(const Tokenizer *t, const char *name, const char *form) {
    for (int plain = 0; plain < 2; plain++) {
        const int32_t *ids = tensor_i32(name, plain ? ".plain.ids" : ".ids");
        const int32_t *off = tensor_i32(name, plain ? ".plain.offsets" : ".offsets");
        for (size_t i = 0; i < n_texts; i++) {
            const char *s = (const char *)text_data + text_offset[i];
            size_t len = (size_t)(text_offset[i + 1] - text_offset[i]), n, want = (size_t)(off[i + 1] - off[i]);
            if (plain && !memchr(s, '<', len)) continue;
            int32_t *got;
            Err err = {0};
            if (tokenizer_encode(t, s, len, !plain, &got, &n, &err) < 0) fail_msg("%s: %s", name, err.text);
            if (n != want || (n && memcmp(got, ids + off[i], n * sizeof *got)))
                fail_msg("%s%s, text %zu (\"%.*s\"): %zu ids, expected %zu, or others", name, form, i, (int)len, s,
                         n, want);
            free(got);
        }
    }
}

// The ids of every text: from the file, from the blob, and from the tokenizer.json written without the original.
static void check_tokenizer(const char *path, const char *name) {
    Tokenizer *t = load(path), *u = through_blob(t), *v = through_json(u);
    same_ids(t, name, "");
    same_ids(u, name, " by its blob");
    same_ids(v, name, " by its JSON");
    assert_true(tokenizer_hash(t) == tokenizer_hash(u));
    assert_int_equal(tokenizer_vocab_size(t), tokenizer_vocab_size(v));
    tokenizer_free(t);
    tokenizer_free(u);
    tokenizer_free(v);
}

static void test_byte_level(void **state) {
    (void)state;
    check_tokenizer("test/golden/tokens_llama3.json", "llama3");
    check_tokenizer("test/golden/tokens_smollm.json", "smollm");
    check_tokenizer("test/golden/tokens_split.json", "split");
}

static void test_sentencepiece(void **state) {
    (void)state;
    check_tokenizer("test/golden/tokens_llama2.json", "llama2");
    check_tokenizer("test/golden/tokens_metaspace.json", "metaspace");
    check_tokenizer("test/golden/tokens_metaspace_split.json", "metaspace_split");
}

static void test_gguf(void **state) {
    (void)state;
    check_tokenizer("test/golden/tokens_spm.gguf", "spm_gguf");
    check_tokenizer("test/golden/tokens_bpe.gguf", "bpe_gguf");
    Tokenizer *t = load("test/golden/tokens_spm.gguf");
    assert_int_equal(tokenizer_bos(t), 1);
    assert_int_equal(tokenizer_eos(t), 2);
    assert_string_equal(tokenizer_name(t), "sentencepiece bpe");
    char *config = tokenizer_config_json(t);
    assert_non_null(strstr(config, "\"chat_template\": \"{{ messages }} \\\"quoted\\\"\\u000a\""));
    assert_non_null(strstr(config, "\"bos_token\": \"<s>\""));
    free(config);
    Tokenizer *u = through_blob(t);                     // the configuration travels with the blob
    config = tokenizer_config_json(u);
    assert_non_null(strstr(config, "{{ messages }}"));
    free(config);
    tokenizer_free(u);
    uint64_t before = tokenizer_hash(t);                // bos and eos belong to the content
    const char other[] = "{\"bos_token\": {\"content\": \"</s>\"}, \"eos_token\": null}";
    tokenizer_set_config(t, other, sizeof other - 1);
    assert_int_equal(tokenizer_bos(t), 2);
    assert_int_equal(tokenizer_eos(t), -1);
    assert_true(tokenizer_hash(t) != before);
    tokenizer_set_config(t, "not JSON", 8);             // is as if there were none
    assert_int_equal(tokenizer_bos(t), 2);
    tokenizer_free(t);
}

static void test_llama2(void **state) {
    (void)state;
    const char *path = test_data("tokenizers/llama2/tokenizer.json");
    if (!path) skip();
    check_tokenizer(path, "Llama-2");
    Tokenizer *t = load(path);
    assert_int_equal(tokenizer_bos(t), 1);
    assert_int_equal(tokenizer_eos(t), 2);
    tokenizer_free(t);
}

static void test_llama3(void **state) {
    (void)state;
    const char *path = test_data("tokenizers/llama3/tokenizer.json");
    if (!path) skip();
    check_tokenizer(path, "Llama-3");
    Tokenizer *t = load(path);
    char *config;
    size_t len;
    Err err;
    assert_int_equal(file_read(&config, &len, test_data("tokenizers/llama3/tokenizer_config.json"), 1 << 20, &err), 0);
    tokenizer_set_config(t, config, len);
    assert_int_equal(tokenizer_bos(t), 128000);
    assert_int_equal(tokenizer_eos(t), 128001);
    assert_true(tokenizer_is_special(t, 128009));
    assert_false(tokenizer_is_special(t, 100));
    char *kept = tokenizer_config_json(t);
    assert_string_equal(kept, config);
    free(kept);
    free(config);
    tokenizer_free(t);
}

static void test_smollm2(void **state) {
    (void)state;
    const char *path = test_data("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if (!path) skip();
    check_tokenizer(path, "SmolLM2");
}

static void test_bytes(void **state) {
    (void)state;
    Tokenizer *t = tokenizer_bytes(), *u = through_json(t), *forms[] = {t, through_blob(t), u};
    const char text[] = "A\0\n\xC3\xA9\xFF<|eos|>";      // NUL, newline, e acute, a stray byte (becomes U+FFFD)
    const int32_t want[] = {'A', 0, '\n', 0xC3, 0xA9, 0xEF, 0xBF, 0xBD, 257};
    for (int f = 0; f < 3; f++) {
        int32_t *ids;
        size_t n;
        Err err;
        assert_int_equal(tokenizer_encode(forms[f], text, sizeof text - 1, true, &ids, &n, &err), 0);
        assert_int_equal(n, 9);
        assert_memory_equal(ids, want, sizeof want);
        free(ids);
        assert_int_equal(tokenizer_vocab_size(forms[f]), 258);
    }
    assert_int_equal(tokenizer_bos(t), 256);
    assert_int_equal(tokenizer_eos(t), 257);
    assert_string_equal(tokenizer_name(t), "bytes");
    for (int c = 0; c < 256; c++) {
        size_t n;
        const char *p = tokenizer_piece(t, c, false, &n);
        assert_int_equal(n, 1);
        assert_int_equal((uint8_t)p[0], c);
    }
    for (int f = 0; f < 3; f++) tokenizer_free(forms[f]);
}

// Pieces put together are the text again: exactly for valid UTF-8, whatever the tokenizer.
static void test_pieces(void **state) {
    (void)state;
    const char *files[] = {"test/golden/tokens_llama3.json", "test/golden/tokens_smollm.json",
                           "test/golden/tokens_llama2.json", "test/golden/tokens_spm.gguf"};
    const char text[] = "Hello  w\xC3\xB6rld,\n\xF0\x9F\x91\x8D\t12 3";
    for (int f = 0; f < 4; f++) {
        Tokenizer *t = load(files[f]);
        int32_t *ids;
        size_t n, len, at = 0;
        char out[256];
        Err err;
        assert_int_equal(tokenizer_encode(t, text, strlen(text), true, &ids, &n, &err), 0);
        for (size_t i = 0; i < n; i++) {
            const char *p = tokenizer_piece(t, ids[i], i == 0, &len);
            assert_true(at + len < sizeof out);
            memcpy(out + at, p, len);
            at += len;
        }
        out[at] = 0;
        assert_string_equal(out, text);
        tokenizer_piece(t, -1, true, &len);
        assert_int_equal(len, 0);
        tokenizer_piece(t, INT32_MAX, false, &len);
        assert_int_equal(len, 0);
        free(ids);
        tokenizer_free(t);
    }
}

// A pseudo-random text over an alphabet that provokes what a cut could break: white space of all kinds around newlines,
// letters, digits, quotes and markup.
static size_t make_text(char *s, size_t len, uint64_t seed) {
    static const char *const part[] = {"\n", "\n", " ", "  ", "\r\n", "\t", "a", "B", "the", "kader", "1", "23", "'s",
                                       ".", "!?", "\xC3\xA9", "\xE4\xB8\x96", "<|eot_id|>", "<s>", "\xE2\x96\x81",
                                       "x\n", "\xFF", "\xC2\xA0", "\xE2\x80\xA8"};
    size_t n = 0;
    for (;;) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const char *p = part[(seed >> 33) % (sizeof part / sizeof *part)];
        if (n + strlen(p) > len) return n;
        memcpy(s + n, p, strlen(p));
        n += strlen(p);
    }
}

// Wherever tokenizer_safe_cut says, the two halves give the ids of the whole.
static void test_safe_cut(void **state) {
    (void)state;
    const char *files[] = {"test/golden/tokens_llama3.json", "test/golden/tokens_bpe.gguf",
                           "test/golden/tokens_llama2.json", "test/golden/tokens_metaspace.json",
                           "test/golden/tokens_metaspace_split.json",
                           "test/golden/tokens_smollm.json", "test/golden/tokens_split.json", NULL};
    const bool has_cuts[] = {true, true, true, true, true, false, false, true};
    for (int f = 0; f < 8; f++) {
        Tokenizer *t = files[f] ? load(files[f]) : tokenizer_bytes();
        size_t cuts = 0;
        for (uint64_t seed = 1; seed <= 60; seed++) {
            char text[400];
            size_t len = make_text(text, sizeof text, seed), n, a, b;
            int32_t *ids, *left, *right;
            Err err;
            assert_int_equal(tokenizer_encode(t, text, len, true, &ids, &n, &err), 0);
            for (size_t at = 0, cut; (cut = tokenizer_safe_cut(t, text, len, at)) < len; at = cut + 1, cuts++) {
                assert_true(cut >= at && text[cut - 1] == '\n');
                assert_int_equal(tokenizer_encode(t, text, cut, true, &left, &a, &err), 0);
                assert_int_equal(tokenizer_encode_more(t, text + cut, len - cut, true, &right, &b, &err), 0);
                assert_int_equal(a + b, n);
                assert_memory_equal(ids, left, a * sizeof *ids);
                assert_memory_equal(ids + a, right, b * sizeof *ids);
                free(left);
                free(right);
            }
            free(ids);
        }
        if (has_cuts[f]) assert_true(cuts > 100);
        else assert_int_equal(cuts, 0);
        tokenizer_free(t);
    }
}

// Many threads, one tokenizer, the same ids.
static void test_threads(void **state) {
    (void)state;
    Tokenizer *t = load("test/golden/tokens_llama3.json");
    int bad = 0;
    #pragma omp parallel for schedule(dynamic, 1) reduction(+ : bad) num_threads(4)
    for (uint64_t k = 0; k < 64; k++) {
        char text[4096];
        size_t len = make_text(text, sizeof text, k % 8 + 1), n, m;
        int32_t *a, *b;
        Tokenizer *own = load("test/golden/tokens_llama3.json");
        bad += tokenizer_encode(t, text, len, true, &a, &n, NULL) < 0 ||
               tokenizer_encode(own, text, len, true, &b, &m, NULL) < 0 || n != m || memcmp(a, b, n * sizeof *a);
        free(a);
        free(b);
        tokenizer_free(own);
    }
    assert_int_equal(bad, 0);
    tokenizer_free(t);
}

// A word of a million letters: n log n, not n^2. It takes about half a second; 60 s leaves room for sanitizers and a
// busy machine, and none for the 10^12 / 2 steps of a quadratic merge, which are hundreds.
static void test_long_words(void **state) {
    (void)state;
    const char *files[] = {"test/golden/tokens_llama3.json", "test/golden/tokens_llama2.json"};
    const char *unit[] = {"a", "ab", " ", "\n", "!", "ka"};
    size_t len = 1000000;
    char *s = xmalloc(len);
    for (int f = 0; f < 2; f++) {
        Tokenizer *t = load(files[f]);
        for (int u = 0; u < 6; u++) {
            size_t k = strlen(unit[u]), n;
            for (size_t i = 0; i < len; i++) s[i] = unit[u][i % k];
            int32_t *ids;
            Err err;
            double start = now_seconds();
            assert_int_equal(tokenizer_encode(t, s, len, true, &ids, &n, &err), 0);
            assert_true(n > 0 && now_seconds() - start < 60);
            free(ids);
        }
        tokenizer_free(t);
    }
    free(s);
}

// ---------------------------------------------------------------------------------------------
// Bad files: a message, never a crash.

static void refused(const char *json, const char *because) {
    Tokenizer *t = NULL;
    Err err = {0};
    int rc = tokenizer_from_json(&t, json, strlen(json), &err);
    if (rc >= 0) fail_msg("accepted: %s", json);
    assert_null(t);
    if (!strstr(err.text, because)) fail_msg("\"%s\" does not say \"%s\"", err.text, because);
}

#define MODEL(rest) "{\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2}, \"merges\": [\"a b\"]" rest "}"

static void test_bad_json(void **state) {
    (void)state;
    refused("", "tokenizer.json");
    refused("{}", "model.vocab");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": []}}", "empty");
    refused("{\"model\": {\"type\": \"Unigram\", \"vocab\": {\"a\": 0}, \"merges\": []}}", "Unigram");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}}}", "merges");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}}", "-1");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 1e9}, \"merges\": []}}", "1e+09");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0.5}, \"merges\": []}}", "0.5");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 0}, \"merges\": []}}", "belongs to");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"a\": 1}, \"merges\": []}}", "are both");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1}, \"merges\": [\"a b\"]}}", "lacks");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1}, \"merges\": [\"ab\"]}}", "neither");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1}, \"merges\": [[\"\", \"b\"]]}}",
            "neither");
    refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"\xFF\": 0}, \"merges\": []}}", "UTF-8");
    refused("{\"model\": " MODEL(", \"unk_token\": \"?\"") "}", "unk_token");
    refused("{\"model\": " MODEL(", \"dropout\": 0.1") "}", "dropout");
    refused("{\"model\": " MODEL(", \"continuing_subword_prefix\": \"##\"") "}", "##");
    refused("{\"model\": " MODEL("") ", \"normalizer\": {\"type\": \"NFC\"}}", "NFC");
    refused("{\"model\": " MODEL("") ", \"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \"\"}, "
            "\"content\": \"x\"}}", "empty");
    refused("{\"model\": " MODEL("") ", \"pre_tokenizer\": {\"type\": \"BertPreTokenizer\"}}", "BertPreTokenizer");
    refused("{\"model\": " MODEL("") ", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"(\"}, "
            "\"behavior\": \"Isolated\"}}", "regular expression");
    refused("{\"model\": " MODEL("") ", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"[a&&b]\"}, "
            "\"behavior\": \"Isolated\"}}", "sets");
    refused("{\"model\": " MODEL("") ", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"a\"}, "
            "\"behavior\": \"Sideways\"}}", "Sideways");
    refused("{\"model\": " MODEL("") ", \"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": "
            "\"ByteLevel\"}, {\"type\": \"Digits\"}]}}", "expected the last");
    refused("{\"model\": " MODEL("") ", \"added_tokens\": [{\"id\": 5, \"content\": \"a\"}]}", "has id 5, but 0");
    refused("{\"model\": " MODEL("") ", \"added_tokens\": [{\"id\": 0, \"content\": \"z\"}]}", "belongs to");
    refused("{\"model\": " MODEL("") ", \"added_tokens\": [{\"id\": 99999999, \"content\": \"z\"}]}", "1e+08");
    refused("{\"model\": " MODEL("") ", \"added_tokens\": [{\"id\": 7}]}", "content");
}

// A pattern of exponential cost ends with a message, not in a thousand years.
static void test_costly_pattern(void **state) {
    (void)state;
    const char json[] = "{\"model\": " MODEL("") ", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": "
                        "\"(?:(a|aa|a)+)+[x-z]\"}, \"behavior\": \"Isolated\"}}";
    Tokenizer *t;
    Err err = {0};
    int32_t *ids;
    size_t n;
    assert_int_equal(tokenizer_from_json(&t, json, sizeof json - 1, &err), 0);
    char text[50];
    memset(text, 'a', sizeof text);
    assert_int_equal(tokenizer_encode(t, text, sizeof text, true, &ids, &n, &err), E_FORMAT);
    assert_non_null(strstr(err.text, "regular expression failed"));
    tokenizer_free(t);
}

// Every truncation and every flipped byte of a blob is refused, by its checksum; so is a body that lies with a checksum
// that fits, which the fuzz target tries at length.
static void test_bad_blob(void **state) {
    (void)state;
    Tokenizer *t = load("test/golden/tokens_bpe.gguf"), *u;
    uint8_t *blob;
    size_t size;
    Err err;
    assert_int_equal(tokenizer_to_blob(t, &blob, &size, &err), 0);
    for (size_t k = 0; k < size; k += 1 + size / 200) {
        assert_int_equal(tokenizer_from_blob(&u, blob, k, &err), E_FORMAT);
        assert_null(u);
    }
    size_t body = (size_t)blob[8] | (size_t)blob[9] << 8 | (size_t)blob[10] << 16;
    for (size_t k = 0; k < 24 + body; k += 1 + size / 200) {
        blob[k] ^= 0x10;
        assert_int_equal(tokenizer_from_blob(&u, blob, size, &err), E_FORMAT);
        blob[k] ^= 0x10;
    }
    assert_int_equal(tokenizer_from_blob(&u, blob, size, &err), 0);
    tokenizer_free(u);
    free(blob);
    tokenizer_free(t);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_byte_level), cmocka_unit_test(test_sentencepiece), cmocka_unit_test(test_gguf),
        cmocka_unit_test(test_llama2), cmocka_unit_test(test_llama3), cmocka_unit_test(test_smollm2),
        cmocka_unit_test(test_bytes), cmocka_unit_test(test_pieces), cmocka_unit_test(test_safe_cut),
        cmocka_unit_test(test_threads), cmocka_unit_test(test_long_words), cmocka_unit_test(test_bad_json),
        cmocka_unit_test(test_costly_pattern), cmocka_unit_test(test_bad_blob),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, open_golden, close_golden) != 0;
}
