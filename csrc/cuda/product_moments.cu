// Entry of the batch statistics of a product's results.
#include "product_moments.cuh"

#include "launch.cuh"

namespace ciema {
namespace {

void moments_entry(const Arguments& a) {
  product::MomentsParams p{};
  p.partials = a.pointer<const float>("partials");
  p.mean = a.pointer<float>("mean");
  p.var = a.pointer<float>("var");
  p.parts = static_cast<int>(a.integer("parts"));
  p.rows = static_cast<int>(a.integer("rows"));
  p.pixels = static_cast<int>(a.integer("pixels"));
  p.tile_pixels = static_cast<int>(a.integer("tile_pixels"));
  launch(a, "product_moments", dim3(grid_size(blocks(p.rows, kWarp))),
         dim3(product::kMomentsThreads), 0, product::moments_kernel, p);
}

const Entry kEntries[] = {{"product_moments_float32", moments_entry}};

}  // namespace
}  // namespace ciema
