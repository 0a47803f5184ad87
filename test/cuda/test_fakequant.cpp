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
