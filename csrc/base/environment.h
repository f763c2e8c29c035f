/* environment.h - what a variable of the environment holds. */
#ifndef SA_ENVIRONMENT_H
#define SA_ENVIRONMENT_H

enum { SA_VALUE_MAX = 256 };

#ifdef _WIN32
#include "base/windows_lean.h"

/* NULL: not set, or no value of ours. Each C runtime copies the environment when it loads, so that
 * of Python may have been told what ours never hears; both hand on to the system, which is asked
 * here. `room` takes the value. */
static inline const char *
sa_environment(const char *variable, char room[SA_VALUE_MAX])
{
    const DWORD length = GetEnvironmentVariableA(variable, room, SA_VALUE_MAX);
    return length > 0 && length < SA_VALUE_MAX ? room : NULL;
}

#else
#include <stdlib.h>

static inline const char *
sa_environment(const char *variable, char room[SA_VALUE_MAX])
{
    (void)room;
    return getenv(variable);
}

#endif
#endif
