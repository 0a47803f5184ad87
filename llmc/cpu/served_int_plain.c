// The kernels of served_int.h in C, whatever -march says.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("no-avx")
#endif
#include "served_int_form.h"
const IntForm *const int_form_plain = &form;
