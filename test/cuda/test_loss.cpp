// classifier of the CUDA wing against its definition in fp64; loss_accumulate against the CPU wing, bit for bit.
#include "cuda_test.h"

static const int loss_shapes[][2] = {                           // rows, V
    {1, 1}, {3, 2}, {2, 7}, {4, 31}, {5, 256}, {3, 1000}, {2, 8192 + 8}, {1, 12288}, {1, 49152}, {1, 50257}};

// In units u = 2^-24. A thread's sum has at most K = max(64, V/1024 + 16) terms and so many changes of its maximum. An
// exponent z L - shift is rounded once, as are differences of shifts, and L is log2 e within 0.3u, so on the way from z
// to the maximum a term gains at most 1.3 |z - max| u of error; exp2_fast is within 2.9u, every operation within u: a
// term carries at most (1.3 |z - max| + K + 3.9K + 3.9) u, and bringing threads together adds 6u. So the sum's relative
// error is below
//   r = (1.3 E + 5K + 12) u,   E = sum |z - max| p,
// the loss's error below r + u (the sum to f32) + 2u |log sum| + u |loss|, and that of a probability p below
//   p (1.3 |z - max| + 2.9 + 2) u + p r, rounded to X with a relative error of 2^-8 (bf16) or u;
// the target's probability less 1 is rounded as the others are. Below 2^-126 exponentials are 0.
CUDA_TEST(classifier) {
    const double u = 1.0 / (1 << 24), rounding = sizeof(floatX) == 2 ? 1.0 / 256 : u;
    for (auto &shape : loss_shapes)
        for (int variant = 0; variant < 5; variant++) {
            // Variants: 0 plain; 1 unaligned; 2 losses only; 3 far apart and ascending, so that the maximum keeps
            // moving, some -infinity; 4 no target counts.
            size_t N = (size_t)shape[0], V = (size_t)shape[1], offset = variant == 1 ? 1 : 0;
            std::vector<float> z(N * V);
            std::vector<int32_t> targets(N);
            for (size_t i = 0; i < z.size(); i++) {
                z[i] = 8.0f * uniform(29, i);
                if (variant == 3) z[i] = i % 5 == 3 ? -INFINITY : (float)(i % V) * (200.0f / (float)V) + z[i] / 8.0f;
            }
            for (size_t n = 0; n < N; n++) {
                targets[n] = variant == 4 || n == 2 ? -1 : (int32_t)(philox(7, 30, n).v[0] % V);
                if (targets[n] >= 0 && z[n * V + (size_t)targets[n]] == -INFINITY) z[n * V + (size_t)targets[n]] = 1.0f;
            }
            std::vector<float> first_losses;
            std::vector<floatX> first_d;
            for (int order = 0; order < ORDERS; order++) {
                char where[96];
                snprintf(where, sizeof where, "N=%zu V=%zu variant=%d order=%d", N, V, variant, order);
                set_order(order);
                Device<float> dz(z, offset), dl(N);
                Device<floatX> dd(N * V, offset);
                Device<int32_t> dt(targets);
                OP(classifier)(dl.p, variant == 2 ? nullptr : dd.p, dz.p, dt.p, N, (int)V);
                std::vector<float> losses = dl.host();
                std::vector<floatX> d = dd.host();
                if (order) {
                    check_same("losses", where, losses, first_losses);
                    check_same("dlogits", where, d, first_d);
                    continue;
                }
                first_losses = losses;
                first_d = d;
                size_t bad = 0;
                for (size_t n = 0; n < N; n++) {
                    const float *zn = z.data() + n * V;
                    if (targets[n] < 0) {
                        bad += losses[n] != 0.0f;
                        for (size_t c = 0; c < V && variant != 2; c++) bad += x2f(d[n * V + c]) != 0.0f;
                        continue;
                    }
                    double m = -INFINITY, sum = 0.0, E = 0.0, K = V / 1024 + 16 > 64 ? (double)(V / 1024 + 16) : 64.0;
                    for (size_t c = 0; c < V; c++) m = fmax(m, (double)zn[c]);
                    for (size_t c = 0; c < V; c++) sum += exp((double)zn[c] - m);
                    for (size_t c = 0; c < V; c++)
                        if (zn[c] != -INFINITY) E += (m - (double)zn[c]) * exp((double)zn[c] - m) / sum;
                    double r = 1.01 * (1.3 * E + 5.0 * K + 12.0) * u, want = log(sum) + m - (double)zn[targets[n]];
                    double bound = r + u + 2.0 * u * fabs(log(sum)) + 1.01 * u * fabs(want);
                    if (!(fabs((double)losses[n] - want) <= bound) && bad++ == 0)
                        CHECK(false, "%s: loss %zu is %.9g, expected %.9g, bound %.3g", where, n, (double)losses[n],
                              want, bound);
                    for (size_t c = 0; c < V && variant != 2; c++) {
                        double p = exp((double)zn[c] - m) / sum, far = p > 0.0 ? m - (double)zn[c] : 0.0;
                        double exact = p - (c == (size_t)targets[n] ? 1.0 : 0.0), got = (double)x2f(d[n * V + c]);
                        double most = p * ((1.3 * far + 6.0) * u + r);
                        double limit = most + 1.01 * rounding * (fabs(exact) + most) + 1e-37;    // a subnormal
                        if (!(fabs(got - exact) <= limit) && bad++ == 0)
                            CHECK(false, "%s: dlogits %zu, %zu is %.9g, expected %.9g, bound %.3g", where, n, c, got,
                                  exact, limit);
                    }
                }
                CHECK(bad == 0, "%s: %zu values beyond their bounds", where, bad);
            }
        }
}

