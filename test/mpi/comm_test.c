// What goes between ranks (llmc/comm.h), run by test/test_comm.sh under mpirun: comm_test MODE. Every rank checks what
// it receives; rank 0 prints "ok NAME" once all have said that it is right. The modes that end badly print nothing
// here: the script looks at what the others do.
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>
#include "comm.h"
#include "comm_impl.h"
#include "device.h"

static Err err;
static int wrong;                      // in this case, on this rank

static void must(int rc) {
    if (rc < 0) comm_die(&err);
}
// The byte at place i of what rank `from` gives rank `to` in round k.
static uint8_t pattern(int from, int to, int k, size_t i) {
    return (uint8_t)(((uint64_t)i * 2654435761u + (uint64_t)(from * 64 + to) * 40503u + (uint64_t)k * 7919u) >> 11);
}
static void fill(uint8_t *p, size_t n, int from, int to, int k) {
    for (size_t i = 0; i < n; i++) p[i] = pattern(from, to, k, i);
}
static void look(const uint8_t *p, size_t n, int from, int to, int k) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] == pattern(from, to, k, i)) continue;
        if (!wrong++)
            fprintf(stderr, "rank %d: byte %zu of %zu, %d to %d, round %d: %d\n", comm_rank(), i, n, from, to, k, p[i]);
        return;
    }
}
static void report(const char *name) {
    int all[64], sum = 0;
    must(comm_host_all_gather(all, &wrong, sizeof wrong, &err));
    for (int r = 0; r < comm_size(); r++) sum += all[r];
    if (comm_rank() == 0) printf("%s %s\n", sum ? "not ok" : "ok", name);
    wrong = 0;
}

static const size_t sizes[] = {0, 1, 3, 16, 1000, 4099, 100003};
enum { SIZES = sizeof sizes / sizeof *sizes, FLIGHT = 12 };

static void gathers(void) {
    int R = comm_size(), me = comm_rank();
    for (int s = 0; s < SIZES; s++) {
        size_t n = sizes[s];
        uint8_t *send = xmalloc(n), *recv = xcalloc((size_t)R, n + 1);
        fill(send, n, me, 0, s);
        comm_wait(comm_all_gather(recv, send, n));
        for (int q = 0; q < R; q++) look(recv + (size_t)q * n, n, q, 0, s);
        for (int q = 0; q < R; q++) wrong += recv[(size_t)R * n] != 0;
        memset(recv, 0, (size_t)R * n);
        memcpy(recv + (size_t)me * n, send, n);                      // in place
        comm_wait(comm_all_gather(recv, recv + (size_t)me * n, n));
        for (int q = 0; q < R; q++) look(recv + (size_t)q * n, n, q, 0, s);
        memset(recv, 0, (size_t)R * n);
        must(comm_host_all_gather(recv, send, n, &err));
        for (int q = 0; q < R; q++) look(recv + (size_t)q * n, n, q, 0, s);
        free(send);
        free(recv);
    }
    report("all_gather");
}
static void exchanges(void) {
    int R = comm_size(), me = comm_rank();
    for (int s = 0; s < SIZES; s++) {
        size_t n = sizes[s];
        uint8_t *send = xmalloc((size_t)R * n), *recv = xcalloc((size_t)R, n + 1);
        for (int q = 0; q < R; q++) fill(send + (size_t)q * n, n, me, q, s);
        comm_wait(comm_all_to_all(recv, send, n));
        for (int q = 0; q < R; q++) look(recv + (size_t)q * n, n, q, me, s);
        wrong += recv[(size_t)R * n] != 0;
        free(send);
        free(recv);
    }
    report("all_to_all");
}

