#undef _FORTIFY_SOURCE  // which takes jumps from one stack to another for errors
#include "cuda_shim.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The bounds of what `__shared__` puts into its section; absent where no kernel has static shared memory.
extern "C" __attribute__((weak)) unsigned char __start_nm_shared[], __stop_nm_shared[];

namespace emulator {
namespace {

constexpr size_t kStack = 64 * 1024;

// Copies that are on their way, and the commits they were made before.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int commit;
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
  jmp_buf place;  // where it goes on
  State state = State::kReady;
  uint3 index;
  // What it waits for.
  Wait kind;
  const char* file;
  int line;
  uint64_t value;
  int source;
  uint64_t result;
  std::vector<Copy> copies;
  int commits;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch for their stacks
jmp_buf scheduler;
ucontext_t beginner;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
int64_t launched = 0;
bool backwards = false;
std::string fault;  // what a fiber found wrong: an exception cannot leave its stack
std::unique_ptr<unsigned char[]> shared_memory;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void enter(const void* stack, size_t size, void** fake) {
  __sanitizer_start_switch_fiber(fake, stack, size);
}
void entered(void* fake, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(fake, from, size);
}
#endif

void switch_to(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  enter(fiber.stack.get(), kStack, &fake);
#endif
  if (_setjmp(scheduler) == 0) _longjmp(fiber.place, 1);
#if defined(__SANITIZE_ADDRESS__)
  entered(fake, nullptr, nullptr);
#endif
}

void switch_back() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  enter(scheduler_stack, scheduler_stack_size, &fake);
#endif
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  entered(fake, &scheduler_stack, &scheduler_stack_size);
#endif
}

// One body after another, once begin() has been told that the stack is in use.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  entered(nullptr, &scheduler_stack, &scheduler_stack_size);
  void* fake = nullptr;
  enter(scheduler_stack, scheduler_stack_size, &fake);
#endif
  if (_setjmp(current->place) == 0) setcontext(&beginner);
#if defined(__SANITIZE_ADDRESS__)
  entered(fake, &scheduler_stack, &scheduler_stack_size);
#endif
  for (;;) {
    (*body)();
    current->state = State::kDone;
    switch_back();
  }
}

// A change of context takes a system call, so it only gives a fiber its stack: from then on there are jumps.
void begin(Fiber& fiber) {
  fiber.stack.reset(new unsigned char[kStack]);
  current = &fiber;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  enter(fiber.stack.get(), kStack, &fake);
#endif
  swapcontext(&beginner, &context);
#if defined(__SANITIZE_ADDRESS__)
  entered(fake, nullptr, nullptr);
#endif
}

std::string place(const Fiber& fiber) {
  return std::string(fiber.file) + ":" + std::to_string(fiber.line);
}

[[noreturn]] void divergent(const char* what, const Fiber& one, const Fiber& other) {
  const std::string there = other.state == State::kDone ? "has ended"
                            : other.line == one.line    ? "waits for something else there"
                                                        : "waits at " + place(other);
  throw std::runtime_error("divergent " + std::string(what) + ": thread " + std::to_string(one.index.x) + " waits at " +
                           place(one) + ", thread " + std::to_string(other.index.x) + " " + there);
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.kind == b.kind && a.line == b.line && a.file == b.file;
}

// Lets the warps go on whose lanes have all come to the same shuffle; true if there was one.
bool release_warps(size_t threads) {
  bool released = false;
  for (size_t first = 0; first < threads; first += warpSize) {
    bool complete = true;
    for (size_t i = first; i < first + warpSize; ++i) {
      const Fiber& fiber = *fibers[i];
      complete &= fiber.state == State::kWaiting && fiber.kind == Wait::kWarp && same_place(fiber, *fibers[first]);
    }
    if (!complete) continue;
    for (size_t i = first; i < first + warpSize; ++i) fibers[i]->result = fibers[first + fibers[i]->source]->value;
    for (size_t i = first; i < first + warpSize; ++i) fibers[i]->state = State::kReady;
    released = true;
  }
  return released;
}

