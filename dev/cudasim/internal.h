// What the simulator's two halves know of each other: cudasim.cpp runs a kernel and holds device memory, stream.cpp
// decides when.
#ifndef CUDASIM_INTERNAL_H
#define CUDASIM_INTERNAL_H
#include "cudasim.h"

namespace cudasim {
// cudasim.cpp
extern unsigned order;
[[noreturn]] void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
cudaError_t set_error(cudaError_t e);                  // keeps it for cudaGetLastError, unless it is none
bool launchable(const Launch &l);                      // counts it; else the error is set
void run(const Launch &l);
bool is_device(const void *p, size_t bytes);           // inside one allocation that is not freed
bool touches_device(const void *p);
void open_memory(bool on);                             // lets the host touch device memory

// stream.cpp
void finish_all();                                     // does whatever still waits in a stream
cudaError_t refused_in_capture();                      // for calls that no capture allows; ends those that go on
}
#endif
