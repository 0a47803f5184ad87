// The update operations of the CUDA wing against the CPU wing, bit for bit.
#include "cuda_test.h"

// Shapes for every path: one value, rows of nothing even, groups within a row, blocks of rows and columns, whole rows
// short and long, whole tensors.
static const struct { const char *spec; int rows, cols; } cases[] = {
    {"none", 1, 1}, {"none", 3, 7}, {"none", 5, 64}, {"none", 33, 125},
    {"int4,group=32,symmetric", 9, 96}, {"int8,group=16,symmetric-no-clip", 7, 80}, {"uint4,group=64,float", 5, 192},
    {"uint4,group=32,asymmetric", 3, 64}, {"int3,group=128,symmetric-no-clip", 3, 384}, {"int4,group=256", 9, 512},
    {"uint8,group=256,float", 1, 256}, {"int2,group=2", 5, 14}, {"uint2,group=48,float", 3, 144}, {"int8,group=7", 5, 21},
    {"int6,group=30,asymmetric", 2, 90}, {"int4,group=512", 3, 1024}, {"int7,group=100", 4, 300},
    {"int8,channel", 5, 64}, {"int8,channel,symmetric-no-clip", 3, 576}, {"int8,channel", 1, 1}, {"int4,channel", 6, 33},
    {"uint8,channel,asymmetric", 2, 2056}, {"uint4,channel,float", 3, 301}, {"int8,channel,eps=1e-3", 2, 260},
    {"int8,channel,range=-127..127", 1, 30000}, {"int8,channel", 1, 24576}, {"int8,channel", 1, 50000},
    {"int5,block=2x16", 8, 48}, {"int8,block=3x5", 6, 35}, {"uint4,block=32x32,float", 64, 96},
    {"int8,block=4x1", 8, 9}, {"int4,block=8x100,asymmetric", 16, 300},
    {"int8,tensor", 7, 33}, {"uint8,tensor,asymmetric", 40, 260}, {"uint4,tensor,float", 16, 100}, {"int4,tensor", 2, 2},
    {"int8,tensor", 1, 700},
};

// Values of all sizes; where `odd`, with a run of zeros, subnormals, infinities and NaN among them.
static std::vector<float> values(size_t n, uint64_t stream, float scale, bool odd) {
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++) {
        v[i] = scale * uniform(stream, i);
        if (odd && i / 40 % 5 == 1) v[i] = i % 3 ? 0.0f : -0.0f;
        if (odd && i / 40 % 5 == 2) v[i] *= 1e-38f;
        if (odd && i / 40 % 5 == 3 && i % 17 == 0) v[i] = NAN;
        if (odd && i / 40 % 25 == 4 && i % 32 == 11) v[i] = i % 64 > 32 ? INFINITY : -INFINITY;
        if (odd && i / 40 % 25 == 9) v[i] *= 3e38f;
    }
    if (n > 60) v[n / 2] = 40.0f * scale;
    return v;
}

struct Tensors {
    std::vector<float> master, m, v, grad, wscale;
    std::vector<floatX> work;
};

