/*
 * Preloaded under out_of_memory.c, which tells it what to refuse: the n-th request for memory, or for
 * a thread, from now on. It also says how many blocks are held.
 */
#include "interpose.h"

#include <pthread.h>

static long countdown; /* 0: refuse nothing */
static long held;
static bool hit;

static bool may_take(void)
{
    if (__atomic_load_n(&countdown, __ATOMIC_SEQ_CST) == 0)
        return true;
    if (__atomic_sub_fetch(&countdown, 1, __ATOMIC_SEQ_CST) != 0)
        return true;
    hit = true;
    return false;
}

static void took(void) { __atomic_fetch_add(&held, 1, __ATOMIC_SEQ_CST); }
static void gave(void) { __atomic_fetch_sub(&held, 1, __ATOMIC_SEQ_CST); }

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                   void *argument)
{
    NEXT(pthread_create);
    return may_take() ? next(thread, attributes, start, argument) : EAGAIN;
}

void fail_nth_begin(long n)
{
    hit = false;
    __atomic_store_n(&countdown, n, __ATOMIC_SEQ_CST);
}

/* Whether something was refused. */
bool fail_nth_end(void)
{
    __atomic_store_n(&countdown, 0, __ATOMIC_SEQ_CST);
    return hit;
}

long fail_nth_held(void) { return __atomic_load_n(&held, __ATOMIC_SEQ_CST); }
