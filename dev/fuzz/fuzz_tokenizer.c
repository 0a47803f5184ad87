// The first byte picks what the rest is: a tokenizer.json, a blob (its header is put right, so that the fuzzer gets
// past the checksum), a configuration, a GGUF file, or text for three small tokenizers. What loads is also asked to
// encode and to be written; a blob of it must load again to the same hash.
#include <stdlib.h>
#include <string.h>
#include "tokenizer_impl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MARK "\xE2\x96\x81"
static const char SPM[] =
    "{\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Prepend\", \"prepend\": \"" MARK "\"}, "
    "{\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"" MARK "\"}]}, "
    "\"added_tokens\": [{\"id\": 0, \"content\": \"<s>\", \"special\": true}, {\"id\": 9, \"content\": \"ab\", "
    "\"single_word\": true, \"lstrip\": true, \"rstrip\": true, \"normalized\": false}], "
    "\"model\": {\"type\": \"BPE\", \"unk_token\": \"?\", \"fuse_unk\": true, \"byte_fallback\": true, "
    "\"vocab\": {\"<s>\": 0, \"?\": 1, \"a\": 2, \"b\": 3, \"" MARK "\": 4, \"" MARK "a\": 5, \"ab\": 9, \"aa\": 7, "
    "\"<0x0A>\": 8}, \"merges\": [\"" MARK " a\", \"a a\", \"a b\"]}}";
static const char LEVEL[] =
    "{\"pre_tokenizer\": {\"type\": \"ByteLevel\"}, \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, "
    "\"\xC4\xA0\": 1, \"\xC4\xA0" "a\": 2}, \"merges\": [\"\xC4\xA0 a\"]}}";

static void use(Tokenizer *t, const char *text, size_t len) {
    int32_t *ids;
    size_t n, bytes;
    for (int k = 0; k < 4; k++) {
        int rc = k & 1 ? tokenizer_encode_more(t, text, len, k & 2, &ids, &n, NULL)
                       : tokenizer_encode(t, text, len, k & 2, &ids, &n, NULL);
        if (rc < 0) continue;
        for (size_t i = 0; i < n; i++) {
            if (ids[i] < 0 || ids[i] >= tokenizer_vocab_size(t)) abort();
            const char *p = tokenizer_piece(t, ids[i], i == 0, &bytes);
            for (size_t j = 0; j < bytes; j++) if (p[j] == 1 && bytes == SIZE_MAX) abort();   // reads every byte
        }
        free(ids);
    }
    for (size_t at = 0, cut; (cut = tokenizer_safe_cut(t, text, len, at)) < len; at = cut + 1)
        if (cut < at || text[cut - 1] != '\n') abort();
}

static void check(Tokenizer *t) {
    uint8_t *blob;
    size_t size;
    Tokenizer *u;
    char *json;
    use(t, "<s>a ab  x\n aab\xFF\n", 17);
    free(tokenizer_config_json(t));
    if (tokenizer_to_json(t, &json, &size, NULL) == 0) free(json);
    if (tokenizer_to_blob(t, &blob, &size, NULL) == 0) {
        if (tokenizer_from_blob(&u, blob, size, NULL) < 0 || tokenizer_hash(u) != tokenizer_hash(t)) abort();
        if (tokenizer_to_json(u, &json, &size, NULL) == 0) free(json);
        tokenizer_free(u);
        free(blob);
    }
    tokenizer_free(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Tokenizer *fixed[3];
    Tokenizer *t;
    if (!fixed[0]) {
        fixed[0] = tokenizer_bytes();
        if (tokenizer_from_json(&fixed[1], SPM, sizeof SPM - 1, NULL) < 0) abort();
        if (tokenizer_from_json(&fixed[2], LEVEL, sizeof LEVEL - 1, NULL) < 0) abort();
    }
    if (!size) return 0;
    int what = data[0] % 7;
    const char *text = (const char *)data + 1;
    size--;
    if (what == 0) {
        if (tokenizer_from_json(&t, text, size, NULL) == 0) check(t);
    } else if (what == 1 && size >= 24) {
        uint8_t *blob = malloc(size);
        memcpy(blob, text, size);
        uint64_t body = (uint64_t)blob[8] | (uint64_t)blob[9] << 8, sum;
        memset(blob + 8, 0, 16);
        if (body > size - 24) body = size - 24;
        memcpy(blob, "QTOK\1\0\0\0", 8);
        for (int i = 0; i < 8; i++) blob[8 + i] = (uint8_t)(body >> (8 * i));
        sum = hash_bytes(blob + 24, (size_t)body, 1);
        for (int i = 0; i < 8; i++) blob[16 + i] = (uint8_t)(sum >> (8 * i));
        if (tokenizer_from_blob(&t, blob, size, NULL) == 0) check(t);
        free(blob);
    } else if (what == 2) {
        t = tokenizer_bytes();
        tokenizer_set_config(t, text, size);
        check(t);
    } else if (what == 6) {
        Gguf g;
        if (gguf_parse(&g, (const uint8_t *)text, size, "gguf", NULL) == 0) {
            if (tokenizer_from_gguf(&t, &g, NULL) == 0) check(t);
            gguf_close(&g);
        }
    } else if (what > 2) {
        use(fixed[what - 3], text, size);
    }
    return 0;
}
