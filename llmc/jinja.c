// A recursive-descent parser makes a tree of nodes; rendering walks it. All memory of either comes from an arena with a
// limit, and whatever goes wrong leaves by longjmp to the one function that set it up and frees the arena.
#include "jinja.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    MAX_TEMPLATE = 1 << 20,          // bytes of a template
    MAX_NESTING = 64,                // of blocks and expressions in the template, and of lists in lists
    MAX_TREE = 200,                  // of nodes: a + b + c + ... nests too
    MAX_STEPS = 1 << 23,             // nodes visited and pieces of 64 bytes looked at, for one rendering
    MAX_CHUNK = 1 << 16
};
#define MAX_MEMORY ((size_t)256 << 20)   // of one rendering: each concatenation is a new string

// ---------------------------------------------------------------------------------------------
// Memory and errors.

typedef struct Chunk { struct Chunk *next; } Chunk;

// What parsing and rendering share.
typedef struct {
    Chunk *chunks;
    char *free;                      // in the newest chunk
    size_t left, total;
    jmp_buf out;
    Err *err;
    int code;
} Base;

__attribute__((format(printf, 3, 4), noreturn)) static void fail(Base *b, int line, const char *fmt, ...) {
    char what[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    b->code = err_set(b->err, E_FORMAT, "chat template, line %d: %s", line, what);
    longjmp(b->out, 1);
}

static void *get(Base *b, size_t bytes) {
    bytes = (bytes + 15) & ~(size_t)15;
    if (bytes > b->left) {
        size_t room = bytes > MAX_CHUNK ? bytes : MAX_CHUNK;
        Chunk *c = room <= MAX_MEMORY - b->total ? malloc(16 + room) : NULL;
        if (!c) {
            b->code = err_set(b->err, E_FORMAT, "the chat template needs more than %zu MB of memory for this "
                              "conversation", MAX_MEMORY >> 20);
            longjmp(b->out, 1);
        }
        c->next = b->chunks;
        b->chunks = c;
        b->total += room;
        b->free = (char *)c + 16;
        b->left = room;
    }
    void *p = b->free;
    b->free += bytes;
    b->left -= bytes;
    return p;
}

static void *get_zeroed(Base *b, size_t bytes) { return memset(get(b, bytes), 0, bytes); }

static void release(Base *b) {
    for (Chunk *c = b->chunks; c;) {
        Chunk *next = c->next;
        free(c);
        c = next;
    }
    b->chunks = NULL;
}

// ---------------------------------------------------------------------------------------------
// Values.

typedef struct { const char *p; size_t n; } Text;

typedef enum { V_UNDEFINED, V_NONE, V_BOOL, V_INT, V_STRING, V_LIST, V_DICT, V_NAMESPACE, V_LOOP } ValueType;
static const char *const type_names[] = {"undefined", "none", "a boolean", "an integer", "a string", "a list", "a dict",
                                         "a namespace", "a loop"};

typedef struct Value Value;
typedef struct { Value *item; size_t n; } List;
typedef struct { Text *key; Value *item; size_t n, room; } Dict;      // in the order of insertion
typedef struct { const List *over; size_t i; } Loop;
struct Value {
    ValueType type;
    union { bool b; int64_t i; Text s; List *list; Dict *dict; Loop *loop; } u;
};

static const Value undefined = {.type = V_UNDEFINED}, none = {.type = V_NONE};
static Value of_bool(bool b) { return (Value){.type = V_BOOL, .u.b = b}; }
static Value of_int(int64_t i) { return (Value){.type = V_INT, .u.i = i}; }
static Value of_text(Text t) { return (Value){.type = V_STRING, .u.s = t}; }
static Text text_of(const char *s) { return (Text){s, strlen(s)}; }
static bool same(Text a, Text b) { return a.n == b.n && (a.n == 0 || memcmp(a.p, b.p, a.n) == 0); }
static bool is(Text a, const char *s) { return same(a, text_of(s)); }

static List *new_list(Base *b, size_t n) {
    List *l = get(b, sizeof *l);
    *l = (List){.item = get_zeroed(b, n * sizeof *l->item), .n = n};
    return l;
}

static Value *dict_find(const Dict *d, Text key) {
    for (size_t i = 0; i < d->n; i++)
        if (same(d->key[i], key)) return &d->item[i];
    return NULL;
}

static void dict_put(Base *b, Dict *d, Text key, Value v) {
    Value *old = dict_find(d, key);
    if (old) {
        *old = v;
        return;
    }
    if (d->n == d->room) {
        size_t room = d->room ? 2 * d->room : 8;
        Text *keys = get(b, room * sizeof *keys);
        Value *items = get(b, room * sizeof *items);
        if (d->n) memcpy(keys, d->key, d->n * sizeof *keys);
        if (d->n) memcpy(items, d->item, d->n * sizeof *items);
        *d = (Dict){keys, items, d->n, room};
    }
    d->key[d->n] = key;
    d->item[d->n++] = v;
}

// ---------------------------------------------------------------------------------------------
// The tree.

typedef enum {
    // statements
    N_TEXT, N_PRINT, N_IF, N_FOR, N_SET, N_BREAK, N_CONTINUE,
    // expressions
    N_CONST, N_NAME, N_ATTRIBUTE, N_INDEX, N_SLICE, N_CALL, N_NAMED, N_FILTER, N_TEST, N_NOT, N_MINUS, N_BINARY, N_AND,
    N_OR, N_CHOICE, N_LIST, N_DICT
} NodeType;

typedef enum {
    OP_ADD, OP_SUB, OP_MUL, OP_DIV, OP_MOD, OP_CONCAT, OP_EQ, OP_NE, OP_LT, OP_LE, OP_GT, OP_GE, OP_IN, OP_NOT_IN
} BinaryOp;

// What the children are:
//   PRINT a          IF a, then list, else other        FOR text[, text2] in a [if b], list, else other
//   SET text[.text2] = a, or the output of list          ATTRIBUTE a.text        INDEX a[b]      SLICE a[list: 3]
//   CALL a(list)     NAMED text=a, an argument by name   FILTER a|text(list)     TEST a is text(list)
//   NOT, MINUS a     BINARY, AND, OR a b                 CHOICE b if a else c    LIST list
//   DICT list: key, value, ...
typedef struct Node Node;
struct Node {
    NodeType type;
    BinaryOp op;
    int line, depth;
    Text text, text2;
    Value value;
    Node *a, *b, *c, *list, *other;
    Node *next;                      // in a list
};

struct Jinja { Base base; Node *body; };

// ---------------------------------------------------------------------------------------------
// Words.

typedef enum { T_END, T_NAME, T_INT, T_STRING, T_OP } TokenType;
typedef struct { TokenType type; Text text; int64_t value; int line; } Token;

typedef struct {
    Base *b;
    const char *p, *end;             // what is to be read
    int line, nesting, brackets, loops;
    bool line_start;                 // a line begins at p: the tag before took the line break
    bool in_block;                   // the tag being read is {% %}, not {{ }}
    Token token;                     // the one to look at, within a tag
} Parser;

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static bool is_digit(char c) { return c >= '0' && c <= '9'; }
static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

static void advance(Parser *s, size_t n) {
    for (; n > 0; n--, s->p++) s->line += *s->p == '\n';
}

static bool starts(const Parser *s, const char *with) {
    size_t n = strlen(with);
    return (size_t)(s->end - s->p) >= n && memcmp(s->p, with, n) == 0;
}

// The end of a tag and what it swallows: -%} all white space, %} and #} one line break.
static bool take_tag_end(Parser *s, const char *end, bool block) {
    bool minus = s->p < s->end && *s->p == '-', plus = block && s->p < s->end && *s->p == '+';
    const char *p = s->p;
    s->p += minus || plus;
    if (!starts(s, end)) {
        s->p = p;
        return false;
    }
    advance(s, strlen(end));
    p = s->p;
    if (minus) while (s->p < s->end && is_space(*s->p)) advance(s, 1);
    else if (block && !plus && s->p < s->end && *s->p == '\n') advance(s, 1);
    s->line_start = s->p > p && s->p[-1] == '\n';
    return true;
}

static int hex_digit(char c) {
    return is_digit(c) ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static size_t put_utf8(char *out, uint32_t c) {
    if (c < 0x80) { out[0] = (char)c; return 1; }
    if (c < 0x800) { out[0] = (char)(0xc0 | c >> 6); out[1] = (char)(0x80 | (c & 63)); return 2; }
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12); out[1] = (char)(0x80 | (c >> 6 & 63)); out[2] = (char)(0x80 | (c & 63));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18); out[1] = (char)(0x80 | (c >> 12 & 63)); out[2] = (char)(0x80 | (c >> 6 & 63));
    out[3] = (char)(0x80 | (c & 63));
    return 4;
}

// A Python escape after its backslash; what is none stays as it is, with the backslash.
static size_t put_escape(Parser *s, char *out) {
    static const char from[] = "ntr\\'\"abfv", to[] = "\n\t\r\\'\"\a\b\f\v";
    char c = *s->p;
    const char *k = strchr(from, c);
    if (c && k) {
        out[0] = to[k - from];
        advance(s, 1);
        return 1;
    }
    if (c == '\n') {                                 // a line that goes on
        advance(s, 1);
        return 0;
    }
    int digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) {
        if (is_digit(c)) fail(s->b, s->line, "the escape \\%c in a string is not supported", c);
        out[0] = '\\';
        return 1;
    }
    uint32_t code = 0;
    for (int i = 1; i <= digits; i++) {
        int d = s->end - s->p > i ? hex_digit(s->p[i]) : -1;
        if (d < 0 || code >> 28) fail(s->b, s->line, "\\%c in a string wants %d hexadecimal digits", c, digits);
        code = code << 4 | (uint32_t)d;
    }
    if (code == 0 || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
        fail(s->b, s->line, "\\%c%.*s in a string is no character", c, digits, s->p + 1);
    advance(s, (size_t)digits + 1);
    return put_utf8(out, code);
}

