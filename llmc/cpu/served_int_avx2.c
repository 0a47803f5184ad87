// The kernels of served_int.h with AVX2 and FMA, whatever -march says.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,bmi2,no-avx512f,no-avxvnni")
#endif
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#include "served_int_form.h"
const IntForm *const int_form_avx2 = &form;
#else
#include "served_int.h"
const IntForm *const int_form_avx2 = NULL;
#endif
