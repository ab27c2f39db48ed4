// FFI target jaxnorm_launch: launches one kernel of a code object (hsaco or cubin) on XLA's stream, on CUDA and ROCm.
//
// Built by a plain C++ compiler with no GPU toolkit: the driver is found with dlopen when the first kernel is loaded.
// Three stages:
//   instantiate  checks the attributes and keeps them, once per call site of a compiled program
//   initialize   loads the code object on the current device, before XLA may record a graph
//   execute      fills the parameter array and launches; it takes no lock, allocates nothing and synchronises nothing
//
// A code object is loaded once per device, however many call sites use it, and stays loaded until the process ends:
// nothing says when the last recorded graph that holds one of its functions is gone.
#include <dlfcn.h>

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
constexpr int kInterface = 1;

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

  int Launch(void* function, const std::array<uint32_t, 3>& grid, uint32_t threads, uint32_t shared, void* stream,
             void** params) const {
    return launch_(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, params, nullptr);
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

// A code object, one per distinct image in the process, and what the driver made of it. The driver may keep pointing
// into the bytes, so an image is never freed.
class Image {
 public:
  // The one image of these bytes.
  static Image* Intern(bool hip, Str bytes) {
    static auto* mutex = new std::mutex;
    static auto* images = new std::array<std::unordered_map<Str, std::unique_ptr<Image>>, 2>;
    std::lock_guard<std::mutex> lock(*mutex);
    auto& known = (*images)[hip];
    if (auto found = known.find(bytes); found != known.end()) return found->second.get();
    std::unique_ptr<Image> image(new Image(bytes));
    Image* result = image.get();
    known.emplace(result->bytes_, std::move(image));
    return result;
  }

  // Loads the image on the device of `context` if it is not there yet, and finds the function with room for `shared`
  // bytes. On failure returns null and says in `error` which call failed how.
  void* Load(const Driver& driver, uint64_t context, const std::string& name, int64_t shared, std::string* error) {
    std::lock_guard<std::mutex> lock(mutex_);
    Module& module = modules_[context];
    if (module.handle == nullptr) {
      if (int status = driver.LoadModule(&module.handle, bytes_.data())) {
        module.handle = nullptr;
        *error = "cannot load its code object (" + std::to_string(bytes_.size()) + " bytes) on this device, " +
                 driver.Describe("cuModuleLoadData", "hipModuleLoadData", status);
        return nullptr;
      }
    }
    Function& function = module.functions[name];
    if (function.handle == nullptr) {
      if (int status = driver.GetFunction(&function.handle, module.handle, name.c_str())) {
        function.handle = nullptr;
        *error = "not in its code object, " + driver.Describe("cuModuleGetFunction", "hipModuleGetFunction", status);
        return nullptr;
      }
    }
    // Call sites share the function, so the limit only ever goes up.
    if (shared > function.shared_limit) {
      if (int status = driver.RaiseShared(function.handle, shared)) {
        *error = "cannot have " + std::to_string(shared) + " bytes of shared memory, " +
                 driver.Describe("cuFuncSetAttribute", "hipFuncSetAttribute", status);
        return nullptr;
      }
      function.shared_limit = shared;
    }
    return function.handle;
  }

 private:
  struct Function {
    void* handle = nullptr;
    int64_t shared_limit = kDefaultSharedCuda;
  };
  struct Module {
    void* handle = nullptr;
    std::map<std::string, Function> functions;
  };

  explicit Image(Str bytes) : bytes_(bytes) {}

  const std::string bytes_;
  std::mutex mutex_;
  std::map<uint64_t, Module> modules_;  // by Driver::Current
};

// One per call site of a compiled program.
struct LaunchState {
  static ffi::TypeId id;
  static ffi::TypeInfo info;

  // A device on which the function is loaded. The list only grows, so that execute can read it without a lock.
  struct Loaded {
    uint64_t context;
    void* function;
    const Loaded* next;
  };

  LaunchState() = default;
  LaunchState(const LaunchState&) = delete;
  LaunchState& operator=(const LaunchState&) = delete;
  ~LaunchState() {
    for (const Loaded* l = loaded.load(); l != nullptr;) delete std::exchange(l, l->next);
  }

  void* Find(uint64_t context) const {
    for (const Loaded* l = loaded.load(std::memory_order_acquire); l != nullptr; l = l->next) {
      if (l->context == context) return l->function;
    }
    return nullptr;
  }

  bool EmptyGrid() const { return grid[0] == 0 || grid[1] == 0 || grid[2] == 0; }

  Image* image = nullptr;
  std::string name, target, layout;
  bool hip = false;
  std::array<uint32_t, 3> grid = {};
  uint32_t threads = 0, shared = 0;
  size_t buffers = 0;                         // how many 'p' the layout has
  std::array<int64_t, kMaxParams> scalars{};  // little endian: the low bytes of an int64 are its int32
  std::mutex mutex;                           // writers of `loaded`
  std::atomic<const Loaded*> loaded{nullptr};
};

ffi::TypeId LaunchState::id = {};
ffi::TypeInfo LaunchState::info = ffi::MakeTypeInfo<LaunchState>();

std::string Where(Str name) { return "jaxnorm: kernel '" + std::string(name) + "': "; }

ffi::Error Wrong(Str name, const std::string& what) { return ffi::Error::InvalidArgument(Where(name) + what); }

std::string Describe(const LaunchState& s) {
  return "target " + s.target + ", grid (" + std::to_string(s.grid[0]) + ", " + std::to_string(s.grid[1]) + ", " +
         std::to_string(s.grid[2]) + "), block " + std::to_string(s.threads) + ", shared memory " +
         std::to_string(s.shared) + " bytes";
}

ffi::Error Failed(const LaunchState& s, const std::string& what) {
  return ffi::Error::Internal(Where(s.name) + what + "; " + Describe(s));
}

ffi::Error CheckGrid(Str name, bool hip, Ints grid, int64_t threads, int64_t shared) {
  if (grid.size() != 3) return Wrong(name, "grid: got " + std::to_string(grid.size()) + " sizes, expected 3");
  if (threads < 1 || threads > kMaxThreads)
    return Wrong(name, "threads: got " + std::to_string(threads) + ", expected 1 to " + std::to_string(kMaxThreads));
  if (shared < 0 || shared > std::numeric_limits<int32_t>::max())
    return Wrong(name, "shared: got " + std::to_string(shared) + " bytes, expected 0 to 2**31 - 1");
  // HIP counts threads, not blocks, in 32 bits.
  const int64_t max_x = hip ? std::numeric_limits<uint32_t>::max() / threads : kMaxGridX;
  const std::array<int64_t, 3> limits = {max_x < kMaxGridX ? max_x : kMaxGridX, kMaxGridYZ, kMaxGridYZ};
  for (size_t i = 0; i < 3; ++i) {
    if (grid[i] < 0 || grid[i] > limits[i])
      return Wrong(name, "grid[" + std::to_string(i) + "]: got " + std::to_string(grid[i]) + ", expected 0 to " +
                             std::to_string(limits[i]) + (hip ? " (HIP)" : " (CUDA)"));
  }
  return ffi::Error::Success();
}

// Checks the layout against the scalars, and counts its buffers.
ffi::Error ReadLayout(Str layout, Ints scalars, LaunchState* s) {
  if (layout.size() > kMaxParams)
    return Wrong(s->name, "layout: got " + std::to_string(layout.size()) + " parameters, expected at most " +
                              std::to_string(kMaxParams));
  size_t used = 0;
  for (char c : layout) {
    if (c == 'p') ++s->buffers;
    if (c == 'p' || c == 'n') continue;
    if (c != 'i' && c != 'l' && c != 'f')
      return Wrong(s->name, "layout: got '" + std::string(layout) + "', expected only p, n, i, l and f");
    if (used >= scalars.size()) {
      ++used;
      continue;
    }
    const int64_t value = scalars[used];
    // Four bytes: a signed or an unsigned 32-bit integer, or the bits of a float.
    if (c != 'l' && (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<uint32_t>::max()))
      return Wrong(s->name, "scalars[" + std::to_string(used) + "]: got " + std::to_string(value) +
                                ", expected 32 bits as layout '" + std::string(layout) + "' says");
    s->scalars[used++] = value;
  }
  if (used != scalars.size())
    return Wrong(s->name, "scalars: got " + std::to_string(scalars.size()) + ", expected " + std::to_string(used) +
                              " as layout '" + std::string(layout) + "' says");
  return ffi::Error::Success();
}

ffi::ErrorOr<std::unique_ptr<LaunchState>> Instantiate(Str image, Str name, Str target, Ints grid, int64_t threads,
                                                       int64_t shared, Str layout, Ints scalars) {
  const bool hip = target.substr(0, 3) == "gfx";
  if (!hip && target.substr(0, 3) != "sm_")
    return ffi::Unexpected(Wrong(name, "target: got '" + std::string(target) + "', expected gfx... or sm_..."));
  if (ffi::Error error = CheckGrid(name, hip, grid, threads, shared); error.failure()) return ffi::Unexpected(error);
  auto s = std::make_unique<LaunchState>();
  s->name = name;
  if (ffi::Error error = ReadLayout(layout, scalars, s.get()); error.failure()) return ffi::Unexpected(error);
  s->image = Image::Intern(hip, image);
  s->target = target;
  s->layout = layout;
  s->hip = hip;
  for (size_t i = 0; i < 3; ++i) s->grid[i] = static_cast<uint32_t>(grid[i]);
  s->threads = static_cast<uint32_t>(threads);
  s->shared = static_cast<uint32_t>(shared);
  return s;
}

// XLA runs this before every execution; after the first on a device it only reads.
ffi::Error Initialize(LaunchState* s, ffi::Dictionary) {
  if (s->EmptyGrid()) return ffi::Error::Success();
  const Driver& driver = Driver::Get(s->hip);
  if (!driver.error().empty())
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, Where(s->name) + driver.error() + "; target " + s->target);
  uint64_t context = 0;
  if (int status = driver.Current(&context))
    return Failed(*s, "no current device, " + driver.Describe("cuCtxGetCurrent", "hipGetDevice", status));
  if (s->Find(context) != nullptr) return ffi::Error::Success();
  std::lock_guard<std::mutex> lock(s->mutex);
  if (s->Find(context) != nullptr) return ffi::Error::Success();
  std::string error;
  void* function = s->image->Load(driver, context, s->name, s->shared, &error);
  if (function == nullptr) return Failed(*s, error);
  s->loaded.store(new LaunchState::Loaded{context, function, s->loaded.load()}, std::memory_order_release);
  return ffi::Error::Success();
}