// What is no number makes the loss none, as on the CPU: the step is then skipped.
CUDA_TEST(classifier_not_finite) {
    for (int kind = 0; kind < 3; kind++)
        for (int order = 0; order < ORDERS; order++) {
            set_order(order);
            std::vector<float> z(100, kind == 2 ? -INFINITY : 0.5f);
            if (kind < 2) z[60] = kind ? INFINITY : NAN;
            Device<float> dz(z), dl(1);
            Device<floatX> dd(100);
            Device<int32_t> dt(std::vector<int32_t>{3});
            OP(classifier)(dl.p, dd.p, dz.p, dt.p, 1, 100);
            CHECK(!isfinite(dl.host()[0]), "kind %d order %d: loss %g", kind, order, (double)dl.host()[0]);
        }
}

CUDA_TEST(loss_accumulate) {
    for (size_t N : {(size_t)1, (size_t)33, (size_t)1500, (size_t)4097, (size_t)9000}) {
        std::vector<float> losses(N);
        std::vector<int32_t> targets(N);
        for (size_t n = 0; n < N; n++) {
            targets[n] = n % 3 == 1 ? -1 : (int32_t)n;
            losses[n] = targets[n] < 0 ? 0.0f : 6.0f + 5.0f * uniform(31, n);
        }
        StepState state = {};
        state.loss_sum = 0.1;
        state.tokens = 5;
        state.t = 3;
        std::vector<StepState> before(1, state);
        ops_cpu.loss_accumulate(&state, losses.data(), targets.data(), N);
        for (int order = 0; order < ORDERS; order++) {
            set_order(order);
            Device<StepState> ds(before);
            Device<float> dl(losses);
            Device<int32_t> dt(targets);
            OP(loss_accumulate)(ds.p, dl.p, dt.p, N);
            StepState got = ds.host()[0];
            CHECK(got.loss_sum == state.loss_sum && got.tokens == state.tokens && got.t == 3,
                  "N=%zu order=%d: %.17g of %lld, expected %.17g of %lld", N, order, got.loss_sum,
                  (long long)got.tokens, state.loss_sum, (long long)state.tokens);
        }
    }
}
