// A CUDA driver on CPU threads, for the host side of the fused distributed calls: devices are numbers, peer memory is
// memory, and a launch runs the kernel's own source through simt.h in the calling thread. Included behind the kernel
// instances; `run_kernel` is theirs.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fake {
inline thread_local int device = -1;
inline char contexts[16];  // the context of device d is &contexts[d]
inline std::atomic<int> allocations{0};
inline int limit(const char* name) {
  const char* text = getenv(name);
  return text ? atoi(text) : -1;
}
}  // namespace fake

#define FAKE extern "C" __attribute__((visibility("default"))) int
FAKE cuInit(unsigned) { return 0; }
FAKE cuDeviceGet(int* out, int ordinal) { return *out = ordinal, 0; }
FAKE cuDevicePrimaryCtxRetain(void** out, int device) { return *out = &fake::contexts[device], 0; }
FAKE cuCtxSetCurrent(void* context) { return fake::device = int((char*)context - fake::contexts), 0; }
FAKE cuCtxGetCurrent(void** out) { return *out = &fake::contexts[fake::device], 0; }
FAKE cuCtxGetDevice(int* out) { return *out = fake::device, 0; }
FAKE cuCtxSynchronize() { return 0; }
FAKE cuDeviceCanAccessPeer(int* can, int a, int b) {
  const int lonely = fake::limit("FAKE_NO_PEER");
  return *can = a != lonely && b != lonely, 0;
}
FAKE cuCtxEnablePeerAccess(void*, unsigned) { return 704; }  // already enabled
FAKE cuMemAlloc_v2(void** out, size_t bytes) {
  const int most = fake::limit("FAKE_MOST_BYTES");
  if (most >= 0 && bytes > size_t(most)) return 2;  // CUDA_ERROR_OUT_OF_MEMORY
  ++fake::allocations;
  *out = aligned_alloc(1024, (bytes + 1023) / 1024 * 1024);
  memset(*out, 0xff, bytes);
  return 0;
}
FAKE cuMemFree_v2(void* p) { return free(p), 0; }
FAKE cuMemsetD8_v2(void* p, unsigned char v, size_t n) { return memset(p, v, n), 0; }
FAKE cuMemHostAlloc(void** out, size_t bytes, unsigned) { return *out = aligned_alloc(64, bytes), 0; }
FAKE cuMemHostGetDevicePointer_v2(void** out, void* p, unsigned) { return *out = p, 0; }
FAKE cuMemFreeHost(void* p) { return free(p), 0; }
FAKE cuIpcCloseMemHandle(void*) { return 0; }
FAKE cuModuleUnload(void*) { return 0; }
struct FakeHandle {
  char bytes[64];
};
FAKE cuIpcGetMemHandle(FakeHandle* h, void* p) { return memcpy(h->bytes, &p, sizeof p), 0; }
FAKE cuIpcOpenMemHandle_v2(void** out, FakeHandle h, unsigned) { return memcpy(out, h.bytes, sizeof *out), 0; }
// A code object is four letters and the index of an instance.
FAKE cuModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "SIMT", 4) != 0) return 200;
  return *module = (void*)(intptr_t)(atoi((const char*)image + 4) + 1), 0;
}
FAKE cuModuleGetFunction(void** function, void* module, const char*) { return *function = module, 0; }
FAKE cuLaunchKernel(void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                    unsigned bytes, void*, void** params, void**) {
  simt::wave = JN_WAVE;
  const int index = int((intptr_t)function) - 1;
  simt::launch({blocks, 1}, int(threads), bytes, simt::Order::kForward, [=] { run_kernel(index, params); });
  return 0;
}
FAKE cuGetErrorName(int status, const char** out) {
  return *out = status == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR", 0;
}
FAKE fake_allocations() { return fake::allocations; }
