// attention_forward and attention_cached of the CUDA wing: against sums in double with a derived bound, against the CPU
// wing, and the equalities that it promises.
#include "cuda_test.h"

#ifdef PRECISION_FP32
#define UX 0x1p-24
#else
#define UX 0x1p-8
#endif

// offset: values by which each tensor is out of line; skew: what is added to the row strides.
struct ForwardShape { int B, T, Tk, NH, NKV, HS; size_t offset; int skew; };

struct ForwardCase {
    ForwardShape s;
    int ldq, ldkv, ldo;
    size_t skv;
    std::vector<floatX> q, kv, o;       // keys, then values in each row of kv, three rows of a batch unused
    std::vector<float> lse;
    char where[128];
};

// Queries and keys of size `scale`, so that scores reach about scale^2 sqrt(HS).
static ForwardCase make_attention(ForwardShape s, float scale) {
    ForwardCase a;
    a.s = s;
    a.ldq = s.NH * s.HS + s.skew;
    a.ldkv = 2 * s.NKV * s.HS + s.skew;
    a.ldo = s.NH * s.HS + s.skew;
    a.skv = (size_t)(s.Tk + 3) * (size_t)a.ldkv;
    size_t rows = (size_t)(s.B * s.T);
    a.q = random_x(rows * (size_t)a.ldq, 11, scale);
    a.kv = random_x((size_t)s.B * a.skv, 12, scale);
    a.o.resize(rows * (size_t)a.ldo);
    a.lse.resize(rows * (size_t)s.NH);
    snprintf(a.where, sizeof a.where, "B=%d T=%d Tk=%d NH=%d NKV=%d HS=%d offset=%zu skew=%d", s.B, s.T, s.Tk, s.NH,
             s.NKV, s.HS, s.offset, s.skew);
    return a;
}

static void run_attention(ForwardCase *a) {
    const ForwardShape &s = a->s;
    Device<floatX> o(a->o.size(), s.offset), q(a->q, s.offset), kv(a->kv, s.offset);
    Device<float> lse(a->lse.size());
    OP(attention_forward)(o.p, lse.p, q.p, kv.p, kv.p + s.NKV * s.HS, s.B, s.T, s.Tk, s.NH, s.NKV, s.HS, a->ldo, a->ldq,
                          a->ldkv, a->skv);
    a->o = o.host();
    a->lse = lse.host();
}

// o = sum p v and the log-sum-exp in double, with bounds. The relative error e of a weight before it is rounded: a
// score's HS products and sums and its scale (whose factor itself is off by three roundings) against magnitudes `mag`;
// the difference to the largest, in numbers up to that; the exponential, 2^-22.5, once and once more for each of the
// tiles whose sums it decays. A tensor core truncates where an FMA rounds: hence 2^-23. e counts twice in o (numerator
// and sum); a weight's rounding to X once, n sums in f32 and the division, the rounding of o to X.
static void check_attention(const ForwardCase &a, const ForwardCase &cpu) {
    const ForwardShape &s = a.s;
    std::vector<double> p((size_t)s.Tk);
    double scale = 1 / sqrt((double)s.HS), worst = 0, worst_lse = 0, worst_cpu = 0;
    for (int b = 0; b < s.B; b++)
        for (int t = 0; t < s.T; t++)
            for (int h = 0; h < s.NH; h++) {
                size_t row = (size_t)(b * s.T + t), at = (size_t)b * a.skv + (size_t)(h / (s.NH / s.NKV) * s.HS);
                const floatX *q = &a.q[row * (size_t)a.ldq + (size_t)(h * s.HS)], *k = &a.kv[at];
                const floatX *v = k + s.NKV * s.HS;
                int n = s.Tk - s.T + t + 1;
                double top = -INFINITY, sum = 0, mag_max = 0;
                for (int j = 0; j < n; j++) {
                    double dot = 0, mag = 0;
                    for (int i = 0; i < s.HS; i++) {
                        double x = (double)x2f(q[i]) * x2f(k[(size_t)j * (size_t)a.ldkv + (size_t)i]);
                        dot += x;
                        mag += fabs(x);
                    }
                    p[(size_t)j] = dot * scale;
                    top = fmax(top, dot * scale);
                    mag_max = fmax(mag_max, mag * scale);
                }
                for (int j = 0; j < n; j++) sum += p[(size_t)j] = exp(p[(size_t)j] - top);
                double e = (2 * s.HS + 12) * mag_max * 0x1p-23 + (2 + n / 16) * 0x1p-22;
                double lse = top + log(sum), lse_bound = e + n * 0x1p-23 + 6 * 0x1p-24 * fabs(lse);
                size_t i_lse = (size_t)(b * s.NH + h) * (size_t)s.T + (size_t)t;
                worst_lse = fmax(worst_lse, fabs(a.lse[i_lse] - lse) / lse_bound);
                for (int i = 0; i < s.HS; i++) {
                    double want = 0, mag = 0;
                    for (int j = 0; j < n; j++) {
                        double x = p[(size_t)j] / sum * x2f(v[(size_t)j * (size_t)a.ldkv + (size_t)i]);
                        want += x;
                        mag += fabs(x);
                    }
                    size_t i_o = row * (size_t)a.ldo + (size_t)(h * s.HS + i);
                    double bound = (2 * e + UX + (n + 4) * 0x1p-22) * mag + UX * fabs(want);
                    double off = fabs(x2f(a.o[i_o]) - want) / bound;
                    double off_cpu = fabs(x2f(a.o[i_o]) - x2f(cpu.o[i_o])) / bound;
                    if (!(off <= worst)) worst = off;
                    if (!(off_cpu <= worst_cpu)) worst_cpu = off_cpu;
                }
            }
    CHECK(worst <= 1, "%s: o is off by %.3g of its bound", a.where, worst);
    CHECK(worst_lse <= 1, "%s: lse is off by %.3g of its bound", a.where, worst_lse);
    CHECK(worst_cpu <= 2, "%s: o differs from the CPU wing's by %.3g bounds", a.where, worst_cpu);
}

