#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstring>

#include "findings.h"
#include "machine.h"
#include "traffic.h"

namespace emulator {

namespace {

std::string element_text(const Region& region, size_t index) {
  if (region.role == Role::kShared) {
    return "shared " + region.name + " + " + std::to_string(index * region.element_bytes) +
           " bytes";
  }
  return region.name + "[" + std::to_string(index) + "]";
}

const char* kind_text(Kind kind) {
  return kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic";
}

// Is there an order between `earlier` and what the running thread does now?
bool ordered(const Access& earlier, const Access& now) {
  if (earlier.block < 0) return true;
  if (earlier.block != now.block) return machine().knows(earlier.block, earlier.epoch);
  if (earlier.thread == now.thread || earlier.epoch != now.epoch) return true;
  return earlier.thread / kLanes == now.thread / kLanes &&
         earlier.warp_clock <= machine().current().clock[earlier.thread % kLanes];
}

bool same_thread(const Access& a, const Access& b) {
  return a.thread == b.thread && a.block == b.block;
}

// Two reads stand for all of them: what races with any read since the last write races with the
// latest or with one of another block, else of another warp, else of another lane.
void remember_read(Cell& cell, const Access& now) {
  const auto distance = [&](const Access& other) {
    if (other.block < 0 || same_thread(other, now)) return 0;
    if (other.block != now.block) return 4;
    if (other.epoch != now.epoch) return 1;
    return other.thread / kLanes == now.thread / kLanes ? 2 : 3;
  };
  if (distance(cell.read) >= distance(cell.other_read)) cell.other_read = cell.read;
  cell.read = now;
}

}  // namespace

Region& Memory::allocate(const std::string& name, size_t bytes, size_t element_bytes, Role role,
                         size_t address_modulo_256) {
  Region& region = regions_.emplace_back();
  const size_t total = bytes + 2 * kRedZone + 512;
  region.storage = std::make_unique<unsigned char[]>(total);
  std::memset(region.storage.get(), 0xFF, total);
  auto begin = reinterpret_cast<uintptr_t>(region.storage.get()) + kRedZone;
  begin = (begin + 255) / 256 * 256 + address_modulo_256 % 256;
  region.begin = begin;
  region.end = begin + bytes;
  region.name = name;
  region.role = role;
  region.element_bytes = element_bytes;
  region.cells.resize((bytes + element_bytes - 1) / element_bytes);
  if (role == Role::kInput || role == Role::kInOut) {
    for (Cell& cell : region.cells) cell.initialised = true;
  }
  return region;
}

Region* Memory::find(uintptr_t address) {
  if (last_found_ != nullptr &&
      address - last_found_->begin < last_found_->end - last_found_->begin) {
    return last_found_;
  }
  for (Region& region : regions_) {
    if (address >= region.begin && address < region.end) return last_found_ = &region;
  }
  return nullptr;
}

void Memory::release_all() {
  last_found_ = nullptr;
  regions_.clear();
}

void Memory::release_shared() {
  last_found_ = nullptr;
  regions_.remove_if([](const Region& region) { return region.role == Role::kShared; });
}

void Memory::forget_accesses() {
  for (Region& region : regions_) {
    for (Cell& cell : region.cells) {
      cell.write = cell.other_write = cell.read = cell.other_read = Access{};
    }
  }
}

void Memory::check_outputs() {
  for (const Region& region : regions_) {
    if (region.role != Role::kOutput) continue;
    size_t elements = 0;
    size_t missing = 0;
    size_t first = 0;
    for (size_t i = 0; i < region.cells.size(); ++i) {
      elements += region.cells[i].inside;
      if (!region.cells[i].inside || region.cells[i].initialised) continue;
      if (missing++ == 0) first = i;
    }
    if (missing == 0) continue;
    findings().add("unwritten", region.name, {}, {},
                   std::to_string(missing) + " of " + std::to_string(elements) +
                       " elements of output " + region.name + " were never written, the first is " +
                       element_text(region, first));
  }
}

uint32_t Memory::intern(const Site& site) {
  if (last_site_index_ != 0 && site == last_site_) return last_site_index_;
  const auto [entry, is_new] = known_sites_.try_emplace(site, sites_.size());
  if (is_new) sites_.push_back(site);
  last_site_ = site;
  return last_site_index_ = static_cast<uint32_t>(entry->second);
}

// The loaded library itself: constant tables and string literals that a kernel may read.
bool Memory::is_host_constant(uintptr_t address) const {
  struct Span {
    uintptr_t begin = 0;
    uintptr_t end = 0;
  };
  static const Span library = [] {
    Span span;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          Span found;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            if (found.end == 0) found.begin = begin;
            found.end = begin + header.p_memsz;
          }
          const auto here = reinterpret_cast<uintptr_t>(&memory);
          if (here < found.begin || here >= found.end) return 0;
          *static_cast<Span*>(result) = found;
          return 1;
        },
        &span);
    return span;
  }();
  return address >= library.begin && address < library.end;
}

