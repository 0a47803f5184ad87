// What decoding does around its matmuls: attention over the cache, what goes into the cache, the next token, and logits
// compared; each against its definition in f64 or value by value.
#include "ops_common.h"
#include "sampler.h"

typedef struct { int NH, NKV, HS, pos, T, B; } Case;

// A cache whose first n positions hold random vectors, written by rope_append at angle 0.
static KvCache new_cache(const Case *c, KvFormat format, int max_T) {
    size_t n = (size_t)c->B * (size_t)max_T * 2 * (size_t)c->NKV;
    KvCache k = {.format = format, .max_T = max_T, .NKV = c->NKV, .HS = c->HS};
    k.values = must_alloc(n * (size_t)c->HS * (format == KV_INT8 ? 1 : sizeof(floatX)));
    if (format == KV_INT8) k.scale = must_alloc(n * sizeof(float));
    return k;
}
static void free_cache(KvCache *k) { free(k->values), free(k->scale); }

static float *angles(int n, int half, float value) {
    float *t = must_alloc((size_t)(n * half) * sizeof *t);
    for (int i = 0; i < n * half; i++) t[i] = value;
    return t;
}

// Position p, head h (keys, then values) of sequence b.
static double cached(const KvCache *k, int b, int p, int h, int i) {
    size_t vec = ((size_t)b * (size_t)k->max_T + (size_t)p) * 2 * (size_t)k->NKV + (size_t)h;
    size_t at = vec * (size_t)k->HS + (size_t)i;
    if (k->format == KV_X) return (double)x2f(((const floatX *)k->values)[at]);
    return (double)x2f(f2x((float)((const int8_t *)k->values)[at] * k->scale[vec]));
}

// Few rows: q is scaled and rounded (U32), a score is a chain of HS/16 fused products and 4 additions in each lane; the
// exponential is exact to 2 U32 beside what its argument brings (its own rounding: U32 * |s - m|); weights and values
// are summed over up to 256 keys and 2 pieces, as is the weights' own sum. A relative change d of each weight moves the
// result by 2 d sum p |v|. Many rows in bf16 round the weights to bf16 too.
static void check_attention(const Case *c, const KvCache *k, const floatX *qkv, const floatX *o) {
    int G = c->NH / c->NKV, HS = c->HS, Tk = c->pos + c->T;
    double *s = must_alloc((size_t)Tk * sizeof *s), scale = 1 / sqrt((double)HS);
    bool few = c->T * G <= 16 || c->T == 1;
    for (int b = 0; b < c->B; b++)
        for (int t = 0; t < c->T; t++)
            for (int h = 0; h < c->NH; h++) {
                size_t n = (size_t)(b * c->T + t);
                const floatX *q = qkv + n * (size_t)((c->NH + 2 * c->NKV) * HS) + (size_t)(h * HS);
                int last = c->pos + t, kh = h / G;
                double top = -INFINITY, low = INFINITY, most = 0, sum = 0;
                for (int p = 0; p <= last; p++) {
                    double dot = 0, size = 0;
                    for (int i = 0; i < HS; i++) {
                        double x = (double)x2f(q[i]) * cached(k, b, p, kh, i);
                        dot += x, size += fabs(x);
                    }
                    s[p] = dot * scale;
                    top = fmax(top, s[p]), low = fmin(low, s[p]), most = fmax(most, size * scale);
                }
                for (int p = 0; p <= last; p++) sum += s[p] = exp(s[p] - top);
                double d = U32 * ((HS / 16.0 + 8) * most + (top - low) + 4 + 300 + (few ? 0 : Tk / 64.0));
                if (!few) d += 2 * UX;
                for (int i = 0; i < HS; i++) {
                    double want = 0, size = 0;
                    for (int p = 0; p <= last; p++) {
                        double v = cached(k, b, p, c->NKV + kh, i);
                        want += s[p] / sum * v, size += s[p] / sum * fabs(v);
                    }
                    size_t at = (n * (size_t)c->NH + (size_t)h) * (size_t)HS + (size_t)i;
                    expect_near((double)x2f(o[at]), want, 2 * d * size + UX * fabs(want), "attention_cached", at);
                }
            }
    free(s);
}

