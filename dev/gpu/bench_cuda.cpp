// Times the operations of the CUDA wing on a GPU, each as a share of a ceiling that the same run measures first: bytes
// a second of a copy (read and written counted each) for what memory bounds, the best bf16 matmul for the rest. Lines
// `result NAME VALUE UNIT`; dev/gpu/check.sh runs it. Compiled against dev/cudasim it runs the same calls on small
// shapes, so that the benchmark itself is tested where there is no GPU; it then prints no figures.
#include <stdio.h>
#include <algorithm>
#include "cuda/cuda.cuh"
#include "cuda/matmul.cuh"
extern "C" {
#include "device.h"
}

#ifdef __CUDACC__
#define GPU 1
#else
#define GPU 0
#endif
#define SIZE(real, simulated) (GPU ? (real) : (simulated))

static double copy_rate, matmul_rate;

static void fail(const char *what, const char *why) {
    fprintf(stderr, "bench_cuda: %s: %s\n", what, why);
    exit(1);
}
static void *take(size_t bytes) {
    void *p;
    Err err;
    if (device_alloc(&p, bytes, "a benchmark's array", &err) < 0) fail("memory", err.text);
    return p;
}
template <class T> static T *array(size_t n) { return (T *)take(n * sizeof(T)); }

// Random values in [-scale, scale).
static __global__ void fill_kernel(floatX *x, float *f, int32_t *t, size_t n, float scale, int V) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)(i * 2654435761u) ^ (uint32_t)(i >> 20);
        h = (h ^ h >> 16) * 0x45d9f3bu;
        h ^= h >> 16;
        float v = scale * ((float)(h >> 8) * (2.0f / 16777216.0f) - 1.0f);
        if (x) x[i] = f2x(v);
        if (f) f[i] = v;
        if (t) t[i] = (int32_t)(h % (uint32_t)V);
    }
}
static floatX *random_x(size_t n, float scale) {
    floatX *x = array<floatX>(n);
    LAUNCH(fill_kernel, SIZE(2048, 1), SIZE(256, 32), 0, cuda_stream)(x, nullptr, nullptr, n, scale, 1);
    return x;
}
static float *random_f32(size_t n, float scale) {
    float *x = array<float>(n);
    LAUNCH(fill_kernel, SIZE(2048, 1), SIZE(256, 32), 0, cuda_stream)(nullptr, x, nullptr, n, scale, 1);
    return x;
}
static int32_t *random_tokens(size_t n, int V) {
    int32_t *t = array<int32_t>(n);
    LAUNCH(fill_kernel, SIZE(2048, 1), SIZE(256, 32), 0, cuda_stream)(nullptr, nullptr, t, n, 1.0f, V);
    return t;
}

// Seconds of one f(): the best of several, each long enough that events do not weigh. The arrays are larger than the L2
// cache, so each call finds it cold.
template <class F> static double seconds(F f) {
    f();
    Err err;
    if (device_sync(&err) < 0) fail("an operation", err.text);
#if GPU
    cudaEvent_t a, b;
    CUDA_CHECK(cudaEventCreate(&a));
    CUDA_CHECK(cudaEventCreate(&b));
    double best = 1e30;
    int calls = 1;
    for (int round = 0; round < 6; round++) {
        float ms = 0;
        CUDA_CHECK(cudaEventRecord(a, cuda_stream));
        for (int i = 0; i < calls; i++) f();
        CUDA_CHECK(cudaEventRecord(b, cuda_stream));
        CUDA_CHECK(cudaEventSynchronize(b));
        CUDA_CHECK(cudaEventElapsedTime(&ms, a, b));
        best = std::min(best, 1e-3 * (double)ms / calls);
        if (round == 0) {
            calls = std::max(1, (int)(0.01 / best));
            best = 1e30;
        }
    }
    CUDA_CHECK(cudaEventDestroy(a));
    CUDA_CHECK(cudaEventDestroy(b));
    if (device_sync(&err) < 0) fail("an operation", err.text);
    return best;
#else
    return 1.0;
#endif
}

static void memory_bound(const char *name, double bytes, double s) {
    if (!GPU) printf("ran %s\n", name);
    else printf("result %s_copy_share %.3f ratio      # %.1f us, %.0f GB/s\n", name, bytes / s / copy_rate, 1e6 * s,
                1e-9 * bytes / s);
    fflush(stdout);
}
static void compute_bound(const char *name, double flops, double s) {
    if (!GPU) printf("ran %s\n", name);
    else printf("result %s %.1f TFLOP/s      # %.1f us, %.3f of the matmul rate\n", name, 1e-12 * flops / s, 1e6 * s,
                flops / s / matmul_rate);
    fflush(stdout);
}

