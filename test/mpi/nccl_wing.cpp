// Collectives on device memory over the NCCL wing, on simulated GPUs: mpirun -np R nccl_wing CASE. Prints what is
// wrong; exit status 0: nothing is. test/test_nccl.sh runs the cases.
#include "comm.h"
#include "cuda/cuda.cuh"
#include "device.h"
#include "profile.h"
#include <stdio.h>
#include <unistd.h>
#include <vector>

extern "C" const CommWing comm_wing_nccl;

static int failures;
#define CHECK(cond, ...) \
    do { \
        if (!(cond) && failures++ < 5) { \
            fprintf(stderr, "rank %d: %s:%d: %s: ", comm_rank(), __FILE__, __LINE__, #cond); \
            fprintf(stderr, __VA_ARGS__); \
            fprintf(stderr, "\n"); \
        } \
    } while (0)

// What rank `from` sends to rank `to` in byte i of call n.
QHD uint8_t value(int n, int from, int to, size_t i) {
    return (uint8_t)(31 * n + 7 * from + 13 * to + (int)(i * 2654435761u >> 7));
}
static __global__ void fill_kernel(uint8_t *p, int n, int from, int to, size_t bytes) {
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes; i += gridDim.x * blockDim.x)
        p[i] = value(n, from, to, i);
}
static __global__ void use_kernel(uint8_t *out, const uint8_t *in, size_t bytes) {
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes; i += gridDim.x * blockDim.x)
        out[i] = in[i] ^ 0x5a;
}

struct Buffers { uint8_t *send, *recv, *used; size_t bytes, all; };
static Buffers make(size_t bytes) {
    Buffers b = {nullptr, nullptr, nullptr, bytes, bytes * (size_t)comm_size()};
    Err err;
    for (uint8_t **p : {&b.send, &b.recv, &b.used})
        if (device_alloc((void **)p, b.all ? b.all : 1, "test", &err) < 0) comm_die(&err);
    return b;
}
static void release(Buffers *b) {
    device_wait();
    device_free(b->send);
    device_free(b->recv);
    device_free(b->used);
}
// Compute before: what this rank sends, to all the same or to each its own.
static void produce(const Buffers *b, int n, bool to_each) {
    for (int q = 0; q < (to_each ? comm_size() : 1) && b->bytes; q++)
        LAUNCH(fill_kernel, 3, 64, 0, cuda_stream)
        (b->send + (size_t)q * b->bytes, n, comm_rank(), to_each ? q : -1, b->bytes);
}
// And after.
static void consume(const Buffers *b) {
    if (b->all) LAUNCH(use_kernel, 3, 64, 0, cuda_stream)(b->used, b->recv, b->all);
}
// How many bytes of what was consumed are not those that the ranks sent.
static size_t wrong(const Buffers *b, int n, bool to_each) {
    std::vector<uint8_t> got(b->all + 1);
    device_copy_out(got.data(), b->used, b->all);
    size_t bad = 0;
    for (int q = 0; q < comm_size(); q++)
        for (size_t i = 0; i < b->bytes; i++)
            bad += (got[(size_t)q * b->bytes + i] ^ 0x5a) != value(n, q, to_each ? comm_rank() : -1, i);
    return bad;
}
static void synced(void) {
    Err err;
    CHECK(device_sync(&err) == 0, "%s", err.text);
}

// Each collective in several orders, which differ from rank to rank, against the bytes that MPI brings.
static void same(void) {
    int n = 0;
    for (unsigned order = 0; order < 5; order++) {
        cudasim_set_order(order < 2 ? order : order + 10 * (unsigned)comm_rank());
        for (size_t bytes : {0, 1, 16, 1000, 70001}) {
            Buffers b = make(bytes);
            for (int to_each = 0; to_each < 2; to_each++, n++) {
                produce(&b, n, to_each);
                comm_wait(to_each ? comm_all_to_all(b.recv, b.send, bytes) : comm_all_gather(b.recv, b.send, bytes));
                consume(&b);
                produce(&b, n + 1, to_each);               // what was sent is the sender's again
                CHECK(wrong(&b, n, to_each) == 0, "order %u, %s of %zu bytes: %zu are wrong", order,
                      to_each ? "all-to-all" : "all-gather", bytes, wrong(&b, n, to_each));
            }
            // By way of MPI.
            Err err;
            std::vector<uint8_t> own(b.all + 1), all(b.all * (size_t)comm_size() + 1), got(b.all + 1);
            produce(&b, n, true);
            device_copy_out(own.data(), b.send, b.all);
            comm_wait(comm_all_to_all(b.recv, b.send, bytes));
            device_copy_out(got.data(), b.recv, b.all);
            CHECK(comm_host_all_gather(all.data(), own.data(), b.all, &err) == 0, "%s", err.text);
            size_t bad = 0;
            for (int q = 0; q < comm_size(); q++)
                bad += memcmp(got.data() + (size_t)q * bytes,
                              all.data() + (size_t)q * b.all + (size_t)comm_rank() * bytes, bytes) != 0;
            CHECK(bad == 0, "order %u: parts of %zu ranks differ from MPI's", order, bad);
            // In place.
            if (bytes) {
                uint8_t *place = b.recv + (size_t)comm_rank() * bytes;
                LAUNCH(fill_kernel, 1, 64, 0, cuda_stream)(place, n, comm_rank(), -1, bytes);
                comm_wait(comm_all_gather(b.recv, place, bytes));
                consume(&b);
                CHECK(wrong(&b, n, false) == 0, "order %u: %zu bytes gathered in place", order, bytes);
            }
            release(&b);
        }
        synced();
    }
}

