// What the test programs share.
#ifndef QLLM_TEST_COMMON_H
#define QLLM_TEST_COMMON_H
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "common.h"

// Reference data too large or not ours to ship: QLLM_DATA names the folder. Returns the path of `name` in it, or NULL
// after printing that the test is skipped for want of it; then call skip().
static inline const char *test_data(const char *name) {
    static char path[1024];
    const char *root = getenv("QLLM_DATA");
    snprintf(path, sizeof path, "%s/%s", root ? root : "../shared/data", name);
    if (path_exists(path)) return path;
    print_message("skipped: %s is not there (set QLLM_DATA to the folder with the reference data)\n", path);
    return NULL;
}

// A fresh folder for what a test writes, removed by nobody: it lies under TMPDIR.
static inline const char *test_tmpdir(void) {
    static char path[256];
    if (!path[0]) {
        const char *t = getenv("TMPDIR");
        snprintf(path, sizeof path, "%s/qllm-test-XXXXXX", t ? t : "/tmp");
        if (!mkdtemp(path)) abort();
    }
    return path;
}

// Runs the tests of a table, or those that match argv[1].
#define TEST_MAIN(tests) \
    int main(int argc, char **argv) { \
        if (argc > 1) cmocka_set_test_filter(argv[1]); \
        return cmocka_run_group_tests(tests, NULL, NULL) != 0; \
    }
#endif
