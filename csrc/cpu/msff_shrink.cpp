// Back through msff's bilinear resizing: what each pixel of a small map gave to the pixels of the
// target, it gets back.
//
//   out[b, c, q] = sum_p share of q in p * grad[b, c, p]
//
// Layouts  as in products.cpp; out has the memory format of grad.
// Threads  over samples and vectors of channels; columns are summed before rows, each sum by one thread.
// Bytes    reads grad once, writes out once; in between lines of float32 wait in the cache.
#include <cmath>

#include "msff.h"
#include "products.h"
#include "resize.h"

namespace ciema::cpu {
namespace {

// The sums of one axis; `view` points into it.
struct Sums {
  Sums(int64_t target, int64_t size) : from_size(target), first(size), count(size), start(size) {
    std::vector<std::vector<float>> shares(size);
    for (int64_t i = 0; i < target; ++i) {
      const Between place(i, target, size);
      const auto add = [&](int64_t q, double share) {
        if (shares[q].empty()) first[q] = static_cast<int32_t>(i);
        shares[q].resize(i - first[q] + 1);
        shares[q].back() += static_cast<float>(share);
      };
      add(place.low, 1.0 - place.share);
      add(place.high, place.share);
    }
    for (int64_t q = 0; q < size; ++q) {
      start[q] = static_cast<int32_t>(weights.size());
      count[q] = static_cast<int32_t>(shares[q].size());
      weights.insert(weights.end(), shares[q].begin(), shares[q].end());
    }
  }

  Axis view() const {
    return {from_size,    static_cast<int64_t>(first.size()), first.data(), count.data(),
            start.data(), weights.data()};
  }

  int64_t from_size;
  std::vector<int32_t> first, count, start;
  std::vector<float> weights;
};

}  // namespace

Tensor msff_shrink(Tensor grad, int64_t height, int64_t width) {
  check_x(grad);
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= grad.size(2) && width <= grad.size(3),
                  "the small map must have 1 to ", grad.size(2), " rows and 1 to ", grad.size(3),
                  " columns, got ", height, " and ", width);
  const Map map(grad);
  Map out(empty_map(grad, map.channels(), height, width));
  const Sums rows(grad.size(2), height), columns(grad.size(3), width);
  const int64_t lanes = products().lanes;
  const int64_t strips = (map.channels() + lanes - 1) / lanes;
  const int64_t vectors = grad.size(3) + lanes + grad.size(2) * width;
  torch::stable::parallel_for(0, map.batch() * strips, 1, [&](int64_t first, int64_t last) {
    const Scratch scratch = make_scratch(vectors * lanes);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / strips, channel = i % strips * lanes;
      const int channels = static_cast<int>(std::min(lanes, map.channels() - channel));
      products().shrink[map.element()](map.at(b, channel, 0), channels, rows.view(),
                                       columns.view(), scratch.get(),
                                       out.mutable_at(b, channel, 0));
    }
  });
  return out.tensor();
}

}  // namespace ciema::cpu
