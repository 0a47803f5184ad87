// compare_models A B [START]: how far the weights of two model.bin lie apart. Prints one line:
//   largest absolute difference, mean absolute difference, values that differ, values, and the tensor of the largest.
// With START, the model that both were trained from, the mean is divided by the mean distance of A from START: what
// part of the training differs. Exit status 0 if all bits are equal, 1 if not, 2 if they cannot be compared.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "llmc/checkpoint.h"

static void refuse(const Err *err) {
    fprintf(stderr, "compare_models: %s\n", err->text);
    exit(2);
}

int main(int argc, char **argv) {
    Err err = {0};
    ModelFile m[3] = {0};
    ParamTable table;
    int n = argc - 1;
    if (n < 2 || n > 3) {
        fprintf(stderr, "usage: compare_models A.bin B.bin [START.bin]\n");
        return 2;
    }
    for (int i = 0; i < n; i++)
        if (model_open(&m[i], argv[i + 1], &err) < 0) refuse(&err);
    if (param_table_build(&table, &m[0].config, &m[0].plan, &err) < 0) refuse(&err);
    double most = 0, sum = 0, moved = 0, differ = 0, total = 0;
    const char *where = "-";
    for (int i = 0; i < table.n; i++) {
        const Param *p = &table.p[i];
        size_t size = (size_t)p->rows * (size_t)p->cols;
        float *v[3] = {0};
        for (int k = 0; k < n; k++) {
            v[k] = xmalloc(size * sizeof(float));
            if (model_read_rows(&m[k], p, 0, p->rows, v[k], &err) < 0) refuse(&err);
        }
        for (size_t e = 0; e < size; e++) {
            double d = fabs((double)v[0][e] - (double)v[1][e]);
            if (d > most) { most = d; where = p->name; }
            differ += memcmp(&v[0][e], &v[1][e], sizeof(float)) != 0;
            sum += d;
            if (n == 3) moved += fabs((double)v[0][e] - (double)v[2][e]);
        }
        total += (double)size;
        for (int k = 0; k < n; k++) free(v[k]);
    }
    printf("%.3g %.3g %.0f %.0f %s\n", most, n == 3 ? sum / moved : sum / total, differ, total, where);
    return differ > 0;
}
