#include "common.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

const char *program_name = "qllm";

int err_set(Err *err, int code, const char *fmt, ...) {
    if (!err) return code;
    err->code = code;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err->text, sizeof err->text, fmt, ap);
    va_end(ap);
    return code;
}

void die(const Err *err) {
    fflush(stdout);
    fprintf(stderr, "%s: %s\n", program_name, err->text);
    exit(err->code == E_USAGE ? 2 : 1);
}

static const struct { const char *name; size_t size;
} dtypes[DT_COUNT] = {
    [DT_F32] = {"F32", 4}, [DT_F16] = {"F16", 2},   [DT_BF16] = {"BF16", 2}, [DT_I8] = {"I8", 1},
    [DT_U8] = {"U8", 1},   [DT_I16] = {"I16", 2},   [DT_I32] = {"I32", 4},   [DT_I64] = {"I64", 8},
    [DT_F64] = {"F64", 8}, [DT_BOOL] = {"BOOL", 1},
};

size_t dtype_size(DType t) { return dtypes[t].size; }
const char *dtype_name(DType t) { return dtypes[t].name; }

int dtype_from_name(const char *name) {
    for (int t = 0; t < DT_COUNT; t++)
        if (!strcmp(name, dtypes[t].name)) return t;
    return -1;
}

// Sources come from files and may stand at any address, hence memcpy.
int convert_to_f32(float *dst, const void *src, DType t, size_t n) {
    const uint8_t *s = src;
    switch (t) {
    case DT_F32: memcpy(dst, src, n * 4); return 0;
    case DT_BF16:
        for (size_t i = 0; i < n; i++) { uint16_t h; memcpy(&h, s + 2 * i, 2); dst[i] = bf16_to_f32(h); }
        return 0;
    case DT_F16:
        for (size_t i = 0; i < n; i++) { uint16_t h; memcpy(&h, s + 2 * i, 2); dst[i] = f16_to_f32(h); }
        return 0;
    case DT_F64:
        for (size_t i = 0; i < n; i++) { double d; memcpy(&d, s + 8 * i, 8); dst[i] = (float)d; }
        return 0;
    default: return E_DTYPE;
    }
}

bool mul_size(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
bool add_size(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }

static void out_of_memory(size_t bytes) {
    fprintf(stderr, "%s: out of memory (%zu bytes)\n", program_name, bytes);
    exit(1);
}

void *xmalloc(size_t bytes) {
    size_t padded;
    if (!add_size(bytes, 63, &padded)) out_of_memory(bytes);
    void *p = aligned_alloc(64, padded ? padded & ~(size_t)63 : 64);
    if (!p) out_of_memory(bytes);
    return p;
}

void *xcalloc(size_t n, size_t size) {
    size_t bytes;
    if (!mul_size(n, size, &bytes)) out_of_memory(SIZE_MAX);
    return memset(xmalloc(bytes), 0, bytes);
}

char *xstrdup(const char *s) {
    size_t n = strlen(s) + 1;
    return memcpy(xmalloc(n), s, n);
}

int big_alloc(void **out, size_t bytes, const char *what, Err *err) {
    size_t align = bytes >= (4u << 20) ? (2u << 20) : 64, padded;
    if (!add_size(bytes, align - 1, &padded)) return err_set(err, E_NOMEM, "%s: %zu bytes overflow", what, bytes);
    padded &= ~(align - 1);
    void *p = aligned_alloc(align, padded ? padded : align);
    if (!p)
        return err_set(err, E_NOMEM, "no memory for %s: %.2f GiB; take a smaller --batch, --seq-len or model", what,
                       (double)bytes / (1 << 30));
    // Large pages make the arenas' first touch and every later walk cheaper; refusal does no harm.
    if (align > 64) madvise(p, padded, MADV_HUGEPAGE);
    // Whoever touches a page first waits for the system to find and clear it: all threads do.
    const size_t page = 2u << 20;
#pragma omp parallel for schedule(static) if (bytes >= 4 * page)
    for (size_t at = 0; at < bytes; at += page) memset((char *)p + at, 0, bytes - at < page ? bytes - at : page);
    *out = p;
    return 0;
}

static int64_t write_time(const struct stat *st) {
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

int file_map(FileMap *map, const char *path, Err *err) {
    *map = (FileMap){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set(err, errno == ENOENT ? E_MISSING : E_FAIL, "%s: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return err_set(err, E_FAIL, "%s: not a regular file", path);
    }
    if (st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) {
            int e = errno;
            close(fd);
            return err_set(err, E_FAIL, "%s: cannot map: %s", path, strerror(e));
        }
        map->base = p;
        map->data = p;
        map->size = (size_t)st.st_size;
    }
    map->device = st.st_dev;
    map->inode = st.st_ino;
    map->written = write_time(&st);
    close(fd);
    return 0;
}

void file_unmap(FileMap *map) {
    if (map->base) munmap(map->base, map->size);
    *map = (FileMap){0};
}

bool file_changed(const FileMap *map, const char *path) {
    struct stat st;
    if (stat(path, &st) || st.st_dev != map->device || st.st_ino != map->inode) return false;
    return (size_t)st.st_size != map->size || write_time(&st) != map->written;
}

void file_sequential(const FileMap *map) {
    if (map->base) madvise(map->base, map->size, MADV_SEQUENTIAL);
}

void file_drop(const FileMap *map, size_t begin, size_t end) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    begin -= begin % page;
    end -= end % page;
    if (begin < end) madvise((uint8_t *)map->base + begin, end - begin, MADV_DONTNEED);
}

int file_read(char **text, size_t *len, const char *path, size_t max, Err *err) {
    FileMap map;
    int rc = file_map(&map, path, err);
    if (rc < 0) return rc;
    if (map.size > max) {
        size_t size = map.size;
        file_unmap(&map);
        return err_set(err, E_FORMAT, "%s: %zu bytes; at most %zu are expected of such a file", path, size, max);
    }
    *text = xmalloc(map.size + 1);
    if (map.size) memcpy(*text, map.data, map.size);
    (*text)[map.size] = 0;
    *len = map.size;
    file_unmap(&map);
    return 0;
}

int atomic_open(AtomicFile *a, const char *path, Err *err) {
    *a = (AtomicFile){0};
    if (strlen(path) >= sizeof a->path)
        return err_set(err, E_USAGE, "path too long (%zu bytes): %.64s...", strlen(path), path);
    // The finished file takes the place of what is there: a pipe, a device or a folder would be lost or in the way.
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode))
        return err_set(err, E_USAGE, "%s is %s: give the name of a file", path,
                       S_ISDIR(st.st_mode) ? "a folder" : "a device or a pipe");
    strcpy(a->path, path);
    snprintf(a->tmp, sizeof a->tmp, "%s.tmp-%ld", path, (long)getpid());
    a->f = fopen(a->tmp, "wb");
    if (!a->f) return err_set(err, E_FAIL, "cannot write %s: %s", a->tmp, strerror(errno));
    return 0;
}

