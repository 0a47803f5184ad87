// Sources to tokens, tokens to batches; caches, shards and bad data.
#include "test_common.h"
#include "dataloader.h"
#include <sys/stat.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static char *in_dir(const char *name) {
    static char path[8][512];
    static int k;
    k = (k + 1) % 8;
    snprintf(path[k], sizeof path[k], "%s/%s", test_tmpdir(), name);
    return path[k];
}

static char *write_file(const char *name, const void *data, size_t bytes) {
    char *path = in_dir(name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    fclose(f);
    return path;
}

static char *write_text(const char *name, const char *text) { return write_file(name, text, strlen(text)); }

static void make_folder(const char *name) {
    Err err;
    if (make_dir(in_dir(name), &err) < 0) fail_msg("%s", err.text);
}

static Tokenizer *open_tokenizer(const char *path) {
    char *text;
    size_t len;
    Tokenizer *t;
    Err err;
    if (file_read(&text, &len, path, 1 << 20, &err) < 0) fail_msg("%s", err.text);
    if (tokenizer_from_json(&t, text, len, &err) < 0) fail_msg("%s", err.text);
    free(text);
    return t;
}

static Tokenizer *tiny(void) { return open_tokenizer("test/golden/tokens_llama3.json"); }

static void loads(TokenData *d, const char *path, const Tokenizer *t, int V, const char *cache) {
    Err err = {0};
    if (token_data_load(d, path, t, V, cache, &err) < 0) fail_msg("%s: %s", path, err.text);
}

static void refused(const char *path, const Tokenizer *t, int V, int code, const char *because) {
    TokenData d;
    Err err = {0};
    int rc = token_data_load(&d, path, t, V, NULL, &err);
    if (rc != code || !strstr(err.text, because))
        fail_msg("%s: %d \"%s\"; expected %d and \"%s\"", path, rc, err.text, code, because);
    assert_null(d.tokens);
}

// ---------------------------------------------------------------------------------------------
// Text.

static void test_text(void **state) {
    (void)state;
    Tokenizer *t = tokenizer_bytes();
    TokenData d;
    loads(&d, write_text("plain.txt", "hello\n"), t, 258, NULL);     // one document by itself: its tokens, nothing else
    assert_int_equal(d.n, 6);
    assert_int_equal(d.tokens[0], 'h');
    token_data_free(&d);
    loads(&d, write_text("wiki.raw", "xy"), t, 258, NULL);           // another ending is text too
    assert_int_equal(d.n, 2);
    token_data_free(&d);

    make_folder("folder[1]");                                   // several documents, in the order of their names
    write_text("folder[1]/b.txt", "B");
    write_text("folder[1]/a.txt", "AA");
    write_text("folder[1]/c.jsonl", "{\"text\": \"C\"}\n\n  \r\n{\"x\": [1], \"text\": \"\\u00e9\"}");
    write_text("folder[1]/ignored.md", "zzz");
    const int32_t want[] = {256, 'A', 'A', 257, 256, 'B', 257, 256, 'C', 257, 256, 0xC3, 0xA9, 257};
    loads(&d, in_dir("folder[1]"), t, 258, NULL);
    assert_int_equal(d.n, 14);
    assert_memory_equal(d.tokens, want, sizeof want);
    token_data_free(&d);

    make_folder("glob");
    write_text("glob/b.txt", "B");
    write_text("glob/a.txt", "AA");
    loads(&d, in_dir("glob/*.txt"), t, 258, NULL);
    assert_int_equal(d.n, 7);
    assert_memory_equal(d.tokens, want, 7 * sizeof *want);
    token_data_free(&d);
    tokenizer_free(t);
}

static void test_bad_text(void **state) {
    (void)state;
    Tokenizer *t = tokenizer_bytes();
    refused(write_text("empty.txt", ""), t, 258, E_USAGE, "empty");
    refused(write_text("one.txt", "x"), t, 258, E_USAGE, "1 tokens");
    refused(in_dir("nothing.txt"), t, 258, E_USAGE, "no such file");
    refused(in_dir("nothing*.txt"), t, 258, E_USAGE, "no file matches");
    make_folder("hollow");
    refused(in_dir("hollow"), t, 258, E_USAGE, "holds no");
    refused(write_text("plain.txt", "hello\n"), t, 105, E_USAGE, "token 2 has id 108");
    refused(write_text("plain.txt", "hello\n"), NULL, 258, E_USAGE, "needs a tokenizer");
    refused(write_text("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \n"), t, 258, E_FORMAT, "line 3");
    refused(write_text("b.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n{\"text\": 3}\n"), t, 258, E_FORMAT, "line 2");
    refused(write_text("c.jsonl", "{\"text\": \"a\"}\n[\"b\"]\n"), t, 258, E_FORMAT, "line 2");
    refused(write_text("d.jsonl", "{\"text\": \"a\"} x\n"), t, 258, E_FORMAT, "line 1");
    refused(write_text("e.jsonl", "\n\n\n"), t, 258, E_USAGE, "0 tokens");
    char deep[20100];                                           // nested 10,000 deep
    memset(deep, '[', sizeof deep);
    refused(write_file("f.jsonl", deep, sizeof deep), t, 258, E_FORMAT, "line 1");
    tokenizer_free(t);
}

// Of several bad lines in a file of several megabytes the first is named, whichever thread comes first.
static void test_first_bad_line(void **state) {
    (void)state;
    Tokenizer *t = tokenizer_bytes();
    size_t lines = 60000, bytes = 0;
    char *s = xmalloc(lines * 64);
    for (size_t i = 1; i <= lines; i++)
        bytes += (size_t)sprintf(s + bytes, i == 23456 || i == 23999 || i >= 59000 ? "{\"text\": %zu}\n"
                                            : "{\"text\": \"a line of some length, number %zu\"}\n", i);
    char *path = write_file("long.jsonl", s, bytes);
    for (int k = 0; k < 3; k++) refused(path, t, 258, E_FORMAT, "long.jsonl, line 23456:");
    free(s);
    tokenizer_free(t);
}

// Tokenizing in parts by several threads gives what tokenizing in one piece does.
static void test_parallel(void **state) {
    (void)state;
    size_t bytes = 0, cap = 3 << 20, n;
    char *s = xmalloc(cap + 64);
    uint64_t seed = 3;
    static const char *const part[] = {"\n", "\n\n", " ", "  ", "\r\n", "\t", "a", "B", "the ", "kader ", "1", "23",
                                       "'s ", ". ", "\xC3\xA9", "\xE4\xB8\x96", "<|eot_id|>", "x\n", "\xFF",
                                       "\xE2\x80\xA8", "Hello "};
    while (bytes < cap) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const char *p = part[(seed >> 33) % (sizeof part / sizeof *part)];
        memcpy(s + bytes, p, strlen(p));
        bytes += strlen(p);
    }
    char *path = write_file("long.txt", s, bytes);
    for (int spm = 0; spm < 2; spm++) {                         // one without and one with a prefix to each text
        Tokenizer *t = spm ? open_tokenizer("test/golden/tokens_llama2.json") : tiny();
        assert_true(tokenizer_safe_cut(t, s, bytes, bytes / 2) < bytes);
        int32_t *ids;
        Err err;
        assert_int_equal(tokenizer_encode(t, s, bytes, true, &ids, &n, &err), 0);
        for (int threads = 1; threads <= 4; threads *= 2) {
            TokenData d;
#ifdef _OPENMP
            omp_set_num_threads(threads);
#endif
            loads(&d, path, t, tokenizer_vocab_size(t), NULL);
            assert_int_equal(d.n, n);
            assert_memory_equal(d.tokens, ids, n * sizeof *ids);
            token_data_free(&d);
        }
        free(ids);
        tokenizer_free(t);
    }
    free(s);
}

