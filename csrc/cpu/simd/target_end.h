// Ends what avx512.h, avx2.h or portable.h began.
}  // namespace
}  // namespace ciema::cpu

#ifdef CIEMA_X86_SIMD
#ifdef CIEMA_TARGET
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
