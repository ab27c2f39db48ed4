/* Stands in for libamdhip64.so.7, or with -DFAKE_CUDA for libcuda.so.1, on a machine without a GPU. It records what the
   launcher, the fused distributed calls and tools/run_case.py ask for, refuses what a driver would refuse or what
   fake_fail says, and carries out made-up kernels on host memory: copy(src, dst, i32 bytes)   wide_copy: the same   overrun: writes a byte
   more   meddle: changes src, too wire(src, null, i32, i64, f32, dst; scratch, scratch)  writes to dst, as int32:
   src[0], whether the second parameter is null, the i32, both halves of the i64, the bits of the f32, whether each
   scratch pointer is null fail the launch is an error The current device belongs to a thread, as in the real drivers.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef FAKE_CUDA
#define NAME(cuda, hip) cuda
enum { kBadImage = 200, kDefaultShared = 48 << 10, kMaxShared = 227 << 10 };
#else
#define NAME(cuda, hip) hip
enum { kBadImage = 209, kDefaultShared = 64 << 10, kMaxShared = 64 << 10 };
#endif
enum {
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNoDevice = 100,
  kInvalidHandle = 400,
  kNotFound = 500,
  kLaunchFailed = 719
};

typedef struct {
  int device;
} Module;

typedef struct {
  int device, shared_limit;
  char name[64];
} Function;

static atomic_int loads, lookups, raises, launches, overlaps, together;
static atomic_int modules, buffers; /* alive, of tools/run_case.py: the launcher keeps its own */
static int devices = 1;
static char failing[32];
static int fail_status;
static atomic_int spared;
static _Thread_local int device;
static int last[8];

void fake_set_device(int d) { device = d; }
void fake_counts(int* out) { out[0] = loads, out[1] = lookups, out[2] = raises, out[3] = launches; }
int fake_together(void) { return together; } /* launches whose blocks all run at the same time */
int fake_overlaps(void) { return overlaps; } /* launches that may begin before the one before them has ended */
void fake_last(int* out) { memcpy(out, last, sizeof last); }
void fake_alive(int* out) { out[0] = modules, out[1] = buffers; }
void fake_set_devices(int n) { devices = n; }
/* The next call of this kind (load, function, attribute, device, launch, overlap, together, allocate, copy, wait; of workspaces: space,
   clear, word, mapword, export, import) returns the status. */
void fake_fail(const char* call, int status) {
  snprintf(failing, sizeof failing, "%s", call);
  fail_status = status;
  spared = 0;
}
void fake_spare(int calls) { spared = calls; } /* so many of them succeed before */
static int injected(const char* call) {
  if (strcmp(call, failing) || spared-- > 0) return 0;
  failing[0] = 0;
  return fail_status;
}
#define FAIL_IF_ASKED(call)       \
  do {                            \
    int status_ = injected(call); \
    if (status_) return status_;  \
  } while (0)

int NAME(cuModuleLoadData, hipModuleLoadData)(Module** module, const char* image) {
  FAIL_IF_ASKED("load");
  if (memcmp(image, "\177ELF", 4)) return kBadImage;
  ++loads;
  ++modules;
  *module = malloc(sizeof **module);
  (*module)->device = device;
  return 0;
}

int NAME(cuModuleGetFunction, hipModuleGetFunction)(Function** function, Module* module, const char* name) {
  FAIL_IF_ASKED("function");
  if (module->device != device) return kInvalidHandle;
  if (!strcmp(name, "absent")) return kNotFound;
  ++lookups;
  *function = calloc(1, sizeof **function);
  (*function)->device = device;
  (*function)->shared_limit = kDefaultShared;
  snprintf((*function)->name, sizeof(*function)->name, "%s", name);
  return 0;
}

static int run(const Function* f, void** params) {
  if (!strcmp(f->name, "copy") || !strcmp(f->name, "wide_copy") || !strcmp(f->name, "overrun") || !strcmp(f->name, "meddle")) {
    char *from = *(void**)params[0], *to = *(void**)params[1];
    memcpy(to, from, (size_t)*(int32_t*)params[2]);
    if (f->name[0] == 'o') to[*(int32_t*)params[2]] = 0;
    if (f->name[0] == 'm') from[0] ^= 1;
  } else if (!strcmp(f->name, "wire")) {
    int32_t* out = *(int32_t**)params[5];
    int64_t wide;
    memcpy(&wide, params[3], 8);
    out[0] = **(int32_t**)params[0];
    out[1] = *(void**)params[1] == NULL;
    memcpy(&out[2], params[2], 4);
    out[3] = (int32_t)(wide & 0xffffffff);
    out[4] = (int32_t)(wide >> 32);
    memcpy(&out[5], params[4], 4);
    out[6] = *(void**)params[6] == NULL;
    out[7] = *(void**)params[7] == NULL;
  } else if (!strcmp(f->name, "fail")) {
    return kLaunchFailed;
  }
  return 0;
}

