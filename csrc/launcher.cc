// FFI target jaxnorm_launch: launches kernels of code objects (hsaco or cubin), one after another, on XLA's stream, on
// CUDA and ROCm.
//
// Built by a plain C++ compiler with no GPU toolkit: the driver is found with dlopen when the first kernel is loaded.
// Three stages:
//   instantiate  checks the attributes, when the program is compiled
//   initialize   loads the code object on the current device, before XLA may record a graph
//   execute      fills the parameter arrays and launches; it takes no lock, allocates nothing and synchronises nothing
// A code object is loaded once per device, however many call sites use it, and stays loaded until the process ends.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "driver.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnorm {
namespace {

namespace ffi = xla::ffi;
using Str = std::string_view;
using Ints = ffi::Span<const int64_t>;

// Attributes or exported symbols changed: raise it here and in jaxnorm/_native.py, so that an old binary says so.
constexpr int kInterface = 4;

constexpr size_t kMaxParams = 64;
constexpr size_t kMaxBuffers = 128;  // of a call site, scratch between its launches included
constexpr size_t kTritonScratch =
    2;  // Triton kernels end in two pointers (global and profile scratch); others ignore them.
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxGridX = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxGridYZ = 65535;
constexpr int64_t kDefaultSharedCuda = 48 << 10;  // More dynamic shared memory must be asked for, function by function.

// One launch of a call site.
struct Call {
  Str image, name, target;
  Ints grid;
  int64_t threads, shared;
  Str layout;
  Ints scalars;
  Ints buffers;   // of each p of the layout: which of the call site's operands and results
  int64_t key;    // digest of image, name and target, so that a launch need not read the image
  bool overlaps;  // it may begin before the launch before it, of this call site, has ended
  // n > 0: it has n blocks, which wait for one another; left out where the device has no room for them at the same
  // time. -n: it stands in for the launch of n before it, and is left out where that is there.
  int64_t meeting;

  bool hip() const { return target.substr(0, 3) == "gfx"; }
  bool empty_grid() const { return grid[0] == 0 || grid[1] == 0 || grid[2] == 0; }
};

// The attributes of one call site: those of its launches, one after another. Names and layouts are separated by spaces.
struct Site {
  Str image;
  Ints image_sizes;
  Str name, target;
  Ints grid, threads, shared;
  Str layout;
  Ints scalars, buffers, key, overlaps, meeting;

  // Calls f on every launch until one fails.
  template <typename F> ffi::Error Each(F&& f) const;
};

std::string Where(const Call& c) { return "jaxnorm: kernel '" + std::string(c.name) + "': "; }

// The program asks for what cannot be.
ffi::Error Wrong(const Call& c, const std::string& what) { return ffi::Error::InvalidArgument(Where(c) + what); }

// The driver refused.
ffi::Error Failed(const Call& c, const std::string& what) {
  return ffi::Error::Internal(Where(c) + what + "; target " + std::string(c.target) + ", grid (" +
                              std::to_string(c.grid[0]) + ", " + std::to_string(c.grid[1]) + ", " +
                              std::to_string(c.grid[2]) + "), block " + std::to_string(c.threads) + ", shared memory " +
                              std::to_string(c.shared) + " bytes");
}

// Every function that is loaded. Looking one up takes no lock: entries are only added, and never freed, because nothing
// says when the last recorded graph that holds a function is gone.
class Kernels {
 public:
  // How many blocks of a function a device has room for at once, by their size: an image may serve several.
  struct Room {
    int64_t threads, shared, blocks;
    const Room* next;
  };
  struct Entry {
    int64_t key;
    uint64_t context;  // Driver::Current
    bool hip;
    std::string name;
    void* function;
    std::atomic<int64_t> shared_limit;
    std::atomic<const Room*> rooms;  // of launches whose blocks meet
    const Entry* next;

    const Room* RoomOf(const Call& c) const {
      const Room* room = rooms.load(std::memory_order_acquire);
      while (room != nullptr && (room->threads != c.threads || room->shared != c.shared)) room = room->next;
      return room;
    }
    // Whether a launch finds what Load makes.
    bool Serves(const Call& c) const { return c.shared <= shared_limit && (c.meeting <= 0 || RoomOf(c) != nullptr); }
  };

  static Kernels& Get() {
    static auto* kernels = new Kernels;
    return *kernels;
  }

