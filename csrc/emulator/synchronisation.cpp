// Barriers and warp operations of the machine: where threads wait for each other, and what is wrong
// when they don't come.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "findings.h"
#include "machine.h"
#include "memory.h"
#include "traffic.h"

namespace emulator {

namespace {

std::string hexadecimal(uint32_t mask) {
  char buffer[16];
  std::snprintf(buffer, sizeof buffer, "0x%08x", mask);
  return buffer;
}

}  // namespace

void Machine::block_barrier(const Site& site) {
  current_->waits_at = site;
  current_->state = State::kAtBarrier;
  current_->fiber->suspend();
}

bool Machine::open_barrier() {
  size_t live = 0;
  const Thread* first = nullptr;
  const Thread* elsewhere = nullptr;
  for (const Thread& thread : threads_) {
    if (thread.state == State::kDone) continue;
    ++live;
    if (thread.state != State::kAtBarrier) return false;
    if (first == nullptr) first = &thread;
    if (thread.waits_at != first->waits_at) elsewhere = &thread;
  }
  if (elsewhere != nullptr) {
    findings().add("divergence", "barrier", first->waits_at, elsewhere->waits_at,
                   "threads of one block wait at different barriers: thread " +
                       std::to_string(first->linear) + " at " + first->waits_at.text() +
                       ", thread " + std::to_string(elsewhere->linear) + " at " +
                       elsewhere->waits_at.text() + where());
  } else if (live != threads_.size()) {
    findings().add("divergence", "barrier", first->waits_at, {},
                   std::to_string(threads_.size() - live) + " of " +
                       std::to_string(threads_.size()) + " threads ended before the barrier at " +
                       first->waits_at.text() + where());
  }
  ++epoch_;
  for (Thread& thread : threads_) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
  traffic().count("barriers");
  return true;
}

uint32_t Machine::existing_lanes(unsigned warp) const {
  const size_t lanes = std::min<size_t>(kLanes, threads_.size() - size_t{warp} * kLanes);
  return lanes == kLanes ? ~0u : (1u << lanes) - 1;
}

const Exchange& Machine::exchange(uint32_t mask, const char* operation, const void* value,
                                  size_t bytes, const Site& site) {
  Thread& thread = *current_;
  const uint32_t lane_bit = 1u << thread.lane;
  mask &= existing_lanes(thread.warp);  // a last, partial warp may be named as a whole one
  if ((mask & lane_bit) == 0) {
    findings().add("divergence", operation, site, {},
                   std::string(operation) + " with mask " + hexadecimal(mask) +
                       " that leaves out its caller, lane " + std::to_string(thread.lane) +
                       ", at " + site.text() + where());
    mask |= lane_bit;
  }
  const MeetingKey key{thread.warp, mask};
  Meeting& meeting = meetings_[key];
  if (meeting.arrived == 0) {
    meeting.operation = operation;
    meeting.site = site;
  } else if (std::strcmp(meeting.operation, operation) != 0 || meeting.site != site) {
    findings().add("divergence", operation, meeting.site, site,
                   "lanes of warp " + std::to_string(thread.warp) +
                       " meet in different operations: " + meeting.operation + " at " +
                       meeting.site.text() + " and " + operation + " at " + site.text() + where());
  }
  Exchange& exchange = meeting.exchanges[meeting.turn];
  std::memcpy(exchange.slot[thread.lane].data(), value, bytes);
  meeting.arrived |= lane_bit;
  if (meeting.arrived == mask) {
    complete(key, meeting);
  } else {
    thread.waits_at = site;
    thread.state = State::kInWarpOperation;
    thread.fiber->suspend();
  }
  return exchange;
}

void Machine::complete(const MeetingKey& key, Meeting& meeting) {
  meeting.exchanges[meeting.turn].lanes = meeting.arrived;
  meeting.turn ^= 1;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((meeting.arrived >> lane & 1u) == 0) continue;
    Thread& thread = threads_[key.first * kLanes + lane];
    if (thread.state == State::kInWarpOperation) thread.state = State::kReady;
  }
  meeting.arrived = 0;
  traffic().count("warp_operations");
}

void Machine::sync_warp(uint32_t mask, const Site& site) {
  auto& mine = current_->clock;
  static_assert(sizeof mine <= Exchange::kSlotBytes);
  const Exchange& all = exchange(mask, "__syncwarp", mine.data(), sizeof mine, site);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((all.lanes >> lane & 1u) == 0) continue;
    std::array<uint32_t, kLanes> theirs;  // as it was when that lane arrived
    std::memcpy(theirs.data(), all.slot[lane].data(), sizeof theirs);
    for (unsigned i = 0; i < kLanes; ++i) mine[i] = std::max(mine[i], theirs[i]);
  }
  ++mine[current_->lane];
}

bool Machine::release_exited() {
  for (auto& [key, meeting] : meetings_) {
    if (meeting.arrived == 0) continue;
    uint32_t missing = key.second & ~meeting.arrived;
    uint32_t ended = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if ((missing >> lane & 1u) != 0 &&
          threads_[key.first * kLanes + lane].state == State::kDone) {
        ended |= 1u << lane;
      }
    }
    if (ended != missing) continue;
    findings().add("divergence", meeting.operation, meeting.site, {},
                   std::string(meeting.operation) + " at " + meeting.site.text() + " names lanes " +
                       hexadecimal(missing) + " of warp " + std::to_string(key.first) +
                       " that have ended" + where());
    complete(key, meeting);
    return true;
  }
  return false;
}

bool Machine::arrive_last(int* counter, int expected, const Site& site) {
  block_barrier(site);
  if (current_->linear == 0) {
    const auto address = reinterpret_cast<uintptr_t>(counter);
    memory().check_space(address, false, "counter of arrive_last", site);
    memory().access(address, sizeof *counter, Kind::kAtomic, site, true);
    Arrivals& arrivals = counters_[counter];
    arrivals.insert(known_.begin(), known_.end());
    arrivals[block_linear_] = epoch_;
    is_last_ = *counter == expected - 1;
    *counter = is_last_ ? 0 : *counter + 1;
    if (is_last_) {
      known_ = std::move(arrivals);
      counters_.erase(counter);
    }
  }
  block_barrier(site);
  return is_last_;
}

bool Machine::knows(int32_t block, uint32_t epoch) const {
  const auto arrival = known_.find(block);
  return arrival != known_.end() && epoch < arrival->second;
}

void Machine::check_counters() {
  for (const auto& [counter, arrivals] : counters_) {
    findings().add("arrival", "arrive_last", {}, {},
                   std::to_string(arrivals.size()) +
                       " blocks arrived at a counter of arrive_last that then stood at " +
                       std::to_string(*counter) + ", not 0 for the next launch" + where());
  }
}

void Machine::report_deadlock() {
  size_t at_barrier = 0;
  const Thread* in_operation = nullptr;
  size_t waiting = 0;
  for (const Thread& thread : threads_) {
    at_barrier += thread.state == State::kAtBarrier;
    if (thread.state != State::kInWarpOperation) continue;
    ++waiting;
    if (in_operation == nullptr) in_operation = &thread;
  }
  findings().add("deadlock", "block", in_operation->waits_at, {},
                 std::to_string(waiting) + " threads wait in a warp operation, the first at " +
                     in_operation->waits_at.text() + ", for lanes that never come; " +
                     std::to_string(at_barrier) + " wait at a barrier" + where());
}

}  // namespace emulator
