// The twin of cuBLASLt: see cublaslt_sim.h. Matrices are stored by columns, element (i, j) at p[i + j * ld].
#include "cublaslt_sim.h"
#include "internal.h"
#include "scalar.h"
#include <vector>

CublasLtSim cublaslt_sim;

// ---------------------------------------------------------------------------------------------
// Descriptors. Destroyed ones stay where they are, so that a later use is seen.
#define LIVE 0x1ea5ed00u
#define DEAD 0xdeaddeadu

struct CublasLtHandle { unsigned state; };
struct CublasLtDesc {
    unsigned state;
    cublasComputeType_t compute;
    cudaDataType_t scale;
    int32_t pointer_mode, trans_a, trans_b;
    uint32_t epilogue;
    const void *bias;
};
struct CublasLtLayout {
    unsigned state;
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t batch;
    int64_t stride;
};
struct CublasLtPreference {
    unsigned state;
    uint64_t workspace;
    uint32_t reduction, alignment[4];
};

template <class T> static std::vector<T *> &every() { static auto *v = new std::vector<T *>; return *v; }
template <class T> static cublasStatus_t make(T **out, const T &value) {
    *out = new T(value);
    (*out)->state = LIVE;
    every<T>().push_back(*out);
    return CUBLAS_STATUS_SUCCESS;
}
template <class T> static T *live(T *p, const char *what) {
    for (T *q : every<T>())
        if (q == p) {
            if (p->state != LIVE) cudasim::fail("cuBLASLt: %s was destroyed", what);
            return p;
        }
    cudasim::fail("cuBLASLt: %s was never created", what);
}
template <class T> static cublasStatus_t destroy(T *p, const char *what) {
    live(p, what)->state = DEAD;
    return CUBLAS_STATUS_SUCCESS;
}
template <class T> static cublasStatus_t put(T *to, const void *value, size_t bytes) {
    if (!value || bytes != sizeof *to)
        cudasim::fail("cuBLASLt: an attribute of %zu bytes is set from %zu", sizeof *to, bytes);
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void) { return 130000; }
const char *cublasLtGetStatusString(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "success";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "the library was not initialized";
    case CUBLAS_STATUS_ALLOC_FAILED: return "the resource allocation failed";
    case CUBLAS_STATUS_INVALID_VALUE: return "an unsupported value or parameter was passed to the function";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "the function failed to launch on the GPU";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "the functionality requested is not supported";
    }
    return "unknown status";
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { return make(handle, {}); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle, "the handle"); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    return make(desc, {LIVE, compute, scale, CUBLASLT_POINTER_MODE_HOST, CUBLAS_OP_N, CUBLAS_OP_N,
                       CUBLASLT_EPILOGUE_DEFAULT, nullptr});
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t bytes) {
    live(desc, "a matmul descriptor");
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: return put(&desc->pointer_mode, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSA: return put(&desc->trans_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return put(&desc->trans_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return put(&desc->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return put(&desc->bias, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc, "a matmul descriptor"); }

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType_t type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    return make(layout, {LIVE, type, rows, cols, ld, 1, 0});
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void *value,
                                                size_t bytes) {
    live(layout, "a layout");
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return put(&layout->batch, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return put(&layout->stride, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout, "a layout"); }

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    return make(preference, {LIVE, 0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}});
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t bytes) {
    live(preference, "a preference");
    switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return put(&preference->workspace, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return put(&preference->reduction, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return put(&preference->alignment[0], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return put(&preference->alignment[1], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return put(&preference->alignment[2], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return put(&preference->alignment[3], value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return destroy(preference, "a preference");
}

// ---------------------------------------------------------------------------------------------
// A problem: all that descriptor and layouts say, by value.
enum { A, B, C, D };
static const char *const matrix_names = "ABCD";

struct Matrix { cudaDataType_t type; uint64_t rows, cols; int64_t ld, stride; };
struct Problem {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    int32_t pointer_mode, trans_a, trans_b;
    uint32_t epilogue;
    const void *bias;
    int64_t m, n, k;
    int32_t batch;
    Matrix x[4];
};

static size_t type_size(cudaDataType_t t) {
    switch (t) {
    case CUDA_R_32F: case CUDA_R_32I: return 4;
    case CUDA_R_16BF: return 2;
    case CUDA_R_8I: case CUDA_R_8F_E4M3: return 1;
    }
    cudasim::fail("cuBLASLt: type %d is none that the twin knows", (int)t);
}
static const char *type_name(cudaDataType_t t) {
    switch (t) {
    case CUDA_R_32F: return "f32";
    case CUDA_R_32I: return "int32";
    case CUDA_R_16BF: return "bf16";
    case CUDA_R_8I: return "int8";
    case CUDA_R_8F_E4M3: return "e4m3";
    }
    return "?";
}

// The rows of the manual's table of types for cublasLtMatmul that the twin computes. Compute type 32F, f32 scale:
//   bf16 x bf16 -> bf16 or f32;  f32 x f32 -> f32;  int8 x int8 -> f32;  e4m3 x e4m3 -> bf16 or f32
// Compute type 32I, int32 scale: int8 x int8 -> int32; f32 scale: int8 x int8 -> int8. TF32: f32 x f32 -> f32.
static bool types_supported(const Problem &p) {
    cudaDataType_t in = p.x[A].type, out = p.x[C].type;
    if (p.x[B].type != in || p.x[D].type != out) return false;
    switch (p.compute) {
    case CUBLAS_COMPUTE_32F:
        if (p.scale != CUDA_R_32F) return false;
        return out == CUDA_R_32F ? in != CUDA_R_32I : out == CUDA_R_16BF && (in == out || in == CUDA_R_8F_E4M3);
    case CUBLAS_COMPUTE_32F_FAST_TF32: return p.scale == CUDA_R_32F && in == CUDA_R_32F && out == CUDA_R_32F;
    case CUBLAS_COMPUTE_32I:
        return in == CUDA_R_8I && ((p.scale == CUDA_R_32I && out == CUDA_R_32I) ||
                                   (p.scale == CUDA_R_32F && out == CUDA_R_8I));
    }
    return false;
}

// What holds for a problem whoever computes it, from descriptors that live.
static Problem problem(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
    live(desc, "a matmul descriptor");
    Problem p;
    memset(&p, 0, sizeof p);                                   // its bytes are compared
    p.compute = desc->compute; p.scale = desc->scale;
    p.pointer_mode = desc->pointer_mode; p.trans_a = desc->trans_a; p.trans_b = desc->trans_b;
    p.epilogue = desc->epilogue;
    p.bias = desc->bias;
    CublasLtLayout *const layouts[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        const CublasLtLayout *l = live(layouts[i], "a layout");
        Matrix &x = p.x[i];
        x.type = l->type; x.rows = l->rows; x.cols = l->cols; x.ld = l->ld; x.stride = l->stride;
        char name = matrix_names[i];
        if (!l->rows || !l->cols) cudasim::fail("cuBLASLt: %c has no elements", name);
        if (l->ld < (int64_t)l->rows)
            cudasim::fail("cuBLASLt: leading dimension %lld of %c is less than its %llu rows", (long long)l->ld,
                                 name, (unsigned long long)l->rows);
        if (l->batch != d->batch) cudasim::fail("cuBLASLt: %c has another number of batches than D", name);
        if (l->batch < 1) cudasim::fail("cuBLASLt: %d batches", l->batch);
    }
    p.batch = d->batch;
    bool ta = p.trans_a != CUBLAS_OP_N, tb = p.trans_b != CUBLAS_OP_N;
    p.m = (int64_t)(ta ? a->cols : a->rows);
    p.k = (int64_t)(ta ? a->rows : a->cols);
    p.n = (int64_t)(tb ? b->rows : b->cols);
    if ((int64_t)(tb ? b->cols : b->rows) != p.k)
        cudasim::fail("cuBLASLt: op(A) has %lld columns, op(B) %llu rows", (long long)p.k,
                             (unsigned long long)(tb ? b->cols : b->rows));
    for (int i = C; i <= D; i++)
        if ((int64_t)p.x[i].rows != p.m || (int64_t)p.x[i].cols != p.n)
            cudasim::fail("cuBLASLt: %c is not %lld x %lld", matrix_names[i], (long long)p.m, (long long)p.n);
    if (p.batch > 1 && p.x[D].stride < p.x[D].ld * p.n)
        cudasim::fail("cuBLASLt: the batches of D overlap");
    if (!types_supported(p))
        cudasim::fail("cuBLASLt: no row of the table of types: %s x %s, C %s, D %s, compute type %d, scale %s",
                             type_name(p.x[A].type), type_name(p.x[B].type), type_name(p.x[C].type),
                             type_name(p.x[D].type), (int)p.compute, type_name(p.scale));
    bool tn = ta && !tb;
    if (p.x[A].type == CUDA_R_8I) {                            // "To use IMMA kernels", regular ordering
        if (!tn) cudasim::fail("cuBLASLt: int8 takes the TN form only");
        if (p.m % 4 || p.k % 4) cudasim::fail("cuBLASLt: int8 needs m and k in multiples of 4");
        for (int i = 0; i < 4; i++)
            if (p.x[i].ld % 4)
                cudasim::fail("cuBLASLt: int8 needs leading dimensions in multiples of 4 (%c)", matrix_names[i]);
        if (p.epilogue != CUBLASLT_EPILOGUE_DEFAULT && p.scale == CUDA_R_32I)
            cudasim::fail("cuBLASLt: int32 sums have no epilogue");
    }
    if (p.x[A].type == CUDA_R_8F_E4M3) {                       // "To use FP8 kernels"
        if (!tn) cudasim::fail("cuBLASLt: fp8 takes the TN form only");
        if (p.m % 16 || p.n % 16 || p.k % 16) cudasim::fail("cuBLASLt: fp8 needs m, n, k in multiples of 16");
        for (int i = 0; i < 4; i++)
            if (p.x[i].ld * (int64_t)type_size(p.x[i].type) % 16)
                cudasim::fail("cuBLASLt: fp8 needs columns aligned to 16 bytes (%c)", matrix_names[i]);
    }
    if (p.epilogue != CUBLASLT_EPILOGUE_DEFAULT && p.epilogue != CUBLASLT_EPILOGUE_BIAS)
        cudasim::fail("cuBLASLt: epilogue %u is none that the twin knows", p.epilogue);
    if (p.epilogue == CUBLASLT_EPILOGUE_BIAS && !p.bias)
        cudasim::fail("cuBLASLt: the epilogue needs a pointer to the bias");
    return p;
}

static bool vector_alpha(const Problem &p) {
    return p.pointer_mode == CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO ||
           p.pointer_mode == CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_HOST;
}

// Vectors of alphas are documented for int8 alone (BETA_HOST); whether a release takes them elsewhere, its heuristic
// says.
static bool pointer_mode_taken(const Problem &p) {
    switch (p.pointer_mode) {
    case CUBLASLT_POINTER_MODE_HOST: case CUBLASLT_POINTER_MODE_DEVICE: return true;
    case CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO: return cublaslt_sim.alpha_vectors && p.batch == 1;
    case CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_HOST:
        return cublaslt_sim.alpha_vectors || p.x[A].type == CUDA_R_8I;
    }
    return false;
}

// ---------------------------------------------------------------------------------------------
// Algorithms. What a cublasLtMatmulAlgo_t names by its number; data[1] is the check that it was not made up.
#define ALGO_MAGIC 0xb1a5a190u

struct Algorithm {
    uint32_t alignment[4];
    int64_t chunk;              // k of one chain of sums
    int splits;                 // parts of k that are summed apart
    uint32_t reduction;
    std::vector<Problem> fits;  // problems for which heuristic or check gave it
};
static std::vector<Algorithm> algorithms;

static Algorithm *algorithm(const cublasLtMatmulAlgo_t *algo) {
    if (!algo || algo->data[1] != ALGO_MAGIC || algo->data[0] >= algorithms.size())
        cudasim::fail("cuBLASLt: the algorithm is none that a heuristic gave");
    return &algorithms[algo->data[0]];
}
static size_t workspace_bytes_of(const Algorithm &g, const Problem &p) {
    return g.splits > 1 ? (size_t)p.m * (size_t)p.n * (size_t)p.batch * (size_t)g.splits * 4 : 0;
}
static bool same_problem(Problem a, Problem b) {
    a.bias = b.bias = nullptr;                                 // may change between calls
    return memcmp(&a, &b, sizeof a) == 0;
}
static bool fits(const Algorithm &g, const Problem &p) {
    for (const Problem &q : g.fits)
        if (same_problem(p, q)) return true;
    return false;
}
static cublasLtMatmulHeuristicResult_t result_of(uint64_t number, const Problem &p) {
    cublasLtMatmulHeuristicResult_t r = {};
    r.algo.data[0] = number;
    r.algo.data[1] = ALGO_MAGIC;
    r.workspaceSize = workspace_bytes_of(algorithms[number], p);
    r.state = CUBLAS_STATUS_SUCCESS;
    r.wavesCount = 1.0f;
    return r;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t *results, int *found) {
    live(handle, "the handle");
    live(preference, "a preference");
    if (wanted < 1 || !results || !found) cudasim::fail("cuBLASLt: a heuristic without room for its result");
    cublaslt_sim.heuristics++;
    Problem p = problem(desc, a, b, c, d);
    *found = 0;
    if (cublaslt_sim.nothing_fits || !pointer_mode_taken(p)) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (int i = 0; i < 4; i++) {
        uint32_t al = preference->alignment[i];
        if (!al || (al & (al - 1)) || al < type_size(p.x[i].type)) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    Algorithm g;
    memcpy(g.alignment, preference->alignment, sizeof g.alignment);
    g.chunk = p.n % 3 == 1 ? 24 : p.n >= 64 ? 64 : 32;         // another n, another order
    g.splits = 1;
    g.reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
    const uint32_t schemes[3] = {CUBLASLT_REDUCTION_SCHEME_INPLACE, CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE,
                                 CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE};
    for (uint32_t scheme : schemes) {                          // the least wanted first
        if (!(preference->reduction & scheme) || p.k < 32) continue;
        Algorithm split = g;
        split.splits = 4;
        split.reduction = scheme;
        if (workspace_bytes_of(split, p) > preference->workspace) continue;
        g = split;
        break;
    }
    g.fits.push_back(p);
    algorithms.push_back(g);
    results[0] = result_of(algorithms.size() - 1, p);
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *algo, cublasLtMatmulHeuristicResult_t *result) {
    live(handle, "the handle");
    if (!result) cudasim::fail("cuBLASLt: a check without room for its result");
    cublaslt_sim.checks++;
    Problem p = problem(desc, a, b, c, d);
    Algorithm *g = algorithm(algo);
    Problem q = g->fits[0];
    bool kind = q.compute == p.compute && q.scale == p.scale && q.pointer_mode == p.pointer_mode &&
                q.trans_a == p.trans_a && q.trans_b == p.trans_b && q.epilogue == p.epilogue;
    for (int i = 0; i < 4; i++) kind = kind && q.x[i].type == p.x[i].type;
    if (!kind) return CUBLAS_STATUS_INVALID_VALUE;
    if (cublaslt_sim.refuse_checks) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!fits(*g, p)) g->fits.push_back(p);
    cublasLtMatmulAlgo_t before = result->algo;                // "algo field is never updated"
    *result = result_of(algo->data[0], p);
    result->algo = before;
    return CUBLAS_STATUS_SUCCESS;
}

// ---------------------------------------------------------------------------------------------
// The matmul.

static float from_e4m3(uint8_t v) {                            // no infinities; s.1111.111 is NaN
    int exponent = v >> 3 & 15, fraction = v & 7;
    float f = exponent == 15 && fraction == 7 ? NAN
              : exponent ? ldexpf(1.0f + (float)fraction / 8.0f, exponent - 7) : ldexpf((float)fraction, -9);
    return v & 0x80 ? -f : f;
}
static float get(cudaDataType_t type, const void *p, int64_t i) {
    switch (type) {
    case CUDA_R_32F: return ((const float *)p)[i];
    case CUDA_R_16BF: return bf16_to_f32(((const bf16 *)p)[i]);
    case CUDA_R_8F_E4M3: return from_e4m3(((const uint8_t *)p)[i]);
    case CUDA_R_8I: return (float)((const int8_t *)p)[i];
    case CUDA_R_32I: break;
    }
    return NAN;
}

struct Call {
    Problem p;
    const void *A, *B, *C;
    void *D;
    const float *alphas;        // in device memory, or NULL
    const void *device_alpha, *device_beta;                    // one value each, or NULL
    float alpha, beta;
    int32_t alpha_i, beta_i;
    int64_t chunk;
    int splits;
    bool backwards;
    void *workspace;
    size_t workspace_bytes;
};

// Rows [0, m) of column j of one batch: sum over [k0, k1) in chains of `chunk`, each begun at zero.
static void sum_column(float *sum, const std::vector<float> &a, const std::vector<float> &b, int64_t m, int64_t k,
                       int64_t j, int64_t k0, int64_t k1, int64_t chunk) {
    std::vector<float> part((size_t)m);
    for (int64_t from = k0; from < k1; from += chunk) {
        int64_t to = from + chunk < k1 ? from + chunk : k1;
        for (int64_t i = 0; i < m; i++) part[(size_t)i] = 0.0f;
        for (int64_t l = from; l < to; l++) {
            const float *column = &a[(size_t)(l * m)];
            float v = b[(size_t)(j * k + l)];
            for (int64_t i = 0; i < m; i++) part[(size_t)i] = fmaf(column[i], v, part[(size_t)i]);
        }
        for (int64_t i = 0; i < m; i++) sum[i] += part[(size_t)i];
    }
}

static void run_float(const Call &c, int batch) {
    const Problem &p = c.p;
    size_t at[4];
    for (int i = 0; i < 4; i++) at[i] = (size_t)batch * (size_t)p.x[i].stride * type_size(p.x[i].type);
    const char *pa = (const char *)c.A + at[A], *pb = (const char *)c.B + at[B], *pc = (const char *)c.C + at[C];
    char *pd = (char *)c.D + at[D];
    std::vector<float> a((size_t)(p.m * p.k)), b((size_t)(p.k * p.n)), sum((size_t)p.m), part((size_t)p.m);
    bool ta = p.trans_a != CUBLAS_OP_N, tb = p.trans_b != CUBLAS_OP_N;
    for (int64_t l = 0; l < p.k; l++) {
        for (int64_t i = 0; i < p.m; i++)
            a[(size_t)(l * p.m + i)] = get(p.x[A].type, pa, ta ? l + i * p.x[A].ld : i + l * p.x[A].ld);
        for (int64_t j = 0; j < p.n; j++)
            b[(size_t)(j * p.k + l)] = get(p.x[B].type, pb, tb ? j + l * p.x[B].ld : l + j * p.x[B].ld);
    }
    float alpha = c.device_alpha ? *(const float *)c.device_alpha : c.alpha;
    float beta = c.device_beta ? *(const float *)c.device_beta : c.beta;
    int64_t each = (p.k + c.splits - 1) / c.splits;
    for (int64_t j = 0; j < p.n; j++) {
        for (int64_t i = 0; i < p.m; i++) sum[(size_t)i] = 0.0f;
        for (int s = 0; s < c.splits; s++) {
            int split = c.backwards ? c.splits - 1 - s : s;
            int64_t k0 = split * each, k1 = k0 + each < p.k ? k0 + each : p.k;
            if (c.splits == 1) {
                sum_column(sum.data(), a, b, p.m, p.k, j, k0, k1, c.chunk);
                continue;
            }
            for (int64_t i = 0; i < p.m; i++) part[(size_t)i] = 0.0f;
            sum_column(part.data(), a, b, p.m, p.k, j, k0, k1, c.chunk);
            for (int64_t i = 0; i < p.m; i++) sum[(size_t)i] += part[(size_t)i];
        }
        for (int64_t i = 0; i < p.m; i++) {
            float v = (c.alphas ? c.alphas[i] : alpha) * sum[(size_t)i];
            if (beta != 0.0f) v = fmaf(beta, get(p.x[C].type, pc, i + j * p.x[C].ld), v);
            if (p.epilogue == CUBLASLT_EPILOGUE_BIAS) v += get(p.x[D].type, p.bias, i);
            int64_t o = i + j * p.x[D].ld;
            if (p.x[D].type == CUDA_R_16BF) ((bf16 *)pd)[o] = bf16_from_f32(v);
            else ((float *)pd)[o] = v;
        }
    }
}

// int8 products: exact sums in int32.
static void run_int8(const Call &c, int batch) {
    const Problem &p = c.p;
    const int8_t *pa = (const int8_t *)c.A + batch * p.x[A].stride, *pb = (const int8_t *)c.B + batch * p.x[B].stride;
    int32_t alpha = c.device_alpha ? *(const int32_t *)c.device_alpha : c.alpha_i;
    int32_t beta = c.device_beta ? *(const int32_t *)c.device_beta : c.beta_i;
    for (int64_t j = 0; j < p.n; j++)
        for (int64_t i = 0; i < p.m; i++) {
            int32_t sum = 0;
            for (int64_t l = 0; l < p.k; l++) sum += pa[l + i * p.x[A].ld] * pb[l + j * p.x[B].ld];
            int64_t from = batch * p.x[C].stride + i + j * p.x[C].ld, to = batch * p.x[D].stride + i + j * p.x[D].ld;
            if (p.scale == CUDA_R_32I) {
                ((int32_t *)c.D)[to] = alpha * sum + (beta ? beta * ((const int32_t *)c.C)[from] : 0);
                continue;
            }
            float v = (c.alphas ? c.alphas[i] : c.alpha) * (float)sum;
            if (c.beta != 0.0f) v = fmaf(c.beta, (float)((const int8_t *)c.C)[from], v);
            v = rintf(v);
            ((int8_t *)c.D)[to] = (int8_t)(v < -128.0f ? -128.0f : v > 127.0f ? 127.0f : v);
        }
}

// One thread of a simulated kernel, so that streams, graphs and the guards of device memory treat it as one.
static __global__ void matmul_kernel(Call c) {
    if (c.workspace) memset(c.workspace, 0xff, c.workspace_bytes);      // all of it is the library's
    for (int batch = 0; batch < c.p.batch; batch++) {
        if (c.p.compute == CUBLAS_COMPUTE_32I) run_int8(c, batch);
        else run_float(c, batch);
    }
}

static size_t extent(const Problem &p, int i) {
    const Matrix &x = p.x[i];
    size_t last = (size_t)(p.batch - 1) * (size_t)x.stride + (size_t)(x.cols - 1) * (size_t)x.ld + (size_t)x.rows;
    return last * type_size(x.type);
}
static bool overlap(const void *a, size_t na, const void *b, size_t nb) {
    return (const char *)a < (const char *)b + nb && (const char *)b < (const char *)a + na;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *pa,
                              cublasLtMatrixLayout_t a, const void *pb, cublasLtMatrixLayout_t b, const void *beta,
                              const void *pc, cublasLtMatrixLayout_t c, void *pd, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
    live(handle, "the handle");
    Problem p = problem(desc, a, b, c, d);
    const Algorithm *g = algorithm(algo);
    if (!fits(*g, p))
        cudasim::fail("cuBLASLt: the algorithm was found for other sizes, types or modes; "
                             "cublasLtMatmulAlgoCheck it first");
    const void *const x[4] = {pa, pb, pc, pd};
    for (int i = 0; i < 4; i++) {
        char name = matrix_names[i];
        if (!cudasim::is_device(x[i], extent(p, i)))
            cudasim::fail("cuBLASLt: %c, %zu bytes at %p, is not device memory", name, extent(p, i), x[i]);
        if ((uintptr_t)x[i] % g->alignment[i])
            cudasim::fail("cuBLASLt: %c at %p is not aligned to the %u bytes that the preference promised", name,
                                 x[i], g->alignment[i]);
        if (p.batch > 1 && p.x[i].stride * (int64_t)type_size(p.x[i].type) % g->alignment[i])
            cudasim::fail("cuBLASLt: the batches of %c are not aligned to the %u bytes that the preference "
                                 "promised", name, g->alignment[i]);
        if (i < C && overlap(x[i], extent(p, i), pd, extent(p, D)))
            cudasim::fail("cuBLASLt: %c and D overlap", name);
    }
    if (pc == pd ? memcmp(&p.x[C], &p.x[D], sizeof p.x[C]) != 0 : overlap(pc, extent(p, C), pd, extent(p, D)))
        cudasim::fail("cuBLASLt: C and D overlap and are not one matrix of one layout");
    if ((p.x[A].type == CUDA_R_8F_E4M3 || p.x[A].type == CUDA_R_8I)) {
        unsigned need = p.x[A].type == CUDA_R_8I ? 4 : 16;
        for (int i = 0; i < 4; i++)
            if ((uintptr_t)x[i] % need)
                cudasim::fail("cuBLASLt: %s needs pointers aligned to %u bytes (%c)", type_name(p.x[A].type),
                                     need, matrix_names[i]);
    }
    size_t need = workspace_bytes_of(*g, p);
    if (workspace_bytes < need)
        cudasim::fail("cuBLASLt: a workspace of %zu bytes; the algorithm needs %zu", workspace_bytes, need);
    if ((uintptr_t)workspace % 256)
        cudasim::fail("cuBLASLt: the workspace at %p is not aligned to 256 bytes", workspace);
    if (workspace && !cudasim::is_device(workspace, workspace_bytes))
        cudasim::fail("cuBLASLt: the workspace at %p is not %zu bytes of device memory", workspace,
                             workspace_bytes);

    Call call = {};
    call.p = p;
    call.A = pa; call.B = pb; call.C = pc; call.D = pd;
    call.chunk = g->chunk;
    call.splits = g->splits;
    call.workspace = need ? workspace : nullptr;
    call.workspace_bytes = need;
    call.backwards = g->reduction == CUBLASLT_REDUCTION_SCHEME_INPLACE && cublaslt_sim.matmuls % 2;
    bool beta_zero = p.pointer_mode == CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO;
    if (!alpha || (!beta && !beta_zero)) cudasim::fail("cuBLASLt: alpha or beta is NULL");
    bool device_alpha = p.pointer_mode != CUBLASLT_POINTER_MODE_HOST;
    bool device_beta = p.pointer_mode == CUBLASLT_POINTER_MODE_DEVICE;
    size_t alpha_bytes = 4 * (vector_alpha(p) ? (size_t)p.m : 1);
    if (device_alpha != cudasim::is_device(alpha, alpha_bytes))
        cudasim::fail("cuBLASLt: alpha at %p is not where the pointer mode says", alpha);
    if (vector_alpha(p) && (uintptr_t)alpha % 16) cudasim::fail("cuBLASLt: the alphas at %p are not aligned", alpha);
    if (!beta_zero && device_beta != cudasim::is_device(beta, 4))
        cudasim::fail("cuBLASLt: beta at %p is not where the pointer mode says", beta);
    if (vector_alpha(p)) call.alphas = (const float *)alpha;
    else if (device_alpha) call.device_alpha = alpha;
    else memcpy(&call.alpha, alpha, 4), memcpy(&call.alpha_i, alpha, 4);
    if (device_beta) call.device_beta = beta;
    else if (!beta_zero) memcpy(&call.beta, beta, 4), memcpy(&call.beta_i, beta, 4);
    if (p.epilogue == CUBLASLT_EPILOGUE_BIAS) {
        size_t bytes = (size_t)p.m * type_size(p.x[D].type);
        if (!cudasim::is_device(p.bias, bytes)) cudasim::fail("cuBLASLt: the bias is not device memory");
    }
    cublaslt_sim.matmuls++;
    LAUNCH(matmul_kernel, 1, 1, 0, stream)(call);
    return cudaPeekAtLastError() == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
