// A small interpreter of the Jinja that chat templates are written in.
//
// Understood, as Jinja 3 with trim_blocks and lstrip_blocks (what transformers turns on) means it: text, {{ }}, {# #},
// if / elif / else, for (with unpacking, a condition, else, loop.*), break, continue, set (also of a namespace's fields
// and as a block), generation; strings, integers, true, false, none, lists, dicts; + - * // % ~, comparisons, in, and,
// or, not, a if b else c, indices and slices; the filters, tests, methods and functions that jinja.c names. What is not
// understood is refused by name and line: macros, imports, floats among it.
//
// Templates come from strangers: nesting, steps, memory and output are bounded, and there is nothing in the language
// that reaches outside.
#ifndef QLLM_JINJA_H
#define QLLM_JINJA_H
#include "json.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct Jinja Jinja;

// E_FORMAT names the construct and the line.
int jinja_parse(Jinja **out, const char *text, size_t len, Err *err);
void jinja_free(Jinja *t);
// variables: a JSON object, one variable a field. *text (len bytes and a NUL) is malloc'ed. Several threads may render
// one template.
int jinja_render(const Jinja *t, const cJSON *variables, char **text, size_t *len, Err *err);

#ifdef __cplusplus
}
#endif
#endif
