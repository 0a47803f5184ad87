// The gradients' norm, and what follows from it for the step.
#include "cpu.h"

// Blocks of 2^16 gradients are summed in double, each in 16 lanes that are then folded; the blocks' sums are added in
// order. What runs in parallel is at most SUMS blocks, whose sums stand on the stack.
#define NORM_BLOCK 65536
#define SUMS 512

static double sum_of_squares(const float *g, size_t n) {
    double lane[16] = {0};
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        prefetch_ahead(g + i);
        for (int l = 0; l < 16; l++) lane[l] += (double)g[i + (size_t)l] * (double)g[i + (size_t)l];
    }
    for (size_t l = 0; i + l < n; l++) lane[l] += (double)g[i + l] * (double)g[i + l];
    for (int h = 8; h; h >>= 1)
        for (int l = 0; l < h; l++) lane[l] += lane[l + h];
    return lane[0];
}

void cpu_sum_squares(StepState *state, const float *grad, size_t n) {
    double total = 0.0, sums[SUMS];
    size_t blocks = (n + NORM_BLOCK - 1) / NORM_BLOCK;
    for (size_t k0 = 0; k0 < blocks; k0 += SUMS) {
        size_t k1 = k0 + SUMS < blocks ? k0 + SUMS : blocks;
#pragma omp parallel for schedule(static) if (n >= CPU_MIN_PARALLEL)
        for (size_t k = k0; k < k1; k++) {
            size_t at = k * NORM_BLOCK;
            sums[k - k0] = sum_of_squares(grad + at, n - at < NORM_BLOCK ? n - at : NORM_BLOCK);
        }
        for (size_t k = 0; k < k1 - k0; k++) total += sums[k];
    }
    state->grad_squares += total;
}

void cpu_global_norm(StepState *state, float max_norm) {
    double tokens = (double)state->tokens, norm = sqrt(state->grad_squares) / tokens;
    state->norm = (float)norm;
    state->skip = !(state->tokens > 0 && isfinite(norm) && isfinite(state->loss_sum));
    double clip = max_norm > 0.0f && norm > (double)max_norm ? (double)max_norm / norm : 1.0;
    state->grad_scale = state->skip ? 0.0f : (float)(clip / tokens);
}
