// Fibers, barriers, collectives, shared memory, and what is wrong with their use.
//
// Compiled without the sanitizers: what happens here is not the kernel's. Under ThreadSanitizer only
// barriers,
// __syncwarp and the ends of a launch order memory, so that accesses which nothing else separates are races.
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "context.h"
#include "emulator_runtime.h"

#ifdef __x86_64__
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
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
#endif

namespace emulator {

Thread* current = nullptr;

namespace {

constexpr int kWarp = 32, kMostThreads = 1024, kGap = 64;
constexpr size_t kMostShared = 227 << 10, kMostStaticShared = 48 << 10;
constexpr size_t kArena = 320 << 10;  // shared memory and the gaps between its arrays
constexpr size_t kPage = 4096;
constexpr unsigned char kPoison = 0xff, kGapFill = 0xa5;

struct Schedule {
  enum Order { kGreedy, kReverse, kRandom } order = kGreedy;
  uint32_t seed = 0;
  bool late_copies = true;  // cp.async completes when it is waited for, not when it is asked for
};

Schedule parse(const std::string& text) {
  Schedule schedule;
  std::string rest = text;
  const auto next = [&rest] {
    const size_t colon = rest.find(':');
    const std::string word = rest.substr(0, colon);
    rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
    return word;
  };
  const std::string order = next();
  if (order == "reverse") schedule.order = Schedule::kReverse;
  if (order == "random") {
    schedule.order = Schedule::kRandom;
    schedule.seed = static_cast<uint32_t>(std::strtoul(next().c_str(), nullptr, 10));
  }
  const std::string copies = next();
  schedule.late_copies = copies != "early";
  if ((order != "greedy" && order != "reverse" && order != "random") ||
      (copies != "" && copies != "early" && copies != "late") || !rest.empty()) {
    throw std::runtime_error("emulator: no schedule '" + text +
                             "': it is greedy, reverse or random:SEED, with :early or :late after it");
  }
  return schedule;
}

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  Context context;
  Thread thread;
  enum { kReady, kWaiting, kDone } state;
  const char* waits_at;
  Site site;
  std::vector<std::vector<Copy>> groups;  // of cp.async, committed
  std::vector<Copy> open;                 // not yet committed
};

// Lanes of a warp that meet under one mask.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  Site site;
  int round = 0;
  char* sync = nullptr;  // two addresses that the sanitizer orders by, one a round
  Words words[2][kWarp];
};

struct Warp {
  uint32_t gone = 0;  // lanes that have exited, or that the block is too small to have
  std::vector<Meeting> meetings;
};

struct Array {
  const char* declaration;
  const char* name;
  char* memory;
  size_t bytes;
};

struct Block {
  int threads = 0, alive = 0;
  std::vector<Warp> warps;
  int arrived = 0, sum[2] = {0, 0}, round = 0;
  const char* barrier_name = nullptr;
  Site barrier_site{};
  char *arena = nullptr, *stacks = nullptr;
  int guarded = 0;  // stacks whose lowest page is forbidden
  size_t used = 0, static_bytes = 0;
  std::vector<Array> arrays;
  unsigned char* dynamic = nullptr;
  char* sync = nullptr;
};

std::mutex one_launch;
Schedule schedule =
    parse(std::getenv("FASTGPT_EMULATOR_SCHEDULE") ? std::getenv("FASTGPT_EMULATOR_SCHEDULE") : "greedy");
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<int> order;       // of the block's threads: the first that is ready runs
std::vector<int> rank;        // of each thread in it
std::vector<uint64_t> ready;  // a bit for each rank
Context caller;
Block block;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
const char* kernel = "";
std::string failure;
std::mt19937 generator;
uint64_t most_blocks = UINT64_MAX;  // of a launch that run, the last
char begins, ends;

int index_of(const Fiber& fiber) {
  const Thread& t = fiber.thread;
  return (t.thread.z * t.block_size.y + t.thread.y) * t.block_size.x + t.thread.x;
}

void set_ready(int thread, bool is) {
  const int at = rank[thread];
  const uint64_t bit = uint64_t{1} << at % 64;
  ready[at / 64] = is ? ready[at / 64] | bit : ready[at / 64] & ~bit;
  if (is) fibers[thread]->state = Fiber::kReady;
}

// The thread that runs next, or -1.
int choose() {
  int count = 0;
  for (const uint64_t bits : ready) count += __builtin_popcountll(bits);
  if (count == 0) return -1;
  int skip = schedule.order == Schedule::kRandom ? generator() % count : 0;
  for (size_t word = 0;; ++word) {
    for (uint64_t bits = ready[word]; bits != 0; bits &= bits - 1) {
      if (skip-- == 0) return order[word * 64 + __builtin_ctzll(bits)];
    }
  }
}

