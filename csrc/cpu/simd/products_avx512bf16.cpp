#include "products.h"

#ifdef CIEMA_X86_SIMD
#define CIEMA_AVX512_BF16 1
#include "avx512.h"

constexpr int kPanelRows = 8, kPanelVectors = 3;  // as in products_avx512.cpp

#include "products_body.h"

#include "strassen_body.h"

#include "products_pairs_body.h"

#include "products_epilogue_body.h"

#include "products_gradient_body.h"

constexpr Products table_with_pairs() {
  Products table = table_of_floats();
  add_words<Pairs>(&table, Words::kBFloat16Pairs);
  return table;
}
constexpr Products kTable = table_with_pairs();

#include "target_end.h"

const ciema::cpu::Products ciema::cpu::kAvx512bf16Products = ciema::cpu::kTable;
#endif