ffi::Error Launch(void* stream, LaunchState* s, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
  if (args.size() + rets.size() != s->buffers)
    return Wrong(s->name, "layout: got '" + s->layout + "' with " + std::to_string(s->buffers) + " buffers, expected " +
                              std::to_string(args.size()) + " operands + " + std::to_string(rets.size()) + " results");
  if (s->EmptyGrid()) return ffi::Error::Success();
  const Driver& driver = Driver::Get(s->hip);
  uint64_t context = 0;
  if (int status = driver.Current(&context))
    return Failed(*s, "no current device, " + driver.Describe("cuCtxGetCurrent", "hipGetDevice", status));
  void* function = s->Find(context);
  if (function == nullptr) return Failed(*s, "XLA did not initialize it on this device");

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
  for (char c : s->layout) {
    if (c == 'p') {
      params[count++] = &buffers[buffer++];
    } else if (c == 'n') {
      params[count++] = &null;
    } else {
      params[count++] = &s->scalars[scalar++];  // the driver copies it during the call
    }
  }
  for (size_t i = 0; i < kTritonScratch; ++i) params[count++] = &null;
  if (int status = driver.Launch(function, s->grid, s->threads, s->shared, stream, params.data()))
    return Failed(*s, driver.Describe("cuLaunchKernel", "hipModuleLaunchKernel", status));
  return ffi::Error::Success();
}

