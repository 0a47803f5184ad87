// rope of the CUDA wing against the CPU wing, bit for bit.
#include "cuda_test.h"

static const int rope_shapes[][6] = {                           // N, T, pos0, NH_rot, HS, columns behind them
    {1, 1, 0, 1, 2, 0}, {3, 3, 5, 2, 6, 1}, {8, 4, 0, 3, 64, 64}, {6, 3, 1, 5, 80, 80}, {5, 5, 0, 4, 96, 8},
    {4, 2, 3, 40, 128, 1024}, {7, 7, 2, 12, 64, 3}, {2, 1, 9, 1, 16, 0}};

CUDA_TEST(rope) {
    for (auto &shape : rope_shapes)
        for (int variant = 0; variant < 4; variant++) {          // forward, inverse; the same unaligned
            size_t N = (size_t)shape[0], offset = variant < 2 ? 0 : 1;
            int T = shape[1], pos0 = shape[2], NH = shape[3], HS = shape[4], ldx = NH * HS + shape[5];
            size_t table = (size_t)(pos0 + T) * (size_t)(HS / 2);
            std::vector<floatX> x = random_x(N * (size_t)ldx, 24, 2.0f);
            std::vector<float> c(table), s(table);
            for (size_t i = 0; i < table; i++) {
                c[i] = cosf((float)i * 0.37f);
                s[i] = sinf((float)i * 0.37f);
            }
            std::vector<floatX> want = x;
            ops_cpu.rope(want.data(), c.data(), s.data(), N, T, pos0, ldx, NH, HS, variant % 2 == 1);
            for (int order = 0; order < ORDERS; order++) {
                char where[96];
                snprintf(where, sizeof where, "N=%zu T=%d pos0=%d NH=%d HS=%d ldx=%d variant=%d order=%d", N, T, pos0,
                         NH, HS, ldx, variant, order);
                set_order(order);
                Device<floatX> dx(x, offset);
                Device<float> dc(c, offset), ds(s, offset);
                OP(rope)(dx.p, dc.p, ds.p, N, T, pos0, ldx, NH, HS, variant % 2 == 1);
                check_same("x", where, dx.host(), want);
            }
        }
}