void Memory::outside(uintptr_t address, size_t bytes, Kind kind, const Site& site) {
  const std::string what =
      std::string(kind_text(kind)) + " of " + std::to_string(bytes) + " bytes ";
  for (const Region& region : regions_) {
    if (address + kRedZone < region.begin || address >= region.end + kRedZone) continue;
    const auto distance = static_cast<long>(address - region.begin);
    findings().add("out-of-bounds", region.name, site, {},
                   what + "at byte " + std::to_string(distance) + " of " + region.name +
                       ", which has " + std::to_string(region.end - region.begin) + " bytes, at " +
                       site.text() + machine().where());
    return;  // lands in a red zone: nothing is lost by going on
  }
  const bool local = machine().is_any_stack(address);
  findings().add("out-of-bounds", "wild", site, {},
                 what + (local ? "in the local memory of another thread" : "outside every buffer") +
                     ", at " + site.text() + machine().where());
  machine().abandon_launch();
}

void Memory::report_race(const Region& region, size_t index, const Access& earlier,
                         const char* what, const Site& site) {
  const Site& earlier_site = sites_[earlier.site];
  const bool other_block = earlier.block != machine().block_linear();
  findings().add("race", region.name, earlier_site, site,
                 std::string(what) + " on " + element_text(region, index) + ": " +
                     earlier_site.text() + " (thread " + std::to_string(earlier.thread) +
                     " of block " + std::to_string(earlier.block) + ") and " + site.text() +
                     machine().where() +
                     (other_block ? ", nothing orders blocks" : ", no barrier between"));
}

void Memory::check_cell(Region& region, size_t index, Kind kind, const Access& now,
                        const Site& site) {
  Cell& cell = region.cells[index];
  if (!cell.inside) {
    findings().add("out-of-bounds", region.name, site, {},
                   std::string(kind_text(kind)) + " of storage between the elements of " +
                       region.name + " at element " + std::to_string(index) + ", at " +
                       site.text() + machine().where());
    return;
  }
  if (cell.copy_under_way != 0) {
    const Site& copy = sites_[cell.copy_under_way];
    findings().add("unwaited", region.name, copy, site,
                   std::string(kind_text(kind)) + " of " + element_text(region, index) + " at " +
                       site.text() + ", where the copy_async of " + copy.text() +
                       " has not been waited for" + machine().where());
    cell.copy_under_way = 0;  // said once for each element
  }
  if (kind != Kind::kWrite && !cell.initialised) {
    findings().add("uninitialised", region.name, site, {},
                   "read of uninitialised " + element_text(region, index) + " at " + site.text() +
                       machine().where());
    cell.initialised = true;  // said once for each element
  }
  const auto races = [&](const Access& earlier) {
    return !ordered(earlier, now) && !(earlier.atomic && now.atomic);
  };
  for (const Access* earlier : {&cell.write, &cell.other_write}) {
    if (!races(*earlier)) continue;
    report_race(region, index, *earlier, kind == Kind::kRead ? "write-read" : "write-write", site);
    break;
  }
  if (kind == Kind::kRead) {
    remember_read(cell, now);
    return;
  }
  for (const Access* earlier : {&cell.read, &cell.other_read}) {
    if (!races(*earlier)) continue;
    report_race(region, index, *earlier, "read-write", site);
    break;
  }
  if (!now.atomic) {
    cell.other_write = Access{};
  } else if (cell.write.atomic && !same_thread(cell.write, now)) {
    cell.other_write = cell.write;
  }
  cell.write = now;
  cell.read = cell.other_read = Access{};
  cell.initialised = true;
}

