// Looks at each access to memory of an emulated kernel, as compute-sanitizer does on a GPU.
//
// The CUDA sources are compiled with -fsanitize=thread, which calls a function before each access that another thread could see; those
// functions are here, not ThreadSanitizer's own. Found are
//   memcheck   accesses outside of every tensor and every array of shared memory, to gaps of a view, writes to inputs;
//   initcheck  reads of what nobody wrote: shared memory since its block began, tensors since they were allocated;
//   racecheck  two accesses to a word by two threads, one of them a write, with no barrier between that orders them (between blocks none
//              does); accesses to what an asynchronous copy is still writing.
// Order among the threads of a block is kept by vector clocks, as FastTrack does (Flanagan and Freund, PLDI 2009). Words are of two bytes,
// the smallest number of any kernel.
#include "sanitizer.h"

#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

#include "cuda_runtime.h"

#define EXPORTED extern "C" __attribute__((visibility("default"), used))

namespace emulated {

bool checking = false;

namespace {

enum May : uint8_t { kRead = 1, kWrite = 2 };

// The last accesses to a word. An era is a block of a launch: of any other one a barrier orders nothing.
struct Word {
  uint32_t write_era = 0, write_clock = 0, read_era = 0, read_clock = 0, copy_era = 0;  // copy: an asynchronous one, under way
  uint16_t writer = 0, reader = 0;
  uint8_t may = kRead | kWrite;
  bool several = false;         // threads of the era read it: `readers`
  bool several_blocks = false;  // of the launch
};
struct Region {
  uintptr_t begin, end;
  std::string name;  // of an array in shared memory; empty: a tensor
  std::vector<Word> words;
  Word* word(uintptr_t at) {
    if (words.empty()) words.resize((end - begin + 1) / 2);
    return &words[(at - begin) / 2];
  }
};

constexpr size_t kAround = 4096;  // bytes between tensors, of which none is any's
constexpr int kUnwritten = 0xff;  // each byte of a new tensor: nan in every dtype

std::mutex of_regions;
std::map<uintptr_t, Region> regions;
std::unordered_map<const Word*, std::vector<std::pair<uint16_t, uint32_t>>> readers;
std::vector<Clock> clocks;
uint32_t era = 0, launch_era = 0;
uintptr_t parameters, parameters_end, dynamic_begin;

Region* last_region = nullptr;
Region* region_of(uintptr_t at) {
  if (last_region && at >= last_region->begin && at < last_region->end) return last_region;
  const auto after = regions.upper_bound(at);
  if (after == regions.begin()) return nullptr;
  return last_region = &std::prev(after)->second;
}

[[noreturn]] void found(const char* what, uintptr_t at, size_t bytes, const Region* region, const void* code) {
  char text[400], place[120] = "in no tensor and no array of shared memory";
  if (region) {
    const auto of = region->name.empty() ? "a tensor" : region->name.c_str();
    std::snprintf(place, sizeof place, "%s of %zu bytes, at %zu", of, size_t(region->end - region->begin), size_t(at - region->begin));
  }
  Dl_info library;
  const uintptr_t base = dladdr(code, &library) ? uintptr_t(library.dli_fbase) : 0;
  std::snprintf(text, sizeof text, "%s (%zu bytes: %s; code at +0x%zx)", what, bytes, place, size_t(uintptr_t(code) - base));
  stop(text);
}

// Whether the running thread knows of what another one of its block did at a time.
bool ordered(uint16_t other, uint32_t time) {
  const unsigned self = thread();
  return other == self || time <= clocks[self][other];
}

void read_word(Word& word, uint32_t now) {
  const auto self = uint16_t(thread());
  if (word.read_era != era) {
    word.several_blocks = word.read_era >= launch_era, word.several = false;
    word.read_era = era, word.reader = self, word.read_clock = now;
  } else if (!word.several && ordered(word.reader, word.read_clock)) {
    word.reader = self, word.read_clock = now;
  } else {
    auto& all = readers[&word];
    if (!word.several) word.several = true, all = {{word.reader, word.read_clock}};
    for (auto& [reader, time] : all)
      if (reader == self) {
        time = now;
        return;
      }
    all.emplace_back(self, now);
  }
}

void write_word(Word& word, uint32_t now) {
  word.write_era = era, word.writer = uint16_t(thread()), word.write_clock = now;
  word.read_era = 0, word.several = word.several_blocks = false;
}

bool races(const Word& word, bool writes, bool shared) {
  if (word.write_era == era ? !ordered(word.writer, word.write_clock) : !shared && word.write_era >= launch_era) return true;
  if (!writes) return false;
  if (word.read_era == era) {
    if (!shared && word.several_blocks) return true;
    if (!word.several) return !ordered(word.reader, word.read_clock);
    const auto& all = readers[&word];
    return std::any_of(all.begin(), all.end(), [](auto& read) { return !ordered(read.first, read.second); });
  }
  return !shared && word.read_era >= launch_era;
}

// Whether a tensor's bytes are still as it was allocated.
bool unwritten(uintptr_t at, size_t bytes) {
  const auto* p = reinterpret_cast<const unsigned char*>(at);
  const size_t step = std::min<size_t>(bytes, 4);  // half of a float32 may be 0xffff
  for (size_t i = 0; i + step <= bytes; i += step)
    if (std::all_of(p + i, p + i + step, [](unsigned char byte) { return byte == kUnwritten; })) return true;
  return false;
}

void look(const void* p, size_t bytes, bool writes, const void* code) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (at - reinterpret_cast<uintptr_t>(stack()) < kStack) return;
  if (at >= parameters && at + bytes <= parameters_end) {
    if (writes) found("writes a parameter", at, bytes, nullptr, code);
    return;
  }
  if (at - reinterpret_cast<uintptr_t>(&indices) < sizeof indices) return;
  Region* region = region_of(at);
  if (!region || at >= region->end + kAround) found("outside of all memory", at, bytes, nullptr, code);
  if (at + bytes > region->end) found("past the end", at, bytes, region, code);
  const bool shared = !region->name.empty();
  const uint32_t now = clocks[thread()][thread()];
  bool kernels = true;  // wrote it all
  Word* const last = region->word(at + bytes - 1);
  for (Word* it = region->word(at); it <= last; ++it) {
    Word& word = *it;
    if (word.copy_era == era) found("does not wait for an asynchronous copy", at, bytes, region, code);
    if (!(word.may & (writes ? kWrite : kRead))) found(word.may ? "writes an input" : "in a gap of a view", at, bytes, region, code);
    if (shared && !writes && word.write_era != era) found("reads shared memory that nobody wrote", at, bytes, region, code);
    if (races(word, writes, shared)) found(writes ? "a race: writes" : "a race: reads", at, bytes, region, code);
    kernels &= word.write_era != 0;
    writes ? write_word(word, now) : read_word(word, now);
  }
  if (!shared && !writes && !kernels && unwritten(at, bytes)) found("reads a tensor where nobody wrote", at, bytes, region, code);
}

struct Guarded final : c10::Allocator {
  static void release(void* p) {
    if (!p) return;
    const std::lock_guard<std::mutex> lock(of_regions);
    last_region = nullptr;
    const auto found = regions.find(reinterpret_cast<uintptr_t>(p));
    std::memset(p, kUnwritten, found->second.end - found->second.begin);
    regions.erase(found);
    std::free(static_cast<char*>(p) - kAround);
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::kCPU};
    char* all = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 2 * kAround));
    TORCH_CHECK(all, "no memory for ", bytes, " bytes");
    std::memset(all, kUnwritten, bytes + 2 * kAround);
    char* p = all + kAround;
    const std::lock_guard<std::mutex> lock(of_regions);
    const auto begin = reinterpret_cast<uintptr_t>(p);
    regions[begin] = {begin, begin + bytes, "", {}};
    return {p, p, &release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

void begin_launch(char* dynamic, unsigned shared, const void* first, size_t bytes) {
  const std::lock_guard<std::mutex> lock(of_regions);
  parameters = reinterpret_cast<uintptr_t>(first), parameters_end = parameters + bytes;
  dynamic_begin = reinterpret_cast<uintptr_t>(dynamic);
  if (shared) regions[dynamic_begin] = {dynamic_begin, dynamic_begin + shared, "dynamic shared memory", {}};
  launch_era = era + 1, last_region = nullptr;
}

void begin_block(unsigned threads) {
  ++era;
  readers.clear();
  clocks.assign(threads, Clock(threads, 0));
  for (unsigned i = 0; i < threads; ++i) clocks[i][i] = 1;
}

void end_launch() {
  const std::lock_guard<std::mutex> lock(of_regions);
  regions.erase(dynamic_begin);
  last_region = nullptr;
}

void arrive(std::shared_ptr<Clock>& together) {
  const Clock& mine = clocks[thread()];
  if (!together) together = std::make_shared<Clock>(mine.size(), 0);
  for (size_t i = 0; i < mine.size(); ++i) (*together)[i] = std::max((*together)[i], mine[i]);
}

void leave(const Clock& together) {
  Clock& mine = clocks[thread()];
  mine = together;
  ++mine[thread()];
}

void begin_copy(void* to, const void* from, bool wanted) {
  const void* code = __builtin_return_address(0);
  if (wanted) look(from, 16, false, code);
  look(to, 16, true, code);
  const auto at = reinterpret_cast<uintptr_t>(to);
  Region* region = region_of(at);
  if (region->name.empty()) found("an asynchronous copy that does not end in shared memory", at, 16, region, code);
  for (size_t i = 0; i < 16; i += 2) region->word(at + i)->copy_era = era;
}

void end_copy(void* to) {
  const auto at = reinterpret_cast<uintptr_t>(to);
  const uint32_t now = clocks[thread()][thread()];
  for (size_t i = 0; i < 16; i += 2) {
    Word& word = *region_of(at)->word(at + i);
    word.copy_era = 0;
    write_word(word, now);
  }
}

}  // namespace emulated

