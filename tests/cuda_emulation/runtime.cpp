// The emulated device: threads as fibers, blocks in turns, and the few calls of CUDA's host interface that csrc/cuda
// makes. Built with the kernels into one library; tests set it up through the functions at the end.
//
// One fiber runs at a time. It runs until a barrier, a shuffle, a fence or an atomic, where the scheduler goes on with
// any other thread that may run, of this block or of another one that has been started: at random, by a seed, or with
// the blocks in order or in reverse. Only a thread that waits for others waits, so what is left when nothing can run is
// a deadlock.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a function must preserve, keeps the stack pointer in *save, and goes on where `load` was saved.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, . - emulation_switch
)");

namespace emulation {
namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostApart = 4, kMostResident = 8;  // blocks; a cluster is together
constexpr size_t kStack = 128 << 10, kMostShared = 48 << 10;

struct Settings {
  uint64_t seed = 0;
  int multiprocessors = 132, resident = kMostApart;
  bool capturing = false, captured_elsewhere = false;
  uint64_t stream = 0;
  int device = 0;
  int failing_allocations = 0, failing_memsets = 0;
  bool clusters = true;
} settings;

struct Statistics {
  int64_t launches, blocks, switches, barriers, shuffles, fences, atomics, accesses, allocated, freed, invalidated;
} statistics;

// What a launch has done. Loads: those that kernels ask for by __ldg, of what was there before, and by __ldcg, of what
// other blocks have left; `longest`: most of them by one thread. Barriers: most of one block.
struct Work {
  const char* kernel;
  int64_t blocks, threads, fences, wide_loads, narrow_loads, longest, longest_merge, barriers;
};
std::vector<Work> done, finished;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567) {}
  unsigned operator()(unsigned n) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<unsigned>((state_ >> 33) % n);
  }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[(*this)(static_cast<unsigned>(i))]);
  }

 private:
  uint64_t state_;
};

struct Block;

struct Fiber {
  enum State { kReady, kAtBarrier, kAtClusterBarrier, kShuffles, kDone } state;
  void* stack_pointer;
  char* stack;
  void* asan_stack;  // of AddressSanitizer
  Block* block;
  ThreadTime time;
  unsigned mask;
  uint64_t value;  // that a shuffle gives and takes
  Lane from;
  int argument;
  int64_t loads, merge_loads;
};

struct Block {
  unsigned index;
  BlockTime time;
  std::vector<Fiber> fibers;
  std::vector<ThreadTime*> times;
  unsigned done = 0;
  int64_t barriers = 0;
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, &std::free};
  size_t shared_bytes = 0;
  struct Variable {
    const void* site;
    char* memory;
    size_t bytes;
  };
  std::vector<Variable> variables;
};

char* stacks() {  // of all resident blocks; pages that nobody touches cost nothing
  static char* const memory =
      static_cast<char*>(mmap(nullptr, kMostResident * kMostThreads * kStack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

// NaN, in every type.
char* fresh(size_t bytes) {
  auto* const memory = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256 + (bytes == 0) * 256));
  std::memset(memory, 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory + bytes, (256 - bytes % 256) % 256);
#endif
  return memory;
}

// ---- The launch that runs -------------------------------------------------------------------------------------------

Races races;

class Launch {
 public:
  Launch(const Configuration& configuration, const char* kernel, const std::function<void()>& body)
      : work{kernel, configuration.grid, configuration.block},
        configuration_(configuration),
        kernel_(kernel),
        body_(body),
        random_(settings.seed + statistics.launches) {}

  void run();
  [[noreturn]] void fail(const std::string& why, void* where = nullptr);
  void wait(Fiber::State state);

  Fiber* fiber = nullptr;  // that runs
  std::string failure;
  Work work;
  const std::function<void()>& body() const { return body_; }
  unsigned threads() const { return static_cast<unsigned>(configuration_.block); }
  unsigned blocks() const { return static_cast<unsigned>(configuration_.grid); }
  // What lies in the shared memory of a block of the same cluster where p lies in that of this one, or null.
  char* of_rank(const void* p, unsigned rank);
  // Where the arguments of the launch lie, which nothing writes.
  bool is_host_stack(uintptr_t p) const { return p >= host_stack_ && p < host_stack_ + (1 << 20); }

 private:
  void start(unsigned index);
  void finish(size_t slot);
  bool turn(Block& block, bool all);
  void resume(Fiber& next);
  bool meet(Block& block);
  bool meet_cluster(Block& block);
  unsigned cluster_size() const { return static_cast<unsigned>(configuration_.cluster); }
  std::vector<Block*> cluster_of(const Block& block);
  bool shuffle(Block& block, unsigned warp);

  const Configuration configuration_;
  const char* const kernel_;
  const std::function<void()>& body_;
  Random random_;
  void* scheduler_ = nullptr;
  void* asan_stack_ = nullptr;
  uintptr_t host_stack_ = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<unsigned> free_stacks_;
};

Launch* current = nullptr;

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  current->body()();
  current->wait(Fiber::kDone);
  __builtin_trap();
}