static Token read_string(Parser *s) {
    char quote = *s->p;
    int line = s->line;
    const char *close = s->p + 1;
    while (close < s->end && *close != quote) close += *close == '\\' ? 2 : 1;
    if (close >= s->end) fail(s->b, line, "a string that begins with %c does not end", quote);
    char *out = get(s->b, (size_t)(close - s->p));   // an escape is never shorter than what it stands for
    size_t n = 0;
    advance(s, 1);
    while (s->p < close) {
        if (*s->p == '\\') {
            advance(s, 1);
            n += put_escape(s, out + n);
        } else {
            out[n++] = *s->p;
            advance(s, 1);
        }
    }
    advance(s, 1);
    return (Token){.type = T_STRING, .text = {out, n}, .line = line};
}

static Token read_int(Parser *s) {
    const char *p = s->p;
    int64_t v = 0;
    for (; s->p < s->end && is_digit(*s->p); s->p++) {
        if (s->p - p >= 18) fail(s->b, s->line, "the number %.18s... is too large", p);
        v = 10 * v + (*s->p - '0');
    }
    if (s->p + 1 < s->end && *s->p == '.' && is_digit(s->p[1]))
        fail(s->b, s->line, "numbers with a point are not supported");
    return (Token){.type = T_INT, .text = {p, (size_t)(s->p - p)}, .value = v, .line = s->line};
}

static Token read_token(Parser *s) {
    while (s->p < s->end && is_space(*s->p)) advance(s, 1);
    int line = s->line;
    if (s->brackets == 0 && take_tag_end(s, s->in_block ? "%}" : "}}", s->in_block))
        return (Token){.type = T_END, .text = text_of(s->in_block ? "%}" : "}}"), .line = line};
    if (s->p >= s->end) fail(s->b, line, "a tag is not closed by %s", s->in_block ? "%}" : "}}");
    char c = *s->p;
    if (c == '"' || c == '\'') return read_string(s);
    if (is_digit(c)) return read_int(s);
    const char *p = s->p;
    if (is_letter(c)) {
        while (s->p < s->end && (is_letter(*s->p) || is_digit(*s->p))) s->p++;
        return (Token){.type = T_NAME, .text = {p, (size_t)(s->p - p)}, .line = line};
    }
    static const char *const operators[] = {"==", "!=", "<=", ">=", "//", "**", "+", "-", "*", "/", "%", "~", "<", ">",
                                            "=", "(", ")", "[", "]", "{", "}", ",", ".", ":", "|"};
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        if (!starts(s, operators[i])) continue;
        s->brackets += c == '(' || c == '[' || c == '{';
        if (c == ')' || c == ']' || c == '}') s->brackets -= s->brackets > 0;
        s->p += strlen(operators[i]);
        return (Token){.type = T_OP, .text = text_of(operators[i]), .line = line};
    }
    fail(s->b, line, "unexpected character \"%.1s\"%s", p, (unsigned char)c >= 0x80 ? " (not ASCII)" : "");
}

static Token next(Parser *s) {
    Token t = s->token;
    if (t.type != T_END) s->token = read_token(s);
    return t;
}

static bool at(const Parser *s, TokenType type, const char *text) {
    return s->token.type == type && is(s->token.text, text);
}
static bool at_op(const Parser *s, const char *op) { return at(s, T_OP, op); }
static bool at_word(const Parser *s, const char *word) { return at(s, T_NAME, word); }

static bool take(Parser *s, TokenType type, const char *text) {
    if (!at(s, type, text)) return false;
    next(s);
    return true;
}
static bool take_op(Parser *s, const char *op) { return take(s, T_OP, op); }
static bool take_word(Parser *s, const char *word) { return take(s, T_NAME, word); }

static int shown(Text t) { return t.n > 40 ? 40 : (int)t.n; }     // for %.*s

__attribute__((noreturn)) static void unexpected(Parser *s, const char *wanted) {
    fail(s->b, s->token.line, "\"%.*s\" where %s is expected", shown(s->token.text), s->token.text.p, wanted);
}

static void expect_op(Parser *s, const char *op) {
    char wanted[16];
    snprintf(wanted, sizeof wanted, "\"%s\"", op);
    if (!take_op(s, op)) unexpected(s, wanted);
}

static Text expect_name(Parser *s) {
    if (s->token.type != T_NAME) unexpected(s, "a name");
    return next(s).text;
}

// ---------------------------------------------------------------------------------------------
// Expressions.

static Node *new_node(Parser *s, NodeType type, int line) {
    Node *n = get_zeroed(s->b, sizeof *n);
    n->type = type;
    n->line = line;
    return n;
}

// Called when the children are there.
static Node *done(Parser *s, Node *n) {
    Node *const one[] = {n->a, n->b, n->c};
    for (int i = 0; i < 3; i++)
        if (one[i] && one[i]->depth > n->depth) n->depth = one[i]->depth;
    Node *const many[] = {n->list, n->other};
    for (int i = 0; i < 2; i++)
        for (Node *k = many[i]; k; k = k->next)
            if (k->depth > n->depth) n->depth = k->depth;
    if (++n->depth > MAX_TREE) fail(s->b, n->line, "nested deeper than %d", MAX_TREE);
    return n;
}

static Node *binary(Parser *s, NodeType type, BinaryOp op, int line, Node *a, Node *b) {
    Node *n = new_node(s, type, line);
    n->op = op;
    n->a = a;
    n->b = b;
    return done(s, n);
}

static void enter(Parser *s) {
    if (++s->nesting > MAX_NESTING) fail(s->b, s->line, "nested deeper than %d", MAX_NESTING);
}

static Node *expression(Parser *s);
static Node *unary(Parser *s, bool with_filters);

// Arguments up to the closing parenthesis; by position, or by name.
static Node *arguments(Parser *s) {
    Node *first = NULL, **tail = &first;
    while (!at_op(s, ")")) {
        Node *n = expression(s);
        if (n->type == N_NAME && at_op(s, "=")) {
            next(s);
            Node *named = new_node(s, N_NAMED, n->line);
            named->text = n->text;
            named->a = expression(s);
            n = done(s, named);
        }
        *tail = n;
        tail = &n->next;
        if (!take_op(s, ",")) break;
    }
    expect_op(s, ")");
    return first;
}

static Node *sequence(Parser *s, const char *close, NodeType type) {
    Node *n = new_node(s, type, s->token.line), **tail = &n->list;
    while (!at_op(s, close)) {
        *tail = expression(s);
        tail = &(*tail)->next;
        if (type == N_DICT) {
            expect_op(s, ":");
            *tail = expression(s);
            tail = &(*tail)->next;
        }
        if (!take_op(s, ",")) break;
    }
    expect_op(s, close);
    return done(s, n);
}

// Adjacent strings are one.
static Node *string_constant(Parser *s) {
    Node *n = new_node(s, N_CONST, s->token.line);
    Text all = next(s).text;
    while (s->token.type == T_STRING) {
        Text more = next(s).text;
        char *p = get(s->b, all.n + more.n);
        memcpy(p, all.p, all.n);
        memcpy(p + all.n, more.p, more.n);
        all = (Text){p, all.n + more.n};
    }
    n->value = of_text(all);
    return done(s, n);
}

static Node *primary(Parser *s) {
    int line = s->token.line;
    if (s->token.type == T_STRING) return string_constant(s);
    if (s->token.type == T_INT) {
        Node *n = new_node(s, N_CONST, line);
        n->value = of_int(next(s).value);
        return done(s, n);
    }
    if (s->token.type == T_NAME) {
        Text name = next(s).text;
        Node *n = new_node(s, N_CONST, line);
        if (is(name, "true") || is(name, "True")) n->value = of_bool(true);
        else if (is(name, "false") || is(name, "False")) n->value = of_bool(false);
        else if (is(name, "none") || is(name, "None")) n->value = none;
        else { n->type = N_NAME; n->text = name; }
        return done(s, n);
    }
    if (take_op(s, "[")) return sequence(s, "]", N_LIST);
    if (take_op(s, "{")) return sequence(s, "}", N_DICT);
    if (take_op(s, "(")) {
        Node *n = expression(s);
        if (at_op(s, ",")) {                         // a tuple is a list here
            Node *list = new_node(s, N_LIST, line);
            next(s);
            Node *rest = sequence(s, ")", N_LIST);
            list->list = n;
            n->next = rest->list;
            return done(s, list);
        }
        expect_op(s, ")");
        return n;
    }
    unexpected(s, "an expression");
}

