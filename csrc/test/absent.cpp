// Stands in for the instruction sets that a build for the sanitizers leaves out.
#include "../job.h"

#if defined(__x86_64__)
extern const Isa isa_avx512;
const Isa isa_avx512 = {"avx512", [] { return false; }, nullptr, nullptr, nullptr, nullptr};
#endif
