"""Weights that are replaced under a recorded step, and modules that go, are copied or saved."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from stepped import (
    PROMPT,
    deviation,
    filled,
    lent,
    programs,
    recorded,
    step,
    stepped,
    steps_of,
    two,
)
from zoo.build import build

from zmlx.graph import tree
from zmlx.graph.tree import Tree
from zmlx.patch import unpatch
from zmlx.patch.pattern import STATE, original_class

TOKENS = [71, 8, 133, 40]


def same(ours, theirs) -> bool:
    return deviation(ours, theirs) < 1e-5


def halved(model: nn.Module) -> None:
    model.update(tree_map(lambda p: p * 0.5, model.parameters()))


def one_replaced(model: nn.Module) -> None:
    layer = model.layers[1].mlp.up_proj
    layer.weight = layer.weight * 2


def loaded(model: nn.Module) -> None:
    weights = [(path, p * 1.25) for path, p in tree_flatten(model.parameters())]
    model.load_weights(weights)


def child_replaced(model: nn.Module) -> None:
    old = model.layers[0].self_attn.o_proj
    mx.random.seed(4)
    model.layers[0].self_attn.o_proj = nn.Linear(*old.weight.shape[::-1], bias=False)


def bias_added(model: nn.Module) -> None:
    layer = model.layers[0].mlp.down_proj
    layer.bias = mx.ones(layer.weight.shape[0])


def layer_dropped(model: nn.Module) -> None:
    model.layers[1].mlp.down_proj.weight = mx.zeros_like(model.layers[1].mlp.down_proj.weight)


def with_lora(model: nn.Module) -> None:
    mx.random.seed(6)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    model.update(tree_map(lambda p: p + 0.01, model.trainable_parameters()))
    model.eval()


CHANGES = (halved, one_replaced, loaded, child_replaced, bias_added, layer_dropped, with_lora)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_after_the_next_prompt(change):
    model, apart = two("llama")
    results = []
    for each in (model, apart):
        cache = filled(each)
        stepped(each, cache, TOKENS)
        change(each)
        filled(each, PROMPT[:, :3], cache, on=nullcontext)
        results.append(stepped(each, cache, TOKENS))
    assert same(*results)
    assert len(programs(model)) == 1


def test_the_host_may_read_weights_between_steps():
    """On CUDA MLX moves an array to other memory then, and what was there becomes others'."""
    results = []
    for each in two("llama"):
        cache = filled(each)
        each.update(tree_map(lambda p: p + 0, each.parameters()))  # made on the device
        mx.eval(each.parameters())
        rows = []
        for token in TOKENS * 2:
            rows.append(stepped(each, cache, [token]))
            if len(rows) == len(TOKENS):
                weights = [np.array(p) for _, p in tree_flatten(each.parameters())]
                mx.eval([mx.full(w.shape, float("nan")) for w in weights for _ in range(4)])
        results.append(np.concatenate(rows))
    assert same(*results)


@pytest.mark.parametrize("change", [c for c in CHANGES if c is not bias_added])
def test_a_change_between_two_steps_is_seen_soon(change):
    """A part of the tree is looked at in every step, all of it in so many steps."""
    model, apart = two("llama")
    caches = [filled(each) for each in (model, apart)]
    for each, cache in zip((model, apart), caches, strict=True):
        stepped(each, cache, TOKENS)
        change(each)
    seen = None
    for number in range(tree._PARTS + 1):
        rows = [
            stepped(m, copy.deepcopy(c), [5]) for m, c in zip((model, apart), caches, strict=True)
        ]
        seen = same(*rows)
        stepped(model, caches[0], [number])
        stepped(apart, caches[1], [number])
    assert seen


def test_every_place_is_looked_at_within_some_steps():
    """The same without a copy, which makes the program look at everything."""
    model, apart = two("llama")
    for number in range(3):
        cache = filled(model)
        stepped(model, cache, TOKENS)
        layer = model.layers[number % 2].mlp.gate_proj
        layer.weight = layer.weight * 1.5
        for token in range(tree._PARTS):
            mx.eval(step(model, cache, token))
        truth = copy.deepcopy(cache)
        apart.update(model.parameters())
        assert same(stepped(model, cache, [9]), stepped(apart, truth, [9]))


