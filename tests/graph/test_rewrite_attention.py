"""Attention in small steps: what is fused gives what MLX gives; what is not understood is refused.

A step is a function of tokens and caches, as a model's forward is.
"""

from __future__ import annotations

import copy
import math
from collections import Counter

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from zmlx.graph.caches import Layout, NothingCached, ProgramRefused
from zmlx.graph.program import DecodeProgram, WrongResult, traced_step
from zmlx.graph.trace import TraceError

VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM = 20, 64, 4, 2, 32


def made(*shape, seed):
    array = mx.random.normal(shape, key=mx.random.key(seed)) / math.sqrt(shape[-1])
    mx.eval(array)
    return array


EMBEDDING = made(VOCABULARY, WIDTH, seed=1) * 8
mx.eval(EMBEDDING)
Q, OUT = made(HEADS * DIM, WIDTH, seed=2), made(WIDTH, HEADS * DIM, seed=3)
K, V = (made(KV_HEADS * DIM, WIDTH, seed=seed) for seed in (4, 5))
Q_NORM, K_NORM = (made(DIM, seed=seed) + 1 for seed in (6, 7))
ALL_NORM = made(HEADS * DIM, seed=8) + 1
SINKS, FREQS = made(HEADS, seed=9), mx.arange(1, DIM // 2 + 1).astype(mx.float32) * 3
TABLE = made(2_000, WIDTH, seed=10)
mx.eval(Q_NORM, K_NORM, ALL_NORM, FREQS)


def heads(y, count=None):
    return y.reshape(1, y.shape[1], -1 if count is None else count, DIM).transpose(0, 2, 1, 3)


def rope(x, offset, **options):
    options = {"traditional": False, "base": 1e4, "scale": 1.0, **options}
    return mx.fast.rope(x, DIM, offset=offset, **options)


def attend(h, cache, *, q=None, k=None, v=None, sdpa=None):
    """Return h after a layer of attention; parts of it may be others."""
    queries = (q or (lambda h, n: rope(heads(h @ Q.T), n)))(h, cache.offset)
    keys = (k or (lambda h, n: rope(heads(h @ K.T), n)))(h, cache.offset)
    values = (v or (lambda h, n: heads(h @ V.T)))(h, cache.offset)
    queries, keys, values = queries, *cache.update_and_fetch(keys, values)
    sdpa = sdpa or mx.fast.scaled_dot_product_attention
    out = sdpa(queries, keys, values, scale=DIM**-0.5)
    return h + out.transpose(0, 2, 1, 3).reshape(1, h.shape[1], -1) @ OUT.T


def forward(tokens, caches, **options):
    h = EMBEDDING[tokens]
    for cache in caches:
        h = attend(h, cache, **options)
    return h


def prompted(caches, length=9, width=DIM):
    """Fill caches as a prompt does."""
    for number, cache in enumerate(caches):
        new = made(2, 1, KV_HEADS, length, width, seed=40 + number)
        cache.update_and_fetch(new[0], new[1])
        mx.eval(cache.keys, cache.values)
    return caches


def replayed(forward, caches, steps=5):
    """Return the operations of a step's program, after steps that gave what the forward does."""
    layout = Layout.of(caches)
    program = DecodeProgram(traced_step(forward, layout), layout)
    stock = copy.deepcopy(caches)
    for number in range(steps):
        token = mx.array([[(number + 3) % VOCABULARY]])
        found, truth = program(token, caches), forward(token, stock)
        assert (found.shape, found.dtype) == (truth.shape, truth.dtype)
        error = mx.abs(found - truth).max() / mx.abs(truth).max()
        assert error.item() < 2e-5, number
    return Counter(node.op for node in program.traced.graph.nodes)


def test_a_layer_is_fused():
    found = replayed(forward, prompted([KVCache(), KVCache()]))
    assert found["FusedDecodeAttention"] == 2
    assert not {"RoPE", "SliceUpdate", "ScaledDotProductAttention"} & set(found)


NORMED = {
    "both": (
        lambda h, n: rope(mx.fast.rms_norm(heads(h @ Q.T), Q_NORM, 1e-5), n),
        lambda h, n: rope(mx.fast.rms_norm(heads(h @ K.T), K_NORM, 1e-5), n),
        0,
    ),
    "before the heads are turned": (
        lambda h, n: rope(
            mx.fast.rms_norm((h @ Q.T).reshape(1, -1, HEADS, DIM), Q_NORM, 1e-5).swapaxes(1, 2), n
        ),
        lambda h, n: rope(
            mx.fast.rms_norm((h @ K.T).reshape(1, -1, KV_HEADS, DIM), K_NORM, 1e-5).swapaxes(1, 2),
            n,
        ),
        0,
    ),
    "other eps": (
        lambda h, n: rope(mx.fast.rms_norm(heads(h @ Q.T), Q_NORM, 1e-5), n),
        lambda h, n: rope(mx.fast.rms_norm(heads(h @ K.T), K_NORM, 1e-2), n),
        2,
    ),
    "queries only": (
        lambda h, n: rope(mx.fast.rms_norm(heads(h @ Q.T), Q_NORM, 1e-5), n),
        lambda h, n: rope(heads(h @ K.T), n),
        1,
    ),
    "without a weight": (
        lambda h, n: rope(mx.fast.rms_norm(heads(h @ Q.T), None, 1e-5), n),
        lambda h, n: rope(mx.fast.rms_norm(heads(h @ K.T), None, 1e-5), n),
        2,
    ),
    "after the rotation": (
        lambda h, n: mx.fast.rms_norm(rope(heads(h @ Q.T), n), Q_NORM, 1e-5),
        lambda h, n: mx.fast.rms_norm(rope(heads(h @ K.T), n), K_NORM, 1e-5),
        0,
    ),
    "of all heads": (
        lambda h, n: rope(heads(mx.fast.rms_norm(h @ Q.T, ALL_NORM, 1e-5)), n),
        lambda h, n: rope(heads(h @ K.T), n),
        1,
    ),
}


@pytest.mark.parametrize("name", NORMED)
def test_norms_of_heads(name):
    q, k, apart = NORMED[name]
    found = replayed(lambda t, c: forward(t, c, q=q, k=k), prompted([KVCache()]))
    assert found["FusedDecodeAttention"] == 1
    small = found["RMSNorm"] + found["FusedSmall"]
    assert (small > 0) == (apart > 0) or name == "after the rotation"


ROTATED = {
    "none": (lambda x, n: x, lambda x, n: x),
    "traditional": (lambda x, n: rope(x, n, traditional=True),) * 2,
    "other scale": (lambda x, n: rope(x, n, scale=0.25),) * 2,
    "frequencies": (lambda x, n: rope(x, n, base=None, freqs=FREQS),) * 2,
    "queries only": (rope, lambda x, n: x),
    "keys only": (lambda x, n: x, rope),
    "otherwise": (rope, lambda x, n: rope(x, n, base=500.0)),
    "by an array": (lambda x, n: rope(x, mx.array(n)),) * 2,
    "a part": (lambda x, n: mx.fast.rope(x, 16, traditional=False, base=1e4, scale=1, offset=n),)
    * 2,
    "twice": (lambda x, n: rope(rope(x, n), n),) * 2,
}


@pytest.mark.parametrize("name", ROTATED)
def test_rotations(name):
    q, k = ROTATED[name]
    found = replayed(
        lambda t, c: forward(
            t, c, q=lambda h, n: q(heads(h @ Q.T), n), k=lambda h, n: k(heads(h @ K.T), n)
        ),
        prompted([KVCache()]),
    )
    assert found["FusedDecodeAttention"] == 1


def test_heads_that_are_rotated_as_if_they_were_positions():
    """Without the turn of axes each head has a position of its own."""

    def turned(weight):
        return lambda h, n: rope((h @ weight.T).reshape(1, 1, -1, DIM), n).swapaxes(1, 2)

    found = replayed(lambda t, c: forward(t, c, q=turned(Q), k=turned(K)), prompted([KVCache()]))
    assert found["FusedDecodeAttention"] == 1


def test_sinks_and_another_scale():
    def sdpa(q, k, v, scale):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, sinks=SINKS)

    assert replayed(lambda t, c: forward(t, c, sdpa=sdpa), prompted([KVCache()]))


