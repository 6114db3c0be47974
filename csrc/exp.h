#pragma once
// The exponential and the sigmoid that CPU kernels share.
#include <cmath>

#include "cpu.h"

namespace fastpeft {

// exp without a library call, so that the loop vectorises; within 2 ulp. From 88.4 on it is inf: a gate of -1e38 needs a sigmoid of 0.
FASTPEFT_INLINE float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 89.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part sits in the low bits
  const float k = shifted - 12582912.0f;
  const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * from_bits((bits(shifted) << 23) + (127u << 23));
}
FASTPEFT_INLINE double exponential(double x) { return std::exp(x); }
template <class A>
FASTPEFT_INLINE A sigmoid(A x) { return A(1) / (A(1) + exponential(-x)); }

}  // namespace fastpeft
