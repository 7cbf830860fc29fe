// The products of gated fusion that leave no sums behind, and the folding of its weights. What they
// compute is in gated_fusion.cuh.
#include "gated_fusion_entries.cuh"

namespace ciema {
namespace {

using namespace gated_fusion;

template <class T>
void entry(const Arguments& a) {
  product_entry<T, product::Reduction::kNone>(a, "gated_fusion_product");
}

const Entry kEntries[] = {
    {"gated_fusion_product_float32", entry<float>},
    {"gated_fusion_product_float16", entry<__half>},
    {"gated_fusion_product_bfloat16", entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
