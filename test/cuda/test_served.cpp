// Served forms: weight-only against sums in double with a derived bound; with quantized inputs against the CPU wing,
// bit for bit.
#include "packed_test.h"
void cuda_served_piece(size_t bytes);                           // llmc/cuda/served.cuh

// The buffer, packed in two runs of rows; false where the wing has no such form.
static bool served_pack(std::vector<uint8_t> *served, const PackedTest &p, const QuantSpec *act, int OC, int C) {
    size_t bytes = ops_cuda.served_bytes(&p.spec, act, OC, C), across = (size_t)(C / p.block[1]);
    op_called(OP_served_bytes, true);                           // a function of the host
    if (!bytes) return false;
    Device<uint8_t> to(bytes), codes(p.codes);
    Device<float> scale(p.scale), zero(p.zero.empty() ? p.scale : p.zero);
    const int half = OC / 2;
    for (int row = 0, rows = half ? half : OC; row < OC; row += rows, rows = OC - half)
        OP(served_pack)(to.p, codes.p + (size_t)row * quant_row_bytes(p.spec.bits, C), scale.p + (size_t)row * across,
                        p.zero.empty() ? nullptr : zero.p + (size_t)row * across, &p.spec, act, row, rows, OC, C);
    *served = to.host();
    return true;
}

// For few tokens: |error| <= (C + 6) 2^-23 sum |x| |w| plus one rounding to X (ops.h), of unrounded weights. For many
// the working values, whose products are summed in f32, tensor cores truncating: the same of those, and a rounding
// where a row is scaled.
static void check_served(const char *text, int C, int OC, size_t offset) {
    PackedTest p;
    if (!packed_test(&p, text, OC, C)) return;
    std::vector<uint8_t> served;
    if (!served_pack(&served, p, nullptr, OC, C)) {
        CHECK(p.block[0] != 1, "%s C=%d OC=%d has no served form", text, C, OC);
        return;
    }
    const size_t most = 33;                                     // tokens
    const QuantSpec *s = &p.spec;
    std::vector<floatX> x = random_x(most * (size_t)C, 63, 1.0f), work((size_t)OC * (size_t)C);
    std::vector<float> wscale((size_t)OC);
    ops_cpu.dequant_rows(work.data(), wscale.data(), p.codes.data(), p.scale.data(),
                         p.zero.empty() ? nullptr : p.zero.data(), s, OC, C);
    std::vector<double> want[2], size[2];                       // few, many
    std::vector<int16_t> row((size_t)C);
    for (int k = 0; k < 2; k++) want[k].resize(most * (size_t)OC), size[k].resize(most * (size_t)OC);
    for (int r = 0; r < OC; r++) {
        quant_unpack_row(row.data(), p.codes.data() + (size_t)r * quant_row_bytes(s->bits, C), C, s);
        for (size_t n = 0; n < most; n++)
            for (int c = 0; c < C; c++) {
                size_t b = (size_t)(r * (C / p.block[1]) + c / p.block[1]), i = n * (size_t)OC + (size_t)r;
                double scale = (double)p.scale[b], zero = p.zero.empty() ? (double)quant_mid(s) : (double)p.zero[b],
                       v = (double)x2f(x[n * (size_t)C + (size_t)c]),
                       code = (double)row[(size_t)c] - (s->zero == QZ_FLOAT ? (double)quant_mid(s) : zero);
                double w = (double)x2f(work[(size_t)r * (size_t)C + (size_t)c]) * (double)wscale[(size_t)r];
                want[0][i] += v * (code * scale + (s->zero == QZ_FLOAT ? zero : 0.0));
                size[0][i] += fabs(v) * (fabs(code) * scale + (s->zero == QZ_FLOAT ? fabs(zero) : 0.0));
                want[1][i] += v * w;
                size[1][i] += fabs(v * w);
            }
    }
    Device<floatX> dx(x, offset);
    Device<uint8_t> form(served);
    std::vector<float> first[2];                                // of all tokens, few and many
    for (int order = 0; order < ORDERS; order++)
        for (size_t N : {8, 1, 2, 3, 5, 33, 17}) {
            const int k = N > 8;
            char where[128];
            snprintf(where, sizeof where, "%s C=%d OC=%d N=%zu offset=%zu order=%d", text, C, OC, N, offset, order);
            set_order(order);
            Device<float> y32(N * (size_t)OC);
            Device<floatX> y(N * (size_t)OC);
            OP(served_forward_f32)(y32.p, dx.p, form.p, s, nullptr, N, C, OC);
            OP(served_forward)(y.p, dx.p, form.p, s, nullptr, N, C, OC);
            std::vector<float> got = y32.host();
            std::vector<floatX> rounded = y.host();
            if (first[k].empty()) {
                first[k] = got;
                size_t bad = 0, at = 0;
                for (size_t i = 0; i < got.size(); i++)
                    if (!(fabs((double)got[i] - want[k][i]) <= (C + 6) / 8388608.0 * size[k][i]) && bad++ == 0) at = i;
                CHECK(bad == 0, "%s: %zu of %zu beyond the bound, the first at %zu: %.9g, exact %.9g", where, bad,
                      got.size(), at, (double)got[at], want[k][at]);
            }
            check_same("bits of a token", where, got, std::vector<float>(first[k].begin(),
                                                                         first[k].begin() + (long)got.size()));
            if (!k) {                                           // the same sum, rounded
                std::vector<floatX> x_of(got.size());
                for (size_t i = 0; i < got.size(); i++) x_of[i] = f2x(got[i]);
                check_same("X", where, rounded, x_of);
            } else {
                for (size_t i = 0; i < got.size(); i++)
                    CHECK(fabs((double)x2f(rounded[i]) - want[1][i]) <=
                              (C + 6) / 8388608.0 * size[1][i] + (sizeof(floatX) == 2 ? fabs(want[1][i]) / 250.0 : 0.0),
                          "%s at %zu: %.9g, exact %.9g", where, i, (double)x2f(rounded[i]), want[1][i]);
            }
            if (order > 1) break;                               // the random orders: one call
        }
}

