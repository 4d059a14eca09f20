// x86-64 with AVX2 and FMA: 16 registers of eight lanes.
#if defined(__x86_64__)
#define LANES 8
#define ISA isa_avx2
#define ISA_NAME "avx2"
#define RUNS_HERE __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#include "isa.h"
#endif
