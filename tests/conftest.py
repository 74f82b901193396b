"""Without PyTorch the tests of the training side are left out; all others must run and pass."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = []
if find_spec("torch") is None:
    collect_ignore += [
        "test_sharing.py",
        "test_int8_embedding.py",
        "test_convert.py",
        "test_export.py",
        "test_export_dynamic.py",
        "test_export_lookup.py",
        "test_export_operators.py",
        "test_export_pq.py",
        "test_export_text.py",
        "test_export_transformer.py",
        "test_finetune.py",
        "test_function_layers.py",
        "test_gate.py",
        "test_gradients.py",
        "test_int8_layers.py",
        "test_kmeans.py",
        "test_layers.py",
        "test_lookup_layers.py",
        "test_projection.py",
        "test_tree_training.py",
    ]
