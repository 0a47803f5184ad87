// What happens to bytes before they go to other ranks and after they came (ops.h, "between ranks"); quantized weights
// are packed in adamw.c and unpacked in dequant.c.
#include "cpu.h"

static int64_t rows_in_window(const RowSplit *split, int r, int64_t k0, int64_t kn) {
    int64_t n = split_count(split, r) - k0;
    return n < 0 ? 0 : n < kn ? n : kn;
}

int64_t cpu_window_rows(const RowSplit *split, int64_t k0, int64_t kn) {
    int64_t total = 0;
    for (int r = 0; r < split->R; r++) total += rows_in_window(split, r, k0, kn);
    return total;
}

bool cpu_next_run(RowRun *run, const RowSplit *split, int64_t k0, int64_t kn, int64_t first, int64_t last) {
    while (++run->rank < split->R) {
        int64_t n = rows_in_window(split, run->rank, k0, kn), from = first - run->seen, to = last - run->seen;
        run->seen += n;
        if (from < 0) from = 0;
        if (to > n) to = n;
        if (from >= to) continue;
        run->k = from;
        run->row = split_begin(split, run->rank) + k0 + from;
        run->n = to - from;
        return true;
    }
    return false;
}

void cpu_rows_pack(void *wire, size_t stride, const void *tensor, const RowSplit *split, int64_t k0, int64_t kn,
                   size_t row_bytes) {
    int64_t total = cpu_window_rows(split, k0, kn);
    int threads = cpu_max_threads();
#pragma omp parallel for schedule(static) if ((size_t)total * row_bytes >= 2 * CPU_MIN_PARALLEL)
    for (int t = 0; t < threads; t++) {
        RowRun run = {.rank = -1};
        while (cpu_next_run(&run, split, k0, kn, total * t / threads, total * (t + 1) / threads))
            memcpy((uint8_t *)wire + (size_t)run.rank * stride + (size_t)run.k * row_bytes,
                   (const uint8_t *)tensor + (size_t)run.row * row_bytes, (size_t)run.n * row_bytes);
    }
}

void cpu_rows_unpack(void *tensor, const void *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn,
                     size_t row_bytes) {
    int64_t total = cpu_window_rows(split, k0, kn);
    int threads = cpu_max_threads();
#pragma omp parallel for schedule(static) if ((size_t)total * row_bytes >= 2 * CPU_MIN_PARALLEL)
    for (int t = 0; t < threads; t++) {
        RowRun run = {.rank = -1};
        while (cpu_next_run(&run, split, k0, kn, total * t / threads, total * (t + 1) / threads))
            memcpy((uint8_t *)tensor + (size_t)run.row * row_bytes,
                   (const uint8_t *)wire + (size_t)run.rank * stride + (size_t)run.k * row_bytes,
                   (size_t)run.n * row_bytes);
    }
}

// Values that a thread takes at a time, and those that are summed side by side.
#define CHUNK 8192
#define SIDE 4

VEC void sum_sixteens(float *out, const float *in, size_t stride, int R, int vectors, int n, bool accumulate) {
    v16 sum[SIDE];
#pragma GCC unroll 4
    for (int k = 0; k < vectors; k++) {
        prefetch_ahead(in + 16 * k);
        sum[k] = v16_load(in + 16 * k, n);
    }
    for (int r = 1; r < R; r++) {
        in += stride;
#pragma GCC unroll 4
        for (int k = 0; k < vectors; k++) {
            prefetch_ahead(in + 16 * k);
            sum[k] = sum[k] + v16_load(in + 16 * k, n);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < vectors; k++) {
        prefetch_ahead(out + 16 * k);
        v16_store(out + 16 * k, accumulate ? v16_load(out + 16 * k, n) + sum[k] : sum[k], n);
    }
}

void cpu_sum_ranks(float *out, const float *in, size_t stride, int R, size_t n, bool accumulate) {
    size_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) if (n * (size_t)R >= CPU_MIN_PARALLEL)
    for (size_t k = 0; k < chunks; k++) {
        size_t i = k * CHUNK, end = i + CHUNK < n ? i + CHUNK : n;
        for (; i + 16 * SIDE <= end; i += 16 * SIDE) sum_sixteens(out + i, in + i, stride, R, SIDE, 16, accumulate);
        for (; i < end; i += 16)
            sum_sixteens(out + i, in + i, stride, R, 1, end - i < 16 ? (int)(end - i) : 16, accumulate);
    }
}

void cpu_state_sum(StepState *state, const StepState *all, int R) {
    state->loss_sum = state->grad_squares = 0.0;
    state->tokens = 0;
    state->stop = 0;
    for (int r = 0; r < R; r++) {
        state->loss_sum += all[r].loss_sum;
        state->tokens += all[r].tokens;
        state->grad_squares += all[r].grad_squares;
        state->stop |= all[r].stop;
    }
}
