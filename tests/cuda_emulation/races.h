// Which accesses of which threads are ordered, by CUDA's memory model, and those to the same memory that are not.
//
// The compiler calls the detector before every load and store of a kernel (g++ -fsanitize=thread, whose runtime this
// replaces). Two accesses to the same bytes, at least one of them a store, by different threads, are a race unless
// something orders them, whatever values they happen to see and in whatever order they happen to run:
//
//   a barrier   what a block's threads did before it, with what they do after it; one of a cluster, its blocks' threads
//   a fence     what came before the fence of one thread, with what comes after the fence of another, where the first
//               has changed an atomic after its fence, and the second has read from that before its own
//   a launch    everything of earlier launches on the same stream, with everything of later ones
//
// So a missing barrier or fence shows in every run in which both accesses happen, not only in the unlucky ones. Time is
// counted in phases: a block's phase ends at a barrier. A thread knows, of each block, up to which phase all its
// accesses are ordered before its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulation {

// When an access was made. Blocks are numbered over all launches.
struct Stamp {
  uint32_t block = 0, phase = 0;
  uint16_t thread = 0;  // or kSeveral
  uint16_t step = 0;    // fences of the thread in this phase

  static constexpr uint16_t kSeveral = 0xffff;
};

// What is known of other blocks.
class Clock {
 public:
  void join(const Clock& other);
  void know(const Stamp& until);  // all earlier phases of its block, and earlier steps of its thread
  bool knows(const Stamp& access) const;
  bool empty() const { return blocks_.empty(); }
  void clear() { blocks_.clear(); }

 private:
  struct OfBlock {
    uint32_t phase = 0;                  // phases before this one
    std::map<uint16_t, uint16_t> steps;  // of this phase: of a thread, the steps before this one
  };
  std::map<uint32_t, OfBlock> blocks_;
};

struct BlockTime {
  uint32_t block;
  uint32_t phase = 0;
  Clock known;  // by all threads
};

struct ThreadTime {
  uint16_t thread;
  uint16_t step = 0;
  Clock known;     // beyond what the block knows
  Clock read;      // from atomics, since the last fence
  Clock released;  // at the last fence
};

class Races {
 public:
  // Launches on one stream are ordered, those of different streams only by forget().
  void begin_launch(uint64_t stream);
  uint32_t next_block() { return next_block_++; }
  void forget();

  void barrier(BlockTime& block, const std::vector<ThreadTime*>& threads);
  // Behind a barrier of each of these blocks, which wait for each other.
  static void cluster_barrier(const std::vector<BlockTime*>& blocks);
  void fence(const BlockTime& block, ThreadTime& thread);
  // An atomic may itself be the fence: acquire is one behind it, release one before it.
  void atomic(const void* p, const BlockTime& block, ThreadTime& thread, bool acquires, bool releases);

  // Returns what is wrong, or nothing.
  std::string access(const BlockTime& block, const ThreadTime& thread, uintptr_t address, size_t bytes, bool write);
  std::string constant(uintptr_t address, size_t bytes);
  // Memory that has been given back: it may be given to others.
  void release(uintptr_t address, size_t bytes);

 private:
  static constexpr int kGrain = 2;  // bytes: no kernel has threads that share less
  static constexpr int kPageBits = 12;

  struct Cell {
    Stamp write, read;
    uint32_t more_reads = 0;  // of other blocks: an index, where read.block is of this launch
    uint32_t constant = 0;    // the first block of the last launch that has read it as a constant
  };
  struct Page {
    Cell cells[(1 << kPageBits) / kGrain];
  };

  Cell* cells_of(uintptr_t address);  // up to the end of its page
  bool current(const Stamp& stamp) const { return stamp.block >= oldest_block_; }
  bool ordered(const Stamp& before, const BlockTime& block, const ThreadTime& thread) const;
  void note_read(Cell& cell, const Stamp& now);
  uint64_t stream_of(uint32_t block) const;

  std::map<uintptr_t, Page*> pages_;
  struct {
    uintptr_t number = ~uintptr_t{0};
    Page* page = nullptr;
  } recent_[256];
  std::vector<std::vector<Stamp>> reads_{1};  // 0: none
  static void acquire(ThreadTime& thread);
  static void release(const BlockTime& block, ThreadTime& thread);

  std::map<const void*, Clock> atomics_;
  uint32_t next_block_ = 1, first_block_ = 1, oldest_block_ = 1;  // of the launch; of launches that still count
  uint64_t stream_ = 0;
  bool several_streams_ = false;
  std::map<uint32_t, uint64_t> streams_;  // by the first block of a launch
};

}  // namespace emulation