static QuantSpec spec(const char *text, bool activation) {
    QuantSpec s;
    Err err;
    if (quant_spec_parse(&s, text, activation, &err) < 0) fail(text, err.text);
    return s;
}

static void measure_copy(void) {
#if GPU
    size_t bytes = (size_t)1 << 30;
    char *a = array<char>(bytes), *b = array<char>(bytes);
    copy_rate = 2.0 * (double)bytes / seconds([&] {
        CUDA_CHECK(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, cuda_stream));
    });
    device_free(a);
    device_free(b);
    printf("result copy_bandwidth %.0f GB/s\n", 1e-9 * copy_rate);
#endif
    matmul_rate = cuda_matmul_peak();
    if (GPU) printf("result matmul_rate %.0f TFLOP/s\n", 1e-12 * matmul_rate);
}

static void elementwise(void) {
    const size_t N = SIZE(16384, 8), X = sizeof(floatX);
    const int C = SIZE(4096, 64), FF = SIZE(14336, 96), HS = SIZE(128, 16), NH = C / HS, V = SIZE(128256, 300);
    QuantSpec act = spec("int8,token,asymmetric", true);
    double NC = (double)N * C, NF = (double)N * FF;
    floatX *x = random_x(N * C, 2.0f), *d = random_x(N * C, 1.0f);
    floatX *res = array<floatX>(N * C), *y = array<floatX>(N * C);
    floatX *w = random_x((size_t)C, 1.0f), *wte = random_x((size_t)V * C, 1.0f);
    float *rstd = random_f32(N, 1.0f), *dw = array<float>((size_t)C);
    int32_t *tokens = random_tokens(N, V);
    for (int q = 0; q < 2; q++)
        memory_bound(q ? "rmsnorm_fq_forward_int8" : "rmsnorm_fq_forward", 4 * NC * X, seconds([&] {
            ops->rmsnorm_fq_forward(res, y, rstd, nullptr, x, d, w, N, C, 1e-5f, q ? &act : nullptr);
        }));
    memory_bound("rmsnorm_backward", 4 * NC * X, seconds([&] {
        ops->rmsnorm_backward(res, dw, d, nullptr, x, w, rstd, N, C);
    }));
    memory_bound("fakequant_forward", 2 * NC * X, seconds([&] { ops->fakequant_forward(y, nullptr, x, N, C, &act); }));
    float *cos_t = random_f32(N * (size_t)(HS / 2), 1.0f), *sin_t = random_f32(N * (size_t)(HS / 2), 1.0f);
    memory_bound("rope", 2 * NC * X, seconds([&] {
        ops->rope(x, cos_t, sin_t, N, SIZE(2048, 8), 0, C, NH, HS, false);
    }));
    memory_bound("embedding_forward", 2 * NC * X, seconds([&] { ops->embedding_forward(y, tokens, wte, N, C, V); }));
    float *dwte = array<float>((size_t)V * C);
    memory_bound("embedding_backward", NC * (X + 8), seconds([&] {
        ops->embedding_backward(dwte, d, tokens, N, C, V);
    }));
    device_free(dwte);
    floatX *gateup = random_x(2 * N * FF, 2.0f), *dgateup = array<floatX>(2 * N * FF), *ffn = random_x(N * FF, 1.0f);
    for (int q = 0; q < 2; q++)
        memory_bound(q ? "swiglu_fq_forward_int8" : "swiglu_fq_forward", 3 * NF * X, seconds([&] {
            ops->swiglu_fq_forward(ffn, nullptr, gateup, N, FF, q ? &act : nullptr);
        }));
    memory_bound("swiglu_backward", 5 * NF * X, seconds([&] {
        ops->swiglu_backward(dgateup, ffn, nullptr, gateup, N, FF);
    }));
    device_free(gateup); device_free(dgateup); device_free(ffn);
    size_t n = SIZE(2048, 4);
    float *logits = random_f32(n * (size_t)V, 5.0f), *losses = array<float>(n);
    floatX *dlogits = array<floatX>(n * (size_t)V);
    memory_bound("classifier", (double)n * V * (4 + X), seconds([&] {
        ops->classifier(losses, dlogits, logits, tokens, n, V);
    }));
    for (void *p : {(void *)x, (void *)d, (void *)res, (void *)y, (void *)w, (void *)wte, (void *)rstd, (void *)dw,
                    (void *)tokens, (void *)cos_t, (void *)sin_t, (void *)logits, (void *)losses, (void *)dlogits})
        device_free(p);
}