// Many under way, waited for out of order, ranks at different paces, host calls of another thread in between.
static void *beside(void *unused) {
    (void)unused;
    for (int i = 0; i < 20; i++) {
        int32_t value = comm_rank() == i % comm_size() ? 1000 + i : 0;
        if (comm_host_broadcast(&value, sizeof value, i % comm_size(), NULL) < 0 || value != 1000 + i) return "wrong";
        if (i % 5 == 0 && comm_barrier(NULL) < 0) return "wrong";
    }
    return NULL;
}
static void flight(void) {
    int R = comm_size(), me = comm_rank();
    size_t n = 5003;
    uint8_t *send = xmalloc(FLIGHT * (size_t)R * n), *recv = xcalloc(FLIGHT * (size_t)R, n);
    CommTicket ticket[FLIGHT];
    pthread_t thread;
    wrong += pthread_create(&thread, NULL, beside, NULL) != 0;
    for (int round = 0; round < 30; round++) {
        for (int k = 0; k < FLIGHT; k++) {
            uint8_t *s = send + (size_t)k * (size_t)R * n, *r = recv + (size_t)k * (size_t)R * n;
            for (int q = 0; q < R && k % 2; q++) fill(s + (size_t)q * n, n, me, q, k);
            if (k % 2 == 0) fill(s, n, me, 0, k);
            ticket[k] = k % 2 ? comm_all_to_all(r, s, n) : comm_all_gather(r, s, n);
            wrong += k && ticket[k] <= ticket[k - 1];
            if ((me + k + round) % 7 == 0) usleep(300);
        }
        for (int k = FLIGHT - 1; k >= 0; k--) {
            comm_wait(ticket[(k + 5) % FLIGHT]);
            uint8_t *r = recv + (size_t)((k + 5) % FLIGHT) * (size_t)R * n;
            for (int q = 0; q < R; q++) look(r + (size_t)q * n, n, q, (k + 5) % FLIGHT % 2 ? me : 0, (k + 5) % FLIGHT);
        }
        memset(recv, 0, FLIGHT * (size_t)R * n);
    }
    void *said = NULL;
    pthread_join(thread, &said);
    wrong += said != NULL;
    // More of them than the queue holds.
    fill(send, 1000, me, 0, 0);
    for (int k = 0; k < 1000; k++) ticket[0] = comm_all_gather(recv + k * R, send + k, 1);
    comm_wait(ticket[0]);
    for (int k = 0; k < 1000; k++)
        for (int q = 0; q < R; q++) wrong += recv[k * R + q] != pattern(q, 0, 0, (size_t)k);
    double busy, blocked;
    comm_times(&busy, &blocked);
    wrong += blocked <= 0 || (R > 1 && busy <= 0) || blocked > 60 || busy > 60;
    free(send);
    free(recv);
    report("in_flight");
}

static void messages(void) {
    int R = comm_size(), me = comm_rank();
    size_t n = 100003;
    uint8_t *p = xmalloc(n);
    for (int root = 0; root < R; root++) {
        if (me == root) fill(p, n, root, 0, 7);
        else memset(p, 0, n);
        must(comm_host_broadcast(p, n, root, &err));
        look(p, n, root, 0, 7);
    }
    must(comm_host_broadcast(p, 0, 0, &err));
    report("broadcast");
    for (int r = 1; r < R; r++) {                                     // there and back, in turn
        if (me == 0) {
            fill(p, n, 0, r, 8);
            must(comm_host_send(p, n, r, &err));
            must(comm_host_recv(p, n, r, &err));
            look(p, n, r, 0, 9);
        } else if (me == r) {
            must(comm_host_recv(p, n, 0, &err));
            look(p, n, 0, r, 8);
            fill(p, n, r, 0, 9);
            must(comm_host_send(p, n, 0, &err));
        }
    }
    wrong += comm_host_send(p, 1, R, &err) >= 0 || comm_host_recv(p, 1, -1, &err) >= 0;
    wrong += comm_host_send(p, 1, me, &err) >= 0;
    free(p);
    report("send_recv");
    // No rank leaves a barrier before the last one has come.
    double t0 = now_seconds();
    if (me == R - 1) usleep(200000);
    must(comm_barrier(&err));
    wrong += now_seconds() - t0 < (R > 1 ? 0.15 : 0);
    report("barrier");
}

// A reduce-scatter as it is meant: the sum in rank order, bit for bit.
static void reduction(void) {
    int R = comm_size(), me = comm_rank();
    size_t n = 1021;
    float *send = xmalloc((size_t)R * n * 4), *recv = xmalloc((size_t)R * n * 4), *sum = xmalloc(n * 4);
    for (int q = 0; q < R; q++)
        for (size_t i = 0; i < n; i++)
            send[(size_t)q * n + i] = ldexpf((float)pattern(me, q, 3, i) - 127.5f, me * 3 % 17);
    comm_wait(comm_all_to_all(recv, send, n * 4));
    ops->sum_ranks(sum, recv, n, R, n, false);
    for (size_t i = 0; i < n; i++) {
        float want = 0;
        for (int q = 0; q < R; q++) {
            float v = ldexpf((float)pattern(q, me, 3, i) - 127.5f, q * 3 % 17);
            want = q ? want + v : v;
        }
        wrong += sum[i] != want;
    }
    free(send);
    free(recv);
    free(sum);
    report("sum_in_rank_order");
}

