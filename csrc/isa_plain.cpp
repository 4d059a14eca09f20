// For any processor: vectors of four lanes, which the compiler maps to what the target has.
#define LANES 4
#define ISA isa_plain
#define ISA_NAME "plain"
#define RUNS_HERE true
#include "isa.h"