@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("length", [5, 11, 12, 30])
def test_rotating_caches(length, keep):
    found = replayed(forward, prompted([RotatingKVCache(12, keep)] * 1, length), 20)
    assert found["FusedDecodeAttention"] == 1


def test_growing_and_rotating_caches_together():
    caches = prompted([KVCache(), RotatingKVCache(12), RotatingKVCache(16, 2)], 10)
    assert replayed(forward, caches, 12)["FusedDecodeAttention"] == 3


def test_caches_in_lists_and_caches_that_no_layer_uses():
    def listed(tokens, caches):
        h = EMBEDDING[tokens]
        h = attend(h, caches[0][1])
        return attend(h, caches[2])

    caches = [CacheList(KVCache(), KVCache()), KVCache(), KVCache()]
    prompted([caches[0][1], caches[2]])
    assert replayed(listed, caches)["FusedDecodeAttention"] == 2
    assert [caches[0][1].offset, caches[2].offset] == [14, 14]
    assert caches[0][0].keys is caches[1].keys is None


def test_keys_that_a_later_layer_reads_again():
    def shared(tokens, caches):
        h = EMBEDDING[tokens]
        offset = caches[0].offset
        keys, values = caches[0].update_and_fetch(rope(heads(h @ K.T), offset), heads(h @ V.T))
        for weight in (Q, Q[::-1]):
            out = mx.fast.scaled_dot_product_attention(
                rope(heads(h @ weight.T), offset), keys, values, scale=DIM**-0.5
            )
            h = h + out.reshape(1, 1, -1) @ OUT.T
        return h

    assert replayed(shared, prompted([KVCache()]))["FusedDecodeAttention"] == 2


