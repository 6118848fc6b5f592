/* The part of CUDA's runtime that a library needs to load and to go through its motions without a GPU.

   Device memory is host memory. Copies are made, so what a program reads back of its own is right. Kernels are counted
   and do nothing. The description of the device is that of an H100. All that is not here is generated as a function that
   returns 0 (see stubs.py). */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIB ((size_t)1 << 30)
#define MOST_KERNELS (1 << 18)

/* Counters, which a program reads through ctypes. */
long stub_launches, stub_empty_launches, stub_synchronizations, stub_captures, stub_replays;
long stub_to_device, stub_to_host, stub_on_device;
long stub_bytes_to_device, stub_bytes_to_host, stub_bytes_on_device;

static struct kernel { const void *function; const char *name; long launches; } kernels[MOST_KERNELS];

static struct kernel *kernel_of(const void *function) {
  size_t place = ((uintptr_t)function >> 4) * 2654435761u % MOST_KERNELS;
  while (kernels[place].function && kernels[place].function != function) place = (place + 1) % MOST_KERNELS;
  kernels[place].function = function;
  return &kernels[place];
}

/* Writes a line "launches name" for each kernel that was launched, and sets the counts to 0. */
int stub_write_kernels(const char *path) {
  FILE *file = fopen(path, "w");
  if (!file) return 1;
  for (size_t place = 0; place < MOST_KERNELS; place++) {
    struct kernel *kernel = &kernels[place];
    if (kernel->launches) fprintf(file, "%ld %s\n", kernel->launches, kernel->name ? kernel->name : "?");
    kernel->launches = 0;
  }
  return fclose(file);
}

/* Kernels and modules. */
void **__cudaRegisterFatBinary(void *binary) { static void *handle[1]; return handle; }
void __cudaRegisterFunction(void **module, const char *function, char *device_function, const char *name) {
  kernel_of(function)->name = name;
}
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
static int launch(const void *function) { stub_launches++; kernel_of(function)->launches++; return 0; }
int cudaLaunchKernel(const void *function) { return launch(function); }
int __cudaLaunchKernel(const void *function) { return launch(function); }
int cudaLaunchCooperativeKernel(const void *function) { return launch(function); }
int cudaLaunchKernelExC(const void *config, const void *function, void **arguments) { return launch(function); }
struct dim3 { unsigned x, y, z; };
unsigned __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared, void *stream) {
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) stub_empty_launches++;
  return 0;
}
int __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared, void **stream) {
  *grid = *block = (struct dim3){1, 1, 1}; *shared = 0; *stream = 0; return 0;
}
int cudaFuncGetAttributes(char *attributes, const void *function) {
  memset(attributes, 0, 64); *(int *)(attributes + 24) = 1024; return 0; /* maxThreadsPerBlock */
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared,
                                                           unsigned flags) { *blocks = 1; return 0; }
int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                     int *result) { *function = 0; if (result) *result = 1; return 0; }

