// Options from one table. See cli.h.
#include "cli.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "logger.h"

// ---------------------------------------------------------------------------------------------
// Suggestions.

// Levenshtein distance: insertions, deletions and substitutions that turn a into b. Longer input is cut.
static int edit_distance(const char *a, const char *b) {
    enum { MAX = 64 };
    int row[MAX + 1];
    int na = (int)strnlen(a, MAX), nb = (int)strnlen(b, MAX);
    for (int j = 0; j <= nb; j++) row[j] = j;
    for (int i = 1; i <= na; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= nb; j++) {
            int replace = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int best = row[j] + 1 < row[j - 1] + 1 ? row[j] + 1 : row[j - 1] + 1;
            row[j] = replace < best ? replace : best;
        }
    }
    return row[nb];
}

// Smaller is nearer. What the user began to write counts as nearer than any misspelling.
static int nearness(const char *typed, const char *candidate) {
    size_t n = strlen(typed);
    if (n > 2 && strncmp(typed, candidate, n) == 0) return 0;
    return 1 + edit_distance(typed, candidate);
}

// Where the comma-separated item starting at s ends.
static const char *item_end(const char *s) {
    const char *e = strchr(s, ',');
    return e ? e : s + strlen(s);
}

static void closest_option(char *out, size_t size, const char *typed, const Option *options, int n) {
    int best = INT_MAX;
    snprintf(out, size, "--help");
    for (int i = 0; i < n; i++) {
        char name[80];
        for (int off = 0; off <= (options[i].type == OPT_FLAG); off++) {
            snprintf(name, sizeof name, "--%s%s", off ? "no-" : "", options[i].name + 2);
            int d = nearness(typed, name);
            if (d < best) { best = d; snprintf(out, size, "%s", name); }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Values.

static bool parse_int64(const char *text, int64_t *out) {
    if (!((*text >= '0' && *text <= '9') || *text == '-' || *text == '+')) return false;   // strtoll would skip spaces
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (end == text || *end || errno == ERANGE) return false;
    *out = v;
    return true;
}

static bool parse_double(const char *text, double *out) {
    if (!*text || strspn(text, "0123456789+-.eE") != strlen(text)) return false;   // no "nan", "inf", hex or spaces
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || v - v != 0) return false;                           // overflow gives an infinity
    *out = v;
    return true;
}

// The two ends of "lo..hi", either of which may be empty.
static void range_ends(const char *allowed, char lo[64], char hi[64]) {
    lo[0] = hi[0] = '\0';
    const char *dots = allowed ? strstr(allowed, "..") : NULL;
    if (!dots || dots - allowed > 63) return;
    snprintf(lo, 64, "%.*s", (int)(dots - allowed), allowed);
    snprintf(hi, 64, "%s", dots + 2);
}

static bool int_in_range(const Option *o, int64_t v) {
    char lo[64], hi[64];
    int64_t bound;
    range_ends(o->allowed, lo, hi);
    if (o->type == OPT_INT && (v < INT_MIN || v > INT_MAX)) return false;
    return !(parse_int64(lo, &bound) && v < bound) && !(parse_int64(hi, &bound) && v > bound);
}

static bool double_in_range(const Option *o, double v) {
    char lo[64], hi[64];
    double bound;
    range_ends(o->allowed, lo, hi);
    return !(parse_double(lo, &bound) && v < bound) && !(parse_double(hi, &bound) && v > bound);
}

// Index of text in "a,b,c", or -1.
static int enum_index(const char *allowed, const char *text) {
    int i = 0;
    for (const char *s = allowed; ; i++) {
        const char *e = item_end(s);
        if ((size_t)(e - s) == strlen(text) && strncmp(s, text, (size_t)(e - s)) == 0) return i;
        if (!*e) return -1;
        s = e + 1;
    }
}

static void enum_name(char *out, size_t size, const char *allowed, int index) {
    const char *s = allowed;
    for (; index > 0 && *item_end(s); index--) s = item_end(s) + 1;
    snprintf(out, size, "%.*s", (int)(item_end(s) - s), s);
}

static int bad_enum(const Option *o, const char *text, Err *err) {
    char best_name[64] = "", name[64];
    int best = INT_MAX;
    for (const char *s = o->allowed; ; s = item_end(s) + 1) {
        snprintf(name, sizeof name, "%.*s", (int)(item_end(s) - s), s);
        int d = nearness(text, name);
        if (d < best) { best = d; snprintf(best_name, sizeof best_name, "%s", name); }
        if (!*item_end(s)) break;
    }
    return err_set(err, E_USAGE, "%s %.200s: no such choice; did you mean %s? (one of %s)", o->name, text, best_name,
                   o->allowed);
}

static int set_option(const Option *o, const char *text, Err *err) {
    int64_t i;
    double d;
    switch (o->type) {
    case OPT_FLAG:
        *(bool *)o->where = strcmp(text, "1") == 0 || strcmp(text, "true") == 0;
        return 0;
    case OPT_INT:
    case OPT_INT64:
        if (!parse_int64(text, &i))
            return err_set(err, E_USAGE, "%s %.200s: not a whole number%s%s", o->name, text,
                           o->allowed ? " in " : "", o->allowed ? o->allowed : "");
        if (!int_in_range(o, i))
            return err_set(err, E_USAGE, "%s %.200s: out of range; allowed is %s", o->name, text,
                           o->allowed ? o->allowed : "a 32-bit integer");
        if (o->type == OPT_INT) *(int *)o->where = (int)i;
        else *(int64_t *)o->where = i;
        return 0;
    case OPT_FLOAT:
        if (!parse_double(text, &d))
            return err_set(err, E_USAGE, "%s %.200s: not a finite number%s%s", o->name, text,
                           o->allowed ? " in " : "", o->allowed ? o->allowed : "");
        if (!double_in_range(o, d))
            return err_set(err, E_USAGE, "%s %.200s: out of range; allowed is %s", o->name, text, o->allowed);
        *(double *)o->where = d;
        return 0;
    case OPT_STRING:
        *(const char **)o->where = text;
        return 0;
    case OPT_ENUM: {
        int index = enum_index(o->allowed, text);
        if (index < 0) return bad_enum(o, text, err);
        *(int *)o->where = index;
        return 0;
    }
    case OPT_LIST: {
        StringList *list = o->where;
        if (list->n >= STRING_LIST_MAX)
            return err_set(err, E_USAGE, "%s is given more than %d times; give fewer", o->name, STRING_LIST_MAX);
        list->item[list->n++] = text;
        return 0;
    }
    }
    return err_set(err, E_FAIL, "%s: option of unknown type", o->name);
}

static int set_default(const Option *o, Err *err) {
    switch (o->type) {
    case OPT_FLAG: *(bool *)o->where = false; break;
    case OPT_INT: case OPT_ENUM: *(int *)o->where = 0; break;
    case OPT_INT64: *(int64_t *)o->where = 0; break;
    case OPT_FLOAT: *(double *)o->where = 0; break;
    case OPT_STRING: *(const char **)o->where = NULL; break;
    case OPT_LIST: ((StringList *)o->where)->n = 0; break;
    }
    return o->def ? set_option(o, o->def, err) : 0;
}

// The present value as a person would type it; "" for an unset string.
static void value_text(const Option *o, char *out, size_t size) {
    switch (o->type) {
    case OPT_FLAG: snprintf(out, size, "%s", *(bool *)o->where ? "yes" : "no"); break;
    case OPT_INT: snprintf(out, size, "%d", *(int *)o->where); break;
    case OPT_INT64: snprintf(out, size, "%lld", (long long)*(int64_t *)o->where); break;
    case OPT_FLOAT: snprintf(out, size, "%g", *(double *)o->where); break;
    case OPT_ENUM: enum_name(out, size, o->allowed, *(int *)o->where); break;
    case OPT_STRING: {
        const char *s = *(const char **)o->where;
        snprintf(out, size, "%s", s ? s : "");
        break;
    }
    case OPT_LIST: {
        const StringList *list = o->where;
        size_t used = 0;
        out[0] = '\0';
        for (int i = 0; i < list->n && used < size; i++)
            used += (size_t)snprintf(out + used, size - used, "%s%s", i ? ", " : "", list->item[i]);
        break;
    }
    }
}

static bool is_default(const Option *o) {
    int64_t i;
    double d;
    switch (o->type) {
    case OPT_FLAG: return *(bool *)o->where == (o->def && (strcmp(o->def, "1") == 0 || strcmp(o->def, "true") == 0));
    case OPT_INT: return *(int *)o->where == (o->def && parse_int64(o->def, &i) ? i : 0);
    case OPT_INT64: return *(int64_t *)o->where == (o->def && parse_int64(o->def, &i) ? i : 0);
    case OPT_FLOAT: return *(double *)o->where == (o->def && parse_double(o->def, &d) ? d : 0);
    case OPT_ENUM: return *(int *)o->where == (o->def ? enum_index(o->allowed, o->def) : 0);
    case OPT_LIST: return ((const StringList *)o->where)->n == (o->def != NULL);
    case OPT_STRING: {
        const char *s = *(const char **)o->where;
        return s == o->def || (s && o->def && strcmp(s, o->def) == 0);
    }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------
// The public functions.

static void print_help(const Option *options, int n, const char *summary) {
    static const char *const kinds[] = {"", "INT", "INT", "NUMBER", "TEXT", "CHOICE", "TEXT"};
    if (summary) printf("%s%s", summary, summary[0] && summary[strlen(summary) - 1] == '\n' ? "\n" : "\n\n");
    printf("options (--name value or --name=value):\n");
    for (int i = 0; i < n; i++) {
        const Option *o = &options[i];
        char left[128];
        snprintf(left, sizeof left, "%s %s", o->name, kinds[o->type]);
        printf("  %-26s %s", left, o->help ? o->help : "");
        if (o->type == OPT_FLAG) {
            bool on = o->def && (strcmp(o->def, "1") == 0 || strcmp(o->def, "true") == 0);
            if (on) printf(" [on; --no-%s turns it off]", o->name + 2);
        } else {
            if (o->allowed && o->type == OPT_ENUM) printf(" (%s)", o->allowed);
            else if (o->allowed) printf(" {%s}", o->allowed);
            if (o->def && *o->def) printf(" [%s]", o->def);
            if (o->type == OPT_LIST) printf(" (may be repeated)");
        }
        printf("\n");
    }
    printf("  %-26s %s\n  %-26s %s\n", "-h, --help", "this help", "--version", "the version");
}

int cli_parse(const Option *options, int n, const char *summary, const char **positional, int argc, char **argv,
              Err *err) {
    for (int i = 0; i < n; i++) {
        int rc = set_default(&options[i], err);
        if (rc < 0) return rc;
    }
    if (positional) *positional = NULL;
    bool only_positional = false;
    for (int a = 1; a < argc; a++) {
        const char *arg = argv[a];
        if (!only_positional && strcmp(arg, "--") == 0) { only_positional = true; continue; }
        if (only_positional || arg[0] != '-' || arg[1] == '\0') {
            if (!positional)
                return err_set(err, E_USAGE, "%.200s: this program takes options only, no plain argument; see --help",
                               arg);
            if (*positional)
                return err_set(err, E_USAGE, "%.200s: one plain argument is taken, and %.200s was given already; "
                               "see --help", arg, *positional);
            *positional = arg;
            continue;
        }
        if (strcmp(arg, "-h") == 0 || strcmp(arg, "--help") == 0) {
            print_help(options, n, summary);
            exit(fflush(stdout) == 0 ? 0 : 1);
        }
        if (strcmp(arg, "--version") == 0) {
            printf("qllm.c %s (%s)\n", QLLM_VERSION, FLOATX_NAME);
            exit(fflush(stdout) == 0 ? 0 : 1);
        }

        size_t name_len = strcspn(arg, "=");
        const char *value = arg[name_len] ? arg + name_len + 1 : NULL;
        const Option *o = NULL;
        bool negated = false;
        for (int i = 0; i < n && !o; i++) {
            const char *name = options[i].name;
            if (strlen(name) == name_len && strncmp(arg, name, name_len) == 0) o = &options[i];
            else if (options[i].type == OPT_FLAG && strncmp(arg, "--no-", 5) == 0 && strlen(name) + 3 == name_len &&
                     strncmp(arg + 5, name + 2, name_len - 5) == 0) { o = &options[i]; negated = true; }
        }
        if (!o) {
            char typed[80], best[80];
            snprintf(typed, sizeof typed, "%.*s", name_len < 79 ? (int)name_len : 79, arg);
            closest_option(best, sizeof best, typed, options, n);
            return err_set(err, E_USAGE, "%s: unknown option; did you mean %s? (--help lists all)", typed, best);
        }
        if (o->type == OPT_FLAG) {
            if (value)
                return err_set(err, E_USAGE, "%.200s: %s is a switch and takes no value; write %s or --no-%s", arg,
                               o->name, o->name, o->name + 2);
            *(bool *)o->where = !negated;
            continue;
        }
        if (!value) {
            // A value may begin with one dash (-1); two dashes are the next option, so the value was forgotten.
            if (a + 1 >= argc || strncmp(argv[a + 1], "--", 2) == 0)
                return err_set(err, E_USAGE, "%s needs a value%s%s (%s)", o->name, o->allowed ? ": " : "",
                               o->allowed ? o->allowed : "", o->help ? o->help : "see --help");
            value = argv[++a];
        }
        int rc = set_option(o, value, err);
        if (rc < 0) return rc;
    }
    return 0;
}

void cli_echo(const Option *options, int n, FILE *out) {
    size_t width = 0;
    for (int i = 0; i < n; i++) {
        size_t w = strlen(options[i].name + 2);
        width = w > width ? w : width;
    }
    fprintf(out, "settings (* differs from the default)\n");
    for (int i = 0; i < n; i++) {
        char text[512];
        value_text(&options[i], text, sizeof text);
        fprintf(out, " %c %-*s  %s\n", is_default(&options[i]) ? ' ' : '*', (int)width, options[i].name + 2,
                *text ? text : "-");
    }
}

char *cli_json(const Option *options, int n) {
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f) { perror("open_memstream"); abort(); }     // like xmalloc: a small host object that there is no memory for
    fputc('{', f);
    for (int i = 0; i < n; i++) {
        const Option *o = &options[i];
        if (i) fputs(", ", f);
        json_write_string(f, o->name + 2);
        fputs(": ", f);
        switch (o->type) {
        case OPT_FLAG: fputs(*(bool *)o->where ? "true" : "false", f); break;
        case OPT_INT: fprintf(f, "%d", *(int *)o->where); break;
        case OPT_INT64: fprintf(f, "%lld", (long long)*(int64_t *)o->where); break;
        case OPT_FLOAT: json_write_double(f, *(double *)o->where); break;
        case OPT_STRING: json_write_string(f, *(const char **)o->where); break;
        case OPT_ENUM: {
            char name[64];
            enum_name(name, sizeof name, o->allowed, *(int *)o->where);
            json_write_string(f, name);
            break;
        }
        case OPT_LIST: {
            const StringList *list = o->where;
            fputc('[', f);
            for (int j = 0; j < list->n; j++) {
                if (j) fputs(", ", f);
                json_write_string(f, list->item[j]);
            }
            fputc(']', f);
            break;
        }
        }
    }
    fputc('}', f);
    if (fclose(f) != 0 || !text) { perror("cli_json"); abort(); }
    return text;
}
