// The kernels of one instruction set as a table; the including file defines LANES, ISA, ISA_NAME and RUNS_HERE.
#pragma once

#include "checksum.h"
#include "direct.h"

namespace {

bool prepare(const Job& job, int64_t block, char* workspace) {
  if (job.call.algorithm != RK_FFT) return prepare_direct(job, block, reinterpret_cast<float*>(workspace));
  prepare_spectral(job, block, reinterpret_cast<V*>(workspace));
  return true;
}

void forward(const Job& job, int64_t block, int64_t image, int64_t tile, char* workspace) {
  if (job.call.algorithm == RK_FFT) {
    forward_spectral(job, block, image, tile, reinterpret_cast<V*>(workspace));
  } else {
    forward_direct(job, block, image, tile, reinterpret_cast<float*>(workspace));
  }
}

bool backward(const Job& job, int64_t block, char* workspace) {
  if (job.call.algorithm != RK_FFT) return backward_direct(job, block, reinterpret_cast<float*>(workspace));
  backward_spectral(job, block, reinterpret_cast<V*>(workspace));
  return true;
}

}  // namespace

extern const Isa ISA;
const Isa ISA = {ISA_NAME, [] { return static_cast<bool>(RUNS_HERE); }, prepare, forward, backward, checksum};
