// Matmuls of the CUDA wing against their definition and the CPU wing.
#include "cuda_test.h"

static const int matmul_shapes[][3] = {                         // N, C, OC
    {1, 1, 1}, {1, 16, 64}, {3, 7, 5}, {64, 64, 64}, {65, 17, 63}, {2, 576, 130}, {70, 100, 200}, {1, 1030, 3}};

// Out: floatX or float. The kernel must give the bits of its definition in matmul.cu, and lie within a bound of the CPU
// wing, whose library sums in an order of its own:
//   |sum - exact| <= (C + 1) 2^-24 S, S = sum |x w|, for any order of C products and additions, fused or not, on each;
//   wscale multiplies both and adds one rounding, 2^-24 |y| <= 2^-24 S |wscale|, on each; X = bf16 adds one of 2^-9 |y|
//   on each. Together 2 ((C + 2) 2^-24 + 2^-9) S |wscale|, the last term for bf16 outputs only.
template <class Out> using Linear = void (*)(Out *, const floatX *, const floatX *, const float *, size_t, int, int);
template <class Out, class Cuda> static void check_linear(Cuda cuda, Linear<Out> cpu, const char *name) {
    for (auto &shape : matmul_shapes)
        for (int variant = 0; variant < 3; variant++) {          // plain; wscale; wscale and unaligned
            size_t N = (size_t)shape[0];
            int C = shape[1], OC = shape[2];
            size_t ny = N * (size_t)OC, offset = variant == 2 ? 1 : 0;
            std::vector<floatX> x = random_x(N * (size_t)C, 5, 1.0f), w = random_x((size_t)OC * C, 6, 0.5f);
            std::vector<float> wscale((size_t)OC);
            for (int o = 0; o < OC; o++) wscale[(size_t)o] = 0.01f * (1.0f + uniform(8, (uint64_t)o));
            const float *hs = variant ? wscale.data() : nullptr;
            std::vector<Out> want(ny), wing(ny);
            std::vector<double> bound(ny);
            double u = 1.0 / (1 << 24), rounding = sizeof(Out) == 2 ? 1.0 / 512 : 0.0;
            for (size_t n = 0; n < N; n++)
                for (int o = 0; o < OC; o++) {
                    float sum = 0.0f;
                    double size = 0.0;
                    for (int k = 0; k < C; k++) {
                        float a = x2f(x[n * (size_t)C + (size_t)k]), b = x2f(w[(size_t)o * (size_t)C + (size_t)k]);
                        sum = fmaf(a, b, sum);
                        size += fabs((double)a * b);
                    }
                    if (hs) { sum *= hs[o]; size *= fabs((double)hs[o]); }
                    size_t i = n * (size_t)OC + (size_t)o;
                    want[i] = sizeof(Out) == sizeof(floatX) ? (Out)f2x(sum) : (Out)sum;
                    bound[i] = 2.0 * ((C + 2) * u + rounding) * size;
                }
            cpu(wing.data(), x.data(), w.data(), hs, N, C, OC);
            for (int order = 0; order < ORDERS; order++) {
                char where[96];
                snprintf(where, sizeof where, "%s N=%zu C=%d OC=%d variant=%d order=%d", name, N, C, OC, variant,
                         order);
                set_order(order);
                Device<floatX> dx(x, offset), dw(w, offset);
                Device<Out> dy(ny, offset);
                Device<float> ds(wscale);
                cuda(dy.p, dx.p, dw.p, variant ? ds.p : nullptr, N, C, OC);
                std::vector<Out> y = dy.host();
                check_same("bits of the definition", where, y, want);
                size_t bad = 0, first = 0;
                for (size_t i = 0; i < ny; i++)
                    if (!(fabs((double)value(y[i]) - (double)value(wing[i])) <= bound[i]) && bad++ == 0) first = i;
                CHECK(bad == 0, "%s: %zu of %zu beyond the bound, the first at %zu: %.9g, CPU wing %.9g, bound %.3g",
                      where, bad, ny, first, (double)value(y[first]), (double)value(wing[first]), bound[first]);
            }
        }
}
CUDA_TEST(linear) { check_linear<floatX>(OP(linear_forward), ops_cpu.linear_forward, "linear_forward"); }
CUDA_TEST(linear_f32) { check_linear<float>(OP(linear_forward_f32), ops_cpu.linear_forward_f32, "linear_forward_f32"); }
