// The CPU kernels under their schemas, which fused/backends/native.py defines.
#include <torch/csrc/stable/library.h>

#include "cpu/channel_interaction.h"
#include "cpu/channel_statistics.h"
#include "cpu/coordinate_attention.h"
#include "cpu/cross_spatial.h"
#include "cpu/cross_spatial_training.h"
#include "cpu/gated_fusion.h"
#include "cpu/msff.h"
#include "cpu/product_gradient.h"
#include "cpu/products.h"
#include "cpu/products_training.h"
#include "cpu/separable.h"

STABLE_TORCH_LIBRARY_IMPL(ciema_native, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&ciema::cpu::channel_statistics));
  m.impl("channel_statistics_backward", TORCH_BOX(&ciema::cpu::channel_statistics_backward));
  m.impl("coordinate_attention_pack", TORCH_BOX(&ciema::cpu::coordinate_attention_pack));
  m.impl("coordinate_attention_packed", TORCH_BOX(&ciema::cpu::coordinate_attention_packed));
  m.impl("coordinate_attention_backward",
         TORCH_BOX(&ciema::cpu::coordinate_attention_backward));
  m.impl("cross_spatial_pack", TORCH_BOX(&ciema::cpu::cross_spatial_pack));
  m.impl("cross_spatial_packed", TORCH_BOX(&ciema::cpu::cross_spatial_packed));
  m.impl("coordinate_cross_spatial_packed",
         TORCH_BOX(&ciema::cpu::coordinate_cross_spatial_packed));
  m.impl("cross_spatial_train", TORCH_BOX(&ciema::cpu::cross_spatial_train));
  m.impl("cross_spatial_backward", TORCH_BOX(&ciema::cpu::cross_spatial_backward));
  m.impl("pack_product_weight", TORCH_BOX(&ciema::cpu::pack_product_weight));
  m.impl("product_gradient", TORCH_BOX(&ciema::cpu::product_gradient));
  m.impl("pointwise_packed", TORCH_BOX(&ciema::cpu::pointwise_packed));
  m.impl("channel_interaction_packed", TORCH_BOX(&ciema::cpu::channel_interaction_packed));
  m.impl("gated_fusion_packed", TORCH_BOX(&ciema::cpu::gated_fusion_packed));
  m.impl("product_moments", TORCH_BOX(&ciema::cpu::product_moments));
  m.impl("norm_relu", TORCH_BOX(&ciema::cpu::norm_relu));
  m.impl("norm_relu_backward", TORCH_BOX(&ciema::cpu::norm_relu_backward));
  m.impl("norm_gate_backward", TORCH_BOX(&ciema::cpu::norm_gate_backward));
  m.impl("channel_interaction_input_backward",
         TORCH_BOX(&ciema::cpu::channel_interaction_input_backward));
  m.impl("gated_fusion_apply", TORCH_BOX(&ciema::cpu::gated_fusion_apply));
  m.impl("gated_fusion_input_backward", TORCH_BOX(&ciema::cpu::gated_fusion_input_backward));
  m.impl("msff_sum", TORCH_BOX(&ciema::cpu::msff_sum));
  m.impl("msff_shrink", TORCH_BOX(&ciema::cpu::msff_shrink));
  m.impl("msff_packed", TORCH_BOX(&ciema::cpu::msff_packed));
  m.impl("separable_pack", TORCH_BOX(&ciema::cpu::separable_pack));
  m.impl("separable_block", TORCH_BOX(&ciema::cpu::separable_block));
  m.impl("stem", TORCH_BOX(&ciema::cpu::stem));
}

STABLE_TORCH_LIBRARY_IMPL(ciema_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&ciema::cpu::cpu_isa));
  m.impl("cpu_isa_available", TORCH_BOX(&ciema::cpu::cpu_isa_available));
}