static void attention_is_its_definition(void **state) {
    (void)state;
    static const Case cases[] = {{1, 1, 16, 0, 1, 1}, {4, 2, 16, 7, 1, 2}, {9, 3, 64, 130, 1, 1}, {3, 3, 24, 255, 1, 1},
                                 {8, 1, 80, 256, 2, 1}, {16, 2, 128, 300, 1, 1}, {32, 1, 16, 40, 1, 2},
                                 {2, 2, 18, 600, 5, 1}, {6, 2, 64, 253, 5, 2}, {4, 2, 80, 100, 20, 2},
                                 {9, 3, 64, 0, 33, 1}, {2, 1, 2, 20, 3, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int format = KV_X; format <= KV_INT8; format++) {
            const Case *c = &cases[i];
            int Tk = c->pos + c->T, heads = c->NH + 2 * c->NKV, max_T = Tk + 3;
            KvCache k = new_cache(c, (KvFormat)format, max_T);
            float *cs = angles(max_T, c->HS / 2, 1.0f), *sn = angles(max_T, c->HS / 2, 0.0f);
            int32_t pos = 0;
            floatX *past = new_x((size_t)c->B * (size_t)(c->pos + 1) * (size_t)(heads * c->HS), 2.0f);
            if (c->pos) cpu_rope_append(past, &k, cs, sn, &pos, c->B, c->pos, c->NH);
            pos = c->pos;
            size_t out = (size_t)c->B * (size_t)c->T * (size_t)(c->NH * c->HS);
            floatX *qkv = new_x((size_t)c->B * (size_t)c->T * (size_t)(heads * c->HS), 2.0f);
            floatX *o = must_alloc(out * sizeof *o), *again = must_alloc(out * sizeof *o);
            cpu_rope_append(qkv, &k, cs, sn, &pos, c->B, c->T, c->NH);
            for (int threads = 1; threads <= 3; threads++) {
                set_threads(threads);
                cpu_attention_cached(threads == 1 ? o : again, qkv, &k, &pos, c->B, c->T, c->NH);
                if (threads > 1) expect_same(again, o, out * sizeof *o, "attention, threads", c->pos, c->HS);
            }
            check_attention(c, &k, qkv, o);
            free(past), free(qkv), free(o), free(again), free(cs), free(sn);
            free_cache(&k);
        }
    set_threads(2);
}

// In the form for few, tokens together are tokens one after the other.
static void few_tokens_are_single_ones(void **state) {
    (void)state;
    enum { NH = 4, NKV = 2, HS = 48, HEADS = NH + 2 * NKV, T = 6, POS = 252, MAX_T = 260 };
    const Case c = {NH, NKV, HS, POS, T, 1};
    for (int format = KV_X; format <= KV_INT8; format++) {
        KvCache k = new_cache(&c, (KvFormat)format, MAX_T);
        float *cs = angles(MAX_T, HS / 2, 0.8f), *sn = angles(MAX_T, HS / 2, 0.6f);
        int32_t pos = 0;
        floatX *qkv = new_x((POS + T) * HEADS * HS, 2.0f), o[T * NH * HS], one[NH * HS];
        cpu_rope_append(qkv, &k, cs, sn, &pos, 1, POS + T, NH);
        pos = POS;
        const floatX *from = qkv + POS * HEADS * HS;
        cpu_attention_cached(o, from, &k, &pos, 1, T, NH);
        for (int t = 0; t < T; t++, pos++) {
            cpu_attention_cached(one, from + t * HEADS * HS, &k, &pos, 1, 1, NH);
            expect_same(one, o + t * NH * HS, sizeof one, "token by token", t, HS);
        }
        free(qkv), free(cs), free(sn);
        free_cache(&k);
    }
}

static void the_cache_holds_what_rope_gives(void **state) {
    (void)state;
    enum { NH = 3, NKV = 3, HEADS = NH + 2 * NKV, T = 11, B = 2, POS = 5, MAX_T = 20 };
    static const int sizes[] = {2, 16, 18, 40, 64};
    for (int j = 0; j < 5; j++)
        for (int format = KV_X; format <= KV_INT8; format++) {
            int HS = sizes[j];
            const Case c = {NH, NKV, HS, POS, T, B};
            KvCache k = new_cache(&c, (KvFormat)format, MAX_T);
            size_t n = (size_t)(B * T * HEADS * HS);
            floatX *qkv = new_x(n, 3.0f), *want;
            float *cs = new_f32((size_t)(MAX_T * HS / 2), 1.0f), *sn = new_f32((size_t)(MAX_T * HS / 2), 1.0f);
            for (int i = 0; i < HS; i++) qkv[(size_t)((NH + NKV + 1) * HS + i)] = f2x(0.0f);      // zeros in the cache
            want = copy_of(qkv, n * sizeof *qkv);
            int32_t pos = POS;
            cpu_rope(want, cs, sn, B * T, T, POS, HEADS * HS, NH + NKV, HS, false);
            cpu_rope_append(qkv, &k, cs, sn, &pos, B, T, NH);
            expect_same(qkv, want, n * sizeof *qkv, "rope_append's rope", T, HS);
            for (int b = 0; b < B; b++)
                for (int t = 0; t < T; t++)
                    for (int h = 0; h < 2 * NKV; h++) {
                        const floatX *x = want + (size_t)(((b * T + t) * HEADS + NH + h) * HS);
                        size_t vec = (size_t)((b * MAX_T + POS + t) * 2 * NKV + h);
                        if (format == KV_X) {
                            expect_same((floatX *)k.values + vec * (size_t)HS, x, (size_t)HS * sizeof *x, "cache", t,
                                        h);
                            continue;
                        }
                        float amax = 0.0f;
                        for (int i = 0; i < HS; i++) amax = fmaxf(amax, fabsf(x2f(x[i])));
                        expect_same_f32(k.scale[vec], int8_row_scale(amax), "scale", vec);
                        for (int i = 0; i < HS; i++)
                            assert_int_equal(((int8_t *)k.values)[vec * (size_t)HS + (size_t)i],
                                             int8_nearest(x2f(x[i]), int8_row_inv(int8_row_scale(amax))));
                    }
            free(qkv), free(want), free(cs), free(sn);
            free_cache(&k);
        }
}

static void the_next_token_is_the_samplers(void **state) {
    (void)state;
    static const int sizes[] = {1, 2, 15, 63, 64, 65, 1023, 1024, 1025, 4099, 49152};
    for (size_t j = 0; j < sizeof sizes / sizeof *sizes; j++) {
        int V = sizes[j];
        float *x = new_f32((size_t)V, 4.0f);
        for (int i = 0; i < V; i += 7) x[i] = floorf(x[i]);             // equals
        for (int trial = 0; trial < 6; trial++) {
            float *a = copy_of(x, (size_t)V * sizeof *x), *b;
            if (trial == 1) a[V / 2] = NAN;
            if (trial == 2) a[V - 1] = a[V / 3] = 9.0f;
            if (trial == 3) for (int i = 0; i < V; i++) a[i] = -INFINITY;
            if (trial == 4) for (int i = 0; i < V; i++) a[i] = NAN;
            if (trial == 5) a[V / 2] = INFINITY;
            assert_int_equal(cpu_argmax(a, V), argmax_token(a, V));
            for (int k = 0; k < 40; k++) {
                static const int top[] = {0, 1, 5, 50, 300, 3000};
                Sampler s = {.temperature = k ? 0.05f + 0.2f * (float)(k % 7) : 0.0f, .top_k = top[k % 6],
                             .top_p = k % 4 == 3 ? 0.8f : 1.0f, .seed = 3 + (uint64_t)k};
                DecodeState st = {.pos = 11, .token = 1, .draw = 5};
                float *c = copy_of(a, (size_t)V * sizeof *a);
                b = copy_of(a, (size_t)V * sizeof *a);
                cpu_sample_next(&st, b, &s, V);
                assert_int_equal(st.token, sample_token(&s, c, V, 5));
                assert_int_equal(st.pos, 12);
                assert_int_equal(st.draw, 6);
                free(b), free(c);
            }
            free(a);
        }
        free(x);
    }
}

// With a' and b' counted from the rows' largest: an exponential is off by 2 U32 and U32 times its argument's size,
// which its own weight keeps below U32 (x e^-x < 1); sums of a run add 64 U32 and 5. So log Z is off by 72 U32, and each
// term of sum p (b' - a') by as much of its size and by the rounding of b', a' and their difference.
static void compared_logits(void **state) {
    (void)state;
    static const int sizes[] = {1, 3, 16, 132, 1024, 1500, 49152};
    for (size_t j = 0; j < sizeof sizes / sizeof *sizes; j++) {
        enum { N = 5 };
        int V = sizes[j], same[N];
        float *a = new_f32((size_t)(N * V), 8.0f), *b = copy_of(a, (size_t)(N * V) * sizeof *a), kl[N], again[N];
        static const float apart[N] = {0.0f, 1e-3f, 0.1f, 3.0f, 40.0f};
        for (int i = 0; i < N * V; i++)
            b[i] += apart[i / V] * (2 * philox_uniform(philox(4, 4, (uint64_t)i).v[0]) - 1);
        set_threads(1);
        cpu_compare_logits(kl, same, a, b, N, V);
        for (int r = 0; r < N; r++) {
            const float *x = a + r * V, *y = b + r * V;
            int ta = argmax_token(x, V), tb = argmax_token(y, V);
            assert_int_equal(same[r], ta == tb);
            double za = 0, zb = 0, want = 0, size = 0;
            for (int v = 0; v < V; v++) {
                za += exp((double)x[v] - (double)x[ta]);
                zb += exp((double)y[v] - (double)y[tb]);
            }
            for (int v = 0; v < V; v++) {
                double db = (double)y[v] - (double)y[tb], da = (double)x[v] - (double)x[ta], p = exp(db) / zb;
                want += p * (db - da), size += p * (72 * fabs(db - da) + fabs(db) + fabs(da));
            }
            want += log(za) - log(zb);
            expect_near((double)kl[r], want, U32 * (2 * size + 144 + fabs(want)), "divergence", (size_t)r);
            assert_true(kl[r] >= 0.0f);
        }
        set_threads(2);
        cpu_compare_logits(again, same, a, b, N, V);
        expect_same(again, kl, sizeof kl, "divergence, threads", N, V);
        free(a), free(b);
    }
    float a[3] = {1, -INFINITY, 2}, b[3] = {1, 0, -INFINITY}, none[3] = {-INFINITY, NAN, -INFINITY}, kl;
    int32_t same;
    cpu_compare_logits(&kl, &same, a, b, 1, 3);          // what the reference may say, the model never does
    assert_true(isinf(kl) && same == 0);
    cpu_compare_logits(&kl, &same, b, b, 1, 3);
    assert_true(kl == 0.0f && same == 1);
    cpu_compare_logits(&kl, &same, none, b, 1, 3);
    assert_true(isnan(kl) && same == 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(attention_is_its_definition),
    cmocka_unit_test(few_tokens_are_single_ones),
    cmocka_unit_test(the_cache_holds_what_rope_gives),
    cmocka_unit_test(the_next_token_is_the_samplers),
    cmocka_unit_test(compared_logits),
};
TEST_MAIN(tests)
