/* Makes calls of storage fail, on purpose. Loaded with LD_PRELOAD; the environment says what fails:

     FAULTS_CALL   write, fsync, rename, open (for writing) or read
     FAULTS_PATH   a part of the path of the file
     FAULTS_ERRNO  number of the error; 0: write takes only half of the bytes, which is no error
     FAULTS_SKIP   number of such calls that still succeed
     FAULTS_COUNT  number of calls that fail after these; -1: all
     FAULTS_LOG    a file that gets a line for each call that fails

   Without FAULTS_CALL nothing fails. The variables are read at each call, so that a forked process can set them. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long seen;

static long number(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value ? atol(value) : otherwise;
}

/* 1 if this call fails; sets errno. */
static int fails(const char *call, const char *path) {
    const char *wanted = getenv("FAULTS_CALL"), *part = getenv("FAULTS_PATH"), *log = getenv("FAULTS_LOG");
    if (!wanted || !part || !path || strcmp(wanted, call) || !strstr(path, part) || (log && !strcmp(path, log)))
        return 0;
    long count = number("FAULTS_COUNT", -1), nth = atomic_fetch_add(&seen, 1) - number("FAULTS_SKIP", 0);
    if (nth < 0 || (count >= 0 && nth >= count))
        return 0;
    if (log) {
        int out = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
        char line[4096];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        syscall(SYS_write, out, line, (size_t)length < sizeof line ? (size_t)length : sizeof line);
        syscall(SYS_close, out);
    }
    errno = (int)number("FAULTS_ERRNO", ENOSPC);
    return 1;
}

static int fails_at(const char *call, int descriptor) {
    if (!getenv("FAULTS_CALL") || strcmp(getenv("FAULTS_CALL"), call))
        return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return fails(call, path);
}

#define REAL(name) \
    static typeof(name) *real; \
    if (!real) \
        real = (typeof(name) *)dlsym(RTLD_NEXT, #name)

#define HALF(bytes) ((bytes) > 1 ? (bytes) / 2 : (bytes))

ssize_t write(int descriptor, const void *data, size_t bytes) {
    REAL(write);
    if (!fails_at("write", descriptor))
        return real(descriptor, data, bytes);
    return errno ? -1 : real(descriptor, data, HALF(bytes));
}

ssize_t pwrite64(int descriptor, const void *data, size_t bytes, off64_t at) {
    REAL(pwrite64);
    if (!fails_at("write", descriptor))
        return real(descriptor, data, bytes, at);
    return errno ? -1 : real(descriptor, data, HALF(bytes), at);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(writev);
    if (!fails_at("write", descriptor))
        return real(descriptor, parts, count);
    return errno ? -1 : real(descriptor, parts, 1);
}

ssize_t read(int descriptor, void *data, size_t bytes) {
    REAL(read);
    return fails_at("read", descriptor) ? -1 : real(descriptor, data, bytes);
}

ssize_t pread64(int descriptor, void *data, size_t bytes, off64_t at) {
    REAL(pread64);
    return fails_at("read", descriptor) ? -1 : real(descriptor, data, bytes, at);
}

ssize_t pread(int descriptor, void *data, size_t bytes, off_t at) {
    REAL(pread);
    return fails_at("read", descriptor) ? -1 : real(descriptor, data, bytes, at);
}

int fsync(int descriptor) {
    REAL(fsync);
    return fails_at("fsync", descriptor) ? -1 : real(descriptor);
}

int rename(const char *old, const char *new) {
    REAL(rename);
    return fails("rename", old) ? -1 : real(old, new);
}

int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    REAL(renameat);
    return fails("rename", old) ? -1 : real(old_folder, old, new_folder, new);
}

static mode_t mode_of(int flags, va_list arguments) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list arguments; \
        va_start(arguments, flags); \
        mode_t mode = mode_of(flags, arguments); \
        va_end(arguments); \
        return (flags & O_ACCMODE) != O_RDONLY && fails("open", path) ? -1 : real(path, flags, mode); \
    }

OPEN(open)
OPEN(open64)

int openat64(int folder, const char *path, int flags, ...) {
    REAL(openat64);
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = mode_of(flags, arguments);
    va_end(arguments);
    return (flags & O_ACCMODE) != O_RDONLY && fails("open", path) ? -1 : real(folder, path, flags, mode);
}
