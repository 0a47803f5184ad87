// cuBLASLt, found when the first matmul asks for it: programs link and start on machines without it, and a start on the
// CPU does not wait for its half a gigabyte. The simulated build calls dev/cudasim's twin by the same names.
//
// The library stores matrices by columns, so a row-major c (M, N) is its matrix D of N rows and M columns, and
//   c = a . b   is   D = A . B   with A = b^T, B = a^T:  m = N, n = M, k = K
// No operand is copied: a (M, K) row-major is the library's (K, M) with leading dimension K, which is B as it stands;
// stored (K, M) it is B transposed. Likewise b stored (K, N) is A as it stands, stored (N, K) A transposed:
//   linear_forward TN, linear_backward_input NN, linear_backward_weight NT, and TN for int8, which takes no other
// A scale for each column of c is one for each row of D: a vector of alphas, where the library takes that.
#include "cublaslt.cuh"
#ifdef __CUDACC__
#include <dlfcn.h>
#include <stdlib.h>
#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#define HAVE_CUBLASLT 1
#endif
#else
#include "cublaslt_sim.h"
#define HAVE_CUBLASLT 1
#endif

#ifdef HAVE_CUBLASLT
#define FUNCTIONS(X) \
    X(cublasLtGetVersion) X(cublasLtGetStatusString) X(cublasLtCreate) X(cublasLtMatmulDescCreate) \
    X(cublasLtMatmulDescSetAttribute) X(cublasLtMatmulDescDestroy) X(cublasLtMatrixLayoutCreate) \
    X(cublasLtMatrixLayoutDestroy) X(cublasLtMatmulPreferenceCreate) X(cublasLtMatmulPreferenceSetAttribute) \
    X(cublasLtMatmulPreferenceDestroy) X(cublasLtMatmulAlgoGetHeuristic) X(cublasLtMatmulAlgoCheck) X(cublasLtMatmul)

static struct {
#define POINTER(name) decltype(&::name) name;
    FUNCTIONS(POINTER)
#undef POINTER
} lt;

// The library, one way or the other.
static bool load(void) {
#ifdef __CUDACC__
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11", "libcublasLt.so"};
    static const struct { const char *variable, *below; } folders[] = {
        {"CUBLAS_HOME", "/lib/"}, {"CUBLAS_HOME", "/lib64/"},
        {nullptr, ""},          // where it lay when the program was linked, and wherever else the loader looks
        {"CUDA_HOME", "/lib64/"}, {"CUDA_HOME", "/lib/"}, {nullptr, "/usr/local/cuda/lib64/"}};
    void *library = nullptr;
    for (size_t f = 0; f < sizeof folders / sizeof *folders && !library; f++)
        for (size_t n = 0; n < sizeof names / sizeof *names && !library; n++) {
            const char *home = folders[f].variable ? getenv(folders[f].variable) : "";
            char path[4096];
            if (!home || snprintf(path, sizeof path, "%s%s%s", home, folders[f].below, names[n]) >= (int)sizeof path)
                continue;
            library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
        }
    if (!library) return false;
#define FIND(name) \
    lt.name = (decltype(&::name))dlsym(library, #name); \
    if (!lt.name) return false;
#else
#define FIND(name) lt.name = name;
#endif
    FUNCTIONS(FIND)
#undef FIND
    return true;
}

// Keeps what the library refuses as the backend's first error.
static bool lt_check(cublasStatus_t status, const char *call, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return true;
    ops_set_error(E_FAIL, "%s:%d: %s: %s", __FILE__, line, call, lt.cublasLtGetStatusString(status));
    return false;
}
#define LT_CHECK(name, ...) lt_check(lt.name(__VA_ARGS__), #name, __LINE__)

static cublasLtHandle_t handle;
static void *workspace;         // the library's own, beside cuda_workspace: a plan's algorithm counts on its size
static size_t workspace_bytes;
static char description[160];   // of the library, or why there is none; empty before it was looked for

static bool available(void) {
    if (description[0]) return handle;
    if (!load()) {
        snprintf(description, sizeof description, "cuBLASLt not found: set CUBLAS_HOME");
        return false;
    }
    size_t v = lt.cublasLtGetVersion();                        // 130001 is 13.0.1, as 120805 is 12.8.5
    cublasStatus_t status = lt.cublasLtCreate(&handle);
    if (status != CUBLAS_STATUS_SUCCESS) handle = nullptr;
    snprintf(description, sizeof description, "cuBLASLt %zu.%zu%s%s", v / 10000, v / 100 % 100,
             handle ? "" : " does not start: ", handle ? "" : lt.cublasLtGetStatusString(status));
    if (!handle) return false;
    int device = 0;
    cudaDeviceProp prop = {};
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&prop, device));
    // 32 MiB are what the library asks for to do its best, on Hopper and later twice that. The twin needs little, and
    // the simulator guards each page.
