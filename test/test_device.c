// The device: what it refuses, its memory, its first error, its peak.
#include "test_common.h"
#include "device.h"
#include <math.h>

static void test_init(void **unused) {
    (void)unused;
    Err err = {0};
    ops = NULL;
    assert_int_equal(device_init("tpu", 0, &err), E_USAGE);
    assert_non_null(strstr(err.text, "tpu"));
    assert_int_equal(device_init("cuda", 0, &err), E_FAIL);
    assert_non_null(strstr(err.text, "CUDA"));
    assert_int_equal(device_init("cpu", -1, &err), E_USAGE);
    assert_non_null(strstr(err.text, "-1"));
    assert_int_equal(device_init("cpu", 1025, &err), E_USAGE);
    assert_null(ops);
    assert_int_equal(device_init("auto", 1, &err), 0);
    assert_ptr_equal(ops, &ops_cpu);
    assert_int_equal(device_threads(), 1);
    assert_int_equal(strncmp(device_description(), "cpu: ", 5), 0);
    assert_non_null(strstr(device_description(), "1 thread, "));
}

static void test_memory(void **unused) {
    (void)unused;
    Err err = {0};
    unsigned char in[100], out[100];
    void *p;
    assert_int_equal(device_alloc(&p, sizeof in, "test", &err), 0);
    device_copy_out(out, p, sizeof out);
    for (size_t i = 0; i < sizeof out; i++) assert_int_equal(out[i], 0);
    for (size_t i = 0; i < sizeof in; i++) in[i] = (unsigned char)i;
    device_copy_in(p, in, sizeof in);
    device_copy_out(out, p, sizeof out);
    assert_memory_equal(in, out, sizeof in);
    device_zero(p, 50);
    device_copy_out(out, p, sizeof out);
    assert_true(out[49] == 0 && out[50] == 50);
    device_free(p);
    assert_int_equal(device_alloc(&p, SIZE_MAX - 10, "the moon", &err), E_NOMEM);
    assert_non_null(strstr(err.text, "the moon"));
}

// The first error of several is kept, handed out once, and then the next may come.
static void test_first_error(void **unused) {
    (void)unused;
    Err err = {0};
    assert_int_equal(device_sync(&err), 0);
    ops_set_error(E_NOMEM, "first %d", 1);
    ops_set_error(E_FAIL, "second");
    assert_int_equal(device_sync(&err), E_NOMEM);
    assert_string_equal(err.text, "first 1");
    assert_int_equal(device_sync(&err), 0);
    ops_set_error(E_FAIL, "third");
    assert_int_equal(device_sync(&err), E_FAIL);
    assert_string_equal(err.text, "third");
}

// No thread of a processor does less than 100 MFLOP/s or more than 10 TFLOP/s: a loop that the compiler moved would.
static void test_peak(void **unused) {
    (void)unused;
    Err err;
    assert_int_equal(device_init("cpu", 0, &err), 0);
    const char *source = NULL;
    double peak = device_peak_flops(&source);
    assert_true(peak > 1e8 && peak < 1e13 * device_threads());
    assert_true(source && source[0]);
    assert_true(device_peak_flops(NULL) == peak);
}

// Ranks that share the CPU's memory get a part each; a process that is alone all of it.
static void test_choose(void **unused) {
    (void)unused;
    Err err;
    double available, all, part_available, part;
    assert_int_equal(device_init("cpu", 1, &err), 0);
    device_memory(&available, &all);
    assert_int_equal(device_index(), -1);
    assert_int_equal(device_sharers(), 1);
    device_choose(2, 3);
    assert_int_equal(device_init("cpu", 1, &err), 0);
    device_memory(&part_available, &part);
    assert_int_equal(device_sharers(), 3);
    // Quotients of doubles that are not whole may differ by their rounding.
    assert_true(fabs(3 * part - all) < 1e-9 * all && fabs(3 * part_available - available) < 1e-9 * available);
    device_choose(0, 1);
    assert_int_equal(device_init("cpu", 1, &err), 0);
}

static void test_marks(void **unused) {
    (void)unused;
    static double seconds[DEVICE_MARKS];
    Err err;
    assert_int_equal(device_init("cpu", 1, &err), 0);
    (void)device_marks_read(seconds);
    double t0 = now_seconds();
    for (int i = 0; i < DEVICE_MARKS; i++) assert_int_equal(device_mark(), i);
    double t1 = now_seconds();
    assert_int_equal(device_mark(), -1);
    assert_int_equal(device_marks_read(seconds), DEVICE_MARKS);
    assert_true(seconds[0] >= t0 && seconds[DEVICE_MARKS - 1] <= t1);
    for (int i = 1; i < DEVICE_MARKS; i++) assert_true(seconds[i] >= seconds[i - 1]);
    assert_int_equal(device_marks_read(seconds), 0);
    assert_int_equal(device_mark(), 0);
    (void)device_marks_read(seconds);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_init), cmocka_unit_test(test_memory), cmocka_unit_test(test_first_error),
    cmocka_unit_test(test_peak), cmocka_unit_test(test_choose), cmocka_unit_test(test_marks),
};
TEST_MAIN(tests)
