// Matmuls of the CUDA wing, every way of making them, against their definition, an fp64 reference and the CPU wing.
#include "cuda_test.h"
#include "cuda/cublaslt.cuh"
#include "cuda/matmul.cuh"
#ifndef __CUDACC__
#include "cublaslt_sim.h"
#endif

// N, C, OC: single values, odd sizes, one tile, a tile and a bit, several slices of k and more than the ring holds.
static const int matmul_shapes[][3] = {
    {1, 1, 1}, {1, 16, 64}, {3, 7, 5}, {9, 64, 24}, {16, 24, 1030}, {65, 17, 63}, {130, 33, 16}, {2, 576, 130},
    {70, 104, 200}, {140, 200, 136}};

static const struct { const char *name; int ways; } ways[] = {
    {"all", MATMUL_ALL}, {"library", MATMUL_LIBRARY}, {"tiles", MATMUL_TILES}, {"plain", 0}};

enum Form { FORWARD, FORWARD_F32, BACKWARD_INPUT, BACKWARD_WEIGHT, FORMS };
static const char *const form_names[FORMS] = {"linear_forward", "linear_forward_f32", "linear_backward_input",
                                              "linear_backward_weight"};
// Variants: aligned; with wscale; with wscale and unaligned; a weight gradient accumulates where others have wscale.
enum { VARIANTS = 3 };

struct Operands {
    Form form;
    size_t N;
    int C, OC;
    bool scaled;                        // BACKWARD_WEIGHT: accumulate
    std::vector<floatX> a, b;           // x and w; dy and w; dy and x
    std::vector<float> wscale, before;  // before: dw to add to
    size_t rows, columns;               // of the result
    Operands(Form form_, const int shape[3], bool scaled_)
        : form(form_), N((size_t)shape[0]), C(shape[1]), OC(shape[2]), scaled(scaled_) {
        bool back = form >= BACKWARD_INPUT, weight = form == BACKWARD_WEIGHT;
        a = random_x(N * (size_t)(back ? OC : C), 5, 1.0f);
        b = random_x((weight ? N : (size_t)OC) * (size_t)C, 6, 0.5f);
        for (int o = 0; o < OC; o++) wscale.push_back(0.01f * (1.0f + uniform(8, (uint64_t)o)));
        rows = weight ? (size_t)OC : N;
        columns = (size_t)(back ? C : OC);
        if (weight) for (size_t i = 0; i < rows * columns; i++) before.push_back(uniform(9, i));
    }
    size_t depth() const { return form == BACKWARD_WEIGHT ? N : (size_t)(form == BACKWARD_INPUT ? OC : C); }
    float at_a(size_t m, size_t k) const {
        if (form == BACKWARD_WEIGHT) return x2f(a[k * (size_t)OC + m]);
        float v = x2f(a[m * depth() + k]);
        return form == BACKWARD_INPUT && scaled ? x2f(f2x(v * wscale[k])) : v;
    }
    float at_b(size_t k, size_t n) const {
        return x2f(form >= BACKWARD_INPUT ? b[k * (size_t)C + n] : b[n * depth() + k]);
    }
    bool f32() const { return form == FORWARD_F32 || form == BACKWARD_WEIGHT || sizeof(floatX) == 4; }
};

// Results as f32, whatever their type.
typedef std::vector<float> Values;
template <class T> static Values values(const std::vector<T> &v) {
    Values r;
    for (T e : v) r.push_back(value(e));
    return r;
}