void atomic_write(AtomicFile *a, const void *data, size_t bytes) {
    if (a->failed || !bytes) return;
    if (fwrite(data, 1, bytes, a->f) != bytes) a->failed = errno ? errno : EIO;
}

void atomic_sync_soon(AtomicFile *a) {
#ifdef SYNC_FILE_RANGE_WRITE
    if (!a->failed) sync_file_range(fileno(a->f), 0, 0, SYNC_FILE_RANGE_WRITE);
#else
    (void)a;
#endif
}

// The rename must survive a crash too, so the folder's entry is synced as well.
static void sync_folder_of(const char *path) {
    char dir[1024];
    const char *slash = strrchr(path, '/');
    if (!slash) strcpy(dir, ".");
    else snprintf(dir, sizeof dir, "%.*s", slash == path ? 1 : (int)(slash - path), path);
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

int atomic_commit(AtomicFile *a, Err *err) {
    if (fflush(a->f) && !a->failed) a->failed = errno;
    if (!a->failed && fsync(fileno(a->f)) && errno != EINVAL) a->failed = errno;
    if (fclose(a->f) && !a->failed) a->failed = errno;
    a->f = NULL;
    if (!a->failed && rename(a->tmp, a->path)) a->failed = errno;
    if (a->failed) {
        unlink(a->tmp);
        return err_set(err, E_FAIL, "cannot write %s: %s; nothing was changed", a->path, strerror(a->failed));
    }
    sync_folder_of(a->path);
    return 0;
}

void atomic_abort(AtomicFile *a) {
    if (a->f) fclose(a->f);
    if (a->tmp[0]) unlink(a->tmp);
    a->f = NULL;
}

bool path_is_dir(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

bool path_exists(const char *path) { return access(path, F_OK) == 0; }

int make_dir(const char *path, Err *err) {
    char buf[1024];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof buf)
        return err_set(err, E_USAGE, "folder name of %zu bytes; 1 to %zu are possible", n, sizeof buf - 1);
    memcpy(buf, path, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (buf[i] != '/' && buf[i] != 0) continue;
        char keep = buf[i];
        buf[i] = 0;
        if (mkdir(buf, 0777) && errno != EEXIST)
            return err_set(err, E_FAIL, "cannot make folder %s: %s", buf, strerror(errno));
        buf[i] = keep;
    }
    if (!path_is_dir(path)) return err_set(err, E_FAIL, "%s is not a folder", path);
    if (access(path, W_OK)) return err_set(err, E_FAIL, "cannot write to folder %s: %s", path, strerror(errno));
    return 0;
}

double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

size_t peak_rss_bytes(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (size_t)u.ru_maxrss * 1024;
}

size_t physical_memory_bytes(void) { return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE); }
