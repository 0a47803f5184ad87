// The kernels of panels.c in f32, for vectors of LANES values: included once for each form. The includer defines
//   FORM(name)        the name of a function of this form
//   FORM_TARGET       attributes of its functions
//   LANES             16 or a divisor of it
//   FORM_FMA(a, b, c) a * b + c of vectors
//   FORM_NIBBLE(w, k) nibble k of each lane as f32, where there is a faster way than shifts
// Codes are exact in f32. Sums of a group run in four chains, one for each column of four, added in pairs.
#define INLINE static inline __attribute__((always_inline)) FORM_TARGET
typedef float FORM(vf) __attribute__((vector_size(LANES * 4)));
typedef int32_t FORM(vi) __attribute__((vector_size(LANES * 4)));
typedef uint32_t FORM(vu) __attribute__((vector_size(LANES * 4)));
typedef uint16_t FORM(vh) __attribute__((vector_size(LANES * 2)));
typedef int16_t FORM(vs) __attribute__((vector_size(LANES * 2)));

// Column j of the unit in `w`.
INLINE FORM(vf) FORM(column)(FORM(vu) w, int bits, int j) {
    int nibble = j % 2 * 4 + j / 2;
#ifdef FORM_NIBBLE
    if (bits == 4) return FORM_NIBBLE(w, nibble);
#endif
    int left = bits == 4 ? 28 - 4 * nibble : 24 - 8 * j;
    return __builtin_convertvector((FORM(vi))(w << left) >> (32 - bits), FORM(vf));
}

INLINE FORM(vf) FORM(all)(float v) { return v - (FORM(vf)){0}; }

INLINE FORM(vf) FORM(widen)(const void *bf16s) {
    FORM(vh) h;
    memcpy(&h, bf16s, sizeof h);
    return (FORM(vf))(__builtin_convertvector(h, FORM(vu)) << 16);
}

// n tokens against the LANES rows of a panel whose lanes begin at `row`.
INLINE void FORM(dot)(float *out, const Panels *p, const char *panel, const PanelInput *in, size_t t0, int row,
                      int bits, int n, bool zero_is_int) {
    const int cols = 32 / bits;
    FORM(vf) total[PANEL_TOKENS];
    for (int t = 0; t < n; t++) total[t] = (FORM(vf)){0};
    const float *x = in->x32 + t0 * in->ld;
    for (int64_t g = 0; g < p->groups; g++) {
        const char *head = panel + panel_head(p, g) + (g % 2) * 32, *codes = panel + panel_codes(p, g) + row * 4;
        FORM(vf) acc[PANEL_TOKENS][4], zero = {0}, scale;
        for (int t = 0; t < n; t++)
            for (int i = 0; i < 4; i++) acc[t][i] = (FORM(vf)){0};
        if (zero_is_int) {
            FORM(vs) z;
            memcpy(&z, head + 64 + row * 2, sizeof z);
            zero = __builtin_convertvector(z, FORM(vf));
        }
        __builtin_prefetch(head + PANEL_AHEAD);
        for (int64_t u = 0; u < p->units; u++) {
            FORM(vu) w;
            memcpy(&w, codes, sizeof w);
            __builtin_prefetch(codes + PANEL_AHEAD);
#pragma GCC unroll 8
            for (int j = 0; j < cols; j++) {
                FORM(vf) q = FORM(column)(w, bits, j);
                if (zero_is_int) q -= zero;
#pragma GCC unroll 4
                for (int t = 0; t < n; t++)
                    acc[t][j % 4] = FORM_FMA(q, FORM(all)(x[(size_t)t * in->ld + (size_t)j]), acc[t][j % 4]);
            }
            codes += UNIT_BYTES;
            x += cols;
        }
        if (p->scale_f32) memcpy(&scale, head + row * 4, sizeof scale);
        else scale = FORM(widen)(head + row * 2);
        for (int t = 0; t < n; t++) {
            FORM(vf) sum = (acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]);
            total[t] = FORM_FMA(sum, scale, total[t]);
            if (p->zero == PANEL_ZERO_FLOAT) {
                FORM(vf) sums = FORM(all)(in->sums[(t0 + (size_t)t) * (size_t)p->groups + (size_t)g]);
                total[t] = FORM_FMA(FORM(widen)(head + 64 + row * 2), sums, total[t]);
            }
        }
    }
    for (int t = 0; t < n; t++) memcpy(out + t * PANEL_ROWS + row, &total[t], sizeof total[t]);
}

// One function for each shape, so that each has the registers to itself.
#define FORM_DOT(name, bits, n, zero_is_int) \
    static __attribute__((noinline)) FORM_TARGET void FORM(name)(float *out, const Panels *p, const char *panel, \
                                                                 const PanelInput *in, size_t t0) { \
        for (int row = 0; row < PANEL_ROWS; row += LANES) \
            FORM(dot)(out, p, panel, in, t0, row, bits, n, zero_is_int); \
    }
FORM_DOT(codes4_1, 4, 1, false)
FORM_DOT(codes4_2, 4, 2, false)
FORM_DOT(codes4_zero_1, 4, 1, true)
FORM_DOT(codes4_zero_2, 4, 2, true)
FORM_DOT(codes8_1, 8, 1, false)
FORM_DOT(codes8_2, 8, 2, false)
FORM_DOT(codes8_zero_1, 8, 1, true)
FORM_DOT(codes8_zero_2, 8, 2, true)
static const PanelDots FORM(dots) = {
    .wide = true,
    .run = {{{FORM(codes4_1), FORM(codes4_2)}, {FORM(codes4_zero_1), FORM(codes4_zero_2)}},
            {{FORM(codes8_1), FORM(codes8_2)}, {FORM(codes8_zero_1), FORM(codes8_zero_2)}}},
};
#undef FORM_DOT
#undef INLINE
#undef FORM
#undef FORM_TARGET
#undef FORM_FMA
#undef FORM_NIBBLE
#undef LANES