void Launch::resume(Fiber& next) {
  ++statistics.switches;
  fiber = &next;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&asan_stack_, next.stack, kStack);
#endif
  emulation_switch(&scheduler_, next.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(asan_stack_, nullptr, nullptr);
#endif
  fiber = nullptr;
}

void Launch::wait(Fiber::State state) {
  Fiber& self = *fiber;
  self.state = state;
#if defined(__SANITIZE_ADDRESS__)
  static thread_local const void* bottom;
  static thread_local size_t size;
  if (bottom == nullptr) {
    pthread_attr_t attributes;
    void* lowest;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &size);
    pthread_attr_destroy(&attributes);
    bottom = lowest;
  }
  __sanitizer_start_switch_fiber(state == Fiber::kDone ? nullptr : &self.asan_stack, bottom, size);
#endif
  emulation_switch(&self.stack_pointer, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.asan_stack, nullptr, nullptr);
#endif
}

// Leaves the kernel for good: nothing of it runs again.
void Launch::fail(const std::string& why, void* where) {
  failure = std::string(kernel_) + ": " + why;
  Dl_info library;
  if (where != nullptr && dladdr(where, &library) != 0) {
    char offset[32];
    std::snprintf(offset, sizeof offset, "+%#zx]",
                  static_cast<size_t>(static_cast<char*>(where) - static_cast<char*>(library.dli_fbase)) - 1);
    failure += std::string(" [") + library.dli_fname + offset;  // within the call, for addr2line
  }
  wait(Fiber::kDone);
  __builtin_trap();
}

void Launch::start(unsigned index) {
  ++statistics.blocks;
  auto block = std::make_unique<Block>();
  block->index = index;
  block->time.block = races.next_block();
  block->shared_bytes = configuration_.shared;
  block->shared.reset(fresh(configuration_.shared));
  block->fibers.resize(threads());
  const unsigned slot = free_stacks_.back();
  free_stacks_.pop_back();
  for (unsigned t = 0; t < threads(); ++t) {
    Fiber& fiber = block->fibers[t];
    fiber.state = Fiber::kReady;
    fiber.loads = fiber.merge_loads = 0;
    fiber.block = block.get();
    fiber.time.thread = static_cast<uint16_t>(t);
    fiber.stack = stacks() + (slot * kMostThreads + t) * kStack;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, kStack);
    fiber.asan_stack = nullptr;
#endif
    void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 1;  // where it would return to
    *--top = reinterpret_cast<void*>(&entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
    block->times.push_back(&fiber.time);
  }
  resident_.push_back(std::move(block));
}

void Launch::finish(size_t slot) {
  Block& block = *resident_[slot];
  for (const Fiber& one : block.fibers) {
    work.longest = std::max(work.longest, one.loads);
    work.longest_merge = std::max(work.longest_merge, one.merge_loads);
  }
  work.barriers = std::max(work.barriers, block.barriers);
  size_t bytes = block.shared_bytes;
  races.release(reinterpret_cast<uintptr_t>(block.shared.get()), block.shared_bytes);
  for (const auto& variable : block.variables) {
    bytes += variable.bytes;
    races.release(reinterpret_cast<uintptr_t>(variable.memory), variable.bytes);
    std::free(variable.memory);
  }
  if (bytes > kMostShared) failure = std::string(kernel_) + ": " + std::to_string(bytes) + " bytes of shared memory";
  free_stacks_.push_back(static_cast<unsigned>((block.fibers[0].stack - stacks()) / (kMostThreads * kStack)));
  resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(slot));
}

