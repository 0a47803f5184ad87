// Races: two accesses of different threads to one place, at least one of them a write, that no barrier orders. Kernels
// are compiled with -fsanitize=thread (make RACE=1), whose calls before each load and store end here instead of in
// ThreadSanitizer, which knows nothing of fibers. So a missing barrier is found in any order of the threads, and also
// where the results happen to be right.
//
// What orders two accesses:
//   threads of a block      __syncthreads between them
//   lanes of a warp         that, or __syncwarp; not shuffles, votes, mma or ldmatrix, which promise nothing of memory
//   blocks of a launch      nothing
// cp.async writes from its issue until it was waited for. Atomics are left out, and so are single bytes (masks, which
// neighbouring lanes write side by side): places are told apart by two bytes.
//
// For each place stands what wrote it last, and which lanes of one warp read it since; readers of several warps, or of
// several blocks, are only known to be several. Lanes count the __syncwarp they passed, so that a lane that passed more
// than another had when it left its mark comes after it. That may miss a race (a partial mask), but makes none up.
#ifdef CUDASIM_RACE
#include "internal.h"
#include <dlfcn.h>
#include <stdio.h>
#include <sys/mman.h>

namespace cudasim {
namespace {

struct Place {
    uint32_t write_run, read_run;      // block: a number that no other block of any launch has; 0: none
    uint16_t write_thread, write_barriers, write_syncs, read_barriers, read_syncs;
    uint8_t read_warp;
    bool many_warps, many_blocks;      // read by more than read_warp in this run; by more runs of this launch
    uint32_t read_lanes;
};
const size_t PAGE = 4096, PLACES = PAGE / 2;

struct Slot { uintptr_t page; Place *places; } *slots;   // open addressing
size_t n_slots, n_pages;
uintptr_t last_page = 1;
Place *last_places;

uint32_t run_now, launch_first;        // runs of this launch are launch_first and above
uint16_t barriers;                     // that this block has passed
uint16_t syncs[1024];                  // __syncwarp that each thread has passed
const char *shared[2][2];              // where shared memory begins and ends: dynamic, static

Slot *slot_of(uintptr_t page) {
    size_t i = (page * 0x9e3779b97f4a7c15u >> 20) & (n_slots - 1);
    while (slots[i].places && slots[i].page != page) i = (i + 1) & (n_slots - 1);
    return &slots[i];
}
Place *places_of(uintptr_t page) {
    if (page == last_page) return last_places;
    if (2 * n_pages >= n_slots) {
        Slot *old = slots;
        size_t n = n_slots;
        n_slots = n ? 2 * n : 1024;
        slots = (Slot *)calloc(n_slots, sizeof *slots);
        if (!slots) fail("no memory");
        for (size_t i = 0; i < n; i++)
            if (old[i].places) *slot_of(old[i].page) = old[i];
        free(old);
    }
    Slot *s = slot_of(page);
    if (!s->places) {
        s->page = page;
        s->places = (Place *)mmap(nullptr, PLACES * sizeof(Place), PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (s->places == (Place *)MAP_FAILED) fail("no memory");
        n_pages++;
    }
    last_page = page;
    return last_places = s->places;
}

void print_source(const char *what, const void *pc) {
    Dl_info info;
    char command[512], line[512];
    if (!pc || !dladdr(pc, &info) || !info.dli_fname) return;
    // One byte back: the return address may belong to the next line. Programs are linked to be loaded anywhere.
    size_t offset = (size_t)((const char *)pc - (const char *)info.dli_fbase) - 1;
    snprintf(command, sizeof command, "addr2line -Cfpie '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
    FILE *f = popen(command, "r");
    if (!f) return;
    for (int i = 0; i < 6 && fgets(line, sizeof line, f); i++)
        fprintf(stderr, "cudasim:   %s %s", i ? "   " : what, line);
    pclose(f);
}

[[noreturn]] void race(const void *p, bool is_shared, const char *other, int thread, bool write, const void *pc) {
    print_source("at", pc);
    fail("race: thread %d %s %s memory at %p that %s%d, with no barrier between them", thread_index(),
         write ? "writes" : "reads", is_shared ? "shared" : "device", p, other, thread);
}

// Marks one place and looks for an access that this one is not ordered after.
void access_place(Place *o, const void *p, bool is_shared, bool write, int t, const void *pc) {
    bool same_run = o->write_run == run_now;
    if (o->write_run && !same_run && !is_shared && o->write_run >= launch_first)
        race(p, false, "another block wrote, thread ", o->write_thread, write, pc);
    if (same_run && o->write_thread != t && o->write_barriers == barriers &&
        !(o->write_thread / 32 == t / 32 && syncs[t] > o->write_syncs))
        race(p, is_shared, "was written by thread ", o->write_thread, write, pc);
    bool read_here = o->read_run == run_now && o->read_barriers == barriers;
    if (write) {
        if (!is_shared && (o->many_blocks ? o->read_run >= launch_first
                                          : o->read_run != run_now && o->read_run && o->read_run >= launch_first))
            race(p, false, "another block read, one thread of warp ", o->read_warp, true, pc);
        if (read_here && o->many_warps) race(p, is_shared, "several warps read, one of them ", o->read_warp, true, pc);
        if (read_here && (o->read_warp != t / 32 || ((o->read_lanes & ~(1u << t % 32)) && syncs[t] <= o->read_syncs)))
            race(p, is_shared, "was read by warp ", o->read_warp, true, pc);
        o->write_run = run_now;
        o->write_thread = (uint16_t)t;
        o->write_barriers = barriers;
        o->write_syncs = syncs[t];
        return;
    }
    if (!read_here || (o->read_warp == t / 32 && syncs[t] > o->read_syncs && !o->many_warps)) {
        bool this_launch = o->read_run && o->read_run >= launch_first;
        o->many_blocks = this_launch && (o->many_blocks || o->read_run != run_now);
        o->read_run = run_now;
        o->read_barriers = barriers;
        o->read_warp = (uint8_t)(t / 32);
        o->read_lanes = 0;
        o->many_warps = false;
        o->read_syncs = syncs[t];
    }
    if (o->read_warp != t / 32) o->many_warps = true;
    else o->read_lanes |= 1u << t % 32;
}

}   // namespace

void race_access(const void *p, size_t bytes, bool write, const void *pc) {
    int t = thread_index();
    if (t < 0 || bytes < 2 || own_stack(p)) return;
    const char *c = (const char *)p;
    bool is_shared = false;
    for (auto &s : shared) is_shared = is_shared || (c >= s[0] && c < s[1]);
    for (uintptr_t at = (uintptr_t)p / 2, end = ((uintptr_t)p + bytes + 1) / 2; at < end; at++)
        access_place(places_of(at / PLACES) + at % PLACES, (const void *)(at * 2), is_shared, write, t, pc);
}

void race_launch(const void *dynamic, size_t dynamic_bytes, const void *fixed, size_t fixed_bytes) {
    launch_first = run_now + 1;
    shared[0][0] = (const char *)dynamic;
    shared[0][1] = shared[0][0] + dynamic_bytes;
    shared[1][0] = (const char *)fixed;
    shared[1][1] = shared[1][0] + fixed_bytes;
}
void race_block() {
    run_now++;
    barriers = 0;
    memset(syncs, 0, sizeof syncs);
}
void race_barrier() { barriers++; }
void race_syncwarp(int warp, unsigned lanes) {
    uint16_t most = 0;
    for (int l = 0; l < 32; l++)
        if ((lanes >> l & 1) && syncs[warp * 32 + l] > most) most = syncs[warp * 32 + l];
    for (int l = 0; l < 32; l++)
        if (lanes >> l & 1) syncs[warp * 32 + l] = (uint16_t)(most + 1);
}

}   // namespace cudasim

// What the compiler calls.
#define HOOK(n) \
    extern "C" void __tsan_read##n(void *p); \
    extern "C" void __tsan_write##n(void *p); \
    extern "C" void __tsan_unaligned_read##n(void *p); \
    extern "C" void __tsan_unaligned_write##n(void *p); \
    void __tsan_read##n(void *p) { cudasim::race_access(p, n, false, __builtin_return_address(0)); } \
    void __tsan_write##n(void *p) { cudasim::race_access(p, n, true, __builtin_return_address(0)); } \
    void __tsan_unaligned_read##n(void *p) { cudasim::race_access(p, n, false, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##n(void *p) { cudasim::race_access(p, n, true, __builtin_return_address(0)); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16)
extern "C" {
void __tsan_init(void);
void __tsan_func_entry(void *);
void __tsan_func_exit(void);
void __tsan_read_range(void *p, unsigned long n);
void __tsan_write_range(void *p, unsigned long n);
void __tsan_vptr_update(void **, void *);
void __tsan_vptr_read(void **);
int __tsan_atomic32_fetch_add(volatile int *p, int v, int order);      // the C++ library's, on the host
}
void __tsan_init(void) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_read_range(void *p, unsigned long n) { cudasim::race_access(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void *p, unsigned long n) { cudasim::race_access(p, n, true, __builtin_return_address(0)); }
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
int __tsan_atomic32_fetch_add(volatile int *p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
#endif
