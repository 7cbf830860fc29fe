// Buffers and shared arrays with their shadow: for every element who touched it last, and when.
//
// Order between two accesses exists when the same thread made both, when a block barrier lies
// between them, or when __syncwarp does; shuffles and votes order no memory. Of two blocks of one
// launch only ciema::arrive_last orders anything: what was done before arriving comes before what
// the last block does afterwards. Atomics race with plain accesses, not with each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "site.h"

namespace emulator {

enum class Role { kInput, kOutput, kInOut, kScratch, kShared };
enum class Kind { kRead, kWrite, kAtomic };

struct Access {  // small: there are four of them to an element
  int32_t block = -1;       // -1: none yet
  uint32_t epoch = 0;       // block barriers passed
  uint32_t warp_clock = 0;  // the thread's own clock, moved by __syncwarp
  uint32_t thread : 10 = 0;  // linear in the block
  uint32_t atomic : 1 = 0;
  uint32_t site : 21 = 0;  // index into Memory::sites_
};

struct Cell {
  Access write;        // the latest
  Access other_write;  // before an atomic by one thread: the latest atomic by another
  Access read;         // the latest
  Access other_read;   // a read by another block, else another warp, else another lane
  uint32_t copy_under_way = 0;  // the site of its copy_async; 0: none
  bool initialised = false;
  bool inside = true;  // false: storage between the elements of a strided tensor
};

struct Region {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  std::string name;
  Role role = Role::kInput;
  size_t element_bytes = 1;  // one cell to an element
  std::vector<Cell> cells;
  std::unique_ptr<unsigned char[]> storage;  // with red zones on both sides
};

class Memory {
 public:
  static constexpr size_t kRedZone = 4096;
  // Cells of shared memory; narrower shared accesses are refused by name.
  static constexpr size_t kSharedElementBytes = 2;

  // A buffer whose address is `address_modulo_256` modulo 256, filled with 0xFF (a NaN pattern).
  Region& allocate(const std::string& name, size_t bytes, size_t element_bytes, Role role,
                   size_t address_modulo_256);
  Region* find(uintptr_t address);
  std::list<Region>& regions() { return regions_; }
  void release_all();
  void release_shared();
  // A new launch comes after all earlier accesses; what is initialised stays so.
  void forget_accesses();
  // Reports the elements of outputs that no launch has written.
  void check_outputs();

  // Called for every access of the kernel. `vector` demands that the address be a multiple of
  // `bytes`, as one machine access does; block copies of the compiler don't.
  void access(uintptr_t address, size_t bytes, Kind kind, const Site& site, bool vector);

  // The address must be in shared memory, or must not be.
  void check_space(uintptr_t address, bool shared, const char* what, const Site& site);
  // An asynchronous copy: from start to landing its destination is nobody's. The landing is a write
  // by the running thread.
  void start_copy(uintptr_t address, size_t bytes, const Site& site);
  void land_copy(uintptr_t address, size_t bytes, const Site& site);

 private:
  uint32_t intern(const Site& site);
  Access access_now(Kind kind, const Site& site);
  bool is_host_constant(uintptr_t address) const;
  template <class Function>
  void for_cells(uintptr_t address, size_t bytes, Function function);
  void outside(uintptr_t address, size_t bytes, Kind kind, const Site& site);
  void check_cell(Region& region, size_t index, Kind kind, const Access& now, const Site& site);
  void report_race(const Region& region, size_t index, const Access& earlier, const char* what,
                   const Site& site);

  std::list<Region> regions_;
  Region* last_found_ = nullptr;
  struct SiteHash {
    size_t operator()(const Site& site) const {
      return (site.pc ^ reinterpret_cast<uintptr_t>(site.file) ^ site.line) * 0x9E3779B97F4A7C15u;
    }
  };
  std::vector<Site> sites_{Site{}};
  std::unordered_map<Site, size_t, SiteHash> known_sites_;
  Site last_site_;
  uint32_t last_site_index_ = 0;
};

Memory& memory();

}  // namespace emulator
