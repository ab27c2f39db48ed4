// The module calls of the CUDA driver API and of HIP, found with dlopen at the first use: they have the same shape,
// opaque handles are void*.
#pragma once
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <string>

namespace jaxnorm {

constexpr int kMaxDynamicSharedSizeAttribute = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kLargeClustersAttribute = 14;        // CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
constexpr int kUnitsAttribute = 16;                // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kTogetherAttribute = 95;             // CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
constexpr int kSuccess = 0;                        // CUDA_SUCCESS, hipSuccess
constexpr int kNoRoom = 720;                       // CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
constexpr int kNotSupported = 801;                 // CUDA_ERROR_NOT_SUPPORTED
constexpr int kOverlapDriver = 12030;  // From 12.3 on, what is recorded in a graph keeps the overlap of its launches.

// CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute {
  static constexpr int kTogether = 2;  // CU_LAUNCH_ATTRIBUTE_COOPERATIVE
  static constexpr int kOverlap = 6;   // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  alignas(8) int id;
  alignas(8) char value[64];
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "as in cuda.h");

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

  // Lets a function that was compiled for clusters of more than eight blocks be launched. A driver that does not know
  // the attribute has no such functions.
  void AllowLargeClusters(void* function) const {
    if (!hip_) set_attribute_(function, kLargeClustersAttribute, 1);
  }

  // Blocks of a function that the current device has room for at the same time, its limit of shared memory being raised
  // already; 0 where they cannot be launched together or nobody can tell.
  int64_t BlocksAtOnce(void* function, int64_t threads, int64_t shared) const {
    int device = 0, together = 0, units = 0, blocks = 0;
    if (!launch_config_ || !occupancy_ || !current_device_ || !device_attribute_) return 0;
    if (current_device_(&device) || device_attribute_(&together, kTogetherAttribute, device) || !together ||
        device_attribute_(&units, kUnitsAttribute, device) ||
        occupancy_(&blocks, function, static_cast<int>(threads), static_cast<size_t>(shared)))
      return 0;
    return int64_t{units} * blocks;
  }

  // An ordinary launch; one that may begin while the one before it on the stream still runs, which its kernel must wait
  // for (griddepcontrol.wait); or one whose blocks all run at the same time.
  enum class Kind { kOrdinary, kOverlapping, kTogether };

  // Overlapping is an ordinary launch where the driver has no such thing; together is none then: kNoRoom or
  // kNotSupported ask for other kernels.
  int Launch(void* function, const int64_t* grid, int64_t threads, int64_t shared, void* stream, void** params,
             Kind kind) const {
    const unsigned x = static_cast<unsigned>(grid[0]), y = static_cast<unsigned>(grid[1]),
                   z = static_cast<unsigned>(grid[2]), block = static_cast<unsigned>(threads),
                   bytes = static_cast<unsigned>(shared);
    const bool together = kind == Kind::kTogether;
    if (together ? launch_config_ != nullptr : kind == Kind::kOverlapping && can_overlap_) {
      LaunchAttribute attribute{together ? LaunchAttribute::kTogether : LaunchAttribute::kOverlap, {1}};
      const LaunchConfig config{{x, y, z}, {block, 1, 1}, bytes, stream, &attribute, 1};
      const int status = launch_config_(&config, function, params, nullptr);
      if (together || status != kNotSupported) return status;
    }
    if (together) return kNotSupported;
    return launch_(function, x, y, z, block, 1, 1, bytes, stream, params, nullptr);
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
      int (*version)(int*) = nullptr;
      int number = 0;
      Find(library, "cuDriverGetVersion", &version, false);
      Find(library, "cuLaunchKernelEx", &launch_config_, false);
      can_overlap_ = launch_config_ && version && version(&number) == kSuccess && number >= kOverlapDriver;
      Find(library, "cuOccupancyMaxActiveBlocksPerMultiprocessor", &occupancy_, false);
      Find(library, "cuCtxGetDevice", &current_device_, false);
      Find(library, "cuDeviceGetAttribute", &device_attribute_, false);
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
  bool can_overlap_ = false;
  std::string error_;
  int (*load_module_)(void**, const void*) = nullptr;
  int (*get_function_)(void**, void*, const char*) = nullptr;
  int (*launch_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                 void**) = nullptr;
  int (*launch_config_)(const LaunchConfig*, void*, void**, void**) = nullptr;
  int (*set_attribute_)(void*, int, int) = nullptr;
  int (*occupancy_)(int*, void*, int, size_t) = nullptr;
  int (*current_device_)(int*) = nullptr;
  int (*device_attribute_)(int*, int, int) = nullptr;
  int (*get_device_)(int*) = nullptr;
  int (*get_context_)(void**) = nullptr;
  int (*get_context_id_)(void*, unsigned long long*) = nullptr;
  const char* (*hip_error_name_)(int) = nullptr;
  const char* (*hip_error_text_)(int) = nullptr;
  int (*cuda_error_name_)(int, const char**) = nullptr;
  int (*cuda_error_text_)(int, const char**) = nullptr;
};

}  // namespace jaxnorm
