/* cpus_os.h - the CPUs that the system lets this process run on. For num_threads.c alone, first. */
#ifndef SA_CPUS_OS_H
#define SA_CPUS_OS_H

#ifdef _WIN32
#include "base/windows_lean.h"

static int
cpus_of_process(void)
{
    DWORD_PTR allowed = 0, present = 0;
    if (GetProcessAffinityMask(GetCurrentProcess(), &allowed, &present) && allowed != 0) {
        return __builtin_popcountll(allowed);
    }
    const DWORD all = GetActiveProcessorCount(ALL_PROCESSOR_GROUPS); /* a mask holds one group */
    return all > 0 ? (int)all : 1;
}

#else
#define _GNU_SOURCE /* sched_getaffinity */
#include <limits.h>
#include <sched.h>
#include <unistd.h>

static int
cpus_of_process(void)
{
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        return CPU_COUNT(&allowed);
    }
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)(online < INT_MAX ? online : INT_MAX) : 1;
}

#endif
#endif
