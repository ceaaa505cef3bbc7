"""What plugins change of a model before DeepSpeed's engine, with stand-ins for it and for torch."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.hosts.deepspeed import model_change

PLUGIN = """
    from types import SimpleNamespace
    from pydantic import BaseModel
    from trimtab.core.errors import BadInput
    from trimtab.core.hooks import PluginInfo, hookimpl

    class Options(BaseModel, extra="forbid"):
        part: str = "gate.weight"

    @hookimpl
    def trimtab_info():
        return PluginInfo("grows models", 'the "trimtab" block', Options)

    @hookimpl
    def trimtab_training_model(config, model, sequence_group):
        if model.named is None:
            raise BadInput("it is no model", where="layer 0", fix="give one")
        model.shared_by = sequence_group
        for layer in ("layers.0.attention", "layers.1.attention"):
            model.named[f"{layer}.{config.part}"] = SimpleNamespace(requires_grad=True)
"""
BLOCK = {"trimtab": {"grows": {}}}


class Model:
    """Two layers of a projection and its bias each, and an embedding."""

    def __init__(self):
        names = [
            "embedding.weight",
            *(
                f"layers.{at}.{part}"
                for at in (0, 1)
                for part in ("attention.q.weight", "attention.q.bias", "mlp.weight")
            ),
        ]
        self.named = {name: SimpleNamespace(requires_grad=True) for name in names}

    def named_parameters(self):
        yield from self.named.items()

    def parameters(self):
        yield from self.named.values()

    def those(self, part):
        return [one for name, one in self.named.items() if part in name]


@pytest.fixture
def engine(site, monkeypatch):
    """DeepSpeed's engine with ours before it, and the plugin ``grows``."""
    site.add(
        "trimtab-grows",
        entry_points={"trimtab.plugins": {"grows": "grows_hooks"}},
        files={"grows_hooks.py": PLUGIN},
    )

    class DeepSpeedEngine:
        def __init__(
            self,
            args,
            model,
            optimizer=None,
            model_parameters=None,
            mpu=None,
            config=None,
            config_class=None,
            mesh_device=None,
        ):
            """DeepSpeed's own."""
            self.parameters, self.flagged = model_parameters, getattr(model, "flagged", None)

    def set_optimizer_flags(config_class, model):
        model.flagged = len(model.named)

    stand_ins = {
        "deepspeed": {"set_optimizer_flags": set_optimizer_flags},
        "deepspeed.runtime.engine": {"DeepSpeedEngine": DeepSpeedEngine},
    }
    for name, content in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    model_change.install()
    return DeepSpeedEngine


FORMS = {
    "the model's own iterator": lambda model: model.parameters(),
    "a list": lambda model: list(model.parameters()),
    "an iterator over a list": lambda model: iter(list(model.parameters())),
    "a tuple": lambda model: tuple(model.parameters()),
}


@pytest.mark.parametrize("form", FORMS)
def test_new_parameters_join_those_that_are_given(engine, form):
    model = Model()
    made = engine(None, model, model_parameters=FORMS[form](model), config=BLOCK)
    assert len(made.parameters) == len(model.named) == 9
    assert {id(one) for one in made.parameters} == {id(one) for one in model.parameters()}
    assert made.flagged == 9


def test_they_join_the_group_of_their_nearest_relative(engine):
    model = Model()
    groups = [
        {"params": model.those("embedding")[0], "lr": 1},
        {"params": iter(model.those("layers.0")), "lr": 2},
        {"params": model.those("1.mlp"), "lr": 3},
        {"params": model.those("1.attention.q.bias"), "lr": 4},
        {"params": model.those("1.attention.q.weight"), "lr": 5},
    ]
    made = engine(None, model, model_parameters=groups, config=BLOCK)
    paces = {id(one): group["lr"] for group in made.parameters for one in group["params"]}
    assert [paces[id(one)] for one in model.those("gate")] == [2, 5]
    assert [len(group["params"]) for group in made.parameters] == [1, 4, 1, 1, 2]


def test_an_optimizer_that_was_made_before_gets_them_in_its_groups(engine):
    model = Model()
    groups = [
        {"params": model.those("layers.0"), "param_names": list("abc")},
        {"params": model.those("layers.1")},
    ]
    engine(None, model, SimpleNamespace(param_groups=groups), config=BLOCK)
    first, second = model.those("gate")
    assert [groups[0]["params"][-1], groups[1]["params"][-1]] == [first, second]
    assert groups[0]["param_names"] == ["a", "b", "c", "layers.0.attention.gate.weight"]
    assert "param_names" not in groups[1]


@pytest.mark.parametrize("config", [None, {}, {"trimtab": {}}])
def test_without_the_block_all_is_left_alone(engine, config):
    model = Model()
    given = model.parameters()
    made = engine(None, model, model_parameters=given, config=config)
    assert made.parameters is given
    assert len(model.named) == 7
    assert engine.__init__.__doc__ == "DeepSpeed's own."


def test_what_is_wrong_is_said_with_its_place(engine):
    place = r"^the DeepSpeed configuration, trimtab\.grows"
    with pytest.raises(BadInput, match=place + ": part is 1"):
        engine(None, Model(), config={"trimtab": {"grows": {"part": 1}}})
    broken = Model()
    broken.named_parameters = broken.parameters = lambda: iter(())
    broken.named = None
    with pytest.raises(BadInput, match=place + ", layer 0: it is no model; give one"):
        engine(None, broken, config=BLOCK)
    with pytest.raises(BadInput, match="no plugin 'grow' is installed"):
        engine(None, Model(), config={"trimtab": {"grow": {}}})
    others = SimpleNamespace(param_groups=[{"params": list(Model().parameters())}])
    with pytest.raises(BadInput, match="given no parameter of the model"):
        engine(None, Model(), others, config=BLOCK)


def test_plugins_hear_who_shares_sequences(engine):
    def mpu(ranks):
        return SimpleNamespace(
            get_sequence_data_parallel_group=None,
            get_sequence_parallel_world_size=lambda: ranks,
            get_sequence_parallel_group=lambda: "group",
        )

    def mesh(ranks):
        return {"sequence_parallel": SimpleNamespace(size=lambda: ranks)}

    def heard(**given):
        model = Model()
        engine(None, model, config=BLOCK, **given)
        return model.shared_by

    assert heard(mpu=mpu(2)) == heard(mpu=mpu(2), mesh_device=mesh(2)) == "group"
    assert heard() is heard(mpu=mpu(1)) is heard(mesh_device=mesh(1)) is None
    with pytest.raises(BadInput, match=r"sums no gradients .* by a mesh; leave it"):
        heard(mesh_device=mesh(2))


NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)


@given(NAMES, NAMES)
def test_nearness_counts_the_modules_that_two_names_begin_with(one, other):
    shared, same = model_change._nearness(one, other)
    modules, others = one.split("."), other.split(".")
    lengths = range(min(len(modules), len(others)) + 1)
    assert shared == max(length for length in lengths if modules[:length] == others[:length])
    assert same == (modules[-1] == others[-1])
