"""QuantLinear as a citizen of PyTorch: dtypes, copies, gradients, autocast."""

from __future__ import annotations

import copy
import pickle
import types
from dataclasses import replace

import pytest
import torch
from random_weights import random_weight
from table_products import formula
from torch import Tensor, nn

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.layers import int4_cpu
from gptq_plugin.layers.code_table import CodeTable
from gptq_plugin.layers.qlinear import QuantLinear, note_float_rest, output_dtype
from gptq_plugin.layers.stored_weight import TENSORS
from gptq_plugin.layers.weight_table import WeightTable

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Roundings of the output; for bfloat16 also those of the 4-bit kernel's scales.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"bits": 2},
        {"bits": 3, "n_out": 45},
        {"bits": 8, "group_size": -1},
        {"group_size": 96, "n_in": 192},
        {"n_in": 75, "n_out": 37, "group_size": 15, "bits": 3},
        {"n_in": 100},
        {"act_order": True},
        {"n_in": 24, "group_size": 64},
    ],
    ids=str,
)
def test_forward_is_the_linear_layer_of_the_dequantized_weight(shape, dtype):
    weight = random_weight(**shape)
    bias = torch.randn(weight.codes.shape[0])
    layer = QuantLinear.from_quantized(weight, bias)
    assert torch.equal(layer.dequantize(torch.float64), formula(weight))
    x = torch.randn(2, 3, layer.in_features, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, layer.out_features)
    assert distance(y, x.double() @ formula(weight).t() + bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0), (3, 1, 2)])
def test_any_leading_dimensions_pass_through_also_no_rows_at_all(leading, dtype):
    layer = QuantLinear.from_quantized(random_weight())
    y = layer(torch.randn(*leading, 128, dtype=dtype))
    assert y.shape == (*leading, 48) and y.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "applies"),
    [
        ({}, True),
        ({"n_in": 96, "group_size": 96}, True),  # as three of the kernel's groups
        ({"n_in": 512, "group_size": -1}, True),
        ({"bits": 8}, False),
        ({"act_order": True}, True),
        ({"n_out": 40}, True),
        ({"group_size": 16}, False),
        ({"n_in": 100}, False),
    ],
    ids=str,
)
def test_bfloat16_on_a_cpu_uses_pytorchs_four_bit_kernel_where_that_applies(shape, applies, monkeypatch):
    weight = random_weight(**shape)
    layer = QuantLinear.from_quantized(weight, torch.randn(weight.codes.shape[0]))
    plain = []
    for table in (CodeTable, WeightTable):
        monkeypatch.setattr(table, "matmul", lambda _, x: plain.append(1) or x.new_zeros(len(x), layer.out_features))
    x = torch.randn(5, layer.in_features, dtype=torch.bfloat16)
    y = layer(x)
    assert bool(plain) is not applies
    if applies:
        expected = x.double() @ formula(weight).t() + layer.bias.double()
        assert distance(y, expected) < TOLERANCE[torch.bfloat16]
    layer(x.repeat(int4_cpu.MOST_ROWS, 1))
    assert plain, "many rows are dequantized"


def test_casting_the_module_casts_the_bias_and_leaves_codes_and_scales_alone():
    layer = QuantLinear.from_quantized(random_weight(), torch.randn(48))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for dtype, cast in {
        torch.bfloat16: lambda m: m.bfloat16(),
        torch.float16: lambda m: m.half(),
        torch.float64: lambda m: m.to(torch.float64),
        torch.float32: lambda m: m.type(torch.float32),
    }.items():
        cast(layer)
        assert layer.bias.dtype == dtype
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            assert layer.state_dict()[name].dtype == before[name].dtype
            assert torch.equal(layer.state_dict()[name], before[name])


def test_the_state_dict_has_the_names_of_a_gptq_checkpoint_and_nothing_forward_made():
    layer = QuantLinear.from_quantized(random_weight(), torch.randn(48))
    layer(torch.randn(1, 128, dtype=torch.bfloat16))
    layer(torch.randn(1, 128))
    assert {"int4", "codes"} <= vars(layer._prepared.cpu).keys()
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    assert not list(layer.parameters()) and set(TENSORS) == set(layer.state_dict())
    assert set(QuantLinear(128, 48, 4, 32).state_dict()) == {"qweight", "qzeros", "scales", "g_idx"}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_a_loaded_state_dict_is_what_forward_uses_also_after_an_earlier_forward(assign, inference):
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    with torch.inference_mode(inference):
        layer = QuantLinear.from_quantized(random_weight())
        other = QuantLinear.from_quantized(random_weight())
        assert not torch.equal(layer(x), other(x))
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(layer(x), other(x))