  const Entry* Find(const Call& c, uint64_t context) const {
    for (const Entry* e = Bucket(c).load(std::memory_order_acquire); e != nullptr; e = e->next) {
      if (e->key == c.key && e->context == context && e->hip == c.hip() && e->name == c.name) return e;
    }
    return nullptr;
  }

  // Loads the code object on the device of `context` if it is not there yet, and finds the function with room for the
  // dynamic shared memory; where blocks meet, how many have room at once.
  ffi::Error Load(const Driver& driver, const Call& c, uint64_t context) {
    std::lock_guard<std::mutex> lock(mutex_);
    Entry* entry = const_cast<Entry*>(Find(c, context));
    if (entry == nullptr) {
      void *module = nullptr, *function = nullptr;
      if (ffi::Error error = LoadModule(driver, c, context, &module); error.failure()) return error;
      if (int status = driver.GetFunction(&function, module, std::string(c.name).c_str()))
        return Failed(
            c, "not in its code object, " + driver.Describe("cuModuleGetFunction", "hipModuleGetFunction", status));
      driver.AllowLargeClusters(function);
      std::atomic<const Entry*>& bucket = Bucket(c);
      entry = new Entry{c.key,     context,      c.hip(), std::string(c.name), function, {kDefaultSharedCuda},
                        {nullptr}, bucket.load()};
      bucket.store(entry, std::memory_order_release);
    }
    // Call sites share the function, so its limit only ever goes up.
    if (c.shared > entry->shared_limit) {
      if (int status = driver.RaiseShared(entry->function, c.shared))
        return Failed(
            c, "too much shared memory, " + driver.Describe("cuFuncSetAttribute", "hipFuncSetAttribute", status));
      entry->shared_limit = c.shared;
    }
    if (!entry->Serves(c)) {
      const int64_t blocks = driver.BlocksAtOnce(entry->function, c.threads, c.shared);
      entry->rooms.store(new Room{c.threads, c.shared, blocks, entry->rooms}, std::memory_order_release);
    }
    return ffi::Error::Success();
  }

 private:
  struct Image {
    std::string bytes;                                   // kept: the driver may go on pointing into them
    std::map<std::pair<bool, uint64_t>, void*> modules;  // by vendor and context
  };
  static constexpr size_t kBuckets = 1024;  // A program has some tens of kernels; a chain in a bucket is no error.

  ffi::Error LoadModule(const Driver& driver, const Call& c, uint64_t context, void** module) {
    auto found = images_.find(c.image);
    if (found == images_.end()) {
      auto image = std::make_unique<Image>(Image{std::string(c.image), {}});
      Str bytes = image->bytes;
      found = images_.emplace(bytes, std::move(image)).first;
    }
    void*& loaded = found->second->modules[{c.hip(), context}];
    if (loaded == nullptr) {
      if (int status = driver.LoadModule(&loaded, found->second->bytes.data())) {
        loaded = nullptr;
        return Failed(c, "cannot load its code object (" + std::to_string(c.image.size()) + " bytes) on this device, " +
                             driver.Describe("cuModuleLoadData", "hipModuleLoadData", status));
      }
    }
    *module = loaded;
    return ffi::Error::Success();
  }

  std::atomic<const Entry*>& Bucket(const Call& c) { return buckets_[static_cast<uint64_t>(c.key) % kBuckets]; }
  const std::atomic<const Entry*>& Bucket(const Call& c) const { return const_cast<Kernels*>(this)->Bucket(c); }

