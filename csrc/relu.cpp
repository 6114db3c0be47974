// ReLU kept as its values above zero and a bit for each element, for CPU tensors (schemas in fastpeft/ops/relu.py). Elements are taken
// eight at a time, as vectors of their bits; with a branch for each element the passes took ten times as long.
#include <cstring>

#include "cpu.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace fastpeft::relu {

template <class T>
using word_t = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
template <class T>
struct Eight {
  typedef word_t<T> words __attribute__((vector_size(8 * sizeof(T))));
  typedef uint8_t bytes __attribute__((vector_size(8)));
};
using Bytes = Eight<double>::bytes;

// For each byte of bits: 0xff where a bit is set; the lanes of the set bits, in order; how many are set before each lane.
struct Lanes {
  uint8_t mask[256][8] = {}, packed[256][8] = {}, rank[256][8] = {};
  constexpr Lanes() {
    for (int byte = 0; byte < 256; ++byte) {
      int n = 0;
      for (int i = 0; i < 8; ++i) {
        rank[byte][i] = uint8_t(n);
        if (byte >> i & 1) mask[byte][i] = 0xff, packed[byte][n++] = uint8_t(i);
      }
    }
  }
};
alignas(64) constexpr Lanes kLanes;

template <class T>
FASTPEFT_INLINE typename Eight<T>::words load(const T* p) {
  typename Eight<T>::words out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
template <class T>
FASTPEFT_INLINE typename Eight<T>::words wide(const uint8_t* p) {
  Bytes lanes;
  std::memcpy(&lanes, p, sizeof lanes);
  return __builtin_convertvector(lanes, typename Eight<T>::words);
}
template <class T>  // all bits of a lane where the byte's bit is set
FASTPEFT_INLINE typename Eight<T>::words lanes_of(unsigned byte) {
  typename Eight<T>::words set = wide<T>(kLanes.mask[byte]);
  return -(set & 1);
}
template <class V>
FASTPEFT_INLINE V shuffled(const V& v, const V& at) {
#if defined(__clang__)
  V out;
  for (int i = 0; i < 8; ++i) out[i] = v[at[i]];
  return out;
#else
  return __builtin_shuffle(v, at);
#endif
}
// What is above zero, or NaN: as integers, 1 to the infinity's bits, and beyond those whatever the sign.
template <class T>
FASTPEFT_INLINE typename Eight<T>::words above_zero(const typename Eight<T>::words& x) {
  using W = word_t<T>;
  constexpr W sign = W(1) << (8 * sizeof(T) - 1);
  constexpr W infinity = sizeof(T) == 8 ? W(0x7ff0000000000000u) : sizeof(T) == 4 ? W(0x7f800000u) : std::is_same_v<T, bf16> ? W(0x7f80) : W(0x7c00);
  const auto magnitude = x & W(sign - 1);
  return (typename Eight<T>::words)((magnitude != 0) & ((x < sign) | (magnitude > infinity)));
}
template <class T>
FASTPEFT_INLINE unsigned byte_of(const typename Eight<T>::words& mask) {
  const Bytes lanes = __builtin_convertvector(mask, Bytes);
  uint64_t word;
  std::memcpy(&word, &lanes, 8);
  return unsigned((word & 0x8040201008040201u) * 0x0101010101010101u >> 56);
}
template <class T>
FASTPEFT_INLINE bool above_zero(T x) { return !(get(x) <= 0); }

// Elements [8 b, 8 b + 8) are those of byte b of `bits`.
template <class T>
struct Args {
  const T* from;  // x, y to be packed, dy, or packed values
  uint8_t* bits;  // 1 where x is above zero or NaN
  T* to;          // y, packed values, or dx
  int64_t numel;
  const T* stop;  // behind the last packed value
};

// y and bits
template <class T>
FASTPEFT_INLINE void split(const Args<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const T* x = a.from + 8 * b;
    T* y = a.to + 8 * b;
    if (8 * b + 8 <= a.numel) {
      const auto words = load(x), keep = above_zero<T>(words), out = words & keep;
      std::memcpy(y, &out, sizeof out);
      a.bits[b] = uint8_t(byte_of<T>(keep));
    } else {
      unsigned byte = 0;
      for (int i = 0; 8 * b + i < a.numel; ++i) {
        const bool keep = above_zero(x[i]);
        byte |= unsigned(keep) << i;
        y[i] = keep ? x[i] : T(0);
      }
      a.bits[b] = uint8_t(byte);
    }
  }
}

// The values above zero, from `to` on. What is behind them in a vector is written over by the next, but for the last ones.
template <class T>
FASTPEFT_INLINE void pack(const Args<T>& a, int64_t begin, int64_t end) {
  T* to = a.to;
  for (int64_t b = begin; b < end; ++b) {
    const T* y = a.from + 8 * b;
    unsigned byte = a.bits[b];
    if (to + 8 <= a.stop && 8 * b + 8 <= a.numel) {
      const auto out = shuffled(load(y), wide<T>(kLanes.packed[byte]));
      std::memcpy(to, &out, sizeof out);
      to += __builtin_popcount(byte);
    } else {
      for (; byte; byte &= byte - 1) *to++ = y[__builtin_ctz(byte)];
    }
  }
}

// and back
template <class T>
FASTPEFT_INLINE void unpack(const Args<T>& a, int64_t begin, int64_t end) {
  const T* from = a.from;
  for (int64_t b = begin; b < end; ++b) {
    T* y = a.to + 8 * b;
    const unsigned byte = a.bits[b];
    if (from + 8 <= a.stop && 8 * b + 8 <= a.numel) {
      const auto out = shuffled(load(from), wide<T>(kLanes.rank[byte])) & lanes_of<T>(byte);
      std::memcpy(y, &out, sizeof out);
      from += __builtin_popcount(byte);
    } else {
      for (int i = 0; i < 8 && 8 * b + i < a.numel; ++i) y[i] = byte >> i & 1 ? *from++ : T(0);
    }
  }
}

