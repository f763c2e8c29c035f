/* pages_os.h - where memory comes from: C11 with huge pages on Linux, or Windows. For alloc.c
 * alone, first. */
#ifndef SA_PAGES_OS_H
#define SA_PAGES_OS_H

#ifdef __linux__
#define _GNU_SOURCE /* madvise */
#include <sys/mman.h>
#endif
#include <stddef.h>
#include <stdlib.h>

#ifdef _WIN32
#include <malloc.h>

/* `total` is a multiple of `line`. Large pages are for administrators there: nobody asks. */
static void *
take_pages(size_t line, size_t total)
{
    return _aligned_malloc(total, line);
}

static void
give_pages(void *memory)
{
    _aligned_free(memory);
}

#else

#define LARGE ((size_t)4 << 20)
#define HUGE_PAGE ((size_t)2 << 20)

static void *
take_pages(size_t line, size_t total)
{
    if (total < LARGE) {
        return aligned_alloc(line, total);
    }
    const size_t whole = (total + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void *memory = aligned_alloc(HUGE_PAGE, whole);
#ifdef MADV_HUGEPAGE
    if (memory != NULL) {
        (void)madvise(memory, whole,
                      MADV_HUGEPAGE); /* refused where the kernel has none: small pages serve */
    }
#endif
    return memory;
}

static void
give_pages(void *memory)
{
    free(memory);
}

#endif
#endif
