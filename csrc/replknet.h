// The C++ core of replknet: large-kernel depthwise convolution on CPUs. C interface, raw pointers, no
// allocation, no threads of its own. docs/decisions/0003-native-core.md explains the design.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { RK_FLOAT32 = 0, RK_FLOAT16 = 1, RK_BFLOAT16 = 2 };
enum { RK_DIRECT = 0, RK_FFT = 1 };
enum { RK_BAD_CALL = -1, RK_BAD_ISA = -2 };
// RK_DIRECT met weights (rk_forward) or sums for dw (rk_backward) that are not finite. It also multiplies by the zeros
// of the padding, which may give NaN where the definition has no product. The result must not be used.
enum { RK_NOT_FINITE = -3 };

// A call, and how to carry it out.
typedef struct {
  int64_t n, c, h, w;     // of x and of y
  int32_t kh, kw;         // kernel sides, both odd
  int32_t dtype;          // of all tensors
  int32_t channels_last;  // layout of x, y, dy and dx: [N,H,W,C] in memory, else [N,C,H,W]
  int32_t algorithm;
  int32_t lh, lw;   // RK_FFT: transform lengths
  int32_t th, tw;   // outputs a tile; th == h (tw == w): the axis is one tile
  int32_t rotated;  // use the kernel rotated by 180 degrees
} rk_call;

// Runs body(begin, end, context) on parts of [begin, end), perhaps in parallel; torch_parallel_for is such a function.
typedef void (*rk_body)(int64_t begin, int64_t end, void* context);
typedef int (*rk_parallel_for)(int64_t begin, int64_t end, int64_t grain, rk_body body, void* context);

// What runs a call: an instruction set, a number of threads, and memory for them.
typedef struct {
  int32_t isa;
  int32_t threads;
  rk_parallel_for parallel_for;  // or null: one thread
  char* workspace;               // rk_workspace() bytes, aligned to 64
  float* prepared;               // rk_prepared() floats, aligned to 64: the weights in the form that the kernels use
  uint64_t* checksums;           // one a block of 16 channels; 0: not prepared yet
} rk_run;

#define RK_API __attribute__((visibility("default")))

// The instruction sets of this build, best first; null after the last.
RK_API const char* rk_isa_name(int isa);
RK_API int rk_isa_runs(int isa);
// The transform lengths, ascending; 0 after the last.
RK_API int rk_length(int index);

RK_API int64_t rk_workspace(const rk_call* call, int threads, int backward);
RK_API int64_t rk_prepared(const rk_call* call);

// y = x * weight (+ bias) (and max(y, 0)). `prepared` is verified by checksum. Blocks that do not belong to `weight`
// are prepared anew. Returns the number of these blocks, or an error.
RK_API int rk_forward(const rk_call* call, const rk_run* run, const void* x, const void* weight, const void* bias,
                      int relu, void* y);
// dx and dw. RK_DIRECT, and RK_FFT with tiles: dx must be null; rk_forward with `rotated` gives it. RK_FFT: dw may be
// null. Returns as rk_forward.
RK_API int rk_backward(const rk_call* call, const rk_run* run, const void* dy, const void* x, const void* weight,
                       void* dx, void* dw);
// A 64-bit checksum of memory, as used for the weights.
RK_API uint64_t rk_checksum(const void* data, int64_t bytes, int isa);

#ifdef __cplusplus
}
#endif
