// attention_backward of the CUDA wing against its definition in double and against the CPU wing.
#include "cuda_test.h"

struct BackwardShape { int B, T, NH, NKV, HS; };

// Gradients by definition from the same qkv, do, o and lse that the operation is given, and bounds of its error. First
// order (the bound is widened by 1 % for the rest), u = 2^-23: an f32 product or sum, on tensor cores too, which may
// truncate; X = bf16 rounds by e = 2^-8 of the value, else e = 0:
//   score s = q k scale - lse:  |err s| <= (HS + 2) u scale sum|q k| + 3 u (|q k| scale + |lse|), three roundings of
//                               what goes into the exponent
//   p = exp(s):                 |err p| <= p (|err s| + 4 u) =: p r           4 u: the exponential
//   p as a factor:              p (r + e)
//   dp - D, D = do o:           |err| <= (HS + 1) u (sum|do v| + sum|do o|) + u |dp - D|
//   ds = p (dp - D):            |err ds| <= |ds| (r + u) + p |err (dp - D)|, as a factor |ds| e more
//   a sum over n terms:         n u sum|terms| more; the result e |result| more
// with n = T G for dk and dv, T for dq.
static void reference(std::vector<double> *want, std::vector<double> *bound, const std::vector<floatX> &dout,
                      const std::vector<floatX> &qkv, const std::vector<floatX> &o, const std::vector<float> &lse,
                      BackwardShape s) {
    double u = 1.0 / (1 << 23), e = sizeof(floatX) == 2 ? 1.0 / 256 : 0.0, scale = 1.0 / sqrt((double)s.HS);
    int G = s.NH / s.NKV, HS = s.HS;
    size_t ld = (size_t)(s.NH + 2 * s.NKV) * (size_t)HS, ldo = (size_t)s.NH * (size_t)HS;
    want->assign((size_t)(s.B * s.T) * ld, 0.0);
    bound->assign((size_t)(s.B * s.T) * ld, 0.0);
    double *w = want->data(), *err = bound->data();
    for (int b = 0; b < s.B; b++)
        for (int h = 0; h < s.NH; h++)
            for (int t = 0; t < s.T; t++) {
                size_t n = (size_t)(b * s.T + t), at_q = n * ld + (size_t)(h * HS), at_o = n * ldo + (size_t)(h * HS);
                double D = 0, D_size = 0, l = lse[(size_t)((b * s.NH + h) * s.T + t)];
                for (int i = 0; i < HS; i++) {
                    double x = (double)x2f(dout[at_o + (size_t)i]) * x2f(o[at_o + (size_t)i]);
                    D += x;
                    D_size += fabs(x);
                }
                for (int j = 0; j <= t; j++) {
                    size_t at_k = (size_t)(b * s.T + j) * ld + (size_t)((s.NH + h / G) * HS),
                           at_v = at_k + (size_t)(s.NKV * HS);
                    double qk = 0, qk_size = 0, dp = 0, dp_size = 0;
                    for (size_t i = 0; i < (size_t)HS; i++) {
                        double x = (double)x2f(qkv[at_q + i]) * x2f(qkv[at_k + i]),
                               y = (double)x2f(dout[at_o + i]) * x2f(qkv[at_v + i]);
                        qk += x;
                        qk_size += fabs(x);
                        dp += y;
                        dp_size += fabs(y);
                    }
                    double p = exp(qk * scale - l), ds = p * (dp - D);
                    double r = (HS + 2) * u * scale * qk_size + 3 * u * (fabs(qk) * scale + fabs(l)) + 4 * u;
                    double ds_err = fabs(ds) * (r + 2 * u) + p * (HS + 1) * u * (dp_size + D_size);
                    for (size_t i = 0; i < (size_t)HS; i++) {
                        double q = x2f(qkv[at_q + i]), k = x2f(qkv[at_k + i]), d = x2f(dout[at_o + i]);
                        w[at_q + i] += scale * ds * k;
                        w[at_k + i] += scale * ds * q;
                        w[at_v + i] += p * d;
                        err[at_q + i] += scale * fabs(k) * (ds_err + fabs(ds) * (e + (s.T + 2) * u));
                        err[at_k + i] += scale * fabs(q) * (ds_err + fabs(ds) * (e + (s.T * G + 2) * u));
                        err[at_v + i] += fabs(d) * p * (r + e + (s.T * G + 2) * u);
                    }
                }
            }
    for (size_t i = 0; i < want->size(); i++) err[i] = 1.01 * (err[i] + e * fabs(w[i])) + 1e-30;
}

