// Kills training runs and looks at what is left: test/test_kill.sh drives it.
//   kill_harness --program train_llama_qat --data TEXT --dir FOLDER --kills N --seed S [--launcher "mpirun ..."]
//
// A campaign is one training run on one number of ranks and one sharding level (or, where `mixed`, on others at every
// start), killed again and again at random moments, a third of them while a checkpoint is being written, and started
// again with --resume until it is done. After each kill:
//   - all ranks have ended within 30 seconds, and the status is not 0;
//   - a message names the rank that was killed, once the ranks have met (before, in MPI_Init, only mpirun can);
//   - `latest` names a checkpoint, no older than the one before the last that was begun;
//   - the next start goes on from it: the losses of its first steps are those that the start before had there;
// and at the end the losses of all steps, of all starts, and the final weights are those of a run that nobody
// disturbed, bit for bit on the same ranks and level. Special cases follow: mpirun killed, signals, a disk that is
// full, damaged files, ranks that disagree.
//
// Only descendants of this process are ever signalled. It adopts those whose parents die, so that it counts them all.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "llmc/common.h"
#include "llmc/rng.h"

enum { MAX_STEPS = 400, MAX_ARGS = 96, MAX_PIDS = 256, GLOBAL_BATCH = 12, END_SECONDS = 30, STUCK_SECONDS = 12 };
// On other ranks sums have another order. What a start goes on from is exact, so its first loss is that of the start
// before but for the order of a sum of doubles. Then f32 gradients differ by 1e-7 to 1e-6 of their size, and of the
// losses of the next three steps as much is seen (5e-6 after ten). Rounding to bf16 and to codes makes it grow: runs
// that nobody disturbs, on two ranks and on one, lie 1e-2 apart after 40 steps and 1.5e-2 after 120.
#define FIRST_TOLERANCE 1e-6
#define NEXT_TOLERANCE 1e-4
#define LOSS_TOLERANCE 5e-2

static const char *program, *data, *dir, *launcher;
static int passed, failed, starts_compared, steps = 60, save_every = 4;
static uint64_t seed = 1, draws;

static void outcome(bool good, const char *what, const char *why) {
    if (good) {
        passed++;
    } else {
        failed++;
        printf("not good: %s: %s\n", what, why);
    }
    fflush(stdout);
}

static uint32_t draw(uint32_t n) { return (uint32_t)(((uint64_t)philox(seed, 0x4B17, draws++).v[0] * n) >> 32); }
static double draw_unit(void) { return draw(1u << 30) / (double)(1u << 30); }

static void nap(double s) {
    struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

// ---------------------------------------------------------------------------------------------
// Processes

typedef struct { int pid, rank; char name[32], state; } Proc;

// The descendants of this process, or the trainers among them, with ranks as the launcher's environment says them.
static int descendants(Proc *found, bool all) {
    static struct { int pid, parent; bool ours; char name[32], state; } p[8192];
    int n = 0, k = 0;
    DIR *d = opendir("/proc");
    for (struct dirent *e; d && (e = readdir(d)) && n < 8192;) {
        char path[300], text[512], *name, *end;
        int pid = atoi(e->d_name);
        if (pid <= 0) continue;
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        FILE *f = fopen(path, "r");
        if (!f) continue;
        size_t len = fread(text, 1, sizeof text - 1, f);
        fclose(f);
        text[len] = 0;
        name = strchr(text, '(');
        end = strrchr(text, ')');
        char state;
        int parent;
        if (!name || !end || sscanf(end + 1, " %c %d", &state, &parent) != 2) continue;
        *end = 0;
        p[n].pid = pid;
        p[n].parent = parent;
        snprintf(p[n].name, sizeof p[n].name, "%s", name + 1);
        p[n].state = state;
        p[n++].ours = parent == getpid();
    }
    if (d) closedir(d);
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n && !p[i].ours; j++)
                if (p[j].ours && p[j].pid == p[i].parent) p[i].ours = more = true;
    }
    for (int i = 0; i < n && k < MAX_PIDS; i++) {
        if (!p[i].ours || p[i].state == 'Z' || (!all && strcmp(p[i].name, "train_llama_qat"))) continue;
        char path[300], env[65536];
        snprintf(path, sizeof path, "/proc/%d/environ", p[i].pid);
        FILE *f = fopen(path, "r");
        if (!f) continue;
        size_t len = fread(env, 1, sizeof env - 1, f);
        fclose(f);
        env[len] = 0;
        found[k] = (Proc){.pid = p[i].pid, .state = p[i].state};
        snprintf(found[k].name, sizeof found[k].name, "%s", p[i].name);
        for (char *v = env; v < env + len; v += strlen(v) + 1) {
            if (!strncmp(v, "OMPI_COMM_WORLD_RANK=", 21)) found[k].rank = atoi(v + 21);
            if (!strncmp(v, "PMI_RANK=", 9)) found[k].rank = atoi(v + 9);
        }
        k++;
    }
    return k;
}

static int trainers(Proc *found) { return descendants(found, false); }

static int split_words(char **out, int n, char *text) {
    for (char *w = strtok(text, " "); w && n < MAX_ARGS - 1; w = strtok(NULL, " ")) out[n++] = w;
    return n;
}

