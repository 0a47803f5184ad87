// Updates of what is kept in few bits (adamw_low), INT8 rows and widened bf16, against the CPU wing, bit for bit.
#include "cuda_test.h"
#include "cuda/adamw.cuh"

static const char *const param_names[] = {"f32", "bf16", "int8"};
static const char *const state_names[] = {"f32", "bf16", "int8", "int4", "fp8"};

// A parameter and its moments as bytes and scales.
struct Kept {
    std::vector<uint8_t> p, m, v;
    std::vector<float> p_scale, m_scale, v_scale;
};

static StoredParam param_of(ParamFormat f, std::vector<uint8_t> &data, std::vector<float> &scale) {
    return {f, data.data(), f == PARAM_INT8 ? scale.data() : nullptr};
}
static StoredState state_of(StateFormat f, std::vector<uint8_t> &data, std::vector<float> &scale) {
    return {f, data.data(), state_block(f) ? scale.data() : nullptr};
}

// Values over many magnitudes, some zeros; where `odd`, runs of zeros, subnormals, NaN and infinities.
static float sample(uint64_t stream, uint64_t i, float scale, bool odd) {
    Philox r = philox(5, stream, i);
    float x = scale * uniform(stream, i);
    if (r.v[1] % 4 == 0) x *= 1e-3f;
    if (r.v[1] % 16 == 1) x *= 1e-6f;
    if (r.v[2] % 50 == 0) x = 0.0f;
    if (odd && i / 700 % 4 == 1) x = i % 3 ? 0.0f : -0.0f;
    if (odd && i / 300 % 7 == 2) x *= 1e-38f;
    if (odd && i / 100 % 9 == 3 && i % 37 == 0) x = NAN;
    if (odd && i / 100 % 23 == 5 && i % 41 == 0) x = i % 2 ? INFINITY : -INFINITY;
    return x;
}

static void put(std::vector<uint8_t> &data, size_t i, float x) { memcpy(&data[4 * i], &x, 4); }
static void put(std::vector<uint8_t> &data, size_t i, bf16 x) { memcpy(&data[2 * i], &x, 2); }

static void fill_state(StateFormat f, std::vector<uint8_t> &data, std::vector<float> &scale, size_t n, uint64_t stream,
                       bool is_signed, bool odd) {
    data.assign(state_data_bytes(f, n), 0);
    scale.assign(state_scales(f, n) + 1, 0.0f);
    float size = is_signed ? 0.01f : 1e-4f;
    for (size_t i = 0; i < n && (f == STATE_F32 || f == STATE_BF16); i++) {
        float x = sample(stream, i, size, odd);
        if (!is_signed) x = fabsf(x);
        if (f == STATE_F32) put(data, i, x);
        else put(data, i, bf16_from_f32(x));
    }
    if (!state_block(f)) return;
    for (size_t i = 0; i < data.size(); i++) {                 // every code, but that of NaN, which is never written
        data[i] = (uint8_t)philox(5, stream, i).v[0];
        if (f == STATE_FP8 && (data[i] & 0x7f) == 0x7f) data[i] = 3;
        if (f == STATE_FP8 && !is_signed) data[i] &= 0x7f;
    }
    for (size_t b = 0; b + 1 < scale.size(); b++)
        scale[b] = b % 5 == 2 ? 0.0f : state_scale(f, size * philox_uniform(philox(5, stream + 50, b).v[0]));
}

static Kept make_kept(ParamFormat pf, StateFormat sf, size_t rows, size_t n, bool odd) {
    Kept k;
    k.p.assign(param_value_bytes(pf) * n, 0);
    k.p_scale.assign(rows, 0.0f);
    for (size_t i = 0; i < n; i++) {
        float x = sample(1, i, 0.05f, odd);
        if (pf == PARAM_F32) put(k.p, i, x);
        else if (pf == PARAM_BF16) put(k.p, i, bf16_from_f32(x));
        else k.p[i] = (uint8_t)philox(5, 1, i).v[0];
    }
    for (size_t r = 0; r < rows; r++) k.p_scale[r] = r % 7 == 3 ? 0.0f : 1e-3f * philox_uniform(philox(5, 9, r).v[0]);
    fill_state(sf, k.m, k.m_scale, n, 20, true, odd);
    fill_state(sf, k.v, k.v_scale, n, 30, false, odd);
    return k;
}

