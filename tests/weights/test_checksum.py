"""The checksum: its definition, that parts add up, and that the kernel gives the numbers of its CPU twin."""

import numpy as np
import pytest
import torch

from vexact.ops.cpu import checksum as twin
from vexact.ops.kernels import checksum as kernel
from vexact.weights import checksum, checksums
from vexact.weights.fingerprint import checksum_spans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there Triton's interpreter runs the kernel
WORDS = [torch.int8, torch.int16, torch.int32, torch.int64]


def words(count, dtype, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-128, 128, (count * dtype.itemsize,), generator=generator, dtype=torch.int8)
    return raw.view(dtype).to(device)


def test_checksum_of_small_tensors_by_hand():
    # Bits of int32 view: 1.0 is 0x3f800000 = 1065353216, -0.0 is -2^31; weights 1, 3.
    assert checksum(torch.tensor([1.0, -0.0])) == 1065353216 - 3 * 2**31
    assert checksum(torch.tensor([1.0], dtype=torch.bfloat16)) == 0x3F80
    assert checksum(torch.empty(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_flipped_bit_and_any_swap_changes_the_checksum(dtype):
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    original = checksum(tensor)
    view = torch.int32 if dtype is torch.float32 else torch.int16
    for index in range(tensor.numel()):
        flipped = tensor.clone()
        flipped.view(view).view(-1)[index] ^= 1
        assert checksum(flipped) != original
    assert checksum(tensor.flip(0)) != original
    assert checksum(tensor.t().contiguous().t()) == original  # memory layout does not matter


def test_chunks_continue_the_weights(monkeypatch):
    tensor = torch.randn(1000)
    whole = checksum(tensor)
    monkeypatch.setattr("vexact.ops.cpu.checksum.CHUNK", 7)
    assert checksum(tensor) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_parts_add_up_to_the_whole_modulo_two_to_the_64(dtype):
    whole = words(1003, dtype, device="cpu").view(17, 59)
    for cut in (1, 6, 16):
        offsets = [0, cut * 59]
        parts = checksums([whole[:cut], whole[cut:]], offsets)
        assert int(parts.sum()) == checksum(whole)  # wraps around, as the definition does
        assert parts.tolist() == [checksum(whole[:cut]), checksum(whole[cut:], offset=cut * 59)]
        assert int(checksums([whole[cut:], whole[:cut]], offsets).sum()) != checksum(whole)
    spans = np.array([[0, 5, 40, 5], [0, 0, 5, 0], [0, 40, 1003, 40], [0, 9, 9, 9]])
    assert int(checksum_spans([whole], spans).sum()) == checksum(whole)


def test_no_tensors_and_empty_ones_have_checksums_too():
    assert checksums([]).tolist() == []
    assert checksums([torch.empty(0, 3), torch.ones(1)], [7, 0]).tolist() == [0, 0x3F800000]


def stretches(dtype):
    """Tensors and spans around the edges of a program's stretch, aligned and not, empty, and in any order."""
    step = kernel._STRETCH
    base = words(2 * step + 4099, dtype)
    tensors = [base, base[3:], words(5, dtype, seed=1), base[64 : 64 + step]]
    rows = [
        (0, 0, len(base), 0),
        (2, 0, 5, 2**40),
        (1, 0, step, 3),
        (0, 64, 64 + step, 1),
        (0, 7, 7, 5),
        (3, 0, step, 0),
        (1, 1, step + 2, 2**62),
        (0, 4096, 4097, 9),
    ]
    return tensors, np.array(rows, np.int64)


@pytest.mark.parametrize("dtype", WORDS)
def test_the_kernel_gives_the_numbers_of_its_twin(dtype):
    tensors, spans = stretches(dtype)
    expected = twin.checksum_spans([tensor.cpu() for tensor in tensors], spans)
    assert kernel.checksum_spans(tensors, spans).tolist() == expected.tolist()


def test_the_kernel_takes_words_of_several_sizes_at_once():
    tensors = [words(300 + index, dtype, index) for index, dtype in enumerate(WORDS)]
    spans = np.array([(index % 4, index, 250 - index, index) for index in range(11)], np.int64)
    expected = twin.checksum_spans([tensor.cpu() for tensor in tensors], spans)
    assert kernel.checksum_spans(tensors, spans).tolist() == expected.tolist()
    assert kernel.checksum_spans(tensors, spans[:0]).tolist() == []


def test_the_kernel_sees_no_word_outside_of_a_span():
    """What lies around would change the sum: every weight is odd."""
    base = words(9000, torch.int16)
    spans = np.array([[0, 101, 8222, 0]])
    before = kernel.checksum_spans([base], spans).tolist()
    base[:101], base[8222:] = 1, 1
    assert kernel.checksum_spans([base], spans).tolist() == before
    base[8221] ^= 1
    assert kernel.checksum_spans([base], spans).tolist() != before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_tensor_has_one_checksum_on_the_device_and_on_the_host(dtype):
    tensor = torch.randn(151_936, 257, device="cuda").to(dtype)
    assert checksum(tensor) == checksum(tensor.cpu())
    assert int(checksums([tensor[:70_001], tensor[70_001:]], [0, 70_001 * 257]).sum()) == checksum(tensor)
    stretched = tensor.t()
    assert checksum(stretched) == checksum(stretched.cpu())
