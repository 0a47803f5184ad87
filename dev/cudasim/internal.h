// What the simulator's two halves know of each other: cudasim.cpp runs a kernel and holds device memory, stream.cpp
// decides when.
#ifndef CUDASIM_INTERNAL_H
#define CUDASIM_INTERNAL_H
#include "cudasim.h"
#include <functional>
#include <vector>

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

int thread_index();                                    // in its block; -1: the host runs
bool own_stack(const void *p);                         // of the running thread

// race.cpp, which is part of builds with RACE=1 only
#ifdef CUDASIM_RACE
void race_launch(const void *dynamic, size_t dynamic_bytes, const void *fixed, size_t fixed_bytes);   // shared memory
void race_block();
void race_barrier();
void race_syncwarp(int warp, unsigned lanes);
void race_access(const void *p, size_t bytes, bool write, const void *pc);
#else
static inline void race_launch(const void *, size_t, const void *, size_t) {}
static inline void race_block() {}
static inline void race_barrier() {}
static inline void race_syncwarp(int, unsigned) {}
static inline void race_access(const void *, size_t, bool, const void *) {}
#endif

// stream.cpp
void finish_all();                                     // does whatever still waits in a stream
bool capturing(cudaStream_t s);
// For libraries that work in a stream (ncclsim). catch_up does what stands before now and touches these ranges, and
// whatever the stream waits for; later does f in the stream's turn. Not while it captures.
struct Range { const char *p; size_t bytes; };
void catch_up(cudaStream_t s, const std::vector<Range> &ranges);
void later(cudaStream_t s, const std::vector<Range> &ranges, std::function<void()> f);
cudaError_t refused_in_capture();                      // for calls that no capture allows; ends those that go on
}
#endif