// Compares arrays of bytes as what they hold.
static void check_values(const char *what, const char *where, const std::vector<uint8_t> &got,
                         const std::vector<uint8_t> &want, size_t bytes) {
    std::vector<float> a(got.size() / bytes), b(a.size());
    for (size_t i = 0; i < a.size(); i++) {
        bf16 x, y;
        memcpy(&x, &got[i * bytes], bytes < 2 ? 1 : 2);
        memcpy(&y, &want[i * bytes], bytes < 2 ? 1 : 2);
        if (bytes == 4) memcpy(&a[i], &got[4 * i], 4), memcpy(&b[i], &want[4 * i], 4);
        else if (bytes == 2) a[i] = bf16_to_f32(x), b[i] = bf16_to_f32(y);
        else a[i] = got[i], b[i] = want[i];
    }
    check_same(what, where, a, b);
}

static size_t state_value_bytes(StateFormat f) { return f == STATE_F32 ? 4 : f == STATE_BF16 ? 2 : 1; }

// Variants: 0 plain; 1 unaligned; 2 odd values, many steps done, nearest rounding; 3 later rows of a larger tensor.
static void check_low(ParamFormat pf, StateFormat sf, int64_t rows, int64_t cols, int variant, int orders,
                      const char *spec_text = nullptr) {
    size_t n = (size_t)(rows * cols), R = (size_t)rows, offset = variant == 1;
    QuantSpec s = spec(spec_text ? spec_text : "none", false);
    const bool works = spec_text != nullptr;
    Kept start = make_kept(pf, sf, R, n, variant == 2);
    std::vector<float> grad(n), wscale(R, -7.0f);
    for (size_t i = 0; i < n; i++) grad[i] = sample(40, i, variant == 3 ? 1e18f : 3.0f, variant == 2);
    std::vector<floatX> work(n, f2x(-7.0f));
    StepState state = {};
    state.t = variant == 2 ? 123457 : variant + 1;
    state.lr = 3e-2f;
    state.grad_scale = 0.37f;
    state.seed = 0x123456789abcdefu + (uint64_t)variant;
    AdamWParams h = {0.9, 0.95, 1e-8, variant == 3 ? 0.0 : 0.1};
    Rounding rounding = variant == 2 ? ROUND_NEAREST : ROUND_STOCHASTIC;
    int64_t row0 = variant == 3 ? 3 * state_unit(sf, cols) : 0;
    int tensor = 17 + variant;
    char where[160];
    Kept want = start;
    std::vector<float> want_wscale = wscale;
    std::vector<floatX> want_work = work;
    ops_cpu.adamw_low(param_of(pf, want.p, want.p_scale), state_of(sf, want.m, want.m_scale),
                      state_of(sf, want.v, want.v_scale), works ? want_work.data() : nullptr, want_wscale.data(),
                      grad.data(), &state, &h, &s, rounding, tensor, row0, rows, cols);
    for (int order = 0; order < orders; order++) {
        snprintf(where, sizeof where, "%s %s %lldx%lld%s%s variant=%d order=%d", param_names[pf], state_names[sf],
                 (long long)rows, (long long)cols, works ? " " : "", works ? spec_text : "", variant, order);
        set_order(order);
        Device<StepState> dstate(std::vector<StepState>(1, state));
        // A value off where values are single bytes or nibbles, and four bytes where they are floats.
        Device<uint8_t> p(start.p, offset * param_value_bytes(pf)), m(start.m, offset * state_value_bytes(sf)),
            v(start.v, offset * state_value_bytes(sf));
        Device<float> ps(start.p_scale), ms(start.m_scale), vs(start.v_scale), g(grad, offset), ws(wscale);
        Device<floatX> w(work, offset);
        OP(adamw_low)(StoredParam{pf, p.p, pf == PARAM_INT8 ? ps.p : nullptr},
                      StoredState{sf, m.p, state_block(sf) ? ms.p : nullptr},
                      StoredState{sf, v.p, state_block(sf) ? vs.p : nullptr}, works ? w.p : nullptr,
                      works ? ws.p : nullptr, g.p, dstate.p, &h, &s, rounding, tensor, row0, rows, cols);
        check_values("p", where, p.host(), want.p, param_value_bytes(pf));
        check_same("row scales", where, ps.host(), want.p_scale);
        check_values("m", where, m.host(), want.m, state_value_bytes(sf));
        check_same("m's scales", where, ms.host(), want.m_scale);
        check_values("v", where, v.host(), want.v, state_value_bytes(sf));
        check_same("v's scales", where, vs.host(), want.v_scale);
        check_same("grad", where, g.host(), grad);
        if (works) {
            check_same("work", where, w.host(), want_work);
            check_same("wscale", where, ws.host(), want_wscale);
        }
    }
}

