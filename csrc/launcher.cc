// FFI target jaxnorm_launch: launches one kernel of a code object (hsaco or cubin) on XLA's stream, on CUDA and ROCm.
//
// Built by a plain C++ compiler with no GPU toolkit: the driver is found with dlopen when the first kernel is loaded.
// Three stages:
//   instantiate  checks the attributes, when the program is compiled
//   initialize   loads the code object on the current device, before XLA may record a graph
//   execute      fills the parameter array and launches; it takes no lock, allocates nothing and synchronises nothing
// A code object is loaded once per device, however many call sites use it, and stays loaded until the process ends.
#include <dlfcn.h>

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

#include "xla/ffi/api/ffi.h"

namespace jaxnorm {
namespace {

namespace ffi = xla::ffi;
using Str = std::string_view;
using Ints = ffi::Span<const int64_t>;

// Attributes or exported symbols changed: raise it here and in jaxnorm/_native.py, so that an old binary says so.
constexpr int kInterface = 2;

constexpr size_t kMaxParams = 64;
constexpr size_t kTritonScratch =
    2;  // Triton kernels end in two pointers (global and profile scratch); others ignore them.
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxGridX = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxGridYZ = 65535;
constexpr int64_t kDefaultSharedCuda = 48 << 10;  // More dynamic shared memory must be asked for, function by function.
constexpr int kMaxDynamicSharedSizeAttribute = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kSuccess = 0;                        // CUDA_SUCCESS, hipSuccess

// The module calls of the CUDA driver API and of HIP have the same shape; opaque handles are void*.
class Driver {
 public:
  // The instance for one vendor, opened at the first use.
  static const Driver& Get(bool hip) {
    if (hip) {
      static const Driver* rocm = new Driver(true);
      return *rocm;
    }
    static const Driver* cuda = new Driver(false);
    return *cuda;
  }

  // Why the driver is not usable; empty when it is.
  const std::string& error() const { return error_; }

  // Key of what modules belong to: the CUDA context, or the HIP device. Both are per thread, and XLA sets them before a
  // stage.
  int Current(uint64_t* key) const {
    if (hip_) {
      int device = 0;
      int status = get_device_(&device);
      *key = static_cast<uint64_t>(device);
      return status;
    }
    void* context = nullptr;
    if (int status = get_context_(&context)) return status;
    if (context == nullptr) return kInvalidContext;
    unsigned long long id = reinterpret_cast<uintptr_t>(context);
    // An id is never used twice, but the address of a destroyed context can be.
    int status = get_context_id_ ? get_context_id_(context, &id) : kSuccess;
    *key = id;
    return status;
  }

  int LoadModule(void** module, const void* image) const { return load_module_(module, image); }
  int GetFunction(void** function, void* module, const char* name) const {
    return get_function_(function, module, name);
  }

  // Lets a function use more dynamic shared memory than the default. HIP has no such limit for a module's function.
  int RaiseShared(void* function, int64_t bytes) const {
    if (hip_) return kSuccess;
    return set_attribute_(function, kMaxDynamicSharedSizeAttribute, static_cast<int>(bytes));
  }

  int Launch(void* function, Ints grid, int64_t threads, int64_t shared, void* stream, void** params) const {
    auto narrow = [](int64_t checked) { return static_cast<unsigned>(checked); };
    return launch_(function, narrow(grid[0]), narrow(grid[1]), narrow(grid[2]), narrow(threads), 1, 1, narrow(shared),
                   stream, params, nullptr);
  }

  // "cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED (719): unspecified launch failure"
  std::string Describe(const char* cuda_call, const char* hip_call, int status) const {
    const char *name = nullptr, *text = nullptr;
    if (hip_) {
      if (hip_error_name_) name = hip_error_name_(status);
      if (hip_error_text_) text = hip_error_text_(status);
    } else {
      if (cuda_error_name_) cuda_error_name_(status, &name);
      if (cuda_error_text_) cuda_error_text_(status, &text);
    }
    return std::string(hip_ ? hip_call : cuda_call) + ": " + (name ? name : "error") + " (" + std::to_string(status) +
           ")" + (text ? std::string(": ") + text : "");
  }

 private:
  static constexpr int kInvalidContext = 201;  // CUDA_ERROR_INVALID_CONTEXT