CUDA_TEST(served_weight_only) {
    for (auto &shape : packed_shapes)
        for (const char *text : packed_specs) check_served(text, shape[1], shape[0], 0);
    for (const char *text : packed_specs) check_served(text, 64, 5, 1);
    for (const char *text : {"int8,channel,rows", "uint4,group=32,asymmetric", "int4,group=128"})
        check_served(text, 1152, 21, 0);
}

CUDA_TEST(served_pieces) {                                      // of 16 rows
    cuda_served_piece(0);
    for (const char *text : {"int8,channel", "uint4,group=32,float", "int4,group=3"}) check_served(text, 96, 37, 0);
    cuda_served_piece((size_t)256 << 20);
}

// ---------------------------------------------------------------------------------------------
static void check_integer(const char *text, const char *act_text, int C, int OC, size_t offset) {
    PackedTest p;
    if (!packed_test(&p, text, OC, C)) return;
    const QuantSpec act = spec(act_text);
    std::vector<uint8_t> served;
    if (!served_pack(&served, p, &act, OC, C)) {
        CHECK(p.block[0] != 1 || p.spec.zero == QZ_FLOAT, "%s, %s C=%d OC=%d has no served form", text, act_text, C,
              OC);
        return;
    }
    const size_t most = 130;                                    // tokens
    std::vector<floatX> x = random_x(most * (size_t)C, 65, 1.0f);
    // A row of zeros, one that is all positive, a NaN, an infinity.
    for (int c = 0; c < C; c++) x[(size_t)c] = f2x(0.0f);
    for (int c = 0; c < C; c++) x[(size_t)(C + c)] = f2x(1.0f + fabsf(x2f(x[(size_t)(C + c)])));
    x[(size_t)(2 * C)] = f2x(NAN);
    x[(size_t)(4 * C - 1)] = f2x(INFINITY);
    std::vector<uint8_t> cpu_form(ops_cpu.served_bytes(&p.spec, &act, OC, C));
    ops_cpu.served_pack(cpu_form.data(), p.codes.data(), p.scale.data(), p.zero.empty() ? nullptr : p.zero.data(),
                        &p.spec, &act, 0, OC, OC, C);
    std::vector<floatX> want(most * (size_t)OC);
    std::vector<float> want32(most * (size_t)OC);
    ops_cpu.served_forward(want.data(), x.data(), cpu_form.data(), &p.spec, &act, most, C, OC);
    ops_cpu.served_forward_f32(want32.data(), x.data(), cpu_form.data(), &p.spec, &act, most, C, OC);
    Device<floatX> dx(x, offset);
    Device<uint8_t> form(served);
    for (int order = 0; order < ORDERS; order++)
        for (size_t N : {9, 1, 2, 3, 8, 130}) {
            if (N == 130 && (order || C * OC < 10000)) break;
            char where[160];
            snprintf(where, sizeof where, "%s, %s C=%d OC=%d N=%zu offset=%zu order=%d", text, act_text, C, OC, N,
                     offset, order);
            set_order(order);
            Device<floatX> y(N * (size_t)OC);
            Device<float> y32(N * (size_t)OC);
            OP(served_forward)(y.p, dx.p, form.p, &p.spec, &act, N, C, OC);
            OP(served_forward_f32)(y32.p, dx.p, form.p, &p.spec, &act, N, C, OC);
            check_same("X", where, y.host(), std::vector<floatX>(want.begin(), want.begin() + (long)(N * (size_t)OC)));
            check_same("f32", where, y32.host(), std::vector<float>(want32.begin(),
                                                                    want32.begin() + (long)(N * (size_t)OC)));
            if (order) break;                                   // the other orders: one call
        }
}

