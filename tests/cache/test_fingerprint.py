"""Fingerprints of models, functions and data: the same for the same, another for whatever computes otherwise."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import logging
import threading
import types
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from torch import nn

from gptq_plugin.cache.fingerprint import Fingerprint, NotKnown
from gptq_plugin.cache.versions import is_versioned, random_states, surroundings, version_of

from models import tiny_llama


def print_of(value):
    taken = Fingerprint()
    taken.add("value", value)
    return taken.hexdigest()


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Point:
    x: float
    y: object = None


VALUES = [
    None, True, False, 0, 1, 1.0, 0.0, -0.0, float("nan"), 1j, "", "1", b"1", (), [], {}, set(), frozenset({2}),
    (1, 2), [1, 2], (2, 1), [[1], 2], [1, [2]], {1: 2}, {2: 1}, {"1": 2}, OrderedDict({1: 2}), UserDict({1: 2}),
    {1, 2}, {1, 2, 3}, torch.float16, torch.device("cpu"), Color.RED, Color.BLUE, Point(1.0), Point(2.0),
    Point(1.0, "y"), torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).half(), torch.ones(2), np.zeros(2), np.ones(2),
    np.float32(1), np.zeros(2, np.int64), Point, Color, len, "a".upper, torch.nn.functional.silu,
    types.SimpleNamespace(a=1), types.SimpleNamespace(a=2), range(3), slice(1), lambda: 1, lambda: 2,
    functools.partial(max, 1), functools.partial(max, 2), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Dropout(0.1),
    nn.Dropout(0.2), nn.Parameter(torch.zeros(3)),
]  # fmt: skip


def test_other_values_have_other_fingerprints():
    prints = [print_of(value) for value in VALUES]
    equal = [(VALUES[i], VALUES[j]) for i, one in enumerate(prints) for j in range(i) if prints[j] == one]
    assert not equal


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_copies_have_the_same_fingerprint(value):
    assert print_of(copy.deepcopy(value)) == print_of(value)


def test_values_that_hold_themselves_and_deep_ones_end():
    endless = [1]
    endless.append(endless)
    assert print_of(endless) == print_of(endless)
    deep = []
    for _ in range(10**5):
        deep = [deep]
    with pytest.raises(NotKnown, match="value: holds too many values in each other"):
        print_of(deep)


def test_very_many_values_are_refused_though_they_are_few_objects():
    many = ()
    for _ in range(40):
        many = (many, many)
    with pytest.raises(NotKnown, match="holds more than 1000000 values"):
        print_of(many)


@pytest.mark.parametrize(
    "value, why",
    [
        (torch.Generator(), "a random generator"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "layout"),
        ({"a": [open]}, None),
        ({"rows": (x for x in "ab")}, "rows, an object of type generator, which cannot be pickled"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(value, why):
    if why is None:
        assert print_of(value)
        return
    with pytest.raises(NotKnown, match=f"value: .*{why}"):
        print_of(value)


def test_loggers_locks_and_hooks_of_this_package_count_for_nothing():
    plain = nn.Linear(2, 2)
    torch.manual_seed(0)
    other = copy.deepcopy(plain)
    plain.log, other.log = logging.getLogger("a"), logging.getLogger("b")
    plain.lock, other.lock = threading.Lock(), threading.Lock()
    assert print_of(plain) == print_of(other)
    from gptq_plugin.walk.layer_inputs import watch_inputs

    before = print_of(plain)
    with watch_inputs({"": plain}, lambda name, x: None):
        assert print_of(plain) == before
    plain.register_forward_pre_hook(lambda module, args: None)
    assert print_of(plain) != before


def test_a_model_loaded_from_elsewhere_is_the_same_and_one_with_another_setting_is_not():
    model, moved, other = tiny_llama(), tiny_llama(), tiny_llama()
    moved.config._name_or_path = moved.name_or_path = "/elsewhere"
    other.config.rms_norm_eps = 1e-4
    assert print_of(model) == print_of(moved) != print_of(other)
    eps = tiny_llama()
    eps.model.norm.variance_epsilon = 1e-3
    assert print_of(eps) != print_of(model)


def test_a_model_that_was_saved_is_the_same(tmp_path):
    """transformers writes names and dtype into its configuration then, as a Trainer's checkpoints do."""
    model = tiny_llama()
    before, settings = print_of(model), dict(vars(model.config))
    model.save_pretrained(tmp_path)
    assert vars(model.config) != settings and print_of(model) == before
    assert print_of(tiny_llama().bfloat16()) != before


def test_a_packages_method_that_was_replaced_counts(monkeypatch):
    model = tiny_llama()
    before = print_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(llama.LlamaRMSNorm, "forward", lambda self, x: x)
        assert print_of(model) != before
    assert print_of(model) == before


# --- code ---


def code(text, name="made", **known):
    """A function of a module of a user, made from its text."""
    module = types.ModuleType("users_own")
    vars(module).update(known)
    exec(compile(text, "users_own.py", "exec"), vars(module))
    return vars(module)[name]


def test_a_function_counts_by_what_it_does_and_not_by_where_it_stands():
    assert print_of(code("def made(x): return x + 1")) == print_of(code("\n\n\ndef made(x):\n    return x + 1  # one"))
    assert print_of(code("def made(x): return x + 1")) != print_of(code("def made(x): return x + 2"))
    assert print_of(code("def made(x, y=1): return x")) != print_of(code("def made(x, y=2): return x"))