static const ParamFormat all_params[] = {PARAM_F32, PARAM_BF16, PARAM_INT8};
static const StateFormat all_states[] = {STATE_F32, STATE_BF16, STATE_INT8, STATE_INT4, STATE_FP8};

// One value; odd rows; rows that begin anywhere in blocks of states, many in a tile; rows of whole blocks; two tiles.
static const int low_shapes[][2] = {{1, 1}, {3, 7}, {5, 64}, {33, 125}, {4, 576}, {2, 256}, {8, 96}, {64, 4}, {256, 3},
                                    {3, 2560}, {40, 384}};

CUDA_TEST(low_updates) {
    for (ParamFormat pf : all_params)
        for (StateFormat sf : all_states)
            for (auto &shape : low_shapes) {
                int block = state_block(sf);
                if (block && shape[0] * shape[1] % block) continue;
                for (int variant = 0; variant < 4; variant++)
                    check_low(pf, sf, shape[0], shape[1], variant, variant == 0 ? ORDERS : 1);
            }
}

#ifndef __SANITIZE_ADDRESS__            // millions of accesses
// Rows of many warps' turns in shared memory, rows that it cannot hold, many tiles, more than all blocks take at once.
CUDA_TEST(low_updates_large) {
    check_low(PARAM_INT8, STATE_INT8, 2, 14336, 0, 2);
    check_low(PARAM_INT8, STATE_FP8, 1, 53248, 0, 1);
    check_low(PARAM_INT8, STATE_INT4, 1, 65536, 0, 2);
    check_low(PARAM_INT8, STATE_INT8, 256, 259, 0, 2);
    check_low(PARAM_INT8, STATE_INT4, 128, 515, 1, 1);
    check_low(PARAM_INT8, STATE_F32, 2, 65537, 0, 1);
    check_low(PARAM_INT8, STATE_BF16, 3000, 20, 3, 1);
    check_low(PARAM_INT8, STATE_INT8, 512, 576, 0, 1);
    check_low(PARAM_BF16, STATE_INT8, 301, 1024, 0, 1);
}
#endif

// Working values are made of what is stored.
CUDA_TEST(low_updates_work) {
    const char *const specs[] = {"none", "int4,group=32,symmetric", "uint4,group=64,float", "int8,channel",
                                 "int8,tensor", "int7,group=96"};
    for (const char *text : specs)
        for (ParamFormat pf : {PARAM_F32, PARAM_BF16})
            for (StateFormat sf : {STATE_F32, STATE_INT8, STATE_BF16})
                for (int variant = 0; variant < 3; variant++) check_low(pf, sf, 8, 192, variant, 2, text);
    check_low(PARAM_BF16, STATE_BF16, 2, 50176, 0, 1, "int8,channel");
    check_low(PARAM_BF16, STATE_INT8, 512, 576, 0, 1, "int8,tensor");
}

