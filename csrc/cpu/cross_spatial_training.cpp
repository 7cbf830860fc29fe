// Stage cross_spatial on the CPU in training (spec.md 2.3 and 3), and its backward; the equations
// and the passes are in simd/cross_spatial_training_body.h and simd/cross_spatial_backward_body.h.
//
// Layouts  as in cross_spatial.cpp; grad_e has the memory format of e.
// Threads  over the groups: batch statistics are taken over a group's samples. Gradients of the
//          shared parameters are summed group by group in float64, in the order of the groups: the
//          bits do not depend on the number of threads. Pooled statistics are joined on one thread
//          between three runs over the groups. Where the scratch of all groups fits in 2 GB it is
//          kept from run to run; else each recomputes what the earlier ones did.
// Bytes    forward reads e once, backward twice; scratch is 6.4 MB a sample and thread at c = 32,
//          56x56 (half of it for bfloat16), and no more threads run than fit in 4 GB of it.
#include "cross_spatial_training.h"

#include <array>
#include <optional>
#include <vector>

#include "isa.h"
#include "slabs.h"

namespace ciema::cpu {
namespace {

CrossSpatialParameters read_parameters(const std::vector<Tensor>& all, int64_t c,
                                       double attention_eps, double reduce_eps) {
  STD_TORCH_CHECK(all.size() == 15, "parameters must be 15 tensors, got ", all.size());
  constexpr std::array<const char*, 15> names = {
      "gn_weight",           "gn_bias",          "conv3x3_weight",      "conv3x3_bias",
      "spatial_conv1_weight", "spatial_conv3_weight", "spatial_conv5_weight", "attention_weight",
      "attention_bn_weight", "attention_bn_bias", "reduce_weight",      "reduce_bn_weight",
      "reduce_bn_bias",      "channel_feat_weight", "alpha"};
  const int64_t square = c * c;
  const std::array<int64_t, 15> sizes = {c,          c,     9 * square, c,          square,
                                         9 * square, 25 * square, 9 * square, 3 * c, 3 * c,
                                         3 * square, c,     c,          square,     1};
  std::array<const float*, 15> at;
  for (size_t i = 0; i < at.size(); ++i) at[i] = float_values(all[i], names[i], sizes[i]);
  return {at[0], at[1],   at[2],   at[3],  at[4],  at[5],  at[6],   at[7],   at[8],  at[9],
          nullptr, nullptr, at[10], at[11], at[12], nullptr, nullptr, at[13], at[14], attention_eps,
          reduce_eps, nullptr};
}

// bfloat16 maps are multiplied as such where the processor does it. Not so few channels that a
// register is mostly padding, nor so few values that a batch norm is made of their rounding.
const CrossSpatialTraining& kernels_for(const Tensor& e, int64_t c) {
  constexpr int64_t kFewestChannels = 16, kFewestValues = 64;
  const InstructionSet& set = chosen_instruction_set();
  const bool rounded = e.scalar_type() == ScalarType::BFloat16 && c >= kFewestChannels &&
                       e.size(0) * e.size(2) * e.size(3) >= kFewestValues;
  return rounded && set.cross_spatial_training_bf16 != nullptr ? *set.cross_spatial_training_bf16
                                                              : *set.cross_spatial_training;
}

Tensor pack_parameters(const Tensor& e, const CrossSpatialParameters& parameters, int64_t c,
                       bool backward) {
  const CrossSpatialTraining& kernels = kernels_for(e, c);
  Tensor packed = empty_floats(e, {kernels.packed_size(c, backward)});
  kernels.pack(parameters, c, backward, data_of(packed));
  return packed;
}

constexpr int64_t kMostKept = int64_t{1} << 29;  // floats

// Runs over the groups: run(group, scratch). If kept(), a later run finds a group's scratch again.
class GroupRuns {
 public:
  GroupRuns(int64_t groups, int64_t floats, bool several)
      : groups_(groups), floats_((floats + 15) / 16 * 16) {
    if (several && groups * floats_ <= kMostKept) {
      scratch_ = torch::stable::empty({groups, floats_}, ScalarType::Float);
      const int64_t bytes = groups * floats_ * static_cast<int64_t>(sizeof(float));
      ask_for_huge_pages(data_of(*scratch_), bytes);
    }
  }
  bool kept() const { return scratch_.has_value(); }
  template <class Run>
  void operator()(const Run& run) {
    if (kept()) {
      for_each_kept_slab(groups_, *scratch_, run);
      return;
    }
    for_each_slab(groups_, floats_, [&](int64_t begin, int64_t end, float* scratch) {
      for (int64_t g = begin; g < end; ++g) run(g, scratch);
    });
  }

 private:
  int64_t groups_, floats_;
  std::optional<Tensor> scratch_;
};

// What forward and backward read of all groups; `of` gives one group's.
struct Groups {
  Slabs slabs;
  int64_t batch, height, width;
  const float *alpha_h, *alpha_w, *mean, *rstd;
  double attention_eps, reduce_eps;