// Looks from now on, or no longer; tensors that kernels may use are those allocated while it does.
EXPORTED void emulated_check(bool on) {
  static emulated::Guarded guarded;
  static c10::Allocator* const own = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : own);
  emulated::checking = on;
}

// An array of shared memory in this library, by its place in the file's symbols.
EXPORTED void emulated_shared(const char* name, uint64_t offset, uint64_t bytes) {
  Dl_info library;
  dladdr(reinterpret_cast<const void*>(&emulated_shared), &library);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(library.dli_fbase) + offset;
  emulated::regions[begin] = {begin, begin + bytes, name, {}};
}

// Of the tensor at `storage` kernels may read the elements at these offsets, of so many bytes each, and nothing else; write none of it.
EXPORTED void emulated_input(const void* storage, const int64_t* offsets, int64_t count, int64_t bytes) {
  auto& region = emulated::regions.at(reinterpret_cast<uintptr_t>(storage));
  region.word(region.begin);
  for (auto& word : region.words) word.may = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t b = 0; b < bytes; b += 2) region.word(region.begin + offsets[i] * bytes + b)->may = emulated::kRead;
}

// What -fsanitize=thread calls before an access.
#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define LOOK(p, bytes, writes) \
  if (__builtin_expect(emulated::checking && emulated::stack(), false)) emulated::look(p, bytes, writes, __builtin_return_address(0))
