#pragma once
namespace torch::stable {
struct Tensor {
  int get_device_index() const { return 0; }
};
}  // namespace torch::stable