// ---------------------------------------------------------------------------------------------
// The cache.

static size_t list_cache(const char *dir, char *first, size_t size) {
    char command[1200];
    size_t n = 0;
    snprintf(command, sizeof command, "ls -1 '%s'", dir);
    FILE *f = popen(command, "r");
    char name[512];
    while (fgets(name, sizeof name, f)) {
        name[strcspn(name, "\n")] = 0;
        if (!n++) snprintf(first, size, "%s/%s", dir, name);
    }
    pclose(f);
    return n;
}

static void test_cache(void **state) {
    (void)state;
    Tokenizer *t = tokenizer_bytes(), *u = tiny();
    char cache[512], file[1200], *path = write_text("cached.txt", "some text to be cached");
    snprintf(cache, sizeof cache, "%s", in_dir("cache/deeper"));
    TokenData d, again;
    loads(&d, path, t, 258, cache);
    assert_int_equal(list_cache(cache, file, sizeof file), 1);
    loads(&again, path, t, 258, cache);
    assert_non_null(again.map.data);                            // from the cache
    assert_int_equal(again.n, d.n);
    assert_memory_equal(again.tokens, d.tokens, d.n * 4);
    assert_true(again.hash == d.hash);
    token_data_free(&again);

    // Damage of every kind: the tokens are made again, and the cache with them.
    FileMap map;
    Err err;
    assert_int_equal(file_map(&map, file, &err), 0);
    size_t size = map.size;
    uint8_t *good = xmalloc(size), *bad = xmalloc(size + 1);
    memcpy(good, map.data, size);
    file_unmap(&map);
    program_name = "test_dataloader";
    for (size_t k = 0; k <= size; k += k < 64 ? 1 : 13) {
        memcpy(bad, good, size);
        bad[k] ^= 1;                                            // k == size: a byte too many
        size_t bytes = k == size ? size + 1 : size;
        if (k >= 48 && k < 64) bytes = k;                       // truncated
        FILE *f = fopen(file, "wb");
        fwrite(bad, 1, bytes, f);
        fclose(f);
        loads(&again, path, t, 258, cache);
        assert_null(again.map.data);
        assert_int_equal(again.n, d.n);
        assert_memory_equal(again.tokens, d.tokens, d.n * 4);
        token_data_free(&again);
        loads(&again, path, t, 258, cache);
        assert_non_null(again.map.data);
        token_data_free(&again);
    }
    free(good);
    free(bad);

    loads(&again, path, u, tokenizer_vocab_size(u), cache);     // another tokenizer, another text: other files
    assert_null(again.map.data);
    token_data_free(&again);
    loads(&again, write_text("cached.txt", "some text to be cached?"), t, 258, cache);
    assert_null(again.map.data);
    assert_int_equal(again.n, d.n + 1);
    token_data_free(&again);
    assert_int_equal(list_cache(cache, file, sizeof file), 3);  // and nothing half-written beside them
    token_data_free(&d);
    tokenizer_free(t);
    tokenizer_free(u);
}