// Starts `ranks` trainers (0: without a launcher) on OUT with further options (words parted by blanks; "|" begins those
// of a second half of the ranks; "@FOLDER" where a half begins is its working folder). What they print goes to `log`.
// limit: the largest file they may write, 0: any.
static int start(int ranks, const char *level, const char *out, const char *options, const char *log, rlim_t limit) {
    char first[2048], common[2048], more[2048], number[16], batch[64], *argv[MAX_ARGS];
    int n = 0, halves = ranks > 1 && strchr(options, '|') ? 2 : 1;
    snprintf(first, sizeof first, "%s", launcher ? launcher : "");
    if (ranks) n = split_words(argv, n, first);
    int R = ranks ? ranks : 1;
    snprintf(number, sizeof number, "%d", ranks / halves);
    snprintf(batch, sizeof batch, "--batch %d --shard %s", GLOBAL_BATCH / R, level);
    snprintf(common, sizeof common, "--init tiny --seq-len 32 --lr 2e-3 --warmup 2 --threads 1 --save-every %d "
             "--steps %d %s", save_every, steps, batch);
    char words[2][8192];
    snprintf(more, sizeof more, "%s", options);
    char *second = strchr(more, '|');
    if (second) *second++ = 0;
    for (int h = 0; h < halves; h++) {
        char *mine = h ? second : more;
        if (h) argv[n++] = (char *)":";
        if (ranks) { argv[n++] = (char *)"-np"; argv[n++] = number; }
        if (*mine == '@') {
            argv[n++] = (char *)"-wdir";
            argv[n++] = mine + 1;
            mine += strcspn(mine, " ");
            *mine++ = 0;
        }
        argv[n++] = (char *)program;
        argv[n++] = (char *)"--out";
        argv[n++] = (char *)out;
        snprintf(words[h], sizeof words[h], "%s --train-data %s %s", common, data, mine);
        n = split_words(argv, n, words[h]);
    }
    argv[n] = NULL;
    int pid = fork();
    if (pid < 0) { perror("fork"); exit(1); }
    if (pid) return pid;
    int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0644), null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    dup2(fd, 1);
    dup2(fd, 2);
    if (limit) {
        signal(SIGXFSZ, SIG_IGN);                   // the write fails instead, as on a full disk
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){limit, limit});
    }
    execvp(argv[0], argv);
    perror(argv[0]);
    _exit(127);
}

// Waits until no descendant is left. Returns the status of process `pid` (128 + signal if one ended it), or -1 if after
// `limit` seconds some were left: these are killed. Where a rank is killed in the first milliseconds of its life, Open
// MPI's mpirun 4.1 may wait for itself for ever after all ranks have ended: it is ended, and counted.
static int launchers_stuck;
static int wait_all(int pid, double limit, double *took) {
    double t0 = now_seconds(), alone = t0, looked = t0;
    int status = -1;
    for (;;) {
        int s, p = waitpid(-1, &s, WNOHANG);
        if (p == pid) status = WIFEXITED(s) ? WEXITSTATUS(s) : 128 + WTERMSIG(s);
        if (p < 0 && errno == ECHILD) break;
        if (p > 0) continue;
        Proc left[MAX_PIDS];
        if (limit > 0 && status < 0 && now_seconds() - looked > 0.5) {
            looked = now_seconds();
            if (trainers(left) > 0) alone = looked;
            if (looked - alone > STUCK_SECONDS) {
                launchers_stuck++;
                kill(pid, SIGKILL);
                alone = looked;
            }
        }
        if (now_seconds() - t0 > limit) {
            bool told = limit <= 0;
            for (int n; (n = descendants(left, true)) > 0; told = true) {
                for (int i = 0; i < n; i++) {
                    if (!told)
                        printf("left: %s, pid %d, rank %d, state %c\n", left[i].name, left[i].pid, left[i].rank,
                               left[i].state);
                    kill(left[i].pid, SIGKILL);
                }
                nap(0.05);
            }
            while (waitpid(-1, NULL, 0) > 0) {}
            status = -1;
            break;
        }
        nap(0.001);
    }
    if (took) *took = now_seconds() - t0;
    return status;
}

// ---------------------------------------------------------------------------------------------
// Files

static char *path_of(const char *fmt, const char *a, const char *b) {
    static char buf[8][4096];
    static int turn;
    char *p = buf[turn++ % 8];
    snprintf(p, sizeof buf[0], fmt, a, b);
    return p;
}

// A file, with a 0 behind it; empty where there is none.
static char *slurp(const char *path, size_t *len) {
    struct stat st;
    FILE *f = fopen(path, "r");
    size_t size = f && fstat(fileno(f), &st) == 0 ? (size_t)st.st_size : 0;
    char *text = xcalloc(size + 1, 1);
    size = f ? fread(text, 1, size, f) : 0;
    if (f) fclose(f);
    if (len) *len = size;
    return text;
}

static bool contains(const char *path, const char *what) {
    char *text = slurp(path, NULL);
    bool found = strstr(text, what) != NULL;
    free(text);
    return found;
}

static void show(const char *path) {
    char *text = slurp(path, NULL);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        if (strncmp(line, "step", 4)) printf("    | %s\n", line);
    free(text);
}