  explicit Driver(bool hip) : hip_(hip) {
    void* library = Open();
    if (library == nullptr) return;
    if (hip) {
      Find(library, "hipModuleLoadData", &load_module_);
      Find(library, "hipModuleGetFunction", &get_function_);
      Find(library, "hipModuleLaunchKernel", &launch_);
      Find(library, "hipGetDevice", &get_device_);
      Find(library, "hipGetErrorName", &hip_error_name_, false);
      Find(library, "hipGetErrorString", &hip_error_text_, false);
    } else {
      Find(library, "cuModuleLoadData", &load_module_);
      Find(library, "cuModuleGetFunction", &get_function_);
      Find(library, "cuLaunchKernel", &launch_);
      Find(library, "cuFuncSetAttribute", &set_attribute_);
      Find(library, "cuCtxGetCurrent", &get_context_);
      Find(library, "cuCtxGetId", &get_context_id_, false);
      Find(library, "cuGetErrorName", &cuda_error_name_, false);
      Find(library, "cuGetErrorString", &cuda_error_text_, false);
    }
  }

  // The copy that JAX's plugin has mapped comes first: a second runtime in one process would not know its streams.
  void* Open() {
    static constexpr std::array<const char*, 1> kCuda = {"libcuda.so.1"};
    static constexpr std::array<const char*, 3> kHip = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"};
    const char* const* names = hip_ ? kHip.data() : kCuda.data();
    const size_t count = hip_ ? kHip.size() : kCuda.size();
    std::string missing_reason;
    for (int flag : {RTLD_NOLOAD, 0}) {
      for (size_t i = 0; i < count; ++i) {
        if (void* library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL | flag)) return library;
        // The reason for the first name is the one to tell: the others are for older systems.
        if (const char* reason = dlerror(); reason && flag == 0 && i == 0) missing_reason = reason;
      }
    }
    error_ = (hip_ ? "no ROCm runtime: " : "no NVIDIA driver: ") + missing_reason;
    return nullptr;
  }

  template <typename F> void Find(void* library, const char* symbol, F* slot, bool required = true) {
    *slot = reinterpret_cast<F>(dlsym(library, symbol));
    if (*slot == nullptr && required && error_.empty()) error_ = std::string("the driver has no function ") + symbol;
  }

  const bool hip_;
  std::string error_;
  int (*load_module_)(void**, const void*) = nullptr;
  int (*get_function_)(void**, void*, const char*) = nullptr;
  int (*launch_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                 void**) = nullptr;
  int (*set_attribute_)(void*, int, int) = nullptr;
  int (*get_device_)(int*) = nullptr;
  int (*get_context_)(void**) = nullptr;
  int (*get_context_id_)(void*, unsigned long long*) = nullptr;
  const char* (*hip_error_name_)(int) = nullptr;
  const char* (*hip_error_text_)(int) = nullptr;
  int (*cuda_error_name_)(int, const char**) = nullptr;
  int (*cuda_error_text_)(int, const char**) = nullptr;
};

// The attributes of one call site.
struct Call {
  Str image, name, target;
  Ints grid;
  int64_t threads, shared;
  Str layout;
  Ints scalars;
  int64_t key;  // digest of image, name and target, so that a launch need not read the image

