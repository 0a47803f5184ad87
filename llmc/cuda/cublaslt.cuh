// The one door to cuBLASLt: cublaslt.cu.
#ifndef QLLM_CUBLASLT_CUH
#define QLLM_CUBLASLT_CUH
#include "cuda.cuh"

// c (M, N) = a (M, K) . b (K, N), all row-major.
typedef struct {
    bool ta, tb;            // a is stored (K, M), b is stored (N, K)
    bool out_f32;           // c is f32, else X
    bool accumulate;        // c +=
    int64_t M, N, K;
    bool i8;                // a and b are int8, c is int32, exact; ta is false, tb is true
    int64_t ld;             // with i8: rows of a and of b lie so many values apart
} Product;

// What is there: "cuBLASLt 13.0", or why it is not, "cuBLASLt not found: set CUBLAS_HOME", and *found false.
const char *cublaslt_description(bool *found);
// How the library does this product: NULL where it does not, for lack of alignment, support or the library itself. With
// `scaled`, column n is multiplied by scale[n] before c is rounded. The plan is kept, so that the same question later
// costs a look-up; it is valid until the next call.
//
// Where a is not transposed, rows of c do not depend on M: they are summed in one order, by the algorithm that the
// library's heuristic names for CUBLASLT_ROWS rows. Where it is (weight gradients), the heuristic is asked for the
// very shape and may split K, as long as parts are reduced in a fixed order. So may products of int8, whose order is
// nobody's concern; they are neither scaled nor accumulated here.
#define CUBLASLT_ROWS 4096
#define CUBLASLT_I8 16      // products of int8: what N, K and ld are multiples of, and what M is above
const struct CublasltPlan *cublaslt_plan(const Product *p, bool scaled, const void *c, const void *a, const void *b);
void cublaslt_run(const struct CublasltPlan *plan, bool accumulate, void *c, const void *a, const void *b,
                  const float *scale);
#endif