static bool same_files(const char *a, const char *b) {
    size_t na, nb;
    char *ta = slurp(a, &na), *tb = slurp(b, &nb);
    bool same = na > 0 && na == nb && !memcmp(ta, tb, na);
    free(ta);
    free(tb);
    return same;
}

// Runs a command of the system; paths are this program's own.
static bool sh(const char *fmt, const char *a, const char *b) { return system(path_of(fmt, a, b)) == 0; }

// The step in `latest`, -1 without it.
static int newest(const char *out) {
    char *text = slurp(path_of("%s/latest", out, ""), NULL);
    int step = -1;
    if (sscanf(text, "step-%d", &step) != 1) step = -1;
    free(text);
    return step;
}

// The step that --resume goes on from: latest's, or where a kill came after the first folder was completed and before
// latest named it, that of the newest folder with a marker.
static int start_point(const char *out) {
    int step = newest(out), n;
    DIR *d = step < 0 ? opendir(out) : NULL;
    for (struct dirent *e; d && (e = readdir(d));) {
        char marker[1200];
        int end = 0;
        snprintf(marker, sizeof marker, "%s/%s/checkpoint.json", out, e->d_name);
        if (sscanf(e->d_name, "step-%d%n", &n, &end) == 1 && !e->d_name[end] && access(marker, R_OK) == 0 && n > step)
            step = n;
    }
    if (d) closedir(d);
    return step;
}

// Whether OUT has a checkpoint that is being written.
static bool saving(const char *out) {
    DIR *d = opendir(out);
    bool found = false;
    for (struct dirent *e; d && (e = readdir(d));) {
        size_t n = strlen(e->d_name);
        if (!strncmp(e->d_name, "step-", 5) && n > 4 && !strcmp(e->d_name + n - 4, ".tmp")) found = true;
    }
    if (d) closedir(d);
    return found;
}

// Losses and norms of the steps in a log, as text (they are printed so that no bit is lost).
typedef struct { char value[MAX_STEPS + 1][64]; double loss[MAX_STEPS + 1]; int last; } Losses;

static void add_line(Losses *l, const char *line, int step, double loss) {
    const char *a = strstr(line, "\"loss\": "), *b = a ? strstr(a, "\"norm\": ") : NULL;
    const char *end = b ? strchr(b, ',') : NULL;
    snprintf(l->value[step], sizeof l->value[0], "%.*s", end ? (int)(end - a) : 0, a ? a : "");
    l->loss[step] = loss;
    if (step > l->last) l->last = step;
}

static void read_losses(Losses *l, const char *out) {
    memset(l, 0, sizeof *l);
    char *text = slurp(path_of("%s/log.jsonl", out, ""), NULL);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        const char *s = strstr(line, "\"step\": "), *v = strstr(line, "\"loss\": ");
        if (!strstr(line, "\"event\": \"step\"") || !s || !v) continue;
        int step = atoi(s + 8);
        if (step >= 1 && step <= MAX_STEPS) add_line(l, line, step, atof(v + 8));
    }
    free(text);
}

// Every step that OUT's log has, of whichever start, against the reference's. Returns the largest relative difference
// of losses; *differ counts the steps that are not the same text.
static double compare_losses(const char *out, const Losses *ref, int *differ) {
    double most = 0;
    *differ = 0;
    char *text = slurp(path_of("%s/log.jsonl", out, ""), NULL);
    static Losses one;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        const char *s = strstr(line, "\"step\": "), *v = strstr(line, "\"loss\": ");
        if (!strstr(line, "\"event\": \"step\"") || !s || !v) continue;
        int step = atoi(s + 8);
        if (step < 1 || step > MAX_STEPS) continue;
        add_line(&one, line, step, atof(v + 8));
        double d = fabs(one.loss[step] - ref->loss[step]) / ref->loss[step];
        if (!(d <= most)) most = d;
        *differ += strcmp(one.value[step], ref->value[step]) != 0;
    }
    free(text);
    return most;
}

// The first four losses of each start against those of the start before at the same steps, if it came so far: the
// largest relative differences of the first, and of the next three.
static void compare_starts(const char *out, double *first, double *next) {
    static double before[MAX_STEPS + 1], now[MAX_STEPS + 1];       // 0: none
    memset(before, 0, sizeof before);
    memset(now, 0, sizeof now);
    int n = 0;
    *first = *next = 0;
    char *text = slurp(path_of("%s/log.jsonl", out, ""), NULL);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        const char *s = strstr(line, "\"step\": "), *v = strstr(line, "\"loss\": ");
        if (strstr(line, "\"event\": \"start\"") && n) {
            memcpy(before, now, sizeof before);                     // what an earlier start had beyond is void
            memset(now, 0, sizeof now);
            n = 0;
        }
        if (!strstr(line, "\"event\": \"step\"") || !s || !v) continue;
        int step = atoi(s + 8);
        if (step < 1 || step > MAX_STEPS) continue;
        now[step] = atof(v + 8);
        double d = before[step] ? fabs(now[step] / before[step] - 1) : 0;
        starts_compared += n == 0 && before[step];
        if (n == 0 && !(d <= *first)) *first = d;
        if (n > 0 && n < 4 && !(d <= *next)) *next = d;
        n++;
    }
    free(text);
}

