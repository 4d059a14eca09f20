// AArch64: 32 registers of four lanes; every processor has NEON.
#if defined(__aarch64__)
#define LANES 4
#define ISA isa_neon
#define ISA_NAME "neon"
#define RUNS_HERE true
#include "isa.h"
#endif
