// Entry of channel interaction's gate.
#include "channel_interaction_gate.cuh"

#include "launch.cuh"

namespace ciema {
namespace {

using namespace channel_interaction;

template <class W>
void launch_gate(const Arguments& a) {
  GateParams p{};
  p.mean = a.pointer<const float>("mean");
  p.maximum = a.pointer<const float>("maximum");
  p.squeeze = a.pointer<const void>("squeeze_weight");
  p.excite = a.pointer<const void>("excite_weight");
  p.gate = a.pointer<float>("gate");
  p.channels = static_cast<int>(a.integer("channels"));
  p.hidden = static_cast<int>(a.integer("hidden"));
  p.piece = static_cast<int>(a.integer("piece"));
  p.squeeze_aligned = p.channels % Vector<W>::kElements == 0 &&
                      is_aligned(static_cast<const W*>(p.squeeze)) && is_aligned(p.mean) &&
                      is_aligned(p.maximum);
  const dim3 grid(grid_size(blocks(p.channels, p.piece)), grid_size(a.integer("batch"), kGridY));
  launch(a, "channel_interaction_gate", grid, dim3(kThreads), p.hidden * sizeof(float),
         gate_kernel<W>, p);
}

template <class T>
void entry(const Arguments& a) {
  a.integer("weight_is_float") != 0 ? launch_gate<float>(a) : launch_gate<T>(a);
}

const Entry kEntries[] = {
    {"channel_interaction_gate_float32", entry<float>},
    {"channel_interaction_gate_float16", entry<__half>},
    {"channel_interaction_gate_bfloat16", entry<__nv_bfloat16>},
};

}  // namespace
}  // namespace ciema
