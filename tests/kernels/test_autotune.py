"""Choosing by measurement: with a fake clock and a fake GPU on the CPU, and, where there is one, on a GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from gptq_plugin.kernels.product import autotune as module
from gptq_plugin.kernels.product import products, timing, tuned
from gptq_plugin.kernels.product.autotune import autotune, search, tune
from gptq_plugin.kernels.product.candidates import candidates
from gptq_plugin.kernels.product.choice import ROWS, Choice, Gpu
from gptq_plugin.kernels.product.layout import Layout, arrange
from gptq_plugin.kernels.product.rule import by_rule
from gptq_plugin.kernels.product.table import Key, Table, shipped

from gpus import A100, H100
from kernel_cases import NAN, TOLERANCE, gpu

LAYOUT = Layout.of(4, 128, 4096, 4096, True)
OTHER = Layout.of(4, 128, 4096, 1024, True)
HALF = torch.float16
MEASURED = [rows for rows in ROWS if rows <= 256]  # of an A100: above there is but one choice


@pytest.fixture(autouse=True)
def _a_new_process(monkeypatch):
    monkeypatch.setattr(tuned, "_of_process", {})
    yield
    products.choose.cache_clear()


class Clock:
    """Counts what is timed; `best` is the fastest, by its place among the choices."""

    def __init__(self, best=-1, unfit=()):
        self.best, self.unfit, self.asked = best, unfit, []

    def __call__(self, layout, rows, dtype, choices, deadline):
        self.asked.append((layout, rows, dtype, list(choices)))
        times = dict.fromkeys(choices, 2e-05)
        times[choices[self.best]] = 1e-5
        return {choice: seconds for choice, seconds in times.items() if choices.index(choice) not in self.unfit}


def test_the_fastest_of_a_dozen_is_chosen_for_every_range_of_rows(tmp_path):
    clock = Clock()
    assert tune([(LAYOUT, HALF)], A100, tmp_path / "file.json", clock) == len(MEASURED)
    assert [rows for _, rows, _, _ in clock.asked] == list(MEASURED)
    for layout, rows, dtype, choices in clock.asked:
        assert choices == candidates(LAYOUT, rows, HALF, A100) and len(choices) <= 12
        assert tuned.tuned(A100).find(layout, rows, dtype, A100) == choices[-1]
        assert products._decided(LAYOUT, rows, HALF, A100) == (choices[-1], "measured here")


def test_the_rules_choice_stays_unless_another_is_clearly_faster(tmp_path):
    key = Key.of(LAYOUT, 1, HALF)

    def found(times):
        def timer(layout, rows, dtype, choices, deadline):
            return dict(zip(choices, times))

        (one,) = search({key: (LAYOUT, HALF)}, A100, timer)
        return candidates(LAYOUT, 1, HALF, A100).index(one.choice)

    assert found([1.0, 0.98, 2.0]) == 0 and found([1.0, 0.96, 0.9]) == 2
    clock = Clock(best=2, unfit=(0,))  # the rule's does not run
    (one,) = search({key: (LAYOUT, HALF)}, A100, clock)
    assert one.choice == candidates(LAYOUT, 1, HALF, A100)[2] and one.complete


def test_another_process_reads_what_was_found(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    file, clock = tmp_path / "file.json", Clock()
    tune([(LAYOUT, HALF)], A100, file, clock)
    before = dict(tuned.tuned(A100).choices)
    assert "measured in" in caplog.text and f"kept in {file}" in caplog.text
    assert (
        f"4096×4096 float16, 4 bits, groups of 128, symmetric: 1 rows {before[Key.of(LAYOUT, 1, HALF)]}" in caplog.text
    )
    monkeypatch.setattr(tuned, "_of_process", {})
    again = Clock(best=0)
    assert tune([(LAYOUT, HALF)], A100, file, again) == 0 and again.asked == []
    assert tuned.tuned(A100).choices == before and len(before) == len(MEASURED)
    assert tune([(LAYOUT, HALF), (OTHER, HALF), (LAYOUT, torch.float32)], A100, file, again) == 2 * len(MEASURED)
    assert {(layout, dtype) for layout, _, dtype, _ in again.asked} == {(OTHER, HALF), (LAYOUT, torch.float32)}
    assert len(tuned.read(file, A100)) == 3 * len(MEASURED)


def test_layouts_that_the_kernels_do_not_tell_apart_and_bfloat16_are_measured_once(tmp_path):
    clock = Clock()
    longer = Layout.of(4, 512, 4096, 4096, True)
    tune([(LAYOUT, HALF), (longer, HALF)], A100, tmp_path / "file.json", clock)
    assert len(clock.asked) == len(MEASURED)
    assert tune([(LAYOUT, torch.bfloat16)], A100, tmp_path / "file.json", clock) == 0


@pytest.mark.parametrize("harm", ["damaged", "another version", "cannot be written"])
def test_without_a_file_that_can_be_used_kernels_are_measured_anew(tmp_path, monkeypatch, harm):
    tune([(LAYOUT, HALF)], A100, tuned.file_of(A100, tmp_path), Clock())
    monkeypatch.setattr(tuned, "_of_process", {})
    if harm == "damaged":
        tuned.file_of(A100, tmp_path).write_text("{")
    elif harm == "another version":
        monkeypatch.setattr(tuned, "version_of_kernels", lambda: "0")
    else:
        (tmp_path / "taken").write_text("")
        tmp_path = tmp_path / "taken"
    clock = Clock(best=1)
    for times in (1, 0 if harm != "cannot be written" else 1):
        monkeypatch.setattr(tuned, "_of_process", {})
        assert tune([(LAYOUT, HALF)], A100, tuned.file_of(A100, tmp_path), clock) == times * len(MEASURED)
        assert len(tuned.tuned(A100).choices) == len(MEASURED)


def test_the_time_is_bounded_and_the_rest_is_left_to_the_rule_and_to_the_next_process(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    file, both, now = tmp_path / "file.json", [(LAYOUT, HALF), (OTHER, HALF)], [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(*product):
        now[0] += 3.0
        return Clock()(*product)

    assert tune(both, A100, file, slow, seconds=1.0) == 6, "16 products have 16 seconds; the sixth ends at 18"
    assert f"6 products measured in 18.0 s, {2 * len(MEASURED) - 6} left to the rule" in caplog.text
    assert sorted(key.rows for key in tuned.tuned(A100).choices) == [1, 1, 4, 4, 8, 8], "few rows of all come first"
    kept = tuned.read(file, A100)
    assert len(kept) == 5, "the last one's time was over before all choices were tried"
    assert products._decided(LAYOUT, 64, HALF, A100) == (by_rule(LAYOUT, 64, HALF, A100), "rule")
    monkeypatch.setattr(tuned, "_of_process", {})
    assert tune(both, A100, file, Clock()) == 2 * len(MEASURED) - len(kept)


def test_a_layer_so_small_that_launching_it_takes_the_time_is_left_to_the_rule(tmp_path):
    clock, small = Clock(), Layout.of(4, 128, 2048, 1000, True)
    assert tune([(small, HALF)], A100, tmp_path / "file.json", clock) == 0 and clock.asked == []
    assert tune([(Layout.of(4, 128, 2048, 1024, True), HALF)], A100, tmp_path / "file.json", clock) == len(MEASURED)


def test_what_cannot_be_measured_is_left_to_the_rule(tmp_path):
    file = tmp_path / "file.json"
    assert tune([(LAYOUT, HALF)], A100, file, lambda *rest: {}) == 0  # memory is short
    assert not file.exists() and not tuned.tuned(A100).choices
    assert products._decided(LAYOUT, 1, HALF, A100)[1] == "rule"


def test_a_kind_with_a_table_keeps_it_and_measures_only_when_asked_and_only_the_rest(tmp_path, monkeypatch):
    clock, other = Clock(), Layout.of(4, 128, 2048, 1024, True)
    monkeypatch.setattr(module, "measure", lambda device, *rest: clock(*rest))
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: H100))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    device = torch.device("cuda", 0)
    autotune([(LAYOUT, HALF)], device, folder=tmp_path)
    assert clock.asked == [] and not list(tmp_path.iterdir())
    table = shipped(H100)
    assert products._decided(LAYOUT, 1, HALF, H100) == (table.find(LAYOUT, 1, HALF, H100), "the package's table")
    assert products._decided(other, 1, HALF, H100) == (by_rule(other, 1, HALF, H100), "rule")
    autotune([(LAYOUT, HALF), (other, HALF)], device, always=True, folder=tmp_path)
    measured = {(layout, rows) for layout, rows, _, _ in clock.asked}
    assert {(other, rows) for rows in ROWS} <= measured, "on Hopper there are choices for many rows too"
    assert {rows for layout, rows in measured if layout == LAYOUT} == {
        rows for rows in ROWS if table.find(LAYOUT, rows, HALF, H100) is None
    }
    (file,) = tmp_path.iterdir()
    assert file == tuned.file_of(H100, tmp_path)


@pytest.mark.parametrize("when", ["capturing", "tracing"])
def test_nothing_is_measured_while_a_graph_is_captured_or_a_compiler_traces(tmp_path, monkeypatch, caplog, when):
    clock = Clock()
    monkeypatch.setattr(module, "measure", lambda device, *rest: clock(*rest))
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: A100))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: when == "capturing")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: when == "tracing")
        autotune([(LAYOUT, HALF)], torch.device("cuda", 0), folder=tmp_path)
    assert clock.asked == [] and "not measured while" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    autotune([(LAYOUT, HALF)], torch.device("cuda", 0), folder=tmp_path)
    assert len(clock.asked) == len(MEASURED)


def test_a_product_sees_what_was_measured_since_its_kernel_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda device, *rest: Clock()(*rest))
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: A100))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    device = torch.device("cuda", 0)
    before = products.choose(LAYOUT, 1, HALF, device)
    assert before == by_rule(LAYOUT, 1, HALF, A100)
    autotune([(LAYOUT, HALF)], device, folder=tmp_path)
    after = products.choose(LAYOUT, 1, HALF, device)
    assert after == candidates(LAYOUT, 1, HALF, A100)[-1] != before
    assert str(after) in products.described(LAYOUT, HALF, device)


def test_where_memory_or_a_compiler_is_missing_nothing_fails(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: A100))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device, free = torch.device("cuda", 0), [1 << 20, 1 << 40]
    monkeypatch.setattr(timing, "_free_bytes", lambda device: free.pop(0))

    def raising(error):
        def times(*product):
            raise error

        return times

    monkeypatch.setattr(timing, "_times", raising(torch.OutOfMemoryError("CUDA out of memory")))
    assert [timing.measure(device, LAYOUT, 1, HALF, [Choice("dense")], 1.0) for _ in range(2)] == [{}, {}]
    assert (
        "more than half of what is free: not measured" in caplog.text
        and "are not measured: CUDA out of memory" in caplog.text
    )
    monkeypatch.setattr(module, "measure", raising(RuntimeError("Failed to find C compiler")))
    autotune([(LAYOUT, HALF)], device, folder=tmp_path)
    assert "not measured, a rule chooses: Failed to find C compiler" in caplog.text
    monkeypatch.setattr(module, "measure", raising(torch.AcceleratorError("an illegal memory access")))
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        autotune([(LAYOUT, HALF)], device, folder=tmp_path)


def test_each_choice_is_logged_once_with_its_reason(monkeypatch, caplog):
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: A100))
    products._tell.cache_clear()
    caplog.set_level(logging.INFO, "gptq_plugin.kernels.product.products")
    for layout in (LAYOUT, OTHER):
        for rows in (1, 2, 2, 3, 2048, 4096):
            products.choose(layout, rows, HALF, torch.device("cuda", 0))
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"quantized layers on {A100.name} multiply by {choice} (rule)" for choice in dict.fromkeys(
        by_rule(layout, rows, HALF, A100) for layout in (LAYOUT, OTHER) for rows in (1, 4, 2048)
    )]  # fmt: skip


def test_a_measurement_takes_memory_for_words_past_the_cache_and_two_dense_weights():
    words = 4096 * 4096 // 2
    needed = timing.bytes_needed(LAYOUT, 1, HALF, A100)
    dense = 4096 * 4096 * 2
    assert 2 * A100.cache + 2 * dense < needed < 2 * A100.cache + 2 * words + 2.3 * dense + 2**21
    large = Layout.of(4, 128, 8192, 28672, True)
    assert timing._length(large, A100) == 2 and timing._length(LAYOUT, A100) * words >= 2 * A100.cache
    assert timing._length(Layout.of(4, 128, 64, 64, True), A100) == 512


@gpu
@pytest.mark.parametrize(("bits", "symmetric", "dtype"), [(4, True, HALF), (3, False, torch.bfloat16), (8, True, HALF)])
def test_on_a_gpu_what_is_measured_is_right_and_leaves_no_memory_behind(bits, symmetric, dtype, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    layout, device = Layout.of(bits, 128, 4096, 1100, symmetric), torch.device("cuda", torch.cuda.current_device())
    state = torch.cuda.get_rng_state()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    autotune([(layout, dtype)], device, always=True, folder=tmp_path, seconds=20.0)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.cuda.memory_allocated() - before < 64 << 20  # the vendor's workspace
    found = tuned.tuned(Gpu.of(device)).choices
    assert len(found) >= len(MEASURED) and "measured in" in caplog.text and "its error is" not in caplog.text
    codes = torch.randint(0, 2**bits, (4096, 1100), dtype=torch.uint8)
    scales, zeros = torch.rand(32, 1100).half() + 0.1, torch.randint(0, 2**bits, (32, 1100), dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    arranged = arrange(layout, codes.cuda(), scales.cuda(), zeros.cuda())
    weight = (codes.double() - zeros.double().repeat_interleave(128, 0)) * scales.double().repeat_interleave(128, 0)
    for rows in (1, 3, 8, 20, 64, 100, 256, 700, 1500):
        x = torch.randn(rows, 4096, dtype=dtype, device="cuda")
        y = products.product(x, layout, arranged, None)
        expected = x.cpu().double() @ weight
        error = (y.cpu().double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], f"{products.choose(layout, rows, dtype, device)}: {error:.1e}"
        assert rows > 256 or products._decided(layout, rows, dtype, Gpu.of(device))[1] == "measured here"


@gpu
def test_on_a_gpu_choices_that_do_not_run_or_compute_something_else_are_left_out(monkeypatch, caplog):
    from gptq_plugin.kernels.product import registry
    from gptq_plugin.kernels.product.registry import Kernel

    def anything(layout, rows, dtype, gpu, *options):
        return True

    def wrong(x, layout, arranged, bias, out, workspace):
        out.zero_()

    def silent(x, layout, arranged, bias, out, workspace):
        pass

    def failing(x, layout, arranged, bias, out, workspace):
        raise RuntimeError("does not compile")

    for kernel in (wrong, silent, failing):
        monkeypatch.setitem(registry.KERNELS, kernel.__name__, Kernel(kernel, anything, anything))
    caplog.set_level(logging.DEBUG)
    ruled = by_rule(LAYOUT, 4, HALF, Gpu.of(torch.device("cuda")))
    choices = [Choice("wrong"), Choice("failing"), Choice("silent"), Choice.of("few_rows", BM=128, STAGES=8), ruled]
    device = torch.device("cuda", torch.cuda.current_device())
    times = timing.measure(device, LAYOUT, 4, HALF, choices, float("inf"))
    assert list(times) == [ruled] and 0 < times[ruled] < 1e-2
    assert caplog.text.count("its error is") == 2 and "does not compile" in caplog.text
    monkeypatch.setattr(timing, "_free_bytes", lambda device: 1 << 20)
    assert timing.measure(device, LAYOUT, 4, HALF, choices, float("inf")) == {} and "not measured" in caplog.text


@gpu
def test_on_a_gpu_nothing_is_measured_inside_a_capture(tmp_path, caplog):
    x, graph = torch.full((8,), NAN, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.fill_(1.0)
        autotune([(LAYOUT, HALF)], x.device, always=True, folder=tmp_path)
    graph.replay()
    assert bool((x == 1).all()) and "not measured while" in caplog.text and not list(tmp_path.iterdir())
    assert isinstance(tuned.tuned(Gpu.of(x.device)), Table)
