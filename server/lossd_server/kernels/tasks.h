/* Work in numbered tasks, shared among threads that are made for the call: there is no pool to spin, to
 * starve, or to be lost in a fork. */

#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define MAX_HELPERS 63

#if defined(__GLIBC__)
typedef cpu_set_t core_set;
#else
typedef char core_set;
#endif

typedef struct {
    void (*run)(void *work, int64_t task);
    void *work;
    int64_t count;
    atomic_int_fast64_t next;
    core_set cores; /* that the caller may use; empty where helpers begin wherever they do */
} task_list;

static void take_tasks(task_list *list) {
#if defined(__SSE__)
    /* Subnormal numbers cost a hundred times as much, and mean nothing in a loss. */
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
#endif
    for (int64_t task; (task = atomic_fetch_add(&list->next, 1)) < list->count;) list->run(list->work, task);
#if defined(__SSE__)
    _mm_setcsr(mode);
#endif
}

/* Has helpers begin on other cores than the caller's. Linux begins those of a thread that was asleep shortly before,
 * as one that answers calls is, on that thread's own core: there they wait for it, and it for them. */
static void begin_elsewhere(pthread_attr_t *attributes, core_set *cores) {
#if defined(__GLIBC__)
    core_set others;
    CPU_ZERO(cores);
    if (sched_getaffinity(0, sizeof others, &others) || CPU_COUNT(&others) < 2) return;
    *cores = others;
    CPU_CLR(sched_getcpu(), &others);
    pthread_attr_setaffinity_np(attributes, sizeof others, &others);
#else
    (void)attributes, (void)cores;
#endif
}

static void *help(void *argument) {
    task_list *list = argument;
#if defined(__GLIBC__)
    /* From here on it may go anywhere: to the caller's core too, when that has nothing left to do. */
    if (CPU_COUNT(&list->cores)) sched_setaffinity(0, sizeof list->cores, &list->cores);
#endif
    take_tasks(list);
    return 0;
}

/* Runs every task once, on the calling thread and up to `threads - 1` more. */
static void run_tasks(void (*run)(void *, int64_t), void *work, int64_t count, int32_t threads) {
    task_list list = {.run = run, .work = work, .count = count, .next = 0};
    pthread_t helpers[MAX_HELPERS];
    int64_t most = count < threads ? count : threads, wanted = most - 1 < MAX_HELPERS ? most - 1 : MAX_HELPERS;
    int made = 0;
    if (wanted > 0) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        begin_elsewhere(&attributes, &list.cores);
        while (made < wanted
               && (!pthread_create(&helpers[made], &attributes, help, &list)
                   || !pthread_create(&helpers[made], 0, help, &list))) /* where nobody may choose cores */
            made++;
        pthread_attr_destroy(&attributes);
    }
    take_tasks(&list);
    while (made) pthread_join(helpers[--made], 0);
}