static void check_case(const char *text, int64_t rows, int64_t cols, int variant, int orders) {
    // Variants: 0 plain; 1 unaligned; 2 odd values, many steps done; 3 no row scales, no weight decay, huge gradients.
    size_t n = (size_t)(rows * cols), R = (size_t)rows, offset = variant == 1;
    QuantSpec s = spec(text, false);
    const QuantSpec *wq = s.bits || variant ? &s : nullptr;    // bits 0 is the same as no spec
    bool odd = variant == 2, scales = variant != 3;
    Tensors start = {values(n, 1, 0.05f, odd), values(n, 2, 0.01f, false), values(n, 3, 1e-4f, false),
                     values(n, 4, variant == 3 ? 1e18f : 3.0f, odd), std::vector<float>(R, -7.0f),
                     std::vector<floatX>(n, f2x(-7.0f))};
    for (float &v : start.v) v = fabsf(v);
    StepState state = {};
    state.t = variant == 2 ? 123457 : variant + 1;
    state.lr = 3e-2f;
    state.grad_scale = 0.37f;
    AdamWParams h = {0.9, 0.95, 1e-8, variant == 3 ? 0.0 : 0.1};
    for (int order = 0; order < orders; order++) {
        set_order(order);
        Device<StepState> dstate(std::vector<StepState>(1, state));
        for (int op = 0; op < 4; op++) {
            static const char *const names[] = {"adamw", "sgd", "weight_fq", "mask"};
            char where[160];
            snprintf(where, sizeof where, "%s %s %lldx%lld variant=%d order=%d", names[op], text, (long long)rows,
                     (long long)cols, variant, order);
            if (op == 3 && !s.bits) continue;                  // nothing to launch
            Tensors t = start;
            Device<float> master(t.master, offset), m(t.m, offset), v(t.v, offset), grad(t.grad, offset),
                wscale(t.wscale, offset);
            Device<floatX> work(t.work, offset);
            float *ws = scales ? wscale.p : nullptr, *hws = scales ? t.wscale.data() : nullptr;
            if (op == 0) {
                OP(adamw_fq)(master.p, m.p, v.p, work.p, ws, grad.p, dstate.p, &h, wq, rows, cols);
                ops_cpu.adamw_fq(t.master.data(), t.m.data(), t.v.data(), t.work.data(), hws, t.grad.data(), &state, &h,
                                 wq, rows, cols);
            } else if (op == 1) {
                OP(sgd_fq)(master.p, m.p, work.p, ws, grad.p, dstate.p, 0.9f, 0.01f, wq, rows, cols);
                ops_cpu.sgd_fq(t.master.data(), t.m.data(), t.work.data(), hws, t.grad.data(), &state, 0.9f, 0.01f, wq,
                               rows, cols);
            } else if (op == 2) {
                OP(weight_fq)(work.p, ws, master.p, wq, rows, cols);
                ops_cpu.weight_fq(t.work.data(), hws, t.master.data(), wq, rows, cols);
            } else {
                OP(weight_ste_mask)(grad.p, master.p, wq, rows, cols);
                ops_cpu.weight_ste_mask(t.grad.data(), t.master.data(), wq, rows, cols);
            }
            check_same("master", where, master.host(), t.master);
            check_same("m", where, m.host(), t.m);
            check_same("v", where, v.host(), t.v);
            check_same("grad", where, grad.host(), t.grad);
            check_same("work", where, work.host(), t.work);
            check_same("wscale", where, wscale.host(), t.wscale);
        }
    }
}

CUDA_TEST(updates) {
    for (auto &c : cases)
        for (int variant = 0; variant < 4; variant++)
            check_case(c.spec, c.rows, c.cols, variant, c.cols > 5000 || variant % 2 ? 2 : ORDERS);
}

#ifndef __SANITIZE_ADDRESS__            // millions of accesses
// More than all blocks take in one turn (grid_for, MAX_PARTIALS): unaligned, so that a thread takes one value a turn.
CUDA_TEST(updates_large) {
    check_case("none", 751, 701, 1, 1);
    check_case("int4,group=2", 751, 702, 1, 1);
    check_case("int8,tensor", 301, 1001, 1, 1);
}
#endif