static void same(void) {
    int R = comm_size(), last = R - 1;
    must(comm_check_same("options", "--lr 0.001 --batch 8", &err));
    if (R > 1) {
        char want[256];
        int rc = comm_check_same("options", comm_rank() == last ? "--lr 0.01 --batch 8" : "--lr 0.001 --batch 8", &err);
        snprintf(want, sizeof want, "rank %d was started with other options: rank 0 has --lr 0.001, rank %d --lr 0.01",
                 last, last);
        wrong += rc != E_USAGE || strcmp(err.text, want);
        rc = comm_check_same("data", comm_rank() == 1 ? "a.txt, 100 tokens" : "a.txt, 100 tokens, b.txt", &err);
        snprintf(want, sizeof want, "rank 1 was started with other data: rank 0 has b.txt, rank 1 nothing there");
        wrong += rc != E_USAGE || strcmp(err.text, want);
        const char *json = comm_rank() ? "{\"lr\": 0.1, \"batch\": 8}" : "{\"lr\": 0.1, \"batch\": 9}";
        rc = comm_check_same("options", json, &err);
        wrong += rc != E_USAGE || !strstr(err.text, "rank 0 has \"batch\": 9, rank 1 \"batch\": 8");
        if (wrong) fprintf(stderr, "rank %d: %s\n", comm_rank(), err.text);
    }
    report("check_same");
}

static void who(void) {
    int R = comm_size();
    wrong += comm_rank() < 0 || comm_rank() >= R || comm_local_rank() < 0 || comm_local_rank() >= comm_local_size();
    wrong += comm_local_size() != R || comm_local_rank() != comm_rank();             // all on this machine
    wrong += R == 1 ? comm_description()[0] != 0 : strstr(comm_description(), "1 machine, MPI (") == NULL;
    // Not bound to cores: they are divided.
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN), threads = comm_default_threads();
    wrong += R == 1 ? threads != 0 : threads < 1 || threads > cores || (threads > 1 && threads * R > cores);
    wrong += comm_choose("mpi", &err) < 0 || comm_choose("auto", &err) < 0;
    wrong += comm_choose("nccl", &err) != E_FAIL || !strstr(err.text, "comm nccl: ");
    wrong += comm_choose("x", &err) != E_USAGE;
    if (wrong)
        fprintf(stderr, "rank %d of %d: %s, %d threads, %s\n", comm_rank(), R, comm_description(), threads, err.text);
    report("who");
}

int main(int argc, char **argv) {
    program_name = "comm_test";
    if (comm_init(&argc, &argv, &err) < 0) comm_die(&err);
    must(device_init("cpu", 1, &err));
    const char *mode = argc > 1 ? argv[1] : "all";
    int R = comm_size(), me = comm_rank(), last = R - 1;
    if (!strcmp(mode, "size")) {
        if (me == 0) printf("size %d: %s\n", R, comm_description());
    } else if (!strcmp(mode, "all")) {
        mpi_piece = 1000;                               // so that the larger sizes take many,
        mpi_window = 3;                                 // and eight ranks more than one window
        gathers();
        exchanges();
        flight();
        messages();
        reduction();
        same();
        who();
    } else {
        // What ends badly: rank `victim` does it; the others wait in a collective, or compute.
        int victim = argc > 2 ? atoi(argv[2]) : last;
        bool computes = argc > 3;
        must(comm_barrier(&err));
        if (strcmp(mode, "none") && (me == victim || victim < 0)) {
            usleep(me ? 200000 : 300000);              // where all meet an error, rank 0 is not the first
            if (!strcmp(mode, "exit")) exit(3);
            if (!strcmp(mode, "kill")) kill(getpid(), SIGKILL);
            if (!strcmp(mode, "crash")) abort();
            err_set(&err, !strcmp(mode, "usage") ? E_USAGE : E_FAIL, "the reason why");
            comm_die(&err);
        }
        // Launchers send SIGTERM or SIGUSR1 when they notice; the watch must be there without.
        signal(SIGTERM, SIG_IGN);
        signal(SIGUSR1, SIG_IGN);
        if (computes)
            for (;;) usleep(100000);
        comm_wait(comm_all_gather(xmalloc((size_t)R), "x", 1));
        for (;;) must(comm_barrier(&err));
    }
    comm_end();
    return 0;
}
