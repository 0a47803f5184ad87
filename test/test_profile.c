// The profile: operations are timed and passed on, the timeline is JSON that says what happened when, memory is
// bounded.
#include "test_common.h"
#include "device.h"
#include "json.h"
#include "profile.h"
#include <math.h>
#include <pthread.h>

static void begin(const char *timeline, int rank) {
    Err err;
    if (device_init("cpu", 1, &err) < 0) fail_msg("%s", err.text);
    if (profile_begin(timeline, rank, &err) < 0) fail_msg("%s", err.text);
}

enum { N = 64, C = 256, TIMES = 20 };
static void compute(void) {
    static uint8_t mask[N * C];
    static floatX dx[N * C];
    for (int i = 0; i < TIMES; i++) ops->mask_backward(dx, mask, N, C);
}

typedef struct { int total, compute, communication, metadata, disorder; double sum; } Timeline;

// Reads a timeline, and checks each event and that no two of a lane overlap.
static Timeline timeline_read(const char *path, int rank) {
    Timeline t = {0};
    Err err;
    char *text;
    size_t len;
    if (file_read(&text, &len, path, (size_t)1 << 28, &err) < 0) fail_msg("%s", err.text);
    cJSON *array = cJSON_ParseWithLength(text, len);
    free(text);
    assert_true(cJSON_IsArray(array));
    double end[2] = {0, 0};
    const cJSON *e;
    cJSON_ArrayForEach(e, array) {
        const char *ph = cJSON_GetStringValue(cJSON_GetObjectItem(e, "ph"));
        const char *name = cJSON_GetStringValue(cJSON_GetObjectItem(e, "name"));
        assert_true(ph && name && name[0]);
        assert_int_equal((int)cJSON_GetNumberValue(cJSON_GetObjectItem(e, "pid")), rank);
        t.total++;
        if (!strcmp(ph, "M")) {
            t.metadata++;
            continue;
        }
        assert_string_equal(ph, "X");
        int lane = (int)cJSON_GetNumberValue(cJSON_GetObjectItem(e, "tid"));
        double ts = cJSON_GetNumberValue(cJSON_GetObjectItem(e, "ts"));
        double dur = cJSON_GetNumberValue(cJSON_GetObjectItem(e, "dur"));
        assert_true((lane == 0 || lane == 1) && ts > 0 && dur >= 0);
        // Times are printed to a thousandth of a microsecond, begin and length each rounded.
        if (ts < end[lane] - 0.002) t.disorder++;
        end[lane] = ts + dur;
        if (lane) t.communication++;
        else t.compute++, t.sum += dur;
    }
    cJSON_Delete(array);
    return t;
}

static void test_timeline(void **unused) {
    (void)unused;
    char path[300], of_rank[310];
    Err err;
    snprintf(path, sizeof path, "%s/timeline.json", test_tmpdir());
    for (int rank = 0; rank < 3; rank += 2) {
        const Ops *before = &ops_cpu;
        begin(path, rank);
        assert_ptr_not_equal(ops, before);
        compute();
        profile_reset();                    // what came before is forgotten
        double t0 = now_seconds();
        compute();
        double t1 = now_seconds();
        profile_span("all_gather", PROFILE_COMMUNICATION, t0, t1);
        profile_span("all_to_all", PROFILE_COMMUNICATION, t1, t1 + 1e-3);
        snprintf(of_rank, sizeof of_rank, rank ? "%s.rank%d" : "%s", path, rank);
        if (profile_end(&err) < 0) fail_msg("%s", err.text);
        assert_ptr_equal(ops, before);
        Timeline t = timeline_read(of_rank, rank);
        assert_int_equal(t.compute, TIMES);
        assert_int_equal(t.communication, 2);
        assert_int_equal(t.metadata, 3);
        assert_int_equal(t.disorder, 0);
        // What the operations took is no more than what lay around them, to the rounding of TIMES lengths.
        assert_true(t.sum > 0 && t.sum <= 1e6 * (t1 - t0) + TIMES * 0.001);
    }
}

