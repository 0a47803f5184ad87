// The safetensors container: what is written is read back, and hostile files are refused with a message that says why.
#include "test_common.h"
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include "safetensors.h"

static const char *temp_file(const char *name) {
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", test_tmpdir(), name);
    return path;
}

// A container in memory: header text, then `data_size` bytes of data.
static uint8_t *container(const char *header, size_t data_size, size_t *size) {
    size_t n = strlen(header);
    uint8_t *p = calloc(1, 8 + n + data_size + 1);
    for (int i = 0; i < 8; i++) p[i] = (uint8_t)(n >> (8 * i));
    memcpy(p + 8, header, n);
    for (size_t i = 0; i < data_size; i++) p[8 + n + i] = (uint8_t)i;
    *size = 8 + n + data_size;
    return p;
}

static void round_trip(void **state) {
    (void)state;
    Err err = {0};
    const char *path = temp_file("round.safetensors");
    float a[6] = {1, 2, 3, 4, 5, 6};
    uint8_t b[3] = {7, 8, 9};
    StWriter *w = st_writer_new();
    st_writer_meta(w, "config", "{\"a\": \"\\u00e9\n\"}");
    st_writer_tensor(w, "zeta", DT_F32, 2, (int64_t[]){2, 3});
    st_writer_tensor(w, "alpha", DT_U8, 1, (int64_t[]){3});
    st_writer_tensor(w, "empty", DT_BF16, 2, (int64_t[]){0, 5});
    st_writer_tensor(w, "scalar", DT_U8, 0, NULL);
    assert_int_equal(st_writer_begin(w, path, &err), 0);
    st_writer_data(w, a, 10);
    st_writer_data(w, (uint8_t *)a + 10, sizeof a - 10);
    st_writer_data(w, b, 3);
    st_writer_data(w, b, 1);
    assert_int_equal(st_writer_finish(w, &err), 0);

    Safetensors st;
    assert_int_equal(safetensors_open(&st, path, &err), 0);
    assert_int_equal(st.n, 4);
    assert_string_equal(st.tensors[0].name, "alpha");
    assert_string_equal(safetensors_meta(&st, "config"), "{\"a\": \"\\u00e9\n\"}");
    assert_null(safetensors_meta(&st, "none"));
    const StTensor *t = safetensors_find(&st, "zeta");
    assert_non_null(t);
    assert_int_equal(t->dtype, DT_F32);
    assert_int_equal(t->ndim, 2);
    assert_int_equal(t->shape[1], 3);
    assert_memory_equal(t->data, a, sizeof a);
    assert_int_equal((t->data - st.map.data) % 64, 0);            // the first tensor lies aligned
    assert_memory_equal(safetensors_find(&st, "alpha")->data, b, 3);
    assert_int_equal(safetensors_find(&st, "empty")->bytes, 0);
    assert_int_equal(safetensors_find(&st, "scalar")->data[0], 7);
    assert_null(safetensors_find(&st, "beta"));
    safetensors_close(&st);
}

// Hostile headers over 16 bytes of data, and a word that the message must contain.
static void hostile(void **state) {
    (void)state;
#define T(name, dtype, shape, a, b) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #a "," #b "]}"
    static const struct { const char *header, *message; int code; } cases[] = {
        {"", "JSON", E_FORMAT},
        {"[]", "object", E_FORMAT},
        {"{}", "after the last", E_FORMAT},
        {"{" T("a", "F32", "[4]", 0, 16) "} x", "text after", E_FORMAT},
        {"{" T("a", "F32", "[4]", 0, 16), "JSON", E_FORMAT},
        {"{\"a\":5}", "not an object", E_FORMAT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4]}}", "data_offsets", E_FORMAT},
        {"{\"a\":{\"dtype\":7,\"shape\":[4],\"data_offsets\":[0,16]}}", "dtype", E_FORMAT},
        {"{" T("a", "F8_E4M3", "[16]", 0, 16) "}", "F8_E4M3", E_DTYPE},
        {"{" T("a", "F32", "[-4]", 0, 16) "}", "dimension 0", E_FORMAT},
        {"{" T("a", "F32", "[4.5]", 0, 16) "}", "dimension 0", E_FORMAT},
        {"{" T("a", "F32", "[\"4\"]", 0, 16) "}", "dimension 0", E_FORMAT},
        {"{" T("a", "F32", "[1e300]", 0, 16) "}", "dimension 0", E_FORMAT},
        {"{" T("a", "F32", "[4294967296,4294967296]", 0, 16) "}", "overflows", E_FORMAT},
        {"{" T("a", "F32", "[4611686018427387904]", 0, 16) "}", "dimension 0", E_FORMAT},
        {"{" T("a", "U8", "[1,1,1,1,1,1,1,1,16]", 0, 16) "}", "8 dimensions", E_FORMAT},
        {"{" T("a", "F32", "[3]", 0, 16) "}", "need 12", E_FORMAT},
        {"{" T("a", "F32", "[8]", 0, 32) "}", "truncated", E_FORMAT},
        {"{" T("a", "F32", "[4]", 16, 0) "}", "begin <= end", E_FORMAT},
        {"{" T("a", "F32", "[4]", -16, 0) "}", "data_offsets", E_FORMAT},
        {"{" T("a", "F32", "[4]", 0, 18446744073709551616) "}", "data_offsets", E_FORMAT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16,16]}}", "data_offsets", E_FORMAT},
        {"{" T("a", "F32", "[2]", 0, 8) "}", "8 bytes after", E_FORMAT},
        {"{" T("a", "F32", "[2]", 8, 16) "}", "hole", E_FORMAT},
        {"{" T("a", "F32", "[1]", 0, 4) "," T("b", "F32", "[2]", 8, 16) "}", "hole", E_FORMAT},
        {"{" T("a", "F32", "[3]", 0, 12) "," T("b", "F32", "[2]", 8, 16) "}", "overlap", E_FORMAT},
        {"{" T("a", "F32", "[4]", 0, 16) "," T("b", "F32", "[4]", 0, 16) "}", "overlap", E_FORMAT},
        {"{" T("a", "F32", "[2]", 0, 8) "," T("a", "F32", "[2]", 8, 16) "}", "twice", E_FORMAT},
        {"{" T("", "F32", "[4]", 0, 16) "}", "control", E_FORMAT},
        {"{" T("a\\u001b[2J", "F32", "[4]", 0, 16) "}", "control", E_FORMAT},
        {"{\"__metadata__\":[]," T("a", "F32", "[4]", 0, 16) "}", "__metadata__", E_FORMAT},
        {"{\"__metadata__\":{\"a\":1}," T("a", "F32", "[4]", 0, 16) "}", "only strings", E_FORMAT},
        {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}," T("a", "F32", "[4]", 0, 16) "}", "twice", E_FORMAT},
        {"{\"__metadata__\":{},\"__metadata__\":{}," T("a", "F32", "[4]", 0, 16) "}", "twice", E_FORMAT},
    };
