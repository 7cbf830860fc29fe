#include "products.h"

#include "portable.h"

// 4 sums, of two registers each with SSE or NEON.
constexpr int kPanelRows = 4, kPanelVectors = 1;

#include "products_body.h"

#include "strassen_body.h"

#include "products_epilogue_body.h"

#include "products_gradient_body.h"

constexpr Products kTable = table_of_floats();

#include "target_end.h"

const ciema::cpu::Products ciema::cpu::kPortableProducts = ciema::cpu::kTable;