// [i], [from:to], [from:to:step]
static Node *subscript(Parser *s, Node *of) {
    Node *part[3] = {NULL}, *n = new_node(s, N_SLICE, s->token.line);
    int k = 0;
    for (; k < 3; k++) {
        if (!at_op(s, ":") && !at_op(s, "]")) part[k] = expression(s);
        if (!take_op(s, ":")) break;
    }
    expect_op(s, "]");
    n->a = of;
    if (k == 0) {
        if (!part[0]) fail(s->b, n->line, "an index is missing between [ and ]");
        n->type = N_INDEX;
        n->b = part[0];
        return done(s, n);
    }
    for (int i = 2; i >= 0; i--) {
        if (!part[i]) {
            part[i] = new_node(s, N_CONST, n->line);
            part[i]->value = none;
        }
        part[i]->next = n->list;
        n->list = part[i];
    }
    return done(s, n);
}

static Node *postfix(Parser *s, Node *n) {
    for (;;) {
        Node *up = new_node(s, N_ATTRIBUTE, s->token.line);
        up->a = n;
        if (take_op(s, ".")) {
            if (s->token.type == T_INT) {
                up->type = N_INDEX;
                up->b = primary(s);
            } else up->text = expect_name(s);
        } else if (take_op(s, "[")) {
            n = subscript(s, n);
            continue;
        } else if (take_op(s, "(")) {
            up->type = N_CALL;
            up->list = arguments(s);
        } else return n;
        n = done(s, up);
    }
}

// x is [not] NAME [argument]
static Node *test(Parser *s, Node *of) {
    int line = s->token.line;
    bool negated = take_word(s, "not");
    Node *n = new_node(s, N_TEST, line);
    n->a = of;
    n->text = expect_name(s);
    if (take_op(s, "(")) n->list = arguments(s);
    else if (s->token.type == T_STRING || s->token.type == T_INT || at_op(s, "[") ||
             (s->token.type == T_NAME && !at_word(s, "else") && !at_word(s, "or") && !at_word(s, "and") &&
              !at_word(s, "if") && !at_word(s, "is") && !at_word(s, "not") && !at_word(s, "in")))
        n->list = postfix(s, primary(s));
    done(s, n);
    if (!negated) return n;
    Node *not = new_node(s, N_NOT, line);
    not->a = n;
    return done(s, not);
}

static Node *filters(Parser *s, Node *n) {
    for (;;) {
        if (take_op(s, "|")) {
            Node *f = new_node(s, N_FILTER, s->token.line);
            f->a = n;
            f->text = expect_name(s);
            if (take_op(s, "(")) f->list = arguments(s);
            n = done(s, f);
        } else if (take_word(s, "is")) n = test(s, n);
        else return n;
    }
}

static Node *unary(Parser *s, bool with_filters) {
    int line = s->token.line;
    Node *n;
    if (take_op(s, "-")) {
        enter(s);
        n = new_node(s, N_MINUS, line);
        n->a = unary(s, false);
        s->nesting--;
        n = done(s, n);
    } else n = postfix(s, primary(s));
    return with_filters ? filters(s, n) : n;
}

static Node *product(Parser *s) {
    Node *n = unary(s, true);
    for (;;) {
        int line = s->token.line;
        if (take_op(s, "*")) n = binary(s, N_BINARY, OP_MUL, line, n, unary(s, true));
        else if (take_op(s, "//")) n = binary(s, N_BINARY, OP_DIV, line, n, unary(s, true));
        else if (take_op(s, "%")) n = binary(s, N_BINARY, OP_MOD, line, n, unary(s, true));
        else if (at_op(s, "/") || at_op(s, "**"))
            fail(s->b, line, "the operator %.*s is not supported", shown(s->token.text), s->token.text.p);
        else return n;
    }
}

static Node *concatenation(Parser *s) {
    Node *n = product(s);
    for (int line = s->token.line; take_op(s, "~"); line = s->token.line)
        n = binary(s, N_BINARY, OP_CONCAT, line, n, product(s));
    return n;
}

static Node *sum(Parser *s) {
    Node *n = concatenation(s);
    for (;;) {
        int line = s->token.line;
        if (take_op(s, "+")) n = binary(s, N_BINARY, OP_ADD, line, n, concatenation(s));
        else if (take_op(s, "-")) n = binary(s, N_BINARY, OP_SUB, line, n, concatenation(s));
        else return n;
    }
}

// The comparison that comes next, if any, is taken.
static bool take_comparison(Parser *s, BinaryOp *op) {
    static const struct { const char *text; BinaryOp op; } of[] = {{"==", OP_EQ}, {"!=", OP_NE}, {"<", OP_LT},
                                                                  {"<=", OP_LE}, {">", OP_GT}, {">=", OP_GE}};
    for (size_t i = 0; i < sizeof of / sizeof *of; i++)
        if (take_op(s, of[i].text)) {
            *op = of[i].op;
            return true;
        }
    *op = OP_IN;
    if (take_word(s, "in")) return true;
    if (!take_word(s, "not")) return false;
    if (!take_word(s, "in")) unexpected(s, "\"in\"");
    *op = OP_NOT_IN;
    return true;
}

static Node *comparison(Parser *s) {
    Node *n = sum(s);
    BinaryOp op;
    int line = s->token.line;
    if (!take_comparison(s, &op)) return n;
    n = binary(s, N_BINARY, op, line, n, sum(s));
    if (take_comparison(s, &op)) fail(s->b, s->token.line, "chains of comparisons are not supported");
    return n;
}

static Node *negation(Parser *s) {
    int line = s->token.line;
    if (!take_word(s, "not")) return comparison(s);
    enter(s);
    Node *n = new_node(s, N_NOT, line);
    n->a = negation(s);
    s->nesting--;
    return done(s, n);
}

static Node *conjunction(Parser *s) {
    Node *n = negation(s);
    for (int line = s->token.line; take_word(s, "and"); line = s->token.line)
        n = binary(s, N_AND, OP_EQ, line, n, negation(s));
    return n;
}

static Node *disjunction(Parser *s) {
    Node *n = conjunction(s);
    for (int line = s->token.line; take_word(s, "or"); line = s->token.line)
        n = binary(s, N_OR, OP_EQ, line, n, conjunction(s));
    return n;
}

static Node *expression(Parser *s) {
    enter(s);
    Node *n = disjunction(s);
    int line = s->token.line;
    if (take_word(s, "if")) {
        Node *choice = new_node(s, N_CHOICE, line);
        choice->b = n;
        choice->a = disjunction(s);
        if (take_word(s, "else")) choice->c = expression(s);
        n = done(s, choice);
    }
    s->nesting--;
    return n;
}

// ---------------------------------------------------------------------------------------------
// Statements.

static void begin_tag(Parser *s, bool block) {
    s->in_block = block;
    s->brackets = 0;
    s->token = read_token(s);
}

static void end_tag(Parser *s) {
    if (s->token.type != T_END) unexpected(s, "the end of the tag");
}

static size_t utf8_before(const char *p, size_t n);
static bool is_wide_space(const char *p, size_t n);

// White space at the end of text; Python's, which knows more of it than ASCII.
static size_t rstrip(const char *p, size_t n) {
    for (;;) {
        size_t k = utf8_before(p, n);
        if (k == 0 || !is_wide_space(p + n - k, k)) return n;
        n -= k;
    }
}

// Text up to the next tag, trimmed as the tag wants it. Returns '{', '%' or '#', what the tag is, 0 at the end.
static char plain_text(Parser *s, Text *out) {
    const char *from = s->p, *p = from;
    while (p + 1 < s->end && !(p[0] == '{' && (p[1] == '{' || p[1] == '%' || p[1] == '#'))) p++;
    bool tag = p + 1 < s->end;
    if (!tag) p = s->end;
    size_t n = (size_t)(p - from);
    char kind = tag ? p[1] : 0, sign = tag && p + 2 < s->end && (p[2] == '-' || p[2] == '+') ? p[2] : 0;
    if (sign == '-') n = rstrip(from, n);
    else if (tag && kind != '{' && sign != '+') {    // what stands before a tag that begins its line
        size_t k = n;
        while (k > 0 && is_space(from[k - 1]) && from[k - 1] != '\n') k--;
        if (k > 0 ? from[k - 1] == '\n' : s->line_start) n = k;
    }
    *out = (Text){from, n};
    advance(s, (size_t)(p - from) + (tag ? 2 : 0) + (sign != 0));
    return kind;
}

static void skip_comment(Parser *s) {
    int line = s->line;
    for (; !take_tag_end(s, "#}", true); advance(s, 1))
        if (s->p >= s->end) fail(s->b, line, "a comment is not closed by #}");
}

// Which of several words (ended by NULL) is the token; -1.
static int one_of(const Parser *s, const char *const *words) {
    for (int i = 0; words && words[i]; i++)
        if (at_word(s, words[i])) return i;
    return -1;
}

static Node *statements(Parser *s, const char *const *until, int line, const char *what);

static const char *const if_ends[] = {"elif", "else", "endif", NULL}, *const endif[] = {"endif", NULL};
static const char *const for_ends[] = {"else", "endfor", NULL}, *const endfor[] = {"endfor", NULL};
static const char *const endset[] = {"endset", NULL}, *const endgeneration[] = {"endgeneration", NULL};

// if and each elif follow one another in a chain that is not walked by recursion: `other` of one is the next.
static Node *if_statement(Parser *s, int line) {
    Node *first = new_node(s, N_IF, line), *n = first;
    int depth = 0;
    for (;;) {
        n->a = expression(s);
        end_tag(s);
        n->list = statements(s, if_ends, line, "if");
        done(s, n);
        if (n->depth > depth) depth = n->depth;
        if (!at_word(s, "elif")) break;
        n->other = new_node(s, N_IF, s->token.line);
        next(s);
        n = n->other;
    }
    if (take_word(s, "else")) {
        end_tag(s);
        n->other = statements(s, endif, line, "if");
        done(s, n);
        if (n->depth > depth) depth = n->depth;
    }
    next(s);
    end_tag(s);
    first->depth = depth;
    return first;
}