// Nothing runs and no warp can go on: either all threads are at one barrier, which lets them go on, or it is a fault.
void release_block(size_t threads) {
  const Fiber* waiting = nullptr;
  for (size_t i = 0; i < threads; ++i)
    if (fibers[i]->state == State::kWaiting && (!waiting || fibers[i]->kind == Wait::kWarp)) waiting = fibers[i].get();
  const bool warp = waiting->kind == Wait::kWarp;
  const size_t number = waiting->index.x + blockDim.x * (waiting->index.y + blockDim.y * waiting->index.z);
  const size_t first = warp ? number / warpSize * warpSize : 0;
  for (size_t i = first; i < (warp ? first + warpSize : threads); ++i)
    if (fibers[i]->state == State::kDone || !same_place(*fibers[i], *waiting))
      divergent(warp ? "shuffle" : "barrier", *waiting, *fibers[i]);
  for (size_t i = 0; i < threads; ++i) fibers[i]->state = State::kReady;
}

__attribute__((no_sanitize("address"))) void poison_shared(size_t dynamic_bytes) {
  if (__start_nm_shared != nullptr)
    for (volatile unsigned char* byte = __start_nm_shared; byte != __stop_nm_shared; ++byte) *byte = 0xff;
  shared_memory.reset(dynamic_bytes ? new unsigned char[dynamic_bytes] : nullptr);
  if (dynamic_bytes) memset(shared_memory.get(), 0xff, dynamic_bytes);
}

void prepare(Fiber& fiber, size_t number) {
  if (fiber.state != State::kDone) begin(fiber);  // for the first time, or left in the middle by a fault
  fiber.state = State::kReady;
  fiber.copies.clear();
  fiber.commits = 0;
  fiber.index = {unsigned(number % blockDim.x), unsigned(number / blockDim.x % blockDim.y),
                 unsigned(number / blockDim.x / blockDim.y)};
}

void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) prepare(*fibers[i], i);
  for (;;) {
    bool done = true, ran = false;
    for (size_t i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[backwards ? threads - 1 - i : i];
      if (fiber.state == State::kReady) {
        switch_to(fiber);
        ran = true;
        if (!fault.empty()) throw std::runtime_error(std::exchange(fault, ""));
      }
      done &= fiber.state == State::kDone;
    }
    if (done) return;
    if (!release_warps(threads) && !ran) release_block(threads);
  }
}

}  // namespace

bool reversed() {
  const char* wish = std::getenv("NORMATCH_EMULATOR_ORDER");
  return wish != nullptr && std::string(wish) == "reversed";
}

void* dynamic_shared() {
  return shared_memory.get();
}

int64_t launches() {
  return launched;
}

void copy_async(void* to, const void* from, size_t bytes) {
  if ((bytes != 4 && bytes != 8 && bytes != 16) || (uintptr_t(to) | uintptr_t(from)) % bytes)
    fault = "an asynchronous copy of " + std::to_string(bytes) + " bytes, or to or from where it may not be";
  current->copies.push_back({to, from, bytes, current->commits});
}

void commit_copies() {
  ++current->commits;
}

void wait_for_copies(int but_the_last) {
  std::vector<Copy>& copies = current->copies;
  const auto is_done = [&](const Copy& copy) { return copy.commit < current->commits - but_the_last; };
  for (const Copy& copy : copies)
    if (is_done(copy)) memcpy(copy.to, copy.from, copy.bytes);
  copies.erase(std::remove_if(copies.begin(), copies.end(), is_done), copies.end());
}

int lane() {
  return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize);
}

uint64_t wait(Wait kind, uint64_t value, int source, unsigned mask, const char* file, int line) {
  Fiber& self = *current;
  if (mask != 0xffffffffu) fault = "a shuffle of less than the full warp at " + std::string(file);
  self.state = State::kWaiting;
  self.kind = kind;
  self.value = value;
  self.source = source;
  self.file = file;
  self.line = line;
  switch_back();
  return self.result;
}

void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& kernel) {
  static std::mutex mutex;  // shared memory is static, and there is one scheduler
  const std::lock_guard<std::mutex> lock(mutex);
  backwards = reversed();
  ++launched;
  const size_t threads = size_t(block.x) * block.y * block.z;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || threads % warpSize)
    throw std::runtime_error("a block of " + std::to_string(threads) + " threads: not a multiple of 32 up to 1024");
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("a grid of " + std::to_string(blocks) + " blocks, or too many in one direction");
  if (dynamic_shared_bytes > kSharedLimit)
    throw std::runtime_error(std::to_string(dynamic_shared_bytes) + " bytes of shared memory: no GPU has so much");

  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  blockDim = block;
  gridDim = grid;
  body = &kernel;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t number = backwards ? blocks - 1 - i : i;
    blockIdx = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    poison_shared(dynamic_shared_bytes);
    run_block(threads);
  }
}

}  // namespace emulator
