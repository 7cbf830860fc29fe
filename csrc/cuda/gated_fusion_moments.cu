// The products of gated fusion that leave moments or sums of their tiles. What they compute is in
// gated_fusion.cuh.
#include "gated_fusion_entries.cuh"

namespace ciema {
namespace {

using namespace gated_fusion;

template <class T>
void moments_entry(const Arguments& a) {
  product_entry<T, product::Reduction::kMoments>(a, "gated_fusion_moments");
}

template <class T>
void sums_entry(const Arguments& a) {
  product_entry<T, product::Reduction::kSums>(a, "gated_fusion_sums");
}

const Entry kEntries[] = {
    {"gated_fusion_moments_float32", moments_entry<float>},
    {"gated_fusion_moments_float16", moments_entry<__half>},
    {"gated_fusion_moments_bfloat16", moments_entry<__nv_bfloat16>},
    {"gated_fusion_sums_float32", sums_entry<float>},
    {"gated_fusion_sums_float16", sums_entry<__half>},
    {"gated_fusion_sums_bfloat16", sums_entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
