#pragma once
// LayerNorm (CENTER) and RMSNorm on CUDA: a block per row forward; backward, a block walks rows and keeps its parameter sums in registers.
#include "cuda.cuh"

namespace fastpeft {

template <bool CENTER, class T>
__global__ void norm_fwd_kernel(
    const T* __restrict__ x, int64_t x_stride, const T* __restrict__ residual, int64_t residual_stride, int64_t n, Param<T> weight,
    Param<T> bias, acc_t<T> eps, T* __restrict__ y, T* h, acc_t<T>* __restrict__ mean_out, acc_t<T>* __restrict__ rstd_out) {
  using A = acc_t<T>;
  const int64_t r = blockIdx.x;
  const T* row = x + r * x_stride;
  A sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    A v = static_cast<A>(row[j]);
    if (residual) {
      const T rounded = static_cast<T>(v + static_cast<A>(residual[r * residual_stride + j]));
      h[r * n + j] = rounded;  // read back below by this same thread
      v = static_cast<A>(rounded);
    }
    sum += v;
  }
  if (residual) row = h + r * n;
  A mean = CENTER ? block_sum<A>({sum, 0}).a / n : A(0);
  Two<A> moments{0, 0};
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const A d = static_cast<A>(row[j]) - mean;
    moments.a += d;
    moments.b += d * d;
  }
  moments = block_sum(moments);
  if (CENTER) {  // the first mean's rounding error, as on CPU
    const A left = moments.a / n;
    moments.b -= n * left * left;
    mean += left;
  }
  const A rstd = A(1) / sqrt(max(moments.b / n, A(0)) + eps);
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x)
    y[r * n + j] = static_cast<T>((static_cast<A>(row[j]) - mean) * rstd * weight[j] + bias[j]);
  if (threadIdx.x == 0 && rstd_out) {
    rstd_out[r] = rstd;
    if (CENTER) mean_out[r] = mean;
  }
}

// K columns a thread, held in registers between the two passes; part: [gridDim.x, 2, n] sums of dweight and dbias, or null.
template <bool CENTER, int K, class T>
__global__ void norm_bwd_kernel(
    const T* __restrict__ dy, int64_t dy_stride, const T* __restrict__ h, int64_t h_stride, const T* __restrict__ dh, int64_t dh_stride,
    int64_t rows, int64_t n, Param<T> weight, const acc_t<T>* __restrict__ mean_in, const acc_t<T>* __restrict__ rstd_in,
    T* __restrict__ dx, acc_t<T>* __restrict__ part) {
  using A = acc_t<T>;
  A dweight[K] = {}, dbias[K] = {};
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const A rstd = rstd_in[r], mean = CENTER ? mean_in[r] : A(0);
    A d[K], x_hat[K];
    Two<A> s{0, 0};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t j = threadIdx.x + int64_t(k) * blockDim.x;
      d[k] = j < n ? static_cast<A>(dy[r * dy_stride + j]) : A(0);
      x_hat[k] = j < n ? (static_cast<A>(h[r * h_stride + j]) - mean) * rstd : A(0);
      dweight[k] += d[k] * x_hat[k];
      if (CENTER) dbias[k] += d[k];
      if (!dx || j >= n) continue;
      d[k] *= weight[j];
      if (CENTER) s.a += d[k];
      s.b += d[k] * x_hat[k];
    }
    if (!dx) continue;
    s = block_sum(s);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t j = threadIdx.x + int64_t(k) * blockDim.x;
      if (j >= n) continue;
      A out = rstd * (d[k] - s.a / n - x_hat[k] * (s.b / n));
      if (dh) out += static_cast<A>(dh[r * dh_stride + j]);
      dx[r * n + j] = static_cast<T>(out);
    }
  }
  if (!part) return;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t j = threadIdx.x + int64_t(k) * blockDim.x;
    if (j >= n) continue;
    part[int64_t(blockIdx.x) * 2 * n + j] = dweight[k];
    if (CENTER) part[int64_t(blockIdx.x) * 2 * n + n + j] = dbias[k];
  }
}

constexpr int64_t kWidest = 16384;  // 16 columns for each of 1,024 threads

template <bool CENTER>
void norm_fwd_cuda(
    const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps, bool keep, const Tensor& y, const Tensor& h,
    const Tensor& mean, const Tensor& rstd) {
  const Rows in = rows_of(x), other = residual ? rows_of(*residual) : in;
  if (in.count == 0) return;
  const Launch launch(x);
  const int threads = in.n <= 1024 ? 128 : in.n <= 4096 ? 256 : 512;
  dispatch(x.scalar_type(), "norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    Tensor own_weight, own_bias;
    norm_fwd_kernel<CENTER, T><<<unsigned(in.count), threads, 0, launch.stream>>>(
        read<T>(in.own), in.stride, residual ? read<T>(other.own) : nullptr, other.stride, in.n, param<T>(weight, own_weight, x, 1),
        param<T>(bias, own_bias, x, 0), A(eps), write<T>(y), write<T>(h), keep && CENTER ? write<A>(mean) : nullptr,
        keep ? write<A>(rstd) : nullptr);
    check(cudaGetLastError());
  });
}

template <bool CENTER>
void norm_bwd_cuda(
    const Tensor& dy, const Tensor& h, const Maybe& weight, const Maybe& mean, const Tensor& rstd, const Maybe& dh, bool need_dx,
    const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  const Rows in = rows_of(h), up = rows_of(dy), carry = dh ? rows_of(*dh) : in;
  STD_TORCH_CHECK(in.n <= kWidest, "fastpeft: norms on CUDA reach to width ", kWidest, "; FASTPEFT_BACKEND=composite has no limit");
  const Launch launch(h);
  const bool params = dweight.numel() > 0 || dbias.numel() > 0;
  const int blocks = int(std::min<int64_t>(std::max<int64_t>(in.count, 1), kParts));
  dispatch(h.scalar_type(), "norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    Tensor own_weight, part = torch::stable::new_empty(h, {params ? blocks * 2 * in.n : 0}, acc_type(h));
    auto run = [&](auto kernel, int threads) {
      kernel<<<blocks, threads, 0, launch.stream>>>(
          read<T>(up.own), up.stride, read<T>(in.own), in.stride, dh ? read<T>(carry.own) : nullptr, carry.stride, in.count, in.n,
          param<T>(weight, own_weight, h, 1), CENTER ? read<A>(*mean) : nullptr, read<A>(rstd), need_dx ? write<T>(dx) : nullptr,
          params ? write<A>(part) : nullptr);
      check(cudaGetLastError());
    };
    auto warps = [&](int64_t columns) { return int((in.n + 32 * columns - 1) / (32 * columns)) * 32; };
    if (in.n <= 4096) run(norm_bwd_kernel<CENTER, 4, T>, warps(4));
    else run(norm_bwd_kernel<CENTER, 16, T>, warps(16));
    sum_parts(read<A>(part), blocks, 2 * in.n, dweight, launch.stream);
    if (dbias.numel()) sum_parts(read<A>(part) + in.n, blocks, 2 * in.n, dbias, launch.stream);
  });
}

}  // namespace fastpeft
