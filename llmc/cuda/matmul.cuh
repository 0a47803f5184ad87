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
#endif