int NAME(cuLaunchKernel, hipModuleLaunchKernel)(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                                unsigned by, unsigned bz, unsigned shared, void* stream, void** params,
                                                void** extra) {
  int v[8] = {(int)gx, (int)gy, (int)gz, (int)bx, (int)by, (int)bz, (int)shared, extra != NULL || stream != NULL};
  FAIL_IF_ASKED("launch");
  if (f->device != device) return kInvalidHandle;
  if (!gx || !gy || !gz || (int)shared > f->shared_limit) return kInvalidValue;
  memcpy(last, v, sizeof v);
  ++launches;
  return run(f, params);
}

int NAME(cuLaunchCooperativeKernel, hipModuleLaunchCooperativeKernel)(Function* f, unsigned gx, unsigned gy,
                                                                      unsigned gz, unsigned bx, unsigned by,
                                                                      unsigned bz, unsigned shared, void* stream,
                                                                      void** params) {
  const int status = NAME(cuLaunchKernel, hipModuleLaunchKernel)(f, gx, gy, gz, bx, by, bz, shared, stream, params, NULL);
  together += status == 0;
  return status;
}

int NAME(cuModuleUnload, hipModuleUnload)(Module* module) {
  --modules;
  free(module);
  return 0;
}
int NAME(cuMemAlloc_v2, hipMalloc)(void** pointer, size_t size) {
  FAIL_IF_ASKED("allocate");
  ++buffers;
  *pointer = malloc(size);
  return 0;
}
int NAME(cuMemFree_v2, hipFree)(void* pointer) {
  --buffers;
  free(pointer);
  return 0;
}
int NAME(cuMemcpyHtoD_v2, hipMemcpyHtoD)(void* to, const void* from, size_t size) {
  FAIL_IF_ASKED("copy");
  memcpy(to, from, size);
  return 0;
}
int NAME(cuMemcpyDtoH_v2, hipMemcpyDtoH)(void* to, const void* from, size_t size) {
  memcpy(to, from, size);
  return 0;
}
int NAME(cuCtxSynchronize, hipDeviceSynchronize)(void) {
  FAIL_IF_ASKED("wait");
  return 0;
}
int NAME(cuDeviceGetCount, hipGetDeviceCount)(int* count) {
  *count = devices;
  return devices ? 0 : kNoDevice;
}

/* Workspaces of several devices, HIP's: what is alive of device memory, host memory and mappings, and every call. */
#ifndef FAKE_CUDA
static pthread_mutex_t noting = PTHREAD_MUTEX_INITIALIZER;
static char notes[1 << 14];
static atomic_int words, mappings;
void fake_peers_alive(int* out) { out[0] = buffers, out[1] = words, out[2] = mappings, out[3] = modules; }
const char* fake_notes(void) { return notes; }
void fake_forget(void) { notes[0] = 0; }
static void note(const char* call, long long a, long long b) {
  pthread_mutex_lock(&noting);
  const size_t used = strlen(notes);
  snprintf(notes + used, sizeof notes - used, "%d %s %lld %lld\n", device, call, a, b);
  pthread_mutex_unlock(&noting);
}
int hipDeviceCanAccessPeer(int* can, int a, int b) { return *can = a != b, 0; }
int hipDeviceEnablePeerAccess(int peer, unsigned flags) {
  note("hipDeviceEnablePeerAccess", peer, flags);
  return 704; /* already enabled */
}
int hipExtMallocWithFlags(void** pointer, size_t size, unsigned flags) {
  note("hipExtMallocWithFlags", (long long)size, flags);
  FAIL_IF_ASKED("space");
  ++buffers;
  *pointer = malloc(size);
  return 0;
}
int hipMemset(void* pointer, int value, size_t size) {
  note("hipMemset", value, (long long)size);
  FAIL_IF_ASKED("clear");
  memset(pointer, value, size);
  return 0;
}
int hipHostMalloc(void** pointer, size_t size, unsigned flags) {
  note("hipHostMalloc", (long long)size, flags);
  FAIL_IF_ASKED("word");
  ++words;
  *pointer = malloc(size);
  return 0;
}
int hipHostFree(void* pointer) {
  --words;
  free(pointer);
  return 0;
}
int hipHostGetDevicePointer(void** mapped, void* pointer, unsigned flags) {
  FAIL_IF_ASKED("mapword");
  *mapped = pointer;
  return (int)flags;
}
typedef struct {
  char bytes[64];
} Handle;
int hipIpcGetMemHandle(Handle* handle, void* pointer) {
  FAIL_IF_ASKED("export");
  memcpy(handle->bytes, &pointer, sizeof pointer);
  return 0;
}
int hipIpcOpenMemHandle(void** pointer, Handle handle, unsigned flags) {
  note("hipIpcOpenMemHandle", flags, 0);
  FAIL_IF_ASKED("import");
  ++mappings;
  memcpy(pointer, handle.bytes, sizeof *pointer);
  return 0;
}
int hipIpcCloseMemHandle(void* pointer) {
  --mappings;
  return pointer == NULL;
}
#endif