// ---------------------------------------------------------------------------------------------
// Campaigns

typedef struct {
    int ranks;                     // 0: without a launcher; -1: another number at every start
    const char *level;
    char name[32], ref[600];       // the undisturbed run's folder
    Losses losses;                 // and what it logged
    double seconds;                // it took
} Campaign;

enum { AT_START, BEFORE_STEPS, IN_STEPS, IN_SAVE, MOMENTS };
static const char *const moment_name[MOMENTS] = {"starting", "before the first step", "between saves",
                                                 "during a save"};
static struct {
    int kills, alone, by_program, by_launcher, lost_most;
    double seconds_sum, seconds_most;
} tally[MOMENTS];
static int kills_done, kills_good, restarts_on_other_ranks;
static double widest_loss, widest_first, widest_next;

static const char *const levels[] = {"none", "optim", "grad", "full"};

static bool reference(Campaign *c) {
    snprintf(c->ref, sizeof c->ref, "%s/ref-%s", dir, c->name);
    char *log = path_of("%s.txt", c->ref, "");
    double t0 = now_seconds();
    bool mixed = c->ranks < 0;
    int status = wait_all(start(mixed ? 0 : c->ranks, mixed ? "none" : c->level, c->ref, "", log, 0), 120, NULL);
    c->seconds = now_seconds() - t0;
    read_losses(&c->losses, c->ref);
    bool good = status == 0 && c->losses.last == steps;
    outcome(good, c->name, "the undisturbed run failed");
    if (!good) show(log);
    return good;
}

// Waits for the moment to kill at; false if the run has ended before. A sixth of the kills come at any time, most of
// them before the first step; a third while a checkpoint is being written; the others when steps are made.
static bool wait_moment(int pid, const char *out, const char *log, double length) {
    double wait = draw_unit() * length, begin = now_seconds(), since = begin;
    uint32_t kind = draw(6);
    bool stepping = kind == 0;
    while (now_seconds() - begin < END_SECONDS) {
        siginfo_t info = {0};
        if (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid) return false;
        if (!stepping && contains(log, "\nstep ")) {
            stepping = true;
            since = now_seconds();
            if (kind < 3) nap(0.3 * wait);
        }
        if (stepping && kind >= 1 && kind < 3 && saving(out)) {
            nap(draw_unit() * 0.01);
            return true;
        }
        if (stepping && (kind < 1 || kind >= 3) && now_seconds() - since >= wait) return true;
        nap(stepping && kind < 3 ? 0.0002 : 0.002);
    }
    return true;
}

// One start of a campaign and its violent end. 1: killed as it should be, 0: done before that, -1: something is wrong.
static int kill_once(const Campaign *c, const char *out, int number, double length) {
    char log[640], what[1024], why[1024] = "";
    int ranks = c->ranks, before = newest(out), moment = AT_START, victim = -1;
    int stuck = launchers_stuck;
    const char *level = c->level;
    if (ranks < 0) {
        const int some[] = {1, 2, 3, 4};
        ranks = some[draw(4)];
        level = levels[draw(4)];
        restarts_on_other_ranks++;
    }
    int R = ranks ? ranks : 1;
    snprintf(log, sizeof log, "%s/log-%s-%d.txt", dir, c->name, number);
    int pid = start(ranks, level, out, "--resume --keep 2", log, 0);
    Proc p[MAX_PIDS];
    int n = 0;
    if (!wait_moment(pid, out, log, length)) {
        int status = wait_all(pid, END_SECONDS, NULL);
        if (status == 0) return 0;
        snprintf(why, sizeof why, "ended by itself with status %d", status);
    }
    double t0 = now_seconds();
    while (!*why && (n = trainers(p)) == 0 && now_seconds() - t0 < 10) nap(0.002);
    double took = 0;
    if (!*why && n == 0) {
        wait_all(pid, 0, NULL);
        return 0;
    }
    if (!*why) {
        Proc dead = p[draw((uint32_t)n)];
        victim = dead.rank;
        int at_least = newest(out);
        bool save = saving(out);
        kill(dead.pid, SIGKILL);
        int status = wait_all(pid, END_SECONDS, &took);
        char name[32];
        snprintf(name, sizeof name, "rank %d", victim);
        bool by_program = false, by_launcher = false;
        char *text = slurp(log, NULL);
        if (strstr(text, "memory plan")) moment = BEFORE_STEPS;
        if (strstr(text, "\nstep ")) moment = save ? IN_SAVE : IN_STEPS;
        for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
            bool ours = !strncmp(line, "train_llama_qat", 15);
            const char *at = strstr(line, name);
            if (!at || (at[strlen(name)] >= '0' && at[strlen(name)] <= '9')) continue;
            if (ours) by_program = true;
            else by_launcher = true;
        }
        free(text);
        int now = newest(out);
        Losses *l = xmalloc(sizeof *l);
        read_losses(l, out);
        // At step s, where a save is due, the one before it may still be under way; the one before that is complete.
        int reached = l->last, lost = now < 0 ? reached : reached - now;
        free(l);
        if (status == 0 && (R == 1 || newest(out) < steps)) snprintf(why, sizeof why, "ended with status 0");
        else if (status < 0) snprintf(why, sizeof why, "some processes were there after %d s", END_SECONDS);
        else if (R > 1 && moment != AT_START && !by_program && !by_launcher)
            snprintf(why, sizeof why, "no message names rank %d", victim);
        else if (now < at_least || now < before)
            snprintf(why, sizeof why, "latest went from %d back to %d", at_least, now);
        if (!*why) {
            tally[moment].kills++;
            tally[moment].alone += R == 1;
            tally[moment].by_program += R > 1 && by_program;
            tally[moment].by_launcher += R > 1 && !by_program && by_launcher;
            if (launchers_stuck == stuck) tally[moment].seconds_sum += took;
            if (launchers_stuck == stuck && took > tally[moment].seconds_most) tally[moment].seconds_most = took;
            if (lost > tally[moment].lost_most) tally[moment].lost_most = lost;
        }
        if (!*why && lost > 2 * save_every)
            snprintf(why, sizeof why, "at step %d the newest checkpoint was of step %d", reached, now);
    }
    kills_done++;
    kills_good += !*why;
    snprintf(what, sizeof what, "%s, kill %d (rank %d of %d, %s, %s)", c->name, number, victim, R, level,
             moment_name[moment]);
    outcome(!*why, what, why);
    if (*why) {
        show(log);
        wait_all(pid, 0, NULL);
        return -1;
    }
    unlink(log);
    return 1;
}

