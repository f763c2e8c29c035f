/* status.h - codes that say how a call ended, and the one function that words an error. */
#ifndef SA_STATUS_H
#define SA_STATUS_H

typedef enum {
    SA_OK = 0,
    SA_EINVAL,   /* a value is wrong: ValueError                             */
    SA_ETYPE,    /* a dtype is wrong: TypeError                              */
    SA_ENOMEM,   /* no memory: MemoryError; no output was written            */
    SA_ESTOP,    /* poll() asked to stop; Python has already set an exception */
    SA_EINTERNAL /* cannot happen: RuntimeError                              */
} sa_status;

struct sa_ctx;

/* The formats that printf understands: MinGW takes `printf` for those of Microsoft. */
#ifdef __MINGW32__
#define SA_PRINTF gnu_printf
#else
#define SA_PRINTF printf
#endif

/* Words a sentence in ctx like printf (the first one wins, any thread may call); returns code. */
sa_status sa_fail(struct sa_ctx *ctx, sa_status code, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(SA_PRINTF, 3, 4)))
#endif
    ;

#endif