def test_forward_notices_buffers_that_were_replaced_or_written_to():
    weight, other = random_weight(), random_weight()
    layer, source = QuantLinear.from_quantized(weight), QuantLinear.from_quantized(other)
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    layer(x)
    layer.qweight = source.qweight
    expected = x.double() @ layer.dequantize(torch.float64).t()
    assert distance(layer(x), expected) < TOLERANCE[torch.bfloat16]
    layer.qzeros.copy_(source.qzeros)
    layer.scales.copy_(source.scales)
    assert torch.equal(layer(x), source(x))
    layer.g_idx.copy_(layer.g_idx[torch.randperm(128)])
    assert distance(layer(x), x.double() @ layer.dequantize(torch.float64).t()) < TOLERANCE[torch.bfloat16]


def test_copies_and_pickles_compute_the_same_and_share_nothing():
    layer = QuantLinear.from_quantized(random_weight(), torch.randn(48))
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    y = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied._prepared is None
        assert torch.equal(copied(x), y)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(layer.buffers(), copied.buffers(), strict=True))


def test_a_layer_shares_no_memory_with_the_result_it_was_made_from():
    weight, bias = random_weight(), torch.randn(48)
    layers = [QuantLinear.from_quantized(weight, bias) for _ in range(2)]
    pointers = [t.data_ptr() for layer in layers for t in layer.buffers()]
    assert len(set(pointers)) == 10 and not {weight.scales.data_ptr(), bias.data_ptr()} & set(pointers)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_gradient_reaches_x_and_asks_for_no_weight(act_order):
    layer = QuantLinear.from_quantized(random_weight(n_in=32, n_out=16, act_order=act_order), torch.randn(16))
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)
    x = torch.randn(2, 32, dtype=torch.bfloat16, requires_grad=True)  # through the 4-bit kernel
    layer(x).backward(torch.ones(2, 16, dtype=torch.bfloat16))
    expected = layer.dequantize(torch.float64).sum(0).expand(2, 32)
    assert distance(x.grad, expected) < TOLERANCE[torch.bfloat16]
    assert not layer(x.detach()).requires_grad


def test_autocast_sets_the_dtype_as_it_does_for_a_float_layer():
    layer, linear = QuantLinear.from_quantized(random_weight(), torch.randn(48)), nn.Linear(128, 48)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == linear(x).dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert distance(y.detach(), layer(x.detach()).double()) < TOLERANCE[torch.bfloat16]


def test_its_repr_shows_its_sizes_and_its_grid():
    text = repr(QuantLinear(128, 48, 3, -1, bias=True))
    assert text == "QuantLinear(in_features=128, out_features=48, bits=3, group_size=-1, bias=True)"


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 8; got 5"):
        QuantLinear(128, 48, 5, 32)
    with pytest.raises(ValueError, match="group_size must be -1 or positive, got 0"):
        QuantLinear(128, 48, 4, 0)
    layer = QuantLinear.from_quantized(random_weight())
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="x must end in 128 input channels"):
            layer(torch.zeros(2, 64, dtype=dtype))
        layer.bias = torch.zeros(1)  # would broadcast
        with pytest.raises(ValueError, match=r"bias must have shape \[48\], got \[1\]"):
            layer(torch.zeros(2, 128, dtype=dtype))
        layer.bias = None


def test_a_layer_is_made_on_the_meta_device_without_memory():
    layer = QuantLinear(128, 48, 4, 32, bias=True, dtype=torch.bfloat16, device="meta")
    assert all(t.is_meta for t in layer.buffers()) and layer.bias.dtype == torch.bfloat16
    full = QuantLinear.from_quantized(random_weight(), torch.randn(48))
    layer.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 128)
    assert torch.equal(layer(x), full(x))


