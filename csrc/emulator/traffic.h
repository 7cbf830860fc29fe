// Counters of memory traffic, by warp request as the hardware forms them.
//
// The n-th execution of one place in the source by the lanes of a warp is one request. A global
// request costs the 32-byte sectors that it touches; a shared request costs wavefronts: 32 banks of
// 4 bytes, 8-byte accesses by half warps, 16-byte ones by quarter warps.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "memory.h"

namespace emulator {

struct SiteTraffic {
  Site site;
  bool shared = false;
  Kind kind = Kind::kRead;
  size_t bytes_per_lane = 0;
  int64_t requests = 0;
  int64_t bytes = 0;
  int64_t units = 0;        // sectors, or wavefronts of shared memory
  int64_t ideal_units = 0;  // what the same lanes and bytes need at best
};

class Traffic {
 public:
  void record(uintptr_t address, size_t bytes, Kind kind, bool shared, const Site& site,
              uint32_t site_index);
  void end_block();  // completes the requests of the block
  void clear();
  std::map<std::string, int64_t> totals() const;
  std::vector<SiteTraffic> sites() const;
  void count(std::string_view event, int64_t times = 1) {
    const auto known = events_.find(event);
    (known != events_.end() ? known->second : events_[std::string(event)]) += times;
  }

 private:
  struct Request {
    std::array<uintptr_t, 32> address{};
    uint32_t lanes = 0;
  };
  struct Group {  // one warp at one place: its lanes' requests in order of execution
    std::vector<Request> requests;
    std::array<uint32_t, 32> executed{};
    SiteTraffic* total = nullptr;
  };
  using Place = std::pair<uint32_t, uint32_t>;  // site index; bytes, kind and space packed
  struct Key {
    Place place;
    uint32_t warp = 0;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const {
      const uint64_t site = key.place.first, rest = key.place.second;
      return (site << 40 ^ rest << 20 ^ key.warp) * 0x9E3779B97F4A7C15u >> 8;
    }
  };

  static void complete(SiteTraffic& total, const Request& request);

  std::unordered_map<Key, Group, KeyHash> open_;
  std::map<Place, SiteTraffic> by_place_;
  std::map<std::string, int64_t, std::less<>> events_;
};

Traffic& traffic();

}  // namespace emulator
