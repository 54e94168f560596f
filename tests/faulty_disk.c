/* A disk that fails when it is told to: preloaded into a process, steered through a shared page.
 *
 * FAULTY_DISK names a file with one `page` in it, mapped by the test as well. While a rule is
 * active, calls on files below its prefix fail with its errno: writes (once `budget` bytes are
 * used up, a short write first, as a full file system does), syncs, and the making of names.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, NAME = 4, RULES = 4 };

struct rule {
    volatile uint32_t active, error, calls, met;
    volatile int64_t budget;
    char prefix[232];
};

static struct rule *rules;

__attribute__((constructor)) static void map_page(void) {
    const char *name = getenv("FAULTY_DISK");
    int fd = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *page = mmap(NULL, sizeof(struct rule) * RULES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    rules = page == MAP_FAILED ? NULL : page;
    close(fd);
}

static struct rule *rule_for(const char *path, uint32_t call) {
    if (!rules || !path)
        return NULL;
    for (int i = 0; i < RULES; i++) {
        struct rule *r = &rules[i];
        if (r->active && (r->calls & call) && !strncmp(path, r->prefix, strlen(r->prefix)))
            return r;
    }
    return NULL;
}

static int anything_active(void) {
    for (int i = 0; rules && i < RULES; i++)
        if (rules[i].active)
            return 1;
    return 0;
}

static struct rule *rule_of(int fd, uint32_t call) {
    char link[64], path[4096];
    if (!anything_active())
        return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return NULL;
    path[length] = 0;
    return rule_for(path, call);
}

static struct rule *rule_at(int dir, const char *path, uint32_t call) {
    char link[64], whole[8192];
    if (!anything_active() || !path)
        return NULL;
    if (path[0] == '/')
        return rule_for(path, call);
    if (dir == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t length = readlink(link, whole, 4095);
    if (length <= 0)
        return NULL;
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return rule_for(whole, call);
}

static int fail(struct rule *r) {
    __atomic_add_fetch(&r->met, 1, __ATOMIC_RELAXED);
    errno = (int)r->error;
    return -1;
}

/* How much of `size` may be written; -1 for none at all. */
static ssize_t grant(struct rule *r, size_t size) {
    int64_t left = __atomic_fetch_sub(&r->budget, (int64_t)size, __ATOMIC_RELAXED);
    if (left >= (int64_t)size)
        return (ssize_t)size;
    return left > 0 ? (ssize_t)left : -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define LIMIT(fd, size)                                   \
    struct rule *r = rule_of(fd, WRITE);                  \
    if (r && (size)) {                                    \
        ssize_t granted = grant(r, size);                 \
        if (granted < 0)                                  \
            return fail(r);                               \
        size = (size_t)granted;                           \
    }

ssize_t write(int fd, const void *data, size_t size) {
    LIMIT(fd, size);
    return REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    LIMIT(fd, size);
    return REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    LIMIT(fd, size);
    return REAL(pwrite64)(fd, data, size, at);
}

#define REFUSE(found)          \
    struct rule *r = (found);  \
    if (r)                     \
        return fail(r);

ssize_t writev(int fd, const struct iovec *v, int n) {
    REFUSE(rule_of(fd, WRITE));
    return REAL(writev)(fd, v, n);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    REFUSE(rule_of(out, WRITE));
    return ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    REFUSE(rule_of(out, WRITE));
    return ((ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64"))(out, in, at, size);
}
int fsync(int fd) {
    REFUSE(rule_of(fd, SYNC));
    return REAL(fsync)(fd);
}
int fdatasync(int fd) {
    REFUSE(rule_of(fd, SYNC));
    return REAL(fdatasync)(fd);
}
int mkdir(const char *path, mode_t mode) {
    REFUSE(rule_at(AT_FDCWD, path, NAME));
    return REAL(mkdir)(path, mode);
}
int link(const char *from, const char *to) {
    REFUSE(rule_at(AT_FDCWD, to, NAME));
    return REAL(link)(from, to);
}
int rename(const char *from, const char *to) {
    REFUSE(rule_at(AT_FDCWD, to, NAME));
    return REAL(rename)(from, to);
}

#define OPEN(name, dir, path, flags, ...)                              \
    mode_t mode = 0;                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                               \
        va_list rest;                                                  \
        va_start(rest, flags);                                         \
        mode = va_arg(rest, mode_t);                                   \
        va_end(rest);                                                  \
        if ((flags & O_CREAT) && faccessat(dir, path, F_OK, 0)) {      \
            errno = 0;                                                 \
            REFUSE(rule_at(dir, path, NAME));                          \
        }                                                              \
    }                                                                  \
    return REAL(name)(__VA_ARGS__, mode);

int open(const char *path, int flags, ...) { OPEN(open, AT_FDCWD, path, flags, path, flags) }
int open64(const char *path, int flags, ...) { OPEN(open64, AT_FDCWD, path, flags, path, flags) }
int openat(int dir, const char *path, int flags, ...) { OPEN(openat, dir, path, flags, dir, path, flags) }
int openat64(int dir, const char *path, int flags, ...) { OPEN(openat64, dir, path, flags, dir, path, flags) }
