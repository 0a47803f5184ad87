// fakequant_forward of the CUDA wing against the CPU wing, bit for bit.
#include "cuda_test.h"

CUDA_TEST(fakequant) {
    for (auto &shape : row_shapes)
        for (const char *text : act_specs)
            for (int variant = 0; variant < 3; variant++) {
                size_t N = (size_t)shape[0], n = N * (size_t)shape[1], offset = variant == 1 ? 1 : 0;
                int C = shape[1];
                QuantSpec s = spec(text);
                std::vector<floatX> x = random_x(n, 4, 3.0f), y(n);
                if (variant == 1) for (int c = 0; c < C; c++) x[(size_t)c] = f2x(0.0f);           // an all-zero row
                if (variant == 2) {
                    x[n / 2] = f2x(NAN);
                    x[n - 1] = f2x(-INFINITY);
                }
                std::vector<uint8_t> mask(n);
                ops_cpu.fakequant_forward(y.data(), mask.data(), x.data(), N, C, &s);
                for (int order = 0; order < ORDERS; order++) {
                    char where[96];
                    snprintf(where, sizeof where, "N=%zu C=%d act=%s variant=%d order=%d", N, C, text, variant, order);
                    set_order(order);
                    Device<floatX> dx(x, offset), dy(n, offset);
                    Device<uint8_t> dmask(n, offset);
                    OP(fakequant_forward)(dy.p, dmask.p, dx.p, N, C, &s);
                    check_same("y", where, dy.host(), y);
                    check_same("mask", where, dmask.host(), mask);
                    OP(fakequant_forward)(dx.p, nullptr, dx.p, N, C, &s);
                    check_same("y in place", where, dx.host(), y);
                }
            }
}

// Rows longer than shared memory, here and in swiglu_fq.
CUDA_TEST(fakequant_long_rows) {
    int C = 110000;
    size_t N = 2, n = N * (size_t)C;
    QuantSpec s = spec("int8,token,asymmetric");
    std::vector<floatX> gateup = random_x(2 * n, 39, 3.0f), x(gateup.begin(), gateup.begin() + (long)n), y(n), h(n);
    std::vector<uint8_t> mask(n);
    ops_cpu.fakequant_forward(y.data(), mask.data(), x.data(), N, C, &s);
    ops_cpu.swiglu_fq_forward(h.data(), nullptr, gateup.data(), N, C, &s);
    for (int order = 0; order < 2; order++) {
        char where[96];
        snprintf(where, sizeof where, "C=%d order=%d", C, order);
        set_order(order);
        Device<floatX> dx(x), dg(gateup), dy(n);
        Device<uint8_t> dm(n);
        OP(fakequant_forward)(dx.p, dm.p, dx.p, N, C, &s);
        OP(swiglu_fq_forward)(dy.p, nullptr, dg.p, N, C, &s);
        check_same("fakequant in place", where, dx.host(), y);
        check_same("mask", where, dm.host(), mask);
        check_same("swiglu", where, dy.host(), h);
    }
}

CUDA_TEST(mask_backward) {
    for (auto &shape : row_shapes)
        for (int variant = 0; variant < 4; variant++) {          // half masked; unaligned; nothing; all, with NaN
            size_t N = (size_t)shape[0], n = N * (size_t)shape[1], offset = variant == 1 ? 1 : 0;
            int C = shape[1];
            std::vector<floatX> dx = random_x(n, 40, 1.0f);
            if (variant == 3) dx[n / 2] = f2x(NAN);
            std::vector<uint8_t> mask(n);
            for (size_t i = 0; i < n; i++) mask[i] = variant == 2 || (variant != 3 && uniform(41, i) < 0.5f);
            std::vector<floatX> want = dx;
            ops_cpu.mask_backward(want.data(), mask.data(), N, C);
            for (int order = 0; order < ORDERS; order++) {
                char where[96];
                snprintf(where, sizeof where, "N=%zu C=%d variant=%d order=%d", N, C, variant, order);
                set_order(order);
                Device<floatX> d(dx, offset);
                Device<uint8_t> m(mask, offset);
                OP(mask_backward)(d.p, m.p, N, C);
                check_same("dx", where, d.host(), want);
            }
        }
}
