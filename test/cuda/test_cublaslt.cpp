// The twin of cuBLASLt: its products, its rules (each violation planted here must be caught), and how the CUDA wing
// uses the library, which only the twin shows.
#ifndef __CUDACC__
#include "cuda_test.h"
#include "cuda/cublaslt.cuh"
#include "cuda/matmul.cuh"
#include "cublaslt_sim.h"

// A matmul that breaks no rule unless a field is changed. Matrices are (m, k), (k, n), (m, n), by columns.
struct Setup {
    cudaDataType_t in = CUDA_R_16BF, out = CUDA_R_16BF, scale = CUDA_R_32F;
    cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
    int32_t ta = CUBLAS_OP_T, tb = CUBLAS_OP_N, mode = CUBLASLT_POINTER_MODE_HOST, batch = 1;
    int64_t m = 32, n = 16, k = 64, lda = 0, ldd = 0, gap = 0;  // 0: no gap between columns, none between batches
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT, alignment = 16, reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
    bool no_bias = false;
    float alpha = 1.0f, beta = 0.0f;
    // Mistakes of the call itself.
    int64_t other_n = 0;                // a matmul of other columns than the heuristic was asked for
    bool check_other = false;           // but with cublasLtMatmulAlgoCheck
    size_t offset_a = 0, offset_workspace = 0, missing_workspace = 0, missing_a = 0;
    bool host_b = false, host_alphas = false, d_is_a = false, shifted_c = false, made_up = false, destroyed = false;
    bool wide_attribute = false, other_type_d = false, null_beta = false;

    std::vector<uint8_t> a, b, c, d;    // their bytes, for those who want the result
    static size_t size(cudaDataType_t t) {
        return t == CUDA_R_16BF ? 2 : t == CUDA_R_8I || t == CUDA_R_8F_E4M3 ? 1 : 4;
    }
    static float number(cudaDataType_t t, const std::vector<uint8_t> &v, size_t i) {
        if (t == CUDA_R_32F) { float f; memcpy(&f, &v[4 * i], 4); return f; }
        if (t == CUDA_R_32I) { int32_t f; memcpy(&f, &v[4 * i], 4); return (float)f; }
        if (t == CUDA_R_16BF) { bf16 f; memcpy(&f, &v[2 * i], 2); return bf16_to_f32(f); }
        if (t == CUDA_R_8I) return (float)(int8_t)v[i];
        int e = v[i] >> 3 & 15;                                // e4m3: here never NaN
        float f = e ? (1.0f + (float)(v[i] & 7) / 8.0f) * ldexpf(1.0f, e - 7) : (float)(v[i] & 7) / 512.0f;
        return v[i] & 0x80 ? -f : f;
    }
    // Small whole numbers and halves, so that any order of sums gives the same.
    static std::vector<uint8_t> numbers(cudaDataType_t t, size_t n, uint64_t stream) {
        static const uint8_t e4m3[8] = {0x00, 0x38, 0xb8, 0x40, 0x44, 0xc4, 0x30, 0xb0};     // 0 1 -1 2 3 -3 1/2 -1/2
        std::vector<uint8_t> v(n * size(t));
        for (size_t i = 0; i < n; i++) {
            int small = (int)(4.0f * uniform(stream, i));
            float f = (float)small;
            bf16 h = bf16_from_f32(f);
            if (t == CUDA_R_32F) memcpy(&v[4 * i], &f, 4);
            else if (t == CUDA_R_32I) memcpy(&v[4 * i], &small, 4);
            else if (t == CUDA_R_16BF) memcpy(&v[2 * i], &h, 2);
            else if (t == CUDA_R_8I) v[i] = (uint8_t)small;
            else v[i] = e4m3[i * 37 / 4 % 8];
        }
        return v;
    }

