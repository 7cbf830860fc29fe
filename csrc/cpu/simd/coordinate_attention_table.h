// The stage coordinate_attention for one instruction set. Included inside its namespace.

#include "slab_products_body.h"
#include "winograd_body.h"
#include "slab_frame_body.h"
#include "slab_tiles_body.h"
#include "slab_rows_body.h"
#include "slab_gradients_body.h"
#include "coordinate_attention_body.h"
#include "coordinate_attention_backward_body.h"

inline int64_t scratch_size(const CoordinateShape& shape) {
  const Frame f(shape.channels, shape.height, shape.width);
  return f.size() + 2 * Gates::size(f);
}

inline void run_slab(const CoordinateShape& shape, const float* packed, double eps,
                     const CoordinateSlab& slab, float* scratch) {
  const Frame f(shape.channels, shape.height, shape.width);
  const Gates pooled(f, scratch + f.size());
  const Gates gates(f, scratch + f.size() + Gates::size(f));
  pack_map(slab.map, f, scratch);
  coordinate_gates(f, scratch, packed, eps, pooled, gates);
  to_channel_major(f, gates.rows, f.height, slab.alpha_h);
  to_channel_major(f, gates.columns, f.width, slab.alpha_w);
  to_channel_major(f, gates.mean, 1, slab.mean);
  to_channel_major(f, gates.rstd, 1, slab.rstd);
}

constexpr CoordinateAttention kTable = {packed_gate_size,   pack_gate,
                                        scratch_size,       run_slab,
                                        pack_gate_backward, backward_scratch_size,
                                        run_backward};
