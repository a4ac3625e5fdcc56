// SPDX-License-Identifier: Apache-2.0
/*
 * Preloaded into a process, gives it a wall clock of its own: the system's plus the seconds that stand, as one int64, at
 * the start of the file that PODWIRE_TEST_CLOCK names. What waits until a time of that clock waits for the same span.
 * Other clocks are left alone, as a step leaves them. (Debian's libfaketime 0.9.10 makes Python's sleep fail.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *step;
static int (*wait_pthread)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*wait_c11)(cnd_t *, mtx_t *, const struct timespec *);

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("PODWIRE_TEST_CLOCK");
	int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;

	if (file < 0)
		errx(1, "PODWIRE_TEST_CLOCK must name a readable file");
	step = mmap(0, sizeof(*step), PROT_READ, MAP_SHARED, file, 0);
	close(file);
	*(void **)&wait_pthread = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
	*(void **)&wait_c11 = dlsym(RTLD_NEXT, "cnd_timedwait");
	if (step == MAP_FAILED || !wait_pthread || !wait_c11)
		errx(1, "the clock can't be replaced");
}

static struct timespec system_time(const struct timespec *own)
{
	return (struct timespec){own->tv_sec - *step, own->tv_nsec};
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	int result = syscall(SYS_clock_gettime, clock, now);

	if (!result && clock == CLOCK_REALTIME && step)
		now->tv_sec += *step;
	return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	struct timespec precise;

	(void)zone;
	clock_gettime(CLOCK_REALTIME, &precise);
	*now = (struct timeval){precise.tv_sec, precise.tv_nsec / 1000};
	return 0;
}

time_t time(time_t *out)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (out)
		*out = now.tv_sec;
	return now.tv_sec;
}

int timespec_get(struct timespec *now, int base)
{
	return base == TIME_UTC && !clock_gettime(CLOCK_REALTIME, now) ? base : 0;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
			   const struct timespec *restrict until)
{
	struct timespec at = system_time(until);

	return wait_pthread(condition, mutex, &at);
}

int cnd_timedwait(cnd_t *restrict condition, mtx_t *restrict mutex, const struct timespec *restrict until)
{
	struct timespec at = system_time(until);

	return wait_c11(condition, mutex, &at);
}
