// Step log, progress bar, readable numbers. See logger.h.
#include "logger.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// ---------------------------------------------------------------------------------------------
// JSON.

// Length of the UTF-8 sequence at s (well formed by Unicode's table 3-7: no overlong forms, no surrogates), or 0.
static int utf8_length(const unsigned char *s) {
    if (s[0] < 0x80) return 1;
    if (s[0] >= 0xC2 && s[0] <= 0xDF) return (s[1] & 0xC0) == 0x80 ? 2 : 0;
    if (s[0] >= 0xE0 && s[0] <= 0xEF) {
        unsigned lo = s[0] == 0xE0 ? 0xA0 : 0x80, hi = s[0] == 0xED ? 0x9F : 0xBF;
        return s[1] >= lo && s[1] <= hi && (s[2] & 0xC0) == 0x80 ? 3 : 0;
    }
    if (s[0] >= 0xF0 && s[0] <= 0xF4) {
        unsigned lo = s[0] == 0xF0 ? 0x90 : 0x80, hi = s[0] == 0xF4 ? 0x8F : 0xBF;
        return s[1] >= lo && s[1] <= hi && (s[2] & 0xC0) == 0x80 && (s[3] & 0xC0) == 0x80 ? 4 : 0;
    }
    return 0;
}

void json_write_string(FILE *f, const char *v) {
    if (!v) { fputs("null", f); return; }
    fputc('"', f);
    for (const unsigned char *s = (const unsigned char *)v; *s; ) {
        int n = utf8_length(s);
        if (n == 0) { fputs("\\ufffd", f); s++; continue; }
        if (n > 1) { fwrite(s, 1, (size_t)n, f); s += n; continue; }
        switch (*s) {
        case '"': fputs("\\\"", f); break;
        case '\\': fputs("\\\\", f); break;
        case '\n': fputs("\\n", f); break;
        case '\r': fputs("\\r", f); break;
        case '\t': fputs("\\t", f); break;
        default:
            if (*s < 0x20 || *s == 0x7f) fprintf(f, "\\u%04x", *s);
            else fputc(*s, f);
        }
        s++;
    }
    fputc('"', f);
}

void json_write_double(FILE *f, double v) {
    if (!isfinite(v)) { fputs("null", f); return; }
    char buf[40];
    for (int digits = 6; digits <= 17; digits++) {       // 17 digits name every double
        snprintf(buf, sizeof buf, "%.*g", digits, v);
        if (strtod(buf, NULL) == v) break;
    }
    fputs(buf, f);
}

// Cuts what follows the last newline: a killed run may leave half a line. Returns 0, or -1 with errno.
static int cut_half_line(FILE *f) {
    if (fseeko(f, 0, SEEK_END) != 0) return -1;
    off_t size = ftello(f), keep = size;
    for (; keep > 0; keep--) {
        if (fseeko(f, keep - 1, SEEK_SET) != 0) return -1;
        int c = fgetc(f);
        if (c == EOF) return -1;
        if (c == '\n') break;
    }
    if (keep < size && ftruncate(fileno(f), keep) != 0) return -1;
    return fseeko(f, 0, SEEK_END);
}

int jsonlog_open(JsonLog *l, const char *path, bool append, Err *err) {
    memset(l, 0, sizeof *l);
    if (!path) return 0;
    if (strlen(path) >= sizeof l->path)
        return err_set(err, E_USAGE, "%.60s...: path of the log is longer than %zu bytes", path, sizeof l->path - 1);
    snprintf(l->path, sizeof l->path, "%s", path);
    l->f = fopen(path, append ? "a+" : "w");
    if (!l->f) return err_set(err, E_FAIL, "%s: cannot write the log: %s", path, strerror(errno));
    if (append && cut_half_line(l->f) != 0) {
        int rc = err_set(err, E_FAIL, "%s: cannot append to the log: %s", path, strerror(errno));
        fclose(l->f);
        l->f = NULL;
        return rc;
    }
    return 0;
}

void jsonlog_begin(JsonLog *l, const char *event) {
    if (!l->f) return;
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    fputs("{\"event\": ", l->f);
    json_write_string(l->f, event);
    fprintf(l->f, ", \"time\": %lld.%03ld", (long long)t.tv_sec, t.tv_nsec / 1000000);
}

static void write_key(JsonLog *l, const char *key) {
    fputs(", ", l->f);
    json_write_string(l->f, key);
    fputs(": ", l->f);
}

void jsonlog_num(JsonLog *l, const char *key, double v) {
    if (!l->f) return;
    write_key(l, key);
    json_write_double(l->f, v);
}

void jsonlog_int(JsonLog *l, const char *key, long long v) {
    if (!l->f) return;
    write_key(l, key);
    fprintf(l->f, "%lld", v);
}

void jsonlog_str(JsonLog *l, const char *key, const char *v) {
    if (!l->f) return;
    write_key(l, key);
    json_write_string(l->f, v);
}

