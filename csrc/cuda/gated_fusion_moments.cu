// The products of gated fusion that leave moments or sums of their tiles. What they compute is in
// gated_fusion.cuh.
#include "gated_fusion_entries.cuh"

namespace ciema {
namespace {

using namespace gated_fusion;

template <class T>
void entry(const Arguments& a) {
  product_entry<T, product::Reduction::kMomentsOrProducts>(a, "gated_fusion_moments");
}

const Entry kEntries[] = {
    {"gated_fusion_moments_float32", entry<float>},
    {"gated_fusion_moments_float16", entry<__half>},
    {"gated_fusion_moments_bfloat16", entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
