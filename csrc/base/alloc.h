/* alloc.h - all memory of the core: counted, 64-byte aligned, checked sizes, failure hooks. */
#ifndef SA_ALLOC_H
#define SA_ALLOC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SA_ALIGN 64

/* 64-byte aligned, uninitialised (while poisoning is on: filled with 0xFF bytes, so that a
 * forgotten value is a NaN or -1); NULL when there is none. 0 bytes gives a valid pointer. Large
 * blocks ask for huge pages. sa_free(NULL) does nothing. */
#define sa_malloc(bytes) sa_malloc_at((bytes), SA_SITE)
void sa_free(void *memory);

/* *product = a b; false when it does not fit. sa_add likewise. */
bool sa_mul(size_t a, size_t b, size_t *product);
bool sa_add(size_t a, size_t b, size_t *sum);

/* Array of count items of size bytes; NULL when the product wraps or there is no memory. */
#define sa_malloc_array(count, size) sa_malloc_array_at((count), (size), SA_SITE)

/* Where in the sources a call stands: its name when tests ask which allocations have failed. */
#define SA_SITE __FILE__ ":" SA_SITE_TEXT(__LINE__)
#define SA_SITE_TEXT(line) SA_SITE_WORD(line)
#define SA_SITE_WORD(line) #line
void *sa_malloc_at(size_t bytes, const char *site);
void *sa_malloc_array_at(size_t count, size_t size, const char *site);

int64_t sa_live_bytes(void); /* bytes held now, whole process      */
int64_t sa_peak_bytes(void); /* largest value since the last reset */
void sa_peak_reset(void);    /* peak = live                        */

/* For tests; always compiled, a relaxed load per allocation each. */
void sa_poison_set(bool on);   /* fill new and freed memory, fence blocks with red zones         */
int64_t sa_breaches(void);     /* red zones found overwritten; 0 unless the library has a bug    */
void sa_fail_set(int64_t nth); /* the nth next sa_malloc fails (1 = the next); 0 switches it off */
const char *sa_failed_site(int n); /* the n-th site that sa_fail_set let fail; NULL: no more     */

/* A bump allocator over one block. While poisoning is on (or under AddressSanitizer, which then
 * reports the very access) a red zone follows each piece. */
typedef struct {
    unsigned char *base;
    size_t size, used;
    size_t fence; /* end of the last red zone, 0: none */
    bool fenced;  /* red zones stand between pieces    */
} sa_arena;

/* Makes the arena empty, with room for pieces of `bytes` in all; up to 64 pieces are rounded up to
 * SA_ALIGN and fenced on top of that. Keeps a block that is large enough. false: no memory. */
bool sa_arena_reserve(sa_arena *arena, size_t bytes);
void *sa_arena_take(sa_arena *arena, size_t bytes); /* 64-byte aligned; NULL when it does not fit */
/* The same for count items of size bytes; NULL also when the product wraps. */
void *sa_arena_take_array(sa_arena *arena, size_t count, size_t size);
/* Gives back what was taken since arena->used was `used`, and checks its red zones. */
void sa_arena_back(sa_arena *arena, size_t used);
void sa_arena_reset(sa_arena *arena); /* all pieces back */
void sa_arena_free(sa_arena *arena);

#endif