def test_keys_and_values_that_change_places():
    def turned(tokens, caches):
        def sdpa(q, k, v, scale):
            return mx.fast.scaled_dot_product_attention(q, v, k, scale=scale)

        return forward(tokens, caches, sdpa=sdpa)

    assert replayed(turned, prompted([KVCache()]))["FusedDecodeAttention"] == 1


def test_two_caches_that_one_attention_reads():
    def crossed(tokens, caches):
        h = EMBEDDING[tokens]
        offset = caches[0].offset
        both = [c.update_and_fetch(rope(heads(h @ K.T), offset), heads(h @ V.T)) for c in caches]
        for (keys, _), (_, values) in (both, both[::-1]):
            out = mx.fast.scaled_dot_product_attention(
                rope(heads(h @ Q.T), offset), keys, values, scale=DIM**-0.5
            )
            h = h + out.reshape(1, 1, -1) @ OUT.T
        return h

    assert replayed(crossed, prompted([KVCache(), KVCache()]))["FusedDecodeAttention"] == 2


def test_the_position_is_a_number_wherever_it_is_read():
    def learned(tokens, caches):
        n = caches[0].offset
        h = EMBEDDING[tokens] + TABLE[mx.arange(n, n + 1)] + TABLE[mx.array([n])][None]
        scale = 1 + 0.1 * mx.log(1 + mx.floor(mx.array([n]) / 4))
        return attend(h * scale, caches[0])

    assert replayed(learned, prompted([KVCache()]), 9)["FusedDecodeAttention"] == 1


