// Linears with INT8 weights. Integer products are compared bit for bit, by every way of making them, with the scalar
// arithmetic of optimizer.h and with the CPU wing; the weight-only ones with linear_forward for the codes as X.
#include "cuda_test.h"
#include "cuda/cublaslt.cuh"
#include "cuda/matmul.cuh"
#include "optimizer.h"
#ifndef __CUDACC__
#include "cublaslt_sim.h"
#endif

// N, C, OC: single values, odd sizes, multiples of 16 that the library takes, a tile and a bit.
static const int int8_shapes[][3] = {
    {1, 1, 1}, {1, 16, 64}, {3, 7, 5}, {9, 64, 24}, {16, 24, 130}, {65, 17, 63}, {33, 48, 80}, {2, 576, 130},
    {70, 104, 200}, {140, 208, 144}};

enum Form { FORWARD, FORWARD_F32, BACKWARD_INPUT, BACKWARD_WEIGHT, FORMS };
static const char *const form_names[FORMS] = {"linear_i8_forward", "linear_i8_forward_f32", "linear_i8_backward_input",
                                              "linear_i8_backward_weight"};
typedef std::vector<float> Values;
template <class T> static Values values(const std::vector<T> &v) {
    Values r;
    for (T e : v) r.push_back(value(e));
    return r;
}

// What a case is made of. positive: values of one sign, whose sums outgrow the 24 bits of f32, so that where they are
// cut and rounded shows. strange: among the rows and columns one of zeros, of one value, of tiny ones, with NaN, with
// an infinity.
struct Operands {
    size_t N;
    int C, OC;
    std::vector<floatX> x, dy;
    std::vector<int8_t> codes;
    Values wscale, before;
    Operands(const int shape[3], bool positive, bool strange)
        : N((size_t)shape[0]), C(shape[1]), OC(shape[2]), x(random_x(N * (size_t)C, 5, 1.0f)),
          dy(random_x(N * (size_t)OC, 6, 0.01f)) {
        for (size_t i = 0; i < (size_t)OC * (size_t)C; i++) codes.push_back((int8_t)(int)(128.0f * uniform(7, i)));
        for (int o = 0; o < OC; o++) wscale.push_back(0.01f * (1.0f + uniform(8, (uint64_t)o)));
        for (size_t i = 0; i < codes.size(); i++) before.push_back(uniform(9, i));
        if (positive) {
            for (auto &v : x) v = f2x(1.0f - 0.25f * fabsf(x2f(v)));
            for (auto &v : dy) v = f2x(0.01f - 0.25f * fabsf(x2f(v)));
            for (auto &v : codes) v = (int8_t)(127 - (v & 31));
        }
        if (strange) {
            spoil(x, C);
            spoil(dy, OC);
            codes[0] = -128;
            wscale[9] = nan();
        }
    }
    static float nan() { return f32_from_bits(0x7fc00055u); }  // bits that a GPU's own NaN has too, and x86's has not
    void spoil(std::vector<floatX> &v, int width) {
        const float inf = f32_from_bits(0x7f800000u);
        for (size_t n = 0; n < N; n++)
            for (int c = 0; c < width; c++) {
                floatX &e = v[n * (size_t)width + (size_t)c];
                if (n == 1 || c == 5) e = f2x(0.0f);
                else if (n == 2 || c == 6) e = f2x(-0.75f);
                else if (n == 3 || c == 7) e = f2x(x2f(e) * 1e-14f);           // the scale's floor
                else if (n == 4 || c == 8) e = f2x(x2f(e) * 1e-40f);           // subnormal
                if ((n == 9 && c == 3) || (n == 11 && c == 4) || (n == 4 && c == 9)) e = f2x(nan());
                if ((n == 10 && c == 12) || (n == 8 && c == 15)) e = f2x(n == 8 ? -inf : inf);
            }
    }
};

// codes and scale of `count` values, i at v[i * step], times by[i] where given.
static float quantize(std::vector<int> *q, const floatX *v, size_t step, size_t count, const float *by) {
    float amax = 0.0f;
    std::vector<float> f(count);
    for (size_t i = 0; i < count; i++) {
        f[i] = by ? x2f(v[i * step]) * by[i] : x2f(v[i * step]);
        if (fabsf(f[i]) > amax) amax = fabsf(f[i]);
    }
    float scale = int8_row_scale(amax), inv = int8_row_inv(scale);
    q->resize(count);
    for (size_t i = 0; i < count; i++) (*q)[i] = int8_nearest(f[i], inv);
    return scale;
}
// Sums of a[k] * b[k * step]: f32 of each 2^16, added in order.
template <class T> static float sum(const std::vector<int> &a, const T *b, size_t step) {
    float s = 0.0f;
    for (size_t k0 = 0; k0 < a.size(); k0 += 1 << 16) {
        int32_t acc = 0;
        for (size_t k = k0; k < a.size() && k < k0 + (1 << 16); k++) acc += a[k] * (int)b[k * step];
        s = k0 ? s + (float)acc : (float)acc;
    }
    return s;
}

