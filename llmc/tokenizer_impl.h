// What the parts of the tokenizer share: tokenizer.c (encoding), tokenizer_files.c (JSON, GGUF, blob), tokenizer_gguf.c
// (GGUF out).
// Nobody else includes this.
#ifndef QLLM_TOKENIZER_IMPL_H
#define QLLM_TOKENIZER_IMPL_H
#include <pthread.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include "tokenizer.h"

#define MAX_STEPS 16                       // normalizers, and pre-tokenizers, in one tokenizer
#define MAX_PATTERN 8192                   // bytes of one regular expression
#define MAX_TOKEN_BYTES (1u << 20)
#define SPACE_MARK "\xE2\x96\x81"          // U+2581, which stands for a space in SentencePiece vocabularies
#define SPACE_MARK_CP 0x2581u

// A growing byte buffer. Offsets into it are 32 bits wide, so it refuses to grow beyond 2 GiB.
typedef struct { uint8_t *p; size_t n, cap; bool failed; } Buf;
void buf_put(Buf *b, const void *data, size_t bytes);
void buf_str(Buf *b, const char *s);

typedef struct { uint32_t off, len; } Span;

// Open-addressing table of token ids by their bytes.
typedef struct { int32_t *slot; uint32_t mask; } StrTable;

typedef struct { uint64_t key; int32_t rank, id; } PairSlot;   // key: left id << 32 | right id; ~0: empty
typedef struct { PairSlot *slot; uint64_t mask; } PairTable;
typedef struct { int32_t a, b, c; } Merge;                     // a b -> c; the index is the rank

typedef struct { uint8_t byte; int32_t child, next, id; } TrieNode;   // node 0 is the root; -1: none
typedef struct { TrieNode *node; int32_t n, cap; bool first[256]; } Trie;

enum { TOK_MODEL = 1, TOK_ADDED = 2, TOK_SPECIAL = 4, TOK_LSTRIP = 8, TOK_RSTRIP = 16, TOK_SINGLE_WORD = 32,
       TOK_NORMALIZED = 64 };

enum { OPT_BYTE_LEVEL = 1, OPT_IGNORE_MERGES = 2, OPT_BYTE_FALLBACK = 4, OPT_FUSE_UNK = 8, OPT_ADD_BOS = 16,
       OPT_ADD_EOS = 32, OPT_BYTES = 64, OPT_STRIP_FIRST = 128, OPT_ALL = 255 };

typedef enum { NORM_PREPEND, NORM_REPLACE, PRE_SPLIT, PRE_DIGITS, PRE_BYTE_LEVEL, PRE_METASPACE, STEP_KINDS } StepKind;
typedef enum { SPLIT_REMOVED, SPLIT_ISOLATED, SPLIT_MERGED_PREVIOUS, SPLIT_MERGED_NEXT, SPLIT_CONTIGUOUS,
               SPLIT_BEHAVIORS } Behavior;
enum { STEP_LITERAL = 1, STEP_INVERT = 2, STEP_PREFIX = 4, STEP_REGEX = 8, STEP_SPLIT = 16, STEP_FIRST_ONLY = 32,
       STEP_ALL = 63 };

typedef struct {
    uint8_t kind, behavior, flags;
    char *a; uint32_t a_len;               // prefix, text to replace, pattern, replacement of a space
    char *b; uint32_t b_len;               // what replaces a
    pcre2_code *re;                        // derived
} Step;

typedef struct Scratch Scratch;            // what one encoding thread needs; kept between calls

struct Tokenizer {
    // Content: all that the blob holds.
    uint32_t options;
    int n;                                 // ids 0..n-1; those with no flags do not exist
    uint8_t *flags;                        // (n)
    Span *span;                            // (n) into text: tokens spelled as in tokenizer.json
    Buf text;
    Merge *merges; int n_merges;
    Step norm[MAX_STEPS], pre[MAX_STEPS];
    int n_norm, n_pre;
    int32_t bos, eos, unk;
    char *config; size_t config_len;       // tokenizer_config.json, NULL if none
    char *json; size_t json_len;           // tokenizer.json it came from, NULL if none; not in the blob

    // Derived by tokenizer_finish.
    uint64_t hash;
    Buf raw; Span *raw_span;               // (n) decoded bytes of each token
    StrTable by_text, by_raw;              // model tokens as spelled, as bytes (byte-level with ignore_merges only)
    PairTable pairs;
    int32_t byte_id[256];                  // byte-level: id of each byte's symbol; else id of <0xXX>; -1: none
    int32_t ascii_id[128];                 // id of each one-character token; -1: none
    bool full_fallback;                    // all of <0x00>..<0xFF> exist and byte_fallback is on
    bool segments;                         // words may be cut where no merge reaches across
    uint64_t glue_ascii[129][3];           // bit d of row c: some merge joins ...c with d...; 128 stands for U+2581
    uint64_t *glue; uint64_t glue_mask;    // the same for other pairs: c << 32 | d; ~0: empty
    bool cuts;                             // tokenizer_safe_cut knows where
    uint32_t max_len;                      // of a token in bytes
    Trie trie_raw, trie_norm;              // added tokens looked for before and after normalization
    pcre2_code *gpt2_re, *word_re;
    pthread_mutex_t lock;
    Scratch *pool;
};

extern const char GPT2_PATTERN[], LLAMA3_PATTERN[];

Tokenizer *tokenizer_new(int n);
// Spells token id; -1 if it is spelled already (differently). The caller has checked the range and the UTF-8.
void tokenizer_put(Tokenizer *t, int32_t id, const char *s, size_t len, int flags);
// Builds what is derived and checks what it is derived from. On failure the caller frees t.
int tokenizer_finish(Tokenizer *t, Err *err);
int tokenizer_rehash(Tokenizer *t);                     // after a change of bos or eos; -1: no memory
void tokenizer_content(const Tokenizer *t, Buf *b);     // the blob's body, without the configuration
// By spelling; ids only of tokens in the table (-1: none).
int32_t table_find(const StrTable *h, const Buf *text, const Span *span, const char *s, size_t len);
int table_build(StrTable *h, const Buf *text, const Span *span, const uint8_t *flags, int n, int want, Err *err);
int32_t tokenizer_id_of(const Tokenizer *t, const char *s, size_t len);   // any token, model or added; -1: none

uint64_t hash_bytes(const void *data, size_t len, uint64_t seed);
bool utf8_valid(const char *s, size_t len);
uint32_t utf8_next(const char *s, size_t *i);           // of valid text: the code point at *i, which moves on
uint32_t byte_to_alphabet(int byte);                    // GPT-2's printable stand-in of a byte
int alphabet_to_byte(uint32_t cp);                      // its inverse; -1: not in the alphabet
#endif