// What a start said it goes on from.
static int resumed_from(const char *log) {
    char *text = slurp(log, NULL), *at = strstr(text, "from step ");
    int step = at ? atoi(at + 10) : strstr(text, "has no checkpoint") ? -1 : -2;
    free(text);
    return step;
}

static double larger(double a, double b) { return b <= a ? a : b; }        // NaN counts as larger

// A run that is done: its losses and weights. One that was given up on is not; log: of its last start.
static bool check_end(const Campaign *c, const char *out, const char *log, int status, int from) {
    char why[1024] = "", what[64];
    int differ;
    double widest = compare_losses(out, &c->losses, &differ), first, next;
    compare_starts(out, &first, &next);
    Losses *l = xmalloc(sizeof *l);
    read_losses(l, out);
    if (status) snprintf(why, sizeof why, "the last start ended with status %d", status);
    else if (log && resumed_from(log) != from)
        snprintf(why, sizeof why, "the newest checkpoint is of step %d, it went on from %d", from, resumed_from(log));
    else if (l->last != steps) snprintf(why, sizeof why, "%d steps of %d are in the log", l->last, steps);
    else if (c->ranks < 0 && !(widest <= LOSS_TOLERANCE)) snprintf(why, sizeof why, "losses differ by %.2g", widest);
    else if (!(first <= FIRST_TOLERANCE && next <= NEXT_TOLERANCE))
        snprintf(why, sizeof why, "the first loss after a resume differs by %.2g, the next three by %.2g", first, next);
    else if (c->ranks >= 0 && differ) snprintf(why, sizeof why, "%d steps have another loss or norm", differ);
    else if (c->ranks >= 0 && !same_files(path_of("%s/model.bin", out, ""), path_of("%s/model.bin", c->ref, "")))
        snprintf(why, sizeof why, "model.bin differs");
    free(l);
    if (c->ranks < 0) {
        widest_loss = larger(widest_loss, widest);
        widest_first = larger(widest_first, first);
        widest_next = larger(widest_next, next);
    }
    snprintf(what, sizeof what, "%s, the end", c->name);
    outcome(!*why, what, why);
    if (*why && log) show(log);
    return !*why;
}

static void campaign(const Campaign *c, int kills) {
    char out[600], log[640];
    snprintf(out, sizeof out, "%s/run-%s", dir, c->name);
    snprintf(log, sizeof log, "%s/log-%s-last.txt", dir, c->name);
    int number = 0, rc = 1, runs = 0;
    bool mixed = c->ranks < 0, good = true;
    for (; good && number < kills; runs++) {
        sh("rm -rf '%s'", out, "");
        make_dir(out, NULL);
        // Some steps a start, so that a run is killed several times before it is done.
        while (number < kills && (rc = kill_once(c, out, number, 0.5 * c->seconds)) > 0) number++;
        if (rc < 0) return;
        if (rc == 0) good = check_end(c, out, NULL, 0, 0);
    }
    if (rc > 0) {
        int from = start_point(out);
        int pid = start(mixed ? 3 : c->ranks, mixed ? "full" : c->level, out, "--resume --keep 2", log, 0);
        good = check_end(c, out, log, wait_all(pid, 120, NULL), from);
    }
    if (good)
        printf("%-12s %3d kills in %d runs; %s\n", c->name, kills, runs,
               mixed ? "losses at a resume as before it, to rounding"
                     : "losses and model.bin as undisturbed, bit for bit");
    fflush(stdout);
}

// ---------------------------------------------------------------------------------------------
// Special cases

