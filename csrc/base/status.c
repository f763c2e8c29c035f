/* status.c - the one function that words an error. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

#include "base/ctx.h"

sa_status
sa_fail(sa_ctx *ctx, sa_status code, const char *format, ...)
{
    /* Read after the region has ended, which orders the writes of all its threads before. */
    if (ctx != NULL && atomic_exchange(&ctx->failed, 1) == 0) {
        va_list args;
        va_start(args, format);
        vsnprintf(ctx->message, sizeof ctx->message, format, args);
        va_end(args);
        ctx->code = code;
    }
    return code;
}
