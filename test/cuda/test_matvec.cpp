// cuda_matvec, plain weights against few tokens, against an fp64 reference.
#include "cuda_test.h"
#include "cuda/matmul.cuh"

// Rows shorter than a slot, odd, not a whole chunk, several chunks, more chunks than warps; rows of w that do not fill
// a block.
static const int matvec_shapes[][2] = {{1, 1}, {7, 5}, {64, 9}, {100, 3}, {576, 301}, {2056, 8}, {5000, 12}};

// sum x w in any order with fmaf: |error| <= C 2^-24 S, S = sum |x w|; a row scale adds one rounding, 32 lanes and 8
// warps at most 5 + 7 additions more than the order's own C, and X = bf16 one rounding of 2^-8 |y|.
template <class Out> static void check_matvec(const char *name) {
    for (auto &shape : matvec_shapes)
        for (int variant = 0; variant < 3; variant++) {         // plain; wscale; wscale and unaligned
            const size_t most = 9;                              // tokens
            int C = shape[0], OC = shape[1];
            size_t offset = variant == 2 ? 1 : 0;
            std::vector<floatX> x = random_x(most * (size_t)C, 50, 1.0f), w = random_x((size_t)OC * C, 51, 0.5f);
            std::vector<float> wscale((size_t)OC);
            for (int o = 0; o < OC; o++) wscale[(size_t)o] = 0.01f * (1.0f + uniform(52, (uint64_t)o));
            std::vector<double> want(most * (size_t)OC), bound(most * (size_t)OC);
            for (size_t i = 0; i < want.size(); i++) {
                size_t n = i / (size_t)OC, o = i % (size_t)OC;
                double sum = 0.0, size = 0.0, scale = variant ? (double)wscale[o] : 1.0;
                for (size_t c = 0; c < (size_t)C; c++) {
                    double product = (double)x2f(x[n * (size_t)C + c]) * (double)x2f(w[o * (size_t)C + c]) * scale;
                    sum += product;
                    size += fabs(product);
                }
                want[i] = sum;
                bound[i] = (C + 13) / 16777216.0 * size + (sizeof(Out) == 2 ? fabs(sum) / 255.0 : 0.0);
            }
            std::vector<Out> first;                             // of all tokens in the first order
            for (int order = 0; order < ORDERS; order++) {
                Device<floatX> dx(x, offset), dw(w, offset);
                Device<float> ds(wscale);
                for (size_t N : {9, 1, 2, 3, 4, 5, 8}) {
                    char where[96];
                    snprintf(where, sizeof where, "%s C=%d OC=%d N=%zu variant=%d order=%d", name, C, OC, N, variant,
                             order);
                    set_order(order);
                    Device<Out> dy(N * (size_t)OC);
                    cuda_matvec<Out>(dy.p, dx.p, dw.p, variant ? ds.p : nullptr, N, C, OC);
                    std::vector<Out> y = dy.host();
                    if (first.empty()) {
                        first = y;
                        for (size_t i = 0; i < y.size(); i++)
                            CHECK(fabs((double)value(y[i]) - want[i]) <= bound[i],
                                  "%s at %zu: %.9g, exact %.9g, bound %.3g", where, i, (double)value(y[i]), want[i],
                                  bound[i]);
                    }
                    check_same("bits of a token", where, y, std::vector<Out>(first.begin(), first.begin() + y.size()));
                    if (order > 1) break;                       // the random orders: one call
                }
            }
        }
}
CUDA_TEST(matvec) { check_matvec<floatX>("floatX"); }
CUDA_TEST(matvec_f32) { check_matvec<float>("float"); }

// The operation, with and without rounding: cuda_matvec's bits.
CUDA_TEST(matvec_forward) {
    for (auto &shape : matvec_shapes)
        for (size_t N = 1; N <= 8; N *= 2) {
            int C = shape[0], OC = shape[1];
            Device<floatX> x(random_x(N * (size_t)C, 50, 1.0f)), w(random_x((size_t)OC * C, 51, 0.5f));
            Device<floatX> y(N * (size_t)OC), want(N * (size_t)OC);
            Device<float> y32(N * (size_t)OC), want32(N * (size_t)OC);
            char where[64];
            snprintf(where, sizeof where, "C=%d OC=%d N=%zu", C, OC, N);
            OP(matvec_forward)(y.p, x.p, w.p, N, C, OC);
            OP(matvec_forward_f32)(y32.p, x.p, w.p, N, C, OC);
            cuda_matvec<floatX>(want.p, x.p, w.p, nullptr, N, C, OC);
            cuda_matvec<float>(want32.p, x.p, w.p, nullptr, N, C, OC);
            check_same("X", where, y.host(), want.host());
            check_same("f32", where, y32.host(), want32.host());
        }
}
