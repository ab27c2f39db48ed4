// The driver calls that workspaces on several devices need, for CUDA and HIP, found with dlopen like the launcher's.
#pragma once
#include <dlfcn.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace jaxnorm::distributed {

struct IpcHandle {
  char bytes[64];  // CUipcMemHandle, hipIpcMemHandle_t
};

// One vendor's driver. Every function acts on the thread's current device, as XLA sets it, and returns 0 or an error.
class PeerDriver {
 public:
  static const PeerDriver& Get(bool hip) {
    if (hip) {
      static const PeerDriver* rocm = new PeerDriver(true);
      return *rocm;
    }
    static const PeerDriver* cuda = new PeerDriver(false);
    return *cuda;
  }

  const std::string& error() const { return error_; }
  bool hip() const { return hip_; }

  // The current device's ordinal and context (HIP: none).
  int Current(int* device, void** context) const {
    *context = nullptr;
    if (hip_) return get_device_(device);
    if (int status = get_context_(context)) return status;
    return *context == nullptr ? kInvalidContext : get_device_(device);
  }
  // Makes a device current for this thread, for calls that do not come from XLA.
  int MakeCurrent(int device) const {
    if (hip_) return set_device_(device);
    int handle = 0;
    void* context = nullptr;
    if (int status = init_(0)) return status;
    if (int status = device_get_(&handle, device)) return status;
    if (int status = retain_(&context, handle)) return status;
    return set_context_(context);
  }
  int Synchronize() const { return synchronize_(); }

  // `reaches`: the current device, `device`, can map memory of `peer`; then it is mapped.
  int EnablePeer(int device, int peer, void* peer_context, bool* reaches) const {
    int can = 0;
    if (int status = can_access_(&can, device, peer)) return status;
    *reaches = can != 0;
    if (!can) return 0;
    const int status = hip_ ? enable_device_(peer, 0) : enable_context_(peer_context, 0);
    return status == kAlreadyEnabled ? 0 : status;
  }

  // Zeroed device memory that other devices may write while a kernel here reads it. AMD: ordinary memory is coherent
  // at the ends of kernels only, so it must be uncached.
  int Allocate(char** memory, size_t bytes) const {
    void* pointer = nullptr;
    const int status = hip_ ? allocate_uncached_(&pointer, bytes, kUncached) : allocate_(&pointer, bytes);
    if (status) return status;
    if (int failed = Zero(static_cast<char*>(pointer), bytes)) {
      Free(static_cast<char*>(pointer));
      return failed;
    }
    *memory = static_cast<char*>(pointer);
    return 0;
  }
  int Zero(char* memory, size_t bytes) const {
    const int status =
        hip_ ? memset_hip_(memory, 0, bytes) : memset_cuda_(reinterpret_cast<uintptr_t>(memory), 0, bytes);
    return status ? status : synchronize_();
  }
  int Free(char* memory) const { return free_(memory); }
  // A word in the host's memory that kernels of every device may write.
  int AllocateWord(volatile uint32_t** host, char** device) const {
    void *pointer = nullptr, *mapped = nullptr;
    if (int status = allocate_host_(&pointer, 64, kPortableMapped)) return status;
    if (int status = host_pointer_(&mapped, pointer, 0)) {
      free_host_(pointer);
      return status;
    }
    *host = static_cast<volatile uint32_t*>(pointer);
    **host = 0;
    *device = static_cast<char*>(mapped);
    return 0;
  }

  int Export(IpcHandle* handle, char* memory) const { return export_(handle, memory); }
  int Import(char** memory, const IpcHandle& handle) const {
    void* pointer = nullptr;
    const int status = import_(&pointer, handle, kLazyPeerAccess);
    if (status == 0) *memory = static_cast<char*>(pointer);
    return status;
  }
  int Close(char* memory) const { return close_(memory); }

  int LoadModule(void** module, const void* image) const { return load_module_(module, image); }
  int UnloadModule(void* module) const { return unload_module_(module); }
  int GetFunction(void** function, void* module, const char* name) const {
    if (int status = get_function_(function, module, name)) return status;
    // A driver that loads code at the first launch would do it while another device of the group already waits.
    int registers = 0;
    if (load_function_) return load_function_(*function);
    if (function_attribute_) function_attribute_(&registers, kRegisters, *function);
    return 0;
  }
  int Launch(void* function, unsigned blocks, unsigned threads, unsigned shared, void* stream, void** params) const {
    return launch_(function, blocks, 1, 1, threads, 1, 1, shared, stream, params, nullptr);
  }
  // Ticks a second of the clock that kernels read: nanoseconds on NVIDIA, the constant clock on AMD.
  double TickRate(int device) const {
    constexpr int kWallClockRate = 10017;  // hipDeviceAttributeWallClockRate, kHz
    int khz = 0;
    if (!hip_) return 1e9;
    return attribute_ && attribute_(&khz, kWallClockRate, device) == 0 && khz > 0 ? khz * 1e3 : 1e8;
  }

  std::string Describe(const char* what, int status) const {
    const char* name = nullptr;
    if (hip_) {
      if (hip_error_name_) name = hip_error_name_(status);
    } else if (cuda_error_name_) {
      cuda_error_name_(status, &name);
    }
    return std::string(what) + ": " + (name ? name : "error") + " (" + std::to_string(status) + ")";
  }

 private:
  static constexpr int kInvalidContext = 201, kAlreadyEnabled = 704;
  static constexpr int kRegisters = 4;  // CU_FUNC_ATTRIBUTE_NUM_REGS
  static constexpr unsigned kUncached = 3, kPortableMapped = 3, kLazyPeerAccess = 1;