static Values run_cuda(const Operands &o, size_t offset) {
    Device<floatX> a(o.a, offset), b(o.b, offset);
    Device<float> wscale(o.wscale);
    const float *scale = o.scaled ? wscale.p : nullptr;
    size_t n = o.rows * o.columns;
    switch (o.form) {
    case FORWARD: {
        Device<floatX> y(n, offset);
        OP(linear_forward)(y.p, a.p, b.p, scale, o.N, o.C, o.OC);
        return values(y.host());
    }
    case FORWARD_F32: {
        Device<float> y(n, offset);
        OP(linear_forward_f32)(y.p, a.p, b.p, scale, o.N, o.C, o.OC);
        return values(y.host());
    }
    case BACKWARD_INPUT: {
        Device<floatX> dx(n, offset), dy_scaled(o.a.size(), offset);
        OP(linear_backward_input)(dx.p, a.p, b.p, scale, scale ? dy_scaled.p : nullptr, o.N, o.C, o.OC);
        std::vector<floatX> s = dy_scaled.host();
        for (size_t i = 0; scale && i < s.size(); i++) {
            float want = x2f(f2x(x2f(o.a[i]) * o.wscale[i % (size_t)o.OC]));
            CHECK(same(value(s[i]), want), "dy_scaled at %zu: %.9g, expected %.9g", i, (double)value(s[i]),
                  (double)want);
        }
        return values(dx.host());
    }
    default: {
        Device<float> dw(o.before, offset);
        OP(linear_backward_weight)(dw.p, a.p, b.p, o.N, o.C, o.OC, o.scaled);
        return values(dw.host());
    }
    }
}

static Values run_cpu(const Operands &o) {
    std::vector<floatX> x(o.rows * o.columns), scratch(o.a.size());
    std::vector<float> f(o.before);
    f.resize(o.rows * o.columns);
    const float *scale = o.scaled ? o.wscale.data() : nullptr;
    switch (o.form) {
    case FORWARD:
        ops_cpu.linear_forward(x.data(), o.a.data(), o.b.data(), scale, o.N, o.C, o.OC);
        return values(x);
    case FORWARD_F32:
        ops_cpu.linear_forward_f32(f.data(), o.a.data(), o.b.data(), scale, o.N, o.C, o.OC);
        return f;
    case BACKWARD_INPUT:
        ops_cpu.linear_backward_input(x.data(), o.a.data(), o.b.data(), scale, scratch.data(), o.N, o.C, o.OC);
        return values(x);
    default:
        ops_cpu.linear_backward_weight(f.data(), o.a.data(), o.b.data(), o.N, o.C, o.OC, o.scaled);
        return f;
    }
}

// plain: the kernel's definition in matmul.cu, whose bits it must give. exact: fp64, from the operands as they are
// rounded (dy_scaled is checked by itself). What may lie between a result and that:
//   |sum - exact| <= K u S,  u = 2^-24, S = sum |a b|, for any order of K products and additions, fused or not; tensor
//   cores are said to cut rather than round what they add, which counts twice: 2 K u S
//   wscale or what is accumulated onto adds one rounding, u |result|, and scales S; X = bf16 adds one of 2^-8 |result|.
// S |wscale| + |before| bounds |result| but for u: (2 K + 3) u (S |wscale| + |before|), plus 2^-8 of it for bf16.
struct Expected { Values plain, bound; std::vector<double> exact; };
static Expected expected(const Operands &o) {
    Expected e;
    for (size_t m = 0; m < o.rows; m++)
        for (size_t n = 0; n < o.columns; n++) {
            float s = 0.0f;
            double exact = 0.0, size = 0.0;
            for (size_t k = 0; k < o.depth(); k++) {
                float a = o.at_a(m, k), b = o.at_b(k, n);
                s = fmaf(a, b, s);
                exact += (double)a * b;
                size += fabs((double)a * b);
            }
            if (o.scaled && o.form <= FORWARD_F32) {
                s *= o.wscale[n];
                exact *= (double)o.wscale[n];
                size *= fabs((double)o.wscale[n]);
            } else if (o.scaled && o.form == BACKWARD_WEIGHT) {
                float before = o.before[m * o.columns + n];
                s = before + s;
                exact += (double)before;
                size += fabs((double)before);
            }
            e.plain.push_back(o.f32() ? s : x2f(f2x(s)));
            e.exact.push_back(exact);
            double rounding = (2.0 * (double)o.depth() + 3.0) / (1 << 24) + (o.f32() ? 0.0 : 1.0 / 256);
            e.bound.push_back((float)(rounding * size));
        }
    return e;
}

