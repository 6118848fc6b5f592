/* Functions of cuBLAS and cuDNN that give something back; all others are generated as functions that return 0. */

#include <stddef.h>
#include <string.h>

static int make(void **handle) { *handle = (void *)64; return 0; }
int cublasCreate_v2(void **handle) { return make(handle); }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasLtCreate(void **handle) { return make(handle); }
int cublasLtMatmulDescCreate(void **handle) { return make(handle); }
int cublasLtMatmulPreferenceCreate(void **handle) { return make(handle); }
int cublasLtMatrixLayoutCreate(void **handle) { return make(handle); }
int cublasLtMatrixTransformDescCreate(void **handle) { return make(handle); }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int count, void *results, int *found) {
  memset(results, 0, 64); *found = 1; return 0;
}
size_t cudnnGetVersion(void) { return 92100; }
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(int error) { return "an error of the stub"; }
int cudnnGetReductionWorkspaceSize(void *handle, void *reduction, void *a, void *c, size_t *size) { *size = 0; return 0; }
int cudnnGetReductionIndicesSize(void *handle, void *reduction, void *a, void *c, size_t *size) { *size = 0; return 0; }
int cudnnBackendCreateDescriptor(int type, void **handle) { return make(handle); }