void jsonlog_raw(JsonLog *l, const char *key, const char *json) {
    if (!l->f) return;
    write_key(l, key);
    fputs(json, l->f);
}

void jsonlog_end(JsonLog *l) {
    if (!l->f) return;
    fputs("}\n", l->f);
    // Where the log is the program's own output, the program asks stdout for what went wrong.
    if ((fflush(l->f) == 0 && !ferror(l->f)) || l->f == stdout) return;
    fprintf(stderr, "warning: %s: cannot write the log (%s); going on without it\n", l->path, strerror(errno));
    fclose(l->f);
    l->f = NULL;
    l->failed = true;
}

int jsonlog_close(JsonLog *l) {
    if (l->f && fclose(l->f) != 0) {
        fprintf(stderr, "warning: %s: the log's end is lost (%s)\n", l->path, strerror(errno));
        l->failed = true;
    }
    l->f = NULL;
    return l->failed ? -1 : 0;
}

// ---------------------------------------------------------------------------------------------
// Readable numbers.

// Three significant digits, then the unit of the power of 1000 they fall into.
static const char *fmt_scaled(char buf[32], double v, const char *const *units, int n_units) {
    if (!(v >= 0) || !isfinite(v)) { snprintf(buf, 32, "?"); return buf; }
    int u = 0;
    while (u + 1 < n_units && v >= 999.5) { v /= 1000; u++; }      // 999.5 would print as 1000
    int decimals = u == 0 && v == floor(v) ? 0 : v < 9.995 ? 2 : v < 99.95 ? 1 : 0;
    snprintf(buf, 32, "%.*f%s", decimals, v, units[u]);
    return buf;
}

const char *fmt_bytes(char buf[32], double bytes) {
    static const char *const units[] = {" B", " kB", " MB", " GB", " TB", " PB", " EB"};
    return fmt_scaled(buf, bytes, units, 7);
}

const char *fmt_count(char buf[32], double n) {
    static const char *const units[] = {"", "k", "M", "B", "T"};
    return fmt_scaled(buf, n, units, 5);
}

const char *fmt_time(char buf[32], double seconds) {
    if (!(seconds >= 0) || !(seconds < 1e9)) { snprintf(buf, 32, "?"); return buf; }
    long s = lround(seconds);
    if (seconds < 9.95) snprintf(buf, 32, "%.1fs", seconds);
    else if (s < 60) snprintf(buf, 32, "%lds", s);
    else if (s < 3600) snprintf(buf, 32, "%ldm%02lds", s / 60, s % 60);
    else if (s < 86400) snprintf(buf, 32, "%ldh%02ldm", s / 3600, s % 3600 / 60);
    else snprintf(buf, 32, "%ldd%02ldh", s / 86400, s % 86400 / 3600);
    return buf;
}

// ---------------------------------------------------------------------------------------------
// Progress.

static void progress_draw(const Progress *p, double done, bool terminal, bool last) {
    char left[32], used[32];
    double share = p->total > 0 ? done / p->total : 1, elapsed = now_seconds() - p->start;
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    fmt_time(used, elapsed);
    fmt_time(left, share > 0 ? elapsed * (1 - share) / share : NAN);
    if (terminal) {
        char bar[31];
        int filled = (int)(share * 30);
        for (int i = 0; i < 30; i++) bar[i] = i < filled ? '#' : '.';
        bar[30] = '\0';
        fprintf(stderr, "\r\033[K%s [%s] %3.0f%%  %s, %s left  %s%s", p->what, bar, 100 * share, used, left, p->suffix,
                last ? "\n" : "");
    } else {
        fprintf(stderr, "%s %3.0f%%  %s, %s left  %s\n", p->what, 100 * share, used, left, p->suffix);
    }
    fflush(stderr);
}

void progress_begin(Progress *p, const char *what, double total) {
    *p = (Progress){.what = what, .total = total, .start = now_seconds()};
}

void progress_update(Progress *p, double done, const char *suffix) {
    bool terminal = isatty(STDERR_FILENO);
    double now = now_seconds();
    snprintf(p->suffix, sizeof p->suffix, "%s", suffix ? suffix : "");
    if (terminal) {
        if (now - p->last_drawn < 0.1) return;      // faster than that nobody reads
        p->last_drawn = now;
        progress_draw(p, done, true, false);
        return;
    }
    int tenth = p->total > 0 ? (int)(10 * done / p->total) : 0;
    if (tenth <= p->last_tenth || tenth >= 10) return;    // progress_end prints the last one
    p->last_tenth = tenth;
    progress_draw(p, done, false, false);
}

void progress_hide(Progress *p) {
    if (p->last_drawn > 0 && isatty(STDERR_FILENO)) fputs("\r\033[K", stderr);
    p->last_drawn = 0;
}

void progress_end(Progress *p) { progress_draw(p, p->total, isatty(STDERR_FILENO), true); }
