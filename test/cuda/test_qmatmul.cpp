// Packed codes: dequant_rows and embedding_q_forward against the CPU wing, bit for bit; qmatvec_forward against an fp64
// reference.
#include "packed_test.h"

CUDA_TEST(dequant_rows) {
    for (auto &shape : packed_shapes)
        for (const char *text : packed_specs)
            for (int unaligned = 0; unaligned < 2; unaligned++) {
                int rows = shape[0], cols = shape[1];
                PackedTest p;
                if (!packed_test(&p, text, rows, cols)) continue;
                size_t n = (size_t)rows * (size_t)cols, offset = (size_t)unaligned;
                std::vector<floatX> work(n);
                std::vector<float> wscale((size_t)rows);
                ops_cpu.dequant_rows(work.data(), wscale.data(), p.codes.data(), p.scale.data(),
                                     p.zero.empty() ? nullptr : p.zero.data(), &p.spec, rows, cols);
                Device<uint8_t> dcodes(p.codes, offset);
                Device<float> dscale(p.scale), dzero(p.zero.empty() ? p.scale : p.zero);
                for (int order = 0; order < ORDERS; order++) {
                    char where[128];
                    snprintf(where, sizeof where, "%s rows=%d cols=%d unaligned=%d order=%d", text, rows, cols,
                             unaligned, order);
                    set_order(order);
                    Device<floatX> dwork(n, offset);
                    Device<float> dwscale((size_t)rows);
                    OP(dequant_rows)(dwork.p, order == 1 ? nullptr : dwscale.p, dcodes.p, dscale.p,
                                     p.zero.empty() ? nullptr : dzero.p, &p.spec, rows, cols);
                    check_same("work", where, dwork.host(), work);
                    if (order != 1) check_same("wscale", where, dwscale.host(), wscale);
                }
            }
}

// |error| <= (C + 6) 2^-23 sum |x| |w| plus one rounding to X: ops.h.
static void check_qmatvec(const char *text, int C, int OC, size_t offset) {
    PackedTest p;
    if (!packed_test(&p, text, OC, C)) return;
    const size_t most = 9;                                      // tokens
    const QuantSpec *s = &p.spec;
    std::vector<floatX> x = random_x(most * (size_t)C, 63, 1.0f);
    std::vector<double> want(most * (size_t)OC), size(most * (size_t)OC);
    std::vector<int16_t> row((size_t)C);
    for (int r = 0; r < OC; r++) {
        quant_unpack_row(row.data(), p.codes.data() + (size_t)r * quant_row_bytes(s->bits, C), C, s);
        for (size_t n = 0; n < most; n++)
            for (int c = 0; c < C; c++) {
                size_t b = (size_t)(r / p.block[0] * (C / p.block[1]) + c / p.block[1]), i = n * (size_t)OC + (size_t)r;
                double scale = (double)p.scale[b], zero = p.zero.empty() ? (double)quant_mid(s) : (double)p.zero[b],
                       v = (double)x2f(x[n * (size_t)C + (size_t)c]),
                       code = (double)row[(size_t)c] - (s->zero == QZ_FLOAT ? (double)quant_mid(s) : zero);
                want[i] += v * (code * scale + (s->zero == QZ_FLOAT ? zero : 0.0));
                size[i] += fabs(v) * (fabs(code) * scale + (s->zero == QZ_FLOAT ? fabs(zero) : 0.0));
            }
    }
    Device<floatX> dx(x, offset);
    Device<uint8_t> dcodes(p.codes, offset);
    Device<float> dscale(p.scale), dzero(p.zero.empty() ? p.scale : p.zero);
    std::vector<floatX> first;                                  // y of all tokens in the first order
    for (int order = 0; order < ORDERS; order++)
        for (size_t N : {9, 1, 2, 3, 8}) {
            char where[128];
            snprintf(where, sizeof where, "%s C=%d OC=%d N=%zu offset=%zu order=%d", text, C, OC, N, offset, order);
            set_order(order);
            Device<floatX> dy(N * (size_t)OC);
            OP(qmatvec_forward)(dy.p, dx.p, dcodes.p, dscale.p, p.zero.empty() ? nullptr : dzero.p, s, N, C, OC);
            std::vector<floatX> y = dy.host();
            if (first.empty()) {
                first = y;
                size_t bad = 0, at = 0;
                for (size_t i = 0; i < y.size(); i++) {
                    double bound = (C + 6) / 8388608.0 * size[i] + (sizeof(floatX) == 2 ? fabs(want[i]) / 255.0 : 0.0);
                    if (!(fabs((double)value(y[i]) - want[i]) <= bound) && bad++ == 0) at = i;
                }
                CHECK(bad == 0, "%s: %zu of %zu beyond the bound, the first at %zu: %.9g, exact %.9g", where, bad,
                      y.size(), at, (double)value(y[at]), want[at]);
            }
            check_same("bits of a token", where, y, std::vector<floatX>(first.begin(), first.begin() + (long)y.size()));
            if (order > 1) break;                               // the random orders: one call
        }
}
CUDA_TEST(qmatvec) {
    for (auto &shape : packed_shapes)
        for (const char *text : packed_specs) check_qmatvec(text, shape[1], shape[0], 0);
    for (const char *text : packed_specs) check_qmatvec(text, 64, 5, 1);
}

