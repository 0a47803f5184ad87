// Any bytes as the marker of a training checkpoint: refused, or what is taken survives being written and read again.
// Damaged text is stopped by the checksum, so the input is also tried with one that is right.
#include <stdlib.h>
#include <string.h>
#include "checksum.h"
#include "train_state.h"

static void try_marker(const char *text, size_t size) {
    TrainMarker m, m2;
    Err err = {0};
    if (train_marker_parse(&m, text, size, "fuzz", &err)) {
        if (!err.text[0] || m.files || m.tensors || m.config) abort();
        return;
    }
    for (int i = 0; i < m.n_tensors; i++) {              // the ranks' rows follow one another, from none to all
        const RowSplit *s = &m.tensors[i].split;
        int64_t at = 0;
        int step = m.ranks > 64 ? m.ranks - 1 : 1;       // where there are many, the first and the last
        for (int r = 0; r < m.ranks; r += step) {
            if (step == 1 && split_begin(s, r) != at) abort();
            at = split_begin(s, r) + split_count(s, r);
            if (split_count(s, r) < 0 || at > s->rows) abort();
        }
        if (at != s->rows) abort();
    }
    char *again = train_marker_to_json(&m);
    if (!again || train_marker_parse(&m2, again, strlen(again), "fuzz", &err)) abort();
    if (m2.n_tensors != m.n_tensors || m2.ranks != m.ranks || m2.n_arrays != m.n_arrays ||
        strcmp(m2.config, m.config) || strcmp(m2.formats, m.formats) || strcmp(m2.quant, m.quant) || m2.progress.seed != m.progress.seed ||
        memcmp(m2.files, m.files, (size_t)m.ranks * sizeof *m.files))
        abort();
    free(again);
    train_marker_free(&m2);
    train_marker_free(&m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char tail[64];
    if (size > 1 << 18) return 0;                        // length alone finds nothing new here
    try_marker((const char *)data, size);
    // Seeds end with a checksum, which is cut off; other input is an object that lacks its end.
    size_t n = size;
    for (size_t i = 0; i + 12 < size; i++)
        if (!memcmp(data + i, ",\n\t\"checksum\"", 13)) n = i;
    char *text = malloc(n + sizeof tail);
    if (n) memcpy(text, data, n);
    snprintf(tail, sizeof tail, ",\n\t\"checksum\":\t\"%016llx\"\n}\n", (unsigned long long)checksum_of(text, n));
    memcpy(text + n, tail, strlen(tail));
    try_marker(text, n + strlen(tail));
    free(text);
    return 0;
}