static Node *for_statement(Parser *s, int line) {
    Node *n = new_node(s, N_FOR, line);
    n->text = expect_name(s);
    if (take_op(s, ",")) n->text2 = expect_name(s);
    if (!take_word(s, "in")) unexpected(s, "\"in\"");
    n->a = disjunction(s);
    if (take_word(s, "if")) n->b = expression(s);
    if (at_word(s, "recursive")) fail(s->b, line, "recursive loops are not supported");
    end_tag(s);
    s->loops++;
    n->list = statements(s, for_ends, line, "for");
    s->loops--;
    if (take_word(s, "else")) {
        end_tag(s);
        n->other = statements(s, endfor, line, "for");
    }
    next(s);
    end_tag(s);
    return done(s, n);
}

static Node *set_statement(Parser *s, int line) {
    Node *n = new_node(s, N_SET, line);
    n->text = expect_name(s);
    if (take_op(s, ".")) n->text2 = expect_name(s);
    if (take_op(s, "=")) {
        n->a = expression(s);
        end_tag(s);
        return done(s, n);
    }
    end_tag(s);
    int loops = s->loops;
    s->loops = 0;                                    // a loop around it cannot be left from within
    n->list = statements(s, endset, line, "set");
    s->loops = loops;
    next(s);
    end_tag(s);
    return done(s, n);
}

// A {% %} tag, its keyword being the token. NULL: nothing to do.
static Node *block_tag(Parser *s) {
    int line = s->token.line;
    Text word = expect_name(s);
    if (is(word, "if")) return if_statement(s, line);
    if (is(word, "for")) return for_statement(s, line);
    if (is(word, "set")) return set_statement(s, line);
    if (is(word, "break") || is(word, "continue")) {
        if (s->loops == 0) fail(s->b, line, "%.*s outside of a loop", shown(word), word.p);
        end_tag(s);
        return done(s, new_node(s, is(word, "break") ? N_BREAK : N_CONTINUE, line));
    }
    if (is(word, "generation")) {                    // marks what was generated; the text is as without it
        Node *n = new_node(s, N_IF, line);
        end_tag(s);
        n->a = new_node(s, N_CONST, line);
        n->a->value = of_bool(true);
        n->list = statements(s, endgeneration, line, "generation");
        next(s);
        end_tag(s);
        return done(s, n);
    }
    fail(s->b, line, "{%% %.*s %%} is not supported", shown(word), word.p);
}

// Up to a tag that begins with one of `until`, which is left as the token, or to the end of the template.
static Node *statements(Parser *s, const char *const *until, int line, const char *what) {
    Node *first = NULL, **tail = &first;
    enter(s);
    for (;;) {
        Node *n = NULL;
        Text text;
        int here = s->line;
        char kind = plain_text(s, &text);
        if (text.n) {
            *tail = new_node(s, N_TEXT, here);
            (*tail)->text = text;
            tail = &done(s, *tail)->next;
        }
        if (kind == 0) {
            if (until) fail(s->b, line, "{%% %s %%} is not closed", what);
            break;
        }
        if (kind == '#') {
            skip_comment(s);
            continue;
        }
        s->line_start = false;
        begin_tag(s, kind == '%');
        if (kind == '{') {
            n = new_node(s, N_PRINT, s->token.line);
            n->a = expression(s);
            end_tag(s);
            n = done(s, n);
        } else {
            if (one_of(s, until) >= 0) break;
            n = block_tag(s);
        }
        *tail = n;
        tail = &n->next;
    }
    s->nesting--;
    return first;
}

// Line breaks become \n, and one at the end goes.
static Text normalized(Base *b, const char *text, size_t len) {
    char *p = get(b, len + 1);
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (text[i] == '\r') {
            p[n++] = '\n';
            i += i + 1 < len && text[i + 1] == '\n';
        } else p[n++] = text[i];
    }
    n -= n > 0 && p[n - 1] == '\n';
    p[n] = 0;
    return (Text){p, n};
}

static void parse_body(Jinja *t, const char *text, size_t len) {
    if (len > MAX_TEMPLATE) fail(&t->base, 1, "%zu bytes; at most %d are read", len, MAX_TEMPLATE);
    if (memchr(text, 0, len)) fail(&t->base, 1, "there is a NUL byte in the template");
    Text all = normalized(&t->base, text, len);
    Parser s = {.b = &t->base, .p = all.p, .end = all.p + all.n, .line = 1, .line_start = true};
    t->body = statements(&s, NULL, 1, "");
}

int jinja_parse(Jinja **out, const char *text, size_t len, Err *err) {
    *out = NULL;
    Jinja *t = xcalloc(1, sizeof *t);
    t->base.err = err;
    if (setjmp(t->base.out) == 0) {
        parse_body(t, text, len);
        t->base.err = NULL;
        *out = t;
        return 0;
    }
    int rc = t->base.code;
    jinja_free(t);
    return rc;
}

void jinja_free(Jinja *t) {
    if (!t) return;
    release(&t->base);
    free(t);
}

// ---------------------------------------------------------------------------------------------
// Rendering: state.

typedef struct Variable { Text name; Value value; struct Variable *next; } Variable;
typedef struct Scope { struct Scope *up; Variable *variables; } Scope;
typedef struct { char *p; size_t n, room; } Buffer;
typedef enum { GO_ON, BROKEN, CONTINUED } Flow;

typedef struct {
    Base base;
    Scope *scope;                    // a loop's body has its own; if has not
    Buffer *out;
    int64_t steps;
} Run;

static void charge(Run *r, int line, size_t bytes) {
    r->steps += 1 + (int64_t)(bytes >> 6);
    if (r->steps > MAX_STEPS) fail(&r->base, line, "the template runs for more than %d steps", MAX_STEPS);
}

static void emit(Run *r, Buffer *b, const char *p, size_t n) {
    if (n > b->room - b->n) {
        size_t room = 2 * (b->n + n) + 256;
        char *more = get(&r->base, room);
        if (b->n) memcpy(more, b->p, b->n);
        *b = (Buffer){more, b->n, room};
    }
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
}

// Each variable that is looked at on the way counts as a step: there may be many, and the lookups too.
static Variable *find_in(Run *r, int line, const Scope *s, Text name) {
    size_t passed = 0;
    Variable *v = s->variables;
    for (; v && !same(v->name, name); v = v->next) passed++;
    charge(r, line, passed << 6);
    return v;
}

static Variable *find_variable(Run *r, int line, Text name) {
    for (const Scope *s = r->scope; s; s = s->up) {
        Variable *v = find_in(r, line, s, name);
        if (v) return v;
    }
    return NULL;
}

static void set_variable(Run *r, int line, Text name, Value value) {
    Variable *v = find_in(r, line, r->scope, name);
    if (v) {
        v->value = value;
        return;
    }
    v = get(&r->base, sizeof *v);
    *v = (Variable){name, value, r->scope->variables};
    r->scope->variables = v;
}

// ---------------------------------------------------------------------------------------------
// Text as Python sees it: a sequence of code points.

static size_t utf8_after(const char *p, size_t n) {
    size_t k = n > 0;
    while (k < n && ((unsigned char)p[k] & 0xc0) == 0x80) k++;
    return k;
}

static size_t utf8_before(const char *p, size_t n) {
    size_t k = 0;
    while (k < n && ((unsigned char)p[n - 1 - k] & 0xc0) == 0x80) k++;
    return k < n ? k + 1 : k;
}

static int64_t code_points(Text t) {
    int64_t n = 0;
    for (size_t i = 0; i < t.n; i++) n += i == 0 || ((unsigned char)t.p[i] & 0xc0) != 0x80;
    return n;
}

// str.isspace of one code point.
static bool is_wide_space(const char *p, size_t n) {
    static const char *const wide[] = {"\xc2\x85", "\u00a0", "\u1680", "\u2028", "\u2029", "\u202f", "\u205f",
                                       "\u3000"};
    if (n == 1) return is_space(*p) || (*p >= 0x1c && *p <= 0x1f);
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (strlen(wide[i]) == n && memcmp(wide[i], p, n) == 0) return true;
    return n == 3 && memcmp(p, "\xe2\x80", 2) == 0 && (unsigned char)p[2] <= 0x8a;     // U+2000 to U+200A
}

static bool is_stripped(const char *p, size_t n, const Text *chars) {
    if (!chars) return is_wide_space(p, n);
    for (size_t i = 0; i < chars->n;) {
        size_t k = utf8_after(chars->p + i, chars->n - i);
        if (k == n && memcmp(chars->p + i, p, n) == 0) return true;
        i += k;
    }
    return false;
}

static Text strip(Text t, const Text *chars, bool left, bool right) {
    for (size_t k; left && (k = utf8_after(t.p, t.n)) > 0 && is_stripped(t.p, k, chars);) {
        t.p += k;
        t.n -= k;
    }
    for (size_t k; right && (k = utf8_before(t.p, t.n)) > 0 && is_stripped(t.p + t.n - k, k, chars);) t.n -= k;
    return t;
}

typedef enum { UPPER, LOWER, CAPITALIZE, TITLE } Case;

