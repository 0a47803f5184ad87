// Logs and readable numbers.
#include "test_common.h"

#include <math.h>
#include <unistd.h>

#include "json.h"
#include "logger.h"

static char *log_path(const char *name) {
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", test_tmpdir(), name);
    return path;
}

static char *slurp(const char *path) {
    char *text;
    size_t len;
    Err err;
    if (file_read(&text, &len, path, 1 << 20, &err) < 0) fail_msg("%s", err.text);
    return text;
}

static void test_line(void **state) {
    (void)state;
    JsonLog l;
    Err err;
    char *path = log_path("line.jsonl");
    const char *nasty = "quote \" slash \\ newline \n tab \t bell \a caf\xc3\xa9 \xf0\x9f\x98\x80 bad \xff\xc3( end";
    assert_int_equal(jsonlog_open(&l, path, false, &err), 0);
    jsonlog_begin(&l, "step");
    jsonlog_int(&l, "step", -9007199254740993);
    jsonlog_num(&l, "loss", 0.1);
    jsonlog_num(&l, "nan", NAN);
    jsonlog_num(&l, "inf", -INFINITY);
    jsonlog_str(&l, "text", nasty);
    jsonlog_str(&l, "none", NULL);
    jsonlog_raw(&l, "raw", "{\"a\": [1, 2]}");
    jsonlog_end(&l);
    jsonlog_close(&l);
    char *text = slurp(path);
    assert_non_null(strstr(text, "\"step\": -9007199254740993"));     // more digits than a double keeps
    assert_non_null(strstr(text, "\"loss\": 0.1,"));
    assert_non_null(strstr(text, "\"nan\": null"));
    assert_non_null(strstr(text, "\"inf\": null"));
    assert_int_equal(text[strlen(text) - 1], '\n');
    cJSON *json = json_parse(text, strlen(text) - 1, "log line", &err);
    if (!json) fail_msg("%s: %s", text, err.text);
    assert_string_equal(cJSON_GetObjectItem(json, "event")->valuestring, "step");
    assert_true(cJSON_GetObjectItem(json, "time")->valuedouble > 1e9);
    assert_string_equal(cJSON_GetObjectItem(json, "text")->valuestring,
                        "quote \" slash \\ newline \n tab \t bell \a caf\xc3\xa9 \xf0\x9f\x98\x80 bad "
                        "\xef\xbf\xbd\xef\xbf\xbd( end");
    cJSON_Delete(json);
    free(text);
}

static void check_string(const char *in, const char *expected) {
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    json_write_string(f, in);
    fclose(f);
    assert_string_equal(text, expected);
    free(text);
}

// Ill-formed UTF-8: overlong forms, surrogates, beyond U+10FFFF, cut at the end. Each byte becomes one U+FFFD.
static void test_utf8(void **state) {
    (void)state;
    check_string("\xc0\x80", "\"\\ufffd\\ufffd\"");
    check_string("\xed\xa0\x80", "\"\\ufffd\\ufffd\\ufffd\"");
    check_string("\xf4\x90\x80\x80", "\"\\ufffd\\ufffd\\ufffd\\ufffd\"");
    check_string("\xe2\x82", "\"\\ufffd\\ufffd\"");
    check_string("\xf0\x9f\x98", "\"\\ufffd\\ufffd\\ufffd\"");
    check_string("\xe2\x82\xac \xef\xbf\xbd \xf4\x8f\xbf\xbf", "\"\xe2\x82\xac \xef\xbf\xbd \xf4\x8f\xbf\xbf\"");
    check_string("\x01\x1f\x7f", "\"\\u0001\\u001f\\u007f\"");
}

static void check_double(double v, const char *expected) {
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    json_write_double(f, v);
    fclose(f);
    assert_string_equal(text, expected);
    free(text);
}

static void test_doubles(void **state) {
    (void)state;
    check_double(0.1, "0.1");
    check_double(1.0 / 3.0, "0.3333333333333333");
    check_double(1e300, "1e+300");
    check_double(0, "0");
    check_double(5e-324, "4.94066e-324");
    check_double(HUGE_VAL, "null");
}

