"""One graph at every batch and size, and models larger than protobuf's 2 GB."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from support import GOLDEN, relative_error

from infexport.bundle import open_bundle
from infexport.evaluation.pytorch_reference import TorchRunner
from infexport.evaluation.recorded_checkpoint import load_recorded
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.inference.runners.onnxruntime import OrtRunner
from infvit.config import InfViTConfig
from infvit.network import InfViT

SHAPES = [(1, 32, 32), (3, 48, 48), (3, 32, 48), (1, 224, 224), (3, 224, 112), (1, 8, 1024)]


# all pairs of the 16,385 tokens of 1024² in float64 would dominate the memory of this test
@pytest.mark.parametrize(("name", "largest"), [("torchvision_linear", 1024), ("torchvision_pure", 512)])
def test_one_graph_serves_every_batch_and_size(name, largest, golden_bundle):
    bundle = open_bundle(golden_bundle(name))
    preprocessing = bundle.manifest.preprocessing
    checkpoint = load_recorded(GOLDEN / f"{name}.safetensors", bundle)
    truth = TorchRunner(checkpoint, preprocessing.mean, preprocessing.std, torch.float64)
    with OrtRunner(bundle, "cpu") as runner, truth:
        for batch, height, width in (*SHAPES, (1, largest, largest)):
            image = synthetic_image(height, width)
            images = np.ascontiguousarray(np.stack([image, 255 - image, image[::-1]])[:batch])
            logits = runner.run(images)["logits"]
            assert logits.shape == (batch, 10)
            assert relative_error(logits, truth.run(images)["logits"]) <= 5e-6, (batch, height, width)


def test_a_model_over_2_gb_goes_through_external_data(infexport, tmp_path):
    """Model with the paper's 24 layers, widened to 2.2 GB of float32."""
    config = InfViTConfig(
        variant="pure_infsa", image_size=32, patch_size=16, depth=24, embed_dim=1408, num_heads=16, mlp_dim=5376,
        num_classes=10, norm_eps=1e-12, attention_dense=True,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InfViT(config).state_dict().items()}
    # one block of random numbers for every tensor: half a billion new ones would take longer than the test
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

    def tensor(name, shape):
        values = block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].reshape(shape)
        return values * (0.5 if values.dim() < 2 else shape[-1] ** -0.5)

    state = {name: tensor(name, shape) for name, shape in shapes.items()}
    assert sum(value.numel() for value in state.values()) * 4 > 2**31
    save_file(state, tmp_path / "large.safetensors")
    del state
    options = ("--variant", "pure_infsa", "--num-heads", 16)
    infexport("convert", "checkpoint", tmp_path / "large.safetensors", *options, "-o", tmp_path / "b")
    assert (tmp_path / "b" / "model.onnx").stat().st_size < 2**24
    assert (tmp_path / "b" / "model.onnx.data").stat().st_size > 2**31
    onnx.checker.check_model(tmp_path / "b" / "model.onnx", full_check=True)

    bundle = open_bundle(tmp_path / "b")
    checkpoint = load_recorded(tmp_path / "large.safetensors", bundle)
    preprocessing = bundle.manifest.preprocessing
    image = synthetic_image(32, 32)[None]
    with TorchRunner(checkpoint, preprocessing.mean, preprocessing.std, torch.float32) as runner:
        expected = runner.run(image)["logits"]
    del checkpoint
    session = onnxruntime.InferenceSession(bundle.model)
    (logits,) = session.run(["logits"], {"image": image})
    assert relative_error(logits, expected) <= 5e-5  # float32 compared with float32, after 24 layers