static Value change_case(Run *r, int line, Text t, Case how) {
    char *p = get(&r->base, t.n);
    bool begins = true;
    for (size_t i = 0; i < t.n; i++) {
        char c = t.p[i];
        if ((unsigned char)c >= 0x80)
            fail(&r->base, line, "upper and lower case of text that is not ASCII is not supported");
        bool letter = is_letter(c) && c != '_';
        bool up = how == UPPER || (how == CAPITALIZE && i == 0) || (how == TITLE && begins);
        p[i] = !letter ? c : (char)(up ? c & ~0x20 : c | 0x20);
        begins = !letter;
    }
    return of_text((Text){p, t.n});
}

// Where `what` begins in t from position i on, or t.n + 1.
static size_t find(Text t, size_t i, Text what) {
    if (what.n > t.n - i) return t.n + 1;
    if (what.n == 0) return i;
    const char *p = memmem(t.p + i, t.n - i, what.p, what.n);
    return p ? (size_t)(p - t.p) : t.n + 1;
}

static Value replaced(Run *r, int line, Text t, Text old, Text new) {
    Buffer b = {0};
    if (old.n == 0) fail(&r->base, line, "replace of an empty text is not supported");
    for (size_t i = 0;;) {
        size_t k = find(t, i, old);
        size_t stop = k > t.n ? t.n : k;
        emit(r, &b, t.p + i, stop - i);
        if (k > t.n) break;
        charge(r, line, new.n);
        emit(r, &b, new.p, new.n);
        i = k + old.n;
    }
    return of_text((Text){b.p, b.n});
}

static Value split(Run *r, int line, Text t, Text by) {
    if (by.n == 0) fail(&r->base, line, "split by an empty text");
    size_t n = 1;
    for (size_t i = 0, k; (k = find(t, i, by)) <= t.n; i = k + by.n) n++;
    List *l = new_list(&r->base, n);
    size_t i = 0;
    for (size_t j = 0; j < n; j++) {
        size_t k = find(t, i, by);
        if (k > t.n) k = t.n;
        l->item[j] = of_text((Text){t.p + i, k - i});
        i = k + by.n;
    }
    return (Value){.type = V_LIST, .u.list = l};
}

// ---------------------------------------------------------------------------------------------
// Values at work.

static bool truth(Value v) {
    switch (v.type) {
    case V_UNDEFINED: case V_NONE: return false;
    case V_BOOL: return v.u.b;
    case V_INT: return v.u.i != 0;
    case V_STRING: return v.u.s.n > 0;
    case V_LIST: return v.u.list->n > 0;
    case V_DICT: return v.u.dict->n > 0;
    default: return true;
    }
}

// str(v)
static Text as_text(Run *r, int line, Value v) {
    char number[24];
    switch (v.type) {
    case V_UNDEFINED: return text_of("");
    case V_NONE: return text_of("None");
    case V_BOOL: return text_of(v.u.b ? "True" : "False");
    case V_STRING: return v.u.s;
    case V_INT: {
        size_t n = (size_t)snprintf(number, sizeof number, "%lld", (long long)v.u.i);
        return (Text){memcpy(get(&r->base, n), number, n), n};
    }
    default: fail(&r->base, line, "%s cannot be written as text here", type_names[v.type]);
    }
}

static Text want_text(Run *r, int line, Value v, const char *what) {
    if (v.type != V_STRING) fail(&r->base, line, "%s wants a string, not %s", what, type_names[v.type]);
    return v.u.s;
}

static bool is_number(Value v) { return v.type == V_INT || v.type == V_BOOL; }
static int64_t number(Value v) { return v.type == V_BOOL ? v.u.b : v.u.i; }

static bool equal(Run *r, int line, Value a, Value b, int nesting) {
    charge(r, line, 0);
    if (nesting > MAX_NESTING) fail(&r->base, line, "values nested deeper than %d are compared", MAX_NESTING);
    if (is_number(a) && is_number(b)) return number(a) == number(b);
    if (a.type != b.type) return false;
    switch (a.type) {
    case V_STRING:
        charge(r, line, a.u.s.n);
        return same(a.u.s, b.u.s);
    case V_LIST:
        if (a.u.list->n != b.u.list->n) return false;
        for (size_t i = 0; i < a.u.list->n; i++)
            if (!equal(r, line, a.u.list->item[i], b.u.list->item[i], nesting + 1)) return false;
        return true;
    case V_DICT:
        if (a.u.dict->n != b.u.dict->n) return false;
        for (size_t i = 0; i < a.u.dict->n; i++) {
            charge(r, line, b.u.dict->n << 6);
            const Value *other = dict_find(b.u.dict, a.u.dict->key[i]);
            if (!other || !equal(r, line, a.u.dict->item[i], *other, nesting + 1)) return false;
        }
        return true;
    case V_NAMESPACE: return a.u.dict == b.u.dict;
    case V_LOOP: return a.u.loop == b.u.loop;
    default: return true;
    }
}

static bool contains(Run *r, int line, Value in, Value what) {
    switch (in.type) {
    case V_UNDEFINED: return false;
    case V_STRING:
        charge(r, line, in.u.s.n);
        return find(in.u.s, 0, want_text(r, line, what, "in")) <= in.u.s.n;
    case V_LIST:
        for (size_t i = 0; i < in.u.list->n; i++)
            if (equal(r, line, what, in.u.list->item[i], 0)) return true;
        return false;
    case V_DICT:
        charge(r, line, in.u.dict->n << 6);
        return what.type == V_STRING && dict_find(in.u.dict, what.u.s);
    default: fail(&r->base, line, "nothing is in %s", type_names[in.type]);
    }
}

// What a loop goes over.
static List *as_list(Run *r, int line, Value v) {
    Base *b = &r->base;
    if (v.type == V_LIST) return v.u.list;
    if (v.type == V_UNDEFINED) return new_list(b, 0);
    if (v.type == V_DICT) {
        List *l = new_list(b, v.u.dict->n);
        for (size_t i = 0; i < l->n; i++) l->item[i] = of_text(v.u.dict->key[i]);
        return l;
    }
    if (v.type != V_STRING) fail(b, line, "%s is not a list", type_names[v.type]);
    Text t = v.u.s;
    List *l = new_list(b, (size_t)code_points(t));
    for (size_t i = 0; i < l->n; i++) {
        size_t k = utf8_after(t.p, t.n);
        l->item[i] = of_text((Text){t.p, k});
        t = (Text){t.p + k, t.n - k};
    }
    return l;
}

static int64_t length(Run *r, int line, Value v) {
    charge(r, line, v.type == V_STRING ? v.u.s.n : 0);
    if (v.type == V_STRING) return code_points(v.u.s);
    if (v.type == V_DICT) return (int64_t)v.u.dict->n;
    return (int64_t)as_list(r, line, v)->n;
}

static Value concatenated(Run *r, int line, Text a, Text b) {
    charge(r, line, a.n + b.n);
    char *p = get(&r->base, a.n + b.n);
    if (a.n) memcpy(p, a.p, a.n);
    if (b.n) memcpy(p + a.n, b.p, b.n);
    return of_text((Text){p, a.n + b.n});
}

static Value joined_lists(Run *r, int line, const List *a, const List *b) {
    charge(r, line, (a->n + b->n) << 4);
    List *l = new_list(&r->base, a->n + b->n);
    if (a->n) memcpy(l->item, a->item, a->n * sizeof *l->item);
    if (b->n) memcpy(l->item + a->n, b->item, b->n * sizeof *l->item);
    return (Value){.type = V_LIST, .u.list = l};
}

// Floor division, as Python rounds; b is not 0, and not -1 where a is the smallest integer.
static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

static Value arithmetic(Run *r, int line, BinaryOp op, int64_t a, int64_t b) {
    int64_t v = 0;
    bool too_large = false;
    if (op == OP_ADD) too_large = __builtin_add_overflow(a, b, &v);
    else if (op == OP_SUB) too_large = __builtin_sub_overflow(a, b, &v);
    else if (op == OP_MUL) too_large = __builtin_mul_overflow(a, b, &v);
    else if (b == 0) fail(&r->base, line, "division by zero");
    else if (a == INT64_MIN && b == -1) too_large = true;
    else v = op == OP_DIV ? floor_div(a, b) : a - b * floor_div(a, b);
    if (too_large) fail(&r->base, line, "a number becomes too large");
    return of_int(v);
}

static Value binary_value(Run *r, const Node *n, Value a, Value b) {
    static const char *const signs[] = {"+", "-", "*", "//", "%", "~", "==", "!=", "<", "<=", ">", ">=", "in",
                                        "not in"};
    int line = n->line;
    switch (n->op) {
    case OP_CONCAT: return concatenated(r, line, as_text(r, line, a), as_text(r, line, b));
    case OP_EQ: return of_bool(equal(r, line, a, b, 0));
    case OP_NE: return of_bool(!equal(r, line, a, b, 0));
    case OP_IN: return of_bool(contains(r, line, b, a));
    case OP_NOT_IN: return of_bool(!contains(r, line, b, a));
    default: break;
    }
    if (n->op <= OP_MOD) {
        if (is_number(a) && is_number(b)) return arithmetic(r, line, n->op, number(a), number(b));
        if (n->op == OP_ADD && a.type == V_STRING && b.type == V_STRING) return concatenated(r, line, a.u.s, b.u.s);
        if (n->op == OP_ADD && a.type == V_LIST && b.type == V_LIST) return joined_lists(r, line, a.u.list, b.u.list);
    } else if ((is_number(a) && is_number(b)) || (a.type == V_STRING && b.type == V_STRING)) {
        int order;
        if (a.type == V_STRING) {
            size_t k = a.u.s.n < b.u.s.n ? a.u.s.n : b.u.s.n;
            charge(r, line, k);
            order = k ? memcmp(a.u.s.p, b.u.s.p, k) : 0;
            if (order == 0) order = (a.u.s.n > b.u.s.n) - (a.u.s.n < b.u.s.n);
        } else order = (number(a) > number(b)) - (number(a) < number(b));
        return of_bool(n->op == OP_LT ? order < 0 : n->op == OP_LE ? order <= 0 : n->op == OP_GT ? order > 0 :
                       order >= 0);
    }
    fail(&r->base, line, "%s %s %s is not supported", type_names[a.type], signs[n->op], type_names[b.type]);
}