    void run() {
        cublasLtHandle_t handle;
        cublasLtMatmulDesc_t desc;
        cublasLtMatrixLayout_t A, B, C, D;
        cublasLtMatmulPreference_t preference;
        cublasLtCreate(&handle);
        cublasLtMatmulDescCreate(&desc, compute, scale);
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, wide_attribute ? 8 : sizeof ta);
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb);
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_POINTER_MODE, &mode, sizeof mode);
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);

        int64_t ra = ta ? k : m, ca = ta ? m : k, rb = tb ? n : k, cb = tb ? k : n;
        int64_t la = lda ? lda : ra, ld = ldd ? ldd : m;
        cudaDataType_t type_d = other_type_d ? CUDA_R_32F : out;
        cublasLtMatrixLayoutCreate(&A, in, (uint64_t)ra, (uint64_t)ca, la);
        cublasLtMatrixLayoutCreate(&B, in, (uint64_t)rb, (uint64_t)cb, rb);
        cublasLtMatrixLayoutCreate(&C, out, (uint64_t)m, (uint64_t)n, ld);
        cublasLtMatrixLayoutCreate(&D, type_d, (uint64_t)m, (uint64_t)n, ld);
        const int64_t strides[3] = {la * ca + gap, rb * cb + gap, ld * n + gap};
        for (cublasLtMatrixLayout_t l : {A, B, C, D}) {
            const int64_t *stride = &strides[l == A ? 0 : l == B ? 1 : 2];
            cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch);
            cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, stride, sizeof *stride);
        }
        a = numbers(in, (size_t)(strides[0] * batch), 21);
        b = numbers(in, (size_t)(strides[1] * batch), 22);
        c = numbers(out, (size_t)(strides[2] * batch), 23);
        a.resize(a.size() - missing_a);
        c.resize(c.size() + 32);                               // room for a C that is not D
        Device<uint8_t> da(a, offset_a), db(b), dc(c);
        Device<float> alphas(std::vector<float>((size_t)m, alpha)), bias(std::vector<float>((size_t)m, 0.0f));
        const void *bias_pointer = no_bias ? nullptr : bias.p;
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_pointer, sizeof bias_pointer);

        const uint64_t workspace_bytes = 1 << 16;
        cublasLtMatmulPreferenceCreate(&preference);
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                                             sizeof workspace_bytes);
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction,
                                             sizeof reduction);
        for (int i = 0; i < 4; i++)
            cublasLtMatmulPreferenceSetAttribute(
                preference, (cublasLtMatmulPreferenceAttributes_t)(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES + i),
                &alignment, sizeof alignment);
        cublasLtMatmulHeuristicResult_t result;
        int found = 0;
        cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, desc, A, B, C, D, preference, 1, &result,
                                                               &found);
        CHECK(status == CUBLAS_STATUS_SUCCESS && found == 1, "the heuristic: %s", cublasLtGetStatusString(status));
        if (found != 1) return;

        if (other_n) {
            cublasLtMatrixLayoutCreate(&B, in, (uint64_t)k, (uint64_t)other_n, k);
            cublasLtMatrixLayoutCreate(&D, out, (uint64_t)m, (uint64_t)other_n, m);
            C = D;
            cublasLtMatmulHeuristicResult_t again = {};
            if (check_other) cublasLtMatmulAlgoCheck(handle, desc, A, B, C, D, &result.algo, &again);
        }
        if (made_up) result.algo = cublasLtMatmulAlgo_t();
        if (destroyed) cublasLtMatrixLayoutDestroy(B);
        Device<uint8_t> workspace(workspace_bytes + 256);
        uintptr_t aligned = ((uintptr_t)workspace.p + 255) / 256 * 256;
        int32_t one = 1, zero = 0;
        bool vector = mode >= CUBLASLT_POINTER_MODE_DEVICE_VECTOR, ints = scale == CUDA_R_32I;
        const void *host_alpha = ints ? (const void *)&one : &alpha, *host_beta = ints ? (const void *)&zero : &beta;
        void *target = d_is_a ? (void *)da.p : dc.p;
        const void *from = shifted_c ? (const void *)(dc.p + 16) : target;
        status = cublasLtMatmul(handle, desc, vector && !host_alphas ? alphas.p : host_alpha, da.p, A,
                                host_b ? b.data() : db.p, B, null_beta ? nullptr : host_beta, from, C, target, D,
                                &result.algo, (void *)(aligned + offset_workspace),
                                result.workspaceSize - missing_workspace, 0);
        CHECK(status == CUBLAS_STATUS_SUCCESS, "the matmul: %s", cublasLtGetStatusString(status));
        d = dc.host();
        cublasLtMatmulPreferenceDestroy(preference);
        for (cublasLtMatrixLayout_t l : {A, B}) if (!destroyed) cublasLtMatrixLayoutDestroy(l);
        cublasLtMatmulDescDestroy(desc);
        cublasLtDestroy(handle);
    }

    void check(const char *name) {
        run();
        int64_t ra = ta ? k : m, ca = ta ? m : k, rb = tb ? n : k, cb = tb ? k : n;
        int64_t la = lda ? lda : ra, ld = ldd ? ldd : m;
        int bad = 0;
        for (int32_t i = 0; i < batch; i++)
            for (int64_t row = 0; row < m; row++)
                for (int64_t column = 0; column < n; column++) {
                    float sum = 0.0f;
                    for (int64_t l = 0; l < k; l++)
                        sum += number(in, a, (size_t)(i * (la * ca + gap) + (ta ? l + row * la : row + l * la))) *
                               number(in, b, (size_t)(i * (rb * cb + gap) + (tb ? column + l * rb : l + column * rb)));
                    size_t at = (size_t)(i * (ld * n + gap) + row + column * ld);
                    float want = alpha * sum + (beta == 0.0f ? 0.0f : beta * number(out, c, at));
                    if (out == CUDA_R_16BF) want = bf16_round(want);
                    if (out == CUDA_R_8I) want = want < -128.0f ? -128.0f : want > 127.0f ? 127.0f : rintf(want);
                    bad += number(out, d, at) != want;
                }
        CHECK(bad == 0, "%s: %d of %d wrong", name, bad, (int)(m * n * batch));
    }
};

