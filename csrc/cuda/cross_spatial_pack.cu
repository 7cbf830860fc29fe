// Entries that pack cross_spatial's weights in a launch of their own.
#include "cross_spatial_pack_arguments.cuh"

namespace ciema {
namespace {

using namespace cross_spatial;

template <class T>
void pack(const Arguments& a, const char* name, const CrossSpatialPackParams& p, int blocks) {
  launch(a, name, dim3(blocks), dim3(kPackThreads), pack_bytes<T>(p.padded), pack_kernel<T>, p);
}

template <class T>
void evaluation(const Arguments& a) {
  pack<T>(a, "cross_spatial_pack", pack_params_of(a, false), kTiles + 1);
}

template <class T>
void training(const Arguments& a) {
  const bool backward = a.integer("backward") != 0;
  pack<T>(a, "cross_spatial_training_pack", pack_params_of(a, true),
          kTiles + 1 + (backward ? kTiles : 0));
}

const Entry kEntries[] = {
    {"cross_spatial_pack_float32", evaluation<float>},
    {"cross_spatial_pack_float16", evaluation<__half>},
    {"cross_spatial_pack_bfloat16", evaluation<__nv_bfloat16>},
    {"cross_spatial_training_pack_float32", training<float>},
    {"cross_spatial_training_pack_float16", training<__half>},
    {"cross_spatial_training_pack_bfloat16", training<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