  std::array<std::atomic<const Entry*>, kBuckets> buckets_{};
  std::mutex mutex_;  // of everything below, and of writers to the buckets
  std::unordered_map<Str, std::unique_ptr<Image>> images_;
};

// The first `count` of what is left.
template <typename Span> Span Take(Span* left, size_t count) {
  const Span taken(left->begin(), count);
  *left = Span(left->begin() + count, left->size() - count);
  return taken;
}
Str TakeWord(Str* left) {
  const size_t size = std::min(left->find(' '), left->size());
  const Str word = left->substr(0, size);
  left->remove_prefix(std::min(size + 1, left->size()));
  return word;
}

template <typename F> ffi::Error Site::Each(F&& f) const {
  const size_t count = threads.size();
  Site left = *this;
  auto wrong = [&](const char* attribute, size_t got, size_t expected) {
    return ffi::Error::InvalidArgument("jaxnorm: kernel '" + std::string(name) + "': " + attribute + ": got " +
                                       std::to_string(got) + " sizes, expected " + std::to_string(expected));
  };
  if (grid.size() != 3 * count) return wrong("grid", grid.size(), 3 * count);
  for (const auto& [attribute, got] :
       {std::pair{"shared", shared.size()}, std::pair{"image_sizes", image_sizes.size()}, std::pair{"key", key.size()},
        std::pair{"overlaps", overlaps.size()}, std::pair{"meeting", meeting.size()}})
    if (got != count) return wrong(attribute, got, count);
  for (size_t i = 0; i < count; ++i) {
    const Str word = TakeWord(&left.layout);
    const size_t pointers = std::count(word.begin(), word.end(), 'p'),
                 nulls = std::count(word.begin(), word.end(), 'n'), values = word.size() - pointers - nulls;
    const bool last = i + 1 == count;  // has all that is left, for the checks
    if (image_sizes[i] < 0 || static_cast<size_t>(image_sizes[i]) > left.image.size())
      return wrong("image", image.size(), image_sizes[i]);
    Call c{left.image.substr(0, image_sizes[i]),
           TakeWord(&left.name),
           target,
           Take(&left.grid, 3),
           threads[i],
           shared[i],
           word,
           {},
           {},
           key[i],
           overlaps[i] != 0,
           meeting[i]};
    left.image.remove_prefix(image_sizes[i]);
    c.scalars = Take(&left.scalars, last ? left.scalars.size() : std::min(values, left.scalars.size()));
    c.buffers = Take(&left.buffers, last ? left.buffers.size() : std::min(pointers, left.buffers.size()));
    if (ffi::Error error = f(c); error.failure()) return error;
  }
  return ffi::Error::Success();
}

ffi::Error CheckSizes(const Call& c) {
  if (!c.hip() && c.target.substr(0, 3) != "sm_")
    return Wrong(c, "target: got '" + std::string(c.target) + "', expected gfx... or sm_...");
  if (c.threads < 1 || c.threads > kMaxThreads)
    return Wrong(c, "threads: got " + std::to_string(c.threads) + ", expected 1 to " + std::to_string(kMaxThreads));
  if (c.shared < 0 || c.shared > std::numeric_limits<int32_t>::max())
    return Wrong(c, "shared: got " + std::to_string(c.shared) + " bytes, expected 0 to 2**31 - 1");
  // HIP counts threads, not blocks, in 32 bits.
  const int64_t max_x = c.hip() ? std::min(kMaxGridX, std::numeric_limits<uint32_t>::max() / c.threads) : kMaxGridX;
  const std::array<int64_t, 3> limits = {max_x, kMaxGridYZ, kMaxGridYZ};
  for (size_t i = 0; i < 3; ++i) {
    if (c.grid[i] < 0 || c.grid[i] > limits[i])
      return Wrong(c, "grid[" + std::to_string(i) + "]: got " + std::to_string(c.grid[i]) + ", expected 0 to " +
                          std::to_string(limits[i]) + (c.hip() ? " (HIP)" : " (CUDA)"));
  }
  if (const int64_t blocks = c.grid[0] * c.grid[1] * c.grid[2]; c.meeting > 0 && c.meeting != blocks)
    return Wrong(c, "meeting: got " + std::to_string(c.meeting) + ", expected its " + std::to_string(blocks) +
                        " blocks, which all wait for one another");
  return ffi::Error::Success();
}

// Checks the layout against the scalars and the buffers, of which the call site has so many.
ffi::Error CheckLayout(const Call& c, size_t present) {
  if (c.layout.size() > kMaxParams)
    return Wrong(c, "layout: got " + std::to_string(c.layout.size()) + " parameters, expected at most " +
                        std::to_string(kMaxParams));
  size_t scalars = 0, buffers = 0;
  for (char letter : c.layout) {
    if (letter == 'p') {
      ++buffers;
    } else if (letter == 'i' || letter == 'l' || letter == 'f') {
      // Four bytes are a signed or an unsigned integer, or the bits of a float.
      const int64_t value = scalars < c.scalars.size() ? c.scalars[scalars] : 0;
      if (letter != 'l' &&
          (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<uint32_t>::max()))
        return Wrong(c, "scalars[" + std::to_string(scalars) + "]: got " + std::to_string(value) +
                            ", expected 32 bits as layout '" + std::string(c.layout) + "' says");
      ++scalars;
    } else if (letter != 'n') {
      return Wrong(c, "layout: got '" + std::string(c.layout) + "', expected only p, n, i, l and f");
    }
  }
  if (scalars != c.scalars.size())
    return Wrong(c, "scalars: got " + std::to_string(c.scalars.size()) + ", expected " + std::to_string(scalars) +
                        " as layout '" + std::string(c.layout) + "' says");
  if (buffers != c.buffers.size())
    return Wrong(c, "layout: got '" + std::string(c.layout) + "' with " + std::to_string(buffers) +
                        " buffers, expected " + std::to_string(c.buffers.size()));
  for (int64_t buffer : c.buffers) {
    if (buffer < 0 || static_cast<size_t>(buffer) >= present)
      return Wrong(c, "buffers: got " + std::to_string(buffer) + ", expected 0 to " + std::to_string(present) +
                          " operands and results - 1");
  }
  return ffi::Error::Success();
}

// A launch whose blocks meet is followed by those that stand in for it, so that its results are always computed.
ffi::Error CheckMeeting(const Site& site) {
  const size_t count = site.meeting.size();
  for (size_t i = 0; i < count; ++i) {
    const int64_t n = site.meeting[i], before = i > 0 ? site.meeting[i - 1] : 0,
                  after = i + 1 < count ? site.meeting[i + 1] : 0;
    if (n > 0 ? after == -n : n == 0 || before == n || before == -n) continue;
    return ffi::Error::InvalidArgument("jaxnorm: kernel '" + std::string(site.name) + "': meeting[" +
                                       std::to_string(i) + "]: got " + std::to_string(n) + ", expected " +
                                       std::to_string(-n) + (n > 0 ? " behind it" : " before it"));
  }
  return ffi::Error::Success();
}

// Keeps no state: XLA would want its type registered before the handlers, and JAX hands over what was registered before
// its GPU plugin started in the other order, so that the plugin would fail to start.
ffi::Error Instantiate(const Call& c) {
  if (ffi::Error error = CheckSizes(c); error.failure()) return error;
  return CheckLayout(c, kMaxBuffers);
}

// XLA runs this before every execution; after the first on a device it only reads.
ffi::Error Initialize(const Call& c) {
  if (ffi::Error error = CheckSizes(c); error.failure()) return error;
  if (c.empty_grid()) return ffi::Error::Success();
  const Driver& driver = Driver::Get(c.hip());
  if (!driver.error().empty()) return ffi::Error(ffi::ErrorCode::kFailedPrecondition, Where(c) + driver.error());
  uint64_t context = 0;
  if (int status = driver.Current(&context))
    return Failed(c, "no current device, " + driver.Describe("cuCtxGetCurrent", "hipGetDevice", status));
  const Kernels::Entry* entry = Kernels::Get().Find(c, context);
  if (entry != nullptr && entry->Serves(c)) return ffi::Error::Success();
  return Kernels::Get().Load(driver, c, context);
}

using Buffers = std::array<void*, kMaxBuffers>;

// What of a call site has been launched so far.
struct Progress {
  bool first = true;      // Nothing. What other calls put on the stream is never overlapped: the kernel may read its
                          // operands before it waits for the launch before it.
  bool left_out = false;  // The last launch whose blocks meet had no room: those that stand in for it follow.
};

ffi::Error Launch(void* stream, const Call& c, Buffers& buffers, size_t present, Progress* progress) {
  if (ffi::Error error = CheckSizes(c); error.failure()) return error;
  if (ffi::Error error = CheckLayout(c, present); error.failure()) return error;
  if (c.empty_grid() || (c.meeting < 0 && !progress->left_out)) return ffi::Error::Success();
  const Driver& driver = Driver::Get(c.hip());
  uint64_t context = 0;
  if (int status = driver.Current(&context))
    return Failed(c, "no current device, " + driver.Describe("cuCtxGetCurrent", "hipGetDevice", status));
  const Kernels::Entry* entry = Kernels::Get().Find(c, context);
  if (entry == nullptr || !entry->Serves(c)) return Failed(c, "XLA did not initialize it on this device");
  const bool meets = c.meeting > 0;
  if (meets && (progress->left_out = entry->RoomOf(c)->blocks < c.meeting)) return ffi::Error::Success();

  std::array<void*, kMaxParams + kTritonScratch> params;
  void* null = nullptr;
  size_t count = 0, buffer = 0, scalar = 0;
  for (char letter : c.layout) {
    if (letter == 'p') {
      params[count++] = &buffers[c.buffers[buffer++]];
    } else if (letter == 'n') {
      params[count++] = &null;
    } else {
      // The driver copies it during the call. Little endian: the low bytes of an int64 are its int32.
      params[count++] = const_cast<int64_t*>(&c.scalars[scalar++]);
    }
  }
  for (size_t i = 0; i < kTritonScratch; ++i) params[count++] = &null;
  const Driver::Kind kind = meets                            ? Driver::Kind::kTogether
                            : c.overlaps && !progress->first ? Driver::Kind::kOverlapping
                                                             : Driver::Kind::kOrdinary;
  const int status = driver.Launch(entry->function, c.grid.begin(), c.threads, c.shared, stream, params.data(), kind);
  // Where somebody else holds a part of the device.
  if (meets && (progress->left_out = status == kNoRoom || status == kNotSupported)) return ffi::Error::Success();
  if (status) return Failed(c, driver.Describe("cuLaunchKernel", "hipModuleLaunchKernel", status));
  progress->first = false;
  return ffi::Error::Success();
}

ffi::Error Execute(void* stream, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, const Site& site) {
  const size_t present = args.size() + rets.size();
  if (present > kMaxBuffers)
    return ffi::Error::InvalidArgument("jaxnorm: kernel '" + std::string(site.name) + "': got " +
                                       std::to_string(present) + " operands and results, expected at most " +
                                       std::to_string(kMaxBuffers));
  Buffers buffers;
  for (size_t i = 0; i < args.size(); ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    buffers[i] = buffer->untyped_data();
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    buffers[args.size() + i] = (*buffer)->untyped_data();
  }
  Progress progress;
  return site.Each([&](const Call& c) { return Launch(stream, c, buffers, present, &progress); });
}

// A stage is handed all attributes and must bind them all, here in the order of Site.
template <typename Binding> auto Attributes(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<Str>("image")
      .template Attr<Ints>("image_sizes")
      .template Attr<Str>("name")
      .template Attr<Str>("target")
      .template Attr<Ints>("grid")
      .template Attr<Ints>("threads")
      .template Attr<Ints>("shared")
      .template Attr<Str>("layout")
      .template Attr<Ints>("scalars")
      .template Attr<Ints>("buffers")
      .template Attr<Ints>("key")
      .template Attr<Ints>("overlaps")
      .template Attr<Ints>("meeting");
}

auto BindInstantiate() { return Attributes(ffi::Ffi::BindInstantiate()); }
auto BindInitialize() { return Attributes(ffi::Ffi::BindInitialize()); }
constexpr auto kInstantiate = [](auto... attributes) {
  const Site site{attributes...};
  if (ffi::Error error = site.Each(Instantiate); error.failure()) return error;
  return CheckMeeting(site);
};
constexpr auto kInitialize = [](auto... attributes) { return Site{attributes...}.Each(Initialize); };

#ifndef JAXNORM_LAUNCHER_HOST
auto BindExecute() {
  return Attributes(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().RemainingArgs().RemainingRets());
}
constexpr auto kExecute = [](void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets, auto... attributes) {
  return Execute(stream, args, rets, Site{attributes...});
};
#else
// For tests on the CPU platform, which has no stream and may have no initialize stage, over a fake driver.
auto BindExecute() { return Attributes(ffi::Ffi::Bind().RemainingArgs().RemainingRets()); }
constexpr auto kExecute = [](ffi::RemainingArgs args, ffi::RemainingRets rets, auto... attributes) {
  const Site site{attributes...};
  if (ffi::Error error = site.Each(Initialize); error.failure()) return error;
  return Execute(nullptr, args, rets, site);
};
#endif

}  // namespace
}  // namespace jaxnorm

// The only symbols that leave the library: the build hides the others.
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormLaunchInstantiate, jaxnorm::kInstantiate, jaxnorm::BindInstantiate());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormLaunchInitialize, jaxnorm::kInitialize, jaxnorm::BindInitialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormLaunchExecute, jaxnorm::kExecute, jaxnorm::BindExecute(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
extern "C" int JaxnormLaunchInterface() { return jaxnorm::kInterface; }
extern "C" int JaxnormLaunchFfiMinor() { return XLA_FFI_API_MINOR; }
#pragma GCC visibility pop
