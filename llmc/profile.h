// Where the time goes: a table of operations that times each call and passes it on to the backend chosen before.
#ifndef QLLM_PROFILE_H
#define QLLM_PROFILE_H
#include <stdio.h>

void profile_begin(void);                          // from here on `ops` is timed (a backend that works ahead is waited for)
void profile_reset(void);
// Prints time by operation, a line each, per `steps` steps of `seconds` in all; the rest is what no operation covers.
void profile_print(FILE *out, int steps, double seconds);
#endif