static void test_shape(ForwardShape s, int orders) {
    ForwardCase a = make_attention(s, 1.5f), cpu = a;
    const floatX *k = cpu.kv.data(), *v = k + s.NKV * s.HS;
    ops_cpu.attention_forward(cpu.o.data(), cpu.lse.data(), cpu.q.data(), k, v, s.B, s.T, s.Tk, s.NH, s.NKV, s.HS,
                              a.ldo, a.ldq, a.ldkv, a.skv);
    set_order(0);
    run_attention(&a);
    check_attention(a, cpu);
    for (int order = 1; order < orders; order++) {
        ForwardCase again = a;
        set_order(order);
        run_attention(&again);
        check_same("o", a.where, again.o, a.o);
        check_same("lse", a.where, again.lse, a.lse);
    }
}

// Every head size that tensor cores take, at lengths around the tiles of 64 keys and 64 or 128 queries, with one query
// head a key head and with several.
CUDA_TEST(attention_forward) {
    static const ForwardShape shapes[] = {
        {1, 1, 1, 2, 2, 16, 0, 0}, {1, 5, 5, 8, 1, 16, 0, 8}, {2, 64, 64, 2, 1, 16, 0, 0},
        {1, 65, 65, 3, 1, 32, 0, 0}, {1, 130, 130, 2, 2, 48, 0, 8}, {1, 200, 200, 4, 1, 64, 0, 0},
        {2, 65, 65, 2, 1, 80, 0, 0}, {1, 130, 130, 1, 1, 96, 0, 0}, {1, 64, 64, 2, 1, 112, 0, 0},
        {1, 130, 130, 3, 1, 128, 0, 0}};
    for (const ForwardShape &s : shapes)
        test_shape(s, s.HS <= 64 ? ORDERS : 2);
}

// Tiles of 128 queries, which few blocks would not fill a GPU with.
CUDA_TEST(attention_forward_many) {
    static const ForwardShape shapes[] = {
        {2, 130, 130, 2, 1, 16, 0, 0}, {1, 200, 200, 4, 2, 32, 0, 0}, {1, 17, 50, 8, 8, 48, 0, 0},
        {1, 130, 130, 4, 1, 64, 0, 0}, {1, 17, 80, 8, 2, 80, 0, 0}, {1, 17, 17, 8, 2, 96, 0, 0},
        {1, 17, 17, 8, 2, 112, 0, 0}, {1, 17, 66, 8, 2, 128, 0, 0}};
    for (const ForwardShape &s : shapes)
        test_shape(s, s.HS <= 64 ? 3 : 1);
}

// Queries behind a cache.
CUDA_TEST(attention_forward_cached) {
    static const ForwardShape shapes[] = {
        {1, 1, 5, 2, 1, 16, 0, 0}, {2, 1, 64, 9, 3, 64, 0, 8}, {1, 1, 65, 4, 4, 128, 0, 0},
        {2, 7, 100, 3, 1, 64, 0, 0}, {1, 70, 199, 4, 2, 80, 0, 0}, {1, 1, 300, 3, 1, 96, 0, 0},
        {1, 2, 600, 8, 1, 32, 0, 0}, {3, 5, 257, 2, 2, 48, 0, 0}, {1, 4, 513, 4, 1, 112, 0, 0},
        {2, 1, 1030, 16, 1, 16, 0, 0}};
    for (const ForwardShape &s : shapes)
        test_shape(s, ORDERS);
}

