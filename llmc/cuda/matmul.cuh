// Matmuls that the CUDA wing's files offer each other.
#ifndef QLLM_MATMUL_CUH
#define QLLM_MATMUL_CUH
#include "cuda.cuh"

// y (N, OC) = (x (N, C) . w (OC, C)^T) * wscale (OC) f32 or NULL, for the few tokens of decoding: bound by the bytes of
// w, which are read once for every CUDA_MATVEC_TOKENS tokens. Any sizes and alignment; 16-byte aligned rows are fast.
// Out is floatX or float. f32 sums in an order that depends on C alone: bits of a token depend neither on N nor on the
// other tokens.
#define CUDA_MATVEC_TOKENS 8
template <class Out>
void cuda_matvec(Out *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC);

// qmatvec_forward (ops.h) with X or f32 results, the other one NULL.
void cuda_qmatvec(floatX *yx, float *yf, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                  const QuantSpec *wq, size_t N, int C, int OC);

// c (M, N) = (f32(acc) * sa) * sb, acc = a (M, K) . b (N, K)^T of int8 codes as in linear_i8_forward; K a multiple of
// 16, rows on 16 bytes. work: cuda_int8_bytes.
size_t cuda_int8_bytes(int64_t M, int64_t N, int64_t K);
template <class Out>
void cuda_int8_product(Out *c, const int8_t *a, const int8_t *b, const float *sa, const float *sb, int64_t M, int64_t N,
                       int64_t K, void *work);

// "cuBLASLt 13.0", or "own matmul" and why.
const char *cuda_matmul_description(void);
// The best rate of linear_forward over two large shapes, in FLOP/s: what a step is measured against. A second or so on
// a GPU, with 400 MB of its memory, or 0 where that is not free; 1e9 under the simulator, which measures nothing.
double cuda_matmul_peak(void);
// Which ways a product may take, for tests: all at first, but the library with QLLM_NO_CUBLASLT=1. The plain kernel is
// always there, and for int8 the tiles are.
enum { MATMUL_LIBRARY = 1, MATMUL_TILES = 2, MATMUL_MATVEC = 4, MATMUL_ALL = 7 };
void cuda_matmul_allow(int ways);
bool cuda_matmul_allowed(int way);

// Bytes of unscaled sums between the library's matmul and the kernel that scales and rounds them, which then take some
// rows at a time. Most of it is read back from the second-level cache (50 MB on Hopper), and the matmul still has
// thousands of rows or columns to work on.
#define SCALED_BYTES ((size_t)64 << 20)
// So many rows of `columns` values of 4 bytes, 256 at least.
int64_t cuda_scaled_rows(int64_t rows, int64_t columns);
// Another number of bytes, for tests: 0 makes small products go 256 rows at a time.
void cuda_scaled_bytes(size_t bytes);
#endif
