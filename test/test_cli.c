// Options: values, ranges, suggestions, echo and JSON.
#include "test_common.h"

#include <math.h>

#include "cli.h"
#include "json.h"

static struct {
    bool verbose, shuffle;
    int seq_len, recompute, any;
    int64_t tokens;
    double lr;
    const char *out, *model;
    StringList rules;
} run;

static const Option options[] = {
    {"--model",     OPT_STRING, &run.model,     NULL,   NULL,              "model to start from"},
    {"--out",       OPT_STRING, &run.out,       "run",  NULL,              "output folder"},
    {"--seq-len",   OPT_INT,    &run.seq_len,   "1024", "1..131072",       "tokens in a sequence"},
    {"--seed",      OPT_INT,    &run.any,       "0",    NULL,              "any integer"},
    {"--tokens",    OPT_INT64,  &run.tokens,    "-1",   "-1..",            "tokens in all"},
    {"--lr",        OPT_FLOAT,  &run.lr,        "3e-5", "0..1",            "peak learning rate"},
    {"--recompute", OPT_ENUM,   &run.recompute, "none", "none,norm,block", "computed again"},
    {"--verbose",   OPT_FLAG,   &run.verbose,   NULL,   NULL,              "say more"},
    {"--shuffle",   OPT_FLAG,   &run.shuffle,   "1",    NULL,              "shuffle"},
    {"--rule",      OPT_LIST,   &run.rules,     NULL,   "PATTERN=SCHEME",  "scheme by name"},
};
enum { N_OPTIONS = sizeof options / sizeof *options };

// Parses a blank-separated command line.
static int parse(const char *line, const char **positional, Err *err) {
    static char buf[8192];
    static char *argv[1024];
    int argc = 0;
    snprintf(buf, sizeof buf, "prog %s", line);
    for (char *s = strtok(buf, " "); s && argc < 1023; s = strtok(NULL, " ")) argv[argc++] = s;
    argv[argc] = NULL;
    err->text[0] = '\0';
    return cli_parse(options, N_OPTIONS, "usage: prog", positional, argc, argv, err);
}

static void parses(const char *line) {
    Err err;
    if (parse(line, NULL, &err) != 0) fail_msg("%s: %s", line, err.text);
}

// The line is refused, and the message holds every given part.
static void refuses(const char *line, const char *part1, const char *part2) {
    Err err;
    if (parse(line, NULL, &err) != E_USAGE) fail_msg("%s: not refused as a usage error", line);
    if (!strstr(err.text, part1)) fail_msg("%s: \"%s\" lacks \"%s\"", line, err.text, part1);
    if (part2 && !strstr(err.text, part2)) fail_msg("%s: \"%s\" lacks \"%s\"", line, err.text, part2);
}

static void test_defaults(void **state) {
    (void)state;
    memset(&run, 0xff, sizeof run);
    parses("");
    assert_null(run.model);
    assert_string_equal(run.out, "run");
    assert_int_equal(run.seq_len, 1024);
    assert_int_equal(run.any, 0);
    assert_true(run.tokens == -1);
    assert_true(run.lr == 3e-5);
    assert_int_equal(run.recompute, 0);
    assert_false(run.verbose);
    assert_true(run.shuffle);
    assert_int_equal(run.rules.n, 0);
}

static void test_values(void **state) {
    (void)state;
    parses("--model a/b --out=c=d --seq-len 7 --seed=-12 --tokens 9000000000 --lr=.5e0 --recompute block --verbose "
           "--no-shuffle --rule x=none --rule=y=int8wo");
    assert_string_equal(run.model, "a/b");
    assert_string_equal(run.out, "c=d");
    assert_int_equal(run.seq_len, 7);
    assert_int_equal(run.any, -12);
    assert_true(run.tokens == 9000000000);
    assert_true(run.lr == 0.5);
    assert_int_equal(run.recompute, 2);
    assert_true(run.verbose);
    assert_false(run.shuffle);
    assert_int_equal(run.rules.n, 2);
    assert_string_equal(run.rules.item[0], "x=none");
    assert_string_equal(run.rules.item[1], "y=int8wo");

    parses("--seq-len 7 --seq-len 9 --no-verbose --verbose --out= --seed -1");   // the last one counts
    assert_int_equal(run.seq_len, 9);
    assert_true(run.verbose);
    assert_string_equal(run.out, "");
    assert_int_equal(run.any, -1);
}

static void test_ranges(void **state) {
    (void)state;
    parses("--seq-len 1 --lr 0");
    parses("--seq-len 131072 --lr 1");
    refuses("--seq-len 0", "--seq-len 0", "1..131072");
    refuses("--seq-len 131073", "out of range", "1..131072");
    refuses("--tokens -2", "out of range", "-1..");
    refuses("--lr 1.0001", "--lr 1.0001", "0..1");
    refuses("--lr -1e-9", "out of range", "0..1");
}