static void check_near(const char *what, const char *where, const Values &got, const Expected &e) {
    size_t bad = 0, first = 0;
    for (size_t i = 0; i < got.size(); i++)
        if (!(fabs((double)got[i] - e.exact[i]) <= (double)e.bound[i]) && bad++ == 0) first = i;
    CHECK(bad == 0, "%s, %s: %zu of %zu beyond the bound, the first at %zu: %.9g, exact %.9g, bound %.3g", where, what,
          bad, got.size(), first, (double)got[first], e.exact[first], (double)e.bound[first]);
}

static void check_form(Form form) {
    for (auto &shape : matmul_shapes)
        for (int variant = 0; variant < VARIANTS; variant++) {
            Operands o(form, shape, variant > 0);
            Expected e = expected(o);
            check_near("CPU wing", form_names[form], run_cpu(o), e);
            for (auto &way : ways) {
                if (way.ways == MATMUL_ALL && shape[0] > CUDA_MATVEC_TOKENS) continue;   // the library's, or tiles
                if (way.ways == MATMUL_LIBRARY && small_run()) continue;
                cuda_matmul_allow(way.ways);
                Values first;
                for (int order = 0; order < ORDERS; order++) {
                    char where[128];
                    snprintf(where, sizeof where, "%s N=%d C=%d OC=%d variant=%d way=%s order=%d", form_names[form],
                             shape[0], shape[1], shape[2], variant, way.name, order);
                    set_order(order);
                    Values y = run_cuda(o, variant == 2 ? 1 : 0);
                    if (!way.ways) check_same("bits of the definition", where, y, e.plain);
                    check_near("fp64 reference", where, y, e);
                    if (order) check_same("the first order", where, y, first);
                    else first = y;
                }
            }
            cuda_matmul_allow(MATMUL_ALL);
        }
}
CUDA_TEST(linear_forward) { check_form(FORWARD); }
CUDA_TEST(linear_forward_f32) { check_form(FORWARD_F32); }
CUDA_TEST(linear_backward_input) { check_form(BACKWARD_INPUT); }
CUDA_TEST(linear_backward_weight) { check_form(BACKWARD_WEIGHT); }

// Bits of a row do not depend on the rows beside it, within a way; the matvec is one more.
CUDA_TEST(linear_rows) {
    const int C = 40, OC = 40;
    for (auto &way : ways) {
        if ((way.ways & MATMUL_LIBRARY) && small_run()) continue;
        for (int form = FORWARD; form <= BACKWARD_INPUT; form++)
            for (int scaled = 0; scaled < 2; scaled++) {
                cuda_matmul_allow(way.ways);
                Values first;
                for (int N : {150, 128, 64, 33, 10, 9}) {
                    const int shape[3] = {N, C, OC};
                    Operands o((Form)form, shape, scaled);
                    Values y = run_cuda(o, 0);
                    if (first.empty()) first = y;
                    char where[96];
                    snprintf(where, sizeof where, "%s way=%s N=%d scaled=%d", form_names[form], way.name, N, scaled);
                    check_same("rows of 150", where, y, Values(first.begin(), first.begin() + (ptrdiff_t)y.size()));
                }
            }
    }
    cuda_matmul_allow(MATMUL_ALL);
}

// No tokens: nothing happens, but that a gradient which is not accumulated is zero.
CUDA_TEST(linear_no_tokens) {
    Device<floatX> x(8);
    Device<float> dw(std::vector<float>(64, 3.0f));
    ops_cuda.linear_forward(x.p, x.p, x.p, nullptr, 0, 8, 8);
    ops_cuda.linear_forward_f32(dw.p, x.p, x.p, nullptr, 0, 8, 8);
    ops_cuda.linear_backward_input(x.p, x.p, x.p, nullptr, nullptr, 0, 8, 8);
    ops_cuda.linear_backward_weight(dw.p, x.p, x.p, 0, 8, 8, true);
    check_same("accumulated", "no tokens", dw.host(), std::vector<float>(64, 3.0f));
    ops_cuda.linear_backward_weight(dw.p, x.p, x.p, 0, 8, 8, false);
    check_same("not accumulated", "no tokens", dw.host(), std::vector<float>(64, 0.0f));
}