#ifdef __CUDACC__
    workspace_bytes = (size_t)(prop.major >= 9 ? 64 : 32) << 20;
#else
    workspace_bytes = 3 << 20;
#endif
    if (cudaMalloc(&workspace, workspace_bytes) != cudaSuccess) {
        (void)cudaGetLastError();
        workspace_bytes = 0;    // there are algorithms without
    }
    return true;
}

const char *cublaslt_description(bool *found) {
    *found = available();
    return description;
}

// ---------------------------------------------------------------------------------------------
// Plans: descriptors and the algorithm for a product, found by its key in a hash table.
typedef struct { bool ta, tb, out_f32, scaled, i8; int64_t M, N, K, ld; } Key;
struct CublasltPlan {
    Key key;
    bool used;
    bool works;                 // else nothing was found, and that is remembered as well
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t A, B, D;                            // C is D
    cublasLtMatmulAlgo_t algo;
};
typedef struct CublasltPlan Plan;

#define PLANS 1024              // a model has some twenty; evaluation brings one for each length of text and each form
static Plan plans[PLANS];
static int plans_used;

static void forget(Plan *plan) {
    if (plan->D) LT_CHECK(cublasLtMatrixLayoutDestroy, plan->D);
    if (plan->B) LT_CHECK(cublasLtMatrixLayoutDestroy, plan->B);
    if (plan->A) LT_CHECK(cublasLtMatrixLayoutDestroy, plan->A);
    if (plan->desc) LT_CHECK(cublasLtMatmulDescDestroy, plan->desc);
    *plan = Plan();
}

static bool same_key(const Key *a, const Key *b) {
    return a->ta == b->ta && a->tb == b->tb && a->out_f32 == b->out_f32 && a->scaled == b->scaled && a->i8 == b->i8 &&
           a->M == b->M && a->N == b->N && a->K == b->K && a->ld == b->ld;
}

// The key's place: its plan, or the free one where it belongs.
static Plan *place(const Key *key) {
    uint64_t h = (uint64_t)(key->ta + 2 * key->tb + 4 * key->out_f32 + 8 * key->scaled + 16 * key->i8);
    const int64_t sizes[4] = {key->M, key->N, key->K, key->ld};
    for (int i = 0; i < 4; i++) h = (h ^ (uint64_t)sizes[i]) * 0x9e3779b97f4a7c15u, h ^= h >> 29;
    size_t i = (size_t)(h % PLANS);
    while (plans[i].used && !same_key(&plans[i].key, key)) i = (i + 1) % PLANS;
    return &plans[i];
}

#ifdef PRECISION_FP32
static const cudaDataType_t type_x = CUDA_R_32F;
#else
static const cudaDataType_t type_x = CUDA_R_16BF;
#endif
#define ALIGNMENT 16            // bytes, of every pointer and every row

static bool describe(Plan *plan) {
    const Key *k = &plan->key;
    int32_t ta = k->tb ? CUBLAS_OP_T : CUBLAS_OP_N, tb = k->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    int32_t mode = k->scaled ? CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO : CUBLASLT_POINTER_MODE_HOST;
    uint64_t N = (uint64_t)k->N, M = (uint64_t)k->M, K = (uint64_t)k->K;
    cudaDataType_t in = k->i8 ? CUDA_R_8I : type_x, out = k->i8 ? CUDA_R_32I : k->out_f32 ? CUDA_R_32F : type_x;
    int64_t lda = k->i8 ? k->ld : k->ta ? k->M : k->K, ldb = k->i8 ? k->ld : k->tb ? k->K : k->N;
    return LT_CHECK(cublasLtMatmulDescCreate, &plan->desc, k->i8 ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                    k->i8 ? CUDA_R_32I : CUDA_R_32F) &&
           LT_CHECK(cublasLtMatmulDescSetAttribute, plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta) &&
           LT_CHECK(cublasLtMatmulDescSetAttribute, plan->desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb) &&
           LT_CHECK(cublasLtMatmulDescSetAttribute, plan->desc, CUBLASLT_MATMUL_DESC_POINTER_MODE, &mode,
                    sizeof mode) &&
           LT_CHECK(cublasLtMatrixLayoutCreate, &plan->A, in, k->tb ? K : N, k->tb ? N : K, ldb) &&
           LT_CHECK(cublasLtMatrixLayoutCreate, &plan->B, in, k->ta ? M : K, k->ta ? K : M, lda) &&
           LT_CHECK(cublasLtMatrixLayoutCreate, &plan->D, out, N, M, k->N);
}