// A run on `ranks` that has made `at_least` checkpoints; returns its pid.
static int run_until(int ranks, const char *level, const char *out, const char *options, const char *log, int step) {
    sh("rm -rf '%s'", out, "");
    make_dir(out, NULL);
    int pid = start(ranks, level, out, options, log, 0);
    double t0 = now_seconds();
    while (newest(out) < step && now_seconds() - t0 < 60) {
        siginfo_t info = {0};
        if (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid) break;
        nap(0.002);
    }
    return pid;
}

static bool resumes_to_the_end(const Campaign *c, const char *out, int at_least, char *why, size_t size) {
    char log[640];
    snprintf(log, sizeof log, "%s/log-resumed.txt", dir);
    int from = start_point(out), differ;
    int status = wait_all(start(c->ranks, c->level, out, "--resume", log, 0), 120, NULL);
    compare_losses(out, &c->losses, &differ);
    if (status) snprintf(why, size, "resuming ended with status %d", status);
    else if (from < at_least) snprintf(why, size, "the newest checkpoint is of step %d, expected %d or later", from, at_least);
    else if (resumed_from(log) != from)
        snprintf(why, size, "the newest checkpoint is of step %d, it went on from %d", from, resumed_from(log));
    else if (differ || !same_files(path_of("%s/model.bin", out, ""), path_of("%s/model.bin", c->ref, "")))
        snprintf(why, size, "losses or model.bin differ from the undisturbed run's");
    if (*why) show(log);
    return !*why;
}

static void launcher_killed(const Campaign *c) {
    char out[600], log[640], why[1024] = "";
    snprintf(out, sizeof out, "%s/run-launcher", dir);
    snprintf(log, sizeof log, "%s/log-launcher.txt", dir);
    int pid = run_until(c->ranks, c->level, out, "", log, save_every);
    double took;
    kill(pid, SIGKILL);
    int status = wait_all(pid, END_SECONDS, &took);
    if (status != 128 + SIGKILL) snprintf(why, sizeof why, "status %d after %.1f s", status, took);
    else resumes_to_the_end(c, out, save_every, why, sizeof why);
    if (*why) show(log);
    else printf("mpirun killed: all ranks had ended %.1f s later\n", took);
    outcome(!*why, "the launcher killed", why);
}

// A signal to one rank, or SIGUSR1 to mpirun, which passes it on: all save, and the status is 0.
static void stopped(const Campaign *c, int sig, bool to_launcher) {
    char out[600], log[640], why[1024] = "", what[64];
    snprintf(what, sizeof what, "signal %d to %s", sig, to_launcher ? "the launcher" : "one rank");
    snprintf(out, sizeof out, "%s/run-stopped", dir);
    snprintf(log, sizeof log, "%s/log-stopped.txt", dir);
    int pid = run_until(c->ranks, c->level, out, "", log, save_every);
    Proc p[MAX_PIDS];
    int n = trainers(p);
    if (n != (c->ranks ? c->ranks : 1)) snprintf(why, sizeof why, "%d ranks are there", n);
    else kill(to_launcher ? pid : p[draw((uint32_t)n)].pid, sig);
    int status = wait_all(pid, END_SECONDS, NULL), step = -1;
    char *text = slurp(log, NULL), *at = strstr(text, "stopped by");
    if (at && (at = strstr(at, "at step "))) step = atoi(at + 8);
    free(text);
    if (!*why && status) snprintf(why, sizeof why, "status %d", status);
    if (!*why && (step < 0 || newest(out) != step))
        snprintf(why, sizeof why, "stopped at step %d, latest is %d", step, newest(out));
    if (*why) show(log);
    else resumes_to_the_end(c, out, step, why, sizeof why);
    outcome(!*why, what, why);
}

// A disk with room for one checkpoint and a bit: the second save stops the run with a message, the first is intact.
static void disk_full(const Campaign *c, const char *reference_step) {
    char out[600], log[640], size[64], why[1024] = "";
    snprintf(out, sizeof out, "%s/run-disk", dir);
    snprintf(log, sizeof log, "%s/log-disk.txt", dir);
    sh("rm -rf '%s'", out, "");
    make_dir(out, NULL);
    long long bytes = 0;
    DIR *d = opendir(reference_step);
    for (struct dirent *e; d && (e = readdir(d));) {
        struct stat st;
        if (stat(path_of("%s/%s", reference_step, e->d_name), &st) == 0 && S_ISREG(st.st_mode)) bytes += st.st_size;
    }
    if (d) closedir(d);
    snprintf(size, sizeof size, "size=%lld", bytes * 3 / 2 + 600000);       // and the tokens' cache
    if (mount("none", out, "tmpfs", 0, size) != 0) {
        printf("skip disk full: tmpfs cannot be mounted here (%s)\n", strerror(errno));
        return;
    }
    // tmpfs counts pages, so a file a rank and the log's lines find place; a second checkpoint does not.
    int status = wait_all(start(c->ranks, c->level, out, "--keep 2", log, 0), 60, NULL);
    char *text = slurp(log, NULL);
    bool named = strstr(text, "No space left") != NULL;
    free(text);
    int at = newest(out);
    char copy[640];
    snprintf(copy, sizeof copy, "%s/run-disk-copy", dir);
    sh("rm -rf '%s'", copy, "");
    if (!sh("cp -r '%s' '%s'", out, copy)) snprintf(why, sizeof why, "cannot copy what is left");
    if (umount(out)) perror(out);
    if (!*why && status <= 0) snprintf(why, sizeof why, "status %d, expected an error", status);
    if (!*why && !named) snprintf(why, sizeof why, "no message says that no space is left");
    if (!*why && at < save_every) snprintf(why, sizeof why, "the newest checkpoint is of step %d, expected %d or later", at, save_every);
    if (*why) show(log);
    else resumes_to_the_end(c, copy, save_every, why, sizeof why);
    outcome(!*why, "disk full", why);
    if (!*why) printf("disk full: stopped with a message and status %d; went on from step %d elsewhere\n", status, at);
}

