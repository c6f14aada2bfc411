/* Work in numbered tasks, shared among threads that are made for the call: there is no pool to spin, to
 * starve, or to be lost in a fork. */

#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define MAX_HELPERS 63

typedef struct {
    void (*run)(void *work, int64_t task);
    void *work;
    int64_t count;
    atomic_int_fast64_t next;
} task_list;

static void *take_tasks(void *argument) {
    task_list *list = argument;
#if defined(__SSE__)
    /* Subnormal numbers cost a hundred times as much, and mean nothing in a loss. */
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
#endif
    for (int64_t task; (task = atomic_fetch_add(&list->next, 1)) < list->count;) list->run(list->work, task);
#if defined(__SSE__)
    _mm_setcsr(mode);
#endif
    return 0;
}

/* Runs every task once, on the calling thread and up to `threads - 1` more. */
static void run_tasks(void (*run)(void *, int64_t), void *work, int64_t count, int32_t threads) {
    task_list list = {.run = run, .work = work, .count = count, .next = 0};
    pthread_t helpers[MAX_HELPERS];
    int made = 0, wanted = threads - 1 < MAX_HELPERS ? threads - 1 : MAX_HELPERS;
    while (made < wanted && made + 1 < count && !pthread_create(&helpers[made], 0, take_tasks, &list)) made++;
    take_tasks(&list);
    while (made) pthread_join(helpers[--made], 0);
}