// The shuffle of a warp whose lanes all have come to it.
bool Launch::shuffle(Block& block, unsigned warp) {
  Fiber* const lanes = &block.fibers[warp * kWarp];
  const unsigned n = std::min(kWarp, threads() - warp * kWarp);
  unsigned there = 0;
  for (unsigned lane = 0; lane < n; ++lane) there += lanes[lane].state == Fiber::kShuffles;
  if (there < n) return false;
  uint64_t values[kWarp] = {};
  for (unsigned lane = 0; lane < n; ++lane) {
    const Fiber& one = lanes[lane];
    if (one.mask != 0xffffffff || n < kWarp) failure = "a shuffle of fewer than 32 lanes";
    if (one.from != lanes[0].from) failure = "lanes of a warp shuffle differently";
    const int at = static_cast<int>(lane);
    int source = one.from == Lane::kXor    ? at ^ one.argument
                 : one.from == Lane::kDown ? at + one.argument
                 : one.from == Lane::kUp   ? at - one.argument
                                           : one.argument;
    if (source < 0 || source >= static_cast<int>(n)) source = at;
    values[lane] = lanes[source].value;
  }
  for (unsigned lane = 0; lane < n; ++lane) {
    lanes[lane].value = values[lane];
    lanes[lane].state = Fiber::kReady;
  }
  ++statistics.shuffles;
  return true;
}

// Lets threads go on that have waited for each other.
bool Launch::meet(Block& block) {
  unsigned waiting = 0;
  block.done = 0;
  for (const Fiber& one : block.fibers) {
    waiting += one.state == Fiber::kAtBarrier;
    block.done += one.state == Fiber::kDone;
  }
  if (waiting == 0 || waiting + block.done < block.fibers.size()) return false;
  if (block.done > 0) {
    failure = std::string(kernel_) + ": threads have left before a barrier";
    return false;
  }
  ++statistics.barriers;
  ++block.barriers;
  races.barrier(block.time, block.times);
  for (Fiber& one : block.fibers) one.state = Fiber::kReady;
  return true;
}

// The blocks of a block's cluster that are still there.
std::vector<Block*> Launch::cluster_of(const Block& block) {
  std::vector<Block*> found;
  for (const auto& other : resident_) {
    if (other->index / cluster_size() == block.index / cluster_size()) found.push_back(other.get());
  }
  return found;
}

// The same for the blocks of a cluster.
bool Launch::meet_cluster(Block& block) {
  const std::vector<Block*> blocks = cluster_of(block);
  size_t waiting = 0, left = (cluster_size() - blocks.size()) * threads();
  for (const Block* other : blocks) {
    for (const Fiber& one : other->fibers) {
      waiting += one.state == Fiber::kAtClusterBarrier;
      left += one.state == Fiber::kDone;
    }
  }
  if (waiting == 0 || waiting + left < size_t{cluster_size()} * threads()) return false;
  if (left > 0) {
    failure = std::string(kernel_) + ": threads have left before a barrier of their cluster";
    return false;
  }
  std::vector<BlockTime*> times;
  for (Block* other : blocks) {
    ++statistics.barriers;
    ++other->barriers;
    races.barrier(other->time, other->times);
    times.push_back(&other->time);
    for (Fiber& one : other->fibers) one.state = Fiber::kReady;
  }
  races.cluster_barrier(times);
  return true;
}

char* Launch::of_rank(const void* p, unsigned rank) {
  const Block& own = *fiber->block;
  const auto offset = static_cast<size_t>(static_cast<const char*>(p) - own.shared.get());
  if (offset >= own.shared_bytes) return nullptr;
  for (Block* other : cluster_of(own)) {
    if (other->index % cluster_size() == rank) return other->shared.get() + offset;
  }
  return nullptr;
}

