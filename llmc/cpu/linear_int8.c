#include "cpu/cpu.h"
void cpu_linear_w8_forward(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C, int OC) {
    (void)y, (void)x, (void)codes, (void)wscale, (void)N, (void)C, (void)OC;
}
void cpu_linear_w8_forward_f32(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                               int OC) {
    (void)y, (void)x, (void)codes, (void)wscale, (void)N, (void)C, (void)OC;
}
void cpu_linear_w8_backward_input(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale,
                                  floatX *dy_scaled, size_t N, int C, int OC) {
    (void)dx, (void)dy, (void)codes, (void)wscale, (void)dy_scaled, (void)N, (void)C, (void)OC;
}
void cpu_linear_i8_forward(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C, int OC) {
    (void)y, (void)x, (void)codes, (void)wscale, (void)N, (void)C, (void)OC;
}
void cpu_linear_i8_forward_f32(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                               int OC) {
    (void)y, (void)x, (void)codes, (void)wscale, (void)N, (void)C, (void)OC;
}
void cpu_linear_i8_backward_input(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale, size_t N, int C,
                                  int OC) {
    (void)dx, (void)dy, (void)codes, (void)wscale, (void)N, (void)C, (void)OC;
}
void cpu_linear_i8_backward_weight(float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC,
                                   bool accumulate) {
    (void)dw, (void)dy, (void)x, (void)N, (void)C, (void)OC, (void)accumulate;
}