// A skipped step changes nothing, and the graph of a step looks at the state each time it runs.
CUDA_TEST(updates_skip) {
    const char *const specs[] = {"none", "int4,group=32", "int8,channel", "int8,tensor"};
    for (const char *text : specs) {
        QuantSpec s = spec(text, false);
        const int rows = 4, cols = 160, n = rows * cols;
        std::vector<float> x = values(n, 1, 0.05f, false), g = values(n, 4, 1.0f, false), scale(rows, -7.0f);
        std::vector<floatX> w(n, f2x(-7.0f));
        StepState state = {};
        state.t = 3;
        state.lr = 0.1f;
        state.grad_scale = 1.0f;
        state.skip = 1;
        AdamWParams h = {0.9, 0.95, 1e-8, 0.1};
        Device<StepState> dstate(std::vector<StepState>(1, state));
        Device<float> master(x), m(g), v(x), grad(g), wscale(scale);
        Device<floatX> work(w);
        OP(adamw_fq)(master.p, m.p, v.p, work.p, wscale.p, grad.p, dstate.p, &h, &s, rows, cols);
        OP(sgd_fq)(master.p, m.p, work.p, wscale.p, grad.p, dstate.p, 0.9f, 0.01f, &s, rows, cols);
        check_same("master", text, master.host(), x);
        check_same("m", text, m.host(), g);
        check_same("v", text, v.host(), x);
        check_same("work", text, work.host(), w);
        check_same("wscale", text, wscale.host(), scale);
        state.skip = 0;
        CUDA_CHECK(cudaMemcpy(dstate.p, &state, sizeof state, cudaMemcpyHostToDevice));
        OP(sgd_fq)(master.p, m.p, work.p, wscale.p, grad.p, dstate.p, 0.9f, 0.01f, &s, rows, cols);
        CHECK(!same(master.host()[1], x[1]), "%s: a step that is not skipped", text);
    }
}

// Without working values: the masters alone, whatever the spec, none or one that does not fit; rows may be 0.
CUDA_TEST(updates_alone) {
    const QuantSpec specs[] = {spec("none", false), spec("int4,group=32", false), spec("int8,tensor", false)};
    const int shapes[][2] = {{1, 1}, {3, 7}, {8, 160}, {0, 64}};
    for (auto &shape : shapes)
        for (int variant = 0; variant < 4; variant++)
            for (int order = 0; order < ORDERS; order++) {
                const int64_t rows = shape[0], cols = shape[1];
                const size_t n = (size_t)(rows * cols), offset = variant == 1;
                const QuantSpec *wq = variant == 3 ? nullptr : &specs[variant];
                char where[64];
                snprintf(where, sizeof where, "%dx%d variant=%d order=%d", shape[0], shape[1], variant, order);
                set_order(order);
                std::vector<float> x = values(n, 1, 0.05f, false), m = values(n, 2, 0.01f, false), v(n, 1e-5f),
                                   g = values(n, 4, 1.0f, false), scale(9, -7.0f);
                StepState state = {};
                state.t = 2;
                state.lr = 0.1f;
                state.grad_scale = 0.5f;
                AdamWParams h = {0.9, 0.95, 1e-8, 0.1};
                Device<StepState> dstate(std::vector<StepState>(1, state));
                Device<float> dx(x, offset), dm(m, offset), dv(v, offset), dg(g, offset), dscale(scale);
                if (n) {
                    OP(adamw_fq)(dx.p, dm.p, dv.p, nullptr, dscale.p, dg.p, dstate.p, &h, wq, rows, cols);
                    OP(sgd_fq)(dx.p, dm.p, nullptr, dscale.p, dg.p, dstate.p, 0.9f, 0.01f, wq, rows, cols);
                } else {
                    ops_cuda.adamw_fq(dx.p, dm.p, dv.p, nullptr, dscale.p, dg.p, dstate.p, &h, wq, rows, cols);
                    ops_cuda.sgd_fq(dx.p, dm.p, nullptr, dscale.p, dg.p, dstate.p, 0.9f, 0.01f, wq, rows, cols);
                }
                ops_cpu.adamw_fq(x.data(), m.data(), v.data(), nullptr, nullptr, g.data(), &state, &h, wq, rows, cols);
                ops_cpu.sgd_fq(x.data(), m.data(), nullptr, nullptr, g.data(), &state, 0.9f, 0.01f, wq, rows, cols);
                check_same("master", where, dx.host(), x);
                check_same("m", where, dm.host(), m);
                check_same("v", where, dv.host(), v);
                check_same("wscale", where, dscale.host(), scale);
            }
}