#undef T
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Safetensors st;
        Err err = {0};
        size_t size;
        uint8_t *p = container(cases[i].header, 16, &size);
        int rc = safetensors_parse(&st, p, size, "hostile", &err);
        if (rc != cases[i].code || !strstr(err.text, cases[i].message))
            fail_msg("%s: rc %d, message '%s', expected '%s'", cases[i].header, rc, err.text, cases[i].message);
        free(p);
    }
}

static void header_length(void **state) {
    (void)state;
    Safetensors st;
    Err err = {0};
    uint8_t p[16] = {0};
    assert_int_equal(safetensors_parse(&st, p, 0, "empty", &err), E_FORMAT);
    assert_int_equal(safetensors_parse(&st, p, 7, "short", &err), E_FORMAT);
    p[0] = 9;                                                      // one byte more than there are
    assert_int_equal(safetensors_parse(&st, p, 16, "long", &err), E_FORMAT);
    assert_non_null(strstr(err.text, "beyond the end"));
    memset(p, 0xff, 8);                                            // 2^64 - 1: adding 8 would wrap
    assert_int_equal(safetensors_parse(&st, p, 16, "huge", &err), E_FORMAT);
    assert_non_null(strstr(err.text, "not a safetensors file"));
    assert_int_equal(safetensors_open(&st, "/nonexistent/model", &err), E_MISSING);
    assert_int_equal(safetensors_open(&st, test_tmpdir(), &err), E_FAIL);
}

static void nested_json(void **state) {
    (void)state;
    char *deep = malloc(20001);
    for (int i = 0; i < 10000; i++) deep[i] = '[', deep[10000 + i] = ']';
    deep[20000] = 0;
    size_t size;
    uint8_t *p = container(deep, 0, &size);
    Safetensors st;
    Err err = {0};
    assert_int_equal(safetensors_parse(&st, p, size, "deep", &err), E_FORMAT);
    assert_non_null(strstr(err.text, "nested"));
    free(p);
    free(deep);
}

// Cut after every byte: always refused. One byte changed: refused or read, never a crash.
static void truncated_and_mangled(void **state) {
    (void)state;
    static const char header[] =
        "{\"__metadata__\":{\"k\":\"v\"},\"a\":{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[0,8]},"
                                 "\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[8,11]}}   ";
    size_t size;
    uint8_t *p = container(header, 11, &size);
    Safetensors st;
    Err err;
    assert_int_equal(safetensors_parse(&st, p, size, "whole", &err), 0);
    safetensors_close(&st);
    for (size_t n = 0; n < size; n++) {
        uint8_t *cut = malloc(n ? n : 1);             // its own block, so that a sanitizer sees a read beyond it
        memcpy(cut, p, n);
        assert_true(safetensors_parse(&st, cut, n, "cut", &err) < 0);
        free(cut);
    }
    for (size_t i = 0; i < size; i++)
        for (int bit = 0; bit < 8; bit++) {
            p[i] ^= (uint8_t)(1 << bit);
            if (safetensors_parse(&st, p, size, "mangled", &err) == 0) safetensors_close(&st);
            p[i] ^= (uint8_t)(1 << bit);
        }
    free(p);
}

