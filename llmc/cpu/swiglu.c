// SwiGLU with the activation fake quantization of what it produces.
#include "cpu.h"

VEC v16 sigmoid(v16 g) { return v16_set1(1.0f) / (v16_set1(1.0f) + v16_exp(-g)); }

// silu(gate) * up = gate / (1 + e^-gate) * up
VEC v16 swiglu_step(floatX *y, const floatX *gate, const floatX *up, int n) {
    v16 g = v16_loadx(gate, n);
    v16 v = g / (v16_set1(1.0f) + v16_exp(-g)) * v16_loadx(up, n);
    v16_storex(y, v, n);
    return v;
}

void cpu_swiglu_fq_forward(floatX *y, uint8_t *mask, const floatX *gateup, size_t N, int FF, const QuantSpec *act) {
#pragma omp parallel for schedule(static) if (N * (size_t)FF >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        const floatX *gate = gateup + n * 2 * (size_t)FF, *up = gate + FF;
        floatX *yn = y + n * (size_t)FF;
        uint8_t *mn = mask ? mask + n * (size_t)FF : NULL;
        v16 lo = v16_set1(INFINITY), hi = v16_set1(-INFINITY);
        int c = 0;
        for (; c + 16 <= FF; c += 16) {
            v16 v = swiglu_step(yn + c, gate + c, up + c, 16);
            lo = v16_min(v, lo);
            hi = v16_max(v, hi);
        }
        float rmin = v16_hmin(lo), rmax = v16_hmax(hi);
        if (c < FF) {
            v16 v = swiglu_step(yn + c, gate + c, up + c, FF - c);
            for (int i = 0; i < FF - c; i++) {
                rmin = v[i] < rmin ? v[i] : rmin;
                rmax = v[i] > rmax ? v[i] : rmax;
            }
        }
        if (quant_is_on(act)) fakequant_row(yn, mn, yn, FF, rmin, rmax, act);
        else if (mn) memset(mn, 1, (size_t)FF);
    }
}

// y = g s u with s = sigmoid(g):  du = dy g s,  dg = dy u s (1 + g (1 - s)). Both inputs are read before either output
// is written, so dgateup may be gateup.
VEC void swiglu_backward_step(floatX *dgate, floatX *dup, const floatX *dy, const uint8_t *mask, const floatX *gate,
                              const floatX *up, int n) {
    v16 g = v16_loadx(gate, n), u = v16_loadx(up, n), d = v16_loadx(dy, n), one = v16_set1(1.0f);
    if (mask) d = v16_keep(d, mask, n);
    v16 s = sigmoid(g), ds = d * s;
    v16_storex(dgate, ds * u * v16_fma(g, one - s, one), n);
    v16_storex(dup, ds * g, n);
}

void cpu_swiglu_backward(floatX *dgateup, const floatX *dy, const uint8_t *mask, const floatX *gateup, size_t N, int FF) {
#pragma omp parallel for schedule(static) if (N * (size_t)FF >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        const floatX *gate = gateup + n * 2 * (size_t)FF, *up = gate + FF, *d = dy + n * (size_t)FF;
        const uint8_t *mn = mask ? mask + n * (size_t)FF : NULL;
        floatX *dgate = dgateup + n * 2 * (size_t)FF, *dup = dgate + FF;
        int c = 0;
        for (; c + 16 <= FF; c += 16)
            swiglu_backward_step(dgate + c, dup + c, d + c, mn ? mn + c : NULL, gate + c, up + c, 16);
        if (c < FF) swiglu_backward_step(dgate + c, dup + c, d + c, mn ? mn + c : NULL, gate + c, up + c, FF - c);
    }
}
