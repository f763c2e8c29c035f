/* windows_lean.h - <windows.h> without the macros that fall upon other people's names. */
#ifndef SA_WINDOWS_LEAN_H
#define SA_WINDOWS_LEAN_H

#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#endif