@pytest.mark.parametrize(
    "text",
    [
        "K = {0}\ndef made(x): return x * K",
        "def other(x): return x * {0}\ndef made(x): return other(x)",
        "def deep(x): return x * {0}\ndef other(x): return deep(x)\ndef made(x): return [other(y) for y in x]",
        "class Helper:\n    def turn(self, x): return x * {0}\nhelper = Helper()\ndef made(x): return helper.turn(x)",
        "class Helper:\n    def __call__(self, x): return x * {0}\nhelper = Helper()\ndef made(x): return helper(x)",
        "class Helper:\n    K = {0}\ndef made(x): return x * Helper.K",
        "class Helper:\n    @property\n    def k(self): return {0}\nh = Helper()\ndef made(x): return x * h.k",
        "class Helper:\n    @staticmethod\n    def k(): return {0}\ndef made(x): return x * Helper.k()",
        "class Base:\n    def k(self): return {0}\nclass Helper(Base): pass\ndef made(x): return x * Helper().k()",
        "class Helper:\n    def __init__(self): self.k = {0}\ndef made(x): return x * Helper().k",
        "import functools\n@functools.lru_cache\ndef k(): return {0}\ndef made(x): return x * k()",
        "def maker(k):\n    def inner(x): return x * k\n    return inner\nmade = maker({0})",
        "import functools\ndef base(x, k): return x * k\nmade = functools.partial(base, k={0})",
        "import torch\ndef base(x): return x * {0}\nmade = torch.no_grad()(base)",
    ],
)
def test_what_a_function_reaches_counts(text):
    one, same, other = (code(text.format(number)) for number in (3, 3, 4))
    assert print_of(one) == print_of(same) != print_of(other)


def test_a_global_with_the_name_of_an_attribute_that_a_function_reads_does_not_count():
    reads = "def made(x): return [one.data for one in x.data]"
    assert print_of(code(f"data = (i for i in [])\n{reads}")) == print_of(code(f"data = 3\n{reads}"))


def test_functions_of_another_module_of_the_user_count():
    helpers = [types.ModuleType("helpers") for _ in range(3)]
    for module, number in zip(helpers, (3, 3, 4), strict=True):
        exec(f"def scaled(x): return x * {number}\ndef unused(): return {id(module)}", vars(module))
    text = "def made(x): return helpers.scaled(x)"
    one, same, other = (print_of(code(text, helpers=module)) for module in helpers)
    assert one == same != other


def test_functions_in_modules_of_the_users_packages_count():
    package = [types.ModuleType("package") for _ in range(3)]
    for module, number in zip(package, (3, 3, 4), strict=True):
        module.helpers = types.ModuleType("package.helpers")
        module.helpers.package = module  # as packages refer to each other
        exec(f"def scaled(x): return x * {number}", vars(module.helpers))
    one, same, other = (
        print_of(code("def made(x): return package.helpers.scaled(x)", package=module)) for module in package
    )
    assert one == same != other


MODEL = """
import torch
from torch import nn

class made(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        torch.nn.init.ones_(self.inner.weight); torch.nn.init.ones_(self.inner.bias)

    def forward(self, x):
        return self.turned(self.inner(x))

    def turned(self, x):
        return x * {0}

    def training_step(self, batch):
        return {1}, DATA
"""


def test_methods_of_a_model_count_if_a_forward_can_come_to_them():
    one, same, other = (
        print_of(code(MODEL.format(*numbers), DATA=(x for x in "ab"))()) for numbers in ((1, 2), (1, 3), (2, 2))
    )
    assert one == same != other


def test_methods_that_a_packages_code_calls_count():
    text = "from torch import nn\nclass made(nn.TransformerEncoderLayer):\n    def _ff_block(self, x): return x * {0}"
    one, same, other = (code(text.format(number)) for number in (3, 3, 4))
    assert print_of(one) == print_of(same) != print_of(other)


def test_tensors_that_were_read_ahead_count_as_others():
    model = tiny_llama()
    ahead = Fingerprint()
    ahead.read_ahead([*model.parameters(), *model.buffers()])
    ahead.add("value", model)
    assert ahead.hexdigest() == print_of(model)


def test_a_function_may_tell_what_it_depends_on():
    def made(number, other):
        def run(x):
            return x * number + other

        run.depends_on = (number,)
        return run

    assert print_of(made(1, 2)) == print_of(made(1, 3)) != print_of(made(2, 2))


# --- surroundings ---


def test_versions_and_settings_count():
    before = surroundings(torch.device("cpu"))
    assert before["torch"] == torch.__version__ and len(before["gptq_plugin"]) == 64
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert surroundings(torch.device("cpu")) != before
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert surroundings(torch.device("cpu")) != before
    assert surroundings(torch.device("cpu")) == before


def test_packages_with_a_version_are_known_and_a_users_modules_are_not():
    assert all(
        map(is_versioned, ("torch.nn", "transformers.models.llama.modeling_llama", "functools", "gptq_plugin.cache"))
    )
    assert not any(map(is_versioned, ("__main__", "transformers_modules.mine", "torchmine", None)))
    assert version_of("transformers") and version_of("json")


def test_drawing_a_random_number_shows_in_the_states():
    for draw in (lambda: torch.rand(1), lambda: np.random.rand(), lambda: __import__("random").random()):
        before = random_states(torch.device("cpu"))
        assert random_states(torch.device("cpu")) == before
        draw()
        assert random_states(torch.device("cpu")) != before
