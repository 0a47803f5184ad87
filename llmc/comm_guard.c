// The watch over the ranks: a star of TCP connections round rank 0, served by a thread in each process. The kernel
// closes the connections of a process however it dies, so its end is seen at once; that of a machine by keepalive,
// within DEAD_SECONDS. Neither MPI nor NCCL can be asked: their calls may hang when a peer is gone.
//
// After a hello with the token (a random number that went round by MPI) only frames go over a connection: a goodbye,
// the order to end, or the error of a rank that dies by its own decision, which rank 0 prints and passes on as the
// order.
#include "comm_impl.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define DEAD_SECONDS 20         // a machine that does not answer for so long is gone
#define MEET_SECONDS 60         // for all ranks to connect
#define HELLO_SECONDS 5         // for a connection to say who it is

typedef struct { uint64_t token; int32_t rank, pid; } Hello;
typedef enum { F_GOODBYE = 1, F_END = 2, F_ERROR = 3 } FrameKind;
typedef struct { uint8_t kind, status; uint16_t length; } Frame;            // then `length` bytes of text
typedef struct { int fd; size_t n; uint8_t bytes[sizeof(Frame) + sizeof(((Err *)0)->text)]; } Connection;

static int my_rank, n_ranks, my_local_rank, listener = -1;
static uint64_t token;
static Connection *links;       // rank 0: of every rank (its own unused); others: links[0], to rank 0. fd -1: over
static const RankInfo *ranks;
static pthread_t thread;
static bool watching;
static atomic_flag told = ATOMIC_FLAG_INIT;     // somebody in this process tells an error and ends the process
static Err own_error;                           // what this rank has asked rank 0 to tell
static atomic_bool has_own_error;

static void sleep_seconds(double s) {
    struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

// ---------------------------------------------------------------------------------------------
// Meeting

static void set_options(int fd, bool one_machine) {
    int on = 1, idle = 5, every = 5, count = DEAD_SECONDS / 5 - 1, timeout = DEAD_SECONDS * 1000;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (one_machine) return;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &every, sizeof every);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof timeout);
}

static int listen_on(int family, bool loopback, int *port) {
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), off = 0;
    if (fd < 0) return -1;
    struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY)};
    struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_addr = in6addr_any};
    struct sockaddr *a = family == AF_INET ? (struct sockaddr *)&a4 : (struct sockaddr *)&a6;
    socklen_t n = family == AF_INET ? sizeof a4 : sizeof a6;
    if (family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);    // IPv4 comes here too
    if (bind(fd, a, n) || listen(fd, 4096) || getsockname(fd, a, &n)) {
        int e = errno;
        close(fd);
        errno = e;
        return -1;
    }
    *port = ntohs(family == AF_INET ? a4.sin_port : a6.sin6_port);
    return fd;
}

void guard_listen(GuardPlace *place, bool one_machine) {
    *place = (GuardPlace){0};
    if (getrandom(&place->token, sizeof place->token, 0) != sizeof place->token) {
        snprintf(place->why, sizeof place->why, "no random number: %s", strerror(errno));
        return;
    }
    token = place->token;
    if (one_machine) {
        place->address[0] = (GuardAddress){4, {127, 0, 0, 1}};
        place->n = 1;
        listener = listen_on(AF_INET, true, &place->port);
    } else {
        struct ifaddrs *all = NULL;
        if (getifaddrs(&all)) all = NULL;
        for (struct ifaddrs *i = all; i && place->n < 16; i = i->ifa_next) {
            GuardAddress *a = &place->address[place->n];
            if (!i->ifa_addr || !(i->ifa_flags & IFF_UP) || (i->ifa_flags & IFF_LOOPBACK)) continue;
            if (i->ifa_addr->sa_family == AF_INET) {
                a->family = 4;
                memcpy(a->bytes, &((struct sockaddr_in *)(void *)i->ifa_addr)->sin_addr, 4);
                place->n++;
            } else if (i->ifa_addr->sa_family == AF_INET6) {
                struct in6_addr *v6 = &((struct sockaddr_in6 *)(void *)i->ifa_addr)->sin6_addr;
                if (IN6_IS_ADDR_LINKLOCAL(v6)) continue;
                a->family = 6;
                memcpy(a->bytes, v6, 16);
                place->n++;
            }
        }
        freeifaddrs(all);
        listener = listen_on(AF_INET6, false, &place->port);
        if (listener < 0) listener = listen_on(AF_INET, false, &place->port);
    }
    if (listener < 0) {
        place->port = 0;
        snprintf(place->why, sizeof place->why, "cannot listen for other ranks: %s", strerror(errno));
    }
}