static void update(void) {
    const int64_t rows = SIZE(14336 * 4, 8), cols = SIZE(4096, 64);
    const size_t n = (size_t)(rows * cols);
    const double P = (double)n;
    float *master = random_f32(n, 0.1f), *m = random_f32(n, 0.01f), *v = array<float>(n), *grad = random_f32(n, 0.01f);
    floatX *work = array<floatX>(n);
    float *wscale = array<float>((size_t)rows);
    StepState host = {};
    host.t = 10; host.lr = 1e-5f; host.grad_scale = 1.0f; host.tokens = 1;
    StepState *state = array<StepState>(1);
    device_copy_in(state, &host, sizeof host);
    AdamWParams h = {0.9, 0.999, 1e-8, 0.01};
    QuantSpec none = {}, int4 = spec("int4,group=32,symmetric", false), wo = spec("uint4,group=64,float", false),
              int8 = spec("int8,channel", false);
    memory_bound("sum_squares", 4 * P, seconds([&] { ops->sum_squares(state, grad, n); }));
    device_copy_in(state, &host, sizeof host);
    const struct { const char *name; const QuantSpec *s; } kinds[] = {
        {"adamw", &none}, {"adamw_fq_int4_32", &int4}, {"adamw_fq_int4wo_64", &wo}, {"adamw_fq_int8_channel", &int8}};
    for (auto &k : kinds)
        memory_bound(k.name, P * (28 + sizeof(floatX)), seconds([&] {
            ops->adamw_fq(master, m, v, work, wscale, grad, state, &h, k.s, rows, cols);
        }));
    memory_bound("adamw_alone", P * 28, seconds([&] {
        ops->adamw_fq(master, m, v, nullptr, nullptr, grad, state, &h, nullptr, rows, cols);
    }));
    memory_bound("weight_fq_int4_32", P * (4 + sizeof(floatX)), seconds([&] {
        ops->weight_fq(work, wscale, master, &int4, rows, cols);
    }));
    uint8_t *codes = array<uint8_t>(n / 2);
    float *scale = random_f32(n / 32, 0.01f);
    memory_bound("dequant_rows_int4_32", P * (0.5 + 4.0 / 32 + sizeof(floatX)), seconds([&] {
        ops->dequant_rows(work, wscale, codes, scale, nullptr, &int4, rows, cols);
    }));
    // Between 8 ranks: what a rank sends of its weights, what it makes of all that come, and its part of the gradients.
    const int R = 8;
    RowSplit split = {rows, 1, R, 0};
    const struct { const char *name; const QuantSpec *s; double bits; } packs[] = {
        {"int4_32", &int4, 4 + 16.0 / 32}, {"int4wo_64", &wo, 4 + 32.0 / 64}, {"int8_channel", &int8, 8}};
    for (auto &k : packs) {
        int64_t kn = split_most(&split), block[2];
        Err err;
        if (quant_block_shape(k.s, kn, cols, block, &err) < 0) fail(k.name, err.text);
        size_t stride = quant_wire_layout(k.s, kn, cols, block).bytes;
        uint8_t *wire = array<uint8_t>(R * stride);
        char name[64];
        snprintf(name, sizeof name, "weight_pack_%s", k.name);
        memory_bound(name, P * (4 + k.bits / 8), seconds([&] {
            for (int r = 0; r < R; r++)
                ops->weight_pack(wire + (size_t)r * stride, master + split_begin(&split, r) * cols, k.s,
                                 split_count(&split, r), cols, kn);
        }));
        snprintf(name, sizeof name, "weight_unpack_%s", k.name);
        memory_bound(name, P * (k.bits / 8 + sizeof(floatX)), seconds([&] {
            ops->weight_unpack(work, wscale, wire, stride, &split, 0, kn, k.s, cols);
        }));
        device_free(wire);
    }
    size_t part = (size_t)(split_most(&split) * cols), row_bytes = (size_t)cols * sizeof(float);
    memory_bound("rows_pack", 8 * P, seconds([&] {
        ops->rows_pack(m, part * sizeof(float), grad, &split, 0, split_most(&split), row_bytes);
    }));
    memory_bound("rows_unpack", 8 * P, seconds([&] {
        ops->rows_unpack(m, grad, part * sizeof(float), &split, 0, split_most(&split), row_bytes);
    }));
    memory_bound("sum_ranks", 4 * (P + (double)part), seconds([&] { ops->sum_ranks(v, grad, part, R, part, false); }));
    for (void *p : {(void *)master, (void *)m, (void *)v, (void *)grad, (void *)work, (void *)wscale, (void *)state,
                    (void *)codes, (void *)scale})
        device_free(p);
}

