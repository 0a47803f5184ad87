// What people see while it runs, and what machines read: a step line, a progress bar, JSON lines.
#ifndef QLLM_LOGGER_H
#define QLLM_LOGGER_H
#include "common.h"

// JSON lines, appended to PATH, flushed at each end.
typedef struct { FILE *f; bool first; } JsonLog;
int jsonlog_open(JsonLog *l, const char *path, bool append, Err *err);   // path NULL: a log that writes nothing
void jsonlog_begin(JsonLog *l, const char *event);                       // {"event": "...", "time": ...
void jsonlog_num(JsonLog *l, const char *key, double v);                 // NaN and infinities become null
void jsonlog_int(JsonLog *l, const char *key, long long v);
void jsonlog_str(JsonLog *l, const char *key, const char *v);            // escaped
void jsonlog_raw(JsonLog *l, const char *key, const char *json);         // already JSON
void jsonlog_end(JsonLog *l);
void jsonlog_close(JsonLog *l);

// "12.3 MB", "1.50 GiB", "1h02m", "39.7k": into buf, which is returned.
const char *fmt_bytes(char buf[32], double bytes);
const char *fmt_count(char buf[32], double n);
const char *fmt_time(char buf[32], double seconds);

// A progress bar on stderr when it is a terminal; a line every ten percent otherwise.
typedef struct { const char *what; double total, last_drawn; double start; int last_tenth; char suffix[64]; } Progress;
void progress_begin(Progress *p, const char *what, double total);
void progress_update(Progress *p, double done, const char *suffix);
void progress_end(Progress *p);
#endif