def test_the_weights_of_another_module_are_not_looked_at():
    model, _ = two("llama")
    cache = filled(model)
    stepped(model, cache, TOKENS)
    before = programs(model)
    model.lm_head.weight = model.lm_head.weight * 2  # outside of the module with the layers
    filled(model, PROMPT, cache, on=nullcontext)
    stepped(model, cache, TOKENS)
    assert programs(model) == before


def test_training_and_evaluating_again():
    model, apart = two("llama")
    results = []
    for each in (model, apart):
        cache = filled(each)
        rows = [stepped(each, cache, TOKENS)]
        each.train()
        rows.append(stepped(each, cache, TOKENS))
        assert not any(lent(cache))
        each.eval()
        rows.append(stepped(each, cache, TOKENS))
        results.append(np.concatenate(rows))
    assert same(*results)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_forward(training):
    """Also in a step of one token, which is a program's when no gradient is asked for."""
    model, apart = two("llama")
    grads = []
    for each in (model, apart):
        cache = filled(each)
        stepped(each, cache, TOKENS)
        each.train(training)

        def loss(model, cache=cache):
            return model(mx.array([[5]]), cache=cache).square().mean()

        value, gradient = nn.value_and_grad(each, loss)(each)
        mx.eval(value, gradient)
        grads.append([np.array(g) for _, g in tree_flatten(gradient)])
    assert all(np.abs(b).max() > 0 for b in grads[1])
    assert all(deviation(a, b) < 1e-4 for a, b in zip(*grads, strict=True))


def test_steps_go_on_after_a_gradient():
    model, apart = two("llama")
    results = []
    for each in (model, apart):
        cache = filled(each)
        rows = [stepped(each, cache, TOKENS)]
        nn.value_and_grad(each, lambda m: m(PROMPT).square().mean())(each)
        rows.append(stepped(each, filled(each), TOKENS))
        results.append(np.concatenate(rows))
    assert same(*results)
    assert programs(model)


def test_the_model_goes_when_nobody_holds_it():
    """Without the garbage collector, with a cache that stays."""
    model, apart = (recorded(build("llama")) for _ in range(2))
    cache = filled(model)
    stepped(model, cache, TOKENS)
    inner, steps = weakref.ref(model.model), weakref.ref(steps_of(model))
    weight = weakref.ref(model.layers[0])
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    held = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    gc.disable()
    try:
        del model
        assert inner() is weight() is steps() is None
    finally:
        gc.enable()
    assert mx.get_active_memory() <= before - held
    # The cache is an ordinary one for whoever goes on with it.
    assert cache[0].offset == len(TOKENS) + PROMPT.size
    mx.eval(apart(PROMPT, cache=cache))


def test_unpatch_leaves_nothing():
    model, apart = two("llama")
    cache, theirs = filled(model), filled(apart)
    stepped(model, cache, TOKENS)
    stepped(apart, theirs, TOKENS)
    steps = weakref.ref(steps_of(model))
    unpatch(model)
    assert steps() is None
    assert all(original_class(m) is None and STATE not in vars(m) for _, m in model.named_modules())
    assert np.array_equal(*(stepped(m, filled(m), TOKENS) for m in (model, apart)))
    assert same(stepped(model, cache, TOKENS), stepped(apart, theirs, TOKENS))
    assert not any(lent(cache))


