#include "json.h"
#include <ctype.h>
#include <stdlib.h>

#define JSON_MAX_DEPTH 64

// Whether text begins with four hexadecimal digits that are not 0000.
static bool is_character(const char *text, size_t len) {
    bool some = false;
    for (int i = 0; i < 4; i++) {
        if (len < 4 || !isxdigit((unsigned char)text[i])) return false;
        some = some || text[i] != '0';
    }
    return some;
}

// cJSON recurses, so nesting is counted before it runs; NUL bytes, spelled as \\u0000 too, and what is no \\u it would
// take for the end of a text: they are refused here.
static int check_depth(const char *text, size_t len, const char *what, Err *err) {
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < len; i++) {
        char c = text[i];
        if (c == 0) return err_set(err, E_FORMAT, "%s: NUL byte in JSON at byte %zu", what, i);
        if (in_string) {
            if (c == '\\' && i + 1 < len && text[i + 1] == 'u' && !is_character(text + i + 2, len - i - 2))
                return err_set(err, E_FORMAT, "%s: \\u is not followed by four hexadecimal digits of a character other "
                                              "than NUL, at byte %zu", what, i);
            if (c == '\\') i++;
            else if (c == '"') in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > JSON_MAX_DEPTH)
                return err_set(err, E_FORMAT, "%s: JSON nested deeper than %d at byte %zu", what, JSON_MAX_DEPTH, i);
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    return 0;
}

cJSON *json_parse(const char *text, size_t len, const char *what, Err *err) {
    if (check_depth(text, len, what, err) < 0) return NULL;
    const char *end = NULL;
    cJSON *root = cJSON_ParseWithLengthOpts(text, len, &end, false);
    if (!root) {
        err_set(err, E_FORMAT, "%s: not JSON (near byte %zu)", what, end ? (size_t)(end - text) : 0);
        return NULL;
    }
    while (end < text + len && (*end == ' ' || *end == '\n' || *end == '\r' || *end == '\t')) end++;
    if (end != text + len) {
        err_set(err, E_FORMAT, "%s: text after the JSON value at byte %zu", what, (size_t)(end - text));
        cJSON_Delete(root);
        return NULL;
    }
    return root;
}

int json_double(const cJSON *obj, const char *key, bool required, double lo, double hi, double *out, Err *err) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(obj, key);
    if (!v || cJSON_IsNull(v))
        return required ? err_set(err, E_MISSING, "field \"%s\" is missing", key) : 0;
    if (!cJSON_IsNumber(v)) return err_set(err, E_FORMAT, "field \"%s\" is not a number", key);
    double d = cJSON_GetNumberValue(v);
    if (!(d >= lo && d <= hi))
        return err_set(err, E_FORMAT, "field \"%s\" is %g; expected %g to %g", key, d, lo, hi);
    *out = d;
    return 0;
}

int json_int(const cJSON *obj, const char *key, bool required, int64_t lo, int64_t hi, int64_t *out, Err *err) {
    double d = (double)*out;
    int rc = json_double(obj, key, required, (double)lo, (double)hi, &d, err);
    if (rc < 0) return rc;
    if (d != (double)(int64_t)d) return err_set(err, E_FORMAT, "field \"%s\" is %g; expected a whole number", key, d);
    *out = (int64_t)d;
    return 0;
}

int json_bool(const cJSON *obj, const char *key, bool *out, Err *err) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(obj, key);
    if (!v || cJSON_IsNull(v)) return 0;
    if (!cJSON_IsBool(v)) return err_set(err, E_FORMAT, "field \"%s\" is not true or false", key);
    *out = cJSON_IsTrue(v);
    return 0;
}

const char *json_string(const cJSON *obj, const char *key) {
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(obj, key));
}