// The step of what is kept in few bits, with rows of three widths; then floats to INT8 rows, and bf16 to f32.
static void update_low(void) {
    static const char *const params[] = {"f32", "bf16", "int8"};
    static const char *const states[] = {"f32", "bf16", "int8", "int4", "fp8"};
    const struct { ParamFormat p; StateFormat s; int64_t cols; } kinds[] = {
        {PARAM_INT8, STATE_INT8, SIZE(4096, 256)}, {PARAM_INT8, STATE_INT8, SIZE(576, 64)},
        {PARAM_INT8, STATE_INT8, SIZE(14336, 512)}, {PARAM_INT8, STATE_INT4, SIZE(4096, 128)},
        {PARAM_INT8, STATE_FP8, SIZE(4096, 256)}, {PARAM_BF16, STATE_INT8, SIZE(4096, 256)},
        {PARAM_F32, STATE_INT8, SIZE(4096, 256)}};
    const size_t n = SIZE((size_t)14336 * 4 * 4096, 2048), words = n / 4;      // any bytes are codes
    const double P = (double)n;
    uint8_t *m = (uint8_t *)random_tokens(words, 1 << 30), *v = array<uint8_t>(n);
    device_zero(v, n);
    float *p = random_f32(n, 0.1f), *grad = random_f32(n, 0.01f), *scale = random_f32(n / 64, 0.001f);
    float *ms = random_f32(n / 128, 0.01f), *vs = random_f32(n / 128, 0.001f);
    bf16 *half = array<bf16>(n);
    StepState host = {};
    host.t = 10; host.lr = 1e-5f; host.grad_scale = 1.0f; host.tokens = 1;
    StepState *state = array<StepState>(1);
    device_copy_in(state, &host, sizeof host);
    AdamWParams h = {0.9, 0.999, 1e-8, 0.01};
    char name[64];
    for (auto &k : kinds) {
        const int64_t rows = (int64_t)n / k.cols / 4 * 4;      // whole blocks of moments
        double bytes = 4 + 2.0 * (double)param_value_bytes(k.p) + 4.0 * (double)state_data_bytes(k.s, 2) / 2;
        snprintf(name, sizeof name, "adamw_low_%s_%s_%d", params[k.p], states[k.s], (int)k.cols);
        StoredParam param = {k.p, p, k.p == PARAM_INT8 ? scale : nullptr};
        StoredState sm = {k.s, m, state_block(k.s) ? ms : nullptr}, sv = {k.s, v, state_block(k.s) ? vs : nullptr};
        memory_bound(name, (double)(rows * k.cols) * bytes, seconds([&] {
            ops->adamw_low(param, sm, sv, nullptr, nullptr, grad, state, &h, nullptr, ROUND_STOCHASTIC, 1, 0, rows,
                           k.cols);
        }));
    }
    const int64_t cols = SIZE(4096, 64);
    memory_bound("int8_rows", P * 5, seconds([&] {
        ops->int8_rows((int8_t *)m, scale, {PARAM_F32, grad, nullptr}, (int64_t)n / cols, cols);
    }));
    memory_bound("widen", P * 6, seconds([&] { ops->widen(p, half, n); }));
    for (void *q : {(void *)m, (void *)v, (void *)p, (void *)grad, (void *)scale, (void *)ms, (void *)vs, (void *)half,
                    (void *)state})
        device_free(q);
}