static void test_malformed(void **state) {
    (void)state;
    refuses("--seq-len 12x", "--seq-len 12x", "whole number");
    refuses("--seq-len 1e3", "whole number", NULL);
    refuses("--seq-len=", "whole number", NULL);
    refuses("--seed 2147483648", "out of range", "32-bit");                  // INT_MAX + 1
    refuses("--seed -2147483649", "out of range", "32-bit");
    refuses("--tokens 9223372036854775808", "whole number", NULL);           // INT64_MAX + 1
    refuses("--lr nan", "finite", NULL);
    refuses("--lr inf", "finite", NULL);
    refuses("--lr 1e999", "finite", NULL);
    refuses("--lr 0x1p-3", "finite", NULL);
    refuses("--lr .", "finite", NULL);
    parses("--seed 2147483647");
    parses("--seed -2147483648");
    parses("--tokens 9223372036854775807");
}

static void test_suggestions(void **state) {
    (void)state;
    refuses("--seqlen 8", "--seqlen: unknown option", "did you mean --seq-len?");
    refuses("--seq 8", "--seq:", "did you mean --seq-len?");                 // begun, though --seed is fewer edits away
    refuses("--no-shufle", "--no-shufle", "did you mean --no-shuffle?");
    refuses("--Lr=3", "--Lr:", "did you mean --lr?");
    refuses("-verbose", "-verbose", "did you mean --verbose?");
    refuses("--no-lr", "--no-lr: unknown option", NULL);                     // only switches can be turned off
    refuses("--recompute blok", "--recompute blok", "did you mean block? (one of none,norm,block)");
    refuses("--recompute non", "did you mean none?", NULL);
    refuses("--recompute none,norm", "no such choice", NULL);
    refuses("--verbose=1", "takes no value", "--no-verbose");
    refuses("--seq-len", "--seq-len needs a value", "tokens in a sequence");
    refuses("--out --verbose", "--out needs a value", NULL);
    char line[1100] = "--";
    memset(line + 2, 'x', 1000);                                             // no overflow in the message either
    line[1002] = '\0';
    refuses(line, "unknown option", "did you mean");
}

static void test_positional(void **state) {
    (void)state;
    Err err;
    const char *p;
    assert_int_equal(parse("--seq-len 3 model.bin --verbose", &p, &err), 0);
    assert_string_equal(p, "model.bin");
    assert_int_equal(parse("-- --odd-name", &p, &err), 0);
    assert_string_equal(p, "--odd-name");
    assert_int_equal(parse("-", &p, &err), 0);
    assert_string_equal(p, "-");
    assert_int_equal(parse("", &p, &err), 0);
    assert_null(p);
    assert_int_equal(parse("a b", &p, &err), E_USAGE);
    assert_non_null(strstr(err.text, "a was given already"));
    refuses("model.bin", "model.bin", "options only");
}

static void test_list_limit(void **state) {
    (void)state;
    char line[4096] = "";
    for (int i = 0; i < STRING_LIST_MAX; i++) strcat(line, "--rule r ");
    parses(line);
    assert_int_equal(run.rules.n, STRING_LIST_MAX);
    strcat(line, "--rule r");
    refuses(line, "--rule", "more than 64 times");
}

static void test_echo(void **state) {
    (void)state;
    parses("--seq-len 77 --lr 3.0e-5 --rule a --rule b");
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    cli_echo(options, N_OPTIONS, f);
    fclose(f);
    assert_non_null(strstr(text, " * seq-len    77\n"));
    assert_non_null(strstr(text, "   lr         3e-05\n"));     // given, but equal to the default
    assert_non_null(strstr(text, " * rule       a, b\n"));
    assert_non_null(strstr(text, "   model      -\n"));
    free(text);
}

static void test_json(void **state) {
    (void)state;
    parses("--out a\"b\\c --seq-len 5 --lr 0.1 --recompute norm --no-shuffle --rule x=\"y\"");
    char *text = cli_json(options, N_OPTIONS);
    Err err;
    cJSON *json = json_parse(text, strlen(text), "cli_json", &err);
    if (!json) fail_msg("%s: %s", text, err.text);
    assert_string_equal(cJSON_GetObjectItem(json, "out")->valuestring, "a\"b\\c");
    assert_int_equal(cJSON_GetObjectItem(json, "seq-len")->valueint, 5);
    assert_true(cJSON_GetObjectItem(json, "lr")->valuedouble == 0.1);
    assert_string_equal(cJSON_GetObjectItem(json, "recompute")->valuestring, "norm");
    assert_true(cJSON_IsFalse(cJSON_GetObjectItem(json, "shuffle")));
    assert_true(cJSON_IsNull(cJSON_GetObjectItem(json, "model")));
    assert_string_equal(cJSON_GetArrayItem(cJSON_GetObjectItem(json, "rule"), 0)->valuestring, "x=\"y\"");
    cJSON_Delete(json);
    free(text);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),   cmocka_unit_test(test_values),      cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_malformed),  cmocka_unit_test(test_suggestions), cmocka_unit_test(test_positional),
        cmocka_unit_test(test_list_limit), cmocka_unit_test(test_echo),        cmocka_unit_test(test_json),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
