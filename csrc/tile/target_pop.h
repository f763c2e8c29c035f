/* target_pop.h - closes the region that target_*.h opened. */
#if SA_TARGET_PUSHED
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