#ifdef FAKE_CUDA
#ifndef FAKE_OLD /* a driver from before launches with attributes */
/* As in cuda.h; the one attribute is CU_LAUNCH_ATTRIBUTE_COOPERATIVE or CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION. */
typedef struct {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int allowed;
  } value;
} LaunchAttribute;
enum { kTogether = 2, kOverlap = 6 };
typedef struct {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
} LaunchConfig;
int cuLaunchKernelEx(const LaunchConfig* c, Function* f, void** params, void** extra) {
  const int all = c->count == 1 && c->attributes->id == kTogether;
  FAIL_IF_ASKED(all ? "together" : "overlap");
  if (c->count != 1 || !(all || c->attributes->id == kOverlap) || c->attributes->value.allowed != 1) return kInvalidValue;
  const int status = cuLaunchKernel(f, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, params, extra);
  if (status == 0) ++*(all ? &together : &overlaps);
  return status;
}
/* A multiprocessor has room for 2048 threads and 227 KiB of shared memory; the device has four (attribute 16). */
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* f, int threads, size_t shared) {
  *blocks = 2048 / threads;
  if (shared && *blocks > kMaxShared / (int)shared) *blocks = kMaxShared / (int)shared;
  return (int)shared > f->shared_limit ? kInvalidValue : 0;
}
#endif
int cuDriverGetVersion(int* version) {
  *version = 12030;
  return 0;
}
int cuInit(unsigned flags) { return flags != 0; }
int cuDeviceGet(int* handle, int ordinal) {
  *handle = ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int handle) {
  static int somewhere;
  *context = &somewhere;
  return handle;
}
int cuCtxSetCurrent(void* context) { return context == NULL; }
int cuCtxGetDevice(int* handle) {
  *handle = 0;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int handle) {
  /* compute capability 9.0, multiprocessors, whether all blocks of a launch can run at the same time */
  *value = attribute == 75 ? 9 : attribute == 16 ? 4 : attribute == 95;
  return handle;
}
static atomic_int large_clusters;
int fake_large_clusters(void) { return large_clusters; } /* functions that may be launched in clusters of over eight */
int cuFuncSetAttribute(Function* f, int attribute, int value) {
  if (attribute == 14) { /* CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, which an older driver may not know */
    large_clusters += value == 1;
    return kInvalidValue;
  }
  ++raises;
  FAIL_IF_ASKED("attribute");
  if (attribute != 8 || value > kMaxShared) return kInvalidValue;
  f->shared_limit = value;
  return 0;
}
/* One address for all contexts, so that only the id tells them apart, as after a context was destroyed and made again.
 */
int cuCtxGetCurrent(void** context) {
  FAIL_IF_ASKED("device");
  static int somewhere;
  *context = device < 0 ? NULL : &somewhere;
  return 0;
}
int cuCtxGetId(void* context, unsigned long long* id) {
  *id = (unsigned long long)device + 1;
  return context == NULL;
}
int cuGetErrorName(int status, const char** name) {
  *name = status == kLaunchFailed  ? "CUDA_ERROR_LAUNCH_FAILED"
          : status == kBadImage    ? "CUDA_ERROR_INVALID_IMAGE"
          : status == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY"
          : status == kNoDevice    ? "CUDA_ERROR_NO_DEVICE"
                                   : "CUDA_ERROR";
  return 0;
}
int cuGetErrorString(int status, const char** text) {
  *text = status == kLaunchFailed  ? "unspecified launch failure"
          : status == kOutOfMemory ? "out of memory"
                                   : "some failure";
  return 0;
}
#else
int hipSetDevice(int d) {
  device = d;
  return d < 8 ? 0 : 101;
}
int hipGetDevicePropertiesR0600(char* properties, int d) {
  strcpy(properties + 1160, "gfx942:sramecc+:xnack-");
  return d;
}
int hipGetDevice(int* d) {
  FAIL_IF_ASKED("device");
  *d = device;
  return device < 0 ? 101 : 0;
}
const char* hipGetErrorName(int status) {
  return status == kLaunchFailed  ? "hipErrorLaunchFailure"
         : status == kBadImage    ? "hipErrorNoBinaryForGpu"
         : status == kOutOfMemory ? "hipErrorOutOfMemory"
         : status == kNoDevice    ? "hipErrorNoDevice"
                                  : "hipError";
}
const char* hipGetErrorString(int status) {
  return status == kLaunchFailed  ? "unspecified launch failure"
         : status == kOutOfMemory ? "out of memory"
                                  : "some failure";
}
#endif