def test_other_arrays_beside_keys_and_values():
    def convolved(tokens, caches):
        h = EMBEDDING[tokens]
        states = mx.concatenate([caches[1][0], h], axis=1)
        caches[1][0] = states[:, 1:]
        return attend(h + states.sum(axis=1, keepdims=True), caches[0])

    plain = ArraysCache(1)
    plain[0] = made(1, 3, WIDTH, seed=50)
    assert replayed(convolved, [*prompted([KVCache()]), plain])["FusedDecodeAttention"] == 1


# ---- latents -------------------------------------------------------------------------------------

LATENT, ROTATED_DIM = 64, 32
Q_LATENT, Q_PE = made(HEADS * LATENT, WIDTH, seed=60), made(HEADS * 32, WIDTH, seed=61)
DOWN, DOWN_PE = made(LATENT, WIDTH, seed=62), made(ROTATED_DIM, WIDTH, seed=63)
LATENT_NORM, LATENT_OUT = made(LATENT, seed=64) + 1, made(WIDTH, HEADS * LATENT, seed=65)
mx.eval(LATENT_NORM)


def latent(factor=1.0, scale=0.1, rotate=lambda y, n: y):
    def forward(tokens, caches):
        h, offset = EMBEDDING[tokens], caches[0].offset
        q = (h @ Q_LATENT.T).reshape(1, 1, HEADS, LATENT).swapaxes(1, 2)
        q_pe = rope((h @ Q_PE.T).reshape(1, 1, HEADS, 32).swapaxes(1, 2), offset)
        new = mx.fast.rms_norm(h @ DOWN.T, LATENT_NORM, 1e-5)[:, None]
        k_pe = rope((h @ DOWN_PE.T).reshape(1, 1, 1, 32).swapaxes(1, 2), offset)
        keys, pe = caches[0].update_and_fetch(rotate(new, offset), k_pe)
        scores = (q_pe * (scale * factor)) @ pe.swapaxes(-1, -2)
        out = mx.fast.scaled_dot_product_attention(q, keys, keys, scale=scale, mask=scores)
        return h + out.swapaxes(1, 2).reshape(1, 1, -1) @ LATENT_OUT.T

    return forward


def latents():
    cache = KVCache()
    cache.update_and_fetch(made(1, 1, 9, LATENT, seed=66), made(1, 1, 9, 32, seed=67))
    mx.eval(cache.keys, cache.values)
    return [cache]


def test_latents():
    found = replayed(latent(), latents())
    assert found["FusedLatentAttention"] == 1
    assert not {"RoPE", "SliceUpdate", "ScaledDotProductAttention"} & set(found)


def test_latents_that_are_rotated():
    turned = latent(
        rotate=lambda y, n: mx.fast.rope(y, 64, traditional=False, base=1e4, scale=1, offset=n)
    )
    assert replayed(turned, latents())["FusedLatentAttention"] == 1


@pytest.mark.parametrize("factor", [1.001, 0.5, -1.0])
def test_another_factor_than_the_scale_is_refused(factor):
    refused(latent(factor), latents(), "a cache is read by more than the attention")


def test_latents_without_a_scale_are_refused():
    refused(latent(scale=0.0, factor=1.0), latents(), None)


# ---- refusals ------------------------------------------------------------------------------------


def refused(forward, caches, text):
    """Check that a step is refused, or right where no text is given."""
    if text is None:
        try:
            replayed(forward, caches)
        except ProgramRefused:
            return
    else:
        with pytest.raises((ProgramRefused, TraceError), match=text):
            traced_step(forward, Layout.of(caches))


def reading(read):
    def forward(tokens, caches):
        h = attend(EMBEDDING[tokens], caches[0])
        return h + read(caches[0])

    return forward


READ = "a cache is read by more than the attention"


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (lambda c: c.keys.sum(), READ),
        (lambda c: c.keys[..., : c.offset, :].max(), READ),
        (lambda c: c.values[..., -1:, :].sum(), READ),
        (lambda c: c.keys.shape[2], READ + "|position"),
    ],
)
def test_caches_that_are_read_otherwise(read, text):
    refused(reading(read), prompted([KVCache()]), text)