CUDA_TEST(cublaslt_twin_products) {
    set_order(0);
    Setup s;
    s.check("bf16 TN");
    s.ta = s.tb = CUBLAS_OP_N; s.check("bf16 NN");
    s.tb = CUBLAS_OP_T; s.out = CUDA_R_32F; s.beta = 1.0f; s.check("bf16 NT to f32, added");
    s.ta = CUBLAS_OP_T; s.alpha = 0.5f; s.beta = 2.0f; s.lda = 72; s.ldd = 40; s.check("alpha, beta, gaps in columns");
    s.batch = 3; s.gap = 8; s.check("batches");
    s = Setup();
    s.in = s.out = CUDA_R_32F; s.epilogue = CUBLASLT_EPILOGUE_BIAS; s.check("f32, a bias of zeros");
    s = Setup();
    s.reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; s.k = 160; s.out = CUDA_R_32F; s.check("split sums");
    s = Setup();
    s.in = CUDA_R_8I; s.out = s.scale = CUDA_R_32I; s.compute = CUBLAS_COMPUTE_32I; s.n = 7; s.check("int8 to int32");
    s.out = CUDA_R_8I; s.scale = CUDA_R_32F; s.n = 8; s.alpha = 0.25f; s.check("int8 to int8");
    s.mode = CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_HOST; s.check("int8, a vector of alphas");
    s = Setup();
    s.in = CUDA_R_8F_E4M3; s.check("e4m3 to bf16");
    s.out = CUDA_R_32F; s.check("e4m3 to f32");
    s = Setup();
    s.other_n = 8; s.check_other = true; s.run();              // allowed
}

#define PLANT(name, word, ...) check_dies(name, [] { Setup s; __VA_ARGS__; s.run(); }, word, nullptr)
CUDA_TEST(cublaslt_planted) {
    PLANT("columns that overlap", "leading dimension 60 of A is less", s.lda = 60);
    PLANT("a pointer less aligned than promised", "not aligned to the 16 bytes", s.offset_a = 2);
    PLANT("the default promise of 256 bytes", "not aligned to the 256 bytes", s.alignment = 256; s.offset_a = 64);
    PLANT("a matrix beyond its allocation", "is not device memory", s.missing_a = 2);
    PLANT("a matrix in host memory", "is not device memory", s.host_b = true);
    PLANT("D of another type than C", "table of types", s.other_type_d = true);
    PLANT("f32 to bf16", "table of types", s.in = CUDA_R_32F);
    PLANT("int32 sums of bf16", "table of types", s.compute = CUBLAS_COMPUTE_32I);
    PLANT("a scale of another type", "table of types", s.scale = CUDA_R_32I);
    PLANT("int8, not TN", "TN form only", s.in = CUDA_R_8I; s.out = CUDA_R_32F; s.ta = CUBLAS_OP_N);
    PLANT("int8, m odd", "multiples of 4", s.in = CUDA_R_8I; s.out = CUDA_R_32F; s.m = 33);
    PLANT("int8, columns unaligned", "leading dimensions in multiples of 4", s.in = CUDA_R_8I; s.out = CUDA_R_32F;
          s.lda = 65);
    PLANT("int8, a pointer unaligned", "aligned to 4 bytes", s.in = s.out = CUDA_R_8I; s.compute = CUBLAS_COMPUTE_32I;
          s.alignment = 1; s.offset_a = 2);
    PLANT("fp8, not TN", "TN form only", s.in = CUDA_R_8F_E4M3; s.tb = CUBLAS_OP_T);
    PLANT("fp8, n not of 16", "multiples of 16", s.in = CUDA_R_8F_E4M3; s.n = 8);
    PLANT("fp8, columns unaligned", "aligned to 16 bytes", s.in = CUDA_R_8F_E4M3; s.lda = 72);
    PLANT("batches of D that overlap", "batches of D overlap", s.batch = 2; s.gap = -8);
    PLANT("batches unaligned", "batches of A are not aligned", s.batch = 2; s.gap = 2);
    PLANT("an algorithm made up", "none that a heuristic gave", s.made_up = true);
    PLANT("an algorithm for another n", "found for other sizes", s.other_n = 8);
    PLANT("a layout used after its end", "a layout was destroyed", s.destroyed = true);
    PLANT("an attribute of another size", "is set from 8", s.wide_attribute = true);
    PLANT("too little workspace", "the algorithm needs", s.reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
          s.missing_workspace = 4);
    PLANT("a workspace unaligned", "not aligned to 256 bytes", s.reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
          s.offset_workspace = 16);
    PLANT("D over A", "A and D overlap", s.d_is_a = true; s.out = CUDA_R_16BF);
    PLANT("C partly over D", "C and D overlap", s.shifted_c = true);
    PLANT("a bias that is not there", "needs a pointer to the bias", s.epilogue = CUBLASLT_EPILOGUE_BIAS;
          s.no_bias = true);
    PLANT("an unknown epilogue", "epilogue 2", s.epilogue = 2);
    PLANT("alphas in host memory", "not where the pointer mode says", cublaslt_sim.alpha_vectors = true;
          s.mode = CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO; s.host_alphas = true);
    PLANT("no beta", "alpha or beta is NULL", s.null_beta = true);
}

