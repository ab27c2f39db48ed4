/* Stands in for libhiprtc.so.7 on a machine without ROCm. It records what it is asked to compile and gives back an ELF
   magic and the options; fake_hiprtc_fail makes the next call of a kind fail, compile with a log. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char* code;
} Program;

static char record[1 << 16], failing[32], log_text[] = "rmsnorm.hip:3:1: error: unknown type name 'NoSuchType'";
static int fail_status, alive, not_elf;

const char* fake_hiprtc_record(void) { return record; }
int fake_hiprtc_alive(void) { return alive; }
void fake_hiprtc_not_elf(int yes) { not_elf = yes; }
void fake_hiprtc_fail(const char* call, int status) {
  snprintf(failing, sizeof failing, "%s", call);
  fail_status = status;
}
static int injected(const char* call) {
  if (strcmp(call, failing)) return 0;
  failing[0] = 0;
  return fail_status;
}
static void note(const char* kind, const char* text) {
  size_t used = strlen(record);
  snprintf(record + used, sizeof record - used, "%s %s\n", kind, text);
}

int hiprtcCreateProgram(Program** program, const char* source, const char* name, int count, const char** headers,
                        const char** names) {
  int status = injected("create");
  record[0] = 0;
  note("name", name);
  note("source", strlen(source) > 100 ? "long" : source);
  for (int i = 0; i < count; ++i) {
    note("header", names[i]);
    if (!strlen(headers[i])) return 1;
  }
  if (status) return status;
  *program = calloc(1, sizeof **program);
  ++alive;
  return 0;
}
int hiprtcCompileProgram(Program* program, int count, const char** options) {
  for (int i = 0; i < count; ++i) note("option", options[i]);
  program->code = strdup(not_elf ? "text" : "\177ELF made by the fake");
  return injected("compile");
}
int hiprtcGetProgramLogSize(Program* program, size_t* size) {
  *size = program ? sizeof log_text : 0;
  return 0;
}
int hiprtcGetProgramLog(Program* program, char* to) {
  strcpy(to, program ? log_text : "");
  return 0;
}
int hiprtcGetCodeSize(Program* program, size_t* size) {
  *size = strlen(program->code);
  return injected("size");
}
int hiprtcGetCode(Program* program, char* to) {
  memcpy(to, program->code, strlen(program->code));
  return injected("code");
}
int hiprtcDestroyProgram(Program** program) {
  free((*program)->code);
  free(*program);
  --alive;
  return 0;
}
const char* hiprtcGetErrorString(int status) {
  return status == 1 ? "HIPRTC_ERROR_OUT_OF_MEMORY" : status == 6 ? "HIPRTC_ERROR_COMPILATION" : "HIPRTC_ERROR";
}