static Value loop_field(const Loop *l, Text name) {
    int64_t i = (int64_t)l->i, n = (int64_t)l->over->n;
    if (is(name, "index")) return of_int(i + 1);
    if (is(name, "index0")) return of_int(i);
    if (is(name, "first")) return of_bool(i == 0);
    if (is(name, "last")) return of_bool(i == n - 1);
    if (is(name, "length")) return of_int(n);
    if (is(name, "revindex")) return of_int(n - i);
    if (is(name, "revindex0")) return of_int(n - i - 1);
    if (is(name, "previtem")) return i > 0 ? l->over->item[i - 1] : undefined;
    if (is(name, "nextitem")) return i < n - 1 ? l->over->item[i + 1] : undefined;
    return undefined;
}

static Value field(Run *r, const Node *n, Value of, Text name) {
    if (of.type == V_UNDEFINED)
        fail(&r->base, n->line, "\"%.*s\" is asked of something undefined%s%.*s", shown(name), name.p,
             n->a->type == N_NAME ? ": " : "", n->a->type == N_NAME ? shown(n->a->text) : 0, n->a->text.p);
    charge(r, n->line, of.type == V_DICT || of.type == V_NAMESPACE ? of.u.dict->n << 6 : 0);
    const Value *v = of.type == V_DICT || of.type == V_NAMESPACE ? dict_find(of.u.dict, name) : NULL;
    if (of.type == V_LOOP) return loop_field(of.u.loop, name);
    return v ? *v : undefined;
}

static Value indexed(Run *r, const Node *n, Value of, Value at) {
    if (at.type == V_STRING) return field(r, n, of, at.u.s);
    if (of.type == V_UNDEFINED) return field(r, n, of, text_of("[...]"));
    if (at.type != V_INT || (of.type != V_LIST && of.type != V_STRING)) return undefined;
    const List *l = as_list(r, n->line, of);
    charge(r, n->line, of.type == V_STRING ? l->n << 6 : 0);
    int64_t i = at.u.i < 0 ? at.u.i + (int64_t)l->n : at.u.i;
    return i >= 0 && i < (int64_t)l->n ? l->item[i] : undefined;
}

static int64_t slice_end(Run *r, int line, Value v, int64_t n, int64_t otherwise, int64_t lo, int64_t hi) {
    if (v.type == V_NONE) return otherwise;
    if (v.type != V_INT) fail(&r->base, line, "a slice wants integers, not %s", type_names[v.type]);
    int64_t i = v.u.i < 0 ? (v.u.i < -n ? lo : v.u.i + n) : v.u.i;
    return i < lo ? lo : i > hi ? hi : i;
}

static Value sliced(Run *r, int line, Value of, Value from, Value to, Value by) {
    const List *l = as_list(r, line, of);
    int64_t n = (int64_t)l->n, step = by.type == V_INT ? by.u.i : 1;
    if ((by.type != V_NONE && by.type != V_INT) || (step != 1 && step != -1))
        fail(&r->base, line, "slices step by 1 or -1 only");
    bool up = step > 0;
    int64_t i = slice_end(r, line, from, n, up ? 0 : n - 1, up ? 0 : -1, up ? n : n - 1);
    int64_t end = slice_end(r, line, to, n, up ? n : -1, up ? 0 : -1, up ? n : n - 1);
    int64_t count = up ? end - i : i - end;
    charge(r, line, (size_t)n << 4);
    List *out = new_list(&r->base, count > 0 ? (size_t)count : 0);
    for (size_t k = 0; k < out->n; k++, i += step) out->item[k] = l->item[i];
    if (of.type != V_STRING) return (Value){.type = V_LIST, .u.list = out};
    Buffer b = {0};
    for (size_t k = 0; k < out->n; k++) emit(r, &b, out->item[k].u.s.p, out->item[k].u.s.n);
    return of_text((Text){b.p, b.n});
}

static void json_string_out(Run *r, Buffer *b, Text t) {
    emit(r, b, "\"", 1);
    for (size_t i = 0; i < t.n; i++) {
        static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
        unsigned char c = (unsigned char)t.p[i];
        const char *k = c ? strchr(from, c) : NULL;
        char escape[8];
        if (k) emit(r, b, (char[]){'\\', to[k - from]}, 2);
        else if (c < 0x20) emit(r, b, escape, (size_t)snprintf(escape, sizeof escape, "\\u%04x", c));
        else emit(r, b, t.p + i, 1);
    }
    emit(r, b, "\"", 1);
}

static void json_out(Run *r, int line, Buffer *b, Value v, int nesting) {
    charge(r, line, 0);
    if (nesting > MAX_NESTING) fail(&r->base, line, "values nested deeper than %d are written", MAX_NESTING);
    Text t;
    switch (v.type) {
    case V_STRING: json_string_out(r, b, v.u.s); return;
    case V_LIST:
        emit(r, b, "[", 1);
        for (size_t i = 0; i < v.u.list->n; i++) {
            if (i) emit(r, b, ", ", 2);
            json_out(r, line, b, v.u.list->item[i], nesting + 1);
        }
        emit(r, b, "]", 1);
        return;
    case V_DICT:
        emit(r, b, "{", 1);
        for (size_t i = 0; i < v.u.dict->n; i++) {
            if (i) emit(r, b, ", ", 2);
            json_string_out(r, b, v.u.dict->key[i]);
            emit(r, b, ": ", 2);
            json_out(r, line, b, v.u.dict->item[i], nesting + 1);
        }
        emit(r, b, "}", 1);
        return;
    case V_NONE: t = text_of("null"); break;
    case V_BOOL: t = text_of(v.u.b ? "true" : "false"); break;
    case V_INT: t = as_text(r, line, v); break;
    default: fail(&r->base, line, "%s has no JSON", type_names[v.type]);
    }
    emit(r, b, t.p, t.n);
}

// ---------------------------------------------------------------------------------------------
// Filters, tests, methods, functions.

enum { MAX_ARGUMENTS = 8 };
typedef struct { Value v[MAX_ARGUMENTS]; int n; Dict named; } Arguments;

static Value evaluate(Run *r, const Node *n);

static void evaluate_arguments(Run *r, const Node *n, Arguments *a) {
    *a = (Arguments){.n = 0};
    for (const Node *k = n->list; k; k = k->next) {
        if (k->type == N_NAMED) {
            charge(r, k->line, a->named.n << 6);
            dict_put(&r->base, &a->named, k->text, evaluate(r, k->a));
        } else if (a->n == MAX_ARGUMENTS) {
            fail(&r->base, k->line, "more than %d arguments", MAX_ARGUMENTS);
        } else {
            a->v[a->n++] = evaluate(r, k);
        }
    }
}

static void want_arguments(Run *r, const Node *n, Text name, const Arguments *a, int lo, int hi) {
    if (a->n < lo || a->n > hi || a->named.n > 0)
        fail(&r->base, n->line, "%.*s with %d arguments%s; %d to %d are supported", shown(name), name.p, a->n,
             a->named.n ? " and some by name" : "", lo, hi);
}

static Value joined(Run *r, int line, const List *l, Text between) {
    Buffer b = {0};
    for (size_t i = 0; i < l->n; i++) {
        Text t = as_text(r, line, l->item[i]);
        charge(r, line, t.n + between.n);
        if (i) emit(r, &b, between.p, between.n);
        emit(r, &b, t.p, t.n);
    }
    return of_text((Text){b.p, b.n});
}

// The methods of strings; false: there is none of this name.
static bool string_method(Run *r, const Node *n, Text name, Text t, const Arguments *a, Value *out) {
    int line = n->line;
    bool left = is(name, "lstrip"), right = is(name, "rstrip");
    charge(r, line, t.n);
    if (left || right || is(name, "strip") || is(name, "trim")) {
        want_arguments(r, n, name, a, 0, 1);
        Text chars = {0};
        if (a->n) chars = want_text(r, line, a->v[0], "strip");
        charge(r, line, a->n ? t.n * (chars.n + 1) : 0);
        *out = of_text(strip(t, a->n ? &chars : NULL, !right, !left));
    } else if (is(name, "upper") || is(name, "lower") || is(name, "capitalize") || is(name, "title")) {
        want_arguments(r, n, name, a, 0, 0);
        *out = change_case(r, line, t, is(name, "upper") ? UPPER : is(name, "lower") ? LOWER :
                           is(name, "title") ? TITLE : CAPITALIZE);
    } else if (is(name, "startswith") || is(name, "endswith")) {
        want_arguments(r, n, name, a, 1, 1);
        Text with = want_text(r, line, a->v[0], "startswith");
        Text part = {t.p + (is(name, "endswith") && with.n <= t.n ? t.n - with.n : 0), with.n};
        *out = of_bool(with.n <= t.n && same(part, with));
    } else if (is(name, "replace")) {
        want_arguments(r, n, name, a, 2, 2);
        *out = replaced(r, line, t, want_text(r, line, a->v[0], "replace"), want_text(r, line, a->v[1], "replace"));
    } else if (is(name, "split")) {
        want_arguments(r, n, name, a, 1, 1);
        *out = split(r, line, t, want_text(r, line, a->v[0], "split"));
    } else return false;
    return true;
}