// Runs the threads of a block that may run, or some of its warps. Returns whether there were any.
bool Launch::turn(Block& block, bool all) {
  bool progress = false;
  std::vector<unsigned> warps((threads() + kWarp - 1) / kWarp);
  for (unsigned w = 0; w < warps.size(); ++w) warps[w] = w;
  random_.shuffle(warps);
  for (const unsigned warp : warps) {
    if (!all && random_(2) == 0) continue;
    const unsigned first = warp * kWarp, n = std::min(kWarp, threads() - first);
    const unsigned turn = random_(n);
    for (unsigned lane = 0; lane < n; ++lane) {
      Fiber& one = block.fibers[first + (lane + turn) % n];
      if (one.state != Fiber::kReady) continue;
      progress = true;
      resume(one);
      if (!failure.empty()) return true;
    }
    progress = shuffle(block, warp) || progress;
  }
  return meet(block) || meet_cluster(block) || progress;
}

void Launch::run() {
  if (configuration_.grid <= 0 || configuration_.grid >= int64_t{1} << 31 || configuration_.block <= 0 ||
      configuration_.block > kMostThreads || configuration_.cluster < 1 || configuration_.cluster > kMostResident ||
      configuration_.grid % configuration_.cluster != 0) {
    throw std::runtime_error(std::string(kernel_) + ": there cannot be such a launch");
  }
  races.begin_launch(settings.stream);
  std::vector<unsigned> clusters(this->blocks() / cluster_size()), blocks;  // a cluster is one block mostly
  for (unsigned c = 0; c < clusters.size(); ++c) clusters[c] = c;
  const unsigned order = random_(4);
  if (order == 1) std::reverse(clusters.begin(), clusters.end());
  if (order >= 2) random_.shuffle(clusters);
  for (const unsigned cluster : clusters) {
    for (unsigned rank = 0; rank < cluster_size(); ++rank) blocks.push_back(cluster * cluster_size() + rank);
  }
  size_t room = order == 0 ? 1 : 1 + random_(static_cast<unsigned>(settings.resident));
  room = std::max<size_t>(room, cluster_size());
  for (unsigned slot = 0; slot < kMostResident; ++slot) free_stacks_.push_back(slot);

  size_t started = 0;
  for (unsigned idle = 0; failure.empty() && (started < blocks.size() || !resident_.empty());) {
    while (resident_.size() + cluster_size() <= room && started < blocks.size()) {
      for (unsigned rank = 0; rank < cluster_size(); ++rank) start(blocks[started++]);
    }
    const size_t slot = random_(static_cast<unsigned>(resident_.size()));
    // A block that has begun to run goes on for a while, or for one turn: others fall far behind, or keep pace.
    const unsigned turns = 1 + random_(4) * random_(8);
    bool progress = false;
    for (unsigned i = 0; i < turns && failure.empty() && resident_[slot]->done < threads(); ++i) {
      progress = turn(*resident_[slot], idle > 0) || progress;
    }
    if (!failure.empty()) break;
    idle = progress ? 0 : idle + 1;
    if (resident_[slot]->done == threads()) {
      finish(slot);
    } else if (idle > 100) {
      failure = std::string(kernel_) + ": deadlock: threads wait for others that do not come";
    } else {
      meet(*resident_[slot]);
      meet_cluster(*resident_[slot]);
      if (resident_[slot]->done == threads()) finish(slot);
    }
  }
  while (!failure.empty() && !resident_.empty()) finish(0);
  ++statistics.launches;
  done.push_back(work);
  if (!failure.empty()) throw std::runtime_error("emulation: " + failure);
}

}  // namespace

// ---- What kernels call ----------------------------------------------------------------------------------------------

void run(const Configuration& configuration, const char* kernel, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Launch launch(configuration, kernel, body);
  current = &launch;
  struct End {
    ~End() { current = nullptr; }
  } const end;
  launch.run();
}

unsigned thread_index() { return current->fiber->time.thread; }
unsigned block_index() { return current->fiber->block->index; }
unsigned block_size() { return current->threads(); }
unsigned grid_size() { return current->blocks(); }

void barrier() { current->wait(Fiber::kAtBarrier); }

void cluster_barrier() { current->wait(Fiber::kAtClusterBarrier); }

