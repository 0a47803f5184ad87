// How long does saving a checkpoint hold up the training, and how fast are checksums?
//
//   state_checksum     of memory that no cache holds, one core
//   state_memcpy       copying with all threads, bytes read plus bytes written: what the copy could reach
//   state_copy_first   the training thread's time in the first train_state_save, which gets the memory for the copy
//   state_copy         the same in later ones: bytes read plus bytes written over seconds
//   state_blocked      seconds of that, for the state's bytes
//   state_write        to the disk, in the background: bytes of the state over the seconds until it is complete
//   state_load         reading it back on one rank, checksum and copy
//
// The state is that of the shape named by the first argument (135M) under AdamW, below TMPDIR or /tmp.
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "checksum.h"
#include "device.h"
#include "store.h"

#define REPEATS 5

static void fail(Err *err) {
    program_name = "bench_state";
    die(err);
}

static double best(double a, double b) { return a < b ? a : b; }

int main(int argc, char **argv) {
    Err err = {0};
    LlamaConfig c;
    QuantPlan plan;
    ParamTable table;
    Shard shard;
    Store store;
    StateArray arrays[STORE_MAX_ARRAYS];
    quant_plan_none(&plan);
    if (device_init("cpu", 0, &err) || llama_config_named(&c, argc > 1 ? argv[1] : "135M", &err) ||
        param_table_build(&table, &c, &plan, &err) ||
        shard_plan(&shard, &c, &plan, &table, SHARD_NONE, true, 1, 0, &err) || store_plan(&store, &shard, true, &err) ||
        store_alloc(&store, &err) || store_arrays(&store, arrays) != 3)
        fail(&err);
    const OwnTable *own = &shard.own;
    size_t bytes = train_state_copy_bytes(own, arrays, 3), part = bytes / 3;
    uint8_t *data[3];                                // of each array; its tensors follow one another
    for (int a = 0; a < 3; a++) {
        data[a] = arrays[a].t[0].data;
        float *x = arrays[a].t[0].data;
        for (size_t i = 0; i < part / 4; i++) x[i] = (float)(i * 2654435761u % 1000003);
    }
    double seconds = 1e30;
    uint64_t sum = 0;
    for (int r = 0; r < REPEATS; r++) {
        double t = now_seconds();
        sum += checksum_of(data[r % 3], part);
        seconds = best(seconds, now_seconds() - t);
    }
    printf("result state_checksum %.2f GB/s\n", (double)part / seconds / 1e9);

    char out[1024];
    const char *tmp = getenv("TMPDIR");
    snprintf(out, sizeof out, "%s/qllm-bench-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(out)) return 1;
    TrainProgress p = {.T = 1};
    double blocked = 1e30, write = 1e30;
    for (int r = 0; r < REPEATS; r++) {
        p.step = r + 1;
        double t0 = now_seconds();
        if (train_state_save(out, &p, &c, &plan, own, arrays, 3, 1, &err)) fail(&err);
        double t1 = now_seconds();
        if (train_state_finish(&err)) fail(&err);
        double t2 = now_seconds();
        if (r == 0) printf("result state_copy_first %.3f s\n", t1 - t0);
        else blocked = best(blocked, t1 - t0);
        write = best(write, t2 - t1);
    }
    // Copying within the arrays: as much memory as the copy moves, from one that no cache holds to another.
    seconds = 1e30;
    for (int r = 0; r < REPEATS; r++) {
        double t = now_seconds();
#pragma omp parallel for schedule(static) num_threads(device_threads())
        for (size_t k = 0; k < part; k += 1 << 22)
            memcpy(data[1 + r % 2] + k, data[0] + k, part - k < 1 << 22 ? part - k : 1 << 22);
        seconds = best(seconds, now_seconds() - t);
    }
    printf("result state_memcpy %.2f GB/s\n", 2 * (double)part / seconds / 1e9);
    printf("result state_copy %.2f GB/s\n", 2 * (double)bytes / blocked / 1e9);
    printf("result state_blocked %.4f s\n", blocked);
    printf("result state_bytes %.3f GB\n", (double)bytes / 1e9);
    printf("result state_write %.2f GB/s\n", (double)bytes / write / 1e9);
    double t = now_seconds();
    if (train_state_load(out, &p, &c, &plan, own, arrays, 3, &err) != 1) fail(&err);
    printf("result state_load %.2f GB/s\n", (double)bytes / (now_seconds() - t) / 1e9);

    char path[1200];
    const char *const files[] = {"latest", "step-5/checkpoint.json", "step-5/rank-00000-of-00001.safetensors"};
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", out, files[i]);
        unlink(path);
    }
    snprintf(path, sizeof path, "%s/step-5", out);
    if (rmdir(path) || rmdir(out)) return 1;
    return sum == 1;                               // the checksums are of use: they may not be left out
}
