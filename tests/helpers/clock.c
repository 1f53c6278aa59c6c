/* Shifts the clock of the day of every process that preloads it, by SHIFT_S seconds.
 *
 * Time namespaces shift only clocks that count from the boot. Debian 12's libfaketime makes the
 * sleeps of Python 3.11 fail, or its locks wait for ever, as it shifts the other clocks, too.
 * Moments that a process waits for are shifted back, as the kernel knows the real clock only.
 * Times of files are real.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long (*real_syscall)(long, ...);

__attribute__((constructor)) static void find_syscall(void) {
    real_syscall = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
}

static int is_shifted(clockid_t clock) {
    return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
}

/* Clocks that count from the boot are far from 2001. */
static int is_date(const struct timespec *moment) { return moment->tv_sec > 1000000000; }

static struct timespec real(const struct timespec *moment) {
    struct timespec shifted = *moment;
    shifted.tv_sec -= SHIFT_S;
    return shifted;
}

long syscall(long number, ...) {
    va_list list;
    long a[6];
    struct timespec moment;
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (!real_syscall) find_syscall();
    int is_moment = number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3];
    if (is_moment) {
        moment = real((struct timespec *)a[3]);
        a[3] = (long)&moment;
    }
    return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && is_shifted(clock)) now->tv_sec += SHIFT_S;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = (int)syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec += SHIFT_S;
    return failed;
}

time_t time(time_t *copy) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (copy) *copy = now.tv_sec;
    return now.tv_sec;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *request,
                    struct timespec *rest) {
    struct timespec moment = *request;
    if (is_shifted(clock) && (flags & TIMER_ABSTIME)) moment = real(request);
    return syscall(SYS_clock_nanosleep, clock, flags, &moment, rest) ? errno : 0;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    struct timespec moment = is_date(until) ? real(until) : *until;
    clockid_t clock = is_date(until) ? CLOCK_REALTIME : CLOCK_MONOTONIC;
    return pthread_cond_clockwait(condition, mutex, clock, &moment);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex,
                            const struct timespec *restrict until) {
    struct timespec moment = real(until);
    return pthread_mutex_clocklock(mutex, CLOCK_REALTIME, &moment);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    struct timespec moment = real(until);
    return sem_clockwait(semaphore, CLOCK_REALTIME, &moment);
}
