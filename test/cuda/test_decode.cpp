// What decoding does around its matmuls: the cache and the next token as the CPU wing has them, bit for bit; logits
// compared with sums in long double.
#include "cuda_test.h"

CUDA_TEST(rope_append) {
    static const int shapes[][7] = {                            // B, T, NH, NKV, HS, pos, max_T
        {1, 1, 1, 1, 2, 0, 1}, {2, 3, 3, 1, 6, 4, 9}, {1, 1, 9, 3, 64, 17, 40}, {3, 5, 4, 2, 80, 0, 5}, {2, 1, 8, 8,
                                                                                                         128, 7, 8},
        {1, 4, 2, 1, 200, 1, 6}};
    for (auto &s : shapes)
        for (int int8 = 0; int8 < 2; int8++) {
            const int B = s[0], T = s[1], NH = s[2], NKV = s[3], HS = s[4], pos = s[5], max_T = s[6];
            const size_t heads = (size_t)(B * max_T * 2 * NKV), n = heads * (size_t)HS;
            std::vector<floatX> qkv = random_x((size_t)(B * T * (NH + 2 * NKV) * HS), 70, 2.0f), want = qkv;
            want[(size_t)(NH + NKV) * (size_t)HS] = qkv[(size_t)(NH + NKV) * (size_t)HS] = f2x(0.0f);
            std::vector<float> c((size_t)(max_T * (HS / 2))), sn(c.size());
            for (size_t i = 0; i < c.size(); i++) {
                c[i] = cosf((float)i * 0.37f);
                sn[i] = sinf((float)i * 0.37f);
            }
            // Both caches begin as bytes of 0xff; what no token has stays so.
            std::vector<uint8_t> values(n * (int8 ? 1 : sizeof(floatX)), 0xff);
            std::vector<float> scale(heads, f32_from_bits(0xffffffffu));
            KvCache cache = {values.data(), int8 ? scale.data() : nullptr, int8 ? KV_INT8 : KV_X, max_T, NKV, HS};
            ops_cpu.rope_append(want.data(), &cache, c.data(), sn.data(), &pos, B, T, NH);
            for (int order = 0; order < ORDERS; order++) {
                char where[96];
                snprintf(where, sizeof where, "B=%d T=%d NH=%d NKV=%d HS=%d pos=%d int8=%d order=%d", B, T, NH, NKV,
                         HS, pos, int8, order);
                set_order(order);
                Device<floatX> dqkv(qkv);
                Device<float> dc(c), ds(sn), dscale(heads);
                Device<uint8_t> dvalues(values.size());
                Device<int32_t> dpos(std::vector<int32_t>{pos});
                KvCache dcache = {dvalues.p, int8 ? dscale.p : nullptr, cache.format, max_T, NKV, HS};
                OP(rope_append)(dqkv.p, &dcache, dc.p, ds.p, dpos.p, B, T, NH);
                check_same("qkv", where, dqkv.host(), want);
                check_same("values", where, dvalues.host(), values);
                if (int8) check_same("scale", where, dscale.host(), scale);
            }
        }
}

// Logits of several kinds: smooth, with ties at every cut, with what is never picked, one for all.
static std::vector<float> some_logits(int V, int kind) {
    std::vector<float> z((size_t)V);
    for (int i = 0; i < V; i++) {
        float u = philox_uniform(philox(5, (uint64_t)kind, (uint64_t)i).v[0]);
        z[(size_t)i] = kind == 0 ? 14.0f * u - 7.0f : kind == 1 ? floorf(u * 6.0f) : 3.0f;
        if (kind == 2) z[(size_t)i] = i % 3 == 0 ? NAN : i % 3 == 1 ? -INFINITY : u;
        if (kind == 4) z[(size_t)i] = i % 2 ? NAN : -INFINITY;
        if (kind == 5 && i == V / 2) z[(size_t)i] = INFINITY;
    }
    return z;
}

