// The gradient of a product's weight, as the dispatcher calls it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace ciema::cpu {

using torch::stable::Tensor;

// grad (B, M, H, W), x (B, K, H, W) -> sum over pixels of grad x^T, float32 (B, M, K), or (1, M, K)
// summed over the samples too. x may be transformed as it was for the product: relu(scale x +
// shift) with vectors (K), times gate (B, G, H, W).
Tensor product_gradient(Tensor grad, Tensor x, std::optional<Tensor> gate,
                        std::optional<Tensor> scale, std::optional<Tensor> shift, bool per_sample);

}  // namespace ciema::cpu