// Several under way while others are consumed, as a model's blocks do; more of them than there are events.
static void ahead(void) {
    double begin = now_seconds();
    for (unsigned order : {1u, 7u}) {
        cudasim_set_order(order);
        Buffers b[2] = {make(640), make(640)};
        CommTicket t[2] = {0, 0};
        const int n = 300;
        produce(&b[0], 0, true);
        t[0] = comm_all_to_all(b[0].recv, b[0].send, 640);
        CommTicket first = t[0];
        for (int i = 0; i < n; i++) {
            const Buffers *now = &b[i % 2], *next = &b[1 - i % 2];
            if (i + 1 < n) {
                produce(next, i + 1, true);
                t[1 - i % 2] = comm_all_to_all(next->recv, next->send, 640);
            }
            comm_wait(t[i % 2]);
            consume(now);
            if (i % 10 == 0) CHECK(wrong(now, i, true) == 0, "order %u, collective %d", order, i);
        }
        comm_wait(first);                                  // long done, its event used by others since
        for (Buffers &x : b) release(&x);
        synced();
        double busy = 0, blocked = 0;
        comm_times(&busy, &blocked);
        CHECK(busy > 0 && busy < now_seconds() - begin, "under way: %g s", busy);
        CHECK(blocked > 0 && blocked < now_seconds() - begin, "waited for: %g s", blocked);
    }
}

// Without the wait the consumer must read something else.
static void unwaited(void) {
    cudasim_set_order(1);
    Buffers b = make(1000);
    produce(&b, 3, false);
    CommTicket t = comm_all_gather(b.recv, b.send, 1000);
    consume(&b);
    CHECK(wrong(&b, 3, false) > 0, "a consumer that does not wait has read what had not arrived");
    comm_wait(t);
    consume(&b);
    CHECK(wrong(&b, 3, false) == 0, "and one that waits");
    // Nor has it with another collective asked for in between.
    Buffers c = make(1000);
    produce(&b, 4, false);
    t = comm_all_gather(b.recv, b.send, 1000);
    produce(&c, 5, false);
    CommTicket later = comm_all_gather(c.recv, c.send, 1000);
    consume(&b);
    CHECK(wrong(&b, 4, false) > 0, "a later collective made an earlier one arrive");
    comm_wait(later);                                      // which is waiting for the earlier one too
    consume(&b);
    CHECK(wrong(&b, 4, false) == 0, "waiting for one is waiting for all before it");
    release(&b);
    release(&c);
    synced();
}

struct Step { Buffers *b; };
static void step(void *ctx) {
    Buffers *b = ((Step *)ctx)->b;
    produce(b, 1, false);
    comm_wait(comm_all_gather(b->recv, b->send, b->bytes));
}
// A recording must not hold a collective.
static void recorded(void) {
    Buffers b = make(64);
    Step s = {&b};
    Err err = {};
    device_step(1, step, &s);
    synced();
    device_step(1, step, &s);
    CHECK(device_sync(&err) == E_FAIL && strstr(err.text, "recorded"), "%s", err.text);
    (void)cudaGetLastError();
}

// The network fails (NCCLSIM_ASYNC_ERROR=3): the step's error says so, once.
static void broken(void) {
    cudasim_set_order(1);
    Buffers b = make(64);
    Err err = {};
    for (int i = 0; i < 5; i++) {
        produce(&b, i, false);
        comm_wait(comm_all_gather(b.recv, b.send, b.bytes));
    }
    CHECK(device_sync(&err) == E_FAIL, "%d", err.code);
    CHECK(strstr(err.text, "network error") && strstr(err.text, "NCCLSIM_ASYNC_ERROR"), "%s", err.text);
    comm_wait(comm_all_gather(b.recv, b.send, b.bytes));
    synced();
}