std::string text(Site site) {
  std::string file = site.file;
  const size_t slash = file.rfind('/');
  return file.substr(slash == std::string::npos ? 0 : slash + 1) + ":" + std::to_string(site.line);
}

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

std::string where() {
  return ", in block " + text(running->thread.block) + ", thread " + text(running->thread.thread);
}

// Ends the launch from inside a fiber, which is never resumed.
[[noreturn]] void stop(const std::string& message) {
  failure = std::string(kernel) + ": " + message;
  running->context.switch_to(caller, true);
  std::abort();
}

[[noreturn]] void deadlock() {
  std::map<std::string, int> waiting;
  for (int i = 0; i < block.threads; ++i) {
    const Fiber& fiber = *fibers[i];
    ++waiting[fiber.state == Fiber::kDone
                  ? "have exited"
                  : std::string("wait at ") + fiber.waits_at + " (" + text(fiber.site) + ")"];
  }
  std::string message = "deadlock in block " + text(running->thread.block) + ":";
  for (const auto& [what, count] : waiting) message += " " + std::to_string(count) + " threads " + what + ";";
  message.pop_back();
  stop(message);
}

void resume(int thread) {
  Fiber& from = *running;
  running = fibers[thread].get();
  if (running == &from) return;
  current = &running->thread;
  from.context.switch_to(running->context, from.state == Fiber::kDone);
}

// Until another thread calls set_ready.
void wait(const char* name, Site site) {
  running->state = Fiber::kWaiting;
  running->waits_at = name;
  running->site = site;
  set_ready(index_of(*running), false);
  const int next = choose();
  if (next < 0) deadlock();
  resume(next);
}

void yield() {
  if (schedule.order == Schedule::kRandom) resume(choose());
}

void complete(std::vector<Copy>& group) {
  for (const Copy& copy : group) copy_16(copy.to, copy.from, copy.valid);
  group.clear();
}

void on_exit() {
  Fiber& fiber = *running;
  cp_async_commit();
  cp_async_wait(0);
  if (block.arrived > 0) {
    stop(text(block.barrier_site) + ": " + block.barrier_name + " is not reached by all threads: one exits" +
         where());
  }
  Warp& warp = block.warps[fiber.thread.warp];
  warp.gone |= 1u << fiber.thread.lane;
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.arrived != 0 && (meeting.mask >> fiber.thread.lane & 1)) {
      stop(text(meeting.site) + ": " + meeting.name + " waits for lane " + std::to_string(fiber.thread.lane) +
           ", which exits" + where());
    }
  }
  fiber.state = Fiber::kDone;
  set_ready(index_of(fiber), false);
  --block.alive;
}

void entry() {
  running->context.arrived();
  acquire(&begins);
  (*body)();
  on_exit();
  release(&ends);
  const int next = choose();
  if (next >= 0) resume(next);
  if (block.alive > 0) deadlock();
  running->context.switch_to(caller, true);
  std::abort();
}

char* take(size_t bytes) {
  const size_t rounded = (bytes + 127) / 128 * 128 + 128;  // 128 bytes at least to the next array
  if (block.used + rounded > kArena) stop("more shared memory than there is" + where());
  char* memory = block.arena + block.used;
  block.used += rounded;
  std::memset(memory, kPoison, bytes);
  std::memset(memory + bytes, kGapFill, rounded - bytes);
  forbid(memory + bytes, rounded - bytes);
  return memory;
}

void check_gap(const Array& array) {
  const auto* gap = reinterpret_cast<const unsigned char*>(array.memory + array.bytes);
  for (int i = 0; i < kGap; ++i) {
    if (gap[i] != kGapFill) {
      throw std::runtime_error(std::string(kernel) + ": block " + text(running->thread.block) +
                               " wrote past the end of shared array " + array.name);
    }
  }
}

