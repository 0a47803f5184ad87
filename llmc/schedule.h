// Learning-rate schedules over `steps` optimizer steps: a linear warmup, then one of four shapes.
#ifndef QLLM_SCHEDULE_H
#define QLLM_SCHEDULE_H
#include <math.h>

typedef enum { SCHED_CONSTANT, SCHED_COSINE, SCHED_LINEAR, SCHED_WSD } ScheduleKind;
typedef struct {
    ScheduleKind kind;
    double lr, min_lr;       // peak and final
    int warmup, steps;       // steps in all, warmup included
    int decay;               // WSD: length of the final linear decay to min_lr
} Schedule;

// lr of step 0..steps-1. Warmup rises as (step + 1) / warmup; cosine and linear reach min_lr at the last step.
static inline double schedule_lr(const Schedule *s, int step) {
    if (step < s->warmup) return s->lr * (step + 1) / s->warmup;
    if (step >= s->steps) return s->kind == SCHED_CONSTANT ? s->lr : s->min_lr;
    double span = s->steps - 1 - s->warmup, x = span > 0 ? (step - s->warmup) / span : 1.0;
    switch (s->kind) {
    case SCHED_COSINE: return s->min_lr + 0.5 * (s->lr - s->min_lr) * (1.0 + cos(3.14159265358979323846 * x));
    case SCHED_LINEAR: return s->lr + (s->min_lr - s->lr) * x;
    case SCHED_WSD: {
        int left = s->steps - step;      // the last step has left == 1
        return left > s->decay ? s->lr : s->min_lr + (s->lr - s->min_lr) * (left - 1) / (s->decay > 1 ? s->decay : 1);
    }
    default: return s->lr;
    }
}
#endif