// Sizes and alignments without tensor cores.
CUDA_TEST(attention_forward_plain) {
    static const ForwardShape shapes[] = {
        {1, 1, 1, 1, 1, 2, 0, 0}, {2, 3, 3, 2, 1, 4, 0, 1}, {1, 17, 17, 3, 3, 6, 3, 0},
        {2, 65, 65, 4, 2, 8, 0, 0}, {1, 33, 40, 5, 5, 34, 0, 0}, {1, 40, 40, 2, 1, 64, 1, 0},
        {1, 9, 70, 8, 1, 128, 0, 3}, {1, 21, 21, 80, 1, 16, 4, 0}, {1, 6, 40, 2, 1, 200, 0, 0},
        {1, 3, 20, 2, 1, 600, 0, 0}};
    for (const ForwardShape &s : shapes)
        test_shape(s, ORDERS);
}

// A row's bits: the same at any T and B, behind a cache or not, in tiles of 64 or of 128 queries.
CUDA_TEST(attention_forward_bits) {
    ForwardShape s = {2, 130, 130, 4, 2, 32, 0, 0};
    ForwardCase whole = make_attention(s, 1.5f);
    set_order(0);
    run_attention(&whole);
    size_t skip = 70;                                           // rows behind a cache of 70, of the second batch alone
    ForwardCase part = whole;
    part.s.B = 1;
    part.s.T = 60;
    part.q.assign(whole.q.begin() + (long)(s.T + (int)skip) * whole.ldq, whole.q.end());
    part.kv.assign(whole.kv.begin() + (long)whole.skv, whole.kv.end());
    part.o.resize(60 * (size_t)whole.ldo);
    part.lse.resize(60 * 4);
    run_attention(&part);
    check_same("o behind a cache", whole.where, part.o,
               std::vector<floatX>(whole.o.begin() + (long)(s.T + (int)skip) * whole.ldo, whole.o.end()));
    ForwardCase first = whole;                                    // the first 20 rows of the first batch alone
    first.s.B = 1;
    first.s.T = first.s.Tk = 20;
    first.o.resize(20 * (size_t)whole.ldo);
    first.lse.resize(20 * 4);
    run_attention(&first);
    check_same("o of a shorter text", whole.where, first.o,
               std::vector<floatX>(whole.o.begin(), whole.o.begin() + 20 * (long)whole.ldo));
}

// Weights of exactly one and zero, differences beyond what an exponential represents: a key in the second tile whose
// score is 8192 over -8192.
CUDA_TEST(attention_forward_extreme) {
    for (int HS : {4, 16}) {
        ForwardShape s = {1, 70, 70, 1, 1, HS, 0, 0};
        ForwardCase a = make_attention(s, 1.0f);
        float x = HS == 4 ? 64.0f : 45.25f;
        for (int t = 0; t < s.T; t++)
            for (int i = 0; i < HS; i++) {
                a.q[(size_t)(t * a.ldq + i)] = f2x(x);
                a.kv[(size_t)(t * a.ldkv + i)] = f2x(t == 66 ? x : -x);
                a.kv[(size_t)(t * a.ldkv + HS + i)] = f2x((float)t);
            }
        run_attention(&a);
        for (int t = 0; t < s.T; t++) {
            double want = t < 66 ? t / 2.0 : 66, got = x2f(a.o[(size_t)(t * a.ldo)]);
            CHECK(fabs(got - want) <= (t < 66 ? want * (UX + 0x1p-16) : 0), "HS %d, row %d: %g", HS, t, got);
        }
        float lse = a.lse[69];
        CHECK(fabs(lse - x * x * sqrt(HS)) < 0.01, "HS %d: lse %.9g", HS, (double)lse);
    }
}

// A NaN in a key reaches the rows that see it, whole, and no other.
CUDA_TEST(attention_forward_nan) {
    static const ForwardShape shapes[] = {
        {1, 80, 80, 1, 1, 16, 0, 0}, {1, 2, 140, 4, 1, 16, 0, 0}, {1, 40, 40, 1, 1, 6, 0, 0}};
    for (const ForwardShape &s : shapes) {
        ForwardCase a = make_attention(s, 1.0f);
        int bad = s.Tk - s.T + s.T / 2 + s.T / 4;
        a.kv[(size_t)(bad * a.ldkv)] = f2x(f32_from_bits(0x7fffffffu));
        run_attention(&a);
        for (int t = 0; t < s.T; t++)
            for (int h = 0; h < s.NH; h++)
                for (int i = 0; i < s.HS; i++) {
                    float x = x2f(a.o[(size_t)(t * a.ldo + h * s.HS + i)]);
                    CHECK((x != x) == (s.Tk - s.T + t >= bad), "%s: row %d head %d: %g", a.where, t, h, (double)x);
                }
    }
}

