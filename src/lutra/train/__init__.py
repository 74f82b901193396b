"""Training side of lutra: layers, conversion, fine-tuning and export. Needs PyTorch."""

from __future__ import annotations

from lutra._moved import MOVED_TRAINING, install
from lutra.train.conversion.auto import auto_recipe
from lutra.train.conversion.convert import convert
from lutra.train.conversion.speed_gate import SpeedGate
from lutra.train.exporting.decoder import export_decoder
from lutra.train.exporting.export import export
from lutra.train.finetuning.finetune import FinetuneReport, finetune
from lutra.train.finetuning.settings import Checkpoints, Distillation, Schedule
from lutra.train.functions.modules import (
    TableAttention,
    TableFunction,
    TableLayerNorm,
    TableRMSNorm,
    TableSoftmax,
)
from lutra.train.functions.relu_net import fit_relu_net
from lutra.train.importing.examples import example_inputs
from lutra.train.importing.gguf_file import GGUFModel, load_gguf
from lutra.train.importing.graph import from_graph
from lutra.train.importing.llama import load_llama2c, load_llama2c_tokenizer
from lutra.train.importing.onnx import load_onnx
from lutra.train.layers.finite import check_finite
from lutra.train.layers.int8 import FrozenInt8, Int8Conv2d, Int8Linear
from lutra.train.layers.lookup import FrozenLookup, LookupConv2d, LookupLinear
from lutra.train.layers.lowbit import FrozenLowBit, LowBitLinear
from lutra.train.layers.pq import FrozenPQ, PQConv2d, PQLinear
from lutra.train.layers.pq_reconstruction import reconstruction_loss
from lutra.train.operators.masked_mean import masked_mean
from lutra.train.publishing.load import from_pretrained
from lutra.train.publishing.save import push_to_hub, save_pretrained
from lutra.train.recipe import (
    PQ,
    Function,
    Int8,
    Keep,
    Lookup,
    LowBit,
    recipe_from_json,
    recipe_to_json,
)
from lutra.train.report import ConversionReport, FunctionReport, LayerReport
from lutra.train.search.budget import Budget
from lutra.train.search.optimize import optimize
from lutra.train.search.study import Study
from lutra.train.search.trial import Trial

__all__ = [
    "PQ",
    "Budget",
    "Checkpoints",
    "ConversionReport",
    "Distillation",
    "FinetuneReport",
    "FrozenInt8",
    "FrozenLookup",
    "FrozenLowBit",
    "FrozenPQ",
    "Function",
    "FunctionReport",
    "GGUFModel",
    "Int8",
    "Int8Conv2d",
    "Int8Linear",
    "Keep",
    "LayerReport",
    "Lookup",
    "LookupConv2d",
    "LookupLinear",
    "LowBit",
    "LowBitLinear",
    "PQConv2d",
    "PQLinear",
    "Schedule",
    "SpeedGate",
    "Study",
    "TableAttention",
    "TableFunction",
    "TableLayerNorm",
    "TableRMSNorm",
    "TableSoftmax",
    "Trial",
    "auto_recipe",
    "check_finite",
    "convert",
    "example_inputs",
    "export",
    "export_decoder",
    "finetune",
    "fit_relu_net",
    "from_graph",
    "from_pretrained",
    "load_gguf",
    "load_llama2c",
    "load_llama2c_tokenizer",
    "load_onnx",
    "masked_mean",
    "optimize",
    "push_to_hub",
    "recipe_from_json",
    "recipe_to_json",
    "reconstruction_loss",
    "save_pretrained",
]

install(MOVED_TRAINING)
