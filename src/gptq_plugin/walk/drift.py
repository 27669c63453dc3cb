"""The running sum of (x − x̂) x̂ᵀ over calibration tokens, or of W (x − x̂) x̂ᵀ: `Drift`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.device.precision import full_precision
from gptq_plugin.kernels import exact_sums
from gptq_plugin.walk.hessian import is_narrow

_STRIP = 1024  # rows of a product at a time
# The mean of (x − x̂)·x̂ to that of x̂·x̂. Noise that is as large as x gives -1/2, rows of other tokens about -1. On
# pycode-29m at 2 bits it is -0.05 at least.
MOST = 0.5
OTHER_TOKENS = "asymmetric_alpha is not applied: the expert gets other tokens in the float model"
_UNRELATED = "asymmetric_alpha is not applied: its inputs have little to do with the float model's"
_SAMPLED = 256  # tokens of a call whose drift is compared with their inputs, or up to twice as many


def takes_outputs(rows: int, in_features: int) -> bool:
    """True if W (x − x̂) x̂ᵀ takes less work than (x − x̂) x̂ᵀ for a W [rows, in]; its fewer rows tell it apart."""
    return 2 * rows <= in_features


class Drift:
    """Sum of (x − x̂) x̂ᵀ: x is a token's input of a layer in the float model, x̂ in the model quantized so far.

    Products are added as a `Hessian`'s are: exactly in float64, so that neither their order matters nor the ranks they
    were made on, or in float32 as they come. A product's entries are rounded to multiples of a quantum that the sums of
    squares of its rows and columns fix, as a Hessian's diagonal does there.

    Args:
        in_features: Width of the layer's input.
        device: Device of the sum; inputs must be there too.
        exact: Add float32 products exactly.
        rows: Rows of the weight W that `add` gets: the sum is of W (x − x̂) x̂ᵀ then; 0 for none.

    Attributes:
        tokens: Rows counted so far.
        total: The sum, [in, in], or [rows, in] with a weight.
        sampled: Sums of (x − x̂)·x̂ and of x̂·x̂ over tokens that are sampled, [2].
    """

    def __init__(self, in_features: int, device: torch.device | str, *, exact: bool = True, rows: int = 0):
        self.tokens = 0
        self._exact = exact
        height, dtype = rows or in_features, torch.float64 if exact else torch.float32
        self._sums = torch.zeros(height * in_features + 2, dtype=dtype, device=device)  # for ranks in one message
        self.total, self.sampled = self._sums[:-2].view(height, in_features), self._sums[-2:]

    def add(self, x: Tensor, seen: Tensor, weight: Tensor | None = None) -> None:
        """Adds rows [tokens, in] of the float model's input and of the quantized model's, in one dtype.

        16-bit inputs on a GPU are subtracted in their dtype, which rounds the difference to its precision, and
        multiplied without conversion, by the weight too; others in float32 without TF32.

        Args:
            weight: W [rows, in], if the sum has it.
        """
        self.tokens += x.shape[0]
        if not x.shape[0]:
            return
        with full_precision(x.device):
            narrow = is_narrow(x)
            seen = seen if narrow else seen.float()
            away = x - seen if narrow else x.float() - seen
            step = max(1, len(x) // _SAMPLED)
            some, inputs = away[::step].float(), seen[::step].float()
            self.sampled += torch.stack([(some * inputs).sum(), inputs.square().sum()])
            if weight is not None:
                away = away @ weight.detach().to(away.dtype).T
            if self._exact:
                add_exactly(self.total, away, seen)
                return
            for start in range(0, away.shape[1], _STRIP):
                strip, left = self.total[start : start + _STRIP], away[:, start : start + _STRIP].T
                if narrow:
                    torch.addmm(strip, left, seen, out_dtype=torch.float32, out=strip)  # type: ignore[call-overload]
                else:
                    strip += left @ seen

    def over_ranks(self) -> None:
        """Adds up the sums and the tokens of all ranks, on every rank."""
        if distributed.active():
            self.tokens = distributed.sum_(self._sums, self.tokens)

    def mean(self, tokens: int) -> Tensor:
        """The sum divided by a number of tokens, float32 [in, in], or [rows, in] with a weight."""
        return (self.total / max(1, tokens)).float()

    def along(self) -> float:
        """The mean of (x − x̂)·x̂ over that of x̂·x̂, of tokens that are sampled."""
        along, power = self.sampled.tolist()
        return along / power if power > 0 else 0.0


def add_exactly(total: Tensor, away: Tensor, seen: Tensor) -> None:
    """Adds (x − x̂) x̂ᵀ of rows x − x̂ and x̂ in one dtype to float64 [in, in], so that the order of calls does not
    matter; or W (x − x̂) x̂ᵀ to [rows, in], of rows W (x − x̂)."""
    squares = torch.cat([seen.float().square().sum(0), away.float().square().sum(0)])
    for start in range(0, away.shape[1], _STRIP):
        strip, left = total[start : start + _STRIP], away[:, start : start + _STRIP].T
        product = torch.mm(left, seen, out_dtype=torch.float32) if is_narrow(seen) else left @ seen
        exact_sums(product).add_product(strip, product, squares, seen.shape[1] + start)


def judged(along: float, tokens: int, paired: int) -> tuple[bool, tuple[str, ...]]:
    """Whether a layer is to make up for a drift, and sentences for the report.

    Args:
        along: See `Drift.along`.
        tokens: The layer's.
        paired: Those of the drift. Others count as if they had not drifted.
    """
    if along < -MOST:
        return False, (_UNRELATED,)
    missing = tokens - paired
    told = (f"{missing} of {tokens} tokens have no counterpart in the float model: taken as not drifted",)
    return True, told[: missing > 0]
