#include "traffic.h"

#include <algorithm>
#include <bit>

#include "machine.h"

namespace emulator {

namespace {

constexpr size_t kSectorBytes = 32;
constexpr size_t kBanks = 32;
constexpr size_t kBankBytes = 4;

// What the lanes of a request touch: at most 16 bytes each, which need not be aligned.
struct Numbers {
  std::array<uintptr_t, kLanes * 5> values;
  size_t count = 0;

  void add(uintptr_t value) {
    if (count == 0 || values[count - 1] != value) values[count++] = value;
  }
  void make_unique() {
    const auto end = values.begin() + static_cast<ptrdiff_t>(count);
    if (!std::is_sorted(values.begin(), end)) std::sort(values.begin(), end);
    count = static_cast<size_t>(std::unique(values.begin(), end) - values.begin());
  }
};

}  // namespace

void Traffic::record(uintptr_t address, size_t bytes, Kind kind, bool shared, const Site& site,
                     uint32_t site_index) {
  const Thread& thread = machine().current();
  const Place place{site_index, static_cast<uint32_t>(bytes << 3) |
                                    static_cast<uint32_t>(kind) << 1 | (shared ? 1u : 0u)};
  Group& group = open_[{place, thread.warp}];
  if (group.total == nullptr) {
    group.total = &by_place_[place];
    group.total->site = site;
    group.total->shared = shared;
    group.total->kind = kind;
    group.total->bytes_per_lane = bytes;
  }
  const uint32_t execution = group.executed[thread.lane]++;
  if (group.requests.size() <= execution) group.requests.resize(execution + 1);
  group.requests[execution].address[thread.lane] = address;
  group.requests[execution].lanes |= 1u << thread.lane;
}

void Traffic::complete(SiteTraffic& total, const Request& request) {
  const size_t bytes = total.bytes_per_lane;
  ++total.requests;
  total.bytes += static_cast<int64_t>(bytes * static_cast<size_t>(std::popcount(request.lanes)));
  const size_t phases = !total.shared ? 1 : bytes >= 16 ? 4 : bytes == 8 ? 2 : 1;
  const size_t lanes_per_phase = kLanes / phases;
  for (size_t phase = 0; phase < phases; ++phase) {
    Numbers addresses, pieces;  // sectors or words
    const size_t piece_bytes = total.shared ? kBankBytes : kSectorBytes;
    for (size_t lane = phase * lanes_per_phase; lane < (phase + 1) * lanes_per_phase; ++lane) {
      if ((request.lanes >> lane & 1u) == 0) continue;
      const uintptr_t address = request.address[lane];
      addresses.add(address);
      const uintptr_t last = (address + bytes - 1) / piece_bytes;
      for (uintptr_t piece = address / piece_bytes; piece <= last; ++piece) pieces.add(piece);
    }
    pieces.make_unique();
    if (!total.shared) {
      addresses.make_unique();
      total.units += static_cast<int64_t>(pieces.count);
      total.ideal_units +=
          static_cast<int64_t>((addresses.count * bytes + kSectorBytes - 1) / kSectorBytes);
      continue;
    }
    std::array<int64_t, kBanks> turns{};  // different words of a bank take turns
    for (size_t i = 0; i < pieces.count; ++i) ++turns[pieces.values[i] % kBanks];
    total.units += *std::max_element(turns.begin(), turns.end());
    total.ideal_units += pieces.count != 0;
  }
}

void Traffic::end_block() {
  for (const auto& [key, group] : open_) {
    for (const Request& request : group.requests) complete(*group.total, request);
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