CUDA_TEST(sample_next) {
    static const Sampler samplers[] = {{0.0f, 0, 1.0f, 3},  {1.0f, 0, 1.0f, 4},  {0.7f, 40, 1.0f, 5}, {1.3f, 0, 0.9f,
                                                                                                       6},
                                       {2.0f, 300, 0.5f, 7}, {1.0f, 1, 1.0f, 8},  {1.0f, 7, 0.0f, 9},  {0.01f, 0,
                                                                                                        0.99f, 10}};
    for (int V : {300, 1, 5, 1025, 5000})
        for (int kind = 0; kind < (V == 300 ? 6 : 2); kind++)
            for (const Sampler &s : samplers) {
                // Blocks of 1024 threads are slow here: many draws of one kind, of the others the next one each.
                static uint64_t next;
                const uint64_t draws = V == 300 && kind == 0 && ORDERS > 2 ? 8 : 1;
                for (uint64_t draw = next, last = next += draws; draw < last; draw++) {
                    std::vector<float> z = some_logits(V, kind), copy = z;
                    const int want = sample_token(&s, copy.data(), V, draw);
                    set_order((int)(draw + (uint64_t)V) % ORDERS);
                    Device<float> dz(z);
                    Device<DecodeState> state(std::vector<DecodeState>{{41, -7, draw}});
                    OP(sample_next)(state.p, dz.p, &s, V);
                    DecodeState got = state.host()[0];
                    CHECK(got.token == want && got.pos == 42 && got.draw == draw + 1,
                          "V=%d kind=%d temperature=%g top_k=%d top_p=%g draw=%d: token %d, expected %d; pos %d", V,
                              kind,
                          (double)s.temperature, s.top_k, (double)s.top_p, (int)draw, got.token, want, got.pos);
                }
            }
}

// Logits are used as they are, in double; the result is rounded to f32: 2^-24, and what sums of V terms and two
// logarithms lose, of magnitudes up to that of the logits.
CUDA_TEST(compare_logits) {
    for (int V : {1, 7, 511, 513, 3000}) {
        const size_t n = 5;
        std::vector<float> z, ref;
        for (size_t r = 0; r < n; r++) {
            std::vector<float> a = some_logits(V, (int)r % 2), b = some_logits(V, r == 4 ? 1 : 0);
            for (int i = 0; i < V; i++) {
                z.push_back(a[(size_t)i] + (r == 2 ? 1e-3f * (float)(i % 5) : 0.0f));
                ref.push_back(r == 3 && i % 4 == 1 ? -INFINITY : b[(size_t)i]);
            }
        }
        for (int order = 0; order < ORDERS; order++) {
            set_order(order);
            Device<float> dz(z), dref(ref), kl(n);
            Device<int32_t> same_token(n);
            OP(compare_logits)(kl.p, same_token.p, dz.p, dref.p, n, V);
            std::vector<float> got = kl.host();
            std::vector<int32_t> agree = same_token.host();
            for (size_t r = 0; r < n; r++) {
                const float *a = &z[r * (size_t)V], *b = &ref[r * (size_t)V];
                const int ta = argmax_token(a, V), tb = argmax_token(b, V);
                long double za = 0, zb = 0, want = 0;
                for (int i = 0; i < V; i++) {
                    za += expl((long double)a[i]);
                    zb += expl((long double)b[i]);
                }
                for (int i = 0; i < V; i++) {
                    long double log_p = (long double)b[i] - logl(zb), p = expl(log_p);
                    if (p > 0) want += p * (log_p - ((long double)a[i] - logl(za)));
                }
                CHECK(agree[r] == (ta == tb), "V=%d row %zu: %d, tokens %d and %d", V, r, agree[r], ta, tb);
                CHECK(fabsl((long double)got[r] - want) <= 0x1p-24L * fabsl(want) + (V + 8) * 0x1p-52L * 20 &&
                      got[r] >= 0.0f, "V=%d row %zu order %d: %.9g, exact %.9Lg", V, r, order, (double)got[r], want);
            }
        }
    }
}