// More chunks of 512 bytes than warps, ends within a chunk; blocks of rows that are not full.
CUDA_TEST(qmatvec_wide) {
    check_qmatvec("uint4,group=64,float", 10304, 9, 0);
    check_qmatvec("int4,group=32", 9248, 3, 0);
    check_qmatvec("int8,channel", 5136, 11, 0);
    // More rows than the blocks that run at a time take in one go, with a chunk a warp and with several.
    check_qmatvec("uint4,group=32,float", 64, 523, 0);
    check_qmatvec("int4,group=64", 1152, 301, 0);
    check_qmatvec("int8,channel", 5136, 91, 0);
    // Eight warps, and the most shared memory: more than a consumer card has, which takes fewer tokens at a time.
    check_qmatvec("int4,group=64", 8192, 3, 0);
    setenv("CUDASIM_CAPABILITY", "86", 1);
    check_qmatvec("int4,group=64", 8192, 3, 0);
    unsetenv("CUDASIM_CAPABILITY");
}

CUDA_TEST(embedding_q) {
    for (auto &shape : packed_shapes)
        for (const char *text : packed_specs) {
            const int V = shape[0], C = shape[1];
            PackedTest p;
            if (!packed_test(&p, text, V, C) || p.block[0] != 1) continue;
            std::vector<int32_t> tokens;
            for (int n = 0; n < 2 * V + 1; n++)
                tokens.push_back((int32_t)(philox(7, 64, (uint64_t)n).v[0] % (unsigned)V));
            std::vector<floatX> want(tokens.size() * (size_t)C);
            const float *zero = p.zero.empty() ? nullptr : p.zero.data();
            ops_cpu.embedding_q_forward(want.data(), tokens.data(), p.codes.data(), p.scale.data(), zero, &p.spec,
                                        tokens.size(), C, V);
            for (size_t offset = 0; offset < 2; offset++)
                for (int order = 0; order < ORDERS; order++) {
                    char where[128];
                    snprintf(where, sizeof where, "%s V=%d C=%d offset=%zu order=%d", text, V, C, offset, order);
                    set_order(order);
                    Device<uint8_t> dcodes(p.codes, offset);
                    Device<float> dscale(p.scale), dzero(p.zero.empty() ? p.scale : p.zero);
                    Device<int32_t> dtokens(tokens);
                    Device<floatX> out(want.size(), offset);
                    OP(embedding_q_forward)(out.p, dtokens.p, dcodes.p, dscale.p, zero ? dzero.p : nullptr, &p.spec,
                                            tokens.size(), C, V);
                    check_same("out", where, out.host(), want);
                }
        }
}