static bool dict_method(Run *r, const Node *n, Text name, const Dict *d, const Arguments *a, Value *out) {
    charge(r, n->line, d->n << 6);
    if (is(name, "get")) {
        want_arguments(r, n, name, a, 1, 2);
        const Value *v = a->v[0].type == V_STRING ? dict_find(d, a->v[0].u.s) : NULL;
        *out = v ? *v : a->n == 2 ? a->v[1] : none;
        return true;
    }
    bool keys = is(name, "keys"), values = is(name, "values");
    if (!keys && !values && !is(name, "items")) return false;
    want_arguments(r, n, name, a, 0, 0);
    List *l = new_list(&r->base, d->n);
    for (size_t i = 0; i < d->n; i++) {
        if (keys) l->item[i] = of_text(d->key[i]);
        else if (values) l->item[i] = d->item[i];
        else {
            List *pair = new_list(&r->base, 2);
            pair->item[0] = of_text(d->key[i]);
            pair->item[1] = d->item[i];
            l->item[i] = (Value){.type = V_LIST, .u.list = pair};
        }
    }
    *out = (Value){.type = V_LIST, .u.list = l};
    return true;
}

static Value range(Run *r, const Node *n, const Arguments *a) {
    want_arguments(r, n, text_of("range"), a, 1, 2);
    for (int i = 0; i < a->n; i++)
        if (a->v[i].type != V_INT) fail(&r->base, n->line, "range wants integers");
    int64_t from = a->n == 2 ? a->v[0].u.i : 0, to = a->v[a->n - 1].u.i, count;
    if (to < from) count = 0;
    else if (__builtin_sub_overflow(to, from, &count) || count > MAX_STEPS)
        fail(&r->base, n->line, "the range is longer than %d", MAX_STEPS);
    charge(r, n->line, (size_t)count << 6);
    List *l = new_list(&r->base, (size_t)count);
    for (size_t i = 0; i < l->n; i++) l->item[i] = of_int(from + (int64_t)i);
    return (Value){.type = V_LIST, .u.list = l};
}

static Value date(Run *r, const Node *n, const Arguments *a) {
    char format[64], out[256];
    want_arguments(r, n, text_of("strftime_now"), a, 1, 1);
    Text f = want_text(r, n->line, a->v[0], "strftime_now");
    if (f.n >= sizeof format) fail(&r->base, n->line, "the date's format is longer than %zu bytes", sizeof format - 1);
    memcpy(format, f.p, f.n);
    format[f.n] = 0;
    time_t now = time(NULL);
    struct tm tm;
    size_t len = localtime_r(&now, &tm) ? strftime(out, sizeof out, format, &tm) : 0;
    return of_text((Text){memcpy(get(&r->base, len), out, len), len});
}

static Value call_function(Run *r, const Node *n, Text name, const Arguments *a) {
    if (is(name, "raise_exception")) {
        Text why = a->n ? as_text(r, n->line, a->v[0]) : text_of("no reason given");
        fail(&r->base, n->line, "it refuses this conversation: %.*s", why.n > 300 ? 300 : (int)why.n, why.p);
    }
    if (is(name, "namespace") || is(name, "dict")) {
        if (a->n) fail(&r->base, n->line, "%.*s takes arguments by name only", shown(name), name.p);
        Dict *d = get(&r->base, sizeof *d);
        *d = a->named;
        return (Value){.type = is(name, "dict") ? V_DICT : V_NAMESPACE, .u.dict = d};
    }
    if (is(name, "range")) return range(r, n, a);
    if (is(name, "strftime_now")) return date(r, n, a);
    fail(&r->base, n->line, "the function %.*s is not supported", shown(name), name.p);
}

static bool is_function(Text name) {
    return is(name, "raise_exception") || is(name, "namespace") || is(name, "dict") || is(name, "range") ||
           is(name, "strftime_now");
}

static Value call(Run *r, const Node *n) {
    Arguments a;
    if (n->a->type == N_NAME) {
        evaluate_arguments(r, n, &a);
        return call_function(r, n, n->a->text, &a);
    }
    if (n->a->type != N_ATTRIBUTE) fail(&r->base, n->line, "only functions and methods can be called");
    Value of = evaluate(r, n->a->a), out;
    Text name = n->a->text;
    evaluate_arguments(r, n, &a);
    if (of.type == V_UNDEFINED) field(r, n->a, of, name);
    if (of.type == V_STRING && string_method(r, n, name, of.u.s, &a, &out)) return out;
    if (of.type == V_DICT && dict_method(r, n, name, of.u.dict, &a, &out)) return out;
    if (of.type == V_LOOP && is(name, "cycle") && a.n > 0) return a.v[of.u.loop->i % (size_t)a.n];
    fail(&r->base, n->line, "the method %.*s of %s is not supported", shown(name), name.p, type_names[of.type]);
}

static Value to_int(Run *r, int line, Value v) {
    if (is_number(v)) return of_int(number(v));
    char text[24];
    Text t = strip(want_text(r, line, v, "int"), NULL, true, true);
    if (t.n >= sizeof text) return of_int(0);
    memcpy(text, t.p, t.n);
    text[t.n] = 0;
    char *end;
    long long i = strtoll(text, &end, 10);
    return of_int(t.n && !*end ? i : 0);
}

static Value filtered(Run *r, const Node *n) {
    Text name = n->text;
    Value v = evaluate(r, n->a), out;
    Arguments a;
    int line = n->line;
    evaluate_arguments(r, n, &a);
    if (is(name, "default") || is(name, "d")) {
        const Value *boolean = dict_find(&a.named, text_of("boolean"));
        bool falsy = a.n > 1 ? truth(a.v[1]) : boolean && truth(*boolean);
        return v.type == V_UNDEFINED || (falsy && !truth(v)) ? (a.n ? a.v[0] : of_text(text_of(""))) : v;
    }
    if (is(name, "length") || is(name, "count")) return of_int(length(r, line, v));
    if (is(name, "string")) return of_text(as_text(r, line, v));
    if (is(name, "safe")) return v;
    if (is(name, "list")) return (Value){.type = V_LIST, .u.list = as_list(r, line, v)};
    if (is(name, "int")) return to_int(r, line, v);
    if (is(name, "items") && v.type == V_DICT && dict_method(r, n, name, v.u.dict, &a, &out)) return out;
    if (is(name, "first") || is(name, "last")) {
        const List *l = as_list(r, line, v);
        charge(r, line, l->n << 4);
        return l->n == 0 ? undefined : l->item[is(name, "first") ? 0 : l->n - 1];
    }
    if (is(name, "join")) {
        want_arguments(r, n, name, &a, 0, 1);
        return joined(r, line, as_list(r, line, v), a.n ? as_text(r, line, a.v[0]) : text_of(""));
    }
    if (is(name, "tojson")) {
        Buffer b = {0};
        want_arguments(r, n, name, &a, 0, 0);
        json_out(r, line, &b, v, 0);
        return of_text((Text){b.p, b.n});
    }
    if ((is(name, "trim") || is(name, "upper") || is(name, "lower") || is(name, "capitalize") ||
         is(name, "replace")) && string_method(r, n, name, as_text(r, line, v), &a, &out))
        return out;
    fail(&r->base, line, "the filter %.*s is not supported", shown(name), name.p);
}

static bool tested(Run *r, const Node *n) {
    Text name = n->text;
    // Whether a function is there may be asked of its name.
    if (n->a->type == N_NAME && is_function(n->a->text) && (is(name, "defined") || is(name, "undefined")))
        return is(name, "defined");
    Value v = evaluate(r, n->a);
    Arguments a;
    evaluate_arguments(r, n, &a);
    if (is(name, "defined")) return v.type != V_UNDEFINED;
    if (is(name, "undefined")) return v.type == V_UNDEFINED;
    if (is(name, "none")) return v.type == V_NONE;
    if (is(name, "string")) return v.type == V_STRING;
    if (is(name, "mapping")) return v.type == V_DICT;
    if (is(name, "boolean")) return v.type == V_BOOL;
    if (is(name, "true")) return v.type == V_BOOL && v.u.b;
    if (is(name, "false")) return v.type == V_BOOL && !v.u.b;
    if (is(name, "number")) return is_number(v);
    if (is(name, "integer")) return v.type == V_INT;
    if (is(name, "iterable") || is(name, "sequence"))
        return v.type == V_STRING || v.type == V_LIST || v.type == V_DICT || v.type == V_UNDEFINED;
    if (is(name, "odd") || is(name, "even")) {
        if (!is_number(v)) fail(&r->base, n->line, "%.*s wants a number", shown(name), name.p);
        return (number(v) % 2 != 0) == is(name, "odd");
    }
    if (is(name, "equalto") || is(name, "eq") || is(name, "ne") || is(name, "in")) {
        want_arguments(r, n, name, &a, 1, 1);
        return is(name, "in") ? contains(r, n->line, a.v[0], v) : equal(r, n->line, v, a.v[0], 0) != is(name, "ne");
    }
    fail(&r->base, n->line, "the test \"is %.*s\" is not supported", shown(name), name.p);
}

