// FFI target jaxnorm_fused: launches the same kernel on every device of a group, which exchange rows through workspaces
// that all of them have mapped (group.h, include/jaxnorm/peers.h).
//
//   instantiate  checks the attributes, when the program is compiled
//   initialize   refuses a broken group, loads the code object, makes the workspaces when they are missing or too small
//   execute      launches; the first time the host threads of all local ranks meet
// Part of the launcher's library; the two share nothing but that.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "group.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnorm::distributed {
namespace {

namespace ffi = xla::ffi;
using Str = std::string_view;
using Ints = ffi::Span<const int64_t>;

constexpr size_t kBuffers = 6;  // x, residual, weight, values, scale, residual_out
constexpr int64_t kMaxBlocks = 1024;

struct Call {
  Str op, image, name, target, layout;  // layout: one letter for each of the buffers, p or n (absent)
  Ints devices;                         // the groups along the axis, one after the other, ids by rank
  int64_t ranks, process, site, signature;
  int64_t blocks, threads, shared, rows, share, half_bytes, timeout_ns, key;

  bool hip() const { return target.substr(0, 3) == "gfx"; }
  double seconds() const { return double(timeout_ns) * 1e-9; }
};

std::string Where(const Call& c) { return "jaxnorm: " + std::string(c.op) + ": "; }
ffi::Error Fail(ffi::ErrorCode code, const Call& c, const std::string& what) {
  return ffi::Error(code, Where(c) + what);
}
constexpr char kRemedy[] =
    ". Call jaxnorm.distributed.reset() once all devices are idle, or go on with impl='composite' "
    "(JAXNORM_FUSED_COMM=0)";

ffi::Error Check(const Call& c) {
  auto wrong = [&](const char* what, int64_t got) {
    return Fail(ffi::ErrorCode::kInvalidArgument, c, std::string(what) + ": got " + std::to_string(got));
  };
  if (c.ranks < 2 || c.ranks > kMaxRanks) return wrong("ranks", c.ranks);
  if (c.devices.size() == 0 || c.devices.size() % size_t(c.ranks)) return wrong("devices", int64_t(c.devices.size()));
  if (c.layout.size() != kBuffers) return wrong("layout", int64_t(c.layout.size()));
  if (c.blocks < 1 || c.blocks > kMaxBlocks) return wrong("blocks", c.blocks);
  if (c.threads < 1 || c.threads > 1024) return wrong("threads", c.threads);
  if (c.shared < 0 || c.shared > 48 << 10) return wrong("shared", c.shared);
  if (c.rows < 1 || c.rows > 1 << 30) return wrong("rows", c.rows);
  if (c.half_bytes < 16 || c.half_bytes % 16) return wrong("half_bytes", c.half_bytes);
  if (c.timeout_ns < 1) return wrong("timeout_ns", c.timeout_ns);
  return ffi::Error::Success();
}

// Functions by kernel and context.
class Functions {
 public:
  static Functions& Get() {
    static auto* functions = new Functions;
    return *functions;
  }
  void* Find(const PeerDriver& driver, const Call& c, int device, void* context) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = loaded_.find({driver.hip(), c.key, device, context});
    return found == loaded_.end() ? nullptr : found->second;
  }
  std::string Load(const PeerDriver& driver, const Call& c, int device, void* context) {
    if (Find(driver, c, device, context)) return "";
    std::lock_guard<std::mutex> lock(mutex_);
    const std::string& image = images_.try_emplace(c.key, c.image).first->second;  // kept: drivers point into it
    void *module = nullptr, *function = nullptr;
    if (int status = driver.LoadModule(&module, image.data()))
      return driver.Describe("loading the code object", status);
    if (int status = driver.GetFunction(&function, module, std::string(c.name).c_str())) {
      driver.UnloadModule(module);
      return driver.Describe("finding the kernel", status);
    }
    loaded_[{driver.hip(), c.key, device, context}] = function;
    return "";
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::string> images_;
  std::map<std::tuple<bool, int64_t, int, void*>, void*> loaded_;
};

// Where the running device stands.
struct Place {
  Group* group = nullptr;
  int rank = -1, device = 0;
  void* context = nullptr;
};
ffi::Error Find(const PeerDriver& driver, const Call& c, Place* place) {
  if (!driver.error().empty()) return Fail(ffi::ErrorCode::kFailedPrecondition, c, driver.error());
  if (int status = driver.Current(&place->device, &place->context))
    return Fail(ffi::ErrorCode::kInternal, c, driver.Describe("no current device", status));
  const int64_t id = c.process * kProcess + place->device;
  for (size_t first = 0; first < c.devices.size(); first += size_t(c.ranks)) {
    const int64_t* begin = c.devices.begin() + first;
    const int64_t* end = begin + c.ranks;
    if (std::find(begin, end, id) == end) continue;
    place->group = &Groups::Get().Find(Key{c.hip(), std::vector<int64_t>(begin, end)}, c.process);
    place->rank = place->group->RankOf(place->device);
    return ffi::Error::Success();
  }
  return Fail(ffi::ErrorCode::kFailedPrecondition, c,
              "device " + std::to_string(place->device) + " is in no group of the mesh");
}

ffi::Error Instantiate(const Call& c) { return Check(c); }

ffi::Error Initialize(const Call& c) {
  if (ffi::Error error = Check(c); error.failure()) return error;
  const PeerDriver& driver = PeerDriver::Get(c.hip());
  Place place;
  if (ffi::Error error = Find(driver, c, &place); error.failure()) return error;
  if (std::string broken = place.group->Broken(); !broken.empty())
    return Fail(ffi::ErrorCode::kFailedPrecondition, c, "an earlier call failed: " + broken + kRemedy);
  if (std::string problem = Functions::Get().Load(driver, c, place.device, place.context); !problem.empty())
    return Fail(ffi::ErrorCode::kInternal, c, problem);
  if (std::string problem = place.group->Prepare(driver, place.rank, uint64_t(c.half_bytes), c.seconds());
      !problem.empty())
    return Fail(ffi::ErrorCode::kDeadlineExceeded, c, problem + kRemedy);
  return ffi::Error::Success();
}

ffi::Error Execute(void* stream, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, const Call& c) {
  if (ffi::Error error = Check(c); error.failure()) return error;
  const PeerDriver& driver = PeerDriver::Get(c.hip());
  Place place;
  if (ffi::Error error = Find(driver, c, &place); error.failure()) return error;
  void* function = Functions::Get().Find(driver, c, place.device, place.context);
  if (function == nullptr) return Fail(ffi::ErrorCode::kInternal, c, "XLA did not initialize it on this device");
  if (size_t(std::count(c.layout.begin(), c.layout.end(), 'p')) != args.size() + rets.size())
    return Fail(ffi::ErrorCode::kInvalidArgument, c, "layout: it does not fit the operands and results");

  void* buffers[kBuffers] = {};
  size_t next = 0;
  for (size_t i = 0; i < kBuffers; ++i) {
    if (c.layout[i] != 'p') continue;
    if (next < args.size()) {
      auto buffer = args.get<ffi::AnyBuffer>(next);
      if (!buffer.has_value()) return buffer.error();
      buffers[i] = buffer->untyped_data();
    } else {
      auto buffer = rets.get<ffi::AnyBuffer>(next - args.size());
      if (!buffer.has_value()) return buffer.error();
      buffers[i] = (*buffer)->untyped_data();
    }
    ++next;
  }
  if (std::string problem = place.group->MeetOnce(c.site, place.rank, c.seconds()); !problem.empty())
    return Fail(ffi::ErrorCode::kDeadlineExceeded, c, problem + kRemedy);

  struct {
    char* base[kMaxRanks];
  } peers;
  char* word = nullptr;
  uint64_t half_bytes = 0;
  place.group->Pointers(place.rank, peers.base, &word, &half_bytes);
  uint64_t patience = uint64_t(c.seconds() * driver.TickRate(place.device));
  uint32_t rows = uint32_t(c.rows), share = uint32_t(c.share), rank = uint32_t(place.rank),
           signature = uint32_t(c.signature), blocks = uint32_t(c.blocks);
  void* params[] = {&buffers[0], &buffers[1], &buffers[2], &buffers[3], &buffers[4], &buffers[5], &peers, &word,
                    &half_bytes, &patience,   &rows,       &share,      &rank,       &signature,  &blocks};
  if (int status = driver.Launch(function, blocks, unsigned(c.threads), unsigned(c.shared), stream, params))
    return Fail(ffi::ErrorCode::kInternal, c, driver.Describe("launching the kernel", status));
  return ffi::Error::Success();
}

template <typename Binding> auto Attributes(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<Str>("op")
      .template Attr<Str>("image")
      .template Attr<Str>("name")
      .template Attr<Str>("target")
      .template Attr<Str>("layout")
      .template Attr<Ints>("devices")
      .template Attr<int64_t>("ranks")
      .template Attr<int64_t>("process")
      .template Attr<int64_t>("site")
      .template Attr<int64_t>("signature")
      .template Attr<int64_t>("blocks")
      .template Attr<int64_t>("threads")
      .template Attr<int64_t>("shared")
      .template Attr<int64_t>("rows")
      .template Attr<int64_t>("share")
      .template Attr<int64_t>("half_bytes")
      .template Attr<int64_t>("timeout_ns")
      .template Attr<int64_t>("key");
}
auto BindInstantiate() { return Attributes(ffi::Ffi::BindInstantiate()); }
auto BindInitialize() { return Attributes(ffi::Ffi::BindInitialize()); }
constexpr auto kInstantiate = [](auto... attributes) { return Instantiate(Call{attributes...}); };
constexpr auto kInitialize = [](auto... attributes) { return Initialize(Call{attributes...}); };
#ifndef JAXNORM_LAUNCHER_HOST
auto BindExecute() {
  return Attributes(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().RemainingArgs().RemainingRets());
}
constexpr auto kExecute = [](void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets, auto... attributes) {
  return Execute(stream, args, rets, Call{attributes...});
};
#else
// For tests on the CPU platform, over a fake driver: no stream, no initialize stage, and no device that XLA has set.
auto BindExecute() { return Attributes(ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>().RemainingArgs().RemainingRets()); }
constexpr auto kExecute = [](int32_t ordinal, ffi::RemainingArgs args, ffi::RemainingRets rets, auto... attributes) {
  const Call c{attributes...};
  PeerDriver::Get(c.hip()).MakeCurrent(ordinal);
  if (ffi::Error error = Initialize(c); error.failure()) return error;
  return Execute(nullptr, args, rets, c);
};
#endif

int Text(const std::string& text, char* out, int size) {
  std::snprintf(out, size_t(size), "%s", text.c_str());
  return text.empty() ? 0 : 1;
}

}  // namespace
}  // namespace jaxnorm::distributed

