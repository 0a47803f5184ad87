// The kernels of served_int.h with AVX-512 and VNNI, whatever -march says.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "served_int_form.h"
const IntForm *const int_form_avx512 = &form;
#else
#include "served_int.h"
const IntForm *const int_form_avx512 = NULL;
#endif