#ifndef JAXNORM_LAUNCHER_HOST
ffi::Error Execute(void* stream, LaunchState* s, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary) {
  return Launch(stream, s, args, rets);
}
auto BindExecute() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<void*>>()
      .Ctx<ffi::State<LaunchState>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<ffi::Dictionary>();
}
#else
// For tests on the CPU platform, which has no stream and no initialize stage, over a fake driver.
ffi::Error Execute(LaunchState* s, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
  if (ffi::Error error = Initialize(s, attributes); error.failure()) return error;
  return Launch(nullptr, s, args, rets);
}
auto BindExecute() {
  return ffi::Ffi::Bind().Ctx<ffi::State<LaunchState>>().RemainingArgs().RemainingRets().Attrs<ffi::Dictionary>();
}
#endif

auto BindInstantiate() {
  return ffi::Ffi::BindInstantiate()
      .Attr<Str>("image")
      .Attr<Str>("name")
      .Attr<Str>("target")
      .Attr<Ints>("grid")
      .Attr<int64_t>("threads")
      .Attr<int64_t>("shared")
      .Attr<Str>("layout")
      .Attr<Ints>("scalars");
}

// A stage is handed all attributes and must bind them all; the state holds what is needed, so the rest stays undecoded.
auto BindInitialize() { return ffi::Ffi::BindInitialize().Ctx<ffi::State<LaunchState>>().Attrs<ffi::Dictionary>(); }

}  // namespace
}  // namespace jaxnorm

// The only symbols that leave the library: the build hides the others.
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormLaunchInstantiate, jaxnorm::Instantiate, jaxnorm::BindInstantiate());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormLaunchInitialize, jaxnorm::Initialize, jaxnorm::BindInitialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxnormLaunchExecute, jaxnorm::Execute, jaxnorm::BindExecute(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
extern "C" void* JaxnormLaunchTypeId() { return &jaxnorm::LaunchState::id; }
extern "C" void* JaxnormLaunchTypeInfo() { return &jaxnorm::LaunchState::info; }
extern "C" int JaxnormLaunchInterface() { return jaxnorm::kInterface; }
extern "C" int JaxnormLaunchFfiMinor() { return XLA_FFI_API_MINOR; }
#pragma GCC visibility pop