def test_a_cache_that_is_read_before_it_is_written():
    def forward(tokens, caches):
        before = mx.max(caches[0].keys)
        return attend(EMBEDDING[tokens], caches[0]) + before

    refused(forward, prompted([KVCache()]), READ)


def test_a_layer_that_the_result_does_not_depend_on():
    def forward(tokens, caches):
        h = attend(EMBEDDING[tokens], caches[0])
        attend(h, caches[1])
        return h

    refused(forward, prompted([KVCache(), KVCache()]), "does not depend on|read by more")


def test_a_layer_that_only_another_cache_depends_on():
    """The next step would not wait for it."""

    def forward(tokens, caches):
        h = attend(EMBEDDING[tokens], caches[0])
        caches[2][0] = attend(h, caches[1])
        return h

    plain = ArraysCache(1)
    plain[0] = made(1, 1, WIDTH, seed=50)
    refused(
        forward,
        [*prompted([KVCache(), KVCache()]), plain],
        "written by a layer that the result does not depend on",
    )


def test_a_cache_that_a_layer_does_not_write():
    refused(lambda t, c: attend(EMBEDDING[t], c[0]), prompted([KVCache(), KVCache()]), READ)


def test_a_cache_that_is_written_twice():
    refused(lambda t, c: attend(attend(EMBEDDING[t], c[0]), c[0]), prompted([KVCache()]), ".")


def test_keys_that_are_the_values():
    def forward(tokens, caches):
        def sdpa(q, k, v, scale):
            return mx.fast.scaled_dot_product_attention(q, k, k, scale=scale)

        return attend(EMBEDDING[tokens], caches[0], sdpa=sdpa)

    refused(forward, prompted([KVCache()]), READ)


def test_a_cache_that_was_empty_and_is_filled():
    caches = [*prompted([KVCache()]), KVCache()]

    def forward(tokens, caches):
        return attend(attend(EMBEDDING[tokens], caches[0]), caches[1])

    refused(forward, caches, "starts to use a cache that was empty")


def test_arrays_that_grow():
    def forward(tokens, caches):
        h = EMBEDDING[tokens]
        caches[1][0] = mx.concatenate([caches[1][0], h], axis=1)
        return attend(h + caches[1][0].sum(), caches[0])

    plain = ArraysCache(1)
    plain[0] = made(1, 3, WIDTH, seed=50)
    refused(forward, [*prompted([KVCache()]), plain], "an array of a cache becomes")


@pytest.mark.parametrize(
    "q",
    [
        lambda h, n: rope(heads(h @ Q.T), n + 1),
        lambda h, n: rope(heads(h @ Q.T), min(n, 500)),
        lambda h, n: heads(h @ Q.T) * (n % 7),
        lambda h, n: heads(h @ Q.T) * float(n),
        lambda h, n: heads(h @ (Q if n < 1_000 else -Q).T),
        lambda h, n: heads((h + mx.array(TABLE[n % 100].tolist())) @ Q.T),
    ],
    ids=["next", "clipped", "remainder", "factor", "another weight", "a row of a table"],
)
def test_the_position_is_used_otherwise(q):
    # Rows of a table are computed while it is traced: what matters is that they are constants.
    refused(lambda t, c: forward(t, c, q=q), prompted([KVCache()]), "position|reads what an array")


def test_a_row_of_a_table_that_python_looks_up():
    rows = TABLE[:300].tolist()

    def forward(tokens, caches):
        h = EMBEDDING[tokens] + mx.array(rows[caches[0].offset % 300])
        return attend(h, caches[0])

    refused(forward, prompted([KVCache()]), "the position is used for more than the cache")


def test_a_constant_that_is_the_position_by_chance():
    """257 is where a step is traced first."""

    def chance(tokens, caches):
        return attend(EMBEDDING[tokens] * mx.array(257) + mx.array([257]), caches[0])

    refused(chance, prompted([KVCache()]), None)


