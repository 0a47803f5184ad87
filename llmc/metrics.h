// What quality is measured with: wikitext and HellaSwag as EleutherAI's lm-evaluation-harness 0.4.5 defines them.
// doc/numerics.md states the definitions; everything here works on bytes and is safe on any of them.
#ifndef QLLM_METRICS_H
#define QLLM_METRICS_H
#include "common.h"
#ifdef __cplusplus
extern "C" {
#endif

// ---------------------------------------------------------------------------------------------
// Wikitext.

typedef struct { const char *s; size_t len; } TextSpan;      // a piece of a text that lives elsewhere

// Cuts the raw text into pages at the lines " = Title = ". A page runs from its title to the newline before the next
// title, which it does not contain; pages of whitespace are dropped. *pages is malloc'ed. Returns their number.
int wikitext_pages(TextSpan **pages, const char *text, size_t len);
// The page as it is scored: tokenization marks taken back (" @-@ " is "-", " , " is ", ", ...). malloc'ed,
// NUL-terminated.
char *wikitext_detokenize(const char *page, size_t len, size_t *out_len);
// Fields of a split on runs of Unicode whitespace, empty ones at either end counted: the denominator of word
// perplexity.
size_t count_words(const char *text, size_t len);
// Unicode code points (each byte that is not part of valid UTF-8 counts as one).
size_t count_chars(const char *text, size_t len);

// Rolling windows over n tokens, at most M targets each, every token predicted once. The inputs of a window are
// sequence[begin, begin + len) of the sequence [prefix] + tokens, and its targets the same shifted by one; only the
// last `scored` of them count. A short last window is filled up with context to M inputs. n = 10, M = 4:
//   sequence  P 0 1 2 3 4 5 6 7 8 9     {0,4,4}: P012 -> 0123    {4,4,4}: 3456 -> 4567    {6,4,2}: 5678 -> ..89
typedef struct { size_t begin; int len, scored; } Window;
size_t rolling_window_count(size_t n, int M);
Window rolling_window(size_t n, int M, size_t i);            // i-th of rolling_window_count(n, M)

// Sums over documents, and what follows from them.
typedef struct { double loglik; uint64_t words, bytes, tokens; } TextScore;
double word_perplexity(const TextScore *s);                  // exp(-loglik / words)
double byte_perplexity(const TextScore *s);                  // exp(-loglik / bytes)
double bits_per_byte(const TextScore *s);                    // -loglik / bytes / ln 2
double token_perplexity(const TextScore *s);                 // exp(-loglik / tokens)

// ---------------------------------------------------------------------------------------------
// HellaSwag.

typedef struct {
    char *context;                   // each ending is scored after it, with a space in front
    char *ending[4];
    int chars[4];                    // length of each ending in characters: what acc_norm divides by
    int label;                       // the right one
} HellaswagItem;
typedef struct { HellaswagItem *item; int n; bool prepared; } Hellaswag;   // prepared: came in the six-line form

// Reads JSON lines (ctx_a, ctx_b, activity_label, endings, label; lm-eval's preprocessing is applied) or the six-line
// text form (context, label, four endings, as they are): told apart by the first byte. limit: most items, 0 for all.
int hellaswag_load(Hellaswag *h, const char *path, int limit, Err *err);
int hellaswag_parse(Hellaswag *h, const char *text, size_t len, const char *what, int limit, Err *err);
void hellaswag_free(Hellaswag *h);
// lm-eval's text cleaning: strip, " [title]" to ". ", [...] removed, one pass of double spaces to single. malloc'ed.
char *hellaswag_clean(const char *text);

// Sums for accuracy with its standard error, sqrt(acc (1 - acc) / (n - 1)).
typedef struct { int n, right, right_norm; } ChoiceScore;
// scores: log-likelihood of each of n_choices (first of equals wins); chars: their lengths.
void choice_add(ChoiceScore *c, const double *scores, const int *chars, int n_choices, int label);
double choice_stderr(int n, int right);                      // NaN for n < 2

// ---------------------------------------------------------------------------------------------
// Distance from a reference model.

// Of n tokens: kl in nats, loss of the model and of the reference, same (1 where both hold the same token for the
// likeliest). The text was read in windows, one after the other, of count[w] tokens; tokens of one window depend on each
// other, so standard errors take windows for what was drawn: sqrt(W / (W - 1) sum_w (sum_w - mean count_w)^2) / n, NaN
// for a single window. Percentiles interpolate between the two nearest ranks, at q (n - 1). All NaN where a kl is.
typedef struct {
    size_t n;
    double kl_mean, kl_stderr, kl_median, kl_p99, kl_max;
    double same, same_stderr;                                // share of tokens
    double ratio, ratio_stderr;                              // perplexity over the reference's
} Distance;
// n, the sum of the counts, is 1 at least. kl is left sorted.
void distance_measure(Distance *d, float *kl, const float *loss, const float *ref_loss, const float *same,
                      const size_t *count, size_t windows);

#ifdef __cplusplus
}
#endif
#endif
