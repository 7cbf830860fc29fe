// What may be compiled here, and the rule for files of one instruction set: no C++ or torch header in
// them. An inline function compiled with AVX-512 could be the copy that the linker keeps for
// everybody (one-definition rule).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define CIEMA_X86_SIMD 1
#endif