static void test_append(void **state) {
    (void)state;
    JsonLog l;
    Err err;
    char *path = log_path("append.jsonl");
    FILE *f = fopen(path, "w");
    fputs("{\"event\": \"a\"}\n{\"event\": \"cut", f);       // as a killed run leaves it
    fclose(f);
    assert_int_equal(jsonlog_open(&l, path, true, &err), 0);
    jsonlog_begin(&l, "b");
    jsonlog_end(&l);
    jsonlog_close(&l);
    char *text = slurp(path);
    const char *expected = "{\"event\": \"a\"}\n{\"event\": \"b\", \"time\"";
    assert_memory_equal(text, expected, strlen(expected));
    free(text);

    f = fopen(path, "w");                                    // nothing but half a line
    fputs("{\"ev", f);
    fclose(f);
    assert_int_equal(jsonlog_open(&l, path, true, &err), 0);
    jsonlog_close(&l);
    text = slurp(path);
    assert_string_equal(text, "");
    free(text);

    assert_int_equal(jsonlog_open(&l, path, false, &err), 0);   // not appended: begun afresh
    jsonlog_begin(&l, "c");
    jsonlog_end(&l);
    jsonlog_close(&l);
    text = slurp(path);
    assert_true(strncmp(text, "{\"event\": \"c\"", 13) == 0);
    free(text);
}

static void test_unwritable(void **state) {
    (void)state;
    JsonLog l;
    Err err;
    assert_int_equal(jsonlog_open(&l, "/nonexistent-folder/log.jsonl", false, &err), E_FAIL);
    assert_non_null(strstr(err.text, "/nonexistent-folder/log.jsonl"));
    assert_int_equal(jsonlog_open(&l, NULL, false, &err), 0);
    jsonlog_begin(&l, "nothing");                            // writes nowhere, complains of nothing
    jsonlog_num(&l, "x", 1);
    jsonlog_end(&l);
    jsonlog_close(&l);
    if (access("/dev/full", W_OK) == 0) {                    // no space left: one warning, then silence
        assert_int_equal(jsonlog_open(&l, "/dev/full", false, &err), 0);
        jsonlog_begin(&l, "lost");
        jsonlog_end(&l);
        assert_null(l.f);
        jsonlog_begin(&l, "lost");
        jsonlog_end(&l);
        jsonlog_close(&l);
    }
}

static void test_readable(void **state) {
    (void)state;
    char b[32];
    assert_string_equal(fmt_bytes(b, 0), "0 B");
    assert_string_equal(fmt_bytes(b, 999), "999 B");
    assert_string_equal(fmt_bytes(b, 999.7), "1.00 kB");
    assert_string_equal(fmt_bytes(b, 12345678), "12.3 MB");
    assert_string_equal(fmt_bytes(b, 1.5e9), "1.50 GB");
    assert_string_equal(fmt_bytes(b, 999999999), "1.00 GB");
    assert_string_equal(fmt_bytes(b, -1), "?");
    assert_string_equal(fmt_count(b, 39712), "39.7k");
    assert_string_equal(fmt_count(b, 134515008), "135M");
    assert_string_equal(fmt_count(b, 8.03e9), "8.03B");
    assert_string_equal(fmt_count(b, 12), "12");
    assert_string_equal(fmt_count(b, 3.14159), "3.14");
    assert_string_equal(fmt_count(b, NAN), "?");
    assert_string_equal(fmt_time(b, 0.44), "0.4s");
    assert_string_equal(fmt_time(b, 9.97), "10s");
    assert_string_equal(fmt_time(b, 59.6), "1m00s");
    assert_string_equal(fmt_time(b, 200), "3m20s");
    assert_string_equal(fmt_time(b, 3720), "1h02m");
    assert_string_equal(fmt_time(b, 3 * 86400.0), "3d00h");
    assert_string_equal(fmt_time(b, INFINITY), "?");
}

// stderr of a program under test is no terminal here: at most one line a tenth, and one at the end.
static void test_progress(void **state) {
    (void)state;
    char *path = log_path("progress.txt");
    int saved = dup(STDERR_FILENO);
    assert_non_null(freopen(path, "w", stderr));
    Progress p;
    progress_begin(&p, "scoring", 1000);
    for (int i = 1; i <= 1000; i++) progress_update(&p, i, "ppl 12.3");
    progress_end(&p);
    fflush(stderr);
    dup2(saved, STDERR_FILENO);
    close(saved);
    char *text = slurp(path);
    int lines = 0;
    for (char *s = text; *s; s++) lines += *s == '\n';
    assert_int_equal(lines, 10);
    assert_non_null(strstr(text, "scoring  50%"));
    assert_non_null(strstr(text, "scoring 100%"));
    assert_non_null(strstr(text, "ppl 12.3"));
    free(text);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_line),   cmocka_unit_test(test_utf8),       cmocka_unit_test(test_doubles),
        cmocka_unit_test(test_append), cmocka_unit_test(test_unwritable), cmocka_unit_test(test_readable),
        cmocka_unit_test(test_progress),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