static void check_bound(const char *where, const char *what, const std::vector<floatX> &got,
                        const std::vector<double> &want, const std::vector<double> &bound, double times) {
    size_t bad = 0, first = 0;
    for (size_t i = 0; i < want.size(); i++)
        if (!(fabs((double)value(got[i]) - want[i]) <= times * bound[i]) && bad++ == 0) first = i;
    CHECK(bad == 0, "%s, %s: %zu of %zu beyond the bound, the first at %zu: %.9g, expected %.9g, bound %.3g", where,
          what, bad, want.size(), first, (double)value(got[first]), want[first], times * bound[first]);
}

// offset: values that the tensors stand off an aligned address. size: of queries, keys and values.
static void check_backward(BackwardShape s, size_t offset = 0, float size = 2.0f) {
    size_t N = (size_t)(s.B * s.T), ld = (size_t)(s.NH + 2 * s.NKV) * (size_t)s.HS, ldo = (size_t)(s.NH * s.HS);
    std::vector<floatX> qkv = random_x(N * ld, 11, size), dout = random_x(N * ldo, 12, 1.0f), o(N * ldo), wing(N * ld),
                        first;
    std::vector<float> lse(N * (size_t)s.NH);
    const floatX *k = qkv.data() + s.NH * s.HS;
    ops_cpu.attention_forward(o.data(), lse.data(), qkv.data(), k, k + s.NKV * s.HS, s.B, s.T, s.T, s.NH, s.NKV, s.HS,
                              (int)ldo, (int)ld, (int)ld, (size_t)s.T * ld);
    ops_cpu.attention_backward(wing.data(), dout.data(), qkv.data(), o.data(), lse.data(), s.B, s.T, s.NH, s.NKV, s.HS);
    std::vector<double> want, bound, twin(N * ld);
    reference(&want, &bound, dout, qkv, o, lse, s);
    for (size_t i = 0; i < N * ld; i++) twin[i] = value(wing[i]);
    for (int order = 0; order < ORDERS; order++) {
        char where[96];
        snprintf(where, sizeof where, "B=%d T=%d NH=%d NKV=%d HS=%d offset=%zu order=%d", s.B, s.T, s.NH, s.NKV, s.HS,
                 offset, order);
        set_order(order);
        Device<floatX> d_dqkv(N * ld, offset), d_dout(dout, offset), d_qkv(qkv, offset), d_o(o, offset);
        Device<float> d_lse(lse);
        OP(attention_backward)(d_dqkv.p, d_dout.p, d_qkv.p, d_o.p, d_lse.p, s.B, s.T, s.NH, s.NKV, s.HS);
        std::vector<floatX> got = d_dqkv.host();
        if (order) check_same("bits of order 0", where, got, first);
        else {
            first = got;
            check_bound(where, "definition", got, want, bound, 1.0);
            check_bound(where, "CPU wing", got, twin, bound, 2.0);
        }
    }
}

CUDA_TEST(attention_backward_lengths) {
    for (int T : {1, 5, 33, 64, 65, 130}) check_backward({1, T, 2, 1, 64});
}
CUDA_TEST(attention_backward_groups) {
    for (int G = 1; G <= 4; G++) check_backward({2, 19, 2 * G, 2, 32});
}
CUDA_TEST(attention_backward_head_sizes) {
    for (int HS : {16, 32, 48, 80, 96, 112, 128}) check_backward({1, 67, 1, 1, HS});
    for (int HS : {80, 128}) check_backward({1, 100, 1, 1, HS});        // tiles of 96 and 128 behind T
    for (int HS : {2, 8, 24, 144}) check_backward({1, 18, 2, 1, HS});
    for (int HS : {264, 1024}) check_backward({1, 9, 1, 1, HS});
}
CUDA_TEST(attention_backward_unaligned) { check_backward({2, 21, 2, 1, 64}, 1); }
// Scores of some hundreds: weights of 0 and 1, and none that overflows before it is masked.
CUDA_TEST(attention_backward_large) { check_backward({1, 70, 3, 1, 64}, 0, 20.0f); }
