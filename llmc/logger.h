// What people see while it runs, and what machines read: a step line, a progress bar, JSON lines.
#ifndef QLLM_LOGGER_H
#define QLLM_LOGGER_H
#include "common.h"

// v as a JSON string, quotes included. Control characters become escapes and bytes that are no UTF-8 become U+FFFD, so
// that whatever a user typed yields a line that a strict parser reads. NULL is written as null.
void json_write_string(FILE *f, const char *v);
// v in the fewest digits that read back as the same double; NaN and infinities become null.
void json_write_double(FILE *f, double v);

// JSON lines: {"event": "step", "time": 1700000000.123, ...}, flushed at each end. A line that cannot be written (no
// space left) is reported on stderr once and ends the log: a run of days does not die for its diary.
typedef struct { FILE *f; bool failed; char path[1024]; } JsonLog;
// path NULL: a log that writes nothing. Appending first removes a half line that a killed run left at the end.
int jsonlog_open(JsonLog *l, const char *path, bool append, Err *err);
void jsonlog_begin(JsonLog *l, const char *event);                       // {"event": "...", "time": ...
void jsonlog_num(JsonLog *l, const char *key, double v);                 // NaN and infinities become null
void jsonlog_int(JsonLog *l, const char *key, long long v);
void jsonlog_str(JsonLog *l, const char *key, const char *v);            // escaped
void jsonlog_raw(JsonLog *l, const char *key, const char *json);         // already JSON
void jsonlog_end(JsonLog *l);
int jsonlog_close(JsonLog *l);                                           // 0, or -1: something was not written

// "12.3 MB" (powers of 1000), "39.7k", "1h02m": into buf, which is returned. "?" for NaN, infinite or negative values.
const char *fmt_bytes(char buf[32], double bytes);
const char *fmt_count(char buf[32], double n);
const char *fmt_time(char buf[32], double seconds);

// A progress bar on stderr when it is a terminal; a line every ten percent otherwise.
typedef struct { const char *what; double total, last_drawn; double start; int last_tenth; char suffix[64]; } Progress;
void progress_begin(Progress *p, const char *what, double total);
void progress_update(Progress *p, double done, const char *suffix);
void progress_hide(Progress *p);                       // off the terminal's line, before something else is printed
void progress_end(Progress *p);
#endif
