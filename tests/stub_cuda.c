// A CUDA driver and an NVRTC without a GPU: they check what they are given, write down what they are asked, and can be
// told to fail. Their "machine code" is the options and the source as they came. A line "// name 4 8" of the source
// declares a kernel and the sizes of its arguments.

#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { void* context; char* image; } Module;
typedef struct { Module* module; char name[64]; int sizes[64]; int count; } Function;
typedef struct { char *text, *log, *cubin; } Program;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char diary[1 << 16], failing[64];
static int failure, capturing, compile_ms, silent;
static __thread void* stack[8];
static __thread int depth, mode;  // mode 0: global, as every thread begins

static int note(const char* name, const char* format, ...) {
  if (!silent) {
    pthread_mutex_lock(&lock);
    size_t used = strlen(diary);
    used += snprintf(diary + used, sizeof diary - used, "%s", name);
    va_list args;
    va_start(args, format);
    used += vsnprintf(diary + used, sizeof diary - used, format, args);
    va_end(args);
    snprintf(diary + used, sizeof diary - used, "\n");
    pthread_mutex_unlock(&lock);
  }
  return strcmp(name, failing) ? 0 : failure;
}

void stub_reset(void) { diary[0] = failing[0] = 0; failure = capturing = compile_ms = silent = depth = mode = 0; }
const char* stub_diary(void) { return diary; }
void stub_fail(const char* name, int code) { snprintf(failing, sizeof failing, "%s", name); failure = code; }
void stub_capture(int on) { capturing = on; }
void stub_compile_ms(int ms) { compile_ms = ms; }
void stub_silent(int on) { silent = on; }
int stub_depth(void) { return depth; }
int stub_mode(void) { return mode; }

// The driver: two devices, 9.0 and 8.6; the primary context of device d is 0x7e0000001000 + d, beyond 32 bits.

int cuInit(unsigned flags) { return note("cuInit", " %u", flags); }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }

int cuDeviceGet(int* device, int index) {
  *device = index;
  return index < 2 ? note("cuDeviceGet", " %d", index) : 101;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (attribute != 75 && attribute != 76) return 1;
  *value = attribute == 75 ? (device ? 8 : 9) : (device ? 6 : 0);
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(uintptr_t)(0x7e0000001000 + device);
  return note("cuDevicePrimaryCtxRetain", " %d", device);
}

int cuCtxGetCurrent(void** context) { *context = depth ? stack[depth - 1] : NULL; return 0; }

int cuCtxPushCurrent_v2(void* context) {
  int code = note("cuCtxPushCurrent", " %p", context);
  if (!code) stack[depth++] = context;
  return code;
}

int cuCtxPopCurrent_v2(void** context) {
  if (!depth) return 201;
  *context = stack[--depth];
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int* wanted) {
  int before = mode;
  mode = *wanted;
  *wanted = before;
  return 0;
}

static int forbidden(void) { return capturing && mode != 2 ? 900 : 0; }

int cuModuleLoadData(void** module, const void* image) {
  int code = note("cuModuleLoadData", "");
  if (code || (code = forbidden())) return code;
  if (!depth) return 201;
  if (strncmp(image, "STUB", 4)) return 200;
  Module* made = malloc(sizeof *made);
  made->context = stack[depth - 1];
  made->image = strdup(image);
  *module = made;
  return 0;
}

int cuModuleGetFunction(void** function, Module* module, const char* name) {
  int code = note("cuModuleGetFunction", " %s", name);
  char line[80];
  if (code || (code = forbidden())) return code;
  if (!depth) return 201;
  snprintf(line, sizeof line, "\n// %s ", name);
  char* at = strstr(module->image, line);
  if (!at) return 500;
  Function* made = calloc(1, sizeof *made);
  made->module = module;
  snprintf(made->name, sizeof made->name, "%s", name);
  at += strlen(line);
  for (char* end; *at && *at != '\n' && made->count < 64; at = end) {
    long size = strtol(at, &end, 10);
    if (end == at) break;
    made->sizes[made->count++] = (int)size;
  }
  *function = made;
  return 0;
}

int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** args, void** extra) {
  void* current = depth ? stack[depth - 1] : NULL;
  if (!current) return 201;
  if (current != function->module->context) return 400;
  if (!gx || bx > 1024) return 1;
  if (silent) return 0;
  char hex[4096] = "";
  size_t used = 0;
  for (int i = 0; i < function->count; i++) {
    for (int b = 0; b < function->sizes[i]; b++)
      used += snprintf(hex + used, sizeof hex - used, "%02x", ((unsigned char*)args[i])[b]);
    used += snprintf(hex + used, sizeof hex - used, i + 1 < function->count ? "," : "");
  }
  return note("cuLaunchKernel", " %s %ux%ux%u %ux%ux%u %u %p %p %s %s", function->name, gx, gy, gz, bx, by, bz, shared,
              stream, current, extra ? "extra" : "-", hex);
}

int cuGetErrorName(int code, const char** name) {
  *name = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY"
        : code == 200 ? "CUDA_ERROR_INVALID_IMAGE" : code == 500 ? "CUDA_ERROR_NOT_FOUND" : NULL;
  return *name ? 0 : 1;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == 2 ? "out of memory" : NULL;
  return *text ? 0 : 1;
}

// NVRTC 13.7.

int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 7; return 0; }
int nvrtcGetNumSupportedArchs(int* count) { *count = 5; return 0; }

int nvrtcGetSupportedArchs(int* found) {
  int known[] = {80, 89, 90, 100, 120};
  memcpy(found, known, sizeof known);
  return 0;
}

int nvrtcCreateProgram(Program** program, const char* source, const char* name, int count, const char* const* texts,
                       const char* const* names) {
  Program* made = calloc(1, sizeof *made);
  size_t size = strlen(source) + 1;
  for (int i = 0; i < count; i++) size += strlen(texts[i]) + strlen(names[i]) + 8;
  made->text = malloc(size);
  char* at = made->text;
  for (int i = 0; i < count; i++) at += sprintf(at, "[%s]%s\n", names[i], texts[i]);
  strcpy(at, source);
  *program = made;
  return note("nvrtcCreateProgram", " %s", name);
}

int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  int code = note("nvrtcCompileProgram", " %d", getpid());
  usleep(1000 * compile_ms);
  if (!code && strstr(program->text, "#error")) code = 6;
  program->log = strdup(code ? "kernels.cu(7): error: as you asked" : "");
  size_t size = strlen(program->text) + 16;
  for (int i = 0; i < count; i++) size += strlen(options[i]) + 1;
  program->cubin = malloc(size);
  char* at = program->cubin + sprintf(program->cubin, "STUB");
  for (int i = 0; i < count; i++) at += sprintf(at, " %s", options[i]);
  sprintf(at, "\n%s", program->text);
  return code;
}

int nvrtcGetProgramLogSize(Program* program, size_t* size) { *size = strlen(program->log) + 1; return 0; }
int nvrtcGetProgramLog(Program* program, char* log) { strcpy(log, program->log); return 0; }
int nvrtcGetCUBINSize(Program* program, size_t* size) { *size = strlen(program->cubin) + 1; return 0; }
int nvrtcGetCUBIN(Program* program, char* cubin) { strcpy(cubin, program->cubin); return 0; }

int nvrtcDestroyProgram(Program** program) {
  free((*program)->text);
  free((*program)->log);
  free((*program)->cubin);
  free(*program);
  *program = NULL;
  return note("nvrtcDestroyProgram", "");
}

const char* nvrtcGetErrorString(int code) { return code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