static Values expected(const Operands &o, Form form, bool accumulate) {
    Values y;
    std::vector<int> q;
    size_t C = (size_t)o.C, OC = (size_t)o.OC;
    if (form == BACKWARD_WEIGHT) {
        std::vector<std::vector<int>> qx(C);
        std::vector<float> sx(C);
        for (size_t c = 0; c < C; c++) sx[c] = quantize(&qx[c], &o.x[c], C, o.N, nullptr);
        for (size_t r = 0; r < OC; r++) {
            float sg = quantize(&q, &o.dy[r], OC, o.N, nullptr);
            for (size_t c = 0; c < C; c++) {
                float s = sum(q, qx[c].data(), 1) * sg * sx[c];
                y.push_back(accumulate ? o.before[r * C + c] + s : s);
            }
        }
        return y;
    }
    for (size_t n = 0; n < o.N; n++) {
        if (form == BACKWARD_INPUT) {
            float sg = quantize(&q, &o.dy[n * OC], 1, OC, o.wscale.data());
            for (size_t c = 0; c < C; c++) y.push_back(x2f(f2x(sum(q, &o.codes[c], C) * sg)));
            continue;
        }
        float sx = quantize(&q, &o.x[n * C], 1, C, nullptr);
        for (size_t r = 0; r < OC; r++) {
            float s = sum(q, &o.codes[r * C], 1) * sx * o.wscale[r];
            y.push_back(form == FORWARD ? x2f(f2x(s)) : s);
        }
    }
    return y;
}

static Values run_cuda(const Operands &o, Form form, bool accumulate, size_t offset) {
    Device<floatX> x(o.x, offset), dy(o.dy, offset), y(o.N * (size_t)o.OC, offset), dx(o.N * (size_t)o.C, offset);
    Device<int8_t> codes(o.codes, offset);
    Device<float> wscale(o.wscale, offset), f(o.N * (size_t)o.OC, offset), dw(o.before, offset);
    switch (form) {
    case FORWARD: OP(linear_i8_forward)(y.p, x.p, codes.p, wscale.p, o.N, o.C, o.OC); return values(y.host());
    case FORWARD_F32: OP(linear_i8_forward_f32)(f.p, x.p, codes.p, wscale.p, o.N, o.C, o.OC); return f.host();
    case BACKWARD_INPUT:
        OP(linear_i8_backward_input)(dx.p, dy.p, codes.p, wscale.p, o.N, o.C, o.OC);
        return values(dx.host());
    default: OP(linear_i8_backward_weight)(dw.p, dy.p, x.p, o.N, o.C, o.OC, accumulate); return dw.host();
    }
}

static Values run_cpu(const Operands &o, Form form, bool accumulate) {
    std::vector<floatX> y(o.N * (size_t)o.OC), dx(o.N * (size_t)o.C);
    Values f(o.N * (size_t)o.OC), dw(o.before);
    switch (form) {
    case FORWARD:
        ops_cpu.linear_i8_forward(y.data(), o.x.data(), o.codes.data(), o.wscale.data(), o.N, o.C, o.OC);
        return values(y);
    case FORWARD_F32:
        ops_cpu.linear_i8_forward_f32(f.data(), o.x.data(), o.codes.data(), o.wscale.data(), o.N, o.C, o.OC);
        return f;
    case BACKWARD_INPUT:
        ops_cpu.linear_i8_backward_input(dx.data(), o.dy.data(), o.codes.data(), o.wscale.data(), o.N, o.C, o.OC);
        return values(dx);
    default:
        ops_cpu.linear_i8_backward_weight(dw.data(), o.dy.data(), o.x.data(), o.N, o.C, o.OC, accumulate);
        return dw;
    }
}

enum { LIBRARY = 1, TILES = 2 };
static const struct { const char *name; int way, ways; } ways[] = {
    {"library", LIBRARY, MATMUL_ALL}, {"tiles", TILES, 0}};
