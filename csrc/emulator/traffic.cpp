#include "traffic.h"

#include <algorithm>
#include <bit>
#include <set>

#include "machine.h"

namespace emulator {

namespace {

constexpr size_t kSectorBytes = 32;
constexpr size_t kBanks = 32;
constexpr size_t kBankBytes = 4;

}  // namespace

void Traffic::record(uintptr_t address, size_t bytes, Kind kind, bool shared, const Site& site,
                     uint32_t site_index) {
  const Thread& thread = machine().current();
  const Place place{site_index, static_cast<uint32_t>(bytes << 3) |
                                    static_cast<uint32_t>(kind) << 1 | (shared ? 1u : 0u)};
  SiteTraffic& total = by_place_[place];
  total.site = site;
  total.shared = shared;
  total.kind = kind;
  total.bytes_per_lane = bytes;
  total.bytes += static_cast<int64_t>(bytes);
  Group& group = open_[{place, thread.warp}];
  const uint32_t execution = group.executed[thread.lane]++;
  if (group.requests.size() <= execution) group.requests.resize(execution + 1);
  group.requests[execution].address[thread.lane] = address;
  group.requests[execution].lanes |= 1u << thread.lane;
}

void Traffic::complete(SiteTraffic& total, const Request& request) const {
  const size_t bytes = total.bytes_per_lane;
  const auto lanes = static_cast<size_t>(std::popcount(request.lanes));
  ++total.requests;
  if (!total.shared) {
    std::set<uintptr_t> sectors;
    std::set<uintptr_t> addresses;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if ((request.lanes >> lane & 1u) == 0) continue;
      const uintptr_t address = request.address[lane];
      addresses.insert(address);
      for (uintptr_t s = address / kSectorBytes; s <= (address + bytes - 1) / kSectorBytes; ++s) {
        sectors.insert(s);
      }
    }
    total.units += static_cast<int64_t>(sectors.size());
    total.ideal_units +=
        static_cast<int64_t>((addresses.size() * bytes + kSectorBytes - 1) / kSectorBytes);
    return;
  }
  const size_t phases = bytes >= 16 ? 4 : bytes == 8 ? 2 : 1;
  const size_t lanes_per_phase = kLanes / phases;
  for (size_t phase = 0; phase < phases && lanes != 0; ++phase) {
    std::array<std::set<uintptr_t>, kBanks> words;  // different words of a bank take turns
    for (size_t lane = phase * lanes_per_phase; lane < (phase + 1) * lanes_per_phase; ++lane) {
      if ((request.lanes >> lane & 1u) == 0) continue;
      const uintptr_t address = request.address[lane];
      for (uintptr_t w = address / kBankBytes; w <= (address + bytes - 1) / kBankBytes; ++w) {
        words[w % kBanks].insert(w);
      }
    }
    size_t turns = 0;
    for (const auto& bank : words) turns = std::max(turns, bank.size());
    total.units += static_cast<int64_t>(turns);
    total.ideal_units += turns != 0;
  }
}

void Traffic::end_block() {
  for (const auto& [key, group] : open_) {
    SiteTraffic& total = by_place_[key.first];
    for (const Request& request : group.requests) complete(total, request);
  }
  open_.clear();
}

void Traffic::clear() {
  open_.clear();
  by_place_.clear();
  events_.clear();
}

std::map<std::string, int64_t> Traffic::totals() const {
  std::map<std::string, int64_t> result(events_.begin(), events_.end());
  for (const char* name : {"global_read", "global_write", "global_atomic", "shared_read",
                           "shared_write", "shared_atomic"}) {
    for (const char* what : {"_bytes", "_requests", "_units", "_ideal_units"}) {
      result[std::string(name) + what] = 0;
    }
  }
  for (const auto& [place, total] : by_place_) {
    const std::string name = std::string(total.shared ? "shared_" : "global_") +
                             (total.kind == Kind::kRead    ? "read"
                              : total.kind == Kind::kWrite ? "write"
                                                           : "atomic");
    result[name + "_bytes"] += total.bytes;
    result[name + "_requests"] += total.requests;
    result[name + "_units"] += total.units;
    result[name + "_ideal_units"] += total.ideal_units;
  }
  return result;
}

std::vector<SiteTraffic> Traffic::sites() const {
  std::vector<SiteTraffic> result;
  for (const auto& [place, total] : by_place_) result.push_back(total);
  return result;
}

Traffic& traffic() {
  static Traffic counters;
  return counters;
}

}  // namespace emulator
