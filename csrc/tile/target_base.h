/* target_base.h - the baseline of the compiler's own target: nothing is pushed. */
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#include <arm_neon.h>
#define SA_HAVE_NEON 1 /* asked for where vec.h needs an instruction that C has no word for */
#endif
#define SA_TARGET_PUSHED 0
