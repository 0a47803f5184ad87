#include "cuda.cuh"
void cuda_linear_w8_forward(floatX *, const floatX *, const int8_t *, const float *, size_t, int, int) {}
void cuda_linear_w8_forward_f32(float *, const floatX *, const int8_t *, const float *, size_t, int, int) {}
void cuda_linear_w8_backward_input(floatX *, const floatX *, const int8_t *, const float *, floatX *, size_t, int, int) {}
void cuda_linear_i8_forward(floatX *, const floatX *, const int8_t *, const float *, size_t, int, int) {}
void cuda_linear_i8_forward_f32(float *, const floatX *, const int8_t *, const float *, size_t, int, int) {}
void cuda_linear_i8_backward_input(floatX *, const floatX *, const int8_t *, const float *, size_t, int, int) {}
void cuda_linear_i8_backward_weight(float *, const floatX *, const floatX *, size_t, int, int, bool) {}
