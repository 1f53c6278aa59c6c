"""Wire formats: what they cost, what they lose, and what they never hide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpipe.distributed.wire import TensorSpec
from fedpipe.pipeline.p2p import QueueLink

SHAPE = (3, 5, 24)
CPU = torch.device("cpu")


def normal(shape: tuple[int, ...] = SHAPE, *, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def round_trip(spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
    return spec.decode(spec.encode(tensor))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6], ids=["hidden", "gradients", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_off_by_at_most_half_a_step_of_its_row(scale: float, dtype: torch.dtype) -> None:
    rows = torch.logspace(-3, 3, SHAPE[1])[:, None]  # rows of very different size
    sent = (normal(scale=scale) * rows).to(dtype)
    got = round_trip(TensorSpec(SHAPE, torch.float32, "int8"), sent)
    half_step = sent.float().abs().amax(-1, keepdim=True) / 127 / 2
    assert ((got - sent.float()).abs() <= half_step * (1 + 1e-5)).all()
    assert not torch.equal(got, sent.float())


@pytest.mark.parametrize(
    ("length", "density"),
    [(4096, 0.01), (4096, 0.02), (4096, 0.03), (37, 1.0), (24, 0.3), (1, 0.5)],
)
def test_sparse_sends_the_largest_values_of_a_row_at_two_levels(
    length: int, density: float
) -> None:
    sent = normal((9, length))
    spec = TensorSpec((9, length), torch.float32, "sparse", density)
    buffer = spec.encode(sent)
    got = spec.decode(buffer).numpy()
    assert buffer.nbytes == spec.nbytes == spec.empty(CPU).nbytes
    for row, decoded in zip(sent.numpy(), got, strict=True):
        k = max(1, round(density * length))
        largest = np.sort(np.argsort(-abs(row))[:k])
        np.testing.assert_array_equal(decoded.nonzero()[0], largest)
        values, sizes = row[largest], abs(row[largest])
        is_large = sizes > sizes.mean()
        levels = [sizes[c].mean() if c.any() else 0.0 for c in (~is_large, is_large)]
        expected = np.sign(values) * np.where(is_large, levels[1], levels[0])
        np.testing.assert_allclose(decoded[largest], expected, rtol=2**-8)


def test_what_sparse_does_not_send_is_sent_later() -> None:
    """With error feedback the sum of what arrives follows the sum of what was meant."""
    spec = TensorSpec((4, 4096), torch.float32, "sparse", 0.02)
    change, owed, arrived = normal((4, 4096)), torch.zeros(4, 4096), torch.zeros(4, 4096)
    distances = []
    for count in range(1, 301):
        owed += change
        got = round_trip(spec, owed)
        owed -= got
        arrived += got
        distances.append(float((arrived / count - change).norm() / change.norm()))
        torch.testing.assert_close(arrived + owed, count * change, atol=2e-3, rtol=0)
    assert distances[0] > 0.9 and distances[99] < 0.3 and distances[299] < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_sparse_row_that_overflowed_arrives_without_a_number(value: float) -> None:
    sent = normal((2, 4096))
    sent[1, 3] = value
    got = round_trip(TensorSpec((2, 4096), torch.float32, "sparse", 0.02), sent)
    assert got[0].isfinite().all()
    assert not got[1][got[1] != 0].isfinite().any()


def test_the_largest_value_of_a_row_arrives_whatever_its_sign() -> None:
    spec = TensorSpec((2, 3), torch.float32, "int8")
    got = round_trip(spec, torch.tensor([[-3.0, 0.0, 1.0], [0.0, 7.0, -1.0]]))
    torch.testing.assert_close(got[:, :2], torch.tensor([[-3.0, 0.0], [0.0, 7.0]]))


def test_rows_of_zeros_and_of_next_to_nothing_arrive_as_zeros() -> None:
    sent = torch.zeros(3, 8)
    sent[1] = 1e-45  # the smallest float there is
    sent[2] = 1.0
    got = round_trip(TensorSpec((3, 8), torch.float32, "int8"), sent)
    assert torch.equal(got[:2], torch.zeros(2, 8))
    torch.testing.assert_close(got[2], sent[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_overflowed_never_arrives_as_a_number(value: float, dtype: torch.dtype) -> None:
    sent = normal((4, 8))
    sent[1, 3] = value
    got = round_trip(TensorSpec((4, 8), dtype, "int8"), sent.to(dtype))
    assert got[1].isnan().all()
    assert got[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("wire", "dtype", "nbytes"),
    [
        ("", torch.float32, 360 * 4),
        ("", torch.bfloat16, 360 * 2),
        ("", torch.int32, 360 * 4),
        ("auto", torch.bfloat16, 360 * 2),
        ("fp32", torch.bfloat16, 360 * 4),
        ("bf16", torch.float32, 360 * 2),
        ("int8", torch.float32, 360 + 15 * 4),
        ("int8", torch.bfloat16, 360 + 15 * 4),
    ],
)
def test_a_format_has_its_size_on_the_wire_and_its_receivers_dtype(
    wire: str, dtype: torch.dtype, nbytes: int
) -> None:
    spec = TensorSpec(SHAPE, dtype, wire)
    buffer = spec.encode(normal(scale=9))
    assert buffer.is_contiguous()
    assert buffer.nbytes == nbytes == spec.nbytes
    expected = spec.empty(CPU)
    assert (expected.shape, expected.dtype) == (buffer.shape, buffer.dtype)
    got = spec.decode(buffer)
    assert (got.shape, got.dtype) == (SHAPE, dtype)


def test_bf16_travels_rounded_and_comes_back_in_what_the_stage_computes_in() -> None:
    sent = normal()
    got = round_trip(TensorSpec(SHAPE, torch.float32, "bf16"), sent)
    assert torch.equal(got, sent.bfloat16().float())


def test_a_format_that_changes_nothing_copies_nothing() -> None:
    sent = normal()
    assert round_trip(TensorSpec(SHAPE, torch.float32), sent) is sent


def test_a_transposed_tensor_arrives_in_the_right_order() -> None:
    sent = normal((24, 5)).t()
    got = round_trip(TensorSpec((5, 24), torch.float32, "int8"), sent)
    torch.testing.assert_close(got, sent, atol=0.02, rtol=0)


def test_sending_leaves_the_stages_own_tensor_as_it_is() -> None:
    sent = normal().requires_grad_()
    before = sent.detach().clone()
    got = round_trip(TensorSpec(SHAPE, torch.float32, "int8"), sent)
    assert torch.equal(sent, before)
    assert got.requires_grad_().is_leaf


def test_a_queue_counts_the_bytes_that_a_wire_would_carry() -> None:
    specs = (TensorSpec(SHAPE, torch.float32, "int8"), TensorSpec((2, 3), torch.int32))
    link = QueueLink(specs, window=2)
    link.send(normal(), torch.arange(6).view(2, 3))
    got, positions = link.recv()
    assert link.sent_bytes == 360 + 15 * 4 + 6 * 4
    assert torch.equal(got, round_trip(specs[0], normal()))
    assert positions.dtype == torch.int32