// A limit on the size of files makes a similar error where none may mount a disk. mpirun could not work under it.
static void files_too_large(void) {
    char out[600], log[640], why[1024] = "";
    snprintf(out, sizeof out, "%s/run-limit", dir);
    snprintf(log, sizeof log, "%s/log-limit.txt", dir);
    wait_all(run_until(0, "none", out, "--steps 5", log, steps), 60, NULL);
    int had = newest(out);
    int status = wait_all(start(0, "none", out, "--resume", log, 100000), 60, NULL);
    if (had != 5) snprintf(why, sizeof why, "latest is %d, expected 5", had);
    else if (status <= 0) snprintf(why, sizeof why, "status %d, expected an error", status);
    else if (!contains(log, "File too large")) snprintf(why, sizeof why, "no message says that a file is too large");
    else if (newest(out) != had) snprintf(why, sizeof why, "latest went from %d to %d", had, newest(out));
    if (*why) show(log);
    outcome(!*why, "files of limited size", why);
}

// One byte flipped anywhere in any file of a checkpoint: the file is named, and nothing is trained.
static void flipped_bytes(const Campaign *c, const char *from, int step) {
    char out[600], log[640], folder[640], why[1024] = "", *names[64];
    int n = 0, flips = 0;
    snprintf(out, sizeof out, "%s/run-flip", dir);
    snprintf(log, sizeof log, "%s/log-flip.txt", dir);
    snprintf(folder, sizeof folder, "%s/step-%d", out, step);
    sh("rm -rf '%s'", out, "");
    sh("cp -r '%s' '%s'", from, out);
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));)
        if (e->d_name[0] != '.' && n < 64) names[n++] = xstrdup(e->d_name);
    if (d) closedir(d);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 2 && !*why; k++, flips++) {
            char path[1300];
            snprintf(path, sizeof path, "%s/%s", folder, names[i]);
            int fd = open(path, O_RDWR);
            struct stat st;
            if (fd < 0 || fstat(fd, &st)) { snprintf(why, sizeof why, "%s: cannot be opened", names[i]); break; }
            // Once in the header, once anywhere.
            off_t at = (off_t)(draw_unit() * (double)(k ? st.st_size : st.st_size < 2000 ? st.st_size : 2000));
            uint8_t byte, other;
            bool io = pread(fd, &byte, 1, at) == 1;
            other = byte ^ (uint8_t)(1u << draw(8));
            io = io && pwrite(fd, &other, 1, at) == 1;
            int status = wait_all(start(c->ranks, c->level, out, "--resume", log, 0), 60, NULL);
            if (!io) snprintf(why, sizeof why, "%s cannot be changed", names[i]);
            else if (status <= 0)
                snprintf(why, sizeof why, "%s: byte %lld flipped: status %d", names[i], (long long)at, status);
            else if (!contains(log, names[i]))
                snprintf(why, sizeof why, "%s: byte %lld flipped: no message names it", names[i], (long long)at);
            if (pwrite(fd, &byte, 1, at) != 1) snprintf(why, sizeof why, "%s cannot be restored", names[i]);
            close(fd);
            if (*why) show(log);
        }
    for (int i = 0; i < n; i++) free(names[i]);
    if (n == 0) snprintf(why, sizeof why, "no files in %s", folder);
    outcome(!*why, "flipped bytes", why);
    if (!*why) printf("flipped bytes: %d in %d files of a checkpoint, each refused by the file's name\n", flips, n);
}

// Two halves of the ranks with unlike options: all end at once with status 2 and the reason.
static void ranks_disagree(const Campaign *c, const char *what, const char *options, const char *word) {
    char out[600], log[640], why[1024] = "";
    snprintf(out, sizeof out, "%s/run-unlike", dir);
    snprintf(log, sizeof log, "%s/log-unlike.txt", dir);
    sh("rm -rf '%s'", out, "");
    int status = wait_all(start(c->ranks, c->level, out, options, log, 0), END_SECONDS, NULL);
    if (status != 2) snprintf(why, sizeof why, "status %d, expected 2", status);
    else if (!contains(log, word)) snprintf(why, sizeof why, "no message with \"%s\"", word);
    else if (contains(log, "\nstep ")) snprintf(why, sizeof why, "it trained");
    if (*why) show(log);
    outcome(!*why, what, why);
}