static void check_i8(const int shape[3], Form form, int which, bool strange, bool positive, size_t offset, int orders) {
    bool accumulate = offset > 0;
    Operands o(shape, positive, strange);
    Values want = expected(o, form, accumulate);
    char where[128];
    snprintf(where, sizeof where, "%s N=%d C=%d OC=%d%s%s", form_names[form], shape[0], shape[1], shape[2],
             strange ? ", strange" : "", offset ? ", unaligned" : "");
    check_same("CPU wing", where, run_cpu(o, form, accumulate), want);
    for (auto &way : ways) {
        if (!(way.way & which) || (way.way == LIBRARY && small_run())) continue;
        cuda_matmul_allow(way.ways);
        for (int order = 0; order < orders; order++) {
            char how[32];
            snprintf(how, sizeof how, "%s, order %d", way.name, order);
            set_order(order);
            check_same(how, where, run_cuda(o, form, accumulate, offset), want);
        }
        cuda_matmul_allow(MATMUL_ALL);
    }
}
static void check_form(Form form) {
    for (auto &shape : int8_shapes)
        for (size_t offset = 0; offset < 2; offset++)
            check_i8(shape, form, LIBRARY | TILES, false, false, offset, ORDERS);
    const int strange[3] = {48, 48, 64};                       // aligned, and for the library
    check_i8(strange, form, LIBRARY | TILES, true, false, 0, ORDERS);
}
CUDA_TEST(linear_i8_forward) { check_form(FORWARD); }
CUDA_TEST(linear_i8_forward_f32) { check_form(FORWARD_F32); }
CUDA_TEST(linear_i8_backward_input) { check_form(BACKWARD_INPUT); }
CUDA_TEST(linear_i8_backward_weight) { check_form(BACKWARD_WEIGHT); }

// Sums of more than 2^16 products, one more or 16: of C, OC and N. These rows are also longer than what a block holds.
CUDA_TEST(linear_i8_pieces) {
    const struct { int shape[3]; Form form; int way; } cases[] = {
        {{2, 65537, 3}, FORWARD, TILES}, {{17, 65552, 16}, FORWARD_F32, LIBRARY},
        {{17, 16, 65552}, BACKWARD_INPUT, LIBRARY}, {{65537, 3, 2}, BACKWARD_WEIGHT, TILES}};
    for (auto &c : cases) check_i8(c.shape, c.form, c.way, false, true, c.way == TILES, 1);
}

// More rows than are scaled at a time: 256. `offset`: a weight's gradient is added to what is there. The tiles make
// only sums of several pieces in parts.
CUDA_TEST(linear_i8_parts) {
    const struct { int shape[3]; Form form; int way; size_t offset; } cases[] = {
        {{300, 32, 48}, FORWARD, LIBRARY, 0}, {{300, 48, 32}, BACKWARD_INPUT, LIBRARY, 0},
        {{32, 48, 300}, BACKWARD_WEIGHT, LIBRARY, 1}, {{300, 65552, 16}, FORWARD_F32, LIBRARY, 0},
        {{257, 65537, 1}, FORWARD, TILES, 0}};
    cuda_scaled_bytes(0);
    for (auto &c : cases) check_i8(c.shape, c.form, c.way, false, c.shape[1] > 1 << 16, c.offset, 1);
    cuda_scaled_bytes(SCALED_BYTES);
}

CUDA_TEST(linear_i8_no_tokens) {
    Device<floatX> x(8);
    Device<int8_t> codes(64);
    Device<float> dw(std::vector<float>(64, 3.0f));
    ops_cuda.linear_i8_forward(x.p, x.p, codes.p, dw.p, 0, 8, 8);
    ops_cuda.linear_i8_forward_f32(dw.p, x.p, codes.p, dw.p, 0, 8, 8);
    ops_cuda.linear_i8_backward_input(x.p, x.p, codes.p, dw.p, 0, 8, 8);
    ops_cuda.linear_w8_forward(x.p, x.p, codes.p, dw.p, 0, 8, 8);
    ops_cuda.linear_w8_forward_f32(dw.p, x.p, codes.p, dw.p, 0, 8, 8);
    ops_cuda.linear_w8_backward_input(x.p, x.p, codes.p, dw.p, x.p, 0, 8, 8);
    ops_cuda.linear_i8_backward_weight(dw.p, x.p, x.p, 0, 8, 8, true);
    check_same("accumulated", "no tokens", dw.host(), std::vector<float>(64, 3.0f));
    ops_cuda.linear_i8_backward_weight(dw.p, x.p, x.p, 0, 8, 8, false);
    check_same("not accumulated", "no tokens", dw.host(), std::vector<float>(64, 0.0f));
}