void run_block(uint3 index, dim3 grid, dim3 size, size_t dynamic_bytes) {
  block.arena = renew(block.arena, kArena);
  char* const stacks = renew(block.stacks, kMostThreads * Context::kStack);
  if (stacks != block.stacks) block.guarded = 0;
  block.stacks = stacks;
  for (; block.guarded < block.threads;
       ++block.guarded) {  // a kernel that needs more than its stack ends here
    mprotect(stacks + block.guarded * Context::kStack, kPage, PROT_NONE);
  }
  allow(block.arena, kArena);
  block.alive = block.threads;
  block.warps.assign((block.threads + kWarp - 1) / kWarp, {});
  if (block.threads % kWarp != 0) block.warps.back().gone = ~0u << block.threads % kWarp;
  block.arrived = block.sum[0] = block.sum[1] = 0;
  block.used = block.static_bytes = 0;
  block.arrays.clear();
  block.sync = take(2);
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned t = i;
    fiber.thread = {
        {t % size.x, t / size.x % size.y, t / size.x / size.y}, index, size, grid, i % kWarp, i / kWarp};
    fiber.groups.clear();
    fiber.open.clear();
    fiber.context.start(entry, block.stacks + i * Context::kStack);
    set_ready(i, true);
  }
  running = fibers[choose()].get();
  block.dynamic = reinterpret_cast<unsigned char*>(take(dynamic_bytes));
  block.arrays.push_back({nullptr, "(dynamic)", reinterpret_cast<char*>(block.dynamic), dynamic_bytes});
  current = &running->thread;
  caller.switch_to(running->context);
  for (int i = 0; i < block.threads; ++i) fibers[i]->context.finish();
  allow(block.arena, kArena);
  if (!failure.empty()) throw std::runtime_error(failure);
  for (const Array& array : block.arrays) check_gap(array);
}

Meeting& meeting_of(uint32_t mask, const char* name, Site site) {
  auto& meetings = block.warps[current->warp].meetings;
  for (Meeting& meeting : meetings) {
    if (meeting.mask == mask) return meeting;
  }
  meetings.reserve(kWarp);  // so that the addresses of those that wait stay
  if (meetings.size() == kWarp) fail(site, "%s: more than %d masks in one warp", name, kWarp);
  meetings.emplace_back();
  meetings.back().mask = mask;
  meetings.back().sync = take(2);
  return meetings.back();
}

// The meeting under this mask, which the calling lane may take part in.
Meeting& join(uint32_t mask, const char* name, Site site) {
  const int lane = current->lane;
  if ((mask >> lane & 1) == 0)
    fail(site, "%s with mask %08x by lane %d, which is not in it", name, mask, lane);
  if (const uint32_t gone = mask & block.warps[current->warp].gone) {
    fail(site, "%s with mask %08x, of which lane %d has exited or does not exist", name, mask,
         __builtin_ctz(gone));
  }
  Meeting& meeting = meeting_of(mask, name, site);
  if (meeting.arrived != 0 && (meeting.site.line != site.line || std::strcmp(meeting.name, name) != 0)) {
    fail(site, "%s, where other lanes of the warp wait at %s (%s)", name, meeting.name,
         text(meeting.site).c_str());
  }
  meeting.name = name;
  meeting.site = site;
  return meeting;
}

void meet(Meeting& meeting, void (*combine)(Words*)) {
  const int first = current->warp * kWarp;
  meeting.arrived |= 1u << current->lane;
  if (meeting.arrived != meeting.mask) return wait(meeting.name, meeting.site);
  if (combine != nullptr) combine(meeting.words[meeting.round]);
  meeting.arrived = 0;
  meeting.round ^= 1;
  for (int i = 0; i < kWarp; ++i) {
    if (meeting.mask >> i & 1) set_ready(first + i, true);
  }
  yield();
}

}  // namespace

void launch(const char* name, dim3 grid, dim3 size, int64_t dynamic_bytes,
            const std::function<void()>& function) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > kMostThreads || size.z > 64) {
    throw std::runtime_error(std::string(name) + ": a block of " + std::to_string(threads) + " threads");
  }
  if (dynamic_bytes < 0 || dynamic_bytes > static_cast<int64_t>(kMostShared)) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(dynamic_bytes) +
                             " bytes of shared memory");
  }
  kernel = name;
  body = &function;
  failure.clear();
  generator.seed(schedule.seed);
  block.threads = static_cast<int>(threads);
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  const auto arrange = [](auto& items) {
    for (size_t i = 0; i < items.size(); ++i) {
      items[i] = schedule.order == Schedule::kReverse ? items.size() - 1 - i : i;
    }
    if (schedule.order == Schedule::kRandom) std::shuffle(items.begin(), items.end(), generator);
  };
  order.resize(threads);
  rank.resize(threads);
  arrange(order);
  for (size_t i = 0; i < threads; ++i) rank[order[i]] = static_cast<int>(i);
  ready.assign((threads + 63) / 64, 0);
  const uint64_t all_blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> blocks(std::min(all_blocks, most_blocks));
  arrange(blocks);
  for (uint64_t& i : blocks) i += all_blocks - blocks.size();
  caller.adopt();
  release(&begins);
  for (const uint64_t i : blocks) {
    const uint3 index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(index, grid, size, static_cast<size_t>(dynamic_bytes));
  }
  acquire(&ends);
}

