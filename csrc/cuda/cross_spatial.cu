// Entries of cross_spatial in evaluation: which kernel, on which grid. The kernels and what they
// compute are in cross_spatial.cuh.
#include "cross_spatial.cuh"
#include "launch.cuh"

namespace ciema {
namespace {

using namespace cross_spatial;

constexpr int kSharedLimit = 99 * 1024;  // of a block on sm_86, 89 and 120
constexpr int kWidestTile = 64;

// ---- tiles and bands -------------------------------------------------------------------------

struct Tiling {
  int rows, columns, e_pitch, x_pitch, bands, tiles_of_band;
};

template <class N>
int tile_bytes(const Tiling& t) {
  constexpr int kBytes = static_cast<int>(sizeof(typename N::T));
  return ((t.rows + 2 * kHaloE) * t.e_pitch + (t.rows + 2 * kHaloX) * t.x_pitch) * kBytes;
}

template <class N>
Tiling tiling_of(int rows, int columns) {
  constexpr int kBytes = static_cast<int>(sizeof(typename N::T));
  return {rows, columns, row_pitch(columns, kHaloE, N::kPitch, kBytes),
          row_pitch(columns, kHaloX, N::kPitch, kBytes), 1, 1};
}

// Time of a tile, in products c×c of a piece: rounds of the warps, 9 a piece of x2 and 48 a piece of
// y, and what loading and barriers take.
template <class N>
int64_t cost_of_tile(int rows, int columns) {
  const int of_x2 = parts((rows + 2 * kHaloX) * ((columns + 2 * kHaloX + 7) / 8 * 8), N::kPixels);
  const int of_y = 2 * parts(rows * columns, N::kPixels);
  const int loading = (rows + 2 * kHaloE) * (parts(columns + 2 * kHaloE, 8) + 1) / 8;  // in packs
  return 9 * parts(of_x2, kWarps) + 48 * parts(of_y, kWarps) + loading + 4;
}

// The tile of least time for the map among those that fit.
template <class N>
Tiling choose_tile(int height, int width, int room) {
  Tiling best = tiling_of<N>(1, 1);
  int64_t least = INT64_MAX;
  const int widest = width < kWidestTile ? width : kWidestTile;
  for (int columns = widest; columns > 0; columns = columns > 8 ? (columns - 1) / 8 * 8 : 0) {
    for (int rows = 1; rows <= height; ++rows) {
      const Tiling tile = tiling_of<N>(rows, columns);
      if (tile_bytes<N>(tile) > room) break;
      const int64_t tiles = static_cast<int64_t>(parts(height, rows)) * parts(width, columns);
      const int64_t cost = tiles * cost_of_tile<N>(rows, columns);
      if (cost < least) {
        least = cost;
        best = tile;
      }
    }
  }
  return best;
}

// Bands of a slab so that the last wave of blocks has the fewest tiles to wait for.
void choose_bands(Tiling& t, int64_t tiles, int64_t slabs, int64_t most, int64_t multiprocessors) {
  int64_t least = INT64_MAX;
  for (int64_t bands = 1; bands <= most && bands <= tiles; ++bands) {
    const int64_t each = blocks(tiles, bands), used = blocks(tiles, each);
    const int64_t cost = blocks(slabs * used, multiprocessors) * (4 * each + 1);  // 1: its start
    if (cost < least) {
      least = cost;
      t.bands = static_cast<int>(used);
      t.tiles_of_band = static_cast<int>(each);
    }
  }
}

// ---- entries ---------------------------------------------------------------------------------

template <class T>
CrossSpatialParams params_of(const Arguments& a) {
  CrossSpatialParams p{};
  p.e = a.pointer<const void>("e");
  p.alpha_h = a.pointer<const float>("alpha_h");
  p.alpha_w = a.pointer<const float>("alpha_w");
  p.mean = a.pointer<const float>("mean");
  p.rstd = a.pointer<const float>("rstd");
  p.packed = a.pointer<const void>("packed");
  p.vectors = a.pointer<const float>("vectors");
  p.y = a.pointer<void>("y");
  p.partial = a.pointer<float>("partial");
  p.counters = a.pointer<int>("counters");
  p.w = a.pointer<void>("w");
  p.softmax1 = a.pointer<float>("softmax1");
  p.softmax2 = a.pointer<float>("softmax2");
  p.stride_b = a.integer("e_stride_b");
  p.stride_c = a.integer("e_stride_c");
  p.stride_s = a.integer("e_stride_s");
  p.groups = static_cast<int>(a.integer("groups"));
  p.channels = static_cast<int>(a.integer("group_channels"));
  p.height = static_cast<int>(a.integer("height"));
  p.width = static_cast<int>(a.integer("width"));
  p.channels_last = a.integer("e_channels_last") != 0;
  const int run = p.channels_last ? p.channels : p.width;
  const auto* e = static_cast<const T*>(p.e);
  p.vectors_fit = run % Vector<T>::kElements == 0 && is_aligned(e, p.stride_b) &&
                  is_aligned(e, p.channels_last ? p.stride_s : p.stride_c);
  return p;
}

template <class N>
void launch_forward(const Arguments& a) {
  CrossSpatialParams p = params_of<typename N::T>(a);
  const int64_t slabs = a.integer("slabs");
  constexpr int kSums = kWarps * 2 * N::kChannels * static_cast<int>(sizeof(float));
  constexpr int kReserved = 64;  // arrive_last, alignment
  Tiling t = choose_tile<N>(p.height, p.width, kSharedLimit - kSums - kReserved);
  const int64_t tiles =
      static_cast<int64_t>(parts(p.height, t.rows)) * parts(p.width, t.columns);
  choose_bands(t, tiles, slabs, a.integer("most_bands"), a.integer("multiprocessors"));
  p.rows = t.rows;
  p.columns = t.columns;
  p.e_pitch = t.e_pitch;
  p.x_pitch = t.x_pitch;
  p.bands = t.bands;
  p.tiles_of_band = t.tiles_of_band;
  launch(a, "cross_spatial", dim3(grid_size(slabs), grid_size(t.bands, kGridY)), dim3(kThreads),
         tile_bytes<N>(t), forward_kernel<N>, p);
}

// Calls function(Network) for the width of a group, padded, and float32's precision. float32 has no
// network of 16 channels, and none of 64 in tf32: they would be compiled for little use.
template <class T, class Function>
void with_network(const Arguments& a, Function function) {
  const int64_t padded = a.integer("padded");
  if constexpr (sizeof(T) == 2) {
    if (padded == 16) return function(Network<T, Precision::kSplit, 16>{});
  } else {
    if (a.integer("tf32") != 0) return function(Network<T, Precision::kTf32, 32>{});
  }
  if (padded == 32) return function(Network<T, Precision::kSplit, 32>{});
  function(Network<T, Precision::kSplit, 64>{});
}

template <class T>
void forward(const Arguments& a) {
  with_network<T>(a, [&](auto network) { launch_forward<decltype(network)>(a); });
}

const Entry kEntries[] = {
    {"cross_spatial_float32", forward<float>},
    {"cross_spatial_bfloat16", forward<__nv_bfloat16>},
    {"cross_spatial_float16", forward<__half>},
};

}  // namespace
}  // namespace ciema