static void test_print(void **unused) {
    (void)unused;
    Err err;
    char line[256];
    begin(NULL, 0);
    double t0 = now_seconds();
    compute();
    double t1 = now_seconds();
    profile_span("all_gather", PROFILE_COMMUNICATION, t1 + 1, t1 + 1.002);     // nothing runs then
    profile_span("broadcast", PROFILE_COMMUNICATION, t0, t1);
    FILE *f = tmpfile();
    profile_print(f, 2, t1 - t0);
    profile_print(f, 2, t1 - t0);                                              // nothing is counted twice
    rewind(f);
    int ops_lines = 0, gather_lines = 0, broadcast_lines = 0;
    while (fgets(line, sizeof line, f)) {
        double n, ms, share;
        if (sscanf(line, " mask_backward %lf %lf %lf%%", &n, &ms, &share) == 3) {
            ops_lines++;
            assert_true(n == TIMES / 2 && share > 0 && share <= 100);
        }
        if (sscanf(line, " all_gather %lf %lf %lf%%", &n, &ms, &share) == 3) {
            gather_lines++;
            assert_true(fabs(ms - 1.0) < 0.006 && share == 0);                 // 2 ms in two steps, two digits printed
        }
        if (sscanf(line, " broadcast %lf %lf %lf%%", &n, &ms, &share) == 3) {
            broadcast_lines++;
            assert_true(share > 0 && share <= 100);
        }
    }
    fclose(f);
    assert_int_equal(ops_lines, 2);
    assert_int_equal(gather_lines, 2);
    assert_int_equal(broadcast_lines, 2);
    assert_int_equal(profile_end(&err), 0);
}

// More operations than there are marks, and more spans than are kept.
static void test_bounds(void **unused) {
    (void)unused;
    char path[300];
    Err err;
    snprintf(path, sizeof path, "%s/many.json", test_tmpdir());
    begin(path, 0);
    enum { MANY = DEVICE_MARKS };           // two marks each
    floatX x[8] = {0};
    uint8_t mask[8] = {0};
    for (int i = 0; i < MANY; i++) ops->mask_backward(x, mask, 1, 8);
    if (profile_end(&err) < 0) fail_msg("%s", err.text);
    assert_int_equal(timeline_read(path, 0).compute, MANY);

    begin(path, 0);
    for (int i = 0; i < PROFILE_SPANS + 100; i++) profile_span("all_gather", PROFILE_COMMUNICATION, 1 + i, 1 + i + 0.5);
    if (profile_end(&err) < 0) fail_msg("%s", err.text);
    assert_int_equal(timeline_read(path, 0).communication, PROFILE_SPANS);
}

// Long enough that two threads meet.
enum { OF_A_THREAD = 100000 };
static void *spans_of_a_thread(void *lane) {
    for (int i = 0; i < OF_A_THREAD; i++) profile_span("span", *(int *)lane, 1 + i, 1 + i + 0.5);
    return NULL;
}
static void test_thread(void **unused) {
    (void)unused;
    char path[300];
    Err err;
    pthread_t thread;
    snprintf(path, sizeof path, "%s/thread.json", test_tmpdir());
    begin(path, 0);
    int lanes[2] = {PROFILE_COMMUNICATION, PROFILE_COMPUTE};
    assert_int_equal(pthread_create(&thread, NULL, spans_of_a_thread, &lanes[0]), 0);
    spans_of_a_thread(&lanes[1]);
    pthread_join(thread, NULL);
    if (profile_end(&err) < 0) fail_msg("%s", err.text);
    Timeline t = timeline_read(path, 0);
    assert_int_equal(t.compute, OF_A_THREAD);
    assert_int_equal(t.communication, OF_A_THREAD);
    assert_int_equal(t.disorder, 0);
    // With no profile there is nothing to keep.
    profile_span("all_gather", PROFILE_COMMUNICATION, 1, 2);
    assert_int_equal(profile_end(&err), 0);
}

static void test_path(void **unused) {
    (void)unused;
    Err err;
    if (device_init("cpu", 1, &err) < 0) fail_msg("%s", err.text);
    assert_int_equal(profile_begin("/no/such/folder/t.json", 0, &err), E_FAIL);
    assert_non_null(strstr(err.text, "/no/such/folder"));
    char longer[2000];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    assert_int_equal(profile_begin(longer, 0, &err), E_USAGE);
    assert_ptr_equal(ops, &ops_cpu);
    assert_int_equal(profile_end(&err), 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_timeline), cmocka_unit_test(test_print), cmocka_unit_test(test_bounds),
    cmocka_unit_test(test_thread), cmocka_unit_test(test_path),
};
TEST_MAIN(tests)