// What does not divide is refused as the CPU wing refuses it.
CUDA_TEST(updates_refuse) {
    QuantSpec s = spec("int4,group=32", false);
    Device<float> master(70);
    Device<floatX> work(70);
    ops_cuda.weight_fq(work.p, nullptr, master.p, &s, 2, 35);
    Err err = {};
    int code = device_sync(&err);
    CHECK(code == E_SHAPE, "%d: %s", code, err.text);
}

CUDA_TEST(global_norm) {
    const size_t lengths[] = {0, 1, 15, 16, 17, 1000, 65535, 65536, 65537, 5 * 65536 + 77};
    for (size_t n : lengths)
        for (int variant = 0; variant < 8; variant++) {
            std::vector<float> g(n);
            for (size_t i = 0; i < n; i++) g[i] = uniform(9, i) * (variant == 1 ? 1e30f : 1.0f);
            if (variant == 2 && n) g[n / 2] = NAN;
            if (variant == 3 && n) g[n - 1] = -INFINITY;
            StepState state = {};
            state.norm = state.grad_scale = -5.0f;
            state.skip = 7;
            state.lr = 0.5f;
            state.t = 3;
            state.seed = 11;
            state.tokens = variant == 4 ? 0 : 1000;
            state.loss_sum = variant == 5 ? INFINITY : variant == 6 ? NAN : 2.5;
            state.grad_squares = 0.125;                        // of another tensor
            state.stop = 5;
            float max_norm = variant == 7 ? 0.0f : 0.01f;
            StepState want = state;
            ops_cpu.sum_squares(&want, g.data(), n);
            ops_cpu.global_norm(&want, max_norm);
            for (int order = 0; order < ORDERS; order++) {
                set_order(order);
                Device<float> grad(g, (size_t)(variant % 2));
                Device<StepState> dstate(std::vector<StepState>(1, state));
                if (n) OP(sum_squares)(dstate.p, grad.p, n);
                else ops_cuda.sum_squares(dstate.p, grad.p, n);
                OP(global_norm)(dstate.p, max_norm);
                StepState got = dstate.host()[0];
                CHECK(got.grad_squares == want.grad_squares || (variant == 2 && n && isnan(got.grad_squares)),
                      "n=%zu variant %d order %d: %.17g, expected %.17g", n, variant, order, got.grad_squares,
                      want.grad_squares);
                CHECK(same(got.norm, want.norm) && same(got.grad_scale, want.grad_scale) && got.skip == want.skip,
                      "n=%zu variant %d order %d: norm %.9g scale %.9g skip %d, expected %.9g %.9g %d", n, variant,
                      order, got.norm, got.grad_scale, got.skip, want.norm, want.grad_scale, want.skip);
                CHECK(got.t == 3 && got.lr == 0.5f && got.tokens == state.tokens && got.seed == 11 && got.stop == 5,
                      "the rest stays");
            }
        }
}

// More blocks' sums than fit in shared memory at a time.
CUDA_TEST(global_norm_large) {
    size_t n = 600 * 65536 + 12345;
    std::vector<float> g(n);
    uint32_t r = 1;
    for (float &v : g) {
        r = r * 1664525u + 1013904223u;
        v = (float)(int32_t)r * 1e-9f;
    }
    StepState state = {}, want;
    state.tokens = 77;
    want = state;
    ops_cpu.sum_squares(&want, g.data(), n);
    ops_cpu.global_norm(&want, 1.0f);
    Device<float> grad(g);
    for (int order = 0; order < (ORDERS + 1) / 2; order++) {
        set_order(order);
        Device<StepState> dstate(std::vector<StepState>(1, state));
        OP(sum_squares)(dstate.p, grad.p, n);
        OP(global_norm)(dstate.p, 1.0f);
        StepState got = dstate.host()[0];
        CHECK(got.norm == want.norm && got.grad_scale == want.grad_scale, "%.9g %.9g, expected %.9g %.9g", got.norm,
              got.grad_scale, want.norm, want.grad_scale);
    }
}
