/*
 * The functions by which a program takes and gives back memory, put before the C library's by
 * LD_PRELOAD. The file that includes this says what happens at each of them:
 *
 *     static bool may_take(void);    before memory is taken; false refuses it
 *     static void took(void);        after it was taken
 *     static void gave(void);        before it is given back
 *
 * Calls that the C library makes of its own functions do not pass here.
 */
#ifndef INTERPOSE_H
#define INTERPOSE_H

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static bool may_take(void);
static void took(void);
static void gave(void);

/* `next`: the function of this name that comes after the one here. ISO C has no way from dlsym's data
 * pointer to a function, POSIX has memcpy's. */
#define NEXT(name)                                 \
    static __typeof__(&name) next;                 \
    do {                                           \
        if (next == NULL) {                        \
            void *found = dlsym(RTLD_NEXT, #name); \
            memcpy(&next, &found, sizeof next);    \
        }                                          \
    } while (0)

/* dlsym may take memory itself, while it looks for the function that gives some. */
static char early[4096];
static size_t early_used;
static bool is_early(const void *p)
{
    return (const char *)p >= early && (const char *)p < early + sizeof early;
}
static void *take_early(size_t bytes)
{
    size_t at = (early_used + 15) / 16 * 16;
    if (bytes > sizeof early - at)
        _exit(98);
    early_used = at + bytes;
    return early + at;
}

static void *refused(void)
{
    errno = ENOMEM;
    return NULL;
}

static void *taken(void *p)
{
    if (p != NULL)
        took();
    return p;
}

static __thread int looking_up;

void *malloc(size_t bytes)
{
    if (looking_up)
        return take_early(bytes);
    looking_up++;
    NEXT(malloc);
    looking_up--;
    return may_take() ? taken(next(bytes)) : refused();
}

void *calloc(size_t count, size_t bytes)
{
    if (looking_up)
        return take_early(count * bytes); /* static memory: zeros */
    looking_up++;
    NEXT(calloc);
    looking_up--;
    return may_take() ? taken(next(count, bytes)) : refused();
}

void *realloc(void *p, size_t bytes)
{
    looking_up++;
    NEXT(realloc);
    looking_up--;
    if (!may_take())
        return refused();
    void *moved = next(p, bytes);
    if (p == NULL && moved != NULL)
        took();
    if (p != NULL && moved == NULL && bytes == 0)
        gave();
    return moved;
}

void free(void *p)
{
    if (p == NULL || is_early(p))
        return;
    looking_up++;
    NEXT(free);
    looking_up--;
    gave();
    next(p);
}

int posix_memalign(void **p, size_t alignment, size_t bytes)
{
    looking_up++;
    NEXT(posix_memalign);
    looking_up--;
    if (!may_take())
        return ENOMEM;
    int error = next(p, alignment, bytes);
    if (error == 0)
        took();
    return error;
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    looking_up++;
    NEXT(aligned_alloc);
    looking_up--;
    return may_take() ? taken(next(alignment, bytes)) : refused();
}

void *memalign(size_t alignment, size_t bytes)
{
    looking_up++;
    NEXT(memalign);
    looking_up--;
    return may_take() ? taken(next(alignment, bytes)) : refused();
}

#define DEFINE_MMAP(name)                                                               \
    void *name(void *address, size_t bytes, int protection, int flags, int file, off_t at) \
    {                                                                                   \
        looking_up++;                                                                   \
        NEXT(name);                                                                      \
        looking_up--;                                                                   \
        if (!may_take()) {                                                              \
            errno = ENOMEM;                                                             \
            return MAP_FAILED;                                                          \
        }                                                                               \
        void *p = next(address, bytes, protection, flags, file, at);                    \
        if (p != MAP_FAILED)                                                            \
            took();                                                                     \
        return p;                                                                       \
    }
DEFINE_MMAP(mmap)
DEFINE_MMAP(mmap64) /* off_t has 64 bits on the machines where this runs */

int munmap(void *p, size_t bytes)
{
    looking_up++;
    NEXT(munmap);
    looking_up--;
    gave();
    return next(p, bytes);
}

#endif