// ---------------------------------------------------------------------------------------------
// How the wing uses it.

struct Layer {
    static const int N = 40, C = 64, OC = 48;
    std::vector<floatX> hx, hw, hdy;
    Device<floatX> x, w, dy, y, dx, scaled;
    Device<float> f, dw, wscale;
    Layer()
        : hx(random_x(N * C, 31, 1.0f)), hw(random_x(OC * C, 32, 0.5f)), hdy(random_x(N * OC, 33, 1.0f)), x(hx), w(hw),
          dy(hdy), y(N * OC), dx(N * C), scaled(N * OC), f(N * OC), dw(OC * C),
          wscale(std::vector<float>((size_t)OC, 0.25f)) {}
    void step(const float *scale) {
        ops_cuda.linear_forward(y.p, x.p, w.p, scale, N, C, OC);
        ops_cuda.linear_forward_f32(f.p, x.p, w.p, scale, N, C, OC);
        ops_cuda.linear_backward_input(dx.p, dy.p, w.p, scale, scaled.p, N, C, OC);
        ops_cuda.linear_backward_weight(dw.p, dy.p, x.p, N, C, OC, false);
        ops_cuda.linear_backward_weight(dw.p, dy.p, x.p, N, C, OC, true);
    }
    void check_equal(Layer &o, const char *where) {
        check_same("y", where, y.host(), o.y.host());
        check_same("logits", where, f.host(), o.f.host());
        check_same("dx", where, dx.host(), o.dx.host());
        check_same("dw", where, dw.host(), o.dw.host());
    }
};

