// For any processor: vectors of four lanes, which the compiler maps to the registers of the target.
#define LANES 4
#define ISA isa_plain
#define ISA_NAME "plain"
#define RUNS_HERE true
#include "isa.h"
