// What both trainers do around the model: signals, the memory plan and the step line. Checkpoints: train_state.h.
// The algorithm itself (forward, backward, update, the step loop) is spelled out in the trainers.
#ifndef QLLM_TRAINER_H
#define QLLM_TRAINER_H
#include "llama.h"
#include "logger.h"
#include "quant.h"

// SIGINT, SIGTERM and SIGUSR1 ask the loop to save and leave; another one, two seconds later or more, ends the process
// at once. SIGUSR1 is what mpirun and srun hand on to the ranks; told to end by another signal, they end the ranks
// within a second.
void trainer_catch_signals(void);
int trainer_signal(void);                      // the signal that came, or 0

// The memory plan, printed before anything is allocated.
typedef struct { const char *what; double fixed, per_sequence; } MemoryItem;   // bytes
// Prints the table for batches of B, its total (also to *planned) beside the device's memory, and the largest batch that
// fits. E_NOMEM, with that batch in the message, where the total is more than device_memory() can give.
int memory_plan_print(double *planned, const MemoryItem *items, int n, int B, FILE *out, Err *err);

// The step line and its JSON twin.
typedef struct {
    JsonLog *json;
    double flops_per_token, peak;              // peak <= 0: utilization is not printed
    const char *peak_source;
    int steps;                                 // of the whole run, for the time left
    double ema_seconds;
} StepLog;
typedef struct { int step; double loss, norm, lr, seconds; int64_t tokens; bool skipped; } StepReport;   // step counts from 1
void steplog_print(StepLog *log, const StepReport *r, bool show);
#endif
