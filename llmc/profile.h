// Where the time goes: a table of operations that puts a time mark before and after each call and passes it on to the
// backend chosen before. A device that works ahead of the host is not waited for, but once every 8192 operations, when
// marks are read.
//
// The timeline is a file that chrome://tracing and ui.perfetto.dev load: an array of complete events, times in
// microseconds of the machine's monotonic clock, so that the files of ranks on one machine fit each other; the process
// is the rank, thread 0 computes and thread 1 communicates.
#ifndef QLLM_PROFILE_H
#define QLLM_PROFILE_H
#include "common.h"
#ifdef __cplusplus
extern "C" {
#endif

enum { PROFILE_COMPUTE, PROFILE_COMMUNICATION };

// From here on `ops` is timed. timeline: a file that profile_end writes, NULL for none; rank N > 0 writes
// timeline.rankN. That it can be written is tried now. Call after device_init, on the thread that computes.
int profile_begin(const char *timeline, int rank, Err *err);
// What was timed so far is forgotten.
void profile_reset(void);
// Something that took from t0 to t1 (now_seconds) on a lane of its own beside the operations. `what` is text that
// stays. On any thread; does nothing where no profile was begun.
void profile_span(const char *what, int lane, double t0, double t1);
// Waits for the device and prints time by operation, a line each, per `steps` steps of `seconds` in all; the rest is
// what no operation covers. What went on beside the operations follows, with how much of it operations hid.
void profile_print(FILE *out, int steps, double seconds);
// Writes the timeline: the first PROFILE_SPANS spans since profile_reset; says on stderr how many more there were.
// `ops` are the backend's own again.
#define PROFILE_SPANS (1 << 18)
int profile_end(Err *err);
#ifdef __cplusplus
}
#endif
#endif
