// Runs the tests of the CUDA wing (test/cuda/) on the simulator, or on a GPU where nvcc compiled them, and counts which
// operations of ops.h they covered. An argument selects tests by part of their name; QLLM_TEST_SMALL=1 a few that run
// each kind of kernel on small shapes, for tools that slow kernels down a hundredfold (compute-sanitizer).
#include "cuda/cuda_test.h"

static struct { const char *name; CudaTest run; } tests[128];
static int n_tests, failures;

CudaTestEntry::CudaTestEntry(const char *name, CudaTest run) {
    if (n_tests == 128) abort();
    tests[n_tests].name = name;
    tests[n_tests++].run = run;
}

void check_failed(const char *file, int line, const char *cond, const char *fmt, ...) {
    if (failures++ >= 5) return;                               // a broken kernel fails everywhere: the first few tell
    va_list ap;
    va_start(ap, fmt);
    printf("  %s:%d: %s: ", file, line, cond);
    vprintf(fmt, ap);
    printf("\n");
    va_end(ap);
}

size_t kernels_launched(void) {
#ifdef __CUDACC__
    static size_t n;
    return n++;
#else
    return cudasim::launches();
#endif
}

// What is known of each operation: it has an entry of its own, and how its calls went.
static struct { const char *name; bool here; int calls, idle, failed; } coverage[OP_COUNT] = {
#define COVERAGE(name) {#name, ops_cuda.name && ops_cuda.name != ops_cpu.name, 0, 0, 0},
    QLLM_OPS(COVERAGE)
#undef COVERAGE
};
static bool called_now[OP_COUNT];       // by the running test

void op_called(int op, bool launched) {
    coverage[op].calls++;
    coverage[op].idle += !launched;
    called_now[op] = true;
}

// The last line is `result cuda_ops_tested N/M`: M operations in ops.h, N of them with kernels that passed.
static bool print_coverage(void) {
    int tested = 0;
    for (auto &c : coverage) {
        bool ok = c.here && c.calls && !c.idle && !c.failed;
        tested += ok;
        if (ok) continue;
        printf("untested: %s (%s)\n", c.name, !c.here ? "no kernel of its own" : !c.calls ? "no test calls it"
               : c.idle ? "a call launched no kernel" : "a test failed");
    }
    printf("result cuda_ops_tested %d/%d\n", tested, (int)OP_COUNT);
    return tested == OP_COUNT;
}

static const char *const small_tests[] = {
    "attention_backward_lengths", "attention_backward_unaligned", "attention_forward", "attention_forward_cached",
    "attention_forward_plain", "classifier_not_finite", "cp_async", "dequant_rows", "embedding", "fakequant",
    "fakequant_long_rows", "global_norm", "int8_rows", "lanes", "ldmatrix_and_mma", "linear_backward_weight",
    "linear_i8_backward_input", "linear_i8_backward_weight", "linear_i8_forward", "linear_rows", "linear_w8",
    "loss_accumulate", "low_updates_split", "mask_backward", "matvec", "qmatvec_wide", "rmsnorm_backward", "rmsnorm_fq",
    "rmsnorm_fq_long_rows", "rope", "rows_between_ranks", "state_sum", "sum_ranks", "swiglu_backward", "swiglu_fq",
    "updates", "weights_between_ranks", "widen"};

bool small_run(void) {
    const char *small = getenv("QLLM_TEST_SMALL");
    return small && *small && strcmp(small, "0") != 0;
}

static bool chosen(const char *name, const char *part) {
    if (part) return strstr(name, part);
    if (!small_run()) return true;
    for (const char *s : small_tests)
        if (!strcmp(s, name)) return true;
    return false;
}

int main(int argc, char **argv) {
    int failed = 0, run = 0;
    for (int i = 0; i < n_tests; i++) {
        if (!chosen(tests[i].name, argc > 1 ? argv[1] : nullptr)) continue;
        failures = 0;
        memset(called_now, 0, sizeof called_now);
        double start = now_seconds();
        tests[i].run();
        Err err = {};
        int e = device_sync(&err);
        CHECK(e == 0, "an operation reported: %s", err.text);
        printf("%s %s %s %s (%.1f s)\n", failures ? "not ok" : "ok", ops_cuda.name, FLOATX_NAME, tests[i].name,
               now_seconds() - start);
        fflush(stdout);
        for (int op = 0; op < OP_COUNT; op++) coverage[op].failed += called_now[op] && failures;
        failed += failures != 0;
        run++;
    }
    bool whole = argc > 1 || small_run() || print_coverage();
    if (!whole) printf("not ok %s %s every operation is tested\n", ops_cuda.name, FLOATX_NAME);
    printf("%d of %d tests passed\n", run - failed, run);
    return failed != 0 || run == 0 || !whole;
}
