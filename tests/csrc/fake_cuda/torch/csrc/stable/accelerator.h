#pragma once
namespace torch::stable::accelerator {
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
}  // namespace torch::stable::accelerator
