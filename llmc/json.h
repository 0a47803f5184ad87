// Small helpers over cJSON: bounded parsing and checked fields. Writers escape through logger.h.
#ifndef QLLM_JSON_H
#define QLLM_JSON_H
#include <cjson/cJSON.h>
#include "common.h"

// Parses exactly len bytes; refuses nesting deeper than 64 before cJSON sees it, trailing text and NUL bytes. NULL and
// err on failure.
cJSON *json_parse(const char *text, size_t len, const char *what, Err *err);
// Field of an object with its type and range checked. `required` missing fields are E_MISSING; otherwise *out keeps its
// value.
int json_int(const cJSON *obj, const char *key, bool required, int64_t lo, int64_t hi, int64_t *out, Err *err);
int json_double(const cJSON *obj, const char *key, bool required, double lo, double hi, double *out, Err *err);
int json_bool(const cJSON *obj, const char *key, bool *out, Err *err);
const char *json_string(const cJSON *obj, const char *key);          // NULL if absent or not a string
#endif
