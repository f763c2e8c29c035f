/* threads_windows.h - what the pool asks of Windows; threads_os.h of all other systems. For
 * threads.c alone. */
#ifndef SA_THREADS_WINDOWS_H
#define SA_THREADS_WINDOWS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/threads_unplaced.h"
#include "base/windows_lean.h"

/* ---- threads ---- */

typedef DWORD thread_end;

/* Windows sends no signal to a thread: Ctrl-C comes on one of its own. */
static bool
start_thread(thread_end (*run)(void *), void *arg, size_t stack_bytes)
{
    HANDLE thread =
        CreateThread(NULL, stack_bytes, run, arg, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    return thread != NULL && CloseHandle(thread);
}

static void
yield(void)
{
    (void)SwitchToThread();
}

/* ---- arithmetic ----
 *
 * exp and log of MinGW's own library work on the x87 stack, as precisely as the thread's control
 * word says: 53 bits in threads of Windows, 64 where a program of MinGW began. So that the last
 * bits of a result do not depend on who took the task, all tasks run with 64.
 */

typedef unsigned short arithmetic;

static arithmetic
arithmetic_begin(void)
{
    const arithmetic ours = 0x037F;
    arithmetic before;
    __asm__ volatile("fnstcw %0" : "=m"(before));
    __asm__ volatile("fldcw %0" : : "m"(ours));
    return before;
}

static void
arithmetic_end(arithmetic before)
{
    __asm__ volatile("fldcw %0" : : "m"(before));
}

/* ---- sleeping and waking ---- */

/* Sleeps while *word == seen, at most ns (0: without limit). May return early. */
static void
park(atomic_uint *word, unsigned seen, int64_t ns)
{
    const DWORD limit = ns > 0 ? (DWORD)((ns + 999999) / 1000000) : INFINITE;
    (void)WaitOnAddress(word, &seen, sizeof seen, limit);
}

static void
unpark(atomic_uint *word)
{
    WakeByAddressSingle(word);
}

static void
relax(void)
{
    YieldProcessor();
}

/* ---- no process is a copy of another ---- */

static void
park_reset(void)
{
}

static void
mark_process(void)
{
}

static void
watch_forks(void (*in_child)(void))
{
    (void)in_child;
}

static bool
is_copy(void)
{
    return false;
}

#endif
