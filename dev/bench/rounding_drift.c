// What rounding makes of updates smaller than a code: an INT8 row under AdamW whose every update is a fiftieth of a code.
//
//   rounding_drift [STEPS] > drift.csv        step, exact, mean of the weights rounded stochastically, one of them, nearest
//
// The gradient never changes, so that AdamW's update is the learning rate; the row's largest weight has none and keeps the
// scale where it is. The exact line is arithmetic: start - step * lr. Draw it with
//   gnuplot -e "set datafile separator ','; set key autotitle columnhead; plot for [i=2:5] 'drift.csv' using 1:i with lines"
// The end is a line `result` on stderr each: how far the mean is from the exact line, in standard errors, and how far
// nearest has moved at all.
#include <math.h>
#include <stdlib.h>
#include "device.h"

#define COLS 4097                // one weight that holds the scale, 4,096 that should move

static StoredState zeros(Err *err) {
    StoredState s = {STATE_F32, NULL, NULL};
    if (device_alloc(&s.data, COLS * sizeof(float), "moments", err) < 0) die(err);
    return s;
}

int main(int argc, char **argv) {
    Err err = {0};
    int steps = argc > 1 ? atoi(argv[1]) : 600;
    program_name = "rounding_drift";
    if (steps < 1 || steps > 1000000) {
        err_set(&err, E_USAGE, "%d steps: 1 to 1000000 are possible", steps);
        die(&err);
    }
    if (device_init("cpu", 0, &err) < 0) die(&err);
    const float start = 60.0f / 127.0f, lr = 1.0f / 127.0f / 50.0f;
    static int8_t codes[2][COLS];
    float scale[2] = {1.0f / 127.0f, 1.0f / 127.0f}, grad[COLS];
    StoredState m[2], v[2];
    for (int k = 0; k < 2; k++) {
        m[k] = zeros(&err);
        v[k] = zeros(&err);
        for (int c = 0; c < COLS; c++) codes[k][c] = c ? 60 : 127;
    }
    for (int c = 0; c < COLS; c++) grad[c] = c ? 1.0f : 0.0f;
    AdamWParams h = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-12};
    double mean = 0, exact = start;
    printf("step,exact,stochastic (mean),stochastic (one weight),nearest\n");
    for (int t = 0; t <= steps; t++) {
        StepState s = {.t = t, .lr = lr, .grad_scale = 1, .seed = 1};
        for (int k = 0; k < 2 && t; k++)
            ops->adamw_low((StoredParam){PARAM_INT8, codes[k], &scale[k]}, m[k], v[k], NULL, NULL, grad, &s, &h, NULL,
                           k ? ROUND_NEAREST : ROUND_STOCHASTIC, k, 0, 1, COLS);
        mean = 0;
        for (int c = 1; c < COLS; c++) mean += codes[0][c] * (double)scale[0] / (COLS - 1);
        exact = start - t * (double)lr;
        printf("%d,%.9g,%.9g,%.9g,%.9g\n", t, exact, mean, codes[0][1] * (double)scale[0], codes[1][1] * (double)scale[1]);
    }
    // A step starts at a whole code and moves it with probability 1/50: a variance of 1/50 49/50, and steps add up.
    double error = sqrt(steps * 0.0196 / (COLS - 1)) / 127.0;
    fprintf(stderr, "result rounding_stochastic_from_exact %.3f standard_errors\n", fabs(mean - exact) / error);
    fprintf(stderr, "result rounding_nearest_moved %.6f codes\n", fabs(codes[1][1] * (double)scale[1] - start) * 127.0);
    return 0;
}
