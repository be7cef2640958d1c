// All weights of a model in one allocation. One list of slots drives sizes, loading and the check
// for missing ones. Fused matrices (qkv, gate_up) are loaded by their parts, straight into place.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"

namespace ni {

struct LayerWeights {
  NormWeight attn_norm, mlp_norm, q_norm, k_norm;
  LinearWeight qkv;      // [q | k | v rows, hidden]
  LinearWeight o;        // [hidden, heads * head_dim]
  LinearWeight gate_up;  // [gate | up rows, hidden]; only up without a gate
  LinearWeight down;     // [hidden, intermediate]
};

class Weights {
 public:
  // Declares every slot; allocates nothing.
  Weights(const ModelConfig& config, DType dtype);
  Weights(const Weights&) = delete;  // slots point into this object
  Weights& operator=(const Weights&) = delete;

  // Name and shape of every tensor that must be loaded, in model order.
  std::vector<std::pair<std::string, std::vector<int64_t>>> slots() const;
  size_t bytes(const Backend& backend) const;

  void allocate(Backend& backend);
  // data: host memory [shape of the slot], f32, bf16 or f16, rows `row_stride` elements apart.
  // Throws std::invalid_argument naming the slot. From several threads at once for different slots,
  // where the backend allows it.
  void load(Backend& backend, const std::string& name, const Tensor& data);
  // Throws std::invalid_argument listing the slots that were never loaded.
  void check_complete() const;

  // The matrices that activations are multiplied with (the embedding only where it is the lm_head).
  std::vector<const LinearWeight*> products() const;

  LinearWeight embed, positions, lm_head;  // lm_head shares embed's memory when tied
  std::vector<LayerWeights> layers;
  NormWeight final_norm;

 private:
  struct Slot {
    std::string name;
    std::vector<int64_t> shape;
    LinearWeight* matrix = nullptr;  // rows [first_row, …) of it, or
    float** vector = nullptr;        // elements [first_row, …) of a vector
    int64_t first_row = 0;
    bool loaded = false;
  };
  void add_matrix(LinearWeight& w, const std::vector<std::pair<std::string, int64_t>>& parts,
                  int64_t in_features, bool bias);
  void add_vector(const std::string& name, float*& target, int64_t size);
  void add_norm(const std::string& name, NormWeight& norm, int64_t size, bool bias);

  ModelConfig config_;
  DType dtype_;
  std::vector<Slot> slots_;
  std::unordered_map<std::string, size_t> slot_index_;
  std::vector<LinearWeight*> matrices_;
  std::vector<std::pair<float**, int64_t>> vectors_;  // biases and norm parameters: fp32
  Buffer buffer_;
};

}  // namespace ni