def test_patched_again():
    model, apart = two("llama")
    stepped(model, filled(model), TOKENS)
    recorded(unpatch(model))
    assert same(*(stepped(m, filled(m), TOKENS) for m in (model, apart)))
    assert programs(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_programs_of_their_own(copied):
    model, apart = two("llama")
    cache = filled(model)
    stepped(model, cache, TOKENS)
    twin = copied(model.model)
    assert STATE not in vars(twin)
    model.model, first = twin, model.model
    halved(first)
    assert same(stepped(model, filled(model), TOKENS), stepped(apart, filled(apart), TOKENS))


def test_patterns_inside_are_as_the_library_made_them_while_a_step_is_traced():
    """Layers that another pattern replaced give the same, and stay replaced."""
    model, apart = two("llama")
    layer = model.layers[0].mlp
    base = type(layer)
    wrong = type(base.__name__, (base,), {"__call__": lambda *_: 1 / 0, "_zmlx_original": base})
    cache, theirs = filled(model), filled(apart)
    stepped(model, cache, TOKENS[:1])  # with weights that are new the forward runs
    stepped(apart, theirs, TOKENS[:1])
    layer.__class__ = wrong
    assert same(stepped(model, cache, TOKENS), stepped(apart, theirs, TOKENS))
    assert type(layer) is wrong


class Remembers(nn.Module):
    """A model whose forward keeps what it saw, as some do for a later loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = mx.zeros((1, 1, 1))

    def __call__(self, x: mx.array) -> mx.array:
        self.seen = x * 1
        return x


def test_a_forward_that_changes_its_module_keeps_it_whole(capsys):
    model, apart = two("llama")
    for each in (model, apart):
        each.model.norm = Remembers()
    results = []
    for each in (model, apart):
        cache = filled(each)
        results.append(stepped(each, cache, TOKENS))
        mx.eval(each.model.norm.seen)
    assert np.array_equal(*results)
    assert np.array_equal(model.model.norm.seen, apart.model.norm.seen)
    assert capsys.readouterr().err.count("the weights change from step to step") == 1
    assert not programs(model)


def test_a_trace_leaves_nothing_in_the_module(capsys):
    """A forward that keeps what it saw in some steps only."""
    model, apart = two("llama")
    for each in (model, apart):
        each.model.norm = Remembers()
    cache, theirs = filled(model), filled(apart)
    steps = stepped(model, cache, TOKENS[:1]), stepped(apart, theirs, TOKENS[:1])
    assert same(*steps)
    held = model.model.norm.seen
    steps_of(model)._tree = Tree(model.model)  # as if that step had kept nothing
    mx.eval(step(model, cache, 3))
    assert capsys.readouterr().err.count("the forward changes what the module holds") == 1
    assert model.model.norm.seen is not held
    mx.eval(model.model.norm.seen)  # no marker of a trace
    for token in TOKENS:
        stepped(model, cache, [token])
    assert not programs(model)


# The tree


def test_a_tree_sees_what_is_replaced_added_and_removed():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    look = Tree(module)
    assert look.unchanged()
    layer = module.layers[1]
    layer.extra = mx.array(1)
    assert not look.unchanged()
    del layer.extra
    assert look.unchanged()
    bias = layer.pop("bias")
    assert not look.unchanged()
    layer.bias = bias
    assert look.unchanged()
    module.layers.append(nn.Linear(2, 2))
    assert not look.unchanged()
    module.layers.pop()
    module.layers[0] = nn.Linear(2, 2)
    assert not look.unchanged()


def test_a_tree_is_put_back():
    module = nn.Sequential(nn.Linear(2, 2))
    layer, weight = module.layers[0], module.layers[0].weight
    look = Tree(module)
    assert not look.put_back()
    layer.weight, layer.extra = mx.zeros((2, 2)), mx.array(1)
    module.layers.append(nn.Linear(2, 2))
    module.top = mx.array(2)
    assert look.put_back()
    assert look.unchanged()
    assert layer.weight is weight
    assert "extra" not in layer
    assert "top" not in module
    assert len(module.layers) == 1


def test_a_tree_is_seen_in_parts():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    look = Tree(module)
    module.layers[7].weight = mx.zeros((2, 2))
    seen = [look.unchanged_in_part() for _ in range(tree._PARTS)]
    assert seen.count(False) == 1


def test_a_tree_does_not_keep_its_module():
    module = nn.Linear(2, 2)
    reference, look = weakref.ref(module), Tree(module)
    del module
    assert reference() is None
    assert look