template <class T>
FASTPEFT_INLINE void mask(const Args<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const T* dy = a.from + 8 * b;
    T* dx = a.to + 8 * b;
    const unsigned byte = a.bits[b];
    if (8 * b + 8 <= a.numel) {
      const auto out = load(dy) & lanes_of<T>(byte);
      std::memcpy(dx, &out, sizeof out);
    } else {
      for (int i = 0; 8 * b + i < a.numel; ++i) dx[i] = byte >> i & 1 ? dy[i] : T(0);
    }
  }
}
FASTPEFT_PER_DTYPE(split_bytes, Args, split)
FASTPEFT_PER_DTYPE(pack_bytes, Args, pack)
FASTPEFT_PER_DTYPE(unpack_bytes, Args, unpack)
FASTPEFT_PER_DTYPE(mask_bytes, Args, mask)

constexpr int64_t kPart = 1 << 13;  // bytes of `bits` whose values a thread packs or unpacks: parts are counted first

// How many values lie before each part, and in all.
std::vector<int64_t> values_before_parts(const Tensor& bits) {
  const int64_t bytes = bits.numel(), parts = std::max<int64_t>(1, bytes / kPart);
  const uint8_t* b = read<uint8_t>(bits);
  std::vector<int64_t> before(parts + 1, 0);
  for (int64_t p = 0; p < parts; ++p) {
    int64_t count = 0, i = bytes * p / parts;
    const int64_t end = bytes * (p + 1) / parts;
    for (; i + 8 <= end; i += 8) {
      uint64_t word;
      std::memcpy(&word, b + i, 8);
      count += __builtin_popcountll(word);
    }
    for (; i < end; ++i) count += __builtin_popcount(b[i]);
    before[p + 1] = before[p] + count;
  }
  return before;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x) {
  const Tensor dense = torch::stable::contiguous(x);
  const int64_t numel = dense.numel(), bytes = (numel + 7) / 8;
  Tensor y = output_like(dense), bits = make_empty(dense, {bytes}, ScalarType::Byte);
  dispatch(x.scalar_type(), "relu", [&](auto t) {
    using T = typename decltype(t)::type;
    const Args<T> a{read<T>(dense), write<uint8_t>(bits), write<T>(y), numel, nullptr};
    parallel_rows(bytes, 8, [&](int64_t begin, int64_t end) { split_bytes(a, begin, end); });
  });
  return {y, bits};
}

Tensor packed(const Tensor& y, const Tensor& bits) {
  const Tensor dense = torch::stable::contiguous(y);
  STD_TORCH_CHECK(bits.numel() == (y.numel() + 7) / 8 && bits.is_contiguous(), "relu: bits do not fit");
  const std::vector<int64_t> before = values_before_parts(bits);
  Tensor values = make_empty(dense, {before.back()});
  dispatch(y.scalar_type(), "relu", [&](auto t) {
    using T = typename decltype(t)::type;
    T* to = write<T>(values);
    uint8_t* b = const_cast<uint8_t*>(read<uint8_t>(bits));
    parallel_parts(bits.numel(), before.size() - 1, [&](int64_t p, int64_t begin, int64_t end) {
      pack_bytes(Args<T>{read<T>(dense), b, to + before[p], y.numel(), to + before[p + 1]}, begin, end);
    });
  });
  return values;
}

Tensor again(const Tensor& values, const Tensor& bits, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  Tensor y = make_empty(values, shape);
  STD_TORCH_CHECK(bits.numel() == (y.numel() + 7) / 8 && values.is_contiguous() && bits.is_contiguous(), "relu: bits do not fit");
  const std::vector<int64_t> before = values_before_parts(bits);
  STD_TORCH_CHECK(before.back() == values.numel(), "relu: values do not fit bits");
  dispatch(values.scalar_type(), "relu", [&](auto t) {
    using T = typename decltype(t)::type;
    const T* from = read<T>(values);
    uint8_t* b = const_cast<uint8_t*>(read<uint8_t>(bits));
    parallel_parts(bits.numel(), before.size() - 1, [&](int64_t p, int64_t begin, int64_t end) {
      unpack_bytes(Args<T>{from + before[p], b, write<T>(y), y.numel(), from + before[p + 1]}, begin, end);
    });
  });
  return y;
}

Tensor backward(const Tensor& dy, const Tensor& bits) {
  const Tensor dense = torch::stable::contiguous(dy);
  Tensor dx = output_like(dense);
  STD_TORCH_CHECK(bits.numel() == (dx.numel() + 7) / 8 && bits.is_contiguous(), "relu: bits do not fit");
  dispatch(dy.scalar_type(), "relu", [&](auto t) {
    using T = typename decltype(t)::type;
    uint8_t* b = const_cast<uint8_t*>(read<uint8_t>(bits));
    parallel_rows(bits.numel(), 8, [&](int64_t begin, int64_t end) {
      mask_bytes(Args<T>{read<T>(dense), b, write<T>(dx), dx.numel(), nullptr}, begin, end);
    });
  });
  return dx;
}

}  // namespace fastpeft::relu

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("relu_fwd", TORCH_BOX(&fastpeft::relu::forward));
  m.impl("relu_pack", TORCH_BOX(&fastpeft::relu::packed));
  m.impl("relu_again", TORCH_BOX(&fastpeft::relu::again));
  m.impl("relu_bwd", TORCH_BOX(&fastpeft::relu::backward));
}
