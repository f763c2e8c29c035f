/* target_base.h - the baseline of the compiler's own target: nothing is pushed. */
#define SA_TARGET_PUSHED 0