@pytest.mark.parametrize("many", [lambda h: (h, h), lambda h: [h], lambda h: {"h": h}])
def test_a_forward_that_returns_more_than_an_array(many):
    refused(
        lambda t, c: many(forward(t, c)),
        prompted([KVCache()]),
        "the forward returns a (tuple|list|dict), not one array",
    )


# ---- layouts -------------------------------------------------------------------------------------


def test_layouts_name_what_is_not_taken():
    class Other(KVCache):
        pass

    with pytest.raises(ProgramRefused, match="a cache of class Other"):
        Layout.of(prompted([Other()]))
    with pytest.raises(ProgramRefused, match="no cache with keys and values"):
        Layout.of([ArraysCache(1)])
    with pytest.raises(NothingCached):
        Layout.of([KVCache(), ArraysCache(1)])
    with pytest.raises(ProgramRefused, match="different lengths"):
        Layout.of([*prompted([KVCache()]), *prompted([KVCache()], 8)])
    with pytest.raises(ProgramRefused, match="a part is empty"):
        Layout.of([*prompted([KVCache()]), ArraysCache(1)])
    batch = ArraysCache(1, left_padding=[1])
    batch[0] = made(1, 3, seed=1)
    with pytest.raises(ProgramRefused, match="of a batch"):
        Layout.of([*prompted([KVCache()]), batch])
    cache = prompted([KVCache()])
    cache[0].offset = 300
    with pytest.raises(ProgramRefused, match="counts 300 tokens and has 256 rows"):
        Layout.of(cache)
    with pytest.raises(ProgramRefused, match="a window of 3 tokens; it takes 4 or more"):
        Layout.of(prompted([RotatingKVCache(3)])).positions()


def test_layouts_of_the_same_caches_are_equal():
    one, other = prompted([KVCache()]), prompted([KVCache()], 30)
    assert Layout.of(one) == Layout.of(other)
    assert hash(Layout.of(one)) == hash(Layout.of(other))
    assert Layout.of(one) != Layout.of(prompted([RotatingKVCache(12)]))
    assert Layout.of(one) != Layout.of(prompted([KVCache(), KVCache()]))
    assert Layout.of(one) != Layout.of([CacheList(*prompted([KVCache()]))])


def test_a_check_notices_a_wrong_program():
    caches = prompted([KVCache()])
    layout = Layout.of(caches)
    program = DecodeProgram(traced_step(forward, layout), layout)
    token = mx.array([[3]])
    program.check(forward, token, caches, 1e-4)
    assert caches[0].offset == 9

    def other(tokens, caches):
        return forward(tokens, caches) * 1.01

    with pytest.raises(WrongResult, match=r"differ from the model.s own step by 0\.0099"):
        program.check(other, token, caches, 1e-3)
    program.check(other, token, caches, 1e-1)

    def nothing(tokens, caches):
        return forward(tokens, caches) * 0 + mx.nan

    program.check(nothing, token, caches, 1e-3)  # nothing can be said


def test_a_check_asks_float32_who_is_wrong():
    caches = prompted([KVCache()])
    layout = Layout.of(caches)
    program = DecodeProgram(traced_step(forward, layout), layout)
    token = mx.array([[3]])

    def rough(tokens, caches):
        return (forward(tokens, caches).astype(mx.bfloat16) * 1.01).astype(mx.float32)

    # In float32 the forward without its casts is 1.01 times what the program gives, ...
    with pytest.raises(WrongResult, match="differ from the model's own step"):
        program.check(rough, token, caches, 1e-3)

    def cast(tokens, caches):
        hidden = forward(tokens, caches).astype(mx.bfloat16)
        return (hidden + 256).astype(mx.float32) - 256

    # ... and here the whole error is that of the casts.
    apart = cast(token, copy.deepcopy(caches)) - forward(token, copy.deepcopy(caches))
    assert mx.abs(apart).max() > 0.1
    program.check(cast, token, caches, 1e-3)