#ifndef __CUDACC__
// The library makes the products that it takes, by plans that are kept; where it finds nothing the tiles do.
CUDA_TEST(linear_i8_library) {
    set_order(0);
    const int N = 48, C = 96, OC = 112;
    const int shape[3] = {N, C, OC};
    Operands o(shape, false, false);
    Device<floatX> x(o.x), dy(o.dy), y((size_t)(N * OC)), dx((size_t)(N * C));
    Device<int8_t> codes(o.codes);
    Device<float> wscale(o.wscale), dw(o.codes.size());
    auto step = [&] {
        size_t before = cublaslt_sim.matmuls;
        ops_cuda.linear_i8_forward(y.p, x.p, codes.p, wscale.p, (size_t)N, C, OC);
        ops_cuda.linear_i8_backward_input(dx.p, dy.p, codes.p, wscale.p, (size_t)N, C, OC);
        ops_cuda.linear_i8_backward_weight(dw.p, dy.p, x.p, (size_t)N, C, OC, false);
        return cublaslt_sim.matmuls - before;
    };
    cublaslt_sim.nothing_fits = true;
    ops_cuda.linear_i8_forward(y.p, x.p, codes.p, wscale.p, (size_t)N - 1, C, OC);
    ops_cuda.linear_i8_forward(y.p, x.p, codes.p, wscale.p, (size_t)N - 1, C, OC);
    cublaslt_sim.nothing_fits = false;
    CHECK(step() == 3, "all by the library");
    size_t asked = cublaslt_sim.heuristics + cublaslt_sim.checks;
    CHECK(step() == 3 && asked == cublaslt_sim.heuristics + cublaslt_sim.checks, "nothing is asked twice");
    check_same("dw", "by the library", dw.host(), expected(o, BACKWARD_WEIGHT, false));
}
#endif

// Weight-only: whatever way linear_forward takes, the codes as X give its bits.
CUDA_TEST(linear_w8) {
    const struct { const char *name; int ways; } all[] = {
        {"all", MATMUL_ALL}, {"library", MATMUL_LIBRARY}, {"tiles", MATMUL_TILES}, {"plain", 0}};
    for (auto &shape : int8_shapes)
        for (size_t offset = 0; offset < 2; offset++) {
            Operands o(shape, false, false);
            size_t ny = o.N * (size_t)o.OC, nx = o.N * (size_t)o.C;
            std::vector<floatX> as_x;
            for (int8_t q : o.codes) as_x.push_back(f2x((float)q));
            Device<floatX> x(o.x, offset), dy(o.dy, offset), w(as_x);
            Device<int8_t> codes(o.codes, offset);
            Device<float> wscale(o.wscale);
            for (auto &way : all) {
                if ((way.ways & MATMUL_LIBRARY) && small_run()) continue;
                cuda_matmul_allow(way.ways);
                int order = (int)offset;                       // linear_forward's tests take all
                set_order(order);
                char where[96];
                snprintf(where, sizeof where, "linear_w8 N=%d C=%d OC=%d %s order=%d%s", shape[0], shape[1],
                         shape[2], way.name, order, offset ? ", unaligned" : "");
                Device<floatX> y(ny), y_want(ny), dx(nx), dx_want(nx), scaled(ny), scaled_want(ny);
                Device<float> f(ny), f_want(ny);
                ops_cuda.linear_forward(y_want.p, x.p, w.p, wscale.p, o.N, o.C, o.OC);
                ops_cuda.linear_forward_f32(f_want.p, x.p, w.p, wscale.p, o.N, o.C, o.OC);
                ops_cuda.linear_backward_input(dx_want.p, dy.p, w.p, wscale.p, scaled_want.p, o.N, o.C, o.OC);
                OP(linear_w8_forward)(y.p, x.p, codes.p, wscale.p, o.N, o.C, o.OC);
                OP(linear_w8_forward_f32)(f.p, x.p, codes.p, wscale.p, o.N, o.C, o.OC);
                OP(linear_w8_backward_input)(dx.p, dy.p, codes.p, wscale.p, scaled.p, o.N, o.C, o.OC);
                check_same("y", where, y.host(), y_want.host());
                check_same("logits", where, f.host(), f_want.host());
                check_same("dx", where, dx.host(), dx_want.host());
                check_same("dy_scaled", where, scaled.host(), scaled_want.host());
                cuda_matmul_allow(MATMUL_ALL);
            }
        }
}
