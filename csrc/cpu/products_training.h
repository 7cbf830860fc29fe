// What training needs of products and of the batch norms behind them, as the dispatcher calls it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace ciema::cpu {

using torch::stable::Tensor;

// weight x + second_weight second + bias: the map (only with `store`), and (only with `moments`)
// its rows' means and biased variances over samples and pixels, of a stored map as stored. x is
// multiplied by gate (B, G, H, W); relu(scale v + shift) is done to second, or to x if there is
// none.
std::tuple<Tensor, Tensor, Tensor> product_moments(
    Tensor x, Tensor packed, std::optional<Tensor> gate, std::optional<Tensor> second,
    std::optional<Tensor> second_packed, std::optional<Tensor> scale, std::optional<Tensor> shift,
    std::optional<Tensor> bias, bool store, bool moments);

// relu(scale z + shift), in the dtype of `like`
Tensor norm_relu(Tensor z, Tensor scale, Tensor shift, Tensor like);

// Gradient of relu(y), y = the batch norm of z: grad_z (dtype of grad), grad_weight, grad_bias.
std::tuple<Tensor, Tensor, Tensor> norm_relu_backward(Tensor grad, Tensor z, Tensor mean,
                                                      Tensor var, Tensor weight, Tensor bias,
                                                      double eps, bool training);

// The same through e (phi + w (1 - phi)), phi = sigmoid(y).
std::tuple<Tensor, Tensor, Tensor> norm_gate_backward(Tensor grad, Tensor e, Tensor w, Tensor z,
                                                      Tensor mean, Tensor var, Tensor weight,
                                                      Tensor bias, double eps, bool training);

}  // namespace ciema::cpu
