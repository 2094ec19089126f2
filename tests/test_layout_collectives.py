"""Collectives of compiled programs that were written to hold them, and of other compilers' text."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from efae_jax.layout.collectives import Collective, collectives

ROWS, COLUMNS, TRIPS = 64, 16, 5


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


SPLIT = P("fsdp")


def of(mesh, function, specs=SPLIT, out=SPLIT):
    """Those of a function of one device's part."""
    shape = (ROWS, COLUMNS)
    whole = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    lowered = jax.jit(whole).lower(jax.ShapeDtypeStruct(shape, jnp.float32))
    return collectives(lowered.compile().as_text())


def bytes_of(rows):
    return rows * COLUMNS * 4


@pytest.mark.parametrize(("axes", "group"), [("fsdp", 4), ("data", 2), (("data", "fsdp"), 8)])
def test_a_sum(mesh, axes, group):
    found = of(mesh, lambda v: jax.lax.psum(v, axes))
    assert found == [Collective("all-reduce", group, 1, bytes_of(ROWS / 4), False)]


def test_a_gather_counts_what_it_gives(mesh):
    found = of(mesh, lambda v: jax.lax.all_gather(v, "fsdp", tiled=True), out=P())
    assert found == [Collective("all-gather", 4, 1, bytes_of(ROWS), False)]


def test_a_scatter_counts_what_it_takes(mesh):
    def function(v):
        return jax.lax.psum_scatter(v * jax.lax.axis_index("fsdp"), "fsdp", tiled=True)

    found = of(mesh, function, specs=P())
    assert found == [Collective("reduce-scatter", 4, 1, bytes_of(ROWS), False)]


def test_an_exchange_and_a_shift(mesh):
    def function(v):
        v = jax.lax.all_to_all(v, "fsdp", 0, 0, tiled=True)
        return jax.lax.ppermute(v, "fsdp", [(i, (i + 1) % 4) for i in range(4)])

    assert of(mesh, function) == [
        Collective("all-to-all", 4, 1, bytes_of(ROWS / 4), False),
        Collective("collective-permute", 0, 1, bytes_of(ROWS / 4), False),
    ]


def test_a_loops_body_counts_as_often_as_it_runs(mesh):
    def function(v):
        step = lambda c, _: (jnp.tanh(jax.lax.psum(c, "fsdp")), None)  # noqa: E731
        return jax.lax.scan(step, v, None, length=TRIPS)[0]

    found = of(mesh, function)
    assert found == [Collective("all-reduce", 4, TRIPS, TRIPS * bytes_of(ROWS / 4), False)]


def test_a_loop_of_unknown_length_counts_once_and_says_so(mesh):
    def function(v):
        step = functools.partial(jax.lax.psum, axis_name="fsdp")
        return jax.lax.while_loop(lambda c: c[0, 0] < 100, step, v)

    (found,) = of(mesh, function)
    assert found == Collective("all-reduce", 4, 1, bytes_of(ROWS / 4), True)


def test_programs_that_the_compiler_splits(mesh):
    """The gather that XLA itself puts where a split array is needed whole."""
    split = jax.sharding.NamedSharding(mesh, P("fsdp", None))
    whole = jax.sharding.NamedSharding(mesh, P())
    program = jax.jit(lambda v: 2 * v, in_shardings=split, out_shardings=whole)
    shape = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    found = collectives(program.lower(shape).compile().as_text())
    assert found == [Collective("all-gather", 4, 1, bytes_of(ROWS), False)]


# As a GPU's and a TPU's compiler write them: in a start and a done, wrapped, fused with a slice.
OTHERS = """HloModule other, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%wrapped (p: bf16[8,128]) -> bf16[1,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %rs = bf16[1,128]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

%all-reduce-scatter.1 (q: f32[16,128]) -> f32[2,128] {
  %q = f32[16,128]{1,0:T(8,128)} parameter(0)
  %ar = f32[16,128]{1,0:T(8,128)} all-reduce(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %part = f32[2,128]{1,0:T(2,128)} slice(%ar), slice={[0:2], [0:128]}
}

ENTRY %main (a: f32[16,128], b: bf16[8,128]) -> (f32[128,128]) {
  %a = f32[16,128]{1,0:T(8,128)S(1)} parameter(0)
  %b = bf16[8,128]{1,0} parameter(1)
  %ag-start = (f32[16,128]{1,0}, /*index=1*/f32[128,128]{1,0}) all-gather-start(%a), GROUPS
  %ag-done = f32[128,128]{1,0} all-gather-done(%ag-start)
  %rs-start = ((bf16[8,128]{1,0}), bf16[1,128]{1,0}) async-start(%b), calls=%wrapped
  %rs-done = bf16[1,128]{1,0} async-done(%rs-start)
  %fusion = f32[2,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %cp-start = (f32[16,128]{1,0}, f32[16,128]{1,0}, u32[]) collective-permute-start(%a), PAIRS
  %cp-done = f32[16,128]{1,0} collective-permute-done(%cp-start)
  ROOT %out = (f32[128,128]{1,0}) tuple(%ag-done)
}
"""
OTHERS = OTHERS.replace(
    "GROUPS", "replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y'}, dimensions={0}"
).replace("PAIRS", "source_target_pairs={{0,1},{1,0}}")


def test_split_wrapped_and_fused_collectives_count_once():
    assert collectives(OTHERS) == [
        Collective("all-gather", 8, 1, 128 * 128 * 4, False),
        Collective("reduce-scatter", 8, 2, 8 * 128 * 2 + 16 * 128 * 4, False),
        Collective("collective-permute", 0, 1, 16 * 128 * 4, False),
    ]


# A TPU's compiler does not say how often a loop runs; its condition does.
LOOP = """HloModule loop

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %v = f32[8]{0} get-tuple-element(%p), index=1
  %ar = f32[8]{0} all-reduce(%v), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %ar)
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %p.1 = (s32[], f32[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%a), condition=%condition, body=%body
}
"""


def test_the_condition_tells_how_often_a_loop_runs():
    assert collectives(LOOP) == [Collective("all-reduce", 2, 4, 4 * 32, False)]
    for other in ("direction=GT", "direction=LE"):
        (found,) = collectives(LOOP.replace("direction=LT", other))
        assert (found.count, found.uncertain) == (1, True)


def test_parts_of_an_axis_of_a_mesh():
    text = OTHERS.replace("{'x','y'}", "{'x','y':(2)2}")
    assert collectives(text)[0].group == 4


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("HloModule nothing")
