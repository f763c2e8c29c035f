/* library_windows.h - opening a shared library on Windows; library_os.h on all other systems. For
 * gemm_blas.c alone. */
#ifndef SA_LIBRARY_WINDOWS_H
#define SA_LIBRARY_WINDOWS_H

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/windows_lean.h"

static int
process_id(void)
{
    return (int)GetCurrentProcessId();
}

static void
yield(void)
{
    (void)SwitchToThread();
}

/* UTF-8, as Python's file names are, with either slash. Returns whether it names a folder; -1 when
 * it is no path. */
static int
widen(const char *path, wchar_t *wide, int room)
{
    int folders = 0;
    if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, room) == 0) {
        return -1;
    }
    for (wchar_t *at = wide; *at != L'\0'; at++) {
        *at = *at == L'/' ? L'\\' : *at;
        folders += *at == L'\\';
    }
    return folders > 0;
}

/* OpenBLAS at this path, told to start no threads. NULL: `words` says why.
 *
 * It takes the size of its thread server from the environment while it loads, and asks the system
 * for it, not its C runtime; so the variable is set meanwhile. The system's readers and writers of
 * the environment wait for each other. A bare name is looked for where extension modules may find
 * libraries: not in PATH, and not in the current folder. */
static void *
open_blas(const char *path, char *words, size_t room)
{
    static const char variable[] = "OPENBLAS_NUM_THREADS";
    static wchar_t wide[4096];
    char kept[64];
    const int whole = widen(path, wide, sizeof wide / sizeof *wide);
    if (whole < 0) {
        snprintf(words, room, "tiles (%.400s is no path in UTF-8)", path);
        return NULL;
    }
    const DWORD flags =
        LOAD_LIBRARY_SEARCH_DEFAULT_DIRS | (whole ? LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR : 0);
    const DWORD length = GetEnvironmentVariableA(variable, kept, sizeof kept);
    SetEnvironmentVariableA(variable, "1");
    HMODULE const library = LoadLibraryExW(wide, NULL, flags);
    const DWORD error = GetLastError();
    SetEnvironmentVariableA(variable, length > 0 && length < sizeof kept ? kept : NULL);
    if (library == NULL) {
        snprintf(words, room, "tiles (%.400s: error %lu of Windows)", path, (unsigned long)error);
    }
    return library;
}

/* Copied as bytes: C has no conversion from a function to an object pointer. */
static void *
find_symbol(void *library, const char *name)
{
    const FARPROC function = GetProcAddress(library, name);
    void *symbol;
    memcpy(&symbol, &function, sizeof symbol);
    return symbol;
}

#endif