  explicit PeerDriver(bool hip) : hip_(hip) {
    static constexpr std::array<const char*, 2> kCuda = {"libcuda.so.1", "libcuda.so"};
    static constexpr std::array<const char*, 2> kHip = {"libamdhip64.so.7", "libamdhip64.so.6"};
    void* library = nullptr;
    for (int flag : {RTLD_NOLOAD, 0})  // what JAX's plugin has mapped first
      for (const char* name : hip ? kHip : kCuda)
        if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL | flag);
    if (library == nullptr) {
      error_ = hip ? "no ROCm runtime" : "no NVIDIA driver";
      return;
    }
    Find(library, hip ? "hipGetDevice" : "cuCtxGetDevice", &get_device_);
    Find(library, hip ? "hipDeviceSynchronize" : "cuCtxSynchronize", &synchronize_);
    Find(library, hip ? "hipDeviceCanAccessPeer" : "cuDeviceCanAccessPeer", &can_access_);
    Find(library, hip ? "hipFree" : "cuMemFree_v2", &free_);
    Find(library, hip ? "hipHostMalloc" : "cuMemHostAlloc", &allocate_host_);
    Find(library, hip ? "hipHostFree" : "cuMemFreeHost", &free_host_);
    Find(library, hip ? "hipHostGetDevicePointer" : "cuMemHostGetDevicePointer_v2", &host_pointer_);
    Find(library, hip ? "hipIpcGetMemHandle" : "cuIpcGetMemHandle", &export_);
    Find(library, hip ? "hipIpcOpenMemHandle" : "cuIpcOpenMemHandle_v2", &import_);
    Find(library, hip ? "hipIpcCloseMemHandle" : "cuIpcCloseMemHandle", &close_);
    Find(library, hip ? "hipModuleUnload" : "cuModuleUnload", &unload_module_);
    Find(library, hip ? "hipModuleLoadData" : "cuModuleLoadData", &load_module_);
    Find(library, hip ? "hipModuleGetFunction" : "cuModuleGetFunction", &get_function_);
    Find(library, hip ? "hipModuleLaunchKernel" : "cuLaunchKernel", &launch_);
    if (hip) {
      Find(library, "hipSetDevice", &set_device_);
      Find(library, "hipDeviceEnablePeerAccess", &enable_device_);
      Find(library, "hipExtMallocWithFlags", &allocate_uncached_);
      Find(library, "hipMemset", &memset_hip_);
      Find(library, "hipDeviceGetAttribute", &attribute_, false);
      Find(library, "hipGetErrorName", &hip_error_name_, false);
    } else {
      Find(library, "cuInit", &init_);
      Find(library, "cuDeviceGet", &device_get_);
      Find(library, "cuDevicePrimaryCtxRetain", &retain_);
      Find(library, "cuCtxGetCurrent", &get_context_);
      Find(library, "cuCtxSetCurrent", &set_context_);
      Find(library, "cuCtxEnablePeerAccess", &enable_context_);
      Find(library, "cuMemAlloc_v2", &allocate_);
      Find(library, "cuMemsetD8_v2", &memset_cuda_);
      Find(library, "cuFuncLoad", &load_function_, false);
      Find(library, "cuFuncGetAttribute", &function_attribute_, false);
      Find(library, "cuGetErrorName", &cuda_error_name_, false);
    }
  }
  template <typename F> void Find(void* library, const char* symbol, F* slot, bool required = true) {
    *slot = reinterpret_cast<F>(dlsym(library, symbol));
    if (*slot == nullptr && required && error_.empty()) error_ = std::string("the driver has no function ") + symbol;
  }

  const bool hip_;
  std::string error_;
  int (*get_device_)(int*) = nullptr;
  int (*set_device_)(int) = nullptr;
  int (*init_)(unsigned) = nullptr;
  int (*device_get_)(int*, int) = nullptr;
  int (*retain_)(void**, int) = nullptr;
  int (*get_context_)(void**) = nullptr;
  int (*set_context_)(void*) = nullptr;
  int (*synchronize_)() = nullptr;
  int (*can_access_)(int*, int, int) = nullptr;
  int (*enable_context_)(void*, unsigned) = nullptr;
  int (*enable_device_)(int, unsigned) = nullptr;
  int (*allocate_)(void**, size_t) = nullptr;
  int (*allocate_uncached_)(void**, size_t, unsigned) = nullptr;
  int (*memset_cuda_)(uintptr_t, unsigned char, size_t) = nullptr;
  int (*memset_hip_)(void*, int, size_t) = nullptr;
  int (*free_)(void*) = nullptr;
  int (*allocate_host_)(void**, size_t, unsigned) = nullptr;
  int (*free_host_)(void*) = nullptr;
  int (*close_)(void*) = nullptr;
  int (*unload_module_)(void*) = nullptr;
  int (*host_pointer_)(void**, void*, unsigned) = nullptr;
  int (*export_)(IpcHandle*, void*) = nullptr;
  int (*import_)(void**, IpcHandle, unsigned) = nullptr;
  int (*load_module_)(void**, const void*) = nullptr;
  int (*get_function_)(void**, void*, const char*) = nullptr;
  int (*launch_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                 void**) = nullptr;
  int (*load_function_)(void*) = nullptr;
  int (*function_attribute_)(int*, int, void*) = nullptr;
  int (*attribute_)(int*, int, int) = nullptr;
  const char* (*hip_error_name_)(int) = nullptr;
  int (*cuda_error_name_)(int, const char**) = nullptr;
};

}  // namespace jaxnorm::distributed
