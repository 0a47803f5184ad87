// The token table of the CUDA wing against the CPU wing, bit for bit.
#include "cuda_test.h"

// Kinds of text: every token the same; every one different (as far as V goes); frequent and rare ones mixed.
static std::vector<int32_t> tokens_of(size_t N, int V, int kind) {
    std::vector<int32_t> t(N);
    for (size_t n = 0; n < N; n++) {
        uint32_t r = philox(7, 20, n).v[0];
        t[n] = kind == 0 ? V - 1 : kind == 1 ? (int32_t)((n * 7 + 3) % (size_t)V)
               : (int32_t)(r % 3 ? (r >> 8) % (uint32_t)(V < 4 ? V : 4) : (r >> 8) % (uint32_t)V);
    }
    return t;
}

static const int embedding_shapes[][3] = {                      // N, C, V
    {1, 1, 1}, {3, 7, 5}, {33, 16, 100}, {64, 100, 3}, {20, 2056, 9}, {7, 4100, 50}, {2200, 8, 2400}, {3, 30000, 2}};

CUDA_TEST(embedding) {
    for (auto &shape : embedding_shapes)
        for (int kind = 0; kind < 3; kind++)
            for (size_t offset = 0; offset < 2; offset++) {
                size_t N = (size_t)shape[0], n = N * (size_t)shape[1];
                int C = shape[1], V = shape[2];
                if (N > 1000 && (offset || kind == 1)) continue;  // many tokens: for the rounds of the search
                std::vector<int32_t> tokens = tokens_of(N, V, kind);
                std::vector<floatX> wte = random_x((size_t)V * C, 21, 1.0f), dout = random_x(n, 22, 1.0f), out(n);
                std::vector<float> dwte((size_t)V * C);
                for (size_t i = 0; i < dwte.size(); i++) dwte[i] = uniform(23, i);
                std::vector<float> sum = dwte;
                ops_cpu.embedding_forward(out.data(), tokens.data(), wte.data(), N, C, V);
                ops_cpu.embedding_backward(sum.data(), dout.data(), tokens.data(), N, C, V);
                for (int order = 0; order < (N > 1000 ? 2 : ORDERS); order++) {
                    char where[96];
                    snprintf(where, sizeof where, "N=%zu C=%d V=%d kind=%d offset=%zu order=%d", N, C, V, kind, offset,
                             order);
                    set_order(order);
                    Device<int32_t> dt(tokens, offset);
                    Device<floatX> dw(wte, offset), dd(dout, offset), dy(n, offset);
                    Device<float> ds(dwte, offset);
                    OP(embedding_forward)(dy.p, dt.p, dw.p, N, C, V);
                    OP(embedding_backward)(ds.p, dd.p, dt.p, N, C, V);
                    check_same("out", where, dy.host(), out);
                    check_same("dwte", where, ds.host(), sum);
                }
            }
}
