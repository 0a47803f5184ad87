// rmsnorm of the CUDA wing against the CPU wing, bit for bit.
#include "cuda_test.h"

CUDA_TEST(rmsnorm_fq) {
    for (auto &shape : row_shapes)
        for (const char *text : act_specs)
            for (int variant = 0; variant < 4; variant++) {
                // Variants: 0 plain; 1 with delta; 2 delta in place, unaligned; 3 nothing optional, large values.
                size_t N = (size_t)shape[0], n = N * (size_t)shape[1];
                int C = shape[1];
                QuantSpec s = spec(text);
                bool add = variant == 1 || variant == 2, in_place = variant == 2, bare = variant == 3;
                std::vector<floatX> x = random_x(n, 1, bare ? 300.0f : 2.0f), delta = random_x(n, 2, 1.0f),
                                    weight = random_x((size_t)C, 3, 1.5f), y(n), res(n);
                if (n > 50) x[n / 2] = f2x(40.0f);               // an outlier
                std::vector<float> rstd(N);
                std::vector<uint8_t> mask(n);
                size_t offset = variant == 2 ? 1 : 0;
                char where[96];
                for (int order = 0; order < ORDERS; order++) {
                    set_order(order);
                    snprintf(where, sizeof where, "N=%zu C=%d act=%s variant=%d order=%d", N, C, text, variant, order);
                    Device<floatX> dx(x, offset), dd(delta, offset), dw(weight, offset), dy(n, offset), dres(n, offset);
                    Device<float> drstd(N);
                    Device<uint8_t> dmask(n, offset);
                    OP(rmsnorm_fq_forward)(!add ? nullptr : in_place ? dx.p : dres.p, dy.p,
                                                bare ? nullptr : drstd.p, bare ? nullptr : dmask.p, dx.p,
                                                add ? dd.p : nullptr, dw.p, N, C, 1e-5f, s.bits ? &s : nullptr);
                    std::vector<floatX> hx = x;
                    ops_cpu.rmsnorm_fq_forward(!add ? nullptr : in_place ? hx.data() : res.data(), y.data(),
                                               bare ? nullptr : rstd.data(), bare ? nullptr : mask.data(), hx.data(),
                                               add ? delta.data() : nullptr, weight.data(), N, C, 1e-5f,
                                               s.bits ? &s : nullptr);
                    check_same("y", where, dy.host(), y);
                    if (add) check_same("res", where, in_place ? dx.host() : dres.host(), in_place ? hx : res);
                    if (!bare) check_same("rstd", where, drstd.host(), rstd);
                    if (!bare) check_same("mask", where, dmask.host(), mask);
                }
            }
}
