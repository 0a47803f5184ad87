// Writes a token shard (u16 format) of random tokens, so that training benchmarks need no text: random_shard FILE N V.
// Tokens follow a 1/(rank+10) law as words do, so that the embedding's gradient meets repeated rows.
#include <stdlib.h>
#include "common.h"
#include "rng.h"

int main(int argc, char **argv) {
    program_name = "random_shard";
    Err err = {0};
    if (argc != 4 || atoll(argv[2]) < 2 || atoll(argv[3]) < 2 || atoll(argv[3]) > 65536) {
        err_set(&err, E_USAGE, "usage: random_shard FILE TOKENS VOCABULARY (2..65536)");
        die(&err);
    }
    size_t n = (size_t)atoll(argv[2]);
    double V = atof(argv[3]);
    int32_t header[256] = {20240520, 1, (int32_t)n};
    AtomicFile f;
    if (atomic_open(&f, argv[1], &err) < 0) die(&err);
    atomic_write(&f, header, sizeof header);
    for (size_t i = 0; i < n; i++) {
        // Inverse of the cumulative law log((r + 10) / 10) / log((V + 10) / 10).
        double rank = 10 * pow((V + 10) / 10, (double)philox_uniform(philox(1, 2, i).v[0])) - 10;
        uint16_t token = (uint16_t)(rank < V ? rank : V - 1);
        atomic_write(&f, &token, sizeof token);
    }
    if (atomic_commit(&f, &err) < 0) die(&err);
    return 0;
}
