// Options from one table: it parses, checks, prints --help, echoes the settings and hands them to logs as JSON.
#ifndef QLLM_CLI_H
#define QLLM_CLI_H
#include "common.h"

typedef enum { OPT_FLAG, OPT_INT, OPT_INT64, OPT_FLOAT, OPT_STRING, OPT_ENUM, OPT_LIST } OptionType;

typedef struct {
    const char *name;        // "--seq-len"
    OptionType type;
    void *where;             // bool*, int*, int64_t*, double*, const char**, int* (index into the enum), StringList*
    const char *def;         // default as text, NULL: none (strings stay NULL, lists empty)
    const char *allowed;     // INT, FLOAT: "1..131072" (an end may be empty); ENUM: "none,norm"; else NULL or a hint
    const char *help;        // one line
} Option;

#define STRING_LIST_MAX 64
typedef struct { const char *item[STRING_LIST_MAX]; int n; } StringList;   // an option that may be given several times

// A positional argument is stored in *positional (NULL: none allowed); behind "--" everything is positional.
// --name value and --name=value both work; a flag takes no value, and --no-name turns it off. Given twice, the last one
// counts (lists collect). Unknown or malformed input is E_USAGE and names the closest option. Ranges are inclusive;
// numbers are plain decimals, NaN and infinities refused.
// -h or --help prints the help and exits 0; --version prints the version and exits 0.
// summary: lines printed above the options ("usage: ...").
int cli_parse(const Option *options, int n, const char *summary, const char **positional, int argc, char **argv,
              Err *err);
void cli_echo(const Option *options, int n, FILE *out);              // a table of settings, changed ones marked
char *cli_json(const Option *options, int n);                        // {"seq-len": 1024, ...}, malloc'ed
#endif
