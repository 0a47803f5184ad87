// SwiGLU with the activation fake quantization of what it produces.
#include "cpu.h"

// silu(gate) * up = gate / (1 + e^-gate) * up
VEC v16 swiglu_step(const floatX *gate, const floatX *up, int n) {
    v16 g = v16_loadx(gate, n);
    return g / (v16_set1(1.0f) + v16_exp(-g)) * v16_loadx(up, n);
}

static Range swiglu_row(floatX *y, const floatX *gate, const floatX *up, int FF) {
    Range even = range_empty(), odd = even;
    int c = 0;
    for (; c + 32 <= FF; c += 32) {
        prefetch_ahead(gate + c);
        prefetch_ahead(up + c);
        prefetch_ahead(y + c);
        v16 lo = swiglu_step(gate + c, up + c, 16), hi = swiglu_step(gate + c + 16, up + c + 16, 16);
        v32_storex(y + c, lo, hi);
        range_add(&even, lo, 16);
        range_add(&odd, hi, 16);
    }
    for (; c < FF; c += 16) {
        int n = FF - c < 16 ? FF - c : 16;
        v16 v = swiglu_step(gate + c, up + c, n);
        v16_storex(y + c, v, n);
        range_add(&even, v, n);
    }
    return (Range){v16_min(even.lo, odd.lo), v16_max(even.hi, odd.hi)};
}

void cpu_swiglu_fq_forward(floatX *y, uint8_t *mask, const floatX *gateup, size_t N, int FF, const QuantSpec *act) {
#pragma omp parallel for schedule(static) if (N * (size_t)FF >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        const floatX *gate = gateup + n * 2 * (size_t)FF;
        floatX *yn = y + n * (size_t)FF;
        uint8_t *mn = mask ? mask + n * (size_t)FF : NULL;
        Range range = swiglu_row(yn, gate, gate + FF, FF);
        if (quant_is_on(act)) fakequant_row(yn, mn, yn, FF, range, act);
        else if (mn) memset(mn, 1, (size_t)FF);
    }
}

// y = g s u with s = sigmoid(g):  du = dy g s,  dg = dy u s (1 + g (1 - s)).
typedef struct { v16 dgate, dup; } SwigluGrad;

VEC SwigluGrad swiglu_backward_step(const floatX *dy, const uint8_t *mask, const floatX *gate, const floatX *up,
                                    int n) {
    v16 g = v16_loadx(gate, n), d = v16_loadx(dy, n), one = v16_set1(1.0f);
    if (mask) d = v16_keep(d, mask, n);
    v16 s = one / (one + v16_exp(-g)), ds = d * s;
    return (SwigluGrad){ds * v16_loadx(up, n) * v16_fma(g, one - s, one), ds * g};
}

// All inputs of a step are read before its outputs are written, so dgateup may be gateup.
VEC void swiglu_backward_row(floatX *dgate, floatX *dup, const floatX *dy, const uint8_t *mask, const floatX *gate,
                             const floatX *up, int FF, bool with_mask) {
    int c = 0;
    for (; c + 32 <= FF; c += 32) {
        int e = c + 16;
        prefetch_ahead(gate + c);
        prefetch_ahead(up + c);
        prefetch_ahead(dy + c);
        prefetch_ahead(dgate + c);
        prefetch_ahead(dup + c);
        SwigluGrad lo = swiglu_backward_step(dy + c, with_mask ? mask + c : NULL, gate + c, up + c, 16);
        SwigluGrad hi = swiglu_backward_step(dy + e, with_mask ? mask + e : NULL, gate + e, up + e, 16);
        v32_storex(dgate + c, lo.dgate, hi.dgate);
        v32_storex(dup + c, lo.dup, hi.dup);
    }
    for (; c < FF; c += 16) {
        int n = FF - c < 16 ? FF - c : 16;
        SwigluGrad g = swiglu_backward_step(dy + c, with_mask ? mask + c : NULL, gate + c, up + c, n);
        v16_storex(dgate + c, g.dgate, n);
        v16_storex(dup + c, g.dup, n);
    }
}

void cpu_swiglu_backward(floatX *dgateup, const floatX *dy, const uint8_t *mask, const floatX *gateup, size_t N,
                         int FF) {
#pragma omp parallel for schedule(static) if (N * (size_t)FF >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        const floatX *gate = gateup + n * 2 * (size_t)FF, *d = dy + n * (size_t)FF;
        floatX *dgate = dgateup + n * 2 * (size_t)FF;
        if (mask) swiglu_backward_row(dgate, dgate + FF, d, mask + n * (size_t)FF, gate, gate + FF, FF, true);
        else swiglu_backward_row(dgate, dgate + FF, d, NULL, gate, gate + FF, FF, false);
    }
}