static void special_cases(const Campaign *c, bool all) {
    char kept[640], unlike[2600];
    // Of a finished run: its last checkpoint.
    snprintf(kept, sizeof kept, "%s/step-%d", c->ref, steps);
    if (c->ranks) launcher_killed(c);
    stopped(c, SIGTERM, false);
    if (c->ranks) stopped(c, SIGUSR1, true);
    if (all) stopped(c, SIGINT, false);
    disk_full(c, kept);
    files_too_large();
    flipped_bytes(c, c->ref, steps);
    if (c->ranks < 2) return;
    ranks_disagree(c, "ranks with another learning rate", "|--lr 1e-3", "option");
    ranks_disagree(c, "ranks with another scheme", "|--scheme none", "option");
    // Other data in a file of the same name: as in a folder that is not shared.
    size_t len;
    char *text = slurp(data, &len);
    for (int half = 0; half < 2; half++) {
        text[len / 2] ^= (char)half;
        snprintf(kept, sizeof kept, "%s/data-%d", dir, half);
        make_dir(kept, NULL);
        FILE *f = fopen(path_of("%s/text.txt", kept, ""), "w");
        if (!f || fwrite(text, 1, len, f) != len || fclose(f)) { perror(kept); exit(1); }
    }
    free(text);
    snprintf(unlike, sizeof unlike, "@%s/data-0 --train-data text.txt|@%s/data-1 --train-data text.txt", dir, dir);
    ranks_disagree(c, "ranks with other data", unlike, "data");
}

// ---------------------------------------------------------------------------------------------

static const char *value(int argc, char **argv, const char *name) {
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], name)) return argv[i + 1];
    return NULL;
}

int main(int argc, char **argv) {
    program = value(argc, argv, "--program");
    data = value(argc, argv, "--data");
    dir = value(argc, argv, "--dir");
    launcher = value(argc, argv, "--launcher");
    const char *n = value(argc, argv, "--kills"), *s = value(argc, argv, "--seed"), *only = value(argc, argv, "--only");
    if (!program || !data || !dir) { fprintf(stderr, "see the head of kill_harness.c\n"); return 2; }
    int kills = n ? atoi(n) : 12;
    if (s) seed = strtoull(s, NULL, 10);
    bool all = kills >= 50;
    if (all) steps = 120;
    // Adopts the ranks of a launcher that dies.
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)) { perror("prctl"); return 1; }
    setenv("OMP_WAIT_POLICY", "passive", 0);

    static Campaign few[] = {{.ranks = 2, .level = "full"}, {.ranks = -1}, {.ranks = 0, .level = "none"}};
    static Campaign many[] = {{.ranks = 2, .level = "full"},  {.ranks = 2, .level = "none"},
                              {.ranks = 2, .level = "optim"}, {.ranks = 2, .level = "grad"},
                              {.ranks = 3, .level = "full"},  {.ranks = 4, .level = "full"},
                              {.ranks = 3, .level = "optim"}, {.ranks = -1},
                              {.ranks = 0, .level = "none"}};
    static Campaign alone[] = {{.ranks = 0, .level = "none"}};
    Campaign *c = !launcher ? alone : all ? many : few;
    int n_campaigns = !launcher ? 1 : all ? (int)(sizeof many / sizeof *many) : (int)(sizeof few / sizeof *few);
    double t0 = now_seconds();
    for (int i = 0; i < n_campaigns; i++) {
        if (c[i].ranks < 0) snprintf(c[i].name, sizeof c[i].name, "mixed");
        else snprintf(c[i].name, sizeof c[i].name, "%d-%s", c[i].ranks ? c[i].ranks : 1, c[i].level);
        if (only && strcmp(only, c[i].name) && strcmp(only, "special")) continue;
        if (!reference(&c[i])) continue;
        if (!only || strcmp(only, "special")) campaign(&c[i], kills * (i + 1) / n_campaigns - kills * i / n_campaigns);
        if (i == 0 && (!only || !strcmp(only, "special"))) special_cases(&c[0], all);
        if (only && !strcmp(only, "special")) break;
    }
    printf("\n%d kills with seed %llu\n", kills_done, (unsigned long long)seed);
    if (restarts_on_other_ranks)
        printf("%d starts on ranks and levels drawn anew: first losses differ by %.2g at most, the next three by %.2g; "
               "from one rank undisturbed %.2g\n", restarts_on_other_ranks, widest_first, widest_next, widest_loss);
    printf("%-22s %6s %9s %12s %10s %9s %9s %8s %11s\n", "killed", "kills", "one rank", "named by us", "by mpirun",
           "not named", "seconds", "at most", "steps lost");
    for (int m = 0; m < MOMENTS; m++)
        if (tally[m].kills)
            printf("%-22s %6d %9d %12d %10d %9d %9.2f %8.2f %11d\n", moment_name[m], tally[m].kills, tally[m].alone,
                   tally[m].by_program, tally[m].by_launcher,
                   tally[m].kills - tally[m].alone - tally[m].by_program - tally[m].by_launcher,
                   tally[m].seconds_sum / tally[m].kills, tally[m].seconds_most, tally[m].lost_most);
    printf("%d starts had losses to be compared with those of the start before\n", starts_compared);
    if (launchers_stuck) printf("%d times mpirun waited for ever after all ranks had ended\n", launchers_stuck);
    printf("%d of %d kills as they should be; a checkpoint every %d steps; %.0f s\n", kills_good, kills_done,
           save_every, now_seconds() - t0);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