// ---------------------------------------------------------------------------------------------
// Shards.

static uint8_t shard[1024 + 64];

static size_t make_shard(uint32_t magic, uint32_t version, uint32_t count, int width, uint32_t first) {
    memset(shard, 0, sizeof shard);
    uint32_t head[3] = {magic, version, count};
    memcpy(shard, head, sizeof head);
    for (uint32_t i = 0; i < 10; i++) {
        uint16_t half = (uint16_t)(first + i);
        uint32_t whole = first + i;
        memcpy(shard + 1024 + i * (uint32_t)width, width == 2 ? (void *)&half : (void *)&whole, (size_t)width);
    }
    return 1024 + 10 * (size_t)width;
}

static void test_shards(void **state) {
    (void)state;
    TokenData d;
    make_folder("shards");
    char *a = write_file("shards/a.bin", shard, make_shard(20240520, 1, 10, 2, 50250));
    char *b = write_file("shards/b.bin", shard, make_shard(20240801, 7, 10, 4, 100000));
    loads(&d, a, NULL, 50300, NULL);
    assert_int_equal(d.n, 10);
    assert_int_equal(d.tokens[9], 50259);
    token_data_free(&d);
    loads(&d, b, NULL, 100010, NULL);
    assert_non_null(d.map.data);                                // 32-bit tokens are used where they lie
    assert_int_equal(d.tokens[0], 100000);
    token_data_free(&d);
    loads(&d, in_dir("shards"), NULL, 100010, NULL);
    assert_int_equal(d.n, 20);
    assert_int_equal(d.tokens[9], 50259);
    assert_int_equal(d.tokens[10], 100000);
    token_data_free(&d);

    refused(b, NULL, 100009, E_USAGE, "token 9 has id 100009");
    refused(a, NULL, 50255, E_USAGE, "token 5 has id 50255");
    refused(write_file("short.bin", shard, 1000), NULL, 258, E_FORMAT, "header of 1024");
    refused(write_file("magic.bin", shard, make_shard(20240521, 1, 10, 2, 0)), NULL, 258, E_FORMAT, "20240521");
    refused(write_file("version.bin", shard, make_shard(20240520, 2, 10, 2, 0)), NULL, 258, E_FORMAT, "version 2");
    refused(write_file("count.bin", shard, make_shard(20240520, 1, 11, 2, 0)), NULL, 258, E_FORMAT, "11 tokens");
    refused(write_file("huge.bin", shard, make_shard(20240520, 1, 0x80000005u, 2, 0)), NULL, 258,
            E_FORMAT, "2147483653");
    refused(write_file("odd.bin", shard, make_shard(20240801, 7, 10, 4, 0) - 1), NULL, 258, E_FORMAT, "39 bytes");
    refused(write_file("none.bin", shard, 1024 + 0 * make_shard(20240520, 1, 0, 2, 0)), NULL, 258, E_USAGE, "0 tokens");
    write_text("shards/c.txt", "text");
    Tokenizer *t = tokenizer_bytes();
    refused(in_dir("shards"), t, 258, E_USAGE, "do not mix");
    tokenizer_free(t);
}

