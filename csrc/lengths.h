// The lengths N1 * N2 of the transforms, ascending. N1 is even, so that a row has a bin in the middle. A length between
// two of these would not be faster than the longer one.
#pragma once

#ifdef RK_FEW_LENGTHS  // for the sanitizers, with which all lengths take minutes to compile
#define RK_LENGTHS(X) X(4, 4) X(4, 5) X(8, 3) X(8, 6)
#else
// clang-format off: its lines of unequal length say nothing
#define RK_LENGTHS(X)                                                                                          \
  X(4, 4)                                                                                                      \
  X(4, 5) X(8, 3) X(4, 7) X(8, 4) X(4, 9) X(8, 5) X(8, 6) X(16, 4) X(8, 9) X(16, 5) X(16, 6) X(16, 7) X(16, 8) \
      X(16, 9) X(16, 16)
// clang-format on
#endif
