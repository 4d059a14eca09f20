// x86-64 with AVX-512 F, VL, BW and DQ: 32 registers of 16 lanes.
#if defined(__x86_64__)
#define LANES 16
#define ISA isa_avx512
#define ISA_NAME "avx512"
#define RUNS_HERE                                                                                                  \
  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")
#include "isa.h"
#endif
