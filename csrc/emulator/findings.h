// The list of what the checkers found, one entry for each kind and place.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "site.h"

namespace emulator {

struct Finding {
  std::string kind;  // "race", "out-of-bounds", "misaligned", "uninitialised", "divergence", ...
  std::string text;  // the first occurrence, with block and thread
  int64_t count = 0;
};

class Findings {
 public:
  // Occurrences with the same kind, subject and sites are counted, not repeated.
  void add(const std::string& kind, const std::string& subject, const Site& site,
           const Site& other_site, const std::string& text);
  void clear() { findings_.clear(), keys_.clear(); }
  const std::vector<Finding>& all() const { return findings_; }

 private:
  std::vector<Finding> findings_;
  std::vector<std::string> keys_;
};

Findings& findings();

}  // namespace emulator
