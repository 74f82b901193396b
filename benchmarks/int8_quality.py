"""How near int8 networks come to float32: lutra, ONNX Runtime and OpenVINO on the same data.

    python -m benchmarks.int8_quality --data FOLDER [--esrgan FOLDER] [--case TEXT] [--json FILE]

All quantise after training, with the same calibration inputs, every convolution and linear layer.
ONNX Runtime: static, QDQ, a scale for each channel, ranges by MinMax, Entropy and Percentile;
"reduced" has weights of 7 bits, which its guide has for CPUs without VNNI.
OpenVINO: NNCF, preset "mixed", the model type of transformers where it is one; ONNX Runtime's file
where NNCF is missing. Printed are the mean cosine between float32 and int8 on other inputs,
the error relative to the variance of the output and, of classifiers, how often classes are equal.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.int8_networks import Case, Inputs, cases
from benchmarks.machine import machine, saturates, write_json
from lutra import Session
from lutra.formatting import table
from lutra.train import Int8, Lookup, convert, export
from lutra.train.recipe import Keep, Method

Run = Callable[[Inputs], np.ndarray]
METHODS: Final = {"lutra int8": Int8(), "lutra lookup 16x15": Lookup(16, 15, otherwise=Int8())}
_RANGES: Final = ("MinMax", "Entropy", "Percentile")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of sr/ and text/")
    parser.add_argument("--esrgan", type=Path, help="folder of the unpacked npm package")
    parser.add_argument("--case", default="", help="only networks with this text in their name")
    parser.add_argument("--only", default="", help="only contestants with this text in their name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    head = ("network", "int8 by", "cosine", "relative error", "same class %", "seconds")
    rows: list[tuple[str, ...]] = [head]
    records = []
    for name, make in cases(options.data, options.esrgan).items():
        if options.case not in name:
            continue
        case = make()
        with tempfile.TemporaryDirectory() as folder:
            for who, build in contestants(case, Path(folder), name).items():
                if options.only not in who:
                    continue
                start = time.process_time()
                try:
                    run = build()
                except Exception as error:  # whatever a tool raises becomes a line
                    rows.append((name, who, f"failed: {str(error)[:70]}", "", "", ""))
                    print(table(rows[-1:], left=2), flush=True)
                    continue
                seconds = time.process_time() - start
                record = judge(case, run)
                records.append({"case": name, "by": who, "seconds": seconds, **record})
                same = f"{100 * record['same']:.1f}" if case.agreement else ""
                shown = f"{record['cosine']:.5f}", f"{record['error']:.5f}", same
                rows.append((name, who, *shown, f"{seconds:.0f}"))
                print(table(rows[-1:], left=2), flush=True)
    print(table(rows, left=2))
    write_json(options.json, {"machine": machine(), "cases": records})


def contestants(case: Case, folder: Path, name: str) -> dict[str, Callable[[], Run]]:
    """What makes each int8 network."""
    found: dict[str, Callable[[], Run]] = {}
    for ranges in _RANGES:
        for kind in ("", " reduced") if saturates() else ("",):
            run = partial(_onnxruntime, case, folder, ranges, reduced=bool(kind))
            found[f"onnxruntime {ranges}{kind}"] = run
    found["openvino"] = lambda: _openvino(case, folder, name == "MiniLM")
    for who, method in METHODS.items():
        found[who] = lambda method=method: _lutra(case, folder, method)  # type: ignore[misc]
    return found


@torch.no_grad()
def judge(case: Case, run: Run) -> dict[str, float]:
    """Mean cosine, relative squared error and share of equal classes on held inputs."""
    wants, gots = [], []
    for inputs in case.held:
        wants.append(case.module(*inputs).flatten().double().numpy())
        gots.append(np.asarray(run(inputs), np.float64).reshape(-1))
    want, got = np.stack(wants), np.stack(gots)
    lengths = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    cosine = (want * got).sum(1) / np.maximum(lengths, 1e-30)
    return {
        "cosine": float(cosine.mean()),
        "error": float(((want - got) ** 2).mean() / want.var()),
        "same": float((want.argmax(1) == got.argmax(1)).mean()),
    }


def _lutra(case: Case, folder: Path, method: Method) -> Run:
    batched = [torch.cat(column) for column in zip(*case.calibration, strict=True)]
    batches = list(zip(*(column.split(16) for column in batched), strict=True))
    recipe: dict[str, Method] = {pattern: Keep() for pattern in case.kept}
    recipe["*"] = method
    model, _ = convert(case.module, recipe, batches, progress=False)
    path = folder / "model.lutra"
    export(model, path, tuple(column[:4] for column in batched))
    session = Session(path, threads=1)
    names = [i.name for i in session.inputs]

    def run(inputs: Inputs) -> np.ndarray:
        feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        result: np.ndarray = session.run(None, feeds)[0]
        return result

    return run


def _float_onnx(case: Case, folder: Path) -> tuple[Path, list[str]]:
    path = folder / "fp32.onnx"
    names = [f"x{i}" for i in range(len(case.calibration[0]))]
    if not path.exists():
        torch.onnx.export(
            case.module, case.calibration[0], str(path), input_names=names, output_names=["y"],
            dynamo=False, opset_version=17,
        )  # fmt: skip
    return path, names


def _onnxruntime(case: Case, folder: Path, ranges: str, *, reduced: bool) -> Run:
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, names = _float_onnx(case, folder)

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(case.calibration)

        def get_next(self) -> dict[str, Any] | None:
            inputs = next(self.left, None)
            if inputs is None:
                return None
            return {n: x.numpy() for n, x in zip(names, inputs, strict=True)}

    prepared, path = folder / "prepared.onnx", folder / f"{ranges}{reduced}.onnx"
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Batches(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduced,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, ranges),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True},
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(inputs: Inputs) -> np.ndarray:
        feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        result: np.ndarray = session.run(None, feeds)[0]
        return result

    return run


def _openvino(case: Case, folder: Path, transformer: bool) -> Run:
    import openvino

    plain, names = _float_onnx(case, folder)
    core = openvino.Core()
    try:
        import nncf
    except ImportError:
        model = core.read_model(str(folder / "MinMax.onnx"))
    else:
        data = [
            {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
            for inputs in case.calibration
        ]
        model = nncf.quantize(
            core.read_model(str(plain)),
            nncf.Dataset(data),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(data),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)

    def run(inputs: Inputs) -> np.ndarray:
        result = compiled([x.numpy() for x in inputs])[compiled.output(0)]
        return np.array(result)

    return run


if __name__ == "__main__":
    main()
