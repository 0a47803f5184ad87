// cuda_matvec (matmul.cuh) and matvec_forward (ops.h): plain weights against few tokens, by the kernel of matvec.cuh,
// which says what bounds it. Rows that do not begin and end at multiples of 16 bytes go the same way in the same order
// of sums, value by value.
#include "matmul.cuh"
#include "matvec.cuh"

static MatvecOut matvec_out(float *y) { return {nullptr, y}; }
#ifndef PRECISION_FP32
static MatvecOut matvec_out(floatX *y) { return {y, nullptr}; }
#endif

template <class Out>
void cuda_matvec(Out *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC) {
    auto run = rows_take_vec(C, x, w) ? matvec_any_n<PLAIN, SCALE_ROW, true> : matvec_any_n<PLAIN, SCALE_ROW, false>;
    run(matvec_out(y), x, (const uint8_t *)w, C * (int)sizeof(floatX), 0, wscale, nullptr, 0, N, C, OC);
}

void cuda_matvec_forward(floatX *y, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    cuda_matvec(y, x, w, nullptr, N, C, OC);
}
void cuda_matvec_forward_f32(float *y, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    cuda_matvec(y, x, w, nullptr, N, C, OC);
}

template void cuda_matvec(float *, const floatX *, const floatX *, const float *, size_t, int, int);
#ifndef PRECISION_FP32
template void cuda_matvec(floatX *, const floatX *, const floatX *, const float *, size_t, int, int);
#endif
