// The asynchronous copies (cp.async) of one thread that have not landed yet.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.h"

namespace emulator {

class Copies {
 public:
  static constexpr size_t kMostBytes = 16;

  // Poisons the destination; `bytes` of data land there when their group has been waited for.
  void start(uintptr_t destination, const std::array<unsigned char, kMostBytes>& data,
             size_t bytes, const Site& site);
  void commit() { ++groups_; }
  void wait(unsigned pending_groups);
  void end_thread() const;  // reports copies that were never waited for

 private:
  struct Copy {
    uintptr_t destination;
    std::array<unsigned char, kMostBytes> data;
    size_t bytes;
    uint32_t group;
    Site site;
  };
  std::vector<Copy> under_way_;  // in order of their start
  uint32_t groups_ = 0;          // committed
};

}  // namespace emulator