CUDA_TEST(low_updates_skip) {
    for (ParamFormat pf : all_params)
        for (StateFormat sf : all_states) {
            const int rows = 4, cols = 256;
            const size_t n = rows * cols;
            Kept k = make_kept(pf, sf, rows, n, false);
            std::vector<floatX> work(n, f2x(-7.0f));
            std::vector<float> grad(n, 1.0f);
            StepState state = {};
            state.t = 3;
            state.lr = 0.1f;
            state.grad_scale = 1.0f;
            state.skip = 1;
            AdamWParams h = {0.9, 0.95, 1e-8, 0.1};
            QuantSpec s = spec("int4,group=32", false);
            Device<StepState> dstate(std::vector<StepState>(1, state));
            Device<uint8_t> p(k.p), m(k.m), v(k.v);
            Device<float> ps(k.p_scale), ms(k.m_scale), vs(k.v_scale), g(grad), ws(k.p_scale);
            Device<floatX> w(work);
            OP(adamw_low)(StoredParam{pf, p.p, ps.p}, StoredState{sf, m.p, ms.p}, StoredState{sf, v.p, vs.p},
                          pf == PARAM_INT8 ? nullptr : w.p, ws.p, g.p, dstate.p, &h, &s, ROUND_STOCHASTIC, 1, 0, rows,
                          cols);
            const char *where = state_names[sf];
            check_same("p", where, p.host(), k.p);
            check_same("row scales", where, ps.host(), k.p_scale);
            check_same("m", where, m.host(), k.m);
            check_same("v", where, v.host(), k.v);
            check_same("m's scales", where, ms.host(), k.m_scale);
            check_same("v's scales", where, vs.host(), k.v_scale);
            check_same("work", where, w.host(), work);
            check_same("wscale", where, ws.host(), k.p_scale);
        }
}

// Rows of a tensor that several ranks update are the rows that one updates.
CUDA_TEST(low_updates_split) {
    const struct { StateFormat f; int rows, cols, first; } cases_[] = {
        {STATE_INT8, 12, 192, 4}, {STATE_INT4, 6, 320, 2}, {STATE_F32, 7, 13, 3}, {STATE_BF16, 5, 36, 2}};
    for (ParamFormat pf : all_params)
        for (auto &c : cases_) {
            const size_t n = (size_t)(c.rows * c.cols), first = (size_t)(c.first * c.cols);
            Kept k = make_kept(pf, c.f, (size_t)c.rows, n, false);
            std::vector<float> grad(n);
            for (size_t i = 0; i < n; i++) grad[i] = sample(40, i, 1.0f, false);
            StepState state = {};
            state.t = 2;
            state.lr = 1e-2f;
            state.grad_scale = 1.0f;
            state.seed = 99;
            AdamWParams h = {0.9, 0.95, 1e-8, 0.1};
            Device<StepState> ds(std::vector<StepState>(1, state));
            std::vector<uint8_t> p[2], m[2], v[2];
            for (int parts = 1; parts <= 2; parts++) {
                Device<uint8_t> dp(k.p), dm(k.m), dv(k.v);
                Device<float> ps(k.p_scale), ms(k.m_scale), vs(k.v_scale), g(grad);
                for (int part = 0; part < parts; part++) {
                    size_t at = part ? first : 0;
                    int rows = parts == 1 ? c.rows : part ? c.rows - c.first : c.first;
                    size_t block = state_scales(c.f, at);
                    OP(adamw_low)(StoredParam{pf, dp.p + param_value_bytes(pf) * at, ps.p + (part ? c.first : 0)},
                                  StoredState{c.f, dm.p + state_data_bytes(c.f, at), ms.p + block},
                                  StoredState{c.f, dv.p + state_data_bytes(c.f, at), vs.p + block}, nullptr, nullptr,
                                  g.p + at, ds.p, &h, nullptr, ROUND_STOCHASTIC, 4, (int64_t)(part ? c.first : 0),
                                  (int64_t)rows, (int64_t)c.cols);
                }
                p[parts - 1] = dp.host(), m[parts - 1] = dm.host(), v[parts - 1] = dv.host();
            }
            check_same("p", state_names[c.f], p[1], p[0]);
            check_same("m", state_names[c.f], m[1], m[0]);
            check_same("v", state_names[c.f], v[1], v[0]);
        }
}

// One step of bf16 parameters from k on both wings, which agree; what it leaves, by the CPU wing.
static Kept check_moments(StateFormat sf, const Kept &k, const std::vector<float> &grad, const AdamWParams &h,
                          int64_t rows, int64_t cols) {
    StepState state = {};
    state.t = 2;
    state.lr = 1e-2f;
    state.grad_scale = 1.0f;
    Kept want = k;
    ops_cpu.adamw_low(param_of(PARAM_BF16, want.p, want.p_scale), state_of(sf, want.m, want.m_scale),
                      state_of(sf, want.v, want.v_scale), nullptr, nullptr, grad.data(), &state, &h, nullptr,
                      ROUND_NEAREST, 0, 0, rows, cols);
    Device<StepState> ds(std::vector<StepState>(1, state));
    Device<uint8_t> p(k.p), m(k.m), v(k.v);
    Device<float> ms(k.m_scale), vs(k.v_scale), g(grad);
    OP(adamw_low)(StoredParam{PARAM_BF16, p.p, nullptr}, StoredState{sf, m.p, ms.p}, StoredState{sf, v.p, vs.p},
                  nullptr, nullptr, g.p, ds.p, &h, nullptr, ROUND_NEAREST, 0, (int64_t)0, rows, cols);
    check_same("m", state_names[sf], m.host(), want.m);
    check_same("v", state_names[sf], v.host(), want.v);
    check_same("m's scales", state_names[sf], ms.host(), want.m_scale);
    check_same("v's scales", state_names[sf], vs.host(), want.v_scale);
    return want;
}

