#include "engine/core/op_registry.h"

#include <algorithm>

#include "engine/layers/layer.h"

namespace lutra {

// The families: each adds its operators.
using Family = void(OpRegistry&);
Family pq_ops, lookup_ops, int8_ops, lowbit_ops, dense_ops, conv_transpose_ops, basic_ops,
    arithmetic_ops, function_ops, norm_ops, group_norm_ops, attention_ops, matmul_ops,
    pointwise_ops, reduce_ops, pool_ops, image_ops, resample_ops, sequence_ops, select_ops,
    recurrent_ops, position_ops, decoder_ops;

namespace {

constexpr Family* kFamilies[] = {
    pq_ops,       lookup_ops,     int8_ops,      lowbit_ops,   dense_ops,      conv_transpose_ops,
    basic_ops,    arithmetic_ops, function_ops,  norm_ops,     group_norm_ops, attention_ops,
    matmul_ops,   pointwise_ops,  reduce_ops,    pool_ops,     image_ops,      resample_ops,
    sequence_ops, select_ops,     recurrent_ops, position_ops, decoder_ops};

}  // namespace

void OpRegistry::add(const char* name, const Operator& op) {
  const bool added = ops_.emplace(name, op).second;
  require(added, "there is an operator '%' already", name);
}

std::vector<std::string> OpRegistry::names() const {
  std::vector<std::string> all;
  for (const auto& entry : ops_) all.push_back(entry.first);
  return all;
}

const Operator& OpRegistry::find(const std::string& name) const {
  const auto found = ops_.find(name);
  require(found != ops_.end(), "'%' is not an operator of the engine", name);
  return found->second;
}

int OpRegistry::build(PlanBuilder& plan, const StepArgs& args) const {
  const Operator& op = find(args.op);
  const size_t count = args.inputs.size();
  require(count >= op.inputs && count <= std::max(op.inputs, op.most), "% does not take % inputs",
          args.op, count);
  require(args.input_shapes.size() == count, "% got % shapes for % inputs", args.op,
          args.input_shapes.size(), count);
  require(op.fuses || (args.residual < 0 && !args.clamp.on),
          "% neither adds another value nor clamps", args.op);
  bool planes = args.planes.empty() || args.planes.size() == count;
  for (const int plane : args.planes) planes = planes && (plane == 0 || op.reads_planes);
  require(planes, "% cannot read these planes of its inputs", args.op);
  return op.build(plan, args);
}

std::unique_ptr<Layer> OpRegistry::layer(const Kernels& kernels, const StepArgs& args) const {
  const Operator& op = find(args.op);
  require(op.layer != nullptr, "% is not a layer that runs on its own", args.op);
  return op.layer(kernels, args);
}

OpRegistry& op_registry() {
  static OpRegistry registry = [] {
    OpRegistry filled;
    for (Family* const family : kFamilies) family(filled);
    return filled;
  }();
  return registry;
}

}  // namespace lutra