void fail(Site site, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  stop(text(site) + ": " + message + where());
}

void misaligned(const void* pointer, size_t bytes, Site site) {
  fail(site, "access of %zu bytes at %p, which is no multiple of %zu", bytes, pointer, bytes);
}

void* shared(const char* declaration, const char* name, size_t bytes) {
  for (const Array& array : block.arrays) {
    if (array.declaration == declaration) return array.memory;
  }
  block.static_bytes += bytes;
  if (block.static_bytes > kMostStaticShared || block.static_bytes + block.arrays[0].bytes > kMostShared) {
    stop(std::string("__shared__ ") + name + " passes 48 KiB, or 227 with dynamic shared memory");
  }
  block.arrays.push_back({declaration, name, take(bytes), bytes});
  return block.arrays.back().memory;
}

unsigned char* dynamic_shared() { return block.dynamic; }

void check_shared(const void* pointer, size_t bytes, const char* name, Site site) {
  const auto* at = static_cast<const char*>(pointer);
  for (const Array& array : block.arrays) {
    if (at >= array.memory && at + bytes <= array.memory + array.bytes) return;
  }
  fail(site, "%s of %p, which is not in shared memory", name, pointer);
}

int barrier(int value, const char* name, Site site) {
  if (block.alive < block.threads) {
    fail(site, "%s, where %d threads of the block have exited", name, block.threads - block.alive);
  }
  if (block.arrived > 0 &&
      (block.barrier_site.line != site.line || std::strcmp(block.barrier_name, name) != 0)) {
    fail(site, "%s, where other threads wait at %s (%s)", name, block.barrier_name,
         text(block.barrier_site).c_str());
  }
  block.barrier_name = name;
  block.barrier_site = site;
  const int round = block.round;
  block.sum[round] += value;
  release(&block.sync[round]);
  if (++block.arrived < block.threads) {
    wait(name, site);
  } else {
    block.arrived = 0;
    block.round ^= 1;
    block.sum[block.round] = 0;
    for (int i = 0; i < block.threads; ++i) set_ready(i, true);
    yield();
  }
  acquire(&block.sync[round]);
  return block.sum[round];
}

const Words* exchange(uint32_t mask, const uint64_t* words, int count, void (*combine)(Words*),
                      const char* name, Site site) {
  Meeting& meeting = join(mask, name, site);
  const int round = meeting.round;
  for (int i = 0; i < count; ++i) meeting.words[round][current->lane][i] = words[i];
  meet(meeting, combine);
  return meeting.words[round];
}

void warp_barrier(uint32_t mask, Site site) {
  Meeting& meeting = join(mask, "__syncwarp", site);
  char* sync = meeting.sync + meeting.round;
  release(sync);
  meet(meeting, nullptr);
  acquire(sync);
}

void before_atomic() { yield(); }

void cp_async(void* to, const void* from, bool valid, Site) {
  if (schedule.late_copies) {
    running->open.push_back({to, from, valid});
  } else {
    copy_16(to, from, valid);
  }
}

void cp_async_commit() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void cp_async_wait(int count) {
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) > count) {
    complete(groups.front());
    groups.erase(groups.begin());
  }
}

}  // namespace emulator

// For Python: a schedule for the launches to come; 0, or 1 where there is no such schedule.
namespace {
std::set<std::string> launches;
}

void emulator::record(const void* function, dim3 block, int64_t dynamic_shared_bytes) {
  Dl_info info;
  if (dladdr(function, &info) == 0 || info.dli_saddr != function) return;  // a kernel that is not exported
  const std::lock_guard<std::mutex> lock(one_launch);
  launches.insert(std::string(info.dli_sname) + ' ' + std::to_string(block.x * block.y * block.z) + ' ' +
                  std::to_string(dynamic_shared_bytes));
}

// The sizes of the launches so far, a line each: kernel (mangled), threads, bytes of dynamic shared memory.
extern "C" const char* emulator_launches(bool clear) {
  static std::string text;
  text.clear();
  for (const std::string& line : launches) text += line + '\n';
  if (clear) launches.clear();
  return text.c_str();
}

extern "C" int emulator_schedule(const char* text) {
  try {
    emulator::schedule = emulator::parse(text);
    return 0;
  } catch (const std::runtime_error&) {
    return 1;
  }
}

// Of each launch to come only the last `count` blocks run; 0: all. For tensors too vast to work through.
extern "C" void emulator_last_blocks(uint64_t count) {
  emulator::most_blocks = count == 0 ? UINT64_MAX : count;
}
