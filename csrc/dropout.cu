// Dropout from a seed (equations and what is saved: fastpeft/ops/dropout.py). A thread owns a Pack; one call of Philox gives four neighbours
// their numbers. The seed is read here where it lies on the host, by the kernel where it lies on the card.
#include "cuda.cuh"

namespace fastpeft::dropout {

constexpr int kThreads = 256;

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four numbers for each counter under a key.
struct Four {
  uint32_t v[4];
};
__device__ inline uint32_t high(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
__device__ inline Four philox(uint64_t key, uint64_t counter) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32), c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint32_t was0 = c0, was2 = c2;
    c0 = high(0xCD9E8D57u, was2) ^ c1 ^ k0;
    c2 = high(0xD2511F53u, was0) ^ c3 ^ k1;
    c1 = 0xCD9E8D57u * was2;
    c3 = 0xD2511F53u * was0;
  }
  return {{c0, c1, c2, c3}};
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

template <int V, class T>
__global__ void __launch_bounds__(kThreads) dropout_kernel(Args<T> a) {
  using P = Pack<T, V>;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (i >= a.n) return;
  const uint64_t key = uint64_t(a.on_card ? *a.on_card : a.seed) + uint64_t(a.index);
  const bool whole = i + V <= a.n;
  P pack;
  if (whole) {
    pack = P::load(a.x + i);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) pack.v[e] = i + e < a.n ? a.x[i + e] : T(0.0f);
  }
#pragma unroll
  for (int first = 0; first < V; first += 4) {
    const Four four = philox(key, uint64_t(i + first) / 4);
#pragma unroll
    for (int e = first; e < (V < first + 4 ? V : first + 4); ++e) {
      const uint32_t number = V < 4 ? four.v[(i + e) % 4] : four.v[e % 4];
      pack.v[e] = number >= a.least ? static_cast<T>(static_cast<acc_t<T>>(pack.v[e]) * a.scale) : T(0.0f);
    }
  }
  if (whole) return pack.store(a.y + i);
#pragma unroll
  for (int e = 0; e < V; ++e)
    if (i + e < a.n) a.y[i + e] = pack.v[e];
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
