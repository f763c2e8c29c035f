/* threads_unplaced.h - where threads run is the system's choice: all systems but Linux. For
 * threads.c alone. */
#ifndef SA_THREADS_UNPLACED_H
#define SA_THREADS_UNPLACED_H

#include <stdbool.h>

typedef struct {
    bool placed;
} placement;

static void
place_self(placement *p)
{
    (void)p;
}

static void
place_elsewhere(placement *p)
{
    (void)p;
}

static void
place_free(placement *p)
{
    (void)p;
}

#endif