// ---------------------------------------------------------------------------------------------
// Batches.

static TokenData counting(int32_t *tokens, size_t n) {
    for (size_t i = 0; i < n; i++) tokens[i] = (int32_t)i;
    return (TokenData){.tokens = tokens, .n = n};
}

static void test_windows(void **state) {
    (void)state;
    int32_t all[30], x[2 * 4], y[2 * 4];
    Err err;
    TokenData d = counting(all, 30);                            // 7 windows of 4 and a tail of one
    DataLoader dl;
    assert_int_equal(dataloader_init(&dl, &d, 2, 4, false, 1, &err), 0);
    assert_int_equal(dl.n_windows, 7);
    for (uint64_t step = 0; step < 10; step++) {                // a batch may straddle epochs
        dataloader_next(&dl, x, y);
        for (int b = 0; b < 2; b++)
            for (int t = 0; t < 4; t++) {
                uint64_t w = (2 * step + (uint64_t)b) % 7;
                assert_int_equal(x[b * 4 + t], (int32_t)w * 4 + t);
                assert_int_equal(y[b * 4 + t], (int32_t)w * 4 + t + 1);
            }
        assert_int_equal(dl.position, 2 * (step + 1));
    }
    dataloader_free(&dl);

    d.n = 9;                                                    // exactly two windows and the last target
    assert_int_equal(dataloader_init(&dl, &d, 2, 4, false, 1, &err), 0);
    assert_int_equal(dl.n_windows, 2);
    dataloader_free(&dl);
    d.n = 3;                                                    // shorter than a window: padded
    assert_int_equal(dataloader_init(&dl, &d, 2, 4, true, 1, &err), 0);
    assert_int_equal(dl.n_windows, 1);
    dataloader_next(&dl, x, y);
    const int32_t wx[] = {0, 1, 0, 0}, wy[] = {1, 2, -1, -1};
    for (int b = 0; b < 2; b++) {
        assert_memory_equal(x + 4 * b, wx, sizeof wx);
        assert_memory_equal(y + 4 * b, wy, sizeof wy);
    }
    dataloader_free(&dl);
    d.n = 1;
    assert_int_equal(dataloader_init(&dl, &d, 2, 4, true, 1, &err), E_USAGE);
    dataloader_free(&dl);
    d.n = 30;
    assert_int_equal(dataloader_init(&dl, &d, 0, 4, true, 1, &err), E_USAGE);
    assert_int_equal(dataloader_init(&dl, &d, 1, -4, true, 1, &err), E_USAGE);
}

