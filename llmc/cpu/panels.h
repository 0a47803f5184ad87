// The served form of weight-only codes of 4 and of 8 bits (served_w.c), and its kernels (panels.c).
//
// Rows stand in panels of 16, one a 32-bit lane, so that sums need no folding across lanes. A unit of 64 bytes holds
// the next columns of the panel's rows, lane r at byte 4 r, as two's complement of code - mid:
//   8 bits   4 columns, column j in byte j
//   4 bits   8 columns; nibble i (bits 4i to 4i + 3) of the low half is column 2i, nibble i of the high half column
//            2i + 1: shifted right by 4i, the lane holds an index of one column in each half, the pair of x that
//            vdpbf16ps multiplies. Column 5 is nibble 2 of the high half: bits 24 to 27.
// A panel is one stream of bytes, read from its beginning to its end:
//   head     64 bytes: the scales of two groups, 16 bf16 each; or of one group of INT8 rows, 16 f32
//   zeros    64 bytes where there are zero points: of the same groups, 16 bf16 each, or 16 int16 less mid
//   codes    the units of the first group, then those of the second
// and so on for the next two groups; the last may be one alone. Rows beyond OC and columns beyond C are zeros.
#ifndef QLLM_CPU_PANELS_H
#define QLLM_CPU_PANELS_H
#include "cpu.h"

#define PANEL_ROWS 16
#define PANEL_TOKENS 2      // most tokens of one kernel's call
#define UNIT_BYTES 64

typedef enum { PANEL_SYMMETRIC, PANEL_ZERO_INT, PANEL_ZERO_FLOAT } PanelZero;

typedef struct {
    int bits;               // 4 or 8
    int mid;                // what codes are stored less of: 0, or 2^(bits - 1) of unsigned ones
    bool scale_f32;
    PanelZero zero;
    int64_t groups, units;  // groups of a row, units of a group
    size_t head;            // bytes of scales and zero points before the codes of two groups
    size_t group_bytes, pair_bytes, panel_bytes;
} Panels;

static inline int panel_unit_cols(const Panels *p) { return 32 / p->bits; }
// Where group g of a panel has its head (scales at half * 32, zeros 64 bytes on) and its codes.
static inline size_t panel_head(const Panels *p, int64_t g) { return (size_t)(g / 2) * p->pair_bytes; }
static inline size_t panel_codes(const Panels *p, int64_t g) {
    return panel_head(p, g) + p->head + (size_t)(g % 2) * p->group_bytes;
}

// What a panel is multiplied by: rows of C values, padded with zeros to whole units.
typedef struct {
    const floatX *x;        // one of the two, as the kernel wants
    const float *x32;
    size_t ld;              // values from one token to the next
    const float *sums;      // (tokens, groups): sums of each group, where zero points are floats
} PanelInput;

// out (n, 16) f32 = tokens t0 to t0 + n - 1 times the panel's rows, n <= PANEL_TOKENS.
typedef void (*PanelDot)(float *out, const Panels *p, const char *panel, const PanelInput *in, size_t t0);
typedef struct {
    PanelDot dot[PANEL_TOKENS];     // of n = 1, 2
    bool wide;                      // they read x32
} PanelKernel;

// The kernel for this processor (cpu_isa).
PanelKernel panel_kernel(const Panels *p);

// dequant_rows of `rows` rows of a panel, subnormal values as the zeros for which vdpbf16ps takes them: work (rows, C)
// X and, where the weight works as its codes, wscale (rows). False: this processor has no fast way for these codes.
bool panel_unpack(floatX *work, float *wscale, const char *panel, const Panels *p, int rows, int C, bool as_codes);
#endif