#define SIZE(bytes)                                                          \
  HOOK __tsan_read##bytes(const void* p) { LOOK(p, bytes, false); }          \
  HOOK __tsan_write##bytes(const void* p) { LOOK(p, bytes, true); }          \
  HOOK __tsan_unaligned_read##bytes(const void* p) { LOOK(p, bytes, false); } \
  HOOK __tsan_unaligned_write##bytes(const void* p) { LOOK(p, bytes, true); }
SIZE(1)
SIZE(2)
SIZE(4)
SIZE(8)
SIZE(16)
HOOK __tsan_read_range(const void* p, size_t bytes) { LOOK(p, bytes, false); }
HOOK __tsan_write_range(const void* p, size_t bytes) { LOOK(p, bytes, true); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(const void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_vptr_update(void*, void*) {}
HOOK __tsan_vptr_read(void*) {}
// Host code's atomics, whose order (the last argument) may be stricter than asked for.
#define ATOMIC(bits)                                                                                         \
  using Word##bits = uint##bits##_t;                                                                         \
  extern "C" __attribute__((visibility("hidden"))) Word##bits __tsan_atomic##bits##_load(Word##bits* p, int) { \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                          \
  extern "C" __attribute__((visibility("hidden"))) Word##bits __tsan_atomic##bits##_fetch_add(Word##bits* p, Word##bits v, int) { \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                       \
  }
ATOMIC(8)
ATOMIC(32)
ATOMIC(64)
