// The rows of matvec.c in f32, for vectors of LANES 32-bit units: included once for each form. The includer defines
//   FORM(name)        the name of a function of this form
//   FORM_TARGET       attributes of its functions
//   LANES             4, 8 or 16
//   FORM_FMA(a, b, c) a * b + c of vectors
// A unit is a value in an fp32 build, else a pair of bf16: the first in the low half.
#define INLINE static inline __attribute__((always_inline)) FORM_TARGET
typedef float FORM(vf) __attribute__((vector_size(LANES * 4)));
typedef uint32_t FORM(vu) __attribute__((vector_size(LANES * 4)));

INLINE FORM(vf) FORM(dot)(FORM(vu) w, const float *x, FORM(vf) acc) {
    FORM(vf) first;
    memcpy(&first, x, sizeof first);
#ifdef PRECISION_FP32
    return FORM_FMA((FORM(vf))w, first, acc);
#else
    FORM(vf) second;
    memcpy(&second, x + LANES, sizeof second);
    acc = FORM_FMA((FORM(vf))(w << 16), first, acc);
    return FORM_FMA((FORM(vf))(w & 0xffff0000u), second, acc);
#endif
}

// Four chains of multiply-adds a token; what is left of the row goes to them in turn.
INLINE void FORM(row)(float *y, const floatX *w, const MatvecInput *in, size_t t0, int n) {
    enum { STEP = LANES * PER_UNIT };
    FORM(vf) acc[MATVEC_TOKENS][4];
    for (int t = 0; t < n; t++)
        for (int i = 0; i < 4; i++) acc[t][i] = (FORM(vf)){0};
    const float *x = in->x32 + t0 * in->ld;
    const int C = in->C;
    int c = 0;
    for (; c + 4 * STEP <= C; c += 4 * STEP) {
        prefetch_row(w + c, 4 * STEP);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            FORM(vu) u;
            memcpy(&u, w + c + i * STEP, sizeof u);
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) acc[t][i] = FORM(dot)(u, x + (size_t)t * in->ld + (c + i * STEP), acc[t][i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, c += STEP) {
        if (c >= C) break;
        FORM(vu) u = {0};
        memcpy(&u, w + c, C - c < STEP ? (size_t)(C - c) * sizeof *w : sizeof u);
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) acc[t][i] = FORM(dot)(u, x + (size_t)t * in->ld + c, acc[t][i]);
    }
    for (int t = 0; t < n; t++) {
        FORM(vf) sum = (acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]);
        float s[LANES];
        memcpy(s, &sum, sizeof s);
#pragma GCC unroll 4
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) s[i] += s[i + half];
        y[t] = s[0];
    }
}

static FORM_TARGET void FORM(row_1)(float *y, const floatX *w, const MatvecInput *in, size_t t0) {
    FORM(row)(y, w, in, t0, 1);
}
static FORM_TARGET void FORM(row_2)(float *y, const floatX *w, const MatvecInput *in, size_t t0) {
    FORM(row)(y, w, in, t0, 2);
}
#undef INLINE
#undef FORM
#undef FORM_TARGET
#undef FORM_FMA
#undef LANES