/* Memory. */
static int allocate(void **pointer, size_t size) {
  if (posix_memalign(pointer, 256, size ? size : 256)) return 2;
  memset(*pointer, 0, size);
  return 0;
}
int cudaMalloc(void **pointer, size_t size) { return allocate(pointer, size); }
int cudaMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }
int cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return allocate(pointer, size); }
int cudaMallocAsync(void **pointer, size_t size, void *stream) { return allocate(pointer, size); }
int cudaMallocFromPoolAsync(void **pointer, size_t size, void *pool, void *stream) { return allocate(pointer, size); }
int cudaFree(void *pointer) { free(pointer); return 0; }
int cudaFreeHost(void *pointer) { free(pointer); return 0; }
int cudaFreeAsync(void *pointer, void *stream) { free(pointer); return 0; }
static int copy(void *target, const void *source, size_t size, int kind) {
  if (kind == 1) { stub_to_device++; stub_bytes_to_device += size; }
  if (kind == 2) { stub_to_host++; stub_bytes_to_host += size; }
  if (kind == 3) { stub_on_device++; stub_bytes_on_device += size; }
  if (size) memmove(target, source, size);
  return 0;
}
int cudaMemcpy(void *target, const void *source, size_t size, int kind) { return copy(target, source, size, kind); }
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
  return copy(target, source, size, kind);
}
int cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                      size_t height, int kind, void *stream) {
  copy(target, source, 0, kind);
  for (size_t row = 0; row < height; row++)
    memmove((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width);
  return 0;
}
int cudaMemset(void *target, int value, size_t size) { memset(target, value, size); return 0; }
int cudaMemsetAsync(void *target, int value, size_t size, void *stream) { memset(target, value, size); return 0; }
int cudaMemGetInfo(size_t *unused, size_t *total) { *unused = 70 * GIB; *total = 80 * GIB; return 0; }
int cudaPointerGetAttributes(void *attributes, const void *pointer) { memset(attributes, 0, 32); return 0; }
int cudaMemPoolCreate(void **pool, const void *properties) { *pool = (void *)48; return 0; }

/* Streams, events and graphs. */
static int capturing;
int cudaStreamCreate(void **stream) { *stream = (void *)16; return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = (void *)16; return 0; }
int cudaStreamSynchronize(void *stream) { stub_synchronizations++; return 0; }
int cudaDeviceSynchronize(void) { stub_synchronizations++; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; stub_captures++; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; *graph = (void *)80; return 0; }
int cudaGraphInstantiate(void **run, void *graph, unsigned long long flags) { *run = (void *)96; return 0; }
int cudaGraphLaunch(void *run, void *stream) { stub_replays++; return 0; }
int cudaEventCreate(void **event) { *event = (void *)32; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)32; return 0; }

/* The device: an H100, in the layout of CUDA 13. */
struct properties {
  char name[256], identifiers[32];
  size_t memory, shared_per_block;
  int registers_per_block, warp;
  size_t pitch;
  int threads_per_block, threads[3], grid[3];
  size_t constants;
  int major, minor;
  size_t texture[2];
  int multiprocessors;
  char gap_1[216];
  int threads_per_multiprocessor;
  char gap_2[16];
  size_t shared_per_multiprocessor;
  int registers_per_multiprocessor;
  char gap_3[36];
  size_t shared_opt_in;
  char rest[328];
};
_Static_assert(offsetof(struct properties, multiprocessors) == 384, "layout of cudaDeviceProp");
_Static_assert(offsetof(struct properties, threads_per_multiprocessor) == 604, "layout of cudaDeviceProp");
_Static_assert(offsetof(struct properties, shared_per_multiprocessor) == 624, "layout of cudaDeviceProp");
_Static_assert(offsetof(struct properties, shared_opt_in) == 672, "layout of cudaDeviceProp");
_Static_assert(sizeof(struct properties) == 1008, "layout of cudaDeviceProp");
int cudaGetDeviceProperties(struct properties *facts, int device) {
  *facts = (struct properties){
    .name = "stub of an H100", .memory = 80 * GIB, .shared_per_block = 49152, .registers_per_block = 65536, .warp = 32,
    .threads_per_block = 1024, .threads = {1024, 1024, 64}, .grid = {2147483647, 65535, 65535}, .major = 9,
    .multiprocessors = 132, .threads_per_multiprocessor = 2048, .shared_per_multiprocessor = 233472,
    .registers_per_multiprocessor = 65536, .shared_opt_in = 232448,
  };
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;     /* threads per block */
    case 8: *value = 49152; break;    /* shared memory per block */
    case 10: *value = 32; break;      /* warp */
    case 16: *value = 132; break;     /* multiprocessors */
    case 39: *value = 2048; break;    /* threads per multiprocessor */
    case 75: *value = 9; break;       /* compute capability, major */
    case 76: *value = 0; break;       /* compute capability, minor */
    case 97: *value = 232448; break;  /* shared memory per block that can be asked for */
    default: *value = 1;
  }
  return 0;
}
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorName(int error) { return "stub"; }
const char *cudaGetErrorString(int error) { return "an error of the stub"; }