static void attention(void) {
    const int heads[][3] = {{32, 8, 128}, {32, 8, 64}, {9, 3, 64}};           // 8B, 1B, 135M
    const int B = SIZE(4, 1), T = SIZE(4096, 40);
    for (auto &h : heads) {
        int NH = SIZE(h[0], 2), NKV = SIZE(h[1], 1), HS = h[2], NHS = NH * HS, QKV = NHS + 2 * NKV * HS;
        size_t N = (size_t)B * T;
        floatX *qkv = random_x(N * (size_t)QKV, 1.0f), *o = array<floatX>(N * (size_t)NHS);
        floatX *dout = random_x(N * (size_t)NHS, 1.0f), *dqkv = array<floatX>(N * (size_t)QKV);
        float *lse = array<float>(N * (size_t)NH);
        // Causal: half of the 4 B NH T T HS multiplications and additions of two matmuls.
        double flops = 2.0 * B * NH * (double)T * T * HS;
        char name[64];
        snprintf(name, sizeof name, "attention_forward_%dx%dx%d", h[0], h[1], HS);
        compute_bound(name, flops, seconds([&] {
            ops->attention_forward(o, lse, qkv, qkv + NHS, qkv + NHS + NKV * HS, B, T, T, NH, NKV, HS, NHS, QKV, QKV,
                                   (size_t)T * QKV);
        }));
        snprintf(name, sizeof name, "attention_backward_%dx%dx%d", h[0], h[1], HS);
        compute_bound(name, 2.5 * flops, seconds([&] {
            ops->attention_backward(dqkv, dout, qkv, o, lse, B, T, NH, NKV, HS);
        }));
        for (void *p : {(void *)qkv, (void *)o, (void *)dout, (void *)dqkv, (void *)lse}) device_free(p);
    }
    // One token after a long cache: bound by the cache's bytes.
    const int NH = 32, NKV = 8, HS = 128, Tk = SIZE(32768, 70), Bd = SIZE(4, 1);
    size_t width = 2 * (size_t)NKV * HS;
    floatX *q = random_x((size_t)Bd * NH * HS, 1.0f), *cache = random_x((size_t)Bd * Tk * width, 1.0f);
    floatX *o = array<floatX>((size_t)Bd * NH * HS);
    memory_bound("attention_decode", (double)Bd * Tk * (double)width * sizeof(floatX), seconds([&] {
        ops->attention_forward(o, nullptr, q, cache, cache + NKV * HS, Bd, 1, Tk, NH, NKV, HS, NH * HS, NH * HS,
                               (int)width, (size_t)Tk * width);
    }));
    device_free(q); device_free(cache); device_free(o);
}

// The linears of a block of the 8B shape, forward and both gradients: weights as bf16, as INT8 codes that become bf16,
// and by integer products. Beside each its rate, then the whole block's time as bf16 against the two others.
static void linears(void) {
    const int shapes[][2] = {{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}};      // C, OC
    const size_t N = SIZE(16384, 32);
    enum { BF16, W8, I8, KINDS };
    const char *const kinds[KINDS] = {"linear", "linear_w8", "linear_i8"};
    double whole[KINDS] = {};
    for (auto &shape : shapes) {
        const int C = shape[0] / SIZE(1, 64), OC = shape[1] / SIZE(1, 64);
        floatX *x = random_x(N * (size_t)C, 1.0f), *dy = random_x(N * (size_t)OC, 1.0f);
        floatX *w = random_x((size_t)OC * (size_t)C, 1.0f), *scaled = array<floatX>(N * (size_t)OC);
        floatX *y = array<floatX>(N * (size_t)OC), *dx = array<floatX>(N * (size_t)C);
        float *dw = random_f32((size_t)OC * (size_t)C, 1.0f), *wscale = array<float>((size_t)OC);
        int8_t *codes = array<int8_t>((size_t)OC * (size_t)C);
        ops->int8_rows(codes, wscale, StoredParam{PARAM_F32, dw, nullptr}, OC, C);
        for (int k = 0; k < KINDS; k++) {
            char name[64];
            auto line = [&](const char *what, double s) {
                snprintf(name, sizeof name, "%s_%s_%dx%d", kinds[k], what, shape[0], shape[1]);
                compute_bound(name, 2.0 * (double)N * C * OC, s);
                whole[k] += s;
            };
            line("forward", seconds([&] {
                if (k == BF16) ops->linear_forward(y, x, w, nullptr, N, C, OC);
                else if (k == W8) ops->linear_w8_forward(y, x, codes, wscale, N, C, OC);
                else ops->linear_i8_forward(y, x, codes, wscale, N, C, OC);
            }));
            line("backward_input", seconds([&] {
                if (k == BF16) ops->linear_backward_input(dx, dy, w, nullptr, nullptr, N, C, OC);
                else if (k == W8) ops->linear_w8_backward_input(dx, dy, codes, wscale, scaled, N, C, OC);
                else ops->linear_i8_backward_input(dx, dy, codes, wscale, N, C, OC);
            }));
            line("backward_weight", seconds([&] {              // weight-only has no other
                if (k == I8) ops->linear_i8_backward_weight(dw, dy, x, N, C, OC, true);
                else ops->linear_backward_weight(dw, dy, x, N, C, OC, true);
            }));
        }
        for (void *p : {(void *)x, (void *)dy, (void *)w, (void *)scaled, (void *)y, (void *)dx, (void *)dw,
                        (void *)wscale, (void *)codes})
            device_free(p);
    }
    for (int k = W8; k < KINDS; k++)
        if (GPU) printf("result %s_8B_block_speedup %.3f ratio      # %.2f ms, bf16 %.2f ms\n", kinds[k],
                        whole[BF16] / whole[k], 1e3 * whole[k], 1e3 * whole[BF16]);
        else printf("ran %s_8B_block\n", kinds[k]);
}