def test_a_new_layer_holds_zeros_in_the_shapes_and_types_of_a_checkpoint():
    layer = QuantLinear(100, 45, 3, 32, bias=True, dtype=torch.bfloat16)
    expected = {
        "qweight": ((10, 45), torch.int32),
        "qzeros": ((4, 5), torch.int32),
        "scales": ((4, 45), torch.float16),
        "bias": ((45,), torch.bfloat16),
    }
    for name, (shape, dtype) in expected.items():
        buffer = getattr(layer, name)
        assert (buffer.shape, buffer.dtype) == (shape, dtype) and not buffer.any(), name
    assert torch.equal(layer.g_idx, torch.arange(100) // 32) and layer.g_idx.dtype == torch.int32
    assert (layer.in_features, layer.out_features, layer.bits, layer.group_size) == (100, 45, 3, 32)
    assert not QuantLinear(100, 45, 3, -1).g_idx.any() and QuantLinear(8, 8, 4, 1).g_idx.tolist() == [*range(8)]
    assert not QuantLinear(24, 8, 4, 64).g_idx.any()  # a group longer than the layer
    assert QuantLinear(8, 8, 4, 8).bias is None and QuantLinear(8, 8, 4, 8).weight.dtype == torch.float16
    with pytest.raises(ValueError, match="group_size must be -1 or positive, got -2"):
        QuantLinear(8, 8, 4, -2)


def test_a_layer_is_made_on_the_device_that_is_asked_whatever_the_default_is():
    weight = random_weight()
    with torch.device("meta"):
        made = QuantLinear(16, 8, 4, 8, bias=True, device="cpu")
        packed = QuantLinear.from_quantized(weight)
        assert all(buffer.device.type == "cpu" for layer in (made, packed) for buffer in layer.buffers())
        assert made.weight.device.type == "cpu"
        ones = torch.ones(2, 128, device="cpu")
        outputs = [packed(ones.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    for y in outputs:
        assert distance(y, formula(weight).sum(1).expand(2, -1)) < TOLERANCE[y.dtype]
    assert torch.equal(made.g_idx, torch.arange(16, dtype=torch.int32) // 8)


def test_a_packed_result_keeps_what_it_was_given():
    weight, bias = random_weight(bits=3), torch.randn(48, dtype=torch.float64, requires_grad=True)
    weight = replace(weight, scales=weight.scales.T.contiguous().T, g_idx=weight.g_idx.repeat_interleave(2)[::2])
    layer = QuantLinear.from_quantized(weight, bias)
    assert torch.equal(layer.bias, bias) and layer.bias.dtype == torch.float64 and not layer.bias.requires_grad
    assert torch.equal(layer.scales, weight.scales) and torch.equal(layer.g_idx, weight.g_idx)
    assert all(buffer.is_contiguous() for buffer in layer.buffers())
    assert (layer.in_features, layer.out_features, layer.bits, layer.group_size) == (128, 48, 3, 32)
    dtypes = [QuantLinear.from_quantized(weight, *rest).weight.dtype for rest in ((bias,), (), (bias, torch.float16))]
    assert dtypes == [torch.float64, torch.float32, torch.float16]
    with pytest.raises(ValueError, match="scales must be"):
        QuantLinear.from_quantized(replace(weight, scales=weight.scales.float()))


@pytest.mark.parametrize(
    ("rows", "fast"), [(0, False), (1, True), (int4_cpu.MOST_ROWS, True), (int4_cpu.MOST_ROWS + 1, False)]
)
def test_the_four_bit_kernel_takes_few_rows_in_bfloat16_only(rows, fast, monkeypatch):
    layer, taken, matmul = QuantLinear.from_quantized(random_weight()), [], int4_cpu.Int4.matmul
    monkeypatch.setattr(int4_cpu.Int4, "matmul", lambda *args: taken.append(1) or matmul(*args))
    x = torch.randn(rows, 128)
    layer(x.bfloat16())
    assert bool(taken) is fast
    taken.clear()
    layer(x.half())
    layer(x)
    assert not taken


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_the_four_bit_kernel_computes_every_group_it_takes(group_size, bias):
    weight = random_weight(n_in=512, n_out=32, group_size=group_size)
    layer = QuantLinear.from_quantized(weight, None if bias is None else torch.randn(32, dtype=bias))
    x = torch.randn(2, 3, 512, dtype=torch.bfloat16)
    y = layer(x.mT.contiguous().mT)
    expected = x.double() @ formula(weight).t() + (0 if bias is None else layer.bias.double())
    assert layer._prepared.cpu.int4.group_size == group_size
    assert y.shape == (2, 3, 32) and distance(y, expected) < TOLERANCE[torch.bfloat16]


def test_what_forward_derived_is_kept_until_a_buffer_changes():
    layer, x = QuantLinear.from_quantized(random_weight()), torch.ones(1, 128, dtype=torch.bfloat16)
    layer(x)
    kept = layer._prepared
    layer(x)
    assert layer._prepared is kept and kept.group_size == 32
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        getattr(layer, name).add_(0)  # written to, if with the same values
        layer(x)
        assert layer._prepared is not kept, name
        kept = layer._prepared
    layer.to(torch.float64)
    assert layer._prepared is None
    layer(x)
    layer.load_state_dict(layer.state_dict())
    assert layer._prepared is None


def test_a_layer_that_is_cast_and_moved_at_once_keeps_its_types_there():
    layer = QuantLinear.from_quantized(random_weight(), torch.randn(48)).to("meta", torch.float64)
    types = {name: (buffer.device.type, buffer.dtype) for name, buffer in layer.named_buffers()}
    assert types == {
        "qweight": ("meta", torch.int32),
        "qzeros": ("meta", torch.int32),
        "scales": ("meta", torch.float16),
        "g_idx": ("meta", torch.int32),
        "bias": ("meta", torch.float64),
    }
    assert layer.weight.dtype == torch.float64 and layer.weight.is_meta
    assert layer.half().weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_placeholder_has_the_float_weights_shape_and_dtype_wherever_the_layer_goes(dtype):
    weight = random_weight(n_in=128, n_out=48)
    layer = QuantLinear.from_quantized(weight, None, dtype)
    for moved in (layer, layer.to("cpu"), copy.deepcopy(layer).to(torch.float32)):
        wanted = torch.float32 if moved is not layer else dtype
        assert (moved.weight.shape, moved.weight.dtype) == ((48, 128), wanted) and moved.weight.isnan().all()
    assert layer.weight.untyped_storage().nbytes() == dtype.itemsize


def test_a_float_layers_state_dict_is_refused_with_what_to_do():
    model = nn.Sequential(QuantLinear(8, 8, 4, 8))
    with pytest.raises(RuntimeError, match="0 is quantized, and these are the weights of the float model: load them"):
        model.load_state_dict(nn.Sequential(nn.Linear(8, 8, bias=False)).state_dict(), strict=False)
    both = {**model.state_dict(), "0.weight": torch.zeros(8, 8)}
    assert model.load_state_dict(both, strict=False).unexpected_keys == ["0.weight"]


def test_the_gradient_has_the_inputs_dtype_and_the_dequantized_weights_values():
    layer = QuantLinear.from_quantized(random_weight(n_in=32, n_out=16))
    for dtype in DTYPES:
        x = torch.randn(3, 32, dtype=dtype, requires_grad=True)
        upstream = torch.randn(3, 16, dtype=dtype)
        layer(x).backward(upstream)
        assert x.grad.dtype == dtype and torch.equal(x.grad, upstream @ layer.dequantize(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_compiler_traces_is_the_same_product_with_the_same_refusals(dtype, bias, monkeypatch):
    layer = QuantLinear.from_quantized(random_weight(), torch.randn(48) if bias else None)
    x = torch.randn(2, 3, 128).to(dtype)
    expected = layer(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, 48)
    assert distance(y, expected.double()) < 2 * TOLERANCE[dtype]
    for wrong, message in ((x[..., :64], "64"), (x.long(), "floating|int64")):
        with pytest.raises(ValueError, match=message):
            layer(wrong)
    if bias:
        layer.bias, kept = layer.bias.to("meta"), layer.bias
        with pytest.raises(ValueError, match="meta"):
            layer(x)
        layer.bias = kept
    layer.qweight = layer.qweight[:-1]
    with pytest.raises(ValueError, match="qweight"):
        layer(x)


def test_a_layer_in_train_mode_asks_if_anything_of_it_is_trained():
    layer, asked = QuantLinear.from_quantized(random_weight()), []
    layer.float_rest = types.SimpleNamespace(check_training=lambda: asked.append(1))
    layer.eval()(torch.randn(2, 128))
    assert not asked
    layer.train()(torch.randn(2, 128))
    assert asked == [1]


def test_all_quantized_layers_of_a_model_share_what_was_left_float():
    model = nn.Sequential(QuantLinear(8, 8, 4, 8), nn.Linear(8, 8), nn.Sequential(QuantLinear(8, 8, 4, 8)))
    note_float_rest(model)
    rest = model[0].float_rest
    assert rest is not None and model[2][0].float_rest is rest and not hasattr(model[1], "float_rest")
    with pytest.warns(UserWarning, match="only 2 float parameters"):
        rest.check_training()


def test_the_output_has_the_dtype_that_a_linear_layers_has():
    for dtype in DTYPES:
        x = torch.zeros(1, 2, dtype=dtype)
        assert output_dtype(x) == dtype
        with torch.autocast("cpu", dtype=torch.float16):
            assert output_dtype(x) == nn.Linear(2, 2, dtype=dtype)(x).dtype
    assert output_dtype(torch.zeros(1, 2, device="meta")) == torch.float32


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("shape", [{}, {"bits": 3, "n_out": 45}, {"act_order": True}, {"group_size": -1}], ids=str)
def test_forward_and_gradient_on_a_gpu(shape, rows, dtype):
    weight = random_weight(**shape)
    bias = torch.randn(weight.codes.shape[0])
    layer = QuantLinear.from_quantized(weight, bias)
    layer(torch.randn(1, 128, dtype=torch.bfloat16))  # what a CPU prepared must not be used on the GPU
    layer.cuda()
    x = torch.randn(rows, 128, dtype=dtype, device="cuda", requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    rounded = formula(weight).to(dtype).double()
    assert distance(y.detach(), x.detach().cpu().double() @ rounded.t() + bias.double()) < TOLERANCE[dtype]
    y.backward(torch.ones_like(y))
    # The gradient's matmul is PyTorch's, at PyTorch's precision for float32 matmuls.
    assert distance(x.grad, rounded.sum(0).expand(rows, -1)) < max(TOLERANCE[dtype], 1e-5)


@gpu
@needs_gpu
def test_a_gpu_takes_no_rows_and_names_a_layer_left_on_the_cpu():
    layer = QuantLinear.from_quantized(random_weight())
    with pytest.raises(ValueError, match="x is on cuda:0, the weights on cpu"):
        layer(torch.zeros(1, 128, device="cuda"))
    assert layer.cuda()(torch.zeros(2, 0, 128, device="cuda")).shape == (2, 0, 48)
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(torch.zeros(1, 128, device="cuda")).dtype == torch.bfloat16


@pytest.mark.parametrize("padded", [False, True])
def test_pytorchs_fused_encoder_does_not_read_the_placeholder(padded):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval()
    for layer in encoder.layers:
        for name in ("linear1", "linear2"):
            rounded = round_to_nearest(getattr(layer, name).weight, QuantizeConfig(bits=8, group_size=32))
            setattr(layer, name, QuantLinear.from_quantized(rounded, getattr(layer, name).bias))
    x, mask = torch.randn(3, 6, 32), torch.arange(6) >= torch.tensor([[4], [6], [2]]) if padded else None
    wanted = encoder(x, src_key_padding_mask=mask)  # with gradients, nothing is fused
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=mask)
    kept = ~mask if padded else torch.ones(3, 6, dtype=torch.bool)
    torch.testing.assert_close(got[kept], wanted[kept])


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    "shape", [{"n_in": 512, "n_out": 100}, {"act_order": True}, {"bits": 3, "n_out": 45}, {"group_size": -1}], ids=str
)
def test_a_layer_that_computes_again_takes_the_kernels_layout(shape, dtype):
    weight = random_weight(**shape)
    layer = QuantLinear.from_quantized(weight, torch.randn(len(weight.codes))).cuda()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    rounded, bias = formula(weight).to(dtype).double(), layer.bias.cpu().double()
    for number in range(3):
        x = torch.randn(3, weight.codes.shape[1], dtype=dtype, device="cuda", requires_grad=True)
        y = layer(x)
        assert (layer.arranged() is not None) == (number > 0)
        y.sum().backward()
        assert distance(y.detach(), x.detach().cpu().double() @ rounded.t() + bias) < TOLERANCE[dtype]
        assert distance(x.grad, rounded.sum(0).expand(3, -1)) < max(TOLERANCE[dtype], 1e-5)
    assert torch.equal(layer.dequantize(dtype).cpu(), formula(weight).to(dtype))
    assert "few_rows" in repr(layer) and layer.arranged() is not None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    with pytest.raises(ValueError, match="cast x"):
        layer(x.double())
    with pytest.raises(ValueError, match="x is on cpu"):
        layer(x.cpu())


def arranged_on_a_gpu() -> tuple[nn.Module, Tensor]:
    layer = QuantLinear.from_quantized(random_weight(n_in=1024, n_out=64, group_size=128), torch.randn(64)).cuda()
    assert layer.arrange()
    return nn.Sequential(layer, nn.ReLU(inplace=True)), torch.randn(5, 1024, dtype=torch.float16, device="cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_an_arranged_layer_compiles_as_one_graph_with_its_gradient(mode):
    model, x = arranged_on_a_gpu()
    x.requires_grad_()
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        y = compiled(x)
        assert distance(y.detach().cpu(), expected.detach().cpu().double()) < TOLERANCE[torch.float16]
        (found,) = torch.autograd.grad(y.sum(), x)
        assert distance(found.cpu(), gradient.cpu().double()) < 1e-2


@gpu
@needs_gpu
def test_an_arranged_layer_is_exported():
    model, x = arranged_on_a_gpu()
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))


@gpu
@needs_gpu
def test_an_arranged_layer_is_captured_in_a_graph():
    model, x = arranged_on_a_gpu()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(x)
        with torch.cuda.graph(graph):
            captured = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, model(x))