// Data that do not add up, and a disk that is full, leave nothing behind.
static void failed_writes(void **state) {
    (void)state;
    Err err = {0};
    const char *path = temp_file("failed.safetensors");
    uint8_t data[4096] = {0};
    for (int extra = -1; extra <= 1; extra += 2) {
        StWriter *w = st_writer_new();
        st_writer_tensor(w, "a", DT_U8, 1, (int64_t[]){100});
        assert_int_equal(st_writer_begin(w, path, &err), 0);
        st_writer_data(w, data, (size_t)(100 + extra));
        assert_int_equal(st_writer_finish(w, &err), E_FAIL);
        assert_non_null(strstr(err.text, "declared"));
        assert_false(path_exists(path));
    }
    // A limit on file size stands for a full disk: write() fails in the middle either way.
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit old, small = {20000, 20000};
    getrlimit(RLIMIT_FSIZE, &old);
    small.rlim_max = old.rlim_max;
    setrlimit(RLIMIT_FSIZE, &small);
    StWriter *w = st_writer_new();
    st_writer_tensor(w, "a", DT_U8, 1, (int64_t[]){40960});
    assert_int_equal(st_writer_begin(w, path, &err), 0);
    for (int i = 0; i < 10; i++) st_writer_data(w, data, sizeof data);
    int rc = st_writer_finish(w, &err);
    setrlimit(RLIMIT_FSIZE, &old);
    assert_int_equal(rc, E_FAIL);
    assert_non_null(strstr(err.text, path));
    assert_false(path_exists(path));
    w = st_writer_new();
    assert_int_equal(st_writer_begin(w, "/nonexistent/folder/x", &err), E_FAIL);
    st_writer_abort(w);
    w = st_writer_new();
    st_writer_tensor(w, "a", DT_F32, 2, (int64_t[]){INT64_MAX, 8});
    assert_int_equal(st_writer_begin(w, path, &err), E_SHAPE);
    st_writer_abort(w);
    char left[600];
    snprintf(left, sizeof left, "%s.tmp-%ld", path, (long)getpid());
    assert_false(path_exists(left));
}

// A file's checksum of itself, against doc/formats.md read another way; the digits lie in one piece, across the end of
// the first, and at the beginning of the second.
static void seal(void **state) {
    (void)state;
    Err err = {0};
    const char *path = temp_file("sealed.safetensors");
    const size_t piece = 1 << 20, n = 3 * piece + 77;
    uint8_t *data = malloc(n);
    char *pad = malloc(piece + 1);
    for (size_t i = 0; i < n; i++) data[i] = (uint8_t)(i * i >> 7);
    int across = 0;
    for (size_t k = 0; k < 10; k++) {
        size_t length = k ? piece - 150 + 10 * k : 10;
        memset(pad, 'x', length);
        pad[length] = 0;
        StWriter *w = st_writer_new();
        st_writer_meta(w, "pad", pad);
        st_writer_meta(w, "note", "\"checksum\":\"0123456789abcdef\"");
        st_writer_seal(w);
        st_writer_tensor(w, "a", DT_U8, 1, (int64_t[]){(int64_t)n});
        assert_int_equal(st_writer_begin(w, path, &err), 0);
        st_writer_data(w, data, 5);
        st_writer_data(w, data + 5, n - 5);
        assert_int_equal(st_writer_finish(w, &err), 0);

        Safetensors st;
        assert_int_equal(safetensors_open(&st, path, &err), 0);
        if (safetensors_verify(&st, k & 1, &err)) fail_msg("%s", err.text);
        uint8_t *copy = malloc(st.map.size);
        memcpy(copy, st.map.data, st.map.size);
        const char *stored = safetensors_meta(&st, "checksum");
        uint8_t *digits = memmem(copy, st.map.size, stored, 16);
        assert_non_null(digits);
        size_t at = (size_t)(digits - copy);
        across += at < piece && at + 16 > piece;
        memset(digits, '0', 16);
        Checksum all;
        checksum_begin(&all);
        for (size_t i = 0; i < st.map.size; i += piece) {
            uint64_t sum = checksum_of(copy + i, st.map.size - i < piece ? st.map.size - i : piece);
            checksum_add(&all, &sum, 8);                                   // this machine is little-endian
        }
        char expected[17];
        snprintf(expected, sizeof expected, "%016llx", (unsigned long long)checksum_end(&all));
        assert_string_equal(stored, expected);
        safetensors_close(&st);
        free(copy);
    }
    assert_true(across > 0);
    free(data);
    free(pad);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(round_trip), cmocka_unit_test(hostile), cmocka_unit_test(header_length),
    cmocka_unit_test(nested_json), cmocka_unit_test(truncated_and_mangled), cmocka_unit_test(failed_writes),
    cmocka_unit_test(seal),
};
TEST_MAIN(tests)