// The matmuls of one token through blocks of the 8B shape, weights larger than the L2 cache in every scheme.
static void decode(void) {
    const int shapes[][2] = {{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}};      // C, OC
    const int blocks = SIZE(3, 1), part = SIZE(1, 32);
    const struct { const char *name, *spec; } schemes[] = {
        {"decode_bf16", nullptr}, {"decode_int8wo", "int8,channel"}, {"decode_int4wo_64", "uint4,group=64,float"},
        {"decode_8da4w_64", "int4,group=64,symmetric"}};
    for (auto &scheme : schemes) {
        QuantSpec s = {};
        if (scheme.spec) s = spec(scheme.spec, false);
        struct { floatX *x, *y, *w; uint8_t *codes; float *scale, *zero; int C, OC; } l[12];
        double bytes = 0;
        int n = 0;
        for (int b = 0; b < blocks; b++)
            for (auto &shape : shapes) {
                auto &k = l[n++];
                k.C = shape[0] / part; k.OC = shape[1] / part;
                size_t size = (size_t)k.C * k.OC, groups = scheme.spec && s.gran == QG_GROUP ? size / 64 : (size_t)k.OC;
                k.x = random_x((size_t)k.C, 1.0f);
                k.y = array<floatX>((size_t)k.OC);
                k.w = scheme.spec ? nullptr : random_x(size, 1.0f);
                k.codes = scheme.spec ? (uint8_t *)random_tokens(size * s.bits / 32 + 4, 1 << 30) : nullptr;
                k.scale = scheme.spec ? random_f32(groups, 0.01f) : nullptr;
                k.zero = scheme.spec && s.zero == QZ_FLOAT ? random_f32(groups, 0.01f) : nullptr;
                bytes += scheme.spec ? (double)size * s.bits / 8 + 4.0 * (double)groups * (k.zero ? 2 : 1)
                                     : (double)size * sizeof(floatX);
            }
        double t = seconds([&] {
            for (int i = 0; i < n; i++)
                if (l[i].w) ops->linear_forward(l[i].y, l[i].x, l[i].w, nullptr, 1, l[i].C, l[i].OC);
                else ops->qmatvec_forward(l[i].y, l[i].x, l[i].codes, l[i].scale, l[i].zero, &s, 1, l[i].C, l[i].OC);
        });
        memory_bound(scheme.name, bytes, t);
        if (GPU) printf("result %s_8B_blocks %.1f tokens/s      # matmuls of 32 blocks alone\n", scheme.name,
                        1.0 / (t / blocks * 32));
        for (int i = 0; i < n; i++)
            for (void *p : {(void *)l[i].x, (void *)l[i].y, (void *)l[i].w, (void *)l[i].codes, (void *)l[i].scale,
                            (void *)l[i].zero})
                device_free(p);
    }
}

int main(void) {
    Err err;
    if (device_init("cuda", 0, &err) < 0) fail("device", err.text);
    printf("device %s\n", device_description());
    measure_copy();
    elementwise();
    update();
    update_low();
    attention();
    linears();
    decode();
    if (device_sync(&err) < 0) fail("an operation", err.text);
    return 0;
}
