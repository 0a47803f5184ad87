// Float weights against few tokens: bound by the weight's bytes.
#include "cpu.h"

void cpu_matvec_forward(floatX *y, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    cpu_linear_forward(y, x, w, NULL, N, C, OC);
}

void cpu_matvec_forward_f32(float *y, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    cpu_linear_forward_f32(y, x, w, NULL, N, C, OC);
}