const void* of_rank(const void* own, int rank) {
  const void* const there = current->of_rank(own, static_cast<unsigned>(rank));
  if (there == nullptr) current->fail("reads shared memory of a block that has left", __builtin_return_address(0));
  return there;
}

void fence() {
  ++statistics.fences;
  ++current->work.fences;
  current->wait(Fiber::kReady);
  races.fence(current->fiber->block->time, current->fiber->time);
}

unsigned atomic(unsigned* p, Change change, unsigned argument, Order order) {
  ++statistics.atomics;
  check_alignment(p, alignof(unsigned), "an atomic");
  if (order != Order::relaxed) {  // a fence is made for it
    ++statistics.fences;
    ++current->work.fences;
  }
  current->wait(Fiber::kReady);
  races.atomic(p, current->fiber->block->time, current->fiber->time, order == Order::acquire || order == Order::acq_rel,
               order == Order::release || order == Order::acq_rel);
  const unsigned old = *p;
  *p = change(old, argument);
  return old;
}

uint64_t shuffle(unsigned mask, uint64_t value, Lane from, int argument) {
  Fiber& self = *current->fiber;
  self.mask = mask;
  self.value = value;
  self.from = from;
  self.argument = argument;
  current->wait(Fiber::kShuffles);
  return self.value;
}

void* dynamic_shared() { return current->fiber->block->shared.get(); }

void* static_shared(const void* site, size_t bytes) {
  auto& variables = current->fiber->block->variables;
  for (const auto& variable : variables) {
    if (variable.site == site) return variable.memory;
  }
  return variables.emplace_back(Block::Variable{site, fresh(bytes), bytes}).memory;
}

// Out of line, and with the alignment as a number: the compiler takes it for granted that a type is aligned.
__attribute__((noinline)) void check_alignment(const void* p, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % alignment == 0) return;
  if (current != nullptr && current->fiber != nullptr) {
    current->fail("misaligned: " + std::string(what), __builtin_return_address(0));
  }
}

__attribute__((noinline)) void check_constant(const void* p, size_t bytes, size_t alignment) {
  check_alignment(p, alignment, "__ldg");
#if defined(EMULATION_RACES)
  const std::string wrong = races.constant(reinterpret_cast<uintptr_t>(p), bytes);
  if (!wrong.empty()) current->fail(wrong, __builtin_return_address(0));
#else
  static_cast<void>(bytes);
#endif
}

void count_load(size_t bytes, bool of_other_blocks) {
  current->fiber->merge_loads += of_other_blocks;
  ++(bytes == 16 ? current->work.wide_loads : current->work.narrow_loads);
  ++current->fiber->loads;
}

int device_index() { return settings.device; }

static int active_mutant = -1;
bool mutant(int number) { return number == active_mutant; }

// ---- What the compiler calls before every access, with -fsanitize=thread
// ----------------------------------------------

namespace {

void access(const void* p, size_t bytes, bool write, void* where) {
  if (current == nullptr || current->fiber == nullptr) return;  // the host's
  const auto address = reinterpret_cast<uintptr_t>(p);
  const uintptr_t own = reinterpret_cast<uintptr_t>(stacks());
  if (address - own < kMostResident * kMostThreads * kStack || current->is_host_stack(address)) return;
  ++statistics.accesses;
  const Fiber& fiber = *current->fiber;
  const std::string wrong = races.access(fiber.block->time, fiber.time, address, bytes, write);
  if (!wrong.empty()) current->fail(wrong, where);
}

}  // namespace
}  // namespace emulation

#if defined(EMULATION_RACES)
#define EMULATION_ACCESS(bytes)                                                                                   \
  void __tsan_read##bytes(void* p) { emulation::access(p, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* p) { emulation::access(p, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulation::access(p, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* p) { emulation::access(p, bytes, true, __builtin_return_address(0)); }
