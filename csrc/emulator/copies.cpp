#include "copies.h"

#include <algorithm>
#include <cstring>

#include "findings.h"
#include "machine.h"
#include "memory.h"

namespace emulator {

void Copies::start(uintptr_t destination, const std::array<unsigned char, kMostBytes>& data,
                   size_t bytes, const Site& site) {
  std::memset(reinterpret_cast<void*>(destination), 0xFF, bytes);
  memory().start_copy(destination, bytes, site);
  under_way_.push_back({destination, data, bytes, groups_, site});
}

void Copies::wait(unsigned pending_groups) {
  const auto first_pending = std::find_if(
      under_way_.begin(), under_way_.end(),
      [&](const Copy& copy) { return copy.group + pending_groups >= groups_; });
  for (auto copy = under_way_.begin(); copy != first_pending; ++copy) {
    std::memcpy(reinterpret_cast<void*>(copy->destination), copy->data.data(), copy->bytes);
    memory().land_copy(copy->destination, copy->bytes, copy->site);
  }
  under_way_.erase(under_way_.begin(), first_pending);
}

void Copies::end_thread() const {
  for (const Copy& copy : under_way_) {
    findings().add("unwaited", "end of thread", copy.site, {},
                   "the thread ends without having waited for its copy_async at " +
                       copy.site.text() + machine().where());
  }
}

}  // namespace emulator
