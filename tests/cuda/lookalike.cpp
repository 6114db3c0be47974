// What PyTorch's autograd asks of a device, for two CUDA devices that are not there: loaded before torch, it lets tensors that say they are on
// one of them (lookalike.py) take part in backward on a build of torch without CUDA. Which one is current is each thread's own.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;
}  // namespace

// The current device's number before; -1 changes nothing.
extern "C" __attribute__((visibility("default"))) int lookalike_exchange_device(int index) {
  const int before = current;
  if (index >= 0) current = static_cast<c10::DeviceIndex>(index);
  return before;
}

namespace c10::impl {
struct LookalikeGuard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Stream stream(DeviceIndex index) { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, index)); }
  Device exchangeDevice(Device device) const override { return Device(DeviceType::CUDA, lookalike_exchange_device(device.index())); }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override { lookalike_exchange_device(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { lookalike_exchange_device(device.index()); }
  Stream getStream(Device device) const noexcept override { return stream(device.index() < 0 ? current : device.index()); }
  Stream getNewStream(Device device, int = 0) const override { return getStream(device); }
  Stream exchangeStream(Stream s) const noexcept override { return stream(s.device_index()); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, LookalikeGuard)
}
}  // namespace c10::impl

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
