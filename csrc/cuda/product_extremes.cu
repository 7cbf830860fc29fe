// Entry of the channel statistics of a product's results.
#include "product_extremes.cuh"

#include "launch.cuh"

namespace ciema {
namespace {

void extremes_entry(const Arguments& a) {
  product::ExtremesParams p{};
  p.extremes = a.pointer<const float>("extremes");
  p.positions = a.pointer<const int>("positions");
  p.mean = a.pointer<float>("mean");
  p.maximum = a.pointer<float>("maximum");
  p.argmax = a.pointer<int64_t>("argmax");
  p.tiles = static_cast<int>(a.integer("tiles"));
  p.rows = static_cast<int>(a.integer("rows"));
  p.pixels = static_cast<int>(a.integer("pixels"));
  const dim3 grid(grid_size(blocks(p.rows, kWarp)), grid_size(a.integer("batch"), kGridY));
  launch(a, "product_extremes", grid, dim3(product::kExtremesThreads), 0,
         product::extremes_kernel<product::kExtremesThreads>, p);
}

const Entry kEntries[] = {{"product_extremes_float32", extremes_entry}};

}  // namespace
}  // namespace ciema