#pragma GCC visibility push(default)
using namespace jaxnorm::distributed;
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormFusedInstantiate, kInstantiate, BindInstantiate());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormFusedInitialize, kInitialize, BindInitialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormFusedExecute, kExecute, BindExecute(), {xla::ffi::Traits::kCmdBufferCompatible});
// The functions below return 0, or 1 with a text in `out`.
// What has failed so far.
extern "C" int JaxnormFusedFailures(char* out, int size) {
  std::string all;
  Groups::Get().Each([&](const Group& group) {
    const std::string broken = group.Broken();
    if (!broken.empty()) all += (all.empty() ? "" : "; ") + broken;
  });
  return Text(all, out, size);
}
extern "C" int JaxnormFusedReset(char* out, int size) {
  std::string problem;
  Groups::Get().Each([&](Group& group) {
    const PeerDriver& driver = PeerDriver::Get(group.key().hip);
    if (problem.empty() && driver.error().empty()) problem = group.Reset(driver);
  });
  return Text(problem, out, size);
}
// Several processes: makes this rank's workspace on its device and gives its handle of 64 bytes ...
extern "C" int JaxnormFusedCreate(int hip, const int64_t* devices, int ranks, int64_t process, int rank,
                                  uint64_t half_bytes, char* handle, char* out, int size) {
  const PeerDriver& driver = PeerDriver::Get(hip != 0);
  if (!driver.error().empty()) return Text(driver.error(), out, size);
  if (int status = driver.MakeCurrent(int(devices[rank] % kProcess)))
    return Text(driver.Describe("making a device current", status), out, size);
  Group& group = Groups::Get().Find(Key{hip != 0, std::vector<int64_t>(devices, devices + ranks)}, process);
  IpcHandle mine;
  const std::string problem = group.Create(driver, rank, half_bytes, &mine);
  std::memcpy(handle, mine.bytes, sizeof mine.bytes);
  return Text(problem, out, size);
}
// ... and maps those of all ranks, 64 bytes each.
extern "C" int JaxnormFusedConnect(int hip, const int64_t* devices, int ranks, int64_t process, int rank,
                                   const char* handles, char* out, int size) {
  const PeerDriver& driver = PeerDriver::Get(hip != 0);
  if (int status = driver.MakeCurrent(int(devices[rank] % kProcess)))
    return Text(driver.Describe("making a device current", status), out, size);
  Group& group = Groups::Get().Find(Key{hip != 0, std::vector<int64_t>(devices, devices + ranks)}, process);
  IpcHandle all[kMaxRanks];
  std::memcpy(all, handles, sizeof(IpcHandle) * size_t(ranks));
  return Text(group.Connect(driver, rank, all), out, size);
}
#pragma GCC visibility pop