// The heuristic is asked when a shape is new; a step that has run once can be recorded, and replayed gives its bits.
CUDA_TEST(cublaslt_steady) {
    for (int order = 0; order < ORDERS; order++) {
        set_order(order);
        Layer eager, replayed;
        for (int scaled = 0; scaled < 2; scaled++) {
            eager.step(scaled ? eager.wscale.p : nullptr);
            size_t asked = cublaslt_sim.heuristics, checked = cublaslt_sim.checks, matmuls = cublaslt_sim.matmuls;
            cudaStream_t before = cuda_stream, own;
            CUDA_CHECK(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
            CUDA_CHECK(cudaDeviceSynchronize());
            cuda_stream = own;
            cudaGraph_t graph = nullptr;
            cudaGraphExec_t exec = nullptr;
            CUDA_CHECK(cudaStreamBeginCapture(own, cudaStreamCaptureModeGlobal));
            replayed.step(scaled ? replayed.wscale.p : nullptr);
            CUDA_CHECK(cudaStreamEndCapture(own, &graph));
            cuda_stream = before;
            CHECK(graph, "the step can be recorded");
            if (!graph) return;
            CUDA_CHECK(cudaGraphInstantiateWithFlags(&exec, graph, 0));
            CUDA_CHECK(cudaGraphLaunch(exec, own));
            CUDA_CHECK(cudaStreamSynchronize(own));
            CHECK(cublaslt_sim.matmuls == matmuls + 5, "all by the library: %zu", cublaslt_sim.matmuls - matmuls);
            CHECK(cublaslt_sim.heuristics == asked && cublaslt_sim.checks == checked, "nothing is asked twice");
            replayed.check_equal(eager, scaled ? "replayed, scaled" : "replayed");
            CUDA_CHECK(cudaGraphExecDestroy(exec));
            CUDA_CHECK(cudaGraphDestroy(graph));
            CUDA_CHECK(cudaStreamDestroy(own));
        }
    }
}

// More shapes than the cache of plans holds; C = 16 is no other test's.
CUDA_TEST(cublaslt_many_shapes) {
    set_order(0);
    const size_t most = 1200;
    std::vector<floatX> hx = random_x(most * 16, 41, 1.0f), hw = random_x(16 * 16, 42, 1.0f);
    Device<floatX> x(hx), w(hw), y(most * 16);
    ops_cuda.linear_forward(y.p, x.p, w.p, nullptr, most, 16, 16);
    std::vector<floatX> all = y.host();
    for (size_t N = most - 1; N > CUDA_MATVEC_TOKENS; N -= N > 100 ? 1 : 7)
        ops_cuda.linear_forward(y.p, x.p, w.p, nullptr, N, 16, 16);
    check_same("y", "after a thousand shapes", y.host(), all);
}

// What the library may refuse. Sizes are new each time, since answers are kept.
CUDA_TEST(cublaslt_refuses) {
    set_order(0);
    struct { const char *name; bool CublasLtSim::*refuse; size_t matmuls; } cases[] = {
        {"it finds nothing", &CublasLtSim::nothing_fits, 0},
        {"it takes no other algorithm", &CublasLtSim::refuse_checks, 1},
        {"it takes a vector of alphas", &CublasLtSim::alpha_vectors, 1},
        {"and the vector is not aligned", &CublasLtSim::alpha_vectors, 1}};
    int N = 17;
    for (auto &c : cases) {
        int C = 32, OC = 16 + 8 * ++N;
        Device<floatX> x(random_x((size_t)(N * C), 61, 1.0f)), w(random_x((size_t)(OC * C), 62, 1.0f));
        Device<floatX> y(std::vector<floatX>((size_t)(N * OC))), z((size_t)(N * OC));
        bool unaligned = &c == cases + 3;
        Device<float> wscale(std::vector<float>((size_t)OC, 0.125f), unaligned);     // exact: any rounding is the same
        cublaslt_sim.*c.refuse = true;
        size_t before = cublaslt_sim.matmuls, kernels = cudasim::launches();
        ops_cuda.linear_forward(y.p, x.p, w.p, wscale.p, (size_t)N, C, OC);
        size_t by_library = cublaslt_sim.matmuls - before, launched = cudasim::launches() - kernels;
        cublaslt_sim.*c.refuse = false;
        CHECK(by_library == c.matmuls, "%s: %zu of its matmuls", c.name, by_library);
        if (c.refuse == &CublasLtSim::alpha_vectors)
            CHECK(launched == (unaligned ? 2u : 1u), "%s: %zu kernels", c.name, launched);
        cuda_matmul_allow(0);
        ops_cuda.linear_forward(z.p, x.p, w.p, wscale.p, (size_t)N, C, OC);
        cuda_matmul_allow(MATMUL_ALL);
        std::vector<floatX> got = y.host(), want = z.host();
        for (size_t i = 0; i < got.size(); i++)
            CHECK(fabsf(value(got[i]) - value(want[i])) <= 0.01f * fabsf(value(want[i])) + 1e-4f, "%s: %g at %zu, "
                  "expected %g", c.name, (double)value(got[i]), i, (double)value(want[i]));
    }
}

CUDA_TEST(cublaslt_description) {
    CHECK(strcmp(cuda_matmul_description(), "cuBLASLt 13.0") == 0, "%s", cuda_matmul_description());
    cuda_matmul_allow(MATMUL_TILES);
    CHECK(strstr(cuda_matmul_description(), "QLLM_NO_CUBLASLT"), "%s", cuda_matmul_description());
    cuda_matmul_allow(MATMUL_ALL);
}
#endif