static const char *const integer_acts[] = {"int8,token,asymmetric", "int8,token,symmetric", "uint8,token,asymmetric",
                                           "uint4,token,asymmetric"};
CUDA_TEST(served_integer) {
    static const int shapes[][2] = {{2, 7}, {6, 45}, {9, 64}, {3, 576}};                // rows, cols
    for (auto &shape : shapes)
        for (const char *text : packed_specs)
            for (const char *act : integer_acts) {
                check_integer(text, act, shape[1], shape[0], 0);
                if (shape[1] != 64) break;                      // one kind of input; all at one shape
            }
    for (const char *text : packed_specs) check_integer(text, integer_acts[0], 64, 5, 1);
}

// Groups of several slots and slices, more columns than wait at a time, several squares; a piece at a time.
CUDA_TEST(served_integer_wide) {
    check_integer("int4,group=32", integer_acts[0], 2112, 35, 0);
    check_integer("int4,group=32", integer_acts[0], 96, 133, 0);
    check_integer("int4,group=64", integer_acts[0], 2176, 20, 0);
    check_integer("int4,group=256", integer_acts[0], 2304, 9, 0);
    check_integer("uint4,group=128,asymmetric", integer_acts[2], 640, 40, 0);
    check_integer("int8,channel,symmetric,range=-127..127", integer_acts[1], 2120, 131, 0);
    check_integer("int8,channel", integer_acts[0], 1000, 130, 0);
    check_integer("int8,group=64", integer_acts[0], 1344, 17, 0);
    check_integer("int4,channel", integer_acts[0], 1344, 17, 0);
    cuda_served_piece(0);
    check_integer("int4,group=32", integer_acts[0], 96, 300, 0);
    check_integer("int8,channel", integer_acts[0], 96, 300, 0);
    cuda_served_piece((size_t)256 << 20);
}
