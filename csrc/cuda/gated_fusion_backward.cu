// Entries of gated fusion's backward through its weights, and to e and w. What they compute is in
// gated_fusion_backward.cuh.
#include "gated_fusion_backward.cuh"

#include <initializer_list>

#include "gated_fusion_entries.cuh"

namespace ciema {
namespace {

using namespace gated_fusion;

template <class T>
bool weights_are_float(const Arguments& a) {
  return sizeof(T) == sizeof(float) || a.integer("weight_is_float") != 0;
}

template <class T>
void matrices_entry(const Arguments& a) {
  const MatricesParams p = {a.pointer<const void>("fusion"),
                            a.pointer<const void>("expand"),
                            a.pointer<const void>("squeeze"),
                            weights_are_float<T>(a),
                            norm_of(a, "2"),
                            norm_of(a, "3"),
                            a.pointer<const float>("by_maps"),
                            a.pointer<const float>("squares"),
                            a.pointer<const float>("grad_bias"),
                            a.pointer<void>("grad_fusion"),
                            a.pointer<float>("of_expand"),
                            a.pointer<float>("of_squares"),
                            a.pointer<void>("to_hidden"),
                            a.pointer<void>("to_s"),
                            number(a, "channels"),
                            number(a, "squeezed"),
                            a.integer("training") != 0};
  launch(a, "gated_fusion_matrices", dim3(grid_size(p.blocks())), dim3(kMatrixThreads), 0,
         matrices_kernel<T>, p);
}

template <class T>
void rows_entry(const Arguments& a) {
  const RowsParams p = {a.pointer<const void>("fusion"),
                        a.pointer<const void>("expand"),
                        weights_are_float<T>(a),
                        norm_of(a, "2"),
                        norm_of(a, "3"),
                        a.pointer<const float>("of_expand"),
                        a.pointer<const float>("of_squares"),
                        a.pointer<const float>("sum_r"),
                        a.pointer<const float>("grad_bias3"),
                        a.pointer<float>("grad_weight"),
                        a.pointer<float>("grad_bias"),
                        a.pointer<void>("grad_expand"),
                        a.pointer<float>("slope"),
                        number(a, "channels"),
                        number(a, "squeezed"),
                        count_of(a),
                        a.integer("training") != 0};
  launch(a, "gated_fusion_rows", dim3(grid_size(blocks(p.channels, kWarps))), dim3(kThreads), 0,
         rows_kernel<T>, p);
}

template <class T>
void statistics_entry(const Arguments& a) {
  const StatisticsParams p = {a.pointer<const void>("expand"), weights_are_float<T>(a),
                              norm_of(a, "2"),                 a.pointer<const float>("slope"),
                              a.pointer<void>("of_r"),         a.pointer<float>("shift"),
                              number(a, "channels"),           number(a, "squeezed")};
  const int64_t tiles = matrix::tiles(p.squeezed);
  launch(a, "gated_fusion_statistics",
         dim3(grid_size(tiles * tiles + blocks(p.squeezed, kWarp))), dim3(kMatrixThreads), 0,
         statistics_kernel<T>, p);
}

// grad_e and grad_w
template <class T>
void input_entry(const Arguments& a) {
  with_layout(a, [&]<Layout kLayout>() {
    constexpr bool kRows = kLayout == Layout::kRows;
    constexpr int kRun = Vector<T>::kElements;
    InputParams p = {product::map_of<T>(a, "grad_out", kLayout),
                     product::map_of<T>(a, "e", kLayout),
                     product::map_of<T>(a, "w", kLayout),
                     product::map_of<T>(a, "logits", kLayout),
                     product::map_of<T>(a, "of_s", kLayout),
                     product::map_of<T>(a, "grad_e", kLayout),
                     product::map_of<T>(a, "grad_w", kLayout),
                     a.pointer<const float>("affine"),
                     false,
                     number(a, "channels"),
                     number(a, "batch"),
                     number(a, "groups"),
                     number(a, "group_channels"),
                     number(a, "pixels")};
    // Runs begin where groups do.
    const bool whole = kRows || p.group_channels % kRun == 0;
    for (Map* map : {&p.grad_out, &p.e, &p.logits, &p.of_s, &p.grad_e}) {
      if (!whole) map->alignment = static_cast<int>(sizeof(T));
    }
    p.affine_aligned = whole && is_aligned(p.affine, p.channels);
    const int64_t threads =
        int64_t{p.batch} * p.groups * blocks(p.pixels, kRows ? kRun : 1);
    launch(a, "gated_fusion_input", dim3(grid_size(blocks(threads, kInputThreads))),
           dim3(kInputThreads), 0, input_kernel<T, kLayout>, p);
  });
}

const Entry kEntries[] = {
    {"gated_fusion_matrices_float32", matrices_entry<float>},
    {"gated_fusion_matrices_float16", matrices_entry<__half>},
    {"gated_fusion_matrices_bfloat16", matrices_entry<__nv_bfloat16>},
    {"gated_fusion_rows_float32", rows_entry<float>},
    {"gated_fusion_rows_float16", rows_entry<__half>},
    {"gated_fusion_rows_bfloat16", rows_entry<__nv_bfloat16>},
    {"gated_fusion_statistics_float32", statistics_entry<float>},
    {"gated_fusion_statistics_float16", statistics_entry<__half>},
    {"gated_fusion_statistics_bfloat16", statistics_entry<__nv_bfloat16>},
    {"gated_fusion_input_float32", input_entry<float>},
    {"gated_fusion_input_float16", input_entry<__half>},
    {"gated_fusion_input_bfloat16", input_entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