// The same, told (NCCLSIM_ASYNC_AFTER=0.05) when nothing more is waited for but the device, which computes for a while
// (0.2 s) before it waits for the collective, and would be stuck then: by device_sync, or by a copy to ordinary memory.
static __global__ void slow_kernel(uint8_t *p) {
    usleep(2000);
    p[0] = 1;
}
static void broken_late(bool copies) {
    cudasim_set_order(1);
    Buffers b = make(64);
    Err err = {};
    for (int i = 0; i < 3; i++) {
        produce(&b, i, false);
        CommTicket t = comm_all_gather(b.recv, b.send, b.bytes);
        for (int k = 0; k < 100 && i == 2; k++) LAUNCH(slow_kernel, 1, 1, 0, cuda_stream)(b.used);
        comm_wait(t);
    }
    consume(&b);
    std::vector<uint8_t> got(b.all);
    if (copies) device_copy_out(got.data(), b.used, b.all);
    CHECK(device_sync(&err) == E_FAIL, "%d", err.code);
    CHECK(strstr(err.text, "network error") && strstr(err.text, "NCCLSIM_ASYNC_ERROR"), "%s", err.text);
    synced();
}

// Given up with a collective under way, as before a process ends: the device is not waited for, and nothing is told.
static void given_up(void) {
    cudasim_set_order(1);
    Buffers b = make(64);
    produce(&b, 1, false);
    CommTicket t = comm_all_gather(b.recv, b.send, b.bytes);
    comm_wing_nccl.abort();
    comm_wait(t);
    comm_wait(comm_all_to_all(b.recv, b.send, b.bytes));
    cudaDeviceSynchronize();
    consume(&b);
    CHECK(wrong(&b, 1, false) > 0, "it came all the same");
    synced();
}

// Spans of communication stand in the timeline beside those of operations.
static void profiled(const char *path) {
    Err err;
    Buffers b = make(4096);
    if (profile_begin(path, comm_rank(), &err) < 0) comm_die(&err);
    for (int i = 0; i < 4; i++) {
        CommTicket t = comm_all_gather(b.recv, b.send, b.bytes);
        ops->mask_backward((floatX *)b.used, b.recv, 1, 1024);
        comm_wait(t);
        comm_wait(comm_all_to_all(b.recv, b.send, b.bytes));
    }
    CHECK(profile_end(&err) == 0, "%s", err.text);
    release(&b);
    synced();
}

static void shares(void) {
    int devices = atoi(getenv("CUDASIM_DEVICES")), rank = comm_local_rank(), R = comm_local_size(), sharers = 0;
    for (int q = 0; q < R; q++) sharers += q % devices == rank % devices;
    CHECK(device_index() == rank % devices, "GPU %d", device_index());
    CHECK(device_sharers() == sharers, "%d ranks", device_sharers());
    int current = -1;
    cudaGetDevice(&current);
    CHECK(current == device_index(), "GPU %d is current", current);
    size_t free_bytes = 0, total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    double available, total;
    device_memory(&available, &total);
    CHECK(total == (double)total_bytes / sharers, "%g", total);
    CHECK(available == (double)free_bytes / sharers, "%g", available);
    Err err;
    if (devices >= R) return;
    CHECK(comm_choose("nccl", &err) < 0 && strstr(err.text, "GPU 0") && strstr(err.text, "--comm mpi"), "%s", err.text);
    CHECK(comm_choose("auto", &err) == 0, "%s", err.text);
    CHECK(!strstr(comm_description(), "NCCL"), "%s", comm_description());
}

int main(int argc, char **argv) {
    Err err;
    program_name = "nccl_wing";
    if (comm_init(&argc, &argv, &err) < 0) die(&err);
    const char *test = argc > 1 ? argv[1] : "";
    device_choose(comm_local_rank(), comm_local_size());
    if (device_init("cuda", 1, &err) < 0) comm_die(&err);
    if (!strcmp(test, "shares")) {
        shares();
    } else {
        if (comm_choose("nccl", &err) < 0) comm_die(&err);
        CHECK(strstr(comm_description(), "NCCL 2."), "%s", comm_description());
        if (!strcmp(test, "same")) same();
        else if (!strcmp(test, "ahead")) ahead();
        else if (!strcmp(test, "unwaited")) unwaited();
        else if (!strcmp(test, "recorded")) recorded();
        else if (!strcmp(test, "broken")) broken();
        else if (!strcmp(test, "broken_late")) broken_late(false);
        else if (!strcmp(test, "broken_copy")) broken_late(true);
        else if (!strcmp(test, "given_up")) given_up();
        else if (!strcmp(test, "profiled") && argc > 2) profiled(argv[2]);
        else CHECK(false, "no such case: %s", test);
    }
    comm_end();
    return failures != 0;
}
