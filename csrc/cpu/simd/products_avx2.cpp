#include "products.h"

#ifdef CIEMA_X86_SIMD
#include "avx2.h"

// 12 sums, 3 vectors of pixels and one of weights: all 16 registers.
constexpr int kPanelRows = 4, kPanelVectors = 3;

#include "products_body.h"

#include "strassen_body.h"

#include "products_epilogue_body.h"

#include "products_gradient_body.h"

constexpr Products kTable = table_of_floats();

#include "target_end.h"

const ciema::cpu::Products ciema::cpu::kAvx2Products = ciema::cpu::kTable;
#endif