// Moments near all edges between two codes: gradients that make them so, and betas that leave nothing of the old ones.
CUDA_TEST(low_updates_edges) {
    const float edges_s8[] = {STATE_EDGES_S8}, edges_u8[] = {STATE_EDGES_U8};
    for (StateFormat sf : {STATE_INT8, STATE_FP8}) {
        const size_t cols = 256, n = 12 * cols;
        std::vector<float> grad(n);
        for (size_t i = 0; i < n; i++) {
            size_t row = i / cols, c = i % cols;
            float x = row < 6 ? edges_s8[c] : sqrtf(edges_u8[c]);
            if (sf == STATE_FP8 && row < 6)                    // between two neighbours
                x = (f8_e4m3_to_f32((f8_e4m3)(c % 126)) + f8_e4m3_to_f32((f8_e4m3)(c % 126 + 1))) / 896.0f;
            if (c == 255) x = 1.0f;                            // the block's scale
            grad[i] = f32_from_bits(f32_bits(x) + (uint32_t)(row % 6) - 2);
        }
        Kept k = make_kept(PARAM_BF16, sf, 12, n, false);
        for (std::vector<float> *s : {&k.m_scale, &k.v_scale}) s->assign(s->size(), 0.0f);
        check_moments(sf, k, grad, {0.0, 0.0, 1e-8, 0.0}, 12, (int64_t)cols);
    }
}

// In 4 bits: values 2 c and 2 c + 1 of a block are the last below edge c and the edge itself, for m in the first block,
// for v in the second. Both have scale 1, which is their last value. m = g. v = v + (g^2 - v) / 2, from v = (c + 1) / 8
// and g^2 = 1 / 16, is (2 c + 3) / 32, the edge; a slightly smaller g leaves it just below.
CUDA_TEST(low_updates_edges_int4) {
    const float edges[2][16] = {{STATE_EDGES_S4}, {STATE_EDGES_U4}};
    const size_t block = 128, n = 2 * block;
    std::vector<float> grad(n);
    Kept k = make_kept(PARAM_BF16, STATE_INT4, 2, n, false);
    k.m_scale = {0.0f, 0.0f, 0.0f};
    k.v_scale = {0.0f, 2.0f, 0.0f};
    k.v.assign(n / 2, 0);
    k.v[n / 2 - 1] = 15;
    for (size_t c = 0; c < 15; c++) {
        grad[2 * c] = nextafterf(edges[0][c], -1.0f);
        grad[2 * c + 1] = edges[0][c];
        const float edge = edges[1][c], v = (float)(c + 1) / 8.0f;
        float g = 0.25f;
        while (v + 0.5f * (g * g - v) >= edge) g = nextafterf(g, 0.0f);
        CHECK(v + 0.5f * (g * g - v) == nextafterf(edge, 0.0f), "no v just below edge %zu", c);
        k.v[block / 2 + c] = (uint8_t)(c << 4 | c);
        grad[block + 2 * c] = g;
        grad[block + 2 * c + 1] = 0.25f;
    }
    grad[block - 1] = 1.0f;
    Kept want = check_moments(STATE_INT4, k, grad, {0.0, 0.5, 1e-8, 0.0}, 2, (int64_t)block);
    CHECK(want.m_scale[0] == 1.0f && want.v_scale[1] == 1.0f, "%g %g", (double)want.m_scale[0],
          (double)want.v_scale[1]);
    for (size_t c = 0; c < 15; c++) {
        int m = want.m[c], v = want.v[block / 2 + c], both = (int)(c << 4 | (c + 1));
        CHECK(m == both && v == both, "edge %zu: codes %02x of m, %02x of v", c, (unsigned)m, (unsigned)v);
    }
}

