// swiglu of the CUDA wing against the CPU wing, bit for bit.
#include "cuda_test.h"

CUDA_TEST(swiglu_fq) {
    for (auto &shape : row_shapes)
        for (const char *text : act_specs)
            for (int variant = 0; variant < 3; variant++) {      // plain; unaligned, no mask; saturated and NaN
                size_t N = (size_t)shape[0], n = N * (size_t)shape[1], offset = variant == 1 ? 1 : 0;
                int FF = shape[1];
                QuantSpec s = spec(text);
                std::vector<floatX> gateup = random_x(2 * n, 25, variant == 2 ? 200.0f : 5.0f), y(n);
                if (variant == 2 && n > 50) gateup[n / 2] = f2x(NAN);
                std::vector<uint8_t> mask(n);
                ops_cpu.swiglu_fq_forward(y.data(), mask.data(), gateup.data(), N, FF, s.bits ? &s : nullptr);
                for (int order = 0; order < ORDERS; order++) {
                    char where[96];
                    snprintf(where, sizeof where, "N=%zu FF=%d act=%s variant=%d order=%d", N, FF, text, variant,
                             order);
                    set_order(order);
                    Device<floatX> dx(gateup, offset), dy(n, offset);
                    Device<uint8_t> dm(n, offset);
                    OP(swiglu_fq_forward)(dy.p, variant == 1 ? nullptr : dm.p, dx.p, N, FF, s.bits ? &s : nullptr);
                    check_same("y", where, dy.host(), y);
                    if (variant != 1) check_same("mask", where, dm.host(), mask);
                }
            }
}

CUDA_TEST(swiglu_backward) {
    for (auto &shape : row_shapes)
        for (int variant = 0; variant < 4; variant++) {          // plain; mask; mask, in place, unaligned; saturated
            size_t N = (size_t)shape[0], n = N * (size_t)shape[1], offset = variant == 2 ? 1 : 0;
            int FF = shape[1];
            bool in_place = variant == 2, masked = variant == 1 || variant == 2;
            std::vector<floatX> gateup = random_x(2 * n, 26, variant == 3 ? 200.0f : 5.0f), dy = random_x(n, 27, 1.0f),
                                want(2 * n);
            std::vector<uint8_t> mask(n);
            for (size_t i = 0; i < n; i++) mask[i] = uniform(28, i) < 0.5f;
            ops_cpu.swiglu_backward(want.data(), dy.data(), masked ? mask.data() : nullptr, gateup.data(), N, FF);
            for (int order = 0; order < ORDERS; order++) {
                char where[96];
                snprintf(where, sizeof where, "N=%zu FF=%d variant=%d order=%d", N, FF, variant, order);
                set_order(order);
                Device<floatX> dx(gateup, offset), dd(dy, offset), dout(2 * n, offset);
                Device<uint8_t> dm(mask, offset);
                OP(swiglu_backward)(in_place ? dx.p : dout.p, dd.p, masked ? dm.p : nullptr, dx.p, N, FF);
                check_same("dgateup", where, in_place ? dx.host() : dout.host(), want);
            }
        }
}
