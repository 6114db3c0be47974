// Dropout from a seed (equations and what is saved: fastpeft/ops/dropout.py). A thread owns a Pack; one call of Philox gives four neighbours
// their numbers. The seed is read here where it lies on the host, by the kernel where it lies on the card.
#include "cuda.cuh"

namespace fastpeft::dropout {

constexpr int kThreads = 256;

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four numbers for each counter under a key.
struct Four {
  uint32_t v[4];
};
// Those of counters `first` to first + N - 1, side by side, which share the keys' rounds; each product once, for both of its halves: as two
// nvcc makes it twice.
template <int N>
__device__ inline void philox(uint64_t key, uint64_t first, Four (&out)[N]) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
  for (int n = 0; n < N; ++n) out[n] = {{uint32_t(first + n), uint32_t((first + n) >> 32), 0, 0}};
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      uint32_t(&c)[4] = out[n].v;
      const uint64_t one = uint64_t(0xD2511F53u) * c[0], two = uint64_t(0xCD9E8D57u) * c[2];
      out[n] = {{uint32_t(two >> 32) ^ c[1] ^ k0, uint32_t(two), uint32_t(one >> 32) ^ c[3] ^ k1, uint32_t(one)}};
    }
  }
}

template <class T>
struct Args {
  const T* x;
  T* y;
  int64_t n;
  const int64_t* on_card;  // the seed there; null: `seed` is it
  int64_t seed, index;
  uint32_t least;  // of the numbers of those that stay
  acc_t<T> scale;
};

template <class T>
__device__ inline T kept(const Args<T>& a, acc_t<T> x, uint32_t number) {
  return static_cast<T>(number >= a.least ? x * a.scale : acc_t<T>(0));
}

template <int V, class T>
__global__ void __launch_bounds__(kThreads, 8) dropout_kernel(Args<T> a) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (i >= a.n) return;
  const uint64_t key = uint64_t(a.on_card ? *a.on_card : a.seed) + uint64_t(a.index);
  if (V > 1 && i + V <= a.n) {
    auto pack = Pack<T, V>::load(a.x + i);
    Four drawn[(V + 3) / 4];
    philox(key, uint64_t(i) / 4, drawn);
    acc_t<T> v[V];
    widen(pack, v);
#pragma unroll
    for (int e = 0; e < V; ++e) pack.v[e] = kept(a, v[e], drawn[e / 4].v[V < 4 ? (i + e) % 4 : e % 4]);
    return pack.store(a.y + i);
  }
#pragma unroll 1
  for (int64_t at = i; at < min(i + V, a.n); ++at) {
    Four drawn[1];
    philox(key, uint64_t(at) / 4, drawn);
    a.y[at] = kept(a, static_cast<acc_t<T>>(a.x[at]), drawn[0].v[at % 4]);
  }
}

Tensor apply(const Tensor& from, double p, const Tensor& seed, int64_t index) {
  const Tensor x = torch::stable::contiguous(from);
  Tensor y = output_like(x);
  if (!x.numel()) return y;
  const Launch launch(x);
  const int64_t* number = read<int64_t>(seed);
  const bool on_host = !seed.is_cuda();
  STD_TORCH_CHECK(!on_host || !launch.captured(), "fastpeft: dropout: a CUDA graph cannot hold a seed of the host: all replays would draw one "
                  "mask; set dropout to 0, or train by fastpeft.Trainer, whose seeds lie on the device");
  STD_TORCH_CHECK(on_host || seed.get_device_index() == x.get_device_index(), "dropout: x and seed lie on two cards");
  dispatch(x.scalar_type(), "dropout", [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int V = 16 / sizeof(T);
    Args<T> a{read<T>(x), write<T>(y), x.numel(), on_host ? nullptr : number, on_host ? *number : 0, index};
    a.least = uint32_t(std::min(p * 4294967296.0, 4294967295.0));
    a.scale = acc_t<T>(1 / (1 - p));
    const bool whole = packs<T, V>(a.x, 0) && packs<T, V>(a.y, 0);
    const int64_t threads = whole ? (a.n + V - 1) / V : a.n;
    launch(whole ? dropout_kernel<V, T> : dropout_kernel<1, T>, Grid{(threads + kThreads - 1) / kThreads}, kThreads, a);
  });
  return y;
}

}  // namespace fastpeft::dropout

STABLE_TORCH_LIBRARY_IMPL(fastpeft, FASTPEFT_CUDA_KEY, m) { m.impl("dropout", TORCH_BOX(&fastpeft::dropout::apply)); }
