// The fibers of a block (emulated.h), for x86-64.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "emulated.h"

#if !defined(__x86_64__)
#error "fibers are switched by x86-64 code"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the registers that a call preserves and the stack pointer, and goes on where `to` did.
extern "C" void ni_switch_fiber(void** from, void* to);
asm(R"(
.text
ni_switch_fiber:
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
)");

namespace ni::emulated {
namespace {

constexpr int kMaxThreads = 1024, kBarriers = 16;
constexpr size_t kStackBytes = 128 << 10, kSharedBytes = 256 << 10;
constexpr int64_t kPatience = 1'000'000'000;  // turns in which no barrier was passed

struct Barrier {
  int arrived = 0;
  unsigned round = 0;
};
struct Warp {
  int running = 0, next_lane = 0;
  Barrier barrier;
  uint64_t values[2][32];  // of this exchange and, still being read, of the one before
};
struct Fiber {
  void* stack = nullptr;
  bool done = false;
};

struct Block {
  alignas(1024) unsigned char shared[kSharedBytes];
  Fiber fibers[kMaxThreads];
  unsigned char* stacks = nullptr;
  Warp warps[kMaxThreads / 32];
  Barrier all, named[kBarriers];
  uint3 index;
  int current = 0, running = 0;
};

Block blocks[kMaxResident];
Block* block = blocks;  // that runs
const std::function<void()>* body = nullptr;
void* launcher = nullptr;
int count = 0;
bool one_by_one = false;
int64_t turns = 0;

void enter(int thread) {
  block->current = thread;
  const auto t = static_cast<unsigned>(thread);
  threadIdx = {t % blockDim.x, t / blockDim.x, 0};
}

void switch_to(int thread) {
  const int from = block->current;
  if (thread == from) return;
  enter(thread);
  ni_switch_fiber(&block->fibers[from].stack, block->fibers[thread].stack);
}

void switch_to_launcher() {
  ni_switch_fiber(&block->fibers[block->current].stack, launcher);
}

// The next lane of the warp that still runs, from `lane` on.
int running_lane(int warp, int lane) {
  const int lanes = std::min(32, count - 32 * warp);
  for (int i = 0; i < lanes; ++i)
    if (const int thread = 32 * warp + (lane + i) % lanes; !block->fibers[thread].done)
      return thread;
  return -1;
}

// Numbers that decide who goes on, the same in every run: $NI_EMULATED_SEED gives others.
uint32_t chance() {
  static uint32_t state = [] {
    const char* seed = std::getenv("NI_EMULATED_SEED");
    return seed == nullptr ? 1u : static_cast<uint32_t>(std::atoi(seed));
  }();
  state = state * 1664525u + 1013904223u;
  return state >> 16;
}

// To another warp, any, so that one may be far ahead or behind; of it, to the lane after the one
// that ran last.
void switch_warp() {
  const int num_warps = (count + 31) / 32;
  block->warps[block->current / 32].next_lane = block->current % 32 + 1;
  const int first = static_cast<int>(chance()) % num_warps;
  for (int i = 0; i < num_warps; ++i) {
    const int warp = (first + i) % num_warps;
    const Warp& w = block->warps[warp];
    if (w.running > 0) return switch_to(running_lane(warp, w.next_lane));
  }
  switch_to_launcher();  // none runs any more
}

void take_turn() {
  if (++turns <= kPatience) return;
  std::fprintf(stderr, "block (%u, %u) hangs, seen from thread %d\n", blockIdx.x, blockIdx.y,
               block->current);
  std::abort();
}

void pass_if_all(Barrier& b, int threads) {
  if (threads == 0 || b.arrived < threads) return;
  b.arrived = 0;
  ++b.round;
  turns = 0;
}

void wait_for(Barrier& b, int threads) {
  const unsigned round = b.round;
  ++b.arrived;
  pass_if_all(b, threads);
  while (b.round == round) yield();
}

// Threads that have ended are waited for no longer.
void run_thread() {
  (*body)();
  block->fibers[block->current].done = true;
  pass_if_all(block->all, --block->running);
  Warp& warp = block->warps[block->current / 32];
  pass_if_all(warp.barrier, --warp.running);
  switch_warp();
}

}  // namespace

unsigned char* dynamic_shared() {
  return block->shared;
}

void yield() {
  take_turn();
  switch_warp();
}

void yield_to_blocks() {
  if (one_by_one || chance() % 2 == 0) return yield();
  take_turn();
  switch_to_launcher();
}
int resident() {
  return static_cast<int>(block - blocks);
}

void synchronise_block() {
  wait_for(block->all, block->running);
}
void synchronise(int barrier, int threads) {
  wait_for(block->named[barrier], threads);
}
void arrive(int barrier, int threads) {
  ++block->named[barrier].arrived;
  pass_if_all(block->named[barrier], threads);
}

const uint64_t* exchange(uint64_t value) {
  if (chance() % 64 == 0) switch_warp();  // others need not wait until this warp does
  Warp& warp = block->warps[block->current / 32];
  uint64_t* values = warp.values[warp.barrier.round % 2];
  values[lane()] = value;
  const unsigned round = warp.barrier.round;
  ++warp.barrier.arrived;
  pass_if_all(warp.barrier, warp.running);
  while (warp.barrier.round == round) {  // others of the warp are what is waited for
    take_turn();
    switch_to(running_lane(block->current / 32, lane() + 1));
  }
  return values;
}

namespace {

void start_block(unsigned number) {
  block->index = {number % gridDim.x, number / gridDim.x % gridDim.y,
                  number / gridDim.x / gridDim.y};
  if (block->stacks == nullptr)
    block->stacks =
        static_cast<unsigned char*>(mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::fill_n(block->shared, kSharedBytes, static_cast<unsigned char>(0xee));
  std::fill_n(block->named, kBarriers, Barrier());
  block->all = {};
  block->running = count;
  for (int i = 0; i < (count + 31) / 32; ++i)
    block->warps[i] = {std::min(32, count - 32 * i), 0, {}, {}};
  for (int i = 0; i < count; ++i) {
    // As ni_switch_fiber leaves a stack: six registers, then where to go on. Calls find it 8 bytes
    // off a multiple of 16.
    auto** top =
        reinterpret_cast<void**>(block->stacks + kStackBytes * static_cast<size_t>(i + 1) - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&run_thread);
    block->fibers[i] = {top - 6, false};
  }
  block->current = 0;
}

}  // namespace

// A block goes on until it has ended or yields to others; then any that did, or the next one.
void run(dim3 grid, dim3 threads, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = threads;
  body = &thread;
  count = static_cast<int>(blockDim.x * blockDim.y);
  one_by_one = chance() % 8 == 0;  // as on a card without room
  const unsigned all = gridDim.x * gridDim.y * gridDim.z;
  int on_their_way = 0;
  for (unsigned next = 0; next < all || on_their_way > 0;) {
    const bool starts =
        next < all && on_their_way < kMaxResident && (on_their_way == 0 || chance() % 2 == 0);
    const int first = static_cast<int>(chance()) % kMaxResident;
    for (int i = 0; i < kMaxResident; ++i) {
      block = &blocks[(first + i) % kMaxResident];
      if ((block->running == 0) == starts) break;
    }
    if (starts) {
      start_block(next++);
      ++on_their_way;
    }
    turns = 0;
    blockIdx = block->index;
    enter(block->current);
    ni_switch_fiber(&launcher, block->fibers[block->current].stack);
    if (block->running == 0) --on_their_way;
  }
}

}  // namespace ni::emulated
