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

// Rows longer than shared memory.
CUDA_TEST(rmsnorm_fq_long_rows) {
    int C = 110000;
    size_t N = 2, n = N * (size_t)C;
    QuantSpec s = spec("int8,token,asymmetric");
    std::vector<floatX> x = random_x(n, 1, 2.0f), delta = random_x(n, 2, 1.0f), weight = random_x((size_t)C, 3, 1.5f),
                        y(n), res(n);
    std::vector<float> rstd(N);
    for (int variant = 0; variant < 3; variant++) {              // no residual; residual; in place
        std::vector<floatX> hx = x;
        floatX *hres = variant == 0 ? nullptr : variant == 1 ? res.data() : hx.data();
        ops_cpu.rmsnorm_fq_forward(hres, y.data(), rstd.data(), nullptr, hx.data(), variant ? delta.data() : nullptr,
                                   weight.data(), N, C, 1e-5f, &s);
        for (int order = 0; order < 2; order++) {
            char where[96];
            snprintf(where, sizeof where, "C=%d variant=%d order=%d", C, variant, order);
            set_order(order);
            Device<floatX> dx(x), dd(delta), dw(weight), dy(n), dres(n);
            Device<float> drstd(N);
            OP(rmsnorm_fq_forward)(variant == 0 ? nullptr : variant == 1 ? dres.p : dx.p, dy.p, drstd.p, nullptr, dx.p,
                                   variant ? dd.p : nullptr, dw.p, N, C, 1e-5f, &s);
            check_same("y", where, dy.host(), y);
            check_same("rstd", where, drstd.host(), rstd);
            if (variant == 1) check_same("res", where, dres.host(), res);
            if (variant == 2) check_same("res in place", where, dx.host(), hx);
        }
    }
}

static const int backward_shapes[][2] = {                       // rows, C: one piece and many, each kernel
    {1, 1}, {3, 7}, {17, 33}, {40, 64}, {100, 100}, {33, 576}, {5, 4104}, {3, 8192}, {2, 8200}, {2, 30000}, {17000, 8}};

// Against the definition in fp64. With u = 2^-24, xhat = x rstd (one rounding) and gx = dy xhat (two, 2u):
//   dweight: N terms and what was there, added in any order: |err| <= (N + 4) u (|dweight before| + sum |gx|).
//   mean: C terms fmaf(gx, w, .) in any order, one division: |err| <= em = (C + 5) u sum |gx w| / C.
//   dx = rstd (g - xhat mean): g, xhat mean (2u), their difference and the product are rounded, so
//     |err| <= rstd (|xhat| em + 5 u (|g| + |xhat mean|)); adding dres and rounding to X: u and 2^-8 (bf16) or u of the
//   result, which may itself be off by that.
CUDA_TEST(rmsnorm_backward) {
    const double u = 1.0 / (1 << 24), rounding = sizeof(floatX) == 2 ? 1.0 / 256 : u;
    for (auto &shape : backward_shapes)
        for (int variant = 0; variant < 3; variant++) {          // plain; mask; mask and unaligned
            size_t N = (size_t)shape[0], n = N * (size_t)shape[1], offset = variant == 2 ? 1 : 0;
            int C = shape[1];
            if (n > 100000 && variant) continue;
            std::vector<floatX> x = random_x(n, 32, 2.0f), dy = random_x(n, 33, 1.0f),
                                w = random_x((size_t)C, 34, 1.5f), dres = random_x(n, 35, 1.0f);
            std::vector<float> rstd(N), dw((size_t)C);
            std::vector<uint8_t> mask(n, 1);
            for (size_t i = 0; i < N; i++) rstd[i] = 0.8f + 0.3f * uniform(36, i);
            for (size_t i = 0; i < dw.size(); i++) dw[i] = uniform(37, i);
            if (variant) for (size_t i = 0; i < n; i++) mask[i] = uniform(38, i) < 0.5f;
            std::vector<double> dw_exact(dw.begin(), dw.end()), dw_size((size_t)C), exact(n), bound(n);
            for (int c = 0; c < C; c++) dw_size[(size_t)c] = fabs((double)dw[(size_t)c]);
            for (size_t r = 0; r < N; r++) {
                double mean = 0.0, size = 0.0, s = (double)rstd[r];
                for (size_t c = 0; c < (size_t)C; c++) {
                    size_t i = r * (size_t)C + c;
                    double gx = (mask[i] ? (double)x2f(dy[i]) : 0.0) * (double)x2f(x[i]) * s;
                    double gxw = gx * (double)x2f(w[c]);
                    dw_exact[c] += gx;
                    dw_size[c] += fabs(gx);
                    mean += gxw / C;
                    size += fabs(gxw) / C;
                }
                for (size_t c = 0; c < (size_t)C; c++) {
                    size_t i = r * (size_t)C + c;
                    double g = (mask[i] ? (double)x2f(dy[i]) : 0.0) * (double)x2f(w[c]), xhat = (double)x2f(x[i]) * s;
                    exact[i] = (double)x2f(dres[i]) + s * (g - xhat * mean);
                    double e = s * (fabs(xhat) * (C + 5) * u * size + 5.0 * u * (fabs(g) + fabs(xhat * mean)));
                    bound[i] = 1.01 * (e + (u + rounding) * (fabs(exact[i]) + e));
                }
            }
            std::vector<float> first_dw;
            std::vector<floatX> first_dres;
            for (int order = 0; order < (n > 100000 ? 2 : ORDERS); order++) {
                char where[96];
                snprintf(where, sizeof where, "N=%zu C=%d variant=%d order=%d", N, C, variant, order);
                set_order(order);
                Device<floatX> dx(x, offset), ddy(dy, offset), ddw(w, offset), ddres(dres, offset);
                Device<float> drstd(rstd), ddweight(dw, offset);
                Device<uint8_t> dm(mask, offset);
                OP(rmsnorm_backward)(ddres.p, ddweight.p, ddy.p, variant ? dm.p : nullptr, dx.p, ddw.p, drstd.p, N, C);
                std::vector<float> got_dw = ddweight.host();
                std::vector<floatX> got = ddres.host();
                if (order) {
                    check_same("dweight", where, got_dw, first_dw);
                    check_same("dres", where, got, first_dres);
                    continue;
                }
                first_dw = got_dw;
                first_dres = got;
                for (size_t i = 0; i < n; i++)
                    if (!(fabs((double)x2f(got[i]) - exact[i]) <= bound[i])) {
                        CHECK(false, "%s: dres %zu is %.9g, expected %.9g, bound %.3g", where, i, (double)x2f(got[i]),
                              exact[i], bound[i]);
                        break;
                    }
                for (size_t c = 0; c < (size_t)C; c++)
                    if (!(fabs((double)got_dw[c] - dw_exact[c]) <= 1.01 * ((double)N + 4.0) * u * dw_size[c])) {
                        CHECK(false, "%s: dweight %zu is %.9g, expected %.9g, bound %.3g", where, c, (double)got_dw[c],
                              dw_exact[c], 1.01 * ((double)N + 4.0) * u * dw_size[c]);
                        break;
                    }
            }
        }
}
