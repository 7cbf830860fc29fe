#include "isa.h"

#ifdef CIEMA_X86_SIMD
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace ciema::cpu {
namespace {

#ifdef CIEMA_X86_SIMD
// GCC before 11 and clang before 18 do not know "f16c" in __builtin_cpu_supports. That the operating
// system keeps its registers is told by AVX2, which is asked for beside it.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

std::vector<InstructionSet> find_available() {
  std::vector<InstructionSet> found;
#ifdef CIEMA_X86_SIMD
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) {
    const InstructionSet plain = {.name = "avx512",
                                  .channel_statistics = &kAvx512ChannelStatistics,
                                  .coordinate_attention = &kAvx512CoordinateAttention,
                                  .cross_spatial = &kAvx512CrossSpatial,
                                  .cross_spatial_training = &kAvx512CrossSpatialTraining,
                                  .cross_spatial_bf16 = nullptr,
                                  .cross_spatial_training_bf16 = nullptr,
                                  .products = &kAvx512Products,
                                  .separable = &kAvx512Separable};
    if (__builtin_cpu_supports("avx512bf16")) {
      found.push_back(plain);
      found.back().name = "avx512bf16";
      found.back().cross_spatial_bf16 = &kAvx512CrossSpatialBf16;
      found.back().cross_spatial_training_bf16 = &kAvx512bf16CrossSpatialTraining;
      found.back().products = &kAvx512bf16Products;
      found.back().separable = &kAvx512bf16Separable;
    }
    found.push_back(plain);
  }
  if (avx2) {
    found.push_back({.name = "avx2",
                     .channel_statistics = &kAvx2ChannelStatistics,
                     .coordinate_attention = &kAvx2CoordinateAttention,
                     .cross_spatial = &kAvx2CrossSpatial,
                     .cross_spatial_training = &kAvx2CrossSpatialTraining,
                     .cross_spatial_bf16 = nullptr,
                     .cross_spatial_training_bf16 = nullptr,
                     .products = &kAvx2Products,
                     .separable = &kAvx2Separable});
  }
#endif
  found.push_back({.name = "portable",
                   .channel_statistics = &kPortableChannelStatistics,
                   .coordinate_attention = &kPortableCoordinateAttention,
                   .cross_spatial = &kPortableCrossSpatial,
                   .cross_spatial_training = &kPortableCrossSpatialTraining,
                   .cross_spatial_bf16 = nullptr,
                   .cross_spatial_training_bf16 = nullptr,
                   .products = &kPortableProducts,
                   .separable = &kPortableSeparable});
  return found;
}

const std::vector<InstructionSet>& available() {
  static const std::vector<InstructionSet> found = find_available();
  return found;
}

struct Choice {
  const InstructionSet* chosen = nullptr;
  std::string error;
};

Choice choose() {
  const char* forced = std::getenv("FUSED_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return {&available().front(), ""};
  for (const InstructionSet& one : available()) {
    if (forced == std::string(one.name)) return {&one, ""};
  }
  return {nullptr, "FUSED_CPU_ISA='" + std::string(forced) +
                       "': this CPU and build have only " + available_instruction_sets()};
}

}  // namespace

const InstructionSet& chosen_instruction_set() {
  static const Choice choice = choose();
  if (choice.chosen == nullptr) throw std::runtime_error(choice.error);
  return *choice.chosen;
}

std::string available_instruction_sets() {
  std::string names;
  for (const InstructionSet& one : available()) {
    names += (names.empty() ? "" : ", ") + std::string(one.name);
  }
  return names;
}

}  // namespace ciema::cpu
