"""The tokens behind an expert's rows: found by their bits, whatever the order in which a router passes them on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gptq_plugin.calibration.routed_tokens import EVERY_ROW, RoutedTokens

WIDTH = 6
PADDING = torch.tensor([0, 0, 1, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)  # of ten tokens
TOKENS = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))
ROUTES = {0: [7, 1, 0], 1: [2, 5, 9], 2: []}  # the tokens of each expert, in the router's order


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in ROUTES)

    def forward(self, x: Tensor) -> Tensor:
        rows, out = x.reshape(-1, WIDTH), torch.zeros_like(x.reshape(-1, WIDTH))
        for number, tokens in ROUTES.items():
            out[tokens] = self.experts[number](rows[tokens])
        return out.view_as(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(WIDTH, WIDTH), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def run(mask, tokens: Tensor = TOKENS, batches: int = 1, before: Tensor | None = None):
    """What `counted` finds for every expert's layer in a forward, and the rows that went to the experts.

    `mask` is a mask, EVERY_ROW or None; `before` is a batch that runs first, with EVERY_ROW.
    """
    torch.manual_seed(0)
    model = Model()
    routed = RoutedTokens(model)
    found: dict[str, tuple] = {}
    entered: list[Tensor] = []
    number = 0

    def look(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = (*routed.counted(number, name, args[0]), args[0])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and routed.is_expert(name):
            module.register_forward_pre_hook(look(name))
    masks = {0: mask, 1: EVERY_ROW}
    watching = routed.watching(
        lambda: number, lambda n, name, x: masks[n], lambda experts, rows: entered.append((experts, rows))
    )
    with watching:
        if before is not None:
            number = 1
            model(before)
            found.clear()
            entered.clear()
            number = 0
        model(tokens)
    return found, entered


def test_only_layers_of_experts_are_experts():
    routed = RoutedTokens(Model())
    assert routed.is_expert("block.experts.1.up") and not routed.is_expert("first")
    assert not routed.is_expert("block.experts.1")
    assert not RoutedTokens(nn.Sequential(nn.Linear(2, 2))).is_expert("0")


@pytest.mark.parametrize("shape", [(10, WIDTH), (2, 5, WIDTH)])
def test_the_first_layer_of_an_expert_counts_its_tokens_without_padding(shape):
    found, _ = run(~PADDING, TOKENS.reshape(shape))
    for number, tokens in ROUTES.items():
        mask, are_tokens, rows = found[f"block.experts.{number}.up"]
        if tokens:
            assert mask.tolist() == (~PADDING)[tokens].tolist() and are_tokens
        else:
            assert (mask, are_tokens) == (None, False) and len(rows) == 0


def test_later_layers_count_the_same_rows_though_they_are_no_tokens():
    found, _ = run(~PADDING)
    for number in (0, 1):
        first, _, _ = found[f"block.experts.{number}.up"]
        second, are_tokens, _ = found[f"block.experts.{number}.down"]
        assert torch.equal(first, second) and not are_tokens


def test_the_rows_that_count_enter_the_experts():
    _, entered = run(~PADDING, TOKENS.reshape(2, 5, WIDTH))
    ((experts, rows),) = entered
    assert experts == "block.experts" and torch.equal(rows, TOKENS[~PADDING])


def test_without_padding_every_row_counts():
    found, entered = run(EVERY_ROW)
    assert all(torch.equal(rows, TOKENS) for _, rows in entered) and len(entered) == 1
    for number in (0, 1):
        mask, are_tokens, _ = found[f"block.experts.{number}.up"]
        assert are_tokens and (mask is EVERY_ROW or bool(mask.all()))


def test_what_layers_read_is_learned_once_so_that_rows_are_hashed_only_then(monkeypatch):
    hashed: list[int] = []
    from gptq_plugin.calibration import routed_tokens

    hashes = routed_tokens.row_hashes
    monkeypatch.setattr(routed_tokens, "row_hashes", lambda rows: hashed.append(len(rows)) or hashes(rows))
    monkeypatch.setitem(ROUTES, 2, [3])
    found, entered = run(EVERY_ROW, before=TOKENS)
    assert hashed == [10, 3, 3]  # the block's input and the first expert's layers, in the first batch
    for number in (0, 1, 2):
        assert found[f"block.experts.{number}.up"][:2] == (EVERY_ROW, True)
        assert found[f"block.experts.{number}.down"][:2] == (EVERY_ROW, False)
    assert len(entered) == 1


def test_what_is_known_of_a_layer_holds_for_those_that_read_its_input():
    routed = RoutedTokens(Model())
    names = ["block.experts.0.up", "block.experts.1.down"]
    routed.share_input(names)  # nothing is known yet
    assert not routed._knows(["block.experts"])
    routed._reads_tokens["block.experts", "up"] = True
    routed.share_input(names)
    assert routed._knows(["block.experts"])


def test_rows_that_are_no_tokens_of_the_block_cannot_be_told():
    model = Model()
    routed = RoutedTokens(model)
    with routed.watching(lambda: 0, lambda n, name, x: ~PADDING, lambda experts, rows: None):
        model(TOKENS)
        assert routed.counted(0, "block.experts.2.up", TOKENS[:3] + 1) == (None, False)
        assert routed.counted(1, "block.experts.0.up", TOKENS[:3]) == (None, False)  # another batch
        mask, are_tokens = routed.counted(0, "block.experts.2.up", TOKENS[[2, 0]])
        assert mask.tolist() == [False, True] and are_tokens
    assert routed.counted(0, "block.experts.0.up", TOKENS[:3]) == (None, False)  # nothing runs any more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_told_apart_by_their_last_bit(dtype):
    model = Model()
    routed = RoutedTokens(model)
    tokens = TOKENS.to(dtype)
    other = tokens[:1].clone()
    view = other.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[other.element_size()])
    view[0, -1] ^= 1
    with routed.watching(lambda: 0, lambda n, name, x: ~PADDING, lambda experts, rows: None):
        model.to(dtype)(tokens)
        assert routed.counted(0, "block.experts.0.up", tokens[:1])[0].tolist() == [True]
        assert routed.counted(0, "block.experts.2.up", other) == (None, False)


def test_equal_rows_count_alike():
    tokens = TOKENS.clone()
    tokens[1] = tokens[2]  # a token of the text with the bits of one of the padding
    found, _ = run(~PADDING, tokens)
    mask, _, _ = found["block.experts.1.up"]
    assert mask.tolist() == [True, True, False]  # 2, 5 and 9: what the padding computes is what the token does