  Groups(const Tensor& e, int64_t groups, const Tensor& h, const Tensor& w, const Tensor& means,
         const Tensor& rstds, double attention, double reduce)
      : slabs(e, groups),
        batch(e.size(0)),
        height(e.size(2)),
        width(e.size(3)),
        alpha_h(float_values(h, "alpha_h", batch * e.size(1) * height)),
        alpha_w(float_values(w, "alpha_w", batch * e.size(1) * width)),
        mean(float_values(means, "mean", batch * e.size(1))),
        rstd(float_values(rstds, "rstd", batch * e.size(1))),
        attention_eps(attention),
        reduce_eps(reduce) {}

  CrossSpatialShape shape() const {
    return {slabs.channels, height, width, kWinogradForm, nullptr};
  }
  TrainingGroup of(int64_t g) const {
    const int64_t at = g * slabs.channels;
    return {shape(),
            batch,
            slabs.groups,
            slabs.map(g),
            slabs.stride_b * slabs.element_size,
            alpha_h + at * height,
            alpha_w + at * width,
            mean + at,
            rstd + at,
            attention_eps,
            reduce_eps};
  }
};

// Mean and biased variance of all groups' branches, in their order; each has `count` values a
// column.
void join_moments(const std::vector<double>& moments, int64_t groups, int64_t columns,
                  int64_t stride, double count, float* mean, float* var) {
  for (int64_t i = 0; i < columns; ++i) {
    double middle = 0.0, squares = 0.0, seen = 0.0;
    for (int64_t set = 0; set < 2 * groups; ++set) {
      const double* from = moments.data() + set / 2 * stride + set % 2 * 2 * columns + i;
      const double step = from[0] - middle;
      middle += step * count / (seen + count);
      squares += from[columns] + step * step * seen * count / (seen + count);
      seen += count;
    }
    mean[i] = static_cast<float>(middle);
    var[i] = static_cast<float>(squares / seen);
  }
}

// Sums over the groups, in their order.
std::vector<double> add_groups(const std::vector<double>& sums, int64_t groups, int64_t stride,
                               int64_t columns) {
  std::vector<double> total(columns);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < columns; ++i) total[i] += sums[g * stride + i];
  }
  return total;
}

// Where the vectors of group g of c channels lie, from where those of the first one do.
template <class Values>
void skip_to_group(int64_t g, int64_t c, int64_t set, Values* out) {
  out->softmax1 += g * c;
  out->softmax2 += g * c;
  out->attention_mean += 3 * set;
  out->attention_var += 3 * set;
  out->reduce_mean += set;
  out->reduce_var += set;
}