// Each epoch visits each window once, in an order that depends on seed and epoch alone; seeking is as good as reading.
static void test_shuffle(void **state) {
    (void)state;
    enum { N = 101, T = 3, B = 4, STEPS = 80 };
    int32_t all[N * T + 2], x[B * T], y[B * T], first[STEPS * B], other[STEPS * B];
    Err err;
    TokenData d = counting(all, N * T + 2);
    DataLoader dl;
    for (int run = 0; run < 2; run++) {
        int32_t *seen = run ? other : first;
        assert_int_equal(dataloader_init(&dl, &d, B, T, true, run ? 8 : 7, &err), 0);
        assert_int_equal(dl.n_windows, N);
        for (int s = 0; s < STEPS; s++) {
            dataloader_next(&dl, x, y);
            for (int b = 0; b < B; b++) {
                seen[s * B + b] = x[b * T] / T;
                assert_int_equal(x[b * T] % T, 0);
                for (int t = 0; t < T; t++) assert_int_equal(y[b * T + t], x[b * T] + t + 1);
            }
        }
        dataloader_free(&dl);
    }
    for (int epoch = 0; epoch < 3; epoch++) {
        int count[N] = {0};
        for (int i = 0; i < N; i++) count[first[epoch * N + i]]++;
        for (int i = 0; i < N; i++) assert_int_equal(count[i], 1);
    }
    assert_memory_not_equal(first, first + N, N * sizeof *first);   // another epoch, another order
    assert_memory_not_equal(first, other, N * sizeof *first);       // another seed too
    int in_place = 0;                                               // a shuffle leaves one window in place on average
    for (int i = 0; i < N; i++) in_place += first[i] == i;
    assert_true(in_place < 8);                                      // P(8 or more) is about 1e-5 for a fair one

    assert_int_equal(dataloader_init(&dl, &d, B, T, true, 7, &err), 0);
    const int jump[] = {60, 3, 25, 26, 79, 0};
    for (int k = 0; k < 6; k++) {
        dataloader_seek(&dl, (uint64_t)jump[k] * B);
        dataloader_next(&dl, x, y);
        for (int b = 0; b < B; b++) assert_int_equal(x[b * T] / T, first[jump[k] * B + b]);
    }
    dataloader_free(&dl);
}

// What R ranks of B sequences get is, in the order b*R + r, what one rank of B*R gets: within an epoch, over its end,
// after a seek, where a batch is longer than an epoch, and where there is but one short window.
static void test_ranks(void **state) {
    (void)state;
    enum { T = 3, B = 5, MOST = 8, STEPS = 40 };
    const int ranks[] = {1, 2, 3, 8};
    const size_t tokens[] = {31 * T + 1, 7 * T + 2, T - 1};     // 31 windows, 7, and a short one
    int32_t all[31 * T + 1], x[B * T], y[B * T], whole_x[B * MOST * T], whole_y[B * MOST * T];
    Err err;
    for (int data = 0; data < 3; data++)
        for (int k = 0; k < 4; k++)
            for (int shuffled = 0; shuffled < 2; shuffled++) {
                int R = ranks[k];
                TokenData d = counting(all, tokens[data]);
                DataLoader whole, part[MOST];
                assert_int_equal(dataloader_init(&whole, &d, B * R, T, shuffled, 7, &err), 0);
                for (int r = 0; r < R; r++) {
                    assert_int_equal(dataloader_init(&part[r], &d, B, T, shuffled, 7, &err), 0);
                    dataloader_ranks(&part[r], r, R);
                }
                for (int step = 0; step < STEPS; step++) {
                    if (step % 10 == 9) {                       // resumed, not at a multiple of the batch: it was another
                        uint64_t to = whole.position + 4;       // number of ranks that saved
                        dataloader_seek(&whole, to);
                        for (int r = 0; r < R; r++) dataloader_seek(&part[r], to);
                    }
                    dataloader_next(&whole, whole_x, whole_y);
                    for (int r = 0; r < R; r++) {
                        dataloader_next(&part[r], x, y);
                        assert_int_equal(part[r].position, whole.position);
                        for (int b = 0; b < B; b++) {
                            assert_memory_equal(x + b * T, whole_x + (b * R + r) * T, T * sizeof *x);
                            assert_memory_equal(y + b * T, whole_y + (b * R + r) * T, T * sizeof *y);
                        }
                    }
                }
                for (int r = 0; r < R; r++) dataloader_free(&part[r]);
                dataloader_free(&whole);
            }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_text), cmocka_unit_test(test_bad_text), cmocka_unit_test(test_first_bad_line),
    cmocka_unit_test(test_parallel), cmocka_unit_test(test_cache), cmocka_unit_test(test_shards),
    cmocka_unit_test(test_windows), cmocka_unit_test(test_shuffle),
    cmocka_unit_test(test_ranks),
};
TEST_MAIN(tests)