// ---------------------------------------------------------------------------------------------
// Walking the tree.

static Value evaluate_name(Run *r, const Node *n) {
    const Variable *v = find_variable(r, n->line, n->text);
    if (!v && is_function(n->text)) fail(&r->base, n->line, "%.*s can only be called", shown(n->text), n->text.p);
    return v ? v->value : undefined;
}

static Value evaluate_list(Run *r, const Node *n) {
    size_t count = 0, i = 0;
    for (const Node *k = n->list; k; k = k->next) count++;
    List *l = new_list(&r->base, count);
    for (const Node *k = n->list; k; k = k->next) l->item[i++] = evaluate(r, k);
    return (Value){.type = V_LIST, .u.list = l};
}

static Value evaluate_dict(Run *r, const Node *n) {
    Dict *d = get_zeroed(&r->base, sizeof *d);
    for (const Node *k = n->list; k; k = k->next->next) {
        charge(r, n->line, d->n << 6);
        Text key = want_text(r, k->line, evaluate(r, k), "a dict's key");
        dict_put(&r->base, d, key, evaluate(r, k->next));
    }
    return (Value){.type = V_DICT, .u.dict = d};
}

static Value evaluate(Run *r, const Node *n) {
    charge(r, n->line, 0);
    switch (n->type) {
    case N_CONST: return n->value;
    case N_NAME: return evaluate_name(r, n);
    case N_ATTRIBUTE: return field(r, n, evaluate(r, n->a), n->text);
    case N_INDEX: {
        Value of = evaluate(r, n->a);
        return indexed(r, n, of, evaluate(r, n->b));
    }
    case N_SLICE: {
        Value of = evaluate(r, n->a), from = evaluate(r, n->list), to = evaluate(r, n->list->next);
        return sliced(r, n->line, of, from, to, evaluate(r, n->list->next->next));
    }
    case N_CALL: return call(r, n);
    case N_FILTER: return filtered(r, n);
    case N_TEST: return of_bool(tested(r, n));
    case N_NOT: return of_bool(!truth(evaluate(r, n->a)));
    case N_MINUS: {
        Value v = evaluate(r, n->a);
        if (!is_number(v)) fail(&r->base, n->line, "minus %s is not supported", type_names[v.type]);
        return arithmetic(r, n->line, OP_SUB, 0, number(v));
    }
    case N_BINARY: {
        Value a = evaluate(r, n->a);
        return binary_value(r, n, a, evaluate(r, n->b));
    }
    case N_AND: {
        Value a = evaluate(r, n->a);
        return truth(a) ? evaluate(r, n->b) : a;
    }
    case N_OR: {
        Value a = evaluate(r, n->a);
        return truth(a) ? a : evaluate(r, n->b);
    }
    case N_CHOICE: return truth(evaluate(r, n->a)) ? evaluate(r, n->b) : n->c ? evaluate(r, n->c) : undefined;
    case N_LIST: return evaluate_list(r, n);
    case N_DICT: return evaluate_dict(r, n);
    default: fail(&r->base, n->line, "an argument by name is not supported here");
    }
}

static Flow execute(Run *r, const Node *first);

static void bind(Run *r, const Node *n, Value item) {
    if (n->text2.n == 0) {
        set_variable(r, n->line, n->text, item);
        return;
    }
    if (item.type != V_LIST || item.u.list->n != 2)
        fail(&r->base, n->line, "the loop unpacks two values from %s", type_names[item.type]);
    set_variable(r, n->line, n->text, item.u.list->item[0]);
    set_variable(r, n->line, n->text2, item.u.list->item[1]);
}

// The items for which the loop's condition holds.
static const List *chosen(Run *r, const Node *n, const List *l) {
    if (!n->b) return l;
    List *out = new_list(&r->base, l->n);
    out->n = 0;
    for (size_t i = 0; i < l->n; i++) {
        Scope scope = {.up = r->scope};
        r->scope = &scope;
        bind(r, n, l->item[i]);
        if (truth(evaluate(r, n->b))) out->item[out->n++] = l->item[i];
        r->scope = scope.up;
    }
    return out;
}

static Flow execute_for(Run *r, const Node *n) {
    const List *over = chosen(r, n, as_list(r, n->line, evaluate(r, n->a)));
    bool none_finished = true;                       // what else asks: continue and break do not finish a body
    Loop *loop = get(&r->base, sizeof *loop);
    *loop = (Loop){.over = over};
    for (; loop->i < over->n; loop->i++) {
        Scope scope = {.up = r->scope};
        r->scope = &scope;
        set_variable(r, n->line, text_of("loop"), (Value){.type = V_LOOP, .u.loop = loop});
        bind(r, n, over->item[loop->i]);
        Flow flow = execute(r, n->list);
        r->scope = scope.up;
        if (flow == BROKEN) break;
        none_finished = none_finished && flow == CONTINUED;
    }
    return none_finished ? execute(r, n->other) : GO_ON;
}

static void execute_set(Run *r, const Node *n) {
    Value v;
    if (n->a) v = evaluate(r, n->a);
    else {
        Buffer inner = {0}, *outer = r->out;
        Scope scope = {.up = r->scope};          // what is set inside stays there
        r->out = &inner;
        r->scope = &scope;
        execute(r, n->list);
        r->scope = scope.up;
        r->out = outer;
        v = of_text((Text){inner.p, inner.n});
    }
    if (n->text2.n == 0) {
        set_variable(r, n->line, n->text, v);
        return;
    }
    const Variable *ns = find_variable(r, n->line, n->text);
    if (!ns || ns->value.type != V_NAMESPACE)
        fail(&r->base, n->line, "%.*s is not a namespace, so its fields cannot be set", shown(n->text), n->text.p);
    charge(r, n->line, ns->value.u.dict->n << 6);
    dict_put(&r->base, ns->value.u.dict, n->text2, v);
}

static Flow execute_if(Run *r, const Node *n) {
    for (;;) {
        if (truth(evaluate(r, n->a))) return execute(r, n->list);
        if (!n->other) return GO_ON;
        // An elif is the only IF that an `other` begins with and that nothing follows; taking an if within an else for
        // one does the same.
        if (n->other->type != N_IF || n->other->next) return execute(r, n->other);
        n = n->other;
    }
}

static Flow execute(Run *r, const Node *first) {
    for (const Node *n = first; n; n = n->next) {
        Flow flow = GO_ON;
        charge(r, n->line, 0);
        switch (n->type) {
        case N_TEXT: emit(r, r->out, n->text.p, n->text.n); break;
        case N_PRINT: {
            Text t = as_text(r, n->line, evaluate(r, n->a));
            emit(r, r->out, t.p, t.n);
            break;
        }
        case N_IF: flow = execute_if(r, n); break;
        case N_FOR: flow = execute_for(r, n); break;
        case N_SET: execute_set(r, n); break;
        case N_BREAK: return BROKEN;
        default: return CONTINUED;
        }
        if (flow != GO_ON) return flow;
    }
    return GO_ON;
}

static Value from_json(Run *r, const cJSON *j) {
    if (cJSON_IsString(j)) return of_text(text_of(j->valuestring));
    if (cJSON_IsBool(j)) return of_bool(cJSON_IsTrue(j));
    if (cJSON_IsNumber(j)) {
        double d = cJSON_GetNumberValue(j);
        if (!(d >= -0x1p53 && d <= 0x1p53) || d != (double)(int64_t)d)
            fail(&r->base, 0, "a variable holds %g, and only whole numbers are supported", d);
        return of_int((int64_t)d);
    }
    const cJSON *k;
    if (cJSON_IsArray(j)) {
        List *l = new_list(&r->base, (size_t)cJSON_GetArraySize(j));
        size_t i = 0;
        cJSON_ArrayForEach(k, j) l->item[i++] = from_json(r, k);
        return (Value){.type = V_LIST, .u.list = l};
    }
    if (!cJSON_IsObject(j)) return none;
    Dict *d = get_zeroed(&r->base, sizeof *d);
    cJSON_ArrayForEach(k, j) dict_put(&r->base, d, text_of(k->string), from_json(r, k));
    return (Value){.type = V_DICT, .u.dict = d};
}

static void render(Run *r, const Jinja *t, const cJSON *variables) {
    Scope *scope = get_zeroed(&r->base, sizeof *scope);
    const cJSON *k;
    r->scope = scope;
    r->out = get_zeroed(&r->base, sizeof *r->out);
    cJSON_ArrayForEach(k, variables) set_variable(r, 0, text_of(k->string), from_json(r, k));
    execute(r, t->body);
    emit(r, r->out, "", 1);
}

int jinja_render(const Jinja *t, const cJSON *variables, char **text, size_t *len, Err *err) {
    Run *r = xcalloc(1, sizeof *r);
    r->base.err = err;
    *text = NULL;
    if (setjmp(r->base.out) == 0) {
        render(r, t, variables);
        *len = r->out->n - 1;
        *text = memcpy(xmalloc(r->out->n), r->out->p, r->out->n);
    }
    int rc = r->base.code;
    release(&r->base);
    free(r);
    return rc;
}
