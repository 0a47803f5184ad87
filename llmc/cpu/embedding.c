// The token table: rows out, gradients back in.
#include "cpu.h"

#define ROWS_AHEAD 4

void cpu_embedding_forward(floatX *out, const int32_t *tokens, const floatX *wte, size_t N, int C, int V) {
    (void)V;
#pragma omp parallel for schedule(static) if (N * (size_t)C >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        // Rows are met in no order that the processor could foresee: ask for one while those before it are copied.
        if (n + ROWS_AHEAD < N) {
            const char *later = (const char *)(wte + (size_t)tokens[n + ROWS_AHEAD] * (size_t)C);
            for (size_t i = 0; i < (size_t)C * sizeof(floatX); i += 64) __builtin_prefetch(later + i);
        }
        memcpy(out + n * (size_t)C, wte + (size_t)tokens[n] * (size_t)C, (size_t)C * sizeof(floatX));
    }
}

// Each thread owns strips of columns and goes through all tokens in order: no two threads meet in one element, and the
// order of its sum is that of the positions. A strip of 64 is a cache line or more of every tensor.
#define STRIP 64

void cpu_embedding_backward(float *dwte, const floatX *dout, const int32_t *tokens, size_t N, int C, int V) {
    (void)V;
    int strips = (C + STRIP - 1) / STRIP;
#pragma omp parallel if (N * (size_t)C >= CPU_MIN_PARALLEL)
    {
        int first, last;
        cpu_share(&first, &last, strips);
        first *= STRIP;
        last = last * STRIP < C ? last * STRIP : C;
        for (size_t n = 0; n < N; n++) {
            float *w = dwte + (size_t)tokens[n] * (size_t)C;
            const floatX *d = dout + n * (size_t)C;
            int c = first;
            for (; c + 16 <= last; c += 16) v16_store(w + c, v16_load(w + c, 16) + v16_loadx(d + c, 16), 16);
            for (; c < last; c++) w[c] += x2f(d[c]);
        }
    }
}