TrainingBackward of_group(TrainingBackward out, int64_t g, int64_t c, int64_t height,
                          int64_t width, int64_t parameters) {
  skip_to_group(g, c, out.shared ? 0 : g * 2 * c, &out);
  out.grad_w += g * height * width;
  out.w += g * height * width;
  out.grad_alpha_h += g * c * height;
  out.grad_alpha_w += g * c * width;
  out.grad_mean += g * c;
  out.grad_rstd += g * c;
  out.parameters += g * parameters;
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_spatial_train(
    Tensor e, Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd,
    std::vector<Tensor> parameters, int64_t groups, bool pooled, double attention_eps,
    double reduce_eps) {
  check_slabs(e, groups);
  const int64_t batch = e.size(0), c = e.size(1) / groups;
  STD_TORCH_CHECK(batch > 0, "batch statistics need samples");
  const CrossSpatialParameters read = read_parameters(parameters, c, attention_eps, reduce_eps);
  Tensor packed = pack_parameters(e, read, c, false);
  const float* const weights = data_of(packed);
  Tensor w = torch::stable::empty({batch, groups, e.size(2), e.size(3)}, e.scalar_type(),
                                  std::nullopt, e.device());
  Tensor softmax1 = empty_floats(e, {batch, groups, c});
  Tensor softmax2 = empty_floats(e, {batch, groups, c});
  const int64_t sets = pooled ? 1 : 2 * groups;
  Tensor attention_mean = empty_floats(e, {sets, 3 * c});
  Tensor attention_var = empty_floats(e, {sets, 3 * c});
  Tensor reduce_mean = empty_floats(e, {sets, c}), reduce_var = empty_floats(e, {sets, c});
  e = readable_slabs(e);
  const Groups all(e, groups, alpha_h, alpha_w, mean, rstd, attention_eps, reduce_eps);
  const CrossSpatialTraining& kernels = kernels_for(e, c);
  const int64_t plane = all.height * all.width * all.slabs.element_size;
  std::vector<double> moments(pooled ? groups * 12 * c : 0);
  GroupRuns runs(groups, kernels.forward_scratch(all.shape(), batch), pooled);
  TrainingForward first = {Phase::kWhole,           runs.kept(),
                           w.mutable_data_ptr(),    data_of(softmax1),
                           data_of(softmax2),       data_of(attention_mean),
                           data_of(attention_var),  data_of(reduce_mean),
                           data_of(reduce_var),     moments.data()};
  const auto run = [&] {
    runs([&](int64_t g, float* scratch) {
      TrainingForward out = first;
      out.w = static_cast<char*>(first.w) + g * plane;
      skip_to_group(g, c, pooled ? 0 : g * 2 * c, &out);
      out.moments += pooled ? g * 12 * c : 0;
      kernels.forward(all.of(g), weights, out, scratch);
    });
  };
  if (pooled) {
    const double count = static_cast<double>(batch * all.height * all.width);
    first.phase = Phase::kFirst;
    run();
    join_moments(moments, groups, 3 * c, 12 * c, count, first.attention_mean, first.attention_var);
    first.phase = Phase::kSecond;
    run();
    join_moments(moments, groups, c, 12 * c, count, first.reduce_mean, first.reduce_var);
    first.phase = Phase::kLast;
  }
  run();
  return {w, softmax1, softmax2, attention_mean, attention_var, reduce_mean, reduce_var};
}

namespace {

// The backward of pooled statistics in three phases, between which the groups' sums are joined;
// `run` takes all groups through the phase that `first` names.
template <class Run>
void run_pooled(TrainingBackward& first, const std::vector<double>& norm_sums, int64_t groups,
                int64_t c, const Run& run) {
  first.phase = Phase::kFirst;
  run();
  const auto reduce_totals = add_groups(norm_sums, groups, 6 * c, 2 * c);
  first.reduce_totals = reduce_totals.data();
  first.phase = Phase::kSecond;
  run();
  const auto attention_totals = add_groups(norm_sums, groups, 6 * c, 6 * c);
  first.attention_totals = attention_totals.data();
  first.phase = Phase::kLast;
  run();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_spatial_backward(
    Tensor grad_w, Tensor e, Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd, Tensor w,
    Tensor softmax1, Tensor softmax2, Tensor attention_mean, Tensor attention_var,
    Tensor reduce_mean, Tensor reduce_var, std::vector<Tensor> parameters, int64_t groups,
    bool constants, bool pooled, double attention_eps, double reduce_eps) {
  check_slabs(e, groups);
  const int64_t batch = e.size(0), channels = e.size(1), c = channels / groups;
  STD_TORCH_CHECK(batch > 0, "the backward needs samples");
  const int64_t plane = e.size(2) * e.size(3), sets = constants || pooled ? 1 : 2 * groups;
  const CrossSpatialParameters read = read_parameters(parameters, c, attention_eps, reduce_eps);
  Tensor packed = pack_parameters(e, read, c, true);
  const float* const weights = data_of(packed);
  Tensor grad_e = torch::stable::empty(e.sizes(), e.scalar_type(), std::nullopt, e.device(),
                                       std::nullopt, memory_format_of(e));
  Tensor grad_h = empty_floats(e, {batch, channels, e.size(2)});
  Tensor grad_v = empty_floats(e, {batch, channels, e.size(3)});
  Tensor grad_mean = empty_floats(e, {batch, channels});
  Tensor grad_rstd = empty_floats(e, {batch, channels});
  const int64_t count = 57 * c * c + 11 * c + 1;
  Tensor shares = empty_floats(e, {groups, count}), total = empty_floats(e, {count});
  e = readable_slabs(e);
  const Groups all(e, groups, alpha_h, alpha_w, mean, rstd, attention_eps, reduce_eps);
  const Slabs grads(grad_e, groups);
  const CrossSpatialTraining& kernels = kernels_for(e, c);
  std::vector<double> norm_sums(pooled ? groups * 6 * c : 0);
  GroupRuns runs(groups, kernels.backward_scratch(all.shape(), batch), pooled);
  TrainingBackward first = {
      Phase::kWhole,
      runs.kept(),
      float_values(grad_w, "grad_w", batch * groups * plane),
      float_values(w, "w", batch * groups * plane),
      float_values(softmax1, "softmax1", batch * groups * c),
      float_values(softmax2, "softmax2", batch * groups * c),
      float_values(attention_mean, "attention_mean", sets * 3 * c),
      float_values(attention_var, "attention_var", sets * 3 * c),
      float_values(reduce_mean, "reduce_mean", sets * c),
      float_values(reduce_var, "reduce_var", sets * c),
      constants,
      constants || pooled,
      norm_sums.data(),
      nullptr,
      nullptr,
      static_cast<double>(batch * plane * (pooled ? 2 * groups : 1)),
      grads.map(0),
      grads.stride_b * grads.element_size,
      data_of(grad_h),
      data_of(grad_v),
      data_of(grad_mean),
      data_of(grad_rstd),
      data_of(shares)};
  const auto run = [&] {
    runs([&](int64_t g, float* scratch) {
      TrainingBackward out = of_group(first, g, c, all.height, all.width, count);
      out.grad_e = grads.map(g);
      out.norm_sums += pooled ? g * 6 * c : 0;
      kernels.backward(all.of(g), weights, out, scratch);
    });
  };
  if (pooled) {
    run_pooled(first, norm_sums, groups, c, run);
  } else {
    run();
  }
  add_shares(data_of(shares), groups, count, 0, count, data_of(total));
  return {grad_e, grad_h, grad_v, grad_mean, grad_rstd, total};
}

}  // namespace ciema::cpu