// The cache's form: queries in rows with their own keys and values, which are not read again; positions in device
// memory; max_T longer than what is there. INT8 caches hold what kv has then.
static void test_cached(ForwardShape s, bool int8, int pos_more) {
    ForwardCase a = make_attention(s, 1.5f);
    const int max_T = s.Tk + pos_more, heads = 2 * s.NKV;
    a.ldq = (s.NH + heads) * s.HS;
    a.ldkv = heads * s.HS;
    a.skv = (size_t)max_T * (size_t)a.ldkv;
    a.q = random_x((size_t)(s.B * s.T) * (size_t)a.ldq, 11, 1.5f);
    a.kv = random_x((size_t)s.B * a.skv, 12, 1.5f);
    std::vector<int8_t> codes(a.kv.size());
    std::vector<float> scale(a.kv.size() / (size_t)s.HS);
    for (size_t v = 0; int8 && v < scale.size(); v++) {
        floatX *row = &a.kv[v * (size_t)s.HS];
        float most = 0.0f;
        for (int i = 0; i < s.HS; i++) most = fmaxf(most, fabsf(x2f(row[i])));
        scale[v] = int8_row_scale(most);
        for (int i = 0; i < s.HS; i++) {
            codes[v * (size_t)s.HS + (size_t)i] = int8_nearest(x2f(row[i]), int8_row_inv(scale[v]));
            row[i] = f2x((float)codes[v * (size_t)s.HS + (size_t)i] * scale[v]);
        }
    }
    ForwardCase cpu = a;
    ops_cpu.attention_forward(cpu.o.data(), cpu.lse.data(), cpu.q.data(), cpu.kv.data(), cpu.kv.data() + s.NKV * s.HS,
                              s.B, s.T, s.Tk, s.NH, s.NKV, s.HS, s.NH * s.HS, a.ldq, a.ldkv, a.skv);
    a.lse = cpu.lse;
    std::vector<floatX> first;
    snprintf(a.where, sizeof a.where, "B=%d T=%d Tk=%d NH=%d NKV=%d HS=%d max_T=%d %s", s.B, s.T, s.Tk, s.NH, s.NKV,
             s.HS, max_T, int8 ? "int8" : "X");
    for (int order = 0; order < (s.HS <= 64 ? ORDERS : 2); order++) {
        set_order(order);
        Device<floatX> o(a.o.size()), q(a.q), kv(a.kv);
        Device<int8_t> q8(codes);
        Device<float> dscale(scale);
        Device<int32_t> pos(std::vector<int32_t>{s.Tk - s.T});
        KvCache cache = {int8 ? (void *)q8.p : (void *)kv.p, int8 ? dscale.p : nullptr, int8 ? KV_INT8 : KV_X, max_T,
                         s.NKV, s.HS};
        OP(attention_cached)(o.p, q.p, &cache, pos.p, s.B, s.T, s.NH);
        a.o = o.host();
        if (order == 0) {
            check_attention(a, cpu);
            first = a.o;
        }
        check_same("o", a.where, a.o, first);
    }
}

CUDA_TEST(attention_cached) {
    static const ForwardShape shapes[] = {
        {1, 1, 1, 2, 1, 16, 0, 0},  {1, 1, 5, 2, 1, 6, 0, 0},   {2, 1, 64, 9, 3, 64, 0, 0}, {1, 1, 129, 4, 4, 128, 0,
                                                                                             0},
        {2, 7, 100, 3, 1, 64, 0, 0}, {1, 70, 150, 4, 2, 80, 0, 0}, {1, 1, 300, 3, 1, 96, 0, 0}, {1, 3, 260, 8, 2, 48,
                                                                                                 0, 0},
        {1, 20, 20, 2, 2, 32, 0, 0}};
    for (const ForwardShape &s : shapes)
        for (int int8 = 0; int8 < 2; int8++) test_cached(s, int8 == 1, s.T % 2 ? 200 : 0);
    // More pieces than blocks take at a time.
    test_cached({9, 1, 400, 16, 16, 16, 0, 0}, false, 400);
    test_cached({5, 1, 400, 16, 16, 16, 0, 0}, true, 1200);
}