// Reads or writes exactly n bytes before `deadline`.
static bool transfer_exactly(int fd, void *data, size_t n, bool write, double deadline) {
    for (size_t done = 0; done < n;) {
        double left = deadline - now_seconds();
        struct pollfd p = {fd, write ? POLLOUT : POLLIN, 0};
        if (left <= 0 || (poll(&p, 1, (int)(left * 1000) + 1) < 0 && errno != EINTR)) return false;
        char *at = (char *)data + done;
        ssize_t k = write ? send(fd, at, n - done, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(fd, at, n - done, MSG_DONTWAIT);
        if (k > 0) done += (size_t)k;
        else if (k == 0 || (errno != EAGAIN && errno != EINTR)) return false;
    }
    return true;
}

static int connect_to(const GuardAddress *a, int port, double deadline) {
    int fd = socket(a->family == 4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    memcpy(&a4.sin_addr, a->bytes, 4);
    memcpy(&a6.sin6_addr, a->bytes, 16);
    int rc = a->family == 4 ? connect(fd, (struct sockaddr *)&a4, sizeof a4)
                            : connect(fd, (struct sockaddr *)&a6, sizeof a6);
    int error = rc < 0 ? errno : 0;
    socklen_t n = sizeof error;
    struct pollfd p = {fd, POLLOUT, 0};
    double left = deadline - now_seconds();
    if (error == EINPROGRESS) {
        int k = 0;
        while (left > 0 && (k = poll(&p, 1, (int)(left * 1000) + 1)) < 0 && errno == EINTR)
            left = deadline - now_seconds();
        error = k > 0 ? 0 : ETIMEDOUT;
        if (!error && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &n)) error = errno;
    }
    if (!error) return fd;
    close(fd);
    errno = error;
    return -1;
}

static int meet_rank_0(const GuardPlace *place, Err *err) {
    Hello hello = {token, my_rank, (int32_t)getpid()};
    char tried[256] = "", why[128] = "it has no address";
    double last = now_seconds() + MEET_SECONDS;
    for (int i = 0; i < place->n; i++) {
        const GuardAddress *a = &place->address[i];
        int fd = connect_to(a, place->port, now_seconds() + 3);
        uint64_t answer = 0;
        if (fd < 0) {
            snprintf(why, sizeof why, "%s", strerror(errno));
        } else {
            // Another process may have that address in this network; only rank 0 knows the answer. One that says
            // nothing must leave time for the other addresses.
            double until = now_seconds() + MEET_SECONDS / 4;
            if (until > last) until = last;
            if (transfer_exactly(fd, &hello, sizeof hello, true, now_seconds() + HELLO_SECONDS) &&
                transfer_exactly(fd, &answer, sizeof answer, false, until) && answer == ~token) {
                set_options(fd, a->bytes[0] == 127);
                links[0].fd = fd;
                return 0;
            }
            close(fd);
            snprintf(why, sizeof why, "whoever answers there is not rank 0");
        }
        char text[INET6_ADDRSTRLEN] = "";
        inet_ntop(a->family == 4 ? AF_INET : AF_INET6, a->bytes, text, sizeof text);
        size_t used = strlen(tried);
        snprintf(tried + used, sizeof tried - used, "%s%s", used ? ", " : "", text);
    }
    return err_set(err, E_FAIL, "rank %d cannot reach rank 0 for the watch at %s, port %d: %s; let TCP connections "
                                "between the machines pass, or set QLLM_WATCH=off to go without the watch", my_rank,
                   tried, place->port, why);
}

static int meet_all(bool one_machine, Err *err) {
    enum { WAITING = 16 };                      // connections that have not said yet who they are
    struct { int fd; size_t n; double until; Hello hello; } w[WAITING];
    int n_waiting = 0, missing = n_ranks - 1;
    double deadline = now_seconds() + MEET_SECONDS;
    while (missing && now_seconds() < deadline) {
        struct pollfd p[WAITING + 1];
        for (int i = 0; i < n_waiting; i++) p[i] = (struct pollfd){w[i].fd, POLLIN, 0};
        p[n_waiting] = (struct pollfd){n_waiting < WAITING ? listener : -1, POLLIN, 0};
        if (poll(p, (nfds_t)n_waiting + 1, 200) < 0 && errno != EINTR) break;
        int before = n_waiting;
        if (n_waiting < WAITING) {
            int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd >= 0) {
                w[n_waiting].fd = fd;
                w[n_waiting].n = 0;
                w[n_waiting++].until = now_seconds() + HELLO_SECONDS;
            } else if (errno == EMFILE || errno == ENFILE) {
                return err_set(err, E_FAIL, "the watch over %d ranks needs as many open files: raise `ulimit -n`",
                               n_ranks);
            }
        }
        for (int i = before - 1; i >= 0; i--) {
            ssize_t k = recv(w[i].fd, (char *)&w[i].hello + w[i].n, sizeof(Hello) - w[i].n, MSG_DONTWAIT);
            bool over = k == 0 || (k < 0 && errno != EAGAIN && errno != EINTR) || now_seconds() > w[i].until;
            bool in = false;
            if (k > 0) w[i].n += (size_t)k;
            if (k > 0 && w[i].n == sizeof(Hello)) {
                const Hello *h = &w[i].hello;
                uint64_t answer = ~token;
                in = h->token == token && h->rank > 0 && h->rank < n_ranks && links[h->rank].fd < 0 &&
                     send(w[i].fd, &answer, sizeof answer, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof answer;
                over = !in;
                if (in) {
                    set_options(w[i].fd, one_machine);
                    links[h->rank].fd = w[i].fd;
                    missing--;
                }
            }
            if (over) close(w[i].fd);
            if (over || in) w[i] = w[--n_waiting];
        }
    }
    for (int i = 0; i < n_waiting; i++) close(w[i].fd);
    close(listener);
    listener = -1;
    for (int r = 1; r < n_ranks; r++)
        if (links[r].fd < 0)
            return err_set(err, E_FAIL, "rank %d of %d did not connect to rank 0 within %d s", r, n_ranks,
                           MEET_SECONDS);
    return 0;
}

int guard_connect(const GuardPlace *place, int rank, int size, Err *err) {
    my_rank = rank;
    n_ranks = size;
    token = place->token;
    int n = rank == 0 ? size : 1;
    links = xcalloc((size_t)n, sizeof *links);
    for (int i = 0; i < n; i++) links[i].fd = -1;
    if (!place->port) return err_set(err, E_FAIL, "rank 0: %s", place->why);
    if (rank > 0) return meet_rank_0(place, err);
    struct rlimit files;
    if (!getrlimit(RLIMIT_NOFILE, &files) && files.rlim_cur < (rlim_t)size + 512) {
        files.rlim_cur = files.rlim_max < (rlim_t)size + 512 ? files.rlim_max : (rlim_t)size + 512;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    return meet_all(place->address[0].bytes[0] == 127, err);
}

// ---------------------------------------------------------------------------------------------
// Ends

// For the thread that tells: the others of this process may go on for the moment, but tell nothing any more.
static bool claim(void) { return !atomic_flag_test_and_set(&told); }
static void wait_for_the_end(void) {
    for (;;) pause();
}

// What the program has printed should not be lost; but nothing here may wait for a reader who is stuck.
static void flush_output(void) {
    struct pollfd p = {STDOUT_FILENO, POLLOUT, 0};
    if (poll(&p, 1, 0) == 1 && (p.revents & POLLOUT) && ftrylockfile(stdout) == 0) {
        fflush(stdout);
        funlockfile(stdout);
    }
}

enum { LINE = sizeof(((Err *)0)->text) + 256, STUCK_SECONDS = 5 };

// Prints a line of text; false if whoever reads stderr takes nothing for so many seconds.
static bool say(const char *line, int seconds) {
    struct pollfd p = {STDERR_FILENO, POLLOUT, 0};
    double left = seconds, until = now_seconds() + left;
    int k;
    flush_output();
    while ((k = poll(&p, 1, (int)(left * 1000))) < 0 && errno == EINTR)
        left = until > now_seconds() ? until - now_seconds() : 0;
    if (k == 0) return false;
    dprintf(STDERR_FILENO, "%s\n", line);
    return true;
}

static void word_error(char line[LINE], int rank, const char *text) {
    snprintf(line, LINE, "%.200s[rank %d]: %s", program_name, rank, text);
}
static void print_error(int rank, const char *text) {
    char line[LINE];
    word_error(line, rank, text);
    say(line, STUCK_SECONDS);
}

static bool send_frame(int fd, FrameKind kind, int status, const char *text) {
    uint8_t bytes[sizeof(Frame) + sizeof(((Err *)0)->text)];
    size_t length = text ? strnlen(text, sizeof(((Err *)0)->text) - 1) : 0;
    Frame f = {(uint8_t)kind, (uint8_t)status, (uint16_t)length};
    memcpy(bytes, &f, sizeof f);
    if (length) memcpy(bytes + sizeof f, text, length);
    ssize_t n = (ssize_t)(sizeof f + length);
    return send(fd, bytes, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT) == n;
}

// Rank 0, after claim(): tells why, then all others end, then this process.
#if defined(__GNUC__)
__attribute__((noreturn))
#endif
static void end_all(int status, const char *line) {
    // First the line, because a launcher may end this process as soon as another has ended; but a line that must wait
    // for its reader does not hold up the order.
    bool said = say(line, 0);
    struct pollfd *p = calloc((size_t)n_ranks, sizeof *p);
    for (int r = 1; r < n_ranks; r++) {
        if (links[r].fd >= 0) send_frame(links[r].fd, F_END, status, NULL);
        if (links[r].fd >= 0) shutdown(links[r].fd, SHUT_WR);
        if (p) p[r] = (struct pollfd){links[r].fd, POLLIN, 0};
    }
    if (!said) say(line, STUCK_SECONDS);
    // Were this process gone before they have read the order, the connections might be reset and the order lost.
    if (p) p[0].fd = -1;
    for (double until = now_seconds() + 1; p;) {
        int open = 0, left = (int)((until - now_seconds()) * 1000);
        for (int r = 1; r < n_ranks; r++) open += p[r].fd >= 0;
        if (!open || left <= 0 || poll(p, (nfds_t)n_ranks, left) <= 0) break;
        for (int r = 1; r < n_ranks; r++) {
            char rest[256];
            if (p[r].fd < 0 || !p[r].revents) continue;
            ssize_t k = recv(p[r].fd, rest, sizeof rest, MSG_DONTWAIT);
            if (k == 0 || (k < 0 && errno != EAGAIN && errno != EINTR)) p[r].fd = -1;
        }
    }
    _exit(status);
}

static const char resume[] = "The newest complete checkpoint is intact: start again with --resume";

static void word_gone(char line[LINE], const int *gone, int n) {
    char names[512] = "";
    for (int i = 0; i < n && i < 4; i++) {
        size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%srank %d (pid %d on %s)", i ? ", " : "", gone[i],
                 ranks[gone[i]].pid, ranks[gone[i]].host);
    }
    if (n > 4) snprintf(names + strlen(names), sizeof names - strlen(names), " and %d more", n - 4);
    snprintf(line, LINE, "%.200s: %s %s gone; ending all ranks. %s", program_name, names, n == 1 ? "is" : "are",
             resume);
}

// Whether the process of a rank on this machine is there and more than a zombie.
static bool is_alive(int rank) {
    char path[40], text[512], *name_end;
    snprintf(path, sizeof path, "/proc/%d/stat", ranks[rank].pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (n <= 0) return false;
    text[n] = 0;
    name_end = strrchr(text, ')');          // "pid (name) state ..."
    return name_end && strlen(name_end) > 2 && name_end[2] != 'Z' && name_end[2] != 'X';
}

// Rank 0 is gone. One rank on each machine says so: the lowest that lives. It then stays until the others, which ask
// for TELL_SECONDS at most whether it lives, have seen that it does; they ask one after the other.
#define TELL_SECONDS 1.5
#if defined(__GNUC__)
__attribute__((noreturn))
#endif
static void rank_0_is_gone(void) {
    int teller = ranks[my_rank].machine == 0 ? 1 : 0, zero = 0;
    if (!claim()) wait_for_the_end();
    if (atomic_load(&has_own_error)) print_error(my_rank, own_error.text);
    double until = now_seconds() + TELL_SECONDS, turn = 0.1 * (my_local_rank - teller);
    sleep_seconds(turn < 1 ? turn : 1);
    for (bool below = true; below && now_seconds() < until; sleep_seconds(below ? 0.1 : 0)) {
        below = false;
        for (int r = 1; r < my_rank && !below; r++)
            below = ranks[r].machine == ranks[my_rank].machine && is_alive(r);
        if (below) continue;
        char line[LINE];
        word_gone(line, &zero, 1);
        say(line, STUCK_SECONDS);
        sleep_seconds(TELL_SECONDS + 0.5);
    }
    _exit(1);
}

void guard_die(const Err *err) {
    int status = err->code == E_USAGE ? 2 : 1;
    char line[LINE];
    if (my_rank == 0) {
        if (!claim()) wait_for_the_end();
        word_error(line, 0, err->text);
        end_all(status, line);
    }
    // An error that all ranks meet is told by rank 0; its order to end arrives meanwhile.
    sleep_seconds(0.3);
    own_error = *err;
    atomic_store(&has_own_error, true);
    if (send_frame(links[0].fd, F_ERROR, status, err->text)) sleep_seconds(5);
    if (!claim()) wait_for_the_end();           // the watch has seen that rank 0 is gone
    print_error(my_rank, err->text);
    _exit(status);
}

// ---------------------------------------------------------------------------------------------
// The watch

typedef enum { R_NOTHING, R_GOODBYE, R_LOST } Reading;

// What has arrived on a connection. An error or an order to end is carried out here.
static Reading read_link(Connection *c, int from) {
    for (;;) {
        ssize_t k = recv(c->fd, c->bytes + c->n, sizeof c->bytes - c->n, MSG_DONTWAIT);
        if (k < 0 && errno == EINTR) continue;
        if (k < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return R_NOTHING;
        if (k <= 0) return R_LOST;
        c->n += (size_t)k;
        Frame f;
        if (c->n < sizeof f) continue;
        memcpy(&f, c->bytes, sizeof f);
        if (f.length >= sizeof(((Err *)0)->text) || f.kind < F_GOODBYE || f.kind > F_ERROR) return R_LOST;
        if (c->n < sizeof f + f.length) continue;
        if (f.kind == F_GOODBYE) return R_GOODBYE;
        if (f.kind == F_END && my_rank > 0) _exit(f.status ? f.status : 1);
        if (f.kind == F_ERROR && my_rank == 0) {
            char text[sizeof(((Err *)0)->text)], line[LINE];
            memcpy(text, c->bytes + sizeof f, f.length);
            text[f.length] = 0;
            if (!claim()) wait_for_the_end();
            word_error(line, from, text);
            end_all(f.status ? f.status : 1, line);
        }
        return R_LOST;
    }
}

static void *watch(void *unused) {
    (void)unused;
    int n = my_rank == 0 ? n_ranks : 1, open = my_rank == 0 ? n_ranks - 1 : 1;
    struct pollfd *p = xcalloc((size_t)n, sizeof *p);
    int *gone = xcalloc((size_t)n, sizeof *gone);
    for (int i = 0; i < n; i++) p[i] = (struct pollfd){links[i].fd, POLLIN, 0};
    while (open) {
        if (poll(p, (nfds_t)n, -1) < 0) continue;
        int n_gone = 0;
        for (int i = 0; i < n; i++) {
            if (p[i].fd < 0 || !p[i].revents) continue;
            Reading r = read_link(&links[i], i);
            if (r == R_NOTHING) continue;
            if (r == R_LOST && my_rank > 0) rank_0_is_gone();
            if (r == R_LOST) gone[n_gone++] = i;
            else if (my_rank == 0) send_frame(links[i].fd, F_GOODBYE, 0, NULL);
            close(links[i].fd);
            p[i].fd = links[i].fd = -1;
            open--;
        }
        if (!n_gone) continue;
        if (!claim()) wait_for_the_end();
        char line[LINE];
        word_gone(line, gone, n_gone);
        end_all(1, line);
    }
    free(p);
    free(gone);
    return NULL;
}

int guard_watch(const RankInfo *who, int local_rank, Err *err) {
    ranks = who;
    my_local_rank = local_rank;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);          // signals are for the main thread
    int e = pthread_create(&thread, NULL, watch, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    watching = e == 0;
    return e ? err_set(err, E_FAIL, "no thread for the watch over the ranks: %s; raise `ulimit -u`, or set "
                                    "QLLM_WATCH=off to go without the watch", strerror(e)) : 0;
}

bool guard_watching(void) { return watching; }

void guard_goodbye(void) {
    if (!watching) return;
    if (my_rank > 0) send_frame(links[0].fd, F_GOODBYE, 0, NULL);
    pthread_join(thread, NULL);
    watching = false;
    free(links);
    links = NULL;
}

// ---------------------------------------------------------------------------------------------
// Deadlines

static const char *deadline_line;
static int deadline_status;

// Only what a signal handler may do.
static void deadline_is_over(int signal) {
    (void)signal;
    if (deadline_line) {
        struct pollfd p = {STDERR_FILENO, POLLOUT, 0};
        const char *parts[] = {program_name, ": ", deadline_line, "\n"};
        for (size_t i = 0; i < sizeof parts / sizeof *parts && poll(&p, 1, 0) == 1; i++)
            if (write(STDERR_FILENO, parts[i], strlen(parts[i])) < 0) break;
    }
    _exit(deadline_status);
}

void guard_deadline(unsigned seconds, const char *line, int status) {
    static struct sigaction before;
    static bool set;
    if (set) {
        alarm(0);
        sigaction(SIGALRM, &before, NULL);
        set = false;
    }
    deadline_line = line;
    deadline_status = status;
    struct sigaction sa = {.sa_handler = deadline_is_over};
    if (!seconds || sigaction(SIGALRM, &sa, &before)) return;
    set = true;
    alarm(seconds);
}