extern "C" {
EMULATION_ACCESS(1)
EMULATION_ACCESS(2)
EMULATION_ACCESS(4)
EMULATION_ACCESS(8)
EMULATION_ACCESS(16)
void __tsan_read_range(void* p, size_t n) { emulation::access(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { emulation::access(p, n, true, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
// Of the host's code: reference counts, and the guards of static variables.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
unsigned __tsan_atomic32_load(const volatile unsigned* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(volatile unsigned* p, unsigned x, int) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }
unsigned __tsan_atomic32_fetch_add(volatile unsigned* p, unsigned x, int) {
  return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);
}
unsigned long __tsan_atomic64_load(const volatile unsigned long* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
void __tsan_atomic64_store(volatile unsigned long* p, unsigned long x, int) {
  __atomic_store_n(p, x, __ATOMIC_SEQ_CST);
}
unsigned long __tsan_atomic64_fetch_add(volatile unsigned long* p, unsigned long x, int) {
  return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);
}
}
#endif

// ---- CUDA's host interface ------------------------------------------------------------------------------------------

using emulation::settings;
using emulation::statistics;

static cudaError_t last_error = cudaSuccess;
static std::map<void*, size_t> allocations;

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = settings.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

static cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

// What is not itself captured and may be unsafe: while another stream is captured it fails, and the capture with it.
static bool is_prohibited() {
  if (!settings.captured_elsewhere || capture_mode == cudaStreamCaptureModeRelaxed) return false;
  ++statistics.invalidated;
  last_error = cudaErrorStreamCaptureUnsupported;
  return true;
}

cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 7 + settings.stream;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (is_prohibited()) return last_error;
  if (settings.failing_allocations > 0) {
    --settings.failing_allocations;
    return last_error = cudaErrorMemoryAllocation;
  }
  *p = emulation::fresh(bytes);
  allocations[*p] = bytes;
  ++statistics.allocated;
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }

cudaError_t cudaFree(void* p) {
  if (is_prohibited()) return last_error;
  if (p != nullptr && allocations.erase(p) == 0)
    throw std::runtime_error("emulation: cudaFree of what was not allocated");
  statistics.freed += p != nullptr;
  std::free(p);
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (settings.failing_memsets > 0) {
    --settings.failing_memsets;
    return last_error = cudaErrorStreamCaptureUnsupported;
  }
  std::memset(p, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrClusterLaunch ? settings.clusters : settings.multiprocessors;
  return cudaSuccess;
}

extern "C" {

int torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  if (error != cudaSuccess && asprintf(message, "CUDA error %d", error) < 0) std::abort();
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(settings.stream);
  return 0;
}

// ---- The tests' interface -------------------------------------------------------------------------------------------

#define EXPORTED __attribute__((visibility("default")))

// resident: blocks that run at once, at most. capturing: 1, the current stream; 2, another. stream: that is current.
EXPORTED void emulation_set(uint64_t seed, int multiprocessors, int resident, int capturing, uint64_t stream,
                            int device, int clusters) {
  settings.seed = seed;
  settings.multiprocessors = multiprocessors;
  settings.resident = std::min<int>(resident, emulation::kMostApart);
  settings.capturing = capturing == 1;
  settings.captured_elsewhere = capturing == 2;
  settings.stream = stream;
  settings.device = device;
  settings.clusters = clusters != 0;
}

EXPORTED void emulation_fail(int allocations, int memsets) {
  settings.failing_allocations = allocations;
  settings.failing_memsets = memsets;
}

EXPORTED void emulation_mutate(int number) { emulation::active_mutant = number; }

// Waits for all streams: what comes is ordered behind what has been.
EXPORTED void emulation_synchronize() { emulation::races.forget(); }

// After a launch that has failed in the middle: as its memory was when it was new and zeroed.
EXPORTED void emulation_reset() {
  for (const auto& [p, bytes] : allocations) std::memset(p, 0, bytes);
  emulation::races.forget();
}

// The launches since this was called last: how many, and one of them.
EXPORTED int64_t emulation_launches() {
  emulation::finished = std::exchange(emulation::done, {});
  return static_cast<int64_t>(emulation::finished.size());
}
EXPORTED const char* emulation_launch(int64_t i, int64_t* to) {
  const emulation::Work& work = emulation::finished[static_cast<size_t>(i)];
  std::memcpy(to, &work.blocks, sizeof work - offsetof(emulation::Work, blocks));
  return work.kernel;
}

EXPORTED void emulation_statistics(int64_t* to) { std::memcpy(to, &statistics, sizeof statistics); }
}
