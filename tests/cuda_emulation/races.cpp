#include "races.h"

#include <algorithm>
#include <cstdio>

namespace emulation {

// ---- Time -----------------------------------------------------------------------------------------------------------

void Clock::join(const Clock& other) {
  for (const auto& [block, of_other] : other.blocks_) {
    OfBlock& mine = blocks_[block];
    if (of_other.phase > mine.phase) {
      mine = of_other;
    } else if (of_other.phase == mine.phase) {
      for (const auto& [thread, step] : of_other.steps) mine.steps[thread] = std::max(mine.steps[thread], step);
    }
  }
}

void Clock::know(const Stamp& until) {
  OfBlock& mine = blocks_[until.block];
  if (until.phase > mine.phase) mine = {until.phase, {}};
  if (until.phase == mine.phase) mine.steps[until.thread] = std::max(mine.steps[until.thread], until.step);
}

bool Clock::knows(const Stamp& access) const {
  const auto found = blocks_.find(access.block);
  if (found == blocks_.end() || access.phase > found->second.phase) return false;
  if (access.phase < found->second.phase) return true;
  const auto step = found->second.steps.find(access.thread);
  return step != found->second.steps.end() && access.step < step->second;
}

void Races::barrier(BlockTime& block, const std::vector<ThreadTime*>& threads) {
  for (ThreadTime* thread : threads) {
    if (!thread->known.empty()) block.known.join(thread->known);
    thread->known.clear();
    thread->step = 0;
  }
  ++block.phase;
}

void Races::cluster_barrier(const std::vector<BlockTime*>& blocks) {
  Clock all;
  for (const BlockTime* block : blocks) {
    all.join(block->known);
    all.know({block->block, block->phase});
  }
  for (BlockTime* block : blocks) block->known.join(all);
}

void Races::fence(const BlockTime& block, ThreadTime& thread) {
  acquire(thread);
  release(block, thread);
}

void Races::acquire(ThreadTime& thread) {
  thread.known.join(thread.read);
  thread.read.clear();
}

void Races::release(const BlockTime& block, ThreadTime& thread) {
  ++thread.step;
  thread.released = block.known;
  thread.released.join(thread.known);
  thread.released.know({block.block, block.phase, thread.thread, thread.step});
}

void Races::atomic(const void* p, const BlockTime& block, ThreadTime& thread, bool acquires, bool releases) {
  if (releases) release(block, thread);
  Clock& left = atomics_[p];
  thread.read.join(left);
  left.join(thread.released);
  if (acquires) acquire(thread);
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

void Races::begin_launch(uint64_t stream) {
  if (!several_streams_ && stream != stream_ && next_block_ != oldest_block_) several_streams_ = true;
  first_block_ = next_block_;
  if (!several_streams_) {
    if (pages_.size() > (64 << 20) / sizeof(Page)) forget();
    oldest_block_ = first_block_;
    streams_.clear();
    atomics_.clear();
    reads_.resize(1);
  }
  stream_ = stream;
  streams_[first_block_] = stream;
}

void Races::forget() {
  for (const auto& [number, page] : pages_) delete page;
  pages_.clear();
  for (auto& recent : recent_) recent = {};
  several_streams_ = false;
  oldest_block_ = next_block_;
  streams_.clear();
  atomics_.clear();
  reads_.resize(1);
}

uint64_t Races::stream_of(uint32_t block) const { return std::prev(streams_.upper_bound(block))->second; }

Races::Cell* Races::cells_of(uintptr_t address) {
  const uintptr_t number = address >> kPageBits;
  auto& recent = recent_[number % 256];
  if (recent.number != number) {
    Page*& page = pages_[number];
    if (page == nullptr) page = new Page;
    recent = {number, page};
  }
  return recent.page->cells + (address & ((1 << kPageBits) - 1)) / kGrain;
}

bool Races::ordered(const Stamp& before, const BlockTime& block, const ThreadTime& thread) const {
  if (before.block == block.block) return before.phase < block.phase || before.thread == thread.thread;
  if (before.block < first_block_) return stream_of(before.block) == stream_;
  return block.known.knows(before) || thread.known.knows(before);
}

void Races::note_read(Cell& cell, const Stamp& now) {
  if (!current(cell.read)) {
    cell.read = now;
    cell.more_reads = 0;
    return;
  }
  if (cell.read.block != now.block) {
    if (cell.more_reads == 0) {
      cell.more_reads = static_cast<uint32_t>(reads_.size());
      reads_.emplace_back();
    }
    auto& others = reads_[cell.more_reads];
    const auto same_block = [&](const Stamp& read) { return read.block == now.block; };
    const auto mine = std::find_if(others.rbegin(), others.rend(), same_block);
    if (mine == others.rend()) {
      others.push_back(cell.read);
      cell.read = now;
      return;
    }
    std::swap(cell.read, *mine);
  }
  // The latest phase of a block stands for all earlier ones: who knows it knows them.
  if (cell.read.phase == now.phase && cell.read.thread != now.thread) {
    cell.read.thread = Stamp::kSeveral;
  } else {
    cell.read = now;
  }
}

static std::string describe(const char* what, uintptr_t address, const BlockTime& block, const ThreadTime& thread,
                            const char* did, const Stamp& other, uint32_t first_block) {
  char text[400];
  char who[40];
  std::snprintf(who, sizeof who, other.thread == Stamp::kSeveral ? "several threads" : "thread %u", other.thread);
  std::snprintf(text, sizeof text,
                "race: thread %u of block %u %s %#zx, which %s of %s %d %s, and nothing orders the two", thread.thread,
                block.block - first_block, what, static_cast<size_t>(address), who,
                other.block < first_block ? "an earlier launch on another stream, block" : "block",
                static_cast<int>(other.block) - static_cast<int>(first_block), did);
  return text;
}

std::string Races::access(const BlockTime& block, const ThreadTime& thread, uintptr_t address, size_t bytes,
                          bool write) {
  const Stamp now{block.block, block.phase, thread.thread, thread.step};
  for (uintptr_t at = address / kGrain * kGrain; at < address + bytes;) {
    const uintptr_t end = std::min(address + bytes, ((at >> kPageBits) + 1) << kPageBits);
    for (Cell* cell = cells_of(at); at < end; at += kGrain, ++cell) {
      if (current(cell->write) && !ordered(cell->write, block, thread)) {
        return describe(write ? "writes" : "reads", at, block, thread, "has written", cell->write, first_block_);
      }
      if (!write) {
        note_read(*cell, now);
        continue;
      }
      if (cell->constant == first_block_) return "a store to what the launch has read by __ldg";
      if (cell->constant >= oldest_block_ && stream_of(cell->constant) != stream_) {
        return "a store to what a launch on another stream has read by __ldg";
      }
      if (current(cell->read)) {
        if (!ordered(cell->read, block, thread)) {
          return describe("writes", at, block, thread, "has read", cell->read, first_block_);
        }
        for (const Stamp& read : reads_[cell->more_reads]) {
          if (!ordered(read, block, thread)) {
            return describe("writes", at, block, thread, "has read", read, first_block_);
          }
        }
      }
      cell->write = now;
      cell->read = {};
      cell->more_reads = 0;
    }
  }
  return {};
}

std::string Races::constant(uintptr_t address, size_t bytes) {
  for (uintptr_t at = address; at < address + bytes; at += kGrain) {
    Cell& cell = *cells_of(at);
    const bool earlier =
        cell.write.block < first_block_ && (!current(cell.write) || stream_of(cell.write.block) == stream_);
    if (!earlier) return "a read by __ldg of what the launch has written";
    cell.constant = first_block_;
  }
  return {};
}

void Races::release(uintptr_t address, size_t bytes) {
  for (uintptr_t at = address / kGrain * kGrain; at < address + bytes; at += kGrain) *cells_of(at) = {};
}

}  // namespace emulation
