#include "products.h"

#ifdef CIEMA_X86_SIMD
#include "avx512.h"

// 24 sums, 3 vectors of pixels and one of weights: 28 of 32 registers.
constexpr int kPanelRows = 8, kPanelVectors = 3;

#include "products_body.h"

#include "strassen_body.h"

#include "products_epilogue_body.h"

#include "products_gradient_body.h"

constexpr Products kTable = table_of_floats();

#include "target_end.h"

const ciema::cpu::Products ciema::cpu::kAvx512Products = ciema::cpu::kTable;
#endif