  bool hip() const { return target.substr(0, 3) == "gfx"; }
  bool empty_grid() const { return grid[0] == 0 || grid[1] == 0 || grid[2] == 0; }
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
  struct Entry {
    int64_t key;
    uint64_t context;  // Driver::Current
    bool hip;
    std::string name;
    void* function;
    std::atomic<int64_t> shared_limit;
    const Entry* next;
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
  // dynamic shared memory.
  ffi::Error Load(const Driver& driver, const Call& c, uint64_t context) {
    std::lock_guard<std::mutex> lock(mutex_);
    Entry* entry = const_cast<Entry*>(Find(c, context));
    if (entry == nullptr) {
      void *module = nullptr, *function = nullptr;
      if (ffi::Error error = LoadModule(driver, c, context, &module); error.failure()) return error;
      if (int status = driver.GetFunction(&function, module, std::string(c.name).c_str()))
        return Failed(
            c, "not in its code object, " + driver.Describe("cuModuleGetFunction", "hipModuleGetFunction", status));
      std::atomic<const Entry*>& bucket = Bucket(c);
      entry = new Entry{c.key, context, c.hip(), std::string(c.name), function, {kDefaultSharedCuda}, bucket.load()};
      bucket.store(entry, std::memory_order_release);
    }
    // Call sites share the function, so its limit only ever goes up.
    if (c.shared > entry->shared_limit) {
      if (int status = driver.RaiseShared(entry->function, c.shared))
        return Failed(
            c, "too much shared memory, " + driver.Describe("cuFuncSetAttribute", "hipFuncSetAttribute", status));
      entry->shared_limit = c.shared;
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

ffi::Error CheckSizes(const Call& c) {
  if (!c.hip() && c.target.substr(0, 3) != "sm_")
    return Wrong(c, "target: got '" + std::string(c.target) + "', expected gfx... or sm_...");
  if (c.grid.size() != 3) return Wrong(c, "grid: got " + std::to_string(c.grid.size()) + " sizes, expected 3");
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
  return ffi::Error::Success();
}

// Checks the layout against the scalars, and counts its buffers.
ffi::Error CheckLayout(const Call& c, size_t* buffers) {
  if (c.layout.size() > kMaxParams)
    return Wrong(c, "layout: got " + std::to_string(c.layout.size()) + " parameters, expected at most " +
                        std::to_string(kMaxParams));
  size_t scalars = 0;
  *buffers = 0;
  for (char letter : c.layout) {
    if (letter == 'p') {
      ++*buffers;
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
  return ffi::Error::Success();
}

// Keeps no state: XLA would want its type registered before the handlers, and JAX hands over what was registered before
// its GPU plugin started in the other order, so that the plugin would fail to start.
ffi::Error Instantiate(const Call& c) {
  size_t buffers = 0;
  if (ffi::Error error = CheckSizes(c); error.failure()) return error;
  return CheckLayout(c, &buffers);
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
  if (entry != nullptr && c.shared <= entry->shared_limit) return ffi::Error::Success();
  return Kernels::Get().Load(driver, c, context);
}

ffi::Error Execute(void* stream, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, const Call& c) {
  size_t expected = 0;
  if (ffi::Error error = CheckSizes(c); error.failure()) return error;
  if (ffi::Error error = CheckLayout(c, &expected); error.failure()) return error;
  if (args.size() + rets.size() != expected)
    return Wrong(c, "layout: got '" + std::string(c.layout) + "' with " + std::to_string(expected) +
                        " buffers, expected " + std::to_string(args.size()) + " operands + " +
                        std::to_string(rets.size()) + " results");
  if (c.empty_grid()) return ffi::Error::Success();
  const Driver& driver = Driver::Get(c.hip());
  uint64_t context = 0;
  if (int status = driver.Current(&context))
    return Failed(c, "no current device, " + driver.Describe("cuCtxGetCurrent", "hipGetDevice", status));
  const Kernels::Entry* entry = Kernels::Get().Find(c, context);
  if (entry == nullptr) return Failed(c, "XLA did not initialize it on this device");

  std::array<void*, kMaxParams> buffers;
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

  std::array<void*, kMaxParams + kTritonScratch> params;
  void* null = nullptr;
  size_t count = 0, buffer = 0, scalar = 0;
  for (char letter : c.layout) {
    if (letter == 'p') {
      params[count++] = &buffers[buffer++];
    } else if (letter == 'n') {
      params[count++] = &null;
    } else {
      // The driver copies it during the call. Little endian: the low bytes of an int64 are its int32.
      params[count++] = const_cast<int64_t*>(&c.scalars[scalar++]);
    }
  }
  for (size_t i = 0; i < kTritonScratch; ++i) params[count++] = &null;
  if (int status = driver.Launch(entry->function, c.grid, c.threads, c.shared, stream, params.data()))
    return Failed(c, driver.Describe("cuLaunchKernel", "hipModuleLaunchKernel", status));
  return ffi::Error::Success();
}

// A stage is handed all attributes and must bind them all, here in the order of Call.
template <typename Binding> auto Attributes(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<Str>("image")
      .template Attr<Str>("name")
      .template Attr<Str>("target")
      .template Attr<Ints>("grid")
      .template Attr<int64_t>("threads")
      .template Attr<int64_t>("shared")
      .template Attr<Str>("layout")
      .template Attr<Ints>("scalars")
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
// For tests on the CPU platform, which has no stream and may have no initialize stage, over a fake driver.
auto BindExecute() { return Attributes(ffi::Ffi::Bind().RemainingArgs().RemainingRets()); }
constexpr auto kExecute = [](ffi::RemainingArgs args, ffi::RemainingRets rets, auto... attributes) {
  const Call c{attributes...};
  if (ffi::Error error = Initialize(c); error.failure()) return error;
  return Execute(nullptr, args, rets, c);
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