// What stands for divisions by one number: mantissas of all sizes over divisors of all kinds, also near powers of two.
CUDA_TEST(low_quotient) {
    const float divisors[] = {1.0f, 1.00000012f, 0.99999994f, 0.99999988f, 0.100000024f, 0.000999987125f, 1.9999999f,
                              0.0316225588f, 1e-12f, 2.2e-15f, 0.7071068f, 3.14159274f};
    size_t wrong = 0;
    for (float by : divisors) {
        Divisor d = divisor(by);
        for (uint32_t i = 0; i < 1u << 23; i += 17) {
            float a = f32_from_bits(0x35000000u + i);
            wrong += quotient(a, d) != a / by;
        }
    }
    CHECK(wrong == 0, "%zu quotients differ", wrong);
}

// Rows of zeros, of one value, with NaN, with an infinity; floats and bf16.
CUDA_TEST(int8_rows) {
    const int shapes[][2] = {{1, 1}, {9, 7}, {5, 64}, {3, 130}, {12, 576}, {2, 5000}};
    for (auto &shape : shapes)
        for (int variant = 0; variant < 2; variant++)
            for (ParamFormat pf : {PARAM_F32, PARAM_BF16})
                for (int order = 0; order < ORDERS; order++) {
                    set_order(order);
                    const size_t rows = (size_t)shape[0], cols = (size_t)shape[1], n = rows * cols;
                    std::vector<uint8_t> from(param_value_bytes(pf) * n);
                    for (size_t i = 0; i < n; i++) {
                        size_t r = i / cols;
                        float x = sample(3, i, 0.7f, false);
                        if (r == 1) x = 0.0f;
                        if (r == 2) x = -0.3f;
                        if (r == 4 && i % 3 == 0) x = NAN;
                        if (r == 5 && i % 5 == 0) x = INFINITY;
                        if (r == 6) x *= 1e-38f;
                        if (pf == PARAM_F32) put(from, i, x);
                        else put(from, i, bf16_from_f32(x));
                    }
                    char where[80];
                    snprintf(where, sizeof where, "%s %zux%zu variant=%d order=%d", param_names[pf], rows, cols,
                             variant, order);
                    std::vector<int8_t> codes(n);
                    std::vector<float> scale(rows);
                    ops_cpu.int8_rows(codes.data(), scale.data(), {pf, from.data(), nullptr}, (int64_t)rows,
                                      (int64_t)cols);
                    Device<uint8_t> dfrom(from, (size_t)variant * param_value_bytes(pf));
                    Device<int8_t> dcodes(n, (size_t)variant);
                    Device<float> dscale(rows);
                    OP(int8_rows)(dcodes.p, dscale.p, StoredParam{pf, dfrom.p, nullptr}, (int64_t)rows, (int64_t)cols);
                    std::vector<int8_t> got = dcodes.host();
                    check_values("codes", where, std::vector<uint8_t>(got.begin(), got.end()),
                                 std::vector<uint8_t>(codes.begin(), codes.end()), 1);
                    check_same("scale", where, dscale.host(), scale);
                }
}

CUDA_TEST(int8_rows_of_codes) {
    Device<int8_t> codes(8);
    Device<float> scale(1);
    ops_cuda.int8_rows(codes.p, scale.p, StoredParam{PARAM_INT8, codes.p, scale.p}, 1, 8);
    Err err = {};
    CHECK(device_sync(&err) == E_USAGE && strstr(err.text, "format 2"), "%s", err.text);
}

CUDA_TEST(widen) {
    for (size_t n : {(size_t)1, (size_t)7, (size_t)64, (size_t)1003, (size_t)65536})
        for (size_t offset = 0; offset < 2; offset++) {
            std::vector<bf16> in(n);
            std::vector<float> want(n);
            for (size_t i = 0; i < n; i++) in[i] = (bf16)(i * 40503u), want[i] = bf16_to_f32(in[i]);
            Device<bf16> din(in, offset);
            Device<float> out(n, offset);
            OP(widen)(out.p, din.p, n);
            check_same("widen", "", out.host(), want);
        }
}
