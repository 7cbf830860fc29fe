#include "findings.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace emulator {

namespace {

uintptr_t library_base() {
  static const uintptr_t base = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&findings), &info);
    return reinterpret_cast<uintptr_t>(info.dli_fbase);
  }();
  return base;
}

}  // namespace

std::string Site::text() const {
  char buffer[64];
  if (file == nullptr) {
    // One byte back: a return address belongs to the instruction after the call.
    std::snprintf(buffer, sizeof buffer, "@0x%zx", static_cast<size_t>(pc - library_base() - 1));
    return buffer;
  }
  const char* slash = std::strrchr(file, '/');
  std::snprintf(buffer, sizeof buffer, ":%u", line);
  return std::string(slash != nullptr ? slash + 1 : file) + buffer;
}

void Findings::add(const std::string& kind, const std::string& subject, const Site& site,
                   const Site& other_site, const std::string& text) {
  const std::string key = kind + '|' + subject + '|' + site.text() + '|' + other_site.text();
  const auto found = std::find(keys_.begin(), keys_.end(), key);
  if (found != keys_.end()) {
    ++findings_[static_cast<size_t>(found - keys_.begin())].count;
    return;
  }
  keys_.push_back(key);
  findings_.push_back({kind, text, 1});
}

Findings& findings() {
  static Findings all;
  return all;
}

}  // namespace emulator