// The heuristic's first choice. In a weight gradient and for int8, parts of a split K may be reduced in compute type,
// in a pass of its own with a fixed order; elsewhere K is not split.
static bool choose(Plan *plan) {
    cublasLtMatmulPreference_t preference = nullptr;
    if (!LT_CHECK(cublasLtMatmulPreferenceCreate, &preference)) return false;
    uint64_t bytes = workspace_bytes;
    bool split = plan->key.ta || plan->key.i8;
    uint32_t reduction = split ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE;
    uint32_t alignment = ALIGNMENT;
    bool set = LT_CHECK(cublasLtMatmulPreferenceSetAttribute, preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                        &bytes, sizeof bytes) &&
               LT_CHECK(cublasLtMatmulPreferenceSetAttribute, preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                        &reduction, sizeof reduction);
    const cublasLtMatmulPreferenceAttributes_t matrices[4] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; i++)
        set = set && LT_CHECK(cublasLtMatmulPreferenceSetAttribute, preference, matrices[i], &alignment,
                              sizeof alignment);
    cublasLtMatmulHeuristicResult_t result = {};
    int found = 0;
    cublasStatus_t status = !set ? CUBLAS_STATUS_INVALID_VALUE
        : lt.cublasLtMatmulAlgoGetHeuristic(handle, plan->desc, plan->A, plan->B, plan->D, plan->D, preference, 1,
                                            &result, &found);
    LT_CHECK(cublasLtMatmulPreferenceDestroy, preference);
    if (status != CUBLAS_STATUS_SUCCESS || found < 1 || result.state != CUBLAS_STATUS_SUCCESS) return false;
    plan->algo = result.algo;
    return true;
}

// The algorithm of another number of rows, if it takes this one too.
static bool adopt(Plan *plan, const Plan *from) {
    if (!from->works) return false;
    cublasLtMatmulHeuristicResult_t result = {};
    if (lt.cublasLtMatmulAlgoCheck(handle, plan->desc, plan->A, plan->B, plan->D, plan->D, &from->algo, &result) !=
            CUBLAS_STATUS_SUCCESS ||
        result.workspaceSize > workspace_bytes) return false;
    plan->algo = from->algo;
    return true;
}

static const Plan *get(const Key *key) {
    Plan *plan = place(key);
    if (plan->used) return plan;
    Key standard = *key;
    standard.M = CUBLASLT_ROWS;
    const Plan *from = key->ta || key->i8 || key->M == CUBLASLT_ROWS ? nullptr : get(&standard);
    plan = place(key);                                         // the other one may have come to stand here
    plan->key = *key;
    plan->used = true;
    plans_used++;
    plan->works = describe(plan) && ((from && adopt(plan, from)) || choose(plan));
    return plan;
}

// What this file asks of a product, beside a library that has an algorithm for it.
static bool taken(const Product *p, bool scaled, const void *c, const void *a, const void *b) {
    if (((uintptr_t)c | (uintptr_t)a | (uintptr_t)b) % ALIGNMENT) return false;
    if (p->i8) return p->M > CUBLASLT_I8 && p->N % CUBLASLT_I8 == 0 && p->K % CUBLASLT_I8 == 0 &&
                      p->ld % CUBLASLT_I8 == 0;
    int64_t row_a = p->ta ? p->M : p->K, row_b = p->tb ? p->K : p->N;
    return row_a % VEC_X == 0 && row_b % VEC_X == 0 && p->N % VEC_X == 0 && !(scaled && p->accumulate);
}

const Plan *cublaslt_plan(const Product *p, bool scaled, const void *c, const void *a, const void *b) {
    if (!taken(p, scaled, c, a, b) || !available()) return nullptr;
    if (plans_used > PLANS * 3 / 4) {                          // room for two
        for (int i = 0; i < PLANS; i++) forget(&plans[i]);
        plans_used = 0;
    }
    Key key = {p->ta, p->tb, p->out_f32, scaled, p->i8, p->M, p->N, p->K, p->ld};
    const Plan *plan = get(&key);
    return plan->works ? plan : nullptr;
}

void cublaslt_run(const Plan *plan, bool accumulate, void *c, const void *a, const void *b, const float *scale) {
    const float one = 1.0f, added = accumulate ? 1.0f : 0.0f;
    const int32_t one_i = 1, none_i = 0;
    bool i8 = plan->key.i8;
    const void *alpha = i8 ? (const void *)&one_i : plan->key.scaled ? (const void *)scale : &one;
    const void *beta = i8 ? (const void *)&none_i : &added;
    LT_CHECK(cublasLtMatmul, handle, plan->desc, alpha, b, plan->A, a, plan->B, beta, c, plan->D, c, plan->D,
             &plan->algo, workspace, workspace_bytes, cuda_stream);
}
#else
const char *cublaslt_description(bool *found) {
    *found = false;
    return "built without cublasLt.h: set CUBLAS_HOME";
}
const struct CublasltPlan *cublaslt_plan(const Product *, bool, const void *, const void *, const void *) {
    return nullptr;
}
void cublaslt_run(const struct CublasltPlan *, bool, void *, const void *, const void *, const float *) {}
#endif