Access Memory::access_now(Kind kind, const Site& site) {
  const Thread& thread = machine().current();
  Access now;
  now.thread = thread.linear % kMaxThreads;
  now.block = machine().block_linear();
  now.epoch = machine().epoch();
  now.warp_clock = thread.clock[thread.lane];
  now.atomic = kind == Kind::kAtomic;
  now.site = intern(site);
  return now;
}

void Memory::access(uintptr_t address, size_t bytes, Kind kind, const Site& site, bool vector) {
  const Thread& thread = machine().current();
  if (thread.fiber->owns(address)) return;  // the thread's own registers and local memory
  Region* region = find(address);
  if (region == nullptr) {
    if (kind == Kind::kRead && is_host_constant(address)) return;
    outside(address, bytes, kind, site);
    return;
  }
  if (address + bytes > region->end) {
    outside(region->end, address + bytes - region->end, kind, site);
    bytes = region->end - address;
  }
  if (vector && address % bytes != 0) {
    findings().add("misaligned", region->name, site, {},
                   std::to_string(bytes) + "-byte " + kind_text(kind) + " at byte " +
                       std::to_string(address - region->begin) + " of " + region->name +
                       " is not aligned, at " + site.text() + machine().where());
  }
  if (kind != Kind::kRead && region->role == Role::kInput) {
    findings().add("input-written", region->name, site, {},
                   std::string(kind_text(kind)) + " to input " + region->name + " at " +
                       site.text() + machine().where());
  }
  if (bytes < region->element_bytes && region->role == Role::kShared) {
    findings().add("unsupported", region->name, site, {},
                   "1-byte access to shared " + region->name + " at " + site.text() +
                       ": the shadow of shared memory has cells of 2 bytes");
  }
  traffic().record(address, bytes, kind, region->role == Role::kShared, site, intern(site));
  const Access now = access_now(kind, site);
  const size_t first = (address - region->begin) / region->element_bytes;
  const size_t last = (address + bytes - 1 - region->begin) / region->element_bytes;
  for (size_t index = first; index <= last; ++index) check_cell(*region, index, kind, now, site);
}

void Memory::check_space(uintptr_t address, bool shared, const char* what, const Site& site) {
  const Region* region = find(address);
  if (region == nullptr) return;  // which access() reports
  if ((region->role == Role::kShared) == shared) return;
  findings().add("wrong-space", region->name, site, {},
                 std::string(what) + " at " + site.text() + " is in " + region->name + ", not in " +
                     (shared ? "shared" : "global") + " memory" + machine().where());
}

// Calls function(cell) for what lies inside a buffer.
template <class Function>
void Memory::for_cells(uintptr_t address, size_t bytes, Function function) {
  Region* region = find(address);
  if (region == nullptr) return;
  const size_t first = (address - region->begin) / region->element_bytes;
  const size_t last = (address + bytes - 1 - region->begin) / region->element_bytes;
  for (size_t i = first; i <= last && i < region->cells.size(); ++i) function(region->cells[i]);
}

void Memory::start_copy(uintptr_t address, size_t bytes, const Site& site) {
  for_cells(address, bytes, [&](Cell& cell) { cell.copy_under_way = intern(site); });
}

void Memory::land_copy(uintptr_t address, size_t bytes, const Site& site) {
  const Access now = access_now(Kind::kWrite, site);
  for_cells(address, bytes, [&](Cell& cell) {
    cell.copy_under_way = 0;
    cell.write = now;
    cell.other_write = cell.read = cell.other_read = Access{};
  });
}

Memory& memory() {
  static Memory device_memory;
  return device_memory;
}

}  // namespace emulator
