// SwiGLU of clamped gates, for CPU tensors (schemas and equations in fastpeft/ops/clamped_swiglu.py). Gates and values lie one after the
// other in a row, or in its two halves: they are laid apart in blocks that stay in the nearest cache, and every loop has vectors.
#include "exp.h"

namespace fastpeft::clamped_swiglu {

template <class T>
struct Args {
  const T *dy, *x;  // [rows, n], [rows, 2 n]; dy: null in forward
  T* to;            // y [rows, n], or dx [rows, 2 n]
  int64_t dy_stride, x_stride, n;
  acc_t<T> limit, alpha, one;
  bool interleaved;
};

constexpr int64_t kBlock = 256;

template <class T>
FASTPEFT_INLINE void apart(const T* __restrict x, int64_t start, int64_t size, const Args<T>& a, acc_t<T>* __restrict gate, acc_t<T>* __restrict up) {
  if (a.interleaved) {
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) gate[j] = get(x[2 * (start + j)]), up[j] = get(x[2 * (start + j) + 1]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) gate[j] = get(x[start + j]), up[j] = get(x[a.n + start + j]);
  }
}

// f(row, start, size, gate, up) for each block of the rows
template <class T, class F>
FASTPEFT_INLINE void each_block(const Args<T>& a, int64_t begin, int64_t end, const F& f) {
  alignas(64) acc_t<T> gate[kBlock], up[kBlock];
  for (int64_t r = begin; r < end; ++r)
    for (int64_t start = 0; start < a.n; start += kBlock) {
      const int64_t size = std::min(kBlock, a.n - start);
      apart(a.x + r * a.x_stride, start, size, a, gate, up);
      f(r, start, size, gate, up);
    }
}
template <class A>
FASTPEFT_INLINE A clamped(A x, A limit) { return x > limit ? limit : x < -limit ? -limit : x; }

template <class T>
FASTPEFT_INLINE void forward_rows(const Args<T>& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  each_block(a, begin, end, [&](int64_t r, int64_t start, int64_t size, A* gate, A* up) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      const A g = gate[j] > a.limit ? a.limit : gate[j];
      gate[j] = (clamped(up[j], a.limit) + a.one) * (g * sigmoid(a.alpha * g));
    }
    T* __restrict y = a.to + r * a.n + start;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) put(y + j, gate[j]);
  });
}

template <class T>
FASTPEFT_INLINE void backward_rows(const Args<T>& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  each_block(a, begin, end, [&](int64_t r, int64_t start, int64_t size, A* gate, A* up) __attribute__((always_inline)) {
    const T* __restrict dy = a.dy + r * a.dy_stride + start;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      const A d = get(dy[j]), g = gate[j] > a.limit ? a.limit : gate[j], sigma = sigmoid(a.alpha * g);
      // products first: one that only a branch forms is no vector's
      const A dgate = d * (clamped(up[j], a.limit) + a.one) * (sigma * (1 + a.alpha * g * (1 - sigma))), dup = d * (g * sigma);
      const A bound = up[j] < 0 ? -up[j] : up[j];
      gate[j] = gate[j] <= a.limit ? dgate : A(0);  // as torch.clamp's: not for NaN
      up[j] = bound <= a.limit ? dup : A(0);
    }
    T* __restrict dx = a.to + r * 2 * a.n;
    if (a.interleaved) {
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) put(dx + 2 * (start + j), gate[j]), put(dx + 2 * (start + j) + 1, up[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) put(dx + start + j, gate[j]), put(dx + a.n + start + j, up[j]);
    }
  });
}

FASTPEFT_PER_DTYPE(fwd_rows, Args, forward_rows)
FASTPEFT_PER_DTYPE(bwd_rows, Args, backward_rows)

Tensor run(const Maybe& dy, const Tensor& x, double limit, double alpha, double one, bool interleaved) {
  const Rows in = rows_of(x), d = dy ? rows_of(*dy) : in;
  STD_TORCH_CHECK(in.n % 2 == 0 && (!dy || (d.count == in.count && 2 * d.n == in.n)), "clamped_swiglu: shapes differ");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (!dy) shape.back() = in.n / 2;
  Tensor out = make_empty(x, shape);
  dispatch(x.scalar_type(), "clamped_swiglu", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    T bound;  // rounded, as torch.clamp's
    put(&bound, A(limit));
    const Args<T> a{dy ? read<T>(d.own) : nullptr, read<T>(in.own), write<T>(out), d.stride, in.stride, in.n / 2, get(bound), A(alpha), A(one),
                    interleaved};
    parallel_rows(in.count, in.n, [&](int64_t begin, int64_t end) { dy ? bwd_rows(a, begin, end) : fwd_rows(a, begin, end); });
  });
  return out;
}

Tensor forward(const Tensor& x, double limit, double alpha, double one, bool interleaved) {
  return run(std::nullopt, x, limit, alpha, one, interleaved);
}
Tensor backward(const Tensor& dy, const Tensor& x, double limit, double alpha, double one, bool interleaved) {
  return run(dy, x, limit, alpha, one, interleaved);
}

}  // namespace fastpeft::clamped_swiglu

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("clamped_swiglu_fwd", TORCH_BOX(&fastpeft::clamped_swiglu::forward));
  m.impl("clamped_swiglu_bwd", TORCH_BOX(&fastpeft::clamped_swiglu::backward));
}
