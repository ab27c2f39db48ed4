/* Prints what XLA reads of a handler before it uses it: "<major> <minor> <traits>". Arguments: library, symbol. */
#include <dlfcn.h>
#include <stdio.h>

#include "xla/ffi/api/c_api.h"

int main(int argc, char** argv) {
  void* library = argc == 3 ? dlopen(argv[1], RTLD_NOW) : NULL;
  XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*) = NULL;
  if (library) *(void**)&handler = dlsym(library, argv[2]);
  if (!handler) return fprintf(stderr, "%s\n", dlerror()), 1;
  XLA_FFI_Metadata metadata = {.struct_size = sizeof metadata,
                               .api_version = {.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE}};
  XLA_FFI_Metadata_Extension extension = {.metadata = &metadata};
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  XLA_FFI_CallFrame frame = {.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE,
                             .extension_start = &extension.extension_base};
  if (handler(&frame)) return 2;
  printf("%d %d %u\n", metadata.api_version.major_version, metadata.api_version.minor_version,
         (unsigned)metadata.traits);
  return 0;
}
